from __future__ import annotations

import threading

import numpy as np
import pytest

from gemma_rag.encoders import EncoderSettings, Input, TextEncoder, load_encoder
from gemma_rag.encoders.checks import chosen_context
from gemma_rag.encoders.sentence_transformers import SentenceTransformerEngine, weights_digest
from gemma_rag.encoders.text_encoder import token_batches
from gemma_rag.errors import InputError, ModelUnavailable
from gemma_rag.prompts import E5, EMBEDDINGGEMMA_2, Task

TEXTS = ["how do I reset my password?", "the lazy dog", "如何重置密码", "a\nb", "x" * 200]


def encoder(model, **settings) -> TextEncoder:
    return load_encoder(EncoderSettings(model=str(model), device="cpu", show_progress=False, **settings))


@pytest.fixture(scope="module")
def gemma(tiny_gemma):
    return encoder(tiny_gemma)


@pytest.fixture(scope="module")
def library(tiny_gemma):
    """sentence-transformers alone, which is given texts with the prompt written out by hand."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(tiny_gemma), device="cpu", local_files_only=True)


def by_hand(library, text: str, dimensions: int | None = None) -> np.ndarray:
    return library.encode([text], prompt="", normalize_embeddings=True, truncate_dim=dimensions)[0]


@pytest.mark.parametrize(
    ("item", "written_out"),
    [
        (Input("lazy dog", Task.QUERY), "task: search result | query: lazy dog"),
        (Input("lazy dog", Task.DOCUMENT), "title: none | text: lazy dog"),
        (Input("lazy dog", Task.DOCUMENT, ""), "title: none | text: lazy dog"),
        (Input("lazy dog", Task.DOCUMENT, "The fox"), "title: The fox | text: lazy dog"),
        (Input("lazy dog", Task.CLASSIFICATION), "task: classification | query: lazy dog"),
        (Input("lazy dog", Task.CLUSTERING), "task: clustering | query: lazy dog"),
        (Input("lazy dog", Task.SIMILARITY), "task: sentence similarity | query: lazy dog"),
        (Input("lazy dog", Task.CODE_QUERY), "task: code retrieval | query: lazy dog"),
        (Input("lazy dog", Task.QUESTION_ANSWERING), "task: question answering | query: lazy dog"),
        (Input("lazy dog", Task.FACT_CHECKING), "task: fact checking | query: lazy dog"),
        (Input("lazy dog", Task.SUMMARIZATION), "task: summarization | query: lazy dog"),
    ],
)
def test_each_task_gives_the_vector_of_the_text_with_its_prompt_written_out(gemma, library, item, written_out):
    assert np.abs(gemma.encode([item])[0] - by_hand(library, written_out)).max() < 1e-6


def test_a_text_without_its_prompt_has_another_vector(gemma, library):
    assert float(gemma.encode([Input("lazy dog", Task.QUERY)])[0] @ by_hand(library, "lazy dog")) < 0.999


def test_our_vector_is_that_of_the_librarys_own_encode_query(gemma, library):
    ours = gemma.encode([Input(text, Task.QUERY) for text in TEXTS])
    assert np.abs(ours - library.encode_query(TEXTS, normalize_embeddings=True)).max() < 1e-5


@pytest.mark.parametrize("dimensions", [48, 32, 7, 1])
def test_every_row_has_norm_1_at_every_dimension(tiny_gemma, dimensions):
    rows = encoder(tiny_gemma, dimensions=dimensions, untrained_dimensions=True).encode([Input(t, Task.QUERY) for t in TEXTS])
    assert rows.shape == (len(TEXTS), dimensions)
    assert rows.dtype == np.float32
    assert np.abs(np.linalg.norm(rows, axis=1) - 1).max() < 1e-6


def test_a_cut_vector_points_where_the_first_components_of_the_whole_one_point(tiny_gemma, gemma):
    whole = gemma.encode([Input(TEXTS[0], Task.QUERY)])[0, :16]
    cut = encoder(tiny_gemma, dimensions=16, untrained_dimensions=True).encode([Input(TEXTS[0], Task.QUERY)])[0]
    assert np.abs(cut - whole / np.linalg.norm(whole)).max() < 1e-6


def test_order_and_padding_change_nothing(tiny_gemma, gemma):
    inputs = [Input(f"{text} {i}", Task.DOCUMENT) for i, text in enumerate(TEXTS * 4)]
    alone = np.concatenate([gemma.encode([item]) for item in inputs])
    order = np.random.default_rng(0).permutation(len(inputs))
    one_batch = encoder(tiny_gemma, batch_tokens=100_000).encode([inputs[i] for i in order])
    assert np.abs(one_batch - alone[order]).max() < 1e-5


def test_equal_texts_are_computed_once_and_returned_each(gemma, monkeypatch):
    engine, seen = gemma.engine, []
    read = engine.read
    monkeypatch.setattr(engine, "read", lambda texts: (seen.extend(texts), read(texts))[1])
    rows = gemma.encode([Input("dog", Task.QUERY), Input("fox", Task.QUERY), Input("dog", Task.QUERY)])
    assert sorted(seen) == ["task: search result | query: dog", "task: search result | query: fox"]
    assert (rows[0] == rows[2]).all()
    assert (rows[0] != rows[1]).any()


def test_nothing_to_embed_gives_no_rows(gemma):
    assert gemma.encode([]).shape == (0, 48)


@pytest.mark.parametrize(
    "prompted",
    [
        "task: search result | query: dog",
        "title: none | text: dog",
        "title: Animals | text: dog",
        "task: clustering | query: dog",
    ],
)
def test_a_text_that_brings_its_prompt_is_not_prompted_again(gemma, library, caplog, prompted):
    row = gemma.encode([Input(prompted, Task.DOCUMENT)])[0]
    assert np.abs(row - by_hand(library, prompted)).max() < 1e-6
    assert "1 of 1 texts already start with" in caplog.text


def test_texts_with_prompts_give_one_warning_that_counts_them(gemma, caplog):
    gemma.encode([Input(f"title: none | text: dog {i}", Task.DOCUMENT) for i in range(5)] + [Input("dog", Task.DOCUMENT)])
    assert [record.getMessage()[:7] for record in caplog.records] == ["5 of 6 "]


def test_detect_prompts_off_prompts_all_the_same(tiny_gemma, library, caplog):
    text = "title: none | text: dog"
    row = encoder(tiny_gemma, detect_prompts=False).encode([Input(text, Task.DOCUMENT)])[0]
    assert np.abs(row - by_hand(library, f"title: none | text: {text}")).max() < 1e-6
    assert not caplog.records


@pytest.mark.parametrize("empty", ["", "  ", "\n\t", "\u3000"])
def test_an_empty_text_is_refused_by_its_index(gemma, empty):
    with pytest.raises(InputError, match="index 1 is empty"):
        gemma.encode([Input("dog", Task.QUERY), Input(empty, Task.QUERY)])


@pytest.mark.parametrize("wrong", [None, 3, b"dog", ["dog"]])
def test_a_text_that_is_no_string_is_refused_by_its_index_and_type(gemma, wrong):
    with pytest.raises(InputError, match=f"index 0 is no string but {type(wrong).__name__}"):
        gemma.encode([Input(wrong, Task.QUERY)])


def test_a_task_that_is_only_a_name_is_refused(gemma):
    with pytest.raises(InputError, match=r"use Task\.parse"):
        gemma.encode([Input("dog", "query")])


# -- texts beyond the context -------------------------------------------------------------------------------------------

LONG = "the quick brown fox jumps over the lazy dog " * 20


def test_a_long_text_is_cut_with_one_warning_that_counts_them(tiny_gemma, caplog):
    encoder(tiny_gemma, max_tokens=32).encode(
        [Input(LONG, Task.QUERY), Input(LONG + "!", Task.QUERY), Input("dog", Task.QUERY)]
    )
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith("2 of 3 texts are longer than the context of 32 tokens")


def test_what_stands_beyond_the_cut_changes_nothing(tiny_gemma):
    short = encoder(tiny_gemma, max_tokens=32)
    rows = short.encode([Input(LONG, Task.QUERY), Input(LONG + " and more", Task.QUERY)])
    assert np.abs(rows[0] - rows[1]).max() < 1e-5


def test_on_overflow_error_names_the_texts(tiny_gemma):
    with pytest.raises(InputError, match=r"1 of 2 texts are longer than the context of 32 tokens.*index 1 "):
        encoder(tiny_gemma, max_tokens=32, on_overflow="error").encode([Input("dog", Task.QUERY), Input(LONG, Task.QUERY)])


def test_on_overflow_average_reads_the_whole_text(tiny_gemma):
    averaging = encoder(tiny_gemma, max_tokens=64, on_overflow="average")
    rows = averaging.encode([Input(LONG, Task.QUERY), Input(LONG + LONG[:200] + " password portal", Task.QUERY)])
    assert np.abs(rows[0] - rows[1]).max() > 1e-3
    assert np.abs(np.linalg.norm(rows, axis=1) - 1).max() < 1e-6


def test_on_overflow_average_is_the_mean_of_the_parts_weighted_by_their_tokens(tiny_gemma, monkeypatch):
    averaging = encoder(tiny_gemma, max_tokens=64, on_overflow="average")
    engine, seen = averaging.engine, []
    read = engine.read
    monkeypatch.setattr(engine, "read", lambda texts: (seen.extend(texts), read(texts))[1])
    averaged = averaging.encode([Input(LONG, Task.QUERY)])[0]
    pieces = seen[2:]  # after the whole text, and the prompt alone
    assert "".join(piece.removeprefix("task: search result | query: ") for piece in pieces).strip() == LONG.strip()
    weights = np.array(averaging.count_tokens(pieces), dtype=np.float64)
    assert weights.max() <= 64
    mean = weights @ averaging.encode([Input(piece, Task.QUERY) for piece in pieces])
    assert np.abs(averaged - mean / np.linalg.norm(mean)).max() < 1e-5


def test_averaging_leaves_short_texts_alone(tiny_gemma, gemma):
    averaging = encoder(tiny_gemma, max_tokens=64, on_overflow="average")
    row = averaging.encode([Input(LONG, Task.QUERY), Input("dog", Task.QUERY)])[1]
    assert np.abs(row - gemma.encode([Input("dog", Task.QUERY)])[0]).max() < 1e-5


def test_a_prompt_that_fills_the_context_is_refused(tiny_gemma):
    with pytest.raises(InputError, match="fill the context of 16 tokens"):
        encoder(tiny_gemma, max_tokens=16, on_overflow="average").encode([Input(LONG, Task.DOCUMENT, "a title " * 30)])


# -- settings -----------------------------------------------------------------------------------------------------------


def test_a_dimension_that_the_model_was_not_trained_for_is_refused(tiny_gemma):
    with pytest.raises(InputError, match="not trained to be cut to 32 dimensions"):
        encoder(tiny_gemma, dimensions=32).encode([Input("dog", Task.QUERY)])


def test_more_dimensions_than_the_model_has_are_refused_even_when_forced(tiny_gemma):
    with pytest.raises(InputError, match="gives vectors of 48 dimensions"):
        encoder(tiny_gemma, dimensions=1024, untrained_dimensions=True).encode([Input("dog", Task.QUERY)])


def test_float16_is_refused_for_gemma_with_the_reason(tiny_gemma):
    with pytest.raises(InputError, match="overflow in float16"):
        encoder(tiny_gemma, precision="float16").encode([Input("dog", Task.QUERY)])


def test_bfloat16_stays_close_to_float32(tiny_gemma, gemma):
    rows = encoder(tiny_gemma, precision="bfloat16").encode([Input(text, Task.QUERY) for text in TEXTS])
    assert rows.dtype == np.float32
    assert (rows * gemma.encode([Input(text, Task.QUERY) for text in TEXTS])).sum(axis=1).min() > 0.99


def test_more_tokens_than_the_model_takes_are_refused(tiny_gemma):
    with pytest.raises(InputError, match="takes 2048 tokens at most"):
        encoder(tiny_gemma, max_tokens=4096).encode([Input("dog", Task.QUERY)])


def test_a_profile_of_the_users_choice_wins(tiny_gemma, library):
    row = encoder(tiny_gemma, prompts="e5").encode([Input("dog", Task.DOCUMENT)])[0]
    assert np.abs(row - by_hand(library, "passage: dog")).max() < 1e-6


def test_a_profile_object_is_taken_as_it_is(tiny_gemma):
    assert encoder(tiny_gemma, prompts=E5).profile is E5


def test_the_profile_of_a_local_folder_is_read_from_its_own_configuration(gemma):
    assert gemma.profile.name == "embeddinggemma"


def test_a_folder_that_holds_no_model_is_refused(tmp_path):
    with pytest.raises(ModelUnavailable, match="holds no model"):
        encoder(tmp_path)


def test_weights_that_cannot_be_read_are_an_error_with_the_models_name(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelUnavailable, match=tmp_path.name):
        encoder(tmp_path).encode([Input("dog", Task.QUERY)])


# -- the space ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"dimensions": 16, "untrained_dimensions": True}, "dimensions"),
        ({"prompts": "e5"}, "prompts"),
        ({"max_tokens": 64}, "max_tokens"),
        ({"on_overflow": "average"}, "overflow"),
        ({"precision": "bfloat16"}, "precision"),
        ({"detect_prompts": False}, "prompts"),
    ],
)
def test_whatever_changes_the_vectors_changes_the_space(tiny_gemma, gemma, settings, field):
    assert field in gemma.space.differences(encoder(tiny_gemma, **settings).space)


def test_other_weights_are_another_space(tmp_path, gemma):
    from gemma_rag.testing import build_random_embeddinggemma

    other = encoder(build_random_embeddinggemma(tmp_path / "other", seed=1))
    assert "weights" in gemma.space.differences(other.space)


def test_a_copy_of_the_model_in_another_folder_is_the_same_space(tiny_gemma, tmp_path, gemma):
    import shutil

    shutil.copytree(tiny_gemma, tmp_path / "copy")
    assert encoder(tmp_path / "copy").space.fingerprint == gemma.space.fingerprint


@pytest.mark.parametrize("settings", [{"batch_tokens": 64}, {"on_overflow": "error"}])
def test_what_does_not_change_the_vectors_does_not_change_the_space(tiny_gemma, gemma, settings):
    assert encoder(tiny_gemma, **settings).space.fingerprint == gemma.space.fingerprint


def test_one_changed_weight_matrix_changes_the_digest(gemma):
    import torch

    model = gemma.engine.model
    before = weights_digest(model)
    layer = next(module for module in model if type(module).__name__ == "Dense").linear
    with torch.no_grad():
        layer.weight.add_(1e-4)
        after = weights_digest(model)
        layer.weight.sub_(1e-4)
    assert before != after


# -- batches and threads ------------------------------------------------------------------------------------------------


def test_batches_stay_within_the_budget_and_hold_every_text_once():
    lengths = np.random.default_rng(0).integers(1, 300, 500).tolist()
    batches = token_batches(lengths, 512)
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    assert all(max(lengths[i] for i in batch) * len(batch) <= 512 for batch in batches)


def test_batches_hold_no_more_texts_than_they_may():
    assert token_batches([5, 5, 5, 5, 5], 1000, most=2) == [[0, 1], [2, 3], [4]]


def test_a_text_longer_than_the_budget_is_a_batch_of_its_own():
    assert token_batches([600, 10, 700], 512) == [[2], [0], [1]]


def test_several_threads_get_the_vectors_that_one_would_get(gemma):
    wanted = [gemma.encode([Input(text, Task.QUERY)])[0] for text in TEXTS]
    found: dict[int, np.ndarray] = {}

    def work(i: int) -> None:
        found[i] = gemma.encode([Input(TEXTS[i % len(TEXTS)], Task.QUERY)])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(np.abs(found[i] - wanted[i % len(TEXTS)]).max() for i in range(20)) < 1e-5


def test_counted_tokens_are_those_that_the_model_reads(gemma, library):
    counted = gemma.count_tokens(TEXTS)
    assert counted == [int(library.tokenize([text])["attention_mask"].sum()) for text in TEXTS]


def test_tokens_are_counted_beyond_thechosen_context(tiny_gemma):
    assert encoder(tiny_gemma, max_tokens=32).count_tokens([LONG])[0] > 100


# -- EmbeddingGemma 2, whose weights are not at hand --------------------------------------------------------------------


@pytest.fixture
def second_gemma(tmp_path):
    """An encoder for a folder named as EmbeddingGemma 2, to see how it would be loaded."""
    folder = tmp_path / "embeddinggemma-2"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return encoder(folder)


def test_of_embeddinggemma_2_the_text_half_alone_is_loaded(second_gemma, monkeypatch):
    seen = {}

    def load(name, **options):
        seen.update(options)
        raise OSError("no weights")

    monkeypatch.setattr("sentence_transformers.SentenceTransformer", load)
    with pytest.raises(ModelUnavailable, match="no weights"):
        second_gemma.encode([Input("dog", Task.QUERY)])
    assert seen["config_kwargs"] == {"vision_config": None, "audio_config": None}


def test_embeddinggemma_2_names_the_release_that_it_needs(second_gemma, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.2.0")
    with pytest.raises(ModelUnavailable, match=r"needs sentence-transformers >= 6\.1.*is 5\.2\.0"):
        second_gemma.encode([Input("dog", Task.QUERY)])


@pytest.mark.parametrize("reported", [None, 10**30])
def test_embeddinggemma_2_which_reports_no_limit_takes_8192_tokens(reported):
    assert chosen_context(EncoderSettings(), reported, EMBEDDINGGEMMA_2, "embeddinggemma-2") == 8192


def test_a_model_that_reports_no_limit_has_to_be_given_one():
    with pytest.raises(ModelUnavailable, match="give max_tokens"):
        chosen_context(EncoderSettings(), None, E5, "some-model")


def test_a_given_limit_serves_a_model_that_reports_none():
    assert chosen_context(EncoderSettings(max_tokens=100), None, E5, "some-model") == 100


def test_a_model_of_the_hub_is_looked_for_on_this_machine_first(tiny_gemma, monkeypatch):
    import sentence_transformers

    from gemma_rag.encoders.models import Source

    asked: list[bool] = []
    real = sentence_transformers.SentenceTransformer

    def load(location, *, local_files_only, **options):
        asked.append(local_files_only)
        if local_files_only and len(asked) < 2:
            raise OSError("not in the cache")
        return real(str(tiny_gemma), local_files_only=True, **options)

    monkeypatch.setattr("sentence_transformers.SentenceTransformer", load)
    source = Source(location="someone/some-model", name="some-model", local=False)
    SentenceTransformerEngine(EncoderSettings(model=str(tiny_gemma)), source)
    assert asked == [True, False]
    SentenceTransformerEngine(EncoderSettings(model=str(tiny_gemma)), source)
    assert asked == [True, False, True]  # what is there is not asked for again
