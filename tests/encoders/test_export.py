"""`export_model`: what it writes, what it refuses, and that a failure leaves nothing behind.

The graphs themselves are held against their sources in `test_engines`; here one that is no graph often serves.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import stat
from pathlib import Path

import numpy as np
import pytest

from gemma_rag.encoders import EncoderSettings, Input, export, load_encoder
from gemma_rag.encoders.export import export_model
from gemma_rag.encoders.exported import (
    DESCRIPTION,
    TOKENIZER,
    Agreement,
    Description,
    check_files,
    profile_from_json,
    profile_to_json,
)
from gemma_rag.errors import InputError, MissingExtra, ModelUnavailable
from gemma_rag.prompts import E5, EMBEDDINGGEMMA, EMBEDDINGGEMMA_2, MINILM, PROFILES, PromptProfile, Task

from .test_engines import exported, loaded

OWN = PromptProfile("own", prompts={Task.QUERY: "q: ", Task.DOCUMENT: "d: "}, matryoshka=(48, 24), document_threshold=0.2)


def settings(model: Path | str, **options) -> EncoderSettings:
    return EncoderSettings(model=str(model), show_progress=False, **options)


@pytest.fixture
def quick(monkeypatch):
    """Exports that write a few bytes for a graph, and find that it agrees."""

    def write(program: object, folder: Path, precision: str) -> None:
        (folder / "model.xml").write_text("<net/>")
        (folder / "model.bin").write_bytes(b"weights")

    monkeypatch.setattr(export, "_program", lambda source: None)
    monkeypatch.setattr(export, "_to_openvino", write)
    monkeypatch.setattr(export, "_compare", lambda *given: Agreement(texts=24, smallest_cosine=0.99995, mean_cosine=1.0))


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- what is written ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "precision", "files"),
    [
        ("openvino", "float32", ["model.bin", "model.xml"]),
        ("openvino", "int8", ["model.bin", "model.xml"]),
        ("onnx", "float32", ["model.onnx", "model.onnx_data"]),
    ],
)
def test_an_export_holds_its_graph_its_tokenizer_and_its_description(request, tiny_gemma, to, precision, files):
    folder = exported(request, "tiny_gemma", to, precision)
    about = Description.model_validate_json((folder / DESCRIPTION).read_text(encoding="utf-8"))
    assert left(folder) == sorted([DESCRIPTION, TOKENIZER, *files])
    assert sorted(about.files) == sorted([TOKENIZER, *files])
    assert (about.runtime, about.precision, about.native, about.max_tokens) == (to, precision, 48, 2048)
    assert about.model == tiny_gemma.name
    assert about.weights == loaded(str(tiny_gemma), device="cpu").space.weights
    assert profile_from_json(about.profile) == EMBEDDINGGEMMA
    assert about.agreement.texts == 24
    assert about.agreement.smallest_cosine >= (0.9999 if precision == "float32" else 0.98)
    assert set(about.made_with) == {"torch", "transformers", "sentence-transformers", to}
    check_files(folder)


@pytest.mark.parametrize(("to", "precision"), [("openvino", "float32"), ("openvino", "int8"), ("onnx", "float32")])
def test_an_export_can_be_read_by_whoever_may_read_new_files(request, tmp_path, to, precision):
    folder = exported(request, "tiny_gemma", to, precision)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    usual = {True: (tmp_path / "folder").stat().st_mode, False: (tmp_path / "file").stat().st_mode}
    wrong = {
        path.name: stat.filemode(path.stat().st_mode)
        for path in (folder, *folder.iterdir())
        if path.stat().st_mode != usual[path.is_dir()]
    }
    assert wrong == {}


def test_int8_weights_take_little_more_than_a_quarter(request):
    sizes = {
        precision: (exported(request, "tiny_gemma", "openvino", precision) / "model.bin").stat().st_size
        for precision in ("float32", "int8")
    }
    assert 0.25 < sizes["int8"] / sizes["float32"] < 0.3


def test_nothing_of_this_machine_is_in_an_export(request, tiny_gemma):
    for to in ("openvino", "onnx"):
        folder = exported(request, "tiny_gemma", to, "float32")
        for file in folder.iterdir():
            assert str(tiny_gemma.parent).encode() not in file.read_bytes(), file.name
            assert str(folder.parent).encode() not in file.read_bytes(), file.name


def test_what_an_export_returns_is_what_it_wrote(quick, tiny_gemma, tmp_path):
    returned = export_model(settings(tiny_gemma), tmp_path / "out", to="openvino")
    written = json.loads((tmp_path / "out" / DESCRIPTION).read_text(encoding="utf-8"))
    assert json.loads(returned.model_dump_json()) == written
    assert returned.agreement.smallest_cosine == 0.99995
    check_files(tmp_path / "out")


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_source_is_described_whatever_else_the_settings_say(quick, tiny_gemma, tmp_path, precision):
    given = settings(
        tiny_gemma, max_tokens=64, dimensions=16, untrained_dimensions=True, cache=tmp_path / "cache", batch_tokens=99
    )
    about = export_model(given, tmp_path / "out", to="openvino", precision=precision)
    assert (about.max_tokens, about.native, about.precision) == (64, 48, precision)
    assert left(tmp_path) == ["out"]


# -- prompts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [None, "e5", OWN])
def test_the_prompts_are_written_and_read_back(quick, tiny_gemma, tmp_path, prompts):
    about = export_model(settings(tiny_gemma, prompts=prompts), tmp_path / "out", to="openvino")
    wanted = {None: EMBEDDINGGEMMA, "e5": E5}.get(prompts, OWN) if not isinstance(prompts, PromptProfile) else OWN
    assert profile_from_json(json.loads(json.dumps(about.profile))) == wanted


@pytest.mark.parametrize(
    "profile",
    [
        *PROFILES.values(),
        OWN,
        dataclasses.replace(MINILM, document_threshold=0.5),
        dataclasses.replace(EMBEDDINGGEMMA_2, matryoshka=(768, 64)),
        dataclasses.replace(EMBEDDINGGEMMA, prompts={Task.QUERY: "query: "}),
    ],
    ids=lambda profile: profile.name,
)
def test_a_profile_is_the_same_after_json(profile):
    read = profile_from_json(json.loads(json.dumps(profile_to_json(profile))))
    found_by = {"models": (), "marks": frozenset()}  # of no use once the profile is chosen
    assert dataclasses.replace(read, **found_by) == dataclasses.replace(profile, **found_by)


def test_the_second_generation_is_known_by_its_folder(quick, tiny_gemma_2, tmp_path):
    about = export_model(settings(tiny_gemma_2), tmp_path / "out", to="openvino")
    assert profile_from_json(about.profile) == EMBEDDINGGEMMA_2
    assert about.max_tokens == 8192


# -- the folder ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", ["a file", "a folder with a file", "a folder with a hidden file"])
def test_what_is_there_already_is_not_written_over(quick, tiny_gemma, tmp_path, there):
    out = tmp_path / "out"
    if there == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / (".mine" if "hidden" in there else "mine")).write_text("mine")
    with pytest.raises(InputError, match="is there already and not empty: give a new folder"):
        export_model(settings(tiny_gemma), out, to="openvino")
    assert (out if there == "a file" else next(out.iterdir())).read_text() == "mine"
    assert left(tmp_path) == ["out"]


def test_a_folder_that_is_not_empty_is_refused_before_the_model_is_looked_for(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(InputError, match="not empty"):
        export_model(settings(tmp_path / "no-model"), tmp_path, to="openvino")


def test_an_empty_folder_is_filled(quick, tiny_gemma, tmp_path):
    (tmp_path / "out").mkdir()
    export_model(settings(tiny_gemma), tmp_path / "out", to="openvino")
    assert DESCRIPTION in left(tmp_path / "out")


def test_the_folders_above_are_made(quick, tiny_gemma, tmp_path):
    export_model(settings(tiny_gemma), tmp_path / "deep" / "er" / "out", to="openvino")
    assert left(tmp_path / "deep" / "er") == ["out"]


def test_the_folder_that_one_is_in_is_filled(quick, tiny_gemma, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    export_model(settings(tiny_gemma), ".", to="openvino")
    assert left(tmp_path) == ["out"]
    assert DESCRIPTION in left(tmp_path / "out")


@pytest.mark.parametrize("step", ["_program", "_to_openvino", "_compare", "_judge"])
@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_export_that_fails_leaves_nothing_behind(quick, tiny_gemma, tmp_path, monkeypatch, step, error):
    def fail(*given: object) -> None:
        if step != "_program":
            folder = next(tmp_path.glob(".*"))
            (folder / "half").mkdir()
            (folder / "half" / "written").write_text("...")
        raise error

    monkeypatch.setattr(export, step, fail)
    with pytest.raises((type(error), ModelUnavailable)):
        export_model(settings(tiny_gemma), tmp_path / "out", to="openvino")
    assert left(tmp_path) == []


def test_an_export_that_fails_leaves_an_empty_folder_as_it_was(quick, tiny_gemma, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_compare", lambda *given: 1 / 0)
    (tmp_path / "out").mkdir()
    with pytest.raises((ZeroDivisionError, ModelUnavailable)):
        export_model(settings(tiny_gemma), tmp_path / "out", to="openvino")
    assert left(tmp_path) == ["out"]
    assert left(tmp_path / "out") == []


def test_a_failure_says_what_could_not_be_exported(quick, tiny_gemma, tmp_path, monkeypatch):
    def fail(source: object) -> None:
        raise RuntimeError("aten::made_up is not supported")

    monkeypatch.setattr(export, "_program", fail)
    with pytest.raises(ModelUnavailable, match=f"{tiny_gemma.name}.*made_up"):
        export_model(settings(tiny_gemma), tmp_path / "out", to="openvino")


# -- what does not agree ------------------------------------------------------------------------------------------------


def test_a_float32_export_that_does_not_agree_is_not_handed_out(quick, tiny_gemma, tmp_path, monkeypatch):
    agreement = Agreement(texts=24, smallest_cosine=0.9998, mean_cosine=1.0)
    monkeypatch.setattr(export, "_compare", lambda *given: agreement)
    with pytest.raises(ModelUnavailable, match=r"agrees with it to a cosine of 0\.9998 only, where 0\.9999 is right"):
        export_model(settings(tiny_gemma), tmp_path / "out", to="openvino")
    assert left(tmp_path) == []


@pytest.mark.parametrize(("cosine", "warns"), [(0.9799, True), (0.98, False)])
def test_an_int8_export_that_agrees_too_little_warns(quick, tiny_gemma, tmp_path, monkeypatch, caplog, cosine, warns):
    agreement = Agreement(texts=24, smallest_cosine=cosine, mean_cosine=1.0)
    monkeypatch.setattr(export, "_compare", lambda *given: agreement)
    about = export_model(settings(tiny_gemma), tmp_path / "out", to="openvino", precision="int8")
    assert about.agreement == agreement
    assert [f"cosine of {cosine:.4f} only" in record.getMessage() for record in caplog.records] == [True] * warns


class Elsewhere:
    """Stands in for the encoder of an exported folder; gives what sentence-transformers gives, turned a little."""

    def __init__(self, given: EncoderSettings, turned: float) -> None:
        self.inner = load_encoder(given)
        self.turned = turned

    def encode(self, inputs: list[Input]) -> np.ndarray:
        rows = self.inner.encode(inputs)
        rows[-1, 0] += self.turned
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def compared(monkeypatch, tiny_gemma):
    """`quick`, but what is compared is compared: the settings that graphs are opened with, and how far a vector is turned."""
    seen: list[EncoderSettings] = []
    turned = [0.0]
    monkeypatch.setattr(export, "_SAMPLES", ("ok", "the parcel left the warehouse on Monday; " * 9))

    def write(program: object, folder: Path, precision: str) -> None:
        (folder / "model.xml").write_text("<net/>")

    def opened(given: EncoderSettings) -> Elsewhere:
        seen.append(given)
        return Elsewhere(given.changed(model=str(tiny_gemma)), turned[0])

    monkeypatch.setattr(export, "_program", lambda source: None)
    monkeypatch.setattr(export, "_to_openvino", write)
    monkeypatch.setattr("gemma_rag.encoders.load_encoder", opened)
    return seen, turned


def test_one_vector_that_differs_is_found(compared, tiny_gemma, tmp_path):
    _, turned = compared
    turned[0] = 0.2
    with pytest.raises(ModelUnavailable, match="nothing was written"):
        export_model(settings(tiny_gemma), tmp_path / "out", to="openvino")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"on_overflow": "error", "max_tokens": 64},
        {"on_overflow": "average", "max_tokens": 24},
        {"detect_prompts": False, "batch_tokens": 64},
        {"prompts": OWN},
        {"dimensions": 16, "untrained_dimensions": True},
        {"device": "cpu"},
        {"runtime": "openvino"},
    ],
    ids=str,
)
def test_any_settings_that_fit_the_model_can_be_exported(compared, tiny_gemma, tmp_path, options):
    about = export_model(settings(tiny_gemma, **options), tmp_path / "out", to="openvino")
    assert about.agreement.smallest_cosine > 0.99999


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_an_export_is_made_from_float32_weights_and_measured_against_them(compared, tiny_gemma, tmp_path, precision):
    seen, _ = compared
    out = tmp_path / "out"
    about = export_model(settings(tiny_gemma, precision="bfloat16"), out, to="openvino", precision=precision)
    assert about.weights == loaded(str(tiny_gemma), device="cpu").space.weights
    assert [given.precision for given in seen] == ["float32"]


def test_what_is_compared_reaches_beyond_the_sliding_window(tiny_gemma):
    counted = loaded(str(tiny_gemma), device="cpu").count_tokens(export._SAMPLES)
    assert max(counted) > 512  # there a mask that is wrong shows, and not before


def test_the_logging_of_others_is_left_as_it_was(compared, tiny_gemma, tmp_path):
    logging.disable(logging.ERROR)
    try:
        export_model(settings(tiny_gemma), tmp_path / "out", to="openvino")
        assert logging.root.manager.disable == logging.ERROR
    finally:
        logging.disable(logging.NOTSET)


def test_an_export_that_fails_leaves_the_logging_as_it_was(quick, tiny_gemma, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_program", lambda source: 1 / 0)
    with pytest.raises((ZeroDivisionError, ModelUnavailable)):
        export_model(settings(tiny_gemma), tmp_path / "out", to="openvino")
    assert logging.root.manager.disable == logging.NOTSET


# -- what cannot be exported --------------------------------------------------------------------------------------------


def built(folder: Path, tiny_gemma: Path, modules: str) -> Path:
    """A sentence-transformers model on the tiny encoder, with other modules behind it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

    def encoder() -> list:
        return [Transformer(str(tiny_gemma), max_seq_length=64)]

    def router(*routes: list) -> object:
        from sentence_transformers.models import Router

        return Router.for_query_document(*routes)

    made = {
        "lasttoken": lambda: [*encoder(), Pooling(48, "lasttoken"), Normalize()],
        "max": lambda: [*encoder(), Pooling(48, "max"), Normalize()],
        "weightedmean": lambda: [*encoder(), Pooling(48, "weightedmean")],
        "mean and max": lambda: [*encoder(), Pooling(48, ("mean", "max"))],
        "Normalize": lambda: [*encoder(), Normalize(), Pooling(48, "mean")],
        "Transformer alone": encoder,
        "Router": lambda: [router([*encoder(), Pooling(48, "mean")], [*encoder(), Pooling(48, "mean")])],
        "Router behind": lambda: [*encoder(), Pooling(48, "mean"), router([Dense(48, 48)], [Dense(48, 48)])],
    }[modules]()
    SentenceTransformer(modules=made, device="cpu").save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.mark.parametrize(
    ("modules", "problem"),
    [
        ("lasttoken", "it pools its tokens by lasttoken: only mean and cls can be exported"),
        ("max", "it pools its tokens by max: only mean and cls can be exported"),
        ("weightedmean", "it pools its tokens by weightedmean"),
        ("mean and max", r"it pools its tokens by .*mean.*max"),
        ("Normalize", "it pools its tokens by Normalize"),
        ("Transformer alone", "^it .*pool"),
        ("Router", "it .*Router"),
        ("Router behind", "it has a module Router, which cannot be exported"),
    ],
)
def test_a_module_that_cannot_be_exported_is_named(tiny_gemma, tmp_path, modules, problem):
    model = built(tmp_path / "it", tiny_gemma, modules)
    with pytest.raises(ModelUnavailable, match=problem):
        export_model(settings(model), tmp_path / "out", to="openvino")
    assert left(tmp_path) == ["it"]


def test_two_poolings_of_an_older_sentence_transformers_are_not_taken_for_one(tiny_gemma, tmp_path, monkeypatch):
    from sentence_transformers.models import Pooling

    older = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}
    monkeypatch.setattr(Pooling, "get_config_dict", lambda pooling: {"word_embedding_dimension": 48, **older})
    monkeypatch.setattr(export, "_to_openvino", lambda *given: 1 / 0)
    with pytest.raises(ModelUnavailable, match="only mean and cls can be exported"):
        export_model(settings(tiny_gemma), tmp_path / "out", to="openvino")


def test_a_model_that_is_not_there_leaves_nothing_behind(tmp_path):
    with pytest.raises(ModelUnavailable, match="there is no folder"):
        export_model(settings(tmp_path / "no-model"), tmp_path / "deep" / "out", to="openvino")
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("to", "package"), [("onnx", "onnx"), ("onnx", "onnxscript"), ("onnx", "onnxruntime"), ("openvino", "nncf")]
)
def test_what_an_export_needs_is_asked_for_before_the_model_is_loaded(tmp_path, monkeypatch, to, package):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == package else find_spec(name, *more))
    with pytest.raises(MissingExtra, match=rf"{package}.*pip install 'gemma-rag\[export\]'"):
        export_model(settings(tmp_path / "no-model"), tmp_path / "out", to=to)


# -- other models, through the graph ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_first_tokens_vector_a_bias_and_an_activation_are_exported(tiny_gemma, tmp_path):
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Pooling, Transformer

    torch.manual_seed(3)
    dense = Dense(48, 24, bias=True, activation_function=torch.nn.Tanh())
    torch.nn.init.normal_(dense.linear.bias)
    modules = [Transformer(str(tiny_gemma), max_seq_length=64), Pooling(48, "cls"), dense]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path / "it"), create_model_card=False)
    before = {file: file.read_bytes() for file in (tmp_path / "it").rglob("*") if file.is_file()}
    export_model(settings(tmp_path / "it"), tmp_path / "out", to="openvino")
    assert {file: file.read_bytes() for file in (tmp_path / "it").rglob("*") if file.is_file()} == before
    inputs = [Input(text, task) for text in ("dog", "how do I reset my password?", "x " * 90) for task in Task]
    right = load_encoder(settings(tmp_path / "it", device="cpu")).encode(inputs)
    rows = load_encoder(settings(tmp_path / "out")).encode(inputs)
    assert rows.shape == (len(inputs), 24)
    assert (right * rows).sum(axis=1).min() > 0.9999
