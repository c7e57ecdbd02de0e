"""Model folders that need no torch, on a graph to compute by hand: the sum of a text's token ids, and how many they are."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

from gemma_rag.encoders import EncoderSettings, Input, TextEncoder, load_encoder
from gemma_rag.encoders.exported import (
    DESCRIPTION,
    TOKENIZER,
    VERSION,
    Agreement,
    Description,
    check_files,
    file_digest,
    profile_to_json,
)
from gemma_rag.errors import InputError, ModelUnavailable
from gemma_rag.prompts import E5, EMBEDDINGGEMMA, NO_PROMPTS, PromptProfile, Task

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "green", "blue", "query", "passage", ":"]


def graph(file: Path, output: str = "sentence_embedding", weight: float = 1.0, inputs: tuple[str, ...] = ()) -> Path:
    """Write the graph; further inputs are there and change nothing."""
    from onnx import TensorProto, helper, save

    names = ["input_ids", "attention_mask", *inputs]
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["ids", "mask"], ["seen"]),
        helper.make_node("Mul", ["seen", "weight"], ["weighted"]),
        helper.make_node("ReduceSum", ["weighted", "axis"], ["sum"], keepdims=1),
        helper.make_node("ReduceSum", ["mask", "axis"], ["count"], keepdims=1),
        helper.make_node("Concat", ["sum", "count"], [output], axis=1),
    ]
    made = helper.make_graph(
        nodes,
        "by-hand",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["texts", "tokens"]) for name in names],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["texts", 2])],
        [
            helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
            helper.make_tensor("weight", TensorProto.FLOAT, [1], [weight]),
        ],
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), str(file))
    return file


def tokenizer(file: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    words.enable_truncation(4)  # a file carries its last user's settings; ours are not to depend on them
    words.enable_padding(length=9)
    words.save(str(file))
    return file


def right(*ids: int) -> np.ndarray:
    """The vector of these tokens, special ones counted."""
    row = np.array([sum(ids), len(ids)], dtype=np.float64)
    return row / np.linalg.norm(row)


RED_GREEN = right(2, 4, 5, 3)


def write(folder: Path, **changes: object) -> Path:
    """Write the description of a folder, as an export does, for the files that are in it."""
    files = {
        file.name: (file.stat().st_size, file_digest(file))
        for file in folder.iterdir()
        if file.name != DESCRIPTION and file.is_file()
    }
    about = Description(
        runtime="onnx",
        precision="float32",
        model="owner/by-hand",
        weights="0123456789abcdef",
        native=2,
        max_tokens=8,
        profile=profile_to_json(NO_PROMPTS),
        agreement=Agreement(texts=24, smallest_cosine=0.99999, mean_cosine=1.0),
        made_with={"torch": "2.13.0"},
        files=files,
    )
    body = json.loads(about.model_dump_json()) | changes
    (folder / DESCRIPTION).write_text(json.dumps(body), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "exported"
    graph(folder / "model.onnx")
    tokenizer(folder / TOKENIZER)
    return write(folder)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """An exported folder of one's own, to damage."""
    return Path(shutil.copytree(made, tmp_path / "exported"))


@pytest.fixture
def published(made: Path, tmp_path: Path) -> Path:
    """A folder as others publish it: ``onnx/model.onnx``, the tokenizer and the configuration beside."""
    folder = tmp_path / "published"
    (folder / "onnx").mkdir(parents=True)
    shutil.copy(made / "model.onnx", folder / "onnx" / "model.onnx")
    shutil.copy(made / TOKENIZER, folder / TOKENIZER)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 8}))
    return folder


def load(model: Path | str, **settings) -> TextEncoder:
    return load_encoder(EncoderSettings(model=str(model), show_progress=False, **settings))


def refusal(model: Path | str, **settings) -> str:
    """The message of the refusal, which comes before anything is embedded."""
    with pytest.raises(ModelUnavailable) as caught:
        load(model, **settings)
    return str(caught.value)


def embed(encoder: TextEncoder, *texts: str, task: Task = Task.DOCUMENT) -> np.ndarray:
    return encoder.encode([Input(text, task) for text in texts])


# -- a folder as it should be -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["auto", "onnx"])
def test_an_exported_folder_opens(folder, runtime):
    rows = embed(load(folder, runtime=runtime), "red green", "blue", "red green red green red")
    assert np.abs(rows - [RED_GREEN, right(2, 6, 3), right(2, 4, 5, 4, 5, 4, 3)]).max() < 1e-6


def test_the_space_of_an_exported_folder_is_the_described_one(folder):
    space = load(folder).space
    assert space.model_dump(exclude={"prompts"}) == {
        "model": "owner/by-hand",
        "weights": "0123456789abcdef",
        "dimensions": 2,
        "max_tokens": 8,
        "overflow": "truncate",
        "runtime": "onnx",
        "precision": "float32",
    }


def test_a_folder_that_was_moved_is_the_same_space(folder):
    before = load(folder).space
    assert load(folder.rename(folder.with_name("elsewhere"))).space == before


def test_a_long_text_is_cut_before_its_last_special_token(folder):
    row = embed(load(folder), "red green blue red green blue red green blue")
    assert np.abs(row - right(2, 4, 5, 6, 4, 5, 6, 3)).max() < 1e-6


def test_a_smaller_context_is_taken_and_a_larger_one_refused(folder):
    assert load(folder, max_tokens=8).space.max_tokens == 8
    with pytest.raises(InputError, match="max_tokens is 9, and owner/by-hand takes 8 tokens at most"):
        embed(load(folder, max_tokens=9), "red")


def test_the_written_prompts_are_put_before_the_texts(folder):
    write(folder, profile=profile_to_json(E5))
    encoder = load(folder)
    assert encoder.profile is E5
    assert np.abs(embed(encoder, "red", task=Task.QUERY) - right(2, 7, 9, 4, 3)).max() < 1e-6


def test_prompts_of_the_users_choice_win(folder):
    assert load(folder, prompts="e5").profile is E5


def test_prompts_of_ones_own_are_read_back(folder):
    own = PromptProfile("own", prompts={Task.QUERY: "query : "}, matryoshka=(2, 1), float16=False, document_threshold=0.2)
    write(folder, profile=profile_to_json(own))
    assert load(folder).profile == own
    assert np.abs(embed(load(folder), "red", task=Task.QUERY) - right(2, 7, 9, 4, 3)).max() < 1e-6


@pytest.mark.parametrize(
    ("precision", "cosine", "warns"),
    [("float32", 0.9999, False), ("float32", 0.99, True), ("int8", 0.98, False), ("int8", 0.97, True)],
)
def test_an_export_that_agrees_too_little_with_its_source_warns(folder, caplog, precision, cosine, warns):
    write(folder, precision=precision, agreement={"texts": 24, "smallest_cosine": cosine, "mean_cosine": 1.0})
    embed(load(folder), "red")
    assert [f"cosine of {cosine:.4f} only" in record.getMessage() for record in caplog.records] == [True] * warns


# -- a damaged folder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.onnx", TOKENIZER])
def test_a_file_that_is_absent_is_named(folder, name):
    (folder / name).unlink()
    message = refusal(folder)
    assert f"{name} is absent or has another size" in message
    assert "export the model anew" in message


@pytest.mark.parametrize("name", ["model.onnx", TOKENIZER])
@pytest.mark.parametrize("change", ["longer", "shorter", "empty", "a folder"])
def test_a_file_of_another_size_is_named(folder, name, change):
    file, body = folder / name, (folder / name).read_bytes()
    if change == "a folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes({"longer": body + b" ", "shorter": body[:-1], "empty": b""}[change])
    assert f"{name} is absent or has another size" in refusal(folder)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"7", b"\xff\xfe{}", b"[" * 100_000, b'{"format": "gemma-rag model", "version": 1}']
)
def test_a_description_that_cannot_be_read_is_damaged(folder, body):
    (folder / DESCRIPTION).write_bytes(body)
    message = refusal(folder)
    assert str(folder / DESCRIPTION) in message
    assert "export" in message


@pytest.mark.parametrize(
    "change",
    [
        {"native": "many"},
        {"runtime": "torch"},
        {"precision": "int4"},
        {"files": ["model.onnx"]},
        {"files": {"model.onnx": [1]}},
        {"more": 1},
        {"profile": None},
    ],
)
def test_a_description_of_another_shape_is_damaged(folder, change):
    assert "is damaged" in refusal(write(folder, **change))


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": {"poetry": "p: "}},
        {"prompts": None},
        {"prompts": ["query: "]},
        {"name": ["e5"]},
        {"matryoshka": 5},
    ],
)
def test_prompts_that_cannot_be_read_are_damaged(folder, change):
    profile = profile_to_json(PromptProfile("own", prompts={Task.QUERY: "q: "}))
    assert "is damaged: its prompts cannot be read" in refusal(write(folder, profile=profile | change))


@pytest.mark.parametrize("field", ["name", "prompts", "matryoshka", "languages", "float16", "document_threshold"])
def test_prompts_with_a_missing_field_are_damaged(folder, field):
    profile = profile_to_json(PromptProfile("own", prompts={Task.QUERY: "q: "}))
    del profile[field]
    assert "its prompts cannot be read" in refusal(write(folder, profile=profile))


@pytest.mark.parametrize("change", [{"version": VERSION + 1}, {"version": None}, {"version": "1"}, {"format": "other"}])
def test_another_version_is_refused_with_both_numbers(folder, change):
    message = refusal(write(folder, **change))
    assert f"this gemma-rag reads version {VERSION}" in message
    if "version" in change:
        assert f"is of format version {change['version']}" in message


@pytest.mark.parametrize("name", ["../outside", "{parent}/outside", "inner/model.bin", "..", ".", "", "./model.onnx"])
def test_a_file_outside_of_the_folder_is_refused_though_it_is_there(folder, name):
    (folder / "inner").mkdir()
    for file in (folder.parent / "outside", folder / "inner" / "model.bin"):
        file.write_bytes(b"12345")
    name = name.format(parent=folder.parent)
    size = (folder / name).stat().st_size
    about = json.loads((folder / DESCRIPTION).read_text())
    assert "is absent or has another size" in refusal(write(folder, files=about["files"] | {name: [size, "0" * 64]}))


def test_a_description_that_leaves_out_the_graph_does_not_open(folder):
    (folder / "model.onnx").unlink()
    write(folder)
    with pytest.raises(ModelUnavailable, match=re.escape(str(folder / "model.onnx"))):
        embed(load(folder), "red")


@pytest.mark.parametrize("name", ["model.onnx", TOKENIZER])
def test_a_flipped_byte_is_found_by_its_checksum(folder, name):
    check_files(folder)
    body = bytearray((folder / name).read_bytes())
    body[len(body) // 2] ^= 1
    (folder / name).write_bytes(body)
    with pytest.raises(ModelUnavailable, match=f"{re.escape(name)} is damaged: its checksum is wrong"):
        check_files(folder)


def test_checking_a_folder_with_an_absent_file_names_it(folder):
    (folder / TOKENIZER).unlink()
    with pytest.raises(ModelUnavailable, match=f"{TOKENIZER} is absent"):
        check_files(folder)


def test_a_graph_that_is_no_graph_is_refused(folder):
    (folder / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelUnavailable, match=r"onnxruntime cannot open .*model\.onnx"):
        embed(load(write(folder)), "red")


def test_a_tokenizer_that_is_none_is_refused(folder):
    (folder / TOKENIZER).write_text("{}")
    with pytest.raises(ModelUnavailable, match=TOKENIZER):
        embed(load(write(folder)), "red")


# -- the wrong engine ---------------------------------------------------------------------------------------------------


def test_a_folder_for_one_engine_is_not_opened_by_the_other(folder):
    assert "was exported for onnx, and the runtime openvino is asked for" in refusal(folder, runtime="openvino")
    write(folder, runtime="openvino")
    assert "was exported for openvino, and the runtime onnx is asked for" in refusal(folder, runtime="onnx")


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
@pytest.mark.parametrize("model", ["folder", "minilm", "embeddinggemma"])
def test_a_model_for_sentence_transformers_is_refused_with_the_command_that_exports_it(tmp_path, monkeypatch, runtime, model):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("folder", "config.json").write_text("{}")
    Path("folder", "modules.json").write_text("[]")
    assert f"gemma-rag export {model} --to {runtime} --out FOLDER" in refusal(model, runtime=runtime)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    assert "there is no ONNX model at" in refusal(tmp_path / "nowhere", runtime="onnx")
    assert "there is no ONNX model at" in refusal(tmp_path / "nowhere.onnx", runtime="onnx")
    assert "there is no ONNX model at" in refusal(tmp_path / "nowhere.onnx")


def test_a_precision_of_ones_own_is_refused(folder):
    with pytest.raises(ModelUnavailable, match="leave precision out"):
        embed(load(folder, precision="bfloat16"), "red")


def test_a_device_that_onnxruntime_does_not_compute_on_here_is_refused(folder):
    with pytest.raises(ModelUnavailable, match="computes on the CPU, and the device cuda is asked for"):
        embed(load(folder, device="cuda"), "red")
    assert embed(load(folder, device="cpu"), "red").shape == (1, 2)


# -- as others publish models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["", "onnx/model.onnx"])
def test_a_published_folder_and_its_graph_open(published, model):
    encoder = load(published / model, runtime="onnx")
    assert np.abs(embed(encoder, "red green") - RED_GREEN).max() < 1e-6
    assert (encoder.space.model, encoder.space.max_tokens, encoder.space.precision) == ("published", 8, "float32")


def test_a_graph_beside_its_tokenizer_opens(published):
    (published / "onnx" / "model.onnx").rename(published / "model.onnx")
    assert np.abs(embed(load(published, runtime="onnx"), "red green") - RED_GREEN).max() < 1e-6


def test_a_file_that_ends_in_onnx_needs_no_runtime(published):
    assert np.abs(embed(load(published / "onnx" / "model.onnx"), "red green") - RED_GREEN).max() < 1e-6


def test_the_graph_of_an_exported_folder_opens_as_the_folder_does(folder):
    write(folder, profile=profile_to_json(E5))
    assert load(folder / "model.onnx").space == load(folder).space


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("model", "float32"),
        ("model_quantized", "quantized"),
        ("model_int8", "int8"),
        ("model_uint8", "uint8"),
        ("model_q4", "q4"),
        ("model_bnb4", "bnb4"),
        ("MODEL-Q8_0", "q8_0"),
    ],
)
def test_the_name_of_the_file_tells_its_precision(published, name, precision):
    file = (published / "onnx" / "model.onnx").rename(published / "onnx" / f"{name}.onnx")
    assert load(file).space.precision == precision


@pytest.mark.parametrize("name", ["model_fp16", "model_q4f16", "MODEL_FP16"])
def test_a_graph_in_float16_is_refused_by_its_name(published, name):
    file = (published / "onnx" / "model.onnx").rename(published / "onnx" / f"{name}.onnx")
    message = refusal(file)
    assert f"{name}.onnx computes in float16" in message
    assert "take another file" in message


def test_a_graph_without_pooling_is_refused_with_what_it_has(published):
    graph(published / "onnx" / "model.onnx", output="last_hidden_state")
    with pytest.raises(ModelUnavailable, match=r"no output sentence_embedding, but last_hidden_state: pooling and dense"):
        embed(load(published, runtime="onnx"), "red")


def test_token_types_are_given_to_a_graph_that_wants_them(published):
    graph(published / "onnx" / "model.onnx", inputs=("token_type_ids",))
    assert np.abs(embed(load(published, runtime="onnx"), "red green") - RED_GREEN).max() < 1e-6


def test_a_published_folder_without_a_tokenizer_is_refused(published):
    (published / TOKENIZER).unlink()
    assert f"published has no {TOKENIZER}" in refusal(published, runtime="onnx")


def test_a_folder_without_a_graph_is_refused(published):
    shutil.rmtree(published / "onnx")
    assert "has no onnx/model.onnx" in refusal(published, runtime="onnx")


def test_the_prompts_of_the_published_configuration_are_used(published):
    prompts = {"query": "query : ", "document": "passage : "}
    (published / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    encoder = load(published, runtime="onnx")
    assert np.abs(embed(encoder, "red", task=Task.QUERY) - right(2, 7, 9, 4, 3)).max() < 1e-6
    assert np.abs(embed(encoder, "red") - right(2, 8, 9, 4, 3)).max() < 1e-6


@pytest.mark.parametrize("body", ["", "{", "[]", '{"prompts": []}', '{"prompts": {"query": 5}}', '{"prompts": null}'])
def test_a_published_configuration_that_says_nothing_gives_no_prompts(published, body):
    (published / "config_sentence_transformers.json").write_text(body)
    assert load(published, runtime="onnx").profile == NO_PROMPTS


def test_the_context_of_sentence_transformers_wins_over_the_encoders(published):
    (published / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 5}))
    assert load(published, runtime="onnx").space.max_tokens == 5


@pytest.mark.parametrize("body", [{}, {"max_position_embeddings": None}, {"max_position_embeddings": 10**30}])
def test_a_published_model_that_does_not_say_its_context_has_to_be_given_one(published, body):
    (published / "config.json").write_text(json.dumps(body))
    with pytest.raises(ModelUnavailable, match="published does not say how many tokens it takes: give max_tokens"):
        embed(load(published, runtime="onnx"), "red")
    assert load(published, runtime="onnx", max_tokens=64).space.max_tokens == 64
    gemma = published.rename(published.with_name("embeddinggemma-300m-ONNX"))
    assert load(gemma, runtime="onnx").space.max_tokens == 2048
    assert load(gemma, runtime="onnx").profile is EMBEDDINGGEMMA


def test_other_weights_of_a_published_model_are_another_space(published):
    before = load(published, runtime="onnx").space
    graph(published / "onnx" / "model.onnx", weight=2.0)
    after = load(published, runtime="onnx").space
    assert set(before.differences(after)) == {"weights"}


def test_weights_beside_the_graph_count_too(published):
    data = published / "onnx" / "model.onnx_data"
    data.write_bytes(bytes(100_000))
    before = load(published, runtime="onnx").space
    body = bytearray(100_000)
    body[-1] = 1
    data.write_bytes(body)
    assert load(published, runtime="onnx").space.weights != before.weights


def test_a_published_folder_that_was_moved_and_renamed_is_the_same_space(published):
    before = load(published, runtime="onnx").space
    after = load(published.rename(published.with_name("elsewhere")), runtime="onnx").space
    assert after.model == "elsewhere"
    assert after.fingerprint == before.fingerprint


# -- the hub ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(published, monkeypatch):
    """A hub that hands out the published folder, and the questions that it was asked."""
    asked: list[dict] = []

    def download(hub_id: str, **options: object) -> str:
        asked.append({"hub_id": hub_id, **options})
        return str(published)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **options: "config.json")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_a_model_of_the_hub_is_known_by_its_id(hub, published):
    (published / "config.json").write_text("{}")
    encoder = load("onnx-community/embeddinggemma-300m-ONNX", runtime="onnx", revision="v2", token="hf_t0ken")
    assert encoder.profile is EMBEDDINGGEMMA
    assert (encoder.space.model, encoder.space.max_tokens) == ("onnx-community/embeddinggemma-300m-ONNX", 2048)
    (asked,) = hub
    assert {"onnx/model.onnx", "onnx/model.onnx_data", TOKENIZER} <= set(asked["allow_patterns"])
    assert (asked["revision"], asked["token"], asked["local_files_only"]) == ("v2", "hf_t0ken", True)


def test_a_model_of_which_the_cache_has_other_files_only_is_fetched(monkeypatch, published, tmp_path):
    (tmp_path / "partly").mkdir()
    (tmp_path / "partly" / "config.json").write_text("{}")

    def download(hub_id: str, *, local_files_only: bool, **options: object) -> str:
        return str(tmp_path / "partly" if local_files_only else published)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **options: "config.json")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert np.abs(embed(load("owner/name", runtime="onnx", max_tokens=8), "red green") - RED_GREEN).max() < 1e-6


def test_a_hub_model_without_an_onnx_graph_is_refused_with_the_command(hub, published):
    shutil.rmtree(published / "onnx")
    assert "gemma-rag export owner/name --to onnx --out FOLDER" in refusal("owner/name", runtime="onnx")


def test_files_that_cannot_be_fetched_are_an_error_without_the_token(hub, monkeypatch):
    def download(hub_id: str, **options: object) -> str:
        raise OSError("the disk is full")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    message = refusal("owner/name", runtime="onnx", token="hf_very_secret")
    assert "the files of owner/name could not be fetched: the disk is full" in message
    assert "secret" not in message


def test_a_hub_that_is_switched_off_is_an_error_at_once(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    started = time.monotonic()
    message = refusal("onnx-community/embeddinggemma-300m-ONNX", runtime="onnx")
    assert time.monotonic() - started < 1
    assert "switched off" in message


def test_openvino_has_no_models_on_the_hub(hub):
    assert "gemma-rag export owner/name --to openvino" in refusal("owner/name", runtime="openvino")
    assert hub == []
