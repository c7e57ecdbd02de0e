"""What the package promises of its retrieval, on real questions: SQuAD 2.0, with the offline MiniLM.

The data is not in the repository: GEMMA_RAG_DATA names the folder that has `squad2/`. Without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gemma_rag import KnowledgeBase, TwoStageRetriever, load_documents

DATA = os.environ.get("GEMMA_RAG_DATA")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DATA is None, reason="GEMMA_RAG_DATA does not name the folder of the evaluation sets"),
]


@pytest.fixture(scope="module")
def squad2() -> Path:
    return Path(str(DATA)) / "squad2"


@pytest.fixture(scope="module")
def queries(squad2) -> list[dict]:
    lines = (squad2 / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    return [query for query in map(json.loads, lines) if query["split"] == "test" and query["answerable"]]


@pytest.fixture(scope="module")
def results(squad2, queries, minilm):
    """The five best documents of the test split's answerable questions, by mode, and the share of documents compared."""
    base = KnowledgeBase.from_documents(load_documents(squad2 / "corpus.jsonl").documents, minilm)
    retriever = TwoStageRetriever(base, k=5)
    texts = [query["text"] for query in queries]
    return {mode: retriever.retrieve_many(texts, mode=mode) for mode in ("flat", "two-stage")}


def recall(results, queries, k: int) -> float:
    found = [
        bool({hit.document.id for hit in result.hits[:k]} & set(query["relevant"]))
        for result, query in zip(results, queries, strict=True)
    ]
    return sum(found) / len(found)


def test_flat_search_finds_what_the_model_is_known_to_find(results, queries):
    assert abs(recall(results["flat"], queries, 1) - 0.641) <= 0.01


@pytest.mark.parametrize("k", [1, 5])
def test_the_category_stage_loses_at_most_a_point_of_recall(results, queries, k):
    assert recall(results["two-stage"], queries, k) >= recall(results["flat"], queries, k) - 0.01


def test_the_category_stage_compares_at_most_35_percent_of_the_documents(results):
    shares = [result.documents_scored / result.documents_total for result in results["two-stage"]]
    assert sum(shares) / len(shares) <= 0.35
