"""Plans: measured on a knowledge base, kept with it, and what is found with one."""

from __future__ import annotations

import numpy as np
import pytest

from gemma_rag.documents import Document
from gemma_rag.encoders import Space
from gemma_rag.errors import InputError
from gemma_rag.index.embedded import Plan
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.planning import plan
from gemma_rag.prompts import NO_PROMPTS
from gemma_rag.retriever import TwoStageRetriever
from gemma_rag.routing import Gate
from gemma_rag.vectors import unit

WORDS = ["red", "green", "blue", "apple", "pear", "plum", "car", "bus", "tram"]
ALL = {"category_threshold": -1.0, "document_threshold": -1.0, "k": 6}


class Hashed:
    """A vector of 200 components for each text, the first ones largest, near those of texts that share its words."""

    profile = NO_PROMPTS
    space = Space(
        model="hashed", weights="", prompts="", dimensions=200, max_tokens=99, overflow="error", runtime="", precision="float32"
    )

    def encode(self, inputs):
        table = np.random.default_rng(0).standard_normal((len(WORDS), 200)) * np.arange(1, 201) ** -0.5
        rows = []
        for item in inputs:
            own = np.random.default_rng(list(item.text.encode())).standard_normal(200) * np.arange(1, 201) ** -0.7
            rows.append(own + sum(table[WORDS.index(word)] for word in item.text.split() if word in WORDS))
        return unit(np.array(rows).reshape(-1, 200))

    def count_tokens(self, texts):
        return [len(text.split()) for text in texts]


def pages(count: int = 400) -> list[Document]:
    rng = np.random.default_rng(1)
    return [
        Document(
            id=str(i), text=f"{' '.join(rng.choice(WORDS, 3))} number{i}", category=f"c{i % 7}", metadata={"even": i % 2 == 0}
        )
        for i in range(count)
    ]


@pytest.fixture
def base():
    with KnowledgeBase.from_documents(pages(), Hashed()) as base:
        yield base


QUESTIONS = ["red apple", "green pear number7", "blue tram car", "number250"]
OPTIONS = [
    {},
    {"hybrid": False},
    {"mode": "flat"},
    {"max_categories": 2},
    {"where": {"even": True}},
    {"categories": ["c1", "c2"]},
    {"categories": ["c3"], "where": {"even": False}},
    {"diversity": 0.5},
]


def found(base: KnowledgeBase, **options):
    call = {name: options.pop(name) for name in ("where", "categories") if name in options}
    results = TwoStageRetriever(base, **ALL | options).retrieve_many(QUESTIONS, **call)
    return [[(hit.document.id, round(hit.score, 5), hit.lexical_score) for hit in result.hits] for result in results]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "default")
def test_a_plan_with_a_long_shortlist_finds_what_the_exact_search_finds(base, options):
    exact = found(base, **options)
    base.use_plan(Plan(dimensions=128, oversampling=64))
    assert found(base, **options) == exact


def test_scores_are_cosines_of_all_components_whatever_the_plan(base):
    base.use_plan(Plan(dimensions=8, oversampling=1))
    query = Hashed().encode([type("I", (), {"text": "red apple"})])[0]
    for hit in TwoStageRetriever(base, **ALL).retrieve("red apple").hits:
        assert hit.score == pytest.approx(float(Hashed().encode([hit.document])[0] @ query), abs=1e-5)


def test_a_plan_is_kept_with_the_folder_and_can_be_taken_back(base, tmp_path):
    base.save(tmp_path / "kb")
    base.use_plan(Plan(dimensions=64, oversampling=4))
    with KnowledgeBase.open(tmp_path / "kb", Hashed()) as other:
        assert other.search_plan == Plan(dimensions=64, oversampling=4)
        base.use_plan(None)
        other.refresh()
        assert other.search_plan is None


@pytest.mark.parametrize(
    "questions", [None, QUESTIONS, [{"question": text} for text in QUESTIONS]], ids=["own", "texts", "rows"]
)
def test_planning_keeps_what_it_picked_and_says_why(base, questions):
    report = plan(base, target_overlap=0.9, questions=questions)
    assert base.search_plan == report.plan
    assert report.why
    assert report.trials


@pytest.mark.parametrize(("most", "said"), [(None, True), (50, False)])
def test_of_a_gate_that_opens_much_because_there_are_many_categories_the_report_says_so(most, said):
    many = [page.model_copy(update={"category": f"c{i % 220}"}) for i, page in enumerate(pages(440))]
    with KnowledgeBase.from_documents(many, Hashed()) as base:
        report = plan(base, questions=QUESTIONS, retriever=TwoStageRetriever(base, max_categories=most, gate=Gate(mass=1.0)))
    assert ("max_categories=50" in report.why) is said


def test_planning_without_keeping_changes_nothing(base):
    base.plan(keep=False)
    assert base.search_plan is None


@pytest.mark.parametrize("target", [0.0, -1.0, 1.01])
def test_a_target_out_of_range_is_refused(base, target):
    with pytest.raises(InputError, match="target_overlap is above 0 and at most 1"):
        base.plan(target_overlap=target)


def test_an_empty_knowledge_base_cannot_be_planned():
    with KnowledgeBase.from_documents([], Hashed()) as empty, pytest.raises(InputError, match="index documents, then plan"):
        empty.plan()
