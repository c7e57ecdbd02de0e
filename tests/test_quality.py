"""What the package promises of its retrieval, on real questions: English with the offline MiniLM, Chinese by words.

The data is not in the repository: GEMMA_RAG_DATA names the folder that has `squad2/`, `clinc150/`, `drcd/` and `stard/`.
Without it these tests are skipped. Everything is measured on the test split; what is learned is learned from the dev split.
The classes are what pytest-xdist shares out among its workers (`--dist loadscope`): no data set is embedded twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_rag.encoders.words_only import WordsOnly
from gemma_rag.evaluation import evaluate, open_base
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.labelled import Dataset

DATA = os.environ.get("GEMMA_RAG_DATA")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DATA is None, reason="GEMMA_RAG_DATA does not name the folder of the evaluation sets"),
]

Measure = Callable[[str, str], dict[str, Any]]

NOBODY = "no such split"  # nothing is fitted and nothing calibrated
WAYS: dict[str, dict[str, Any]] = {
    "flat dense": {"mode": "flat", "fit_on": NOBODY},
    "two-stage dense": {"fit_on": NOBODY},
    "no labels": {"hybrid": True, "fit_on": NOBODY},
    "dev labels": {"hybrid": True, "router": "learned"},
    "words": {"mode": "lexical", "fit_on": NOBODY},
}


@pytest.fixture(scope="module")
def measure(minilm, tmp_path_factory) -> Measure:
    """The numbers of a data set by a way of searching; each text is embedded once and each way measured once."""
    cache = tmp_path_factory.mktemp("vectors")
    bases: dict[str, tuple[Dataset, KnowledgeBase]] = {}
    results: dict[tuple[str, str], dict[str, Any]] = {}

    def measure(name: str, way: str) -> dict[str, Any]:
        if name not in bases:
            dataset = Dataset.load(Path(str(DATA)) / name)
            by_words = way == "words"
            bases[name] = dataset, open_base(dataset, WordsOnly() if by_words else minilm, None if by_words else cache)
        if (name, way) not in results:
            results[name, way] = evaluate(*bases[name], **WAYS[way]).result
        return results[name, way]

    return measure


def check_recall(result: dict[str, Any], first: float, among_five: float) -> None:
    assert result["recall@1"] >= first
    assert result["recall@5"] >= among_five


def check_loss(flat: dict[str, Any], staged: dict[str, Any]) -> None:
    """The category stage saves work, and loses at most half a point of recall."""
    assert staged["documents_scored"] < flat["documents_scored"] == 1.0
    for number in ("recall@1", "recall@5"):
        assert staged[number] >= flat[number] - 0.005


class TestSquad2:
    def test_flat_search_finds_what_the_model_is_known_to_find(self, measure):
        assert measure("squad2", "flat dense")["recall@1"] == pytest.approx(0.641, abs=0.01)

    def test_the_category_stage_loses_at_most_half_a_point(self, measure):
        check_loss(measure("squad2", "flat dense"), measure("squad2", "two-stage dense"))

    def test_without_labels(self, measure):
        result = measure("squad2", "no labels")
        check_recall(result, 0.79, 0.95)
        assert result["documents_scored"] <= 0.20
        assert result["operating_point"] is None  # so nothing was learned from labels

    def test_with_labels(self, measure):
        result = measure("squad2", "dev labels")
        check_recall(result, 0.81, 0.96)
        assert result["end_to_end"] >= 0.64


class TestClinc150:
    def test_the_category_stage_loses_at_most_half_a_point(self, measure):
        check_loss(measure("clinc150", "flat dense"), measure("clinc150", "two-stage dense"))

    def test_without_labels(self, measure):
        result = measure("clinc150", "no labels")
        check_recall(result, 0.835, 0.965)
        assert result["operating_point"] is None

    def test_with_labels(self, measure):
        result = measure("clinc150", "dev labels")
        check_recall(result, 0.85, 0.975)
        assert result["abstention_auroc"] >= 0.945
        assert result["end_to_end"] >= 0.79


class TestByWords:
    @pytest.mark.parametrize(("name", "first", "among_five"), [("drcd", 0.91, 0.985), ("stard", 0.33, 0.53)])
    def test_chinese_without_labels(self, measure, name, first, among_five):
        result = measure(name, "words")
        check_recall(result, first, among_five)
        assert result["operating_point"] is None
