from __future__ import annotations

import importlib.util
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gemma_rag import rerank as module
from gemma_rag.errors import InputError, MissingExtra, ModelUnavailable
from gemma_rag.rerank import CrossEncoderReranker, as_reranker, mmr, rerank
from gemma_rag.vectors import unit

QUESTION = "how do i reset my password"
PASSAGES = ["the lazy dog", "reset the password", "my dog", "password password how"]


# -- any reranker -----------------------------------------------------------------------------------------------------


def by_length(question: str, passages) -> list[int]:
    return [len(passage) for passage in passages]


def giving(result):
    def recorder(question: str, passages):
        return result

    return recorder


def test_the_reranker_is_called_once_with_the_question_and_all_passages() -> None:
    calls = []

    def recorder(question: str, passages):
        calls.append((question, passages))
        return [0.5, -2]

    scores = rerank(recorder, "why?", ("a", "b"))
    assert calls == [("why?", ["a", "b"])]
    assert scores.dtype == np.float64
    assert scores.tolist() == [0.5, -2.0]


def test_without_passages_the_reranker_is_not_called() -> None:
    assert rerank(giving([1.0]), "why?", []).shape == (0,)


def test_changing_the_scores_does_not_change_the_array_that_the_reranker_gave() -> None:
    own = np.array([1.0, 2.0])
    rerank(giving(own), "why?", ["a", "b"])[0] = 9.0
    assert own.tolist() == [1.0, 2.0]


def test_one_string_instead_of_a_list_of_passages_is_refused() -> None:
    with pytest.raises(InputError, match="put it in a list"):
        rerank(by_length, "why?", "abc")


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], r"reranker .*recorder gave 1 scores for 2 passages"),
        ([1.0, 2.0, 3.0], r"gave 3 scores for 2 passages"),
        ([[1.0], [2.0]], r"gave \[\[1\.0\], \[2\.0\]\], of shape \(2, 1\), for 2 passages"),
        (None, r"gave None, of shape \(\), for 2 passages"),
        (["high", "low"], r"gave \['high', 'low'\], and a list of 2 numbers was expected"),
        ({"a": 1.0}, r"and a list of 2 numbers was expected"),
        ([0.5, float("nan")], r"gave nan for the passage at index 1 \(1 of 2 scores are not finite\)"),
        ([float("-inf"), float("inf")], r"gave -inf for the passage at index 0 \(2 of 2"),
    ],
)
def test_what_is_not_one_finite_number_per_passage_is_refused_and_shown(result, message) -> None:
    with pytest.raises(InputError, match=message):
        rerank(giving(result), "why?", ["a", "b"])


def test_a_reranker_that_is_an_object_is_named_by_its_repr() -> None:
    class Strict:
        def __repr__(self) -> str:
            return "Strict(7)"

        def __call__(self, question: str, passages):
            return []

    with pytest.raises(InputError, match=r"the reranker Strict\(7\) gave 0 scores for 1 passages"):
        rerank(Strict(), "why?", ["a"])


def test_a_tensor_that_still_has_its_gradient_is_refused_with_what_was_expected() -> None:
    import torch

    with pytest.raises(InputError, match="a list of 2 numbers was expected"):
        rerank(giving(torch.ones(2, requires_grad=True)), "why?", ["a", "b"])


# -- as users write it ------------------------------------------------------------------------------------------------


def test_a_function_is_taken_as_it_is() -> None:
    assert as_reranker(by_length) is by_length


@pytest.mark.parametrize("value", [None, 3, "", " ", ["model"], Path("model"), CrossEncoderReranker])
def test_what_is_neither_a_function_nor_a_name_is_refused(value) -> None:
    with pytest.raises(InputError, match="a reranker is a function"):
        as_reranker(value)


def test_without_sentence_transformers_the_extra_is_named(monkeypatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentence_transformers" else find_spec(name))
    with pytest.raises(MissingExtra, match=r"pip install 'gemma-rag\[local\]'"):
        as_reranker("cross-encoder/ms-marco-MiniLM-L6-v2")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("./no-such-folder", "there is no folder ./no-such-folder"),
        ("no one/at all", "neither a folder nor an id on the hub"),
        ("nobody/no-such-reranker", r"the model nobody/no-such-reranker .*hub"),  # sockets are shut in the tests
    ],
)
def test_a_model_that_cannot_be_had_is_refused_with_advice_about_rerankers(name, problem) -> None:
    with pytest.raises(ModelUnavailable, match=problem) as caught:
        as_reranker(name)
    advice = str(caught.value).partition("For a reranker, you can:")[2]
    assert "CrossEncoder.save_pretrained" in advice
    assert "minilm'" not in str(caught.value)  # the offline embedding model cannot rerank
    assert ".." not in str(caught.value)


# -- cross-encoders ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Tiny BERTs with random weights: `ranker` with one label, `classifier` with three, `bare` without a head."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

    root = tmp_path_factory.mktemp("models")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(" ".join([QUESTION, *PASSAGES]).split())]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}, model_max_length=24)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    for name, kind, labels in [
        ("ranker", BertForSequenceClassification, 1),
        ("classifier", BertForSequenceClassification, 3),
        ("bare", BertModel, 1),
    ]:
        config = BertConfig(
            **sizes, vocab_size=len(words), max_position_embeddings=24, num_labels=labels, initializer_range=0.5
        )
        kind(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def ranker(models):
    return as_reranker(str(models / "ranker"))


def by_hand(folder: Path, question: str, passage: str) -> float:
    """The score by transformers alone, in float32: the sigmoid of the only logit."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return float(model(**AutoTokenizer.from_pretrained(folder)(question, passage, return_tensors="pt")).logits.sigmoid())


def test_a_cross_encoder_in_a_folder_gives_the_models_own_scores_in_the_order_of_the_passages(models, ranker) -> None:
    scores = rerank(ranker, QUESTION, PASSAGES)
    expected = [by_hand(models / "ranker", QUESTION, passage) for passage in PASSAGES]
    assert scores == pytest.approx(expected, abs=1e-6)
    assert np.ptp(scores) > 0.01  # else any order would pass


def test_a_passage_longer_than_the_context_is_cut(ranker) -> None:
    long, longer = rerank(ranker, QUESTION, ["dog " * 100, "dog " * 100 + "password"])
    assert long == longer


def test_the_weights_are_loaded_with_the_first_question_and_once(models, monkeypatch) -> None:
    loads = []
    load = module._load
    monkeypatch.setattr(module, "_load", lambda source: loads.append(source.name) or load(source))
    reranker = as_reranker(str(models / "ranker"))
    assert loads == []
    threads = [threading.Thread(target=rerank, args=(reranker, QUESTION, PASSAGES)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == ["ranker"]


def test_loading_writes_no_progress_bars(models, capfd) -> None:
    rerank(as_reranker(str(models / "ranker")), QUESTION, PASSAGES)
    assert capfd.readouterr().err == ""


def test_its_repr_names_the_model(ranker) -> None:
    assert repr(ranker) == "CrossEncoderReranker('ranker')"


def test_a_model_that_is_stored_in_bfloat16_is_computed_in_float32(models, tmp_path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path / "half"
    AutoModelForSequenceClassification.from_pretrained(models / "ranker").to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(models / "ranker").save_pretrained(folder)
    scores = rerank(as_reranker(str(folder)), QUESTION, PASSAGES)
    assert scores == pytest.approx([by_hand(folder, QUESTION, passage) for passage in PASSAGES], abs=1e-6)


@pytest.fixture
def cached(models, tmp_path, monkeypatch) -> Path:
    """The ranker in a hub cache of its own, as someone/ranker: the folder that holds its files."""
    home = tmp_path / "models--someone--ranker"
    shutil.copytree(models / "ranker", home / "snapshots" / "c0ffee")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("c0ffee")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return home / "snapshots" / "c0ffee"


def test_a_model_of_the_hubs_cache_is_loaded_without_asking_the_hub(models, cached) -> None:
    scores = rerank(as_reranker("someone/ranker"), QUESTION, PASSAGES)  # sockets are shut: asking would fail
    assert scores == pytest.approx([by_hand(models / "ranker", QUESTION, passage) for passage in PASSAGES], abs=1e-6)


def test_a_model_of_which_the_cache_holds_a_part_is_asked_of_the_hub(models, cached, monkeypatch) -> None:
    import sentence_transformers

    real = sentence_transformers.CrossEncoder
    asked = []

    def hub(name: str, *, local_files_only: bool, **others):
        asked.append((name, local_files_only))
        return real(name if local_files_only else str(models / "ranker"), local_files_only=True, **others)

    (cached / "model.safetensors").unlink()
    monkeypatch.setattr(sentence_transformers, "CrossEncoder", hub)
    assert len(rerank(as_reranker("someone/ranker"), QUESTION, PASSAGES)) == len(PASSAGES)
    assert asked == [("someone/ranker", True), ("someone/ranker", False)]


def test_code_that_a_model_brings_along_is_not_run(models, tmp_path) -> None:
    import json

    folder = tmp_path / "with-code"
    shutil.copytree(models / "ranker", folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "something-new"
    config["auto_map"] = {
        "AutoConfig": "code.Config",
        "AutoModelForSequenceClassification": "code.Model",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(ModelUnavailable, match="with-code could not be loaded"):
        rerank(as_reranker(str(folder)), QUESTION, PASSAGES)
    assert not (tmp_path / "ran").exists()


def test_a_classifier_of_several_labels_is_refused(models) -> None:
    with pytest.raises(ModelUnavailable, match="classifier gives 3 numbers for a pair of texts"):
        rerank(as_reranker(str(models / "classifier")), QUESTION, PASSAGES)


def test_a_model_without_a_scoring_head_is_refused_since_the_library_would_make_one_up(models) -> None:
    with pytest.raises(ModelUnavailable, match="bare is no reranker: it was saved as BertModel, without a scoring head"):
        rerank(as_reranker(str(models / "bare")), QUESTION, PASSAGES)


def test_an_embedding_model_is_refused(tiny_gemma) -> None:
    with pytest.raises(ModelUnavailable, match="tiny-embeddinggemma is no reranker"):
        rerank(as_reranker(str(tiny_gemma)), QUESTION, PASSAGES)


def test_a_damaged_folder_is_refused_with_what_the_library_said(models, tmp_path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(models / "ranker", folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match=r"the reranker damaged could not be loaded by .*safetensors"):
        rerank(as_reranker(str(folder)), QUESTION, PASSAGES)


def test_a_loaded_cross_encoder_is_refused_with_the_way_to_use_it(models) -> None:
    from sentence_transformers import CrossEncoder

    with pytest.raises(InputError, match="a CrossEncoder is no reranker by itself: give its name or folder"):
        as_reranker(CrossEncoder(str(models / "ranker"), device="cpu", local_files_only=True))


# -- maximal marginal relevance ---------------------------------------------------------------------------------------

EAST, NORTH, WEST = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]


def test_a_repetition_comes_after_something_new_that_is_less_relevant() -> None:
    # the scaled relevances are 1, 0.75 and 0; after item 0: 0.5 * 0.75 - 0.5 * 1 = -0.125 against 0.5 * 0 - 0.5 * 0 = 0
    assert mmr([5.0, 4.0, 1.0], [EAST, EAST, NORTH], 3, 0.5).tolist() == [0, 2, 1]


def test_with_little_diversity_the_repetition_keeps_its_place() -> None:
    # after item 0: 0.8 * 0.75 - 0.2 * 1 = 0.4 against 0
    assert mmr([5.0, 4.0, 1.0], [EAST, EAST, NORTH], 3, 0.2).tolist() == [0, 1, 2]


def test_only_the_closest_of_the_chosen_items_counts() -> None:
    # item 2 repeats item 0 and is opposite to item 1: on average it would look new
    assert mmr([1.0, 1.0, 1.0, 1.0], [EAST, WEST, EAST, NORTH], 4, 1.0).tolist() == [0, 1, 3, 2]


def test_with_full_diversity_the_best_item_is_still_the_first() -> None:
    assert mmr([1.0, 9.0, 2.0], [EAST, NORTH, WEST], 3, 1.0).tolist() == [1, 0, 2]


def test_scores_of_any_scale_weigh_the_same() -> None:
    rows = unit(np.random.default_rng(0).normal(size=(12, 4)))
    scores = np.random.default_rng(1).normal(size=12)
    order = mmr(scores, rows, 12, 0.4).tolist()
    assert mmr(1000 * scores - 70, rows, 12, 0.4).tolist() == order
    assert order != np.argsort(-scores).tolist()


@pytest.mark.parametrize("diversity", [0.0, 0.5, 1.0])
def test_equal_items_come_in_the_order_of_their_index(diversity) -> None:
    rows = np.tile(unit(np.random.default_rng(2).normal(size=(1, 767))), (50, 1))
    assert mmr(np.full(50, 0.3), rows, 50, diversity).tolist() == list(range(50))


@pytest.mark.parametrize(("diversity", "order"), [(0.0, [0, 1]), (0.5, [0, 1])])
def test_scores_whose_difference_is_too_large_for_a_float_are_ordered(diversity, order) -> None:
    assert mmr([1e308, -1e308], [EAST, NORTH], 2, diversity).tolist() == order


def test_nothing_to_order_and_nothing_wanted_give_nothing() -> None:
    assert mmr([], np.zeros((0, 3)), 5, 0.5).shape == (0,)
    assert mmr([1.0, 2.0], [EAST, NORTH], 0, 0.5).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [EAST, NORTH], 1, 0.5), r"got shapes \(1,\) and \(2, 2\)"),
        (([[1.0]], [EAST], 1, 0.5), r"got shapes \(1, 1\) and \(1, 2\)"),
        (([1.0, 2.0], EAST, 1, 0.5), r"got shapes \(2,\) and \(2,\)"),
        (([1.0, np.nan], [EAST, NORTH], 1, 0.5), "NaN or infinite scores"),
        (([1.0, 2.0], [EAST, [0.0, 2.0]], 1, 0.5), r"1 of 2 have another, the first in row 1: gemma_rag\.vectors\.unit"),
        (([1.0, 2.0], [[np.nan, 0.0], NORTH], 1, 0.5), "the first in row 0"),
        (([1.0], [EAST], -1, 0.5), "mmr cannot choose -1 items"),
        (([1.0], [EAST], 1, 1.01), "diversity is from 0 to 1, and is 1.01"),
        (([1.0], [EAST], 1, -0.01), "diversity is from 0 to 1"),
        (([1.0], [EAST], 1, float("nan")), "diversity is from 0 to 1, and is nan"),
    ],
)
def test_mmr_refuses_what_it_cannot_use(arguments, message) -> None:
    with pytest.raises(InputError, match=message):
        mmr(*arguments)


@st.composite
def items(draw):
    """Scores with many ties, and rows with many repetitions."""
    n = draw(st.integers(1, 12))
    scores = draw(arrays.arrays(np.float64, n, elements=st.integers(-3, 3) | st.floats(-1e300, 1e300)))
    kinds = draw(arrays.arrays(np.int64, n, elements=st.integers(0, 4)))
    return scores, unit(np.random.default_rng(draw(st.integers(0, 9))).normal(size=(5, 3)))[kinds], kinds


share = st.floats(0.0, 1.0)


@given(items(), st.integers(0, 15), share)
def test_as_many_items_as_there_are_up_to_k_and_none_twice(made, k, diversity) -> None:
    scores, rows, _ = made
    order = mmr(scores, rows, k, diversity)
    assert order.dtype == np.int64
    assert len(order) == min(k, len(scores))
    assert len(set(order.tolist())) == len(order)
    assert set(order.tolist()) <= set(range(len(scores)))


@given(items(), st.integers(0, 15))
def test_without_diversity_it_is_the_order_of_relevance_with_the_lower_index_first(made, k) -> None:
    scores, rows, _ = made
    assert mmr(scores, rows, k, 0.0).tolist() == sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


@given(items(), share)
def test_the_first_item_is_the_most_relevant_one(made, diversity) -> None:
    scores, rows, _ = made
    assert mmr(scores, rows, 1, diversity)[0] == np.argmax(scores)


@given(items())
def test_with_full_diversity_every_direction_comes_before_any_repetition(made) -> None:
    scores, rows, kinds = made
    order = mmr(scores, rows, len(scores), 1.0)
    distinct = len(set(kinds.tolist()))
    assert len(set(kinds[order[:distinct]].tolist())) == distinct


@given(items(), st.integers(0, 15), share)
def test_fewer_items_are_the_beginning_of_more(made, k, diversity) -> None:
    scores, rows, _ = made
    assert mmr(scores, rows, k, diversity).tolist() == mmr(scores, rows, len(scores), diversity).tolist()[:k]


@pytest.mark.parametrize("diversity", [0.1, 0.5, 0.9])
def test_each_choice_has_the_highest_marginal_relevance_of_the_paper(diversity) -> None:
    rng = np.random.default_rng(3)
    scores, rows = rng.normal(size=40), unit(rng.normal(size=(40, 5))).astype(np.float64)
    relevance = (scores - scores.min()) / (scores.max() - scores.min())
    chosen: list[int] = []
    while len(chosen) < 40:  # the formula, item by item
        left = [i for i in range(40) if i not in chosen]
        chosen.append(
            max(
                left,
                key=lambda i: (
                    (1 - diversity) * relevance[i] - diversity * max((float(rows[i] @ rows[j]) for j in chosen), default=0.0)
                ),
            )
        )
    assert mmr(scores, rows, 40, diversity).tolist() == chosen
