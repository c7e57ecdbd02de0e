"""Learning how to order documents: a router that helps, one that steps aside, and what makes it stale."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest

from gemma_rag.documents import Category, Document
from gemma_rag.encoders import Input
from gemma_rag.errors import InputError
from gemma_rag.fitting import FEWEST, fit_router
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.learned import Learned
from gemma_rag.prompts import NO_PROMPTS, Task
from gemma_rag.retriever import TwoStageRetriever

TOPICS = ["red", "green", "blue", "apple", "pear", "plum"]

# Two categories write about the same topics. Cosine and words prefer letters, whose documents say nothing else: of a
# question about "car" the manual is right, and only a router can know, since no document speaks of a car.
MANUALS = [Document(id=f"manual-{topic}", text=f"{topic} {topic} tram", category="manuals") for topic in TOPICS]
LETTERS = [Document(id=f"letter-{topic}", text=f"{topic} {topic}", category="letters") for topic in TOPICS]
LABELLED = [
    {"question": f"{start} {sign} {topic}", "relevant": [f"{kind}-{topic}"]}
    for topic in TOPICS
    for sign, kind in (("car", "manual"), ("bus", "letter"))
    for start in ("my", "which")
]
OPEN = {"category_threshold": -1, "document_threshold": -1}


@pytest.fixture
def build(words):
    """Builds a knowledge base in memory."""
    made: list[KnowledgeBase] = []

    def build(documents, **options) -> KnowledgeBase:
        made.append(KnowledgeBase.from_documents(documents, words, **options))
        return made[-1]

    yield build
    for base in made:
        base.close()


@pytest.fixture
def base(build) -> KnowledgeBase:
    return build(MANUALS + LETTERS)


@pytest.fixture
def fitted(base) -> KnowledgeBase:
    base.fit_router(LABELLED)
    return base


def first(base, question, **options) -> str:
    return TwoStageRetriever(base, **options).retrieve(question, **OPEN).hits[0].document.id


def scores(found) -> list[tuple[str, float, float | None, float | None]]:
    return [(hit.document.id, hit.score, hit.lexical_score, hit.fused_score) for hit in found.hits]


# -- a router that helps ----------------------------------------------------------------------------------------------


def test_a_router_that_helps_is_kept(base) -> None:
    # before, every manual comes second and every letter first: a mean reciprocal rank of 0.75
    report = fit_router(base, LABELLED)
    assert (report.questions, report.before, report.after, report.notes) == (24, 0.75, 1.0, ())
    assert report.router_weight > 0
    ranking, router, calibration = base.learned
    assert ranking is not None
    assert (ranking.lexical_weight, ranking.router_weight) == (report.lexical_weight, report.router_weight)
    assert (ranking.questions, ranking.trials["0.5 0.0"]) == (24, 0.75)
    assert router is not None
    assert router.categories == ranking.categories == ("letters", "manuals")
    assert calibration is None


@pytest.mark.parametrize(
    ("question", "before", "after"),
    [("a car and a plum", "letter-plum", "manual-plum"), ("a bus and a plum", "letter-plum", "letter-plum")],
)
def test_a_router_that_helps_orders_the_hits_of_questions_that_it_has_not_seen(base, question, before, after) -> None:
    assert first(base, question) == before
    base.fit_router(LABELLED)
    assert first(base, question) == after


def test_the_fused_score_has_the_routers_part(fitted) -> None:
    ranking, router, _ = fitted.learned
    [row] = router.log_probabilities(fitted.encoder.encode([Input("car plum", Task.QUERY)]))
    log = dict(zip(router.categories, row.tolist(), strict=True))
    for hit in TwoStageRetriever(fitted).retrieve("car plum", **OPEN).hits:
        plain = (1 - ranking.lexical_weight) * hit.score + ranking.lexical_weight * hit.lexical_score
        assert hit.fused_score == pytest.approx(plain + ranking.router_weight * log[hit.document.category], abs=1e-5)


def test_questions_without_an_answer_are_passed_over(base, build) -> None:
    silent = [{"question": f"whale {i}", "relevant": []} for i in range(9)]
    report = fit_router(base, silent + LABELLED)
    other = build(MANUALS + LETTERS)
    assert report == fit_router(other, LABELLED)
    assert base.learned.to_files() == other.learned.to_files()


def test_the_same_seed_gives_the_same_to_the_byte_and_another_cut_may_not_matter(base, build) -> None:
    fit_router(base, LABELLED, seed=3)
    other = build(MANUALS + LETTERS)
    fit_router(other, LABELLED, seed=3)
    assert base.learned.to_files() == other.learned.to_files()
    assert fit_router(other, LABELLED, seed=4).router_weight > 0


def test_a_fit_comes_back_with_the_folder(fitted, words, tmp_path) -> None:
    expected = scores(TwoStageRetriever(fitted).retrieve("car plum", **OPEN))
    fitted.save(tmp_path / "kb")
    fitted.close()
    with KnowledgeBase.open(tmp_path / "kb", words) as again:
        assert scores(TwoStageRetriever(again).retrieve("car plum", **OPEN)) == expected


def test_without_keep_a_fit_is_in_force_and_not_in_the_folder(base, words, tmp_path) -> None:
    base.save(tmp_path / "kb")
    base.fit_router(LABELLED, keep=False)
    assert first(base, "car plum") == "manual-plum"
    with KnowledgeBase.open(tmp_path / "kb", words) as again:
        assert again.learned == Learned()


def test_a_report_is_plain_json(base) -> None:
    assert fit_router(base, LABELLED).to_json() == {
        "questions": 24,
        "lexical_weight": 0.5,
        "router_weight": 0.03,
        "before": 0.75,
        "after": 1.0,
        "notes": (),
    }


# -- a router that steps aside ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [11, 14])
def test_a_router_steps_aside_where_categories_say_nothing(build, seed) -> None:
    random = np.random.default_rng(seed)
    wheels = ["car", "bus", "tram"]
    documents = [
        Document(
            id=f"{topic}-{i}",
            category=str(random.choice(["a", "b"])),
            text=f"{topic} {' '.join(random.choice(wheels, 2))}",
        )
        for topic in TOPICS
        for i in range(4)
    ]
    labelled = [
        {"question": f"q{i} {topic} {random.choice(wheels)}", "relevant": [f"{topic}-{random.integers(4)}"]}
        for topic in TOPICS
        for i in range(6)
    ]
    base = build(documents)
    report = fit_router(base, labelled)
    ranking, router, _ = base.learned
    assert ranking is not None
    luckiest = max(ranking.trials, key=lambda pair: ranking.trials[pair])
    assert not luckiest.endswith(" 0.0")  # a router looks a little better, and by no more than luck
    assert (report.router_weight, router) == (0, None)


def test_where_nothing_can_be_gained_the_default_order_stays(base) -> None:
    report = fit_router(
        base, [{"question": f"{i} {topic}", "relevant": [f"letter-{topic}"]} for topic in TOPICS for i in "abcd"]
    )
    assert (report.before, report.lexical_weight, report.router_weight) == (1.0, 0.5, 0.0)


def test_a_single_category_has_no_router_and_learns_the_weight_of_words(build) -> None:
    # twins have the same vector: only the word that the encoder does not know tells them apart, so words must weigh something
    documents = [Document(id=f"{t}-{end}", text=f"{t} {end}", category="all") for t in TOPICS for end in ("whale", "shark")]
    labelled = [{"question": f"{i} {d.text}", "relevant": [d.id]} for d in documents for i in ("my", "the")]
    base = build(documents)
    report = fit_router(base, labelled)
    assert report.notes == ("no router was fitted: there are 1 categories, and it takes from 2 to 1,000",)
    assert (report.questions, report.router_weight, base.learned.router) == (24, 0.0, None)
    assert [first(base, document.text) for document in documents] == [document.id for document in documents]


# -- labels that cannot be used ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, FEWEST - 1])
def test_too_few_questions_are_refused_with_their_number(base, count) -> None:
    with pytest.raises(InputError, match=f"fitting needs 20 questions with an answer, .* and got {count}$"):
        base.fit_router([*LABELLED[:count], *({"question": f"whale {i}", "relevant": []} for i in range(30))])
    assert base.learned == Learned()


def test_just_enough_questions_will_do(base) -> None:
    assert base.fit_router(LABELLED[:FEWEST]).questions == FEWEST


def test_questions_that_the_model_does_not_read_are_not_learned_from(words, build, caplog) -> None:
    words.profile = dataclasses.replace(NO_PROMPTS, languages=("en",))
    base = build([*MANUALS, *LETTERS, Document(id="pin", text="重置密码", category="letters")])
    chinese = [{"question": f"如何重置密码{i}", "relevant": ["pin"]} for i in range(FEWEST)]
    with caplog.at_level(logging.ERROR):
        with pytest.raises(InputError, match="in a language that the model reads, and got 0"):
            fit_router(base, chinese)
        assert fit_router(base, chinese + LABELLED).questions == len(LABELLED)


def test_labels_that_name_an_unknown_document_are_refused(base) -> None:
    with pytest.raises(InputError, match="does not have: 'absent'"):
        base.fit_router([*LABELLED, {"question": "q", "relevant": ["absent"]}])


def test_an_empty_knowledge_base_learns_nothing(build) -> None:
    base = build([], categories=[Category(name="letters", description="Post")])
    with pytest.raises(InputError, match="fitting needs 20 questions"):
        base.fit_router([{"question": f"q {i}", "relevant": []} for i in range(30)])


# -- what makes it stale ----------------------------------------------------------------------------------------------


def test_a_category_that_is_only_described_changes_nothing(fitted) -> None:
    fitted.add([], categories=[Category(name="empty", description="car car car")])
    found = TwoStageRetriever(fitted).retrieve("car plum", **OPEN)
    assert (found.hits[0].document.id, found.notes) == ("manual-plum", ())


@pytest.mark.parametrize("change", ["new", "gone"])
def test_a_router_that_does_not_know_the_categories_is_left_out_and_said_to_be(fitted, change) -> None:
    if change == "new":
        fitted.add([Document(id="news", text="bus tram", category="news")])
        changes = r"new: news"
    else:
        fitted.delete([document.id for document in MANUALS])
        changes = r"gone: manuals"
    found = TwoStageRetriever(fitted).retrieve("car plum", **OPEN)
    [note] = found.notes
    assert note.startswith(f"the learned router was left out: the categories have changed since it was fitted ({changes}). Fit")
    fitted.learn(fitted.learned._replace(router=None))
    without = TwoStageRetriever(fitted).retrieve("car plum", **OPEN)
    assert (without.notes, scores(without)) == ((), scores(found))


def test_new_documents_in_known_categories_leave_the_router_in_force(fitted) -> None:
    fitted.add([Document(id="manual-tram", text="tram tram", category="manuals")])
    found = TwoStageRetriever(fitted).retrieve("car plum", **OPEN)
    assert (found.hits[0].document.id, found.notes) == ("manual-plum", ())


def test_a_stale_router_can_be_fitted_again(fitted) -> None:
    fitted.add([Document(id="news", text="bus tram", category="news")])
    fitted.fit_router(LABELLED)
    assert fitted.learned.router.categories == ("letters", "manuals", "news")
    assert TwoStageRetriever(fitted).retrieve("car plum", **OPEN).notes == ()


def test_lexical_search_does_without_the_router_and_without_a_note(fitted) -> None:
    fitted.add([Document(id="news", text="bus tram", category="news")])
    assert TwoStageRetriever(fitted, mode="lexical").retrieve("plum", **OPEN).notes == ()


def test_a_new_fit_forgets_the_calibration(base) -> None:
    silent = [{"question": f"whale {i}", "relevant": []} for i in range(5)]
    base.calibrate(LABELLED + silent)
    assert base.learned.calibration is not None
    report = base.fit_router(LABELLED)
    assert report.notes == ("the calibration was forgotten, since it held for another order: calibrate again",)
    assert base.learned.calibration is None
    assert base.fit_router(LABELLED).notes == ()


def test_a_calibration_that_needs_a_stale_router_gives_way_to_the_defaults(fitted) -> None:
    silent = [{"question": f"whale {i}", "relevant": []} for i in range(5)]
    fitted.calibrate(LABELLED + silent)
    assert "router" in fitted.learned.calibration.kinds["hybrid"].evidence.features
    assert TwoStageRetriever(fitted).retrieve("car plum").thresholds["acts_on"] == "evidence"
    fitted.add([Document(id="news", text="bus tram", category="news")])
    found = TwoStageRetriever(fitted).retrieve("car plum")
    assert found.thresholds["acts_on"] == "cosine"
    assert [note.split(":")[0] for note in found.notes] == [
        "the learned router was left out",
        "the calibration needs the learned router, which was left out",
    ]
