"""Measuring on a data set: every number by hand on twelve documents, and vectors that are computed once."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from gemma_rag.calibrating import calibrate
from gemma_rag.documents import Document
from gemma_rag.errors import InputError
from gemma_rag.evaluation import PLAIN, compare, default_cache, evaluate, open_base
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.labelled import Dataset, as_labelled, texts
from gemma_rag.learned import Learned
from gemma_rag.metrics import ranking_metrics
from gemma_rag.observing import observe
from gemma_rag.prompts import NO_PROMPTS
from gemma_rag.results import Outcome
from gemma_rag.retriever import TwoStageRetriever
from gemma_rag.routing import Gate

# "red" finds the documents in the order a, b, c, ... l, and "apple" in the order l, k, ... a. The first six are red, the
# others are apples, and each half has the other's name: whoever looks at names alone is led into the wrong one.
REDS, APPLES = [12] * 6 + [5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5] + [12] * 6
DOCUMENTS = tuple(
    Document(id=name, text=("red " * reds + "apple " * apples).strip(), category="apple" if reds > apples else "red")
    for name, reds, apples in zip("abcdefghijkl", REDS, APPLES, strict=True)
)


def asked(question, relevant=(), category=None, split="test", **more):
    return {"question": question, "relevant": list(relevant), "category": category, "split": split, **more}


# All documents searched, the ranks are 1, 3, 8 and 12.
FOUR = [asked("red", "a", "apple"), asked("Red?", "c", "apple"), asked("red red", "h", "red"), asked("apple", "a", "apple")]
SILENT = [asked("bus", kind="far"), asked("tram", kind="far")]
DEV = 4 * [asked("red", "a", split="dev"), asked("apple", "l", split="dev"), *(item | {"split": "dev"} for item in SILENT)]
SHARES = {  # recall at 1, 5 and 10, mean reciprocal rank, ndcg, documents scored
    "flat": [1 / 4, 2 / 4, 3 / 4, (1 + 1 / 3 + 1 / 8) / 4, (1 + 1 / 2 + 1 / math.log2(9)) / 4, 1.0],
    # one half is searched, the right one for the first two questions alone
    "two-stage": [1 / 4, 2 / 4, 2 / 4, (1 + 1 / 3) / 4, (1 + 1 / 2) / 4, 1 / 2],
    # the other half: h is second among g ... l, and a sixth among f, e, ... a
    "classic": [0.0, 1 / 4, 2 / 4, (1 / 2 + 1 / 6) / 4, (1 / math.log2(3) + 1 / math.log2(7)) / 4, 1 / 2],
    # all but l say "red", and all but a say "apple"
    "lexical": [1 / 4, 2 / 4, 3 / 4, (1 + 1 / 3 + 1 / 8) / 4, (1 + 1 / 2 + 1 / math.log2(9)) / 4, 11 / 12],
}
NAMES = ["recall@1", "recall@5", "recall@10", "mrr@10", "ndcg@10", "documents_scored"]


def dataset(*parts, documents=DOCUMENTS, name="toy") -> Dataset:
    return Dataset(name, documents, as_labelled([item for part in parts for item in part]))


@pytest.fixture
def base(words):
    with KnowledgeBase.from_documents(DOCUMENTS, words) as base:
        yield base


# -- numbers by hand --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", SHARES)
def test_rankings_are_judged_as_by_hand(base, mode) -> None:
    result = evaluate(dataset(FOUR), base, mode=mode).result
    assert [result[name] for name in NAMES] == pytest.approx(SHARES[mode], abs=1e-4)
    assert (result["n_queries"], result["n_answerable"]) == (4, 4)


# two-stage opens "apple" for "red" and "red" for "apple"; classic does the contrary, and so opens what holds h and the last a
@pytest.mark.parametrize(
    ("mode", "categories_right", "lost"),
    [("two-stage", [1, 1, 0, 0], [0, 0, 1, 1]), ("classic", [0, 0, 1, 1], [1, 1, 0, 0])],
)
def test_stage_one_is_judged_by_its_best_category_and_by_what_it_never_lets_be_scored(
    base, mode, categories_right, lost
) -> None:
    found = evaluate(dataset(FOUR), base, mode=mode)
    assert found.per_question["category_accuracy"].tolist() == categories_right
    assert found.per_question["routing_loss"].tolist() == lost
    assert (found.result["category_accuracy"], found.result["routing_loss"]) == (0.5, 0.5)


@pytest.mark.parametrize("mode", ["flat", "lexical"])
def test_without_a_stage_one_nothing_is_said_of_it(base, mode) -> None:
    result = evaluate(dataset(FOUR), base, mode=mode).result
    assert (result["category_accuracy"], result["routing_loss"]) == (None, None)
    assert all("routing_loss" not in row for row in result["per_category"])


def test_labels_without_a_category_say_nothing_of_categories(base) -> None:
    result = evaluate(dataset([asked("red", "a"), asked("red red", "h")]), base).result
    assert (result["category_accuracy"], result["routing_loss"], result["per_category"]) == (None, 0.5, [])


def test_one_relevant_document_that_is_scored_is_enough_for_the_routing(base) -> None:
    both, none = evaluate(dataset([asked("red", "la"), asked("red", "lk")]), base).per_question["routing_loss"]
    assert (both, none) == (0, 1)


def test_silence_is_judged_by_pairs_of_an_answerable_and_an_unanswerable_question(base) -> None:
    # cosines of the best document: 1 four times and 3 ** -0.5; 2 ** -0.5 and 0. Of ten pairs one is lost
    late, near = asked("red bus tram", "a", "apple"), asked("red bus", kind="near")
    result = evaluate(dataset(FOUR, [late, near, asked("bus", kind="far")]), base, mode="flat").result
    assert result["abstention_auroc"] == pytest.approx(0.9)
    assert result["auroc_by_kind"] == {"far": 1.0, "near": 0.8}
    assert result["answer_scores"]["near"] == pytest.approx([2**-0.5], abs=1e-3)
    assert (result["n_queries"], result["n_answerable"]) == (7, 5)
    assert result["end_to_end"] is None


def test_the_area_under_risk_and_coverage(base) -> None:
    # surest first: a right answer, then one to a question that has none
    questions = [asked("red", "a"), asked("red bus")]
    result = evaluate(dataset(questions), base, mode="flat").result
    assert result["curves"]["risk_coverage"] == {"coverage": [0.5, 1.0], "risk": [0.0, 0.5]}
    assert result["risk_coverage_area"] == 0.25


def test_with_labels_to_calibrate_on_it_is_judged_from_end_to_end(base) -> None:
    # of the four, all answered, the first is right; a fifth is refused by mistake; both of the others are refused
    found = evaluate(dataset(FOUR, [asked("bus tram", "a")], SILENT, DEV), base)
    assert found.per_question["end_to_end"].tolist() == [1, 0, 0, 0, 0, 1, 1]
    assert found.result["end_to_end"] == pytest.approx(3 / 7, abs=1e-4)
    assert found.result["refused_by_kind"] == {"answerable": 0.2, "far": 1.0}
    assert found.result["thresholds_chosen_on"] == "dev"
    assert found.result["operating_point"]["rule"] == "end_to_end"
    assert found.result["operating_point"]["statement"]
    assert found.result["notes"] == []


@pytest.mark.parametrize("mode", ["two-stage", "flat", "classic", "lexical"])
def test_calibrating_never_changes_a_ranking(base, mode) -> None:
    with_labels, without = (evaluate(dataset(FOUR, SILENT, dev), base, mode=mode) for dev in (DEV, []))
    for name in NAMES:
        assert with_labels.per_question[name].tolist() == without.per_question[name].tolist(), name


def test_only_the_split_asked_for_is_measured_and_only_the_other_is_learned_from(base) -> None:
    split = dataset(FOUR, SILENT, DEV)
    here = evaluate(split, base, mode="flat", split="dev").result
    assert (here["split"], here["n_queries"], here["recall@1"]) == ("dev", 16, 1.0)
    assert (here["end_to_end"], here["thresholds_chosen_on"]) == (None, None)
    assert here["notes"] == ["nothing was calibrated: calibrating needs labelled questions, and none came"]
    there = evaluate(split, base, mode="flat", split="dev", fit_on="test").result
    assert there["end_to_end"] is not None


def test_without_unanswerable_questions_there_is_no_auroc_and_without_answerable_ones_no_ranking(base) -> None:
    assert evaluate(dataset(FOUR), base).result["abstention_auroc"] is None
    result = evaluate(dataset(SILENT), base).result
    assert {name: result[name] for name in PLAIN if result[name] is not None} == {
        "documents_scored": 1.0,
        "risk_coverage_area": 1.0,
    }


def test_intervals_hold_their_numbers_and_stand_for_nothing_else(base) -> None:
    result = evaluate(dataset(FOUR, SILENT, DEV), base).result
    numbers = [name for name in PLAIN if result[name] is not None and name != "risk_coverage_area"]
    assert sorted(result["intervals"]) == sorted(numbers)
    for name in numbers:
        low, high = result["intervals"][name]
        assert low <= result[name] <= high, name


def test_categories_come_worst_first_and_the_surest_mistakes_first(base) -> None:
    result = evaluate(dataset(FOUR, SILENT[:1]), base, mode="flat").result
    assert result["per_category"] == [
        {"name": "red", "questions": 1, "recall@1": 0.0},
        {"name": "apple", "questions": 3, "recall@1": 0.3333},
    ]
    assert [(row["question"], row["expected"], row["got"]) for row in result["worst"]][2:] == [
        ("apple", "a", "l"),
        ("bus", "no answer (far)", result["worst"][-1]["got"]),
    ]
    assert {row["question"] for row in result["worst"][:2]} == {"Red?", "red red"}


def test_the_json_has_every_plain_number_and_nothing_that_is_there_for_plots(base) -> None:
    found = evaluate(dataset(FOUR, SILENT, DEV), base)
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert {*PLAIN, "n_queries", "seconds", "intervals", "notes"} <= plain.keys()
    assert not {"curves", "answer_scores", "worst", "per_category"} & plain.keys()
    assert plain["seconds"] >= 0


# -- as the retriever does --------------------------------------------------------------------------------------------

COLOURS, THINGS = ["red", "green", "blue"], {"apple": "pear", "pear": "pear", "plum": "pear", "car": "bus", "bus": "bus"}
MARKET = tuple(Document(id=f"{c}-{t}", text=f"{c} {t} {c}", category=THINGS[t]) for c in COLOURS for t in THINGS)
OPTIONS = {
    "two-stage": {},
    "flat": {"mode": "flat"},
    "lexical": {"mode": "lexical"},
    "classic": {"gate": Gate(name_weight=1.0), "max_categories": 1, "hybrid": False},
}


@pytest.mark.parametrize(("mode", "hybrid"), [(m, h) for m in OPTIONS for h in (False, True) if not (h and m == "classic")])
def test_rankings_are_those_of_the_retriever_with_its_thresholds_off(words, mode, hybrid) -> None:
    questions = [asked(f"the {c} {t}", [f"{d}-{t}"]) for c, d in itertools.pairwise(COLOURS) for t in THINGS]
    questions += [asked(f"{t} {c} {c} {c}", [f"{c}-bus"]) for c in COLOURS for t in THINGS]
    labelled = as_labelled(questions)
    with KnowledgeBase.from_documents(MARKET, words) as base:
        found = evaluate(dataset(questions, documents=MARKET), base, mode=mode, hybrid=hybrid)
        retriever = TwoStageRetriever(
            base, **{"k": 10, "category_threshold": -1, "document_threshold": -1, "hybrid": hybrid} | OPTIONS[mode]
        )
        results = retriever.retrieve_many(texts(labelled))
    values = ranking_metrics([[hit.document.id for hit in r.hits] for r in results], [item.relevant for item in labelled])
    for name, each in values.items():
        assert found.per_question[name].tolist() == each.tolist(), name
    shares = [r.documents_scored / r.documents_total for r in results]
    assert found.per_question["documents_scored"] == pytest.approx(shares)
    assert 0 < values["recall@1"].mean() < 1


@pytest.mark.parametrize("options", [{}, {"hybrid": True}, {"mode": "flat"}])
def test_a_calibrated_retriever_ends_every_question_as_the_evaluation_says(words, options) -> None:
    random = np.random.default_rng(1)  # in hybrid search two questions are then refused by their category alone
    vocabulary = [*COLOURS, *THINGS, "tram", "whale", "shark"]

    def questions(split: str) -> list:
        chosen = [" ".join(random.choice(vocabulary, size=random.integers(1, 5))) for _ in range(150)]
        ids = [{f"{c}-{t}" for c in COLOURS for t in THINGS if c in q and t in q} for q in chosen]
        return [asked(q, sorted(relevant), split=split) for q, relevant in zip(chosen, ids, strict=True)]

    data = dataset(questions("test"), questions("dev"), documents=MARKET)
    with KnowledgeBase.from_documents(MARKET, words) as base:
        found = evaluate(data, base, **options)
        retriever = TwoStageRetriever(base, k=10, **{"hybrid": False} | options)
        calibrate(base, data.split("dev"), retriever=retriever, keep=False)
        results = retriever.retrieve_many(texts(data.split("test")))
    assert {each.outcome for each in results} >= {Outcome.ANSWERED, Outcome.DOCUMENT_BELOW_THRESHOLD}
    ends = [
        each.hits[0].document.id in item.relevant if each else not item.answerable
        for each, item in zip(results, data.split("test"), strict=True)
    ]
    assert found.per_question["end_to_end"].tolist() == ends


def test_questions_that_the_model_does_not_read_keep_their_places(words) -> None:
    words.profile = dataclasses.replace(NO_PROMPTS, languages=("en",))
    documents = (
        *DOCUMENTS,
        Document(id="pin", text="重置密码", category="it"),
        Document(id="leave", text="请假流程", category="hr"),
    )
    questions = [asked("重置密码", ["pin"]), FOUR[0], asked("请假流程", ["pin"]), FOUR[2]]
    with KnowledgeBase.from_documents(documents, words) as base:
        found = evaluate(dataset(questions, documents=documents), base)
    assert found.per_question["recall@1"].tolist() == [1, 1, 0, 0]
    assert {row["question"]: row["got"] for row in found.result["worst"]} == {"请假流程": "leave", "red red": "a"}


def test_a_watcher_sees_every_question_once_with_its_own_search(words) -> None:
    words.profile = dataclasses.replace(NO_PROMPTS, languages=("en",))
    documents = (*DOCUMENTS, Document(id="pin", text="重置密码", category="it"))
    labelled = as_labelled([FOUR[3], asked("重置密码", ["pin"]), FOUR[0]])
    seen = []

    def watch(at, search, found) -> None:
        place = found.scored.places[found.order.argmax()]
        number = int(search.view.index.documents[place])
        seen.append((at, search.kind, search.view.documents([number])[number].id))

    with KnowledgeBase.from_documents(documents, words) as base:
        watched, plain = observe(base, labelled, watch=watch), observe(base, labelled)
    assert sorted(seen) == [(0, "hybrid", "l"), (1, "lexical", "pin"), (2, "hybrid", "a")]
    assert {kind: some.fused.tolist() for kind, some in watched.items()} == {k: s.fused.tolist() for k, s in plain.items()}


# -- learning, and leaving nothing behind -----------------------------------------------------------------------------

# Two categories write about the same topics, and nothing but a router can know that "car" asks for the manuals.
TOPICS = ["red", "green", "blue", "apple", "pear", "plum"]
PAPERS = tuple(
    Document(id=f"{kind[:-1]}-{topic}", text=f"{topic} {topic}{more}", category=kind)
    for kind, more in (("manuals", " tram"), ("letters", ""))
    for topic in TOPICS
)


def about(start: str, split: str) -> list:
    pairs = [(topic, *pair) for topic in TOPICS for pair in (("car", "manual"), ("bus", "letter"))]
    return [asked(f"{start} {sign} {topic}", [f"{kind}-{topic}"], f"{kind}s", split) for topic, sign, kind in pairs]


ROUTED = (about("a", "test"), about("my", "dev"), about("which", "dev"))


@pytest.fixture
def papers(words):
    with KnowledgeBase.from_documents(PAPERS, words) as base:
        yield base


def test_a_learned_router_is_fitted_on_the_other_split_and_measured_on_this_one(papers) -> None:
    data = dataset(*ROUTED, documents=PAPERS)
    plain = evaluate(data, papers, hybrid=True).result
    learned = evaluate(data, papers, hybrid=True, router="learned").result
    assert (plain["recall@1"], learned["recall@1"]) == (0.5, 1.0)
    assert any(note.startswith("fitted on 24 questions: lexical weight ") for note in learned["notes"])
    assert not any("fitted" in note for note in plain["notes"])


def test_too_few_labels_for_a_router_are_said_and_the_rest_goes_on(base) -> None:
    split = dataset(FOUR, SILENT, DEV)
    result = evaluate(split, base, router="learned").result
    assert result["notes"] == [
        "nothing was fitted: fitting needs 20 questions with an answer, in a language that the model reads, and got 8"
    ]
    assert result["end_to_end"] == evaluate(split, base).result["end_to_end"] == 0.5


def test_what_was_learned_before_plays_no_part_and_stays_in_the_folder(papers, words, tmp_path) -> None:
    data = dataset(*ROUTED, documents=PAPERS)
    fresh = evaluate(data, papers, hybrid=True)
    papers.save(tmp_path / "kb")
    papers.fit_router(about("my", "dev") + about("which", "dev"))
    again = evaluate(data, papers, hybrid=True)
    assert again.per_question["mrr@10"].tolist() == fresh.per_question["mrr@10"].tolist()
    with KnowledgeBase.open(tmp_path / "kb", words) as opened:
        assert opened.learned.ranking.router_weight > 0


@pytest.mark.parametrize("router", ["none", "learned"])
def test_afterwards_nothing_is_learned(papers, router, tmp_path, words) -> None:
    papers.save(tmp_path / "kb")
    silent = [asked(f"tram {i}", split=split) for i in range(9) for split in ("dev", "test")]
    result = evaluate(dataset(*ROUTED, silent, documents=PAPERS), papers, hybrid=True, router=router).result
    assert result["operating_point"] is not None
    assert papers.learned == Learned()
    with KnowledgeBase.open(tmp_path / "kb", words) as again:
        assert again.learned == Learned()


def test_nor_after_an_error(papers, monkeypatch) -> None:
    learned = []

    def fail(base, *_: object, **__: object) -> None:
        learned.append(base.learned)
        raise RuntimeError("the power went off")

    monkeypatch.setattr("gemma_rag.evaluation.observe", fail)
    with pytest.raises(RuntimeError, match="the power went off"):
        evaluate(dataset(*ROUTED, documents=PAPERS), papers, hybrid=True, router="learned")
    assert learned[0].ranking is not None
    assert papers.learned == Learned()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "magic"}, "mode is one of"),
        ({"router": "magic"}, "router one of"),
        ({"mode": "classic", "hybrid": True}, "classic is the published form"),
        ({"mode": "classic", "router": "learned"}, "classic is the published form"),
        ({"split": "train"}, "toy has no questions of the split 'train': it has 'dev', 'test'"),
    ],
)
def test_what_cannot_be_measured_is_refused(base, options, message) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(dataset(FOUR, DEV), base, **options)


# -- comparing --------------------------------------------------------------------------------------------------------


def test_two_ways_are_compared_question_by_question(base) -> None:
    data = dataset(FOUR)
    found = compare(evaluate(data, base, mode="flat"), evaluate(data, base))
    comparison = found.result["comparison"]
    assert (comparison["mode"], comparison["hybrid"], comparison["router"]) == ("two-stage", False, "none")
    assert found.result["mode"] == "flat"
    # one question of four differs, by 1: either sign is as large
    test = comparison["metrics"]["recall@10"]
    assert (test["first"], test["second"], test["difference"], test["p_value"]) == (0.75, 0.5, 0.25, 1.0)
    # all four differ, by a half: two of 16 signs are as large
    test = comparison["metrics"]["documents_scored"]
    assert (test["difference"], test["low"], test["high"], test["p_value"]) == (0.5, 0.5, 0.5, 0.125)
    assert "end_to_end" not in comparison["metrics"]
    assert found.to_json()["comparison"] == comparison


def test_only_what_both_have_is_compared(base) -> None:
    calibrated = evaluate(dataset(FOUR, SILENT, DEV), base, mode="flat")
    assert "end_to_end" in compare(calibrated, calibrated).result["comparison"]["metrics"]
    plain = evaluate(dataset(FOUR, SILENT), base, mode="flat")
    assert "end_to_end" not in compare(calibrated, plain).result["comparison"]["metrics"]
    silent = evaluate(dataset(SILENT), base)
    assert compare(silent, silent).result["comparison"]["metrics"].keys() == {"documents_scored"}


@pytest.mark.parametrize(
    ("other", "split", "what"),
    [
        (dataset(FOUR, DEV, name="other"), "test", "dataset"),
        (dataset(FOUR, DEV), "dev", "split"),
        (dataset(FOUR[1:], DEV), "test", "questions"),
    ],
)
def test_other_questions_are_not_compared(base, other, split, what) -> None:
    one, two = evaluate(dataset(FOUR, DEV), base), evaluate(other, base, split=split)
    with pytest.raises(InputError, match=f"only evaluations of the same questions compare, and the {what} differ"):
        compare(one, two)


# -- vectors that are kept --------------------------------------------------------------------------------------------


def counted(words, data, cache) -> tuple[list[str], dict]:
    """The texts that are embedded to measure a data set, and the numbers."""
    before = len(words.calls)
    with open_base(data, words, cache) as base:
        result = evaluate(data, base).result
    return [item.text for call in words.calls[before:] for item in call], result


def test_the_second_time_nothing_is_embedded(words, tmp_path) -> None:
    data = dataset(FOUR, SILENT, DEV)
    first, numbers = counted(words, data, tmp_path)
    assert sorted(first) == sorted(
        [*(d.text for d in DOCUMENTS), "apple", "red", "red", "Red?", "red red", "apple", "bus", "tram"]
    )
    second, again = counted(words, data, tmp_path)
    assert second == []
    assert again | {"seconds": 0} == numbers | {"seconds": 0}


def test_what_is_kept_gives_the_same_numbers_as_what_is_not(words, tmp_path) -> None:
    data = dataset(FOUR, SILENT, DEV)
    kept, plain = counted(words, data, tmp_path)[1], counted(words, data, None)[1]
    assert kept | {"seconds": 0} == plain | {"seconds": 0}


def test_a_new_question_is_all_that_is_embedded(words, tmp_path) -> None:
    counted(words, dataset(FOUR), tmp_path)
    assert counted(words, dataset(FOUR, SILENT), tmp_path)[0] == ["bus", "tram"]


@pytest.mark.parametrize(
    "changed",
    [
        DOCUMENTS[:-1],
        (*DOCUMENTS[:-1], DOCUMENTS[-1].model_copy(update={"id": "m"})),
        (*DOCUMENTS[:-1], DOCUMENTS[-1].model_copy(update={"text": "plum"})),
        (*DOCUMENTS[:-1], DOCUMENTS[-1].model_copy(update={"category": "tram"})),
    ],
    ids=["fewer", "id", "text", "category"],
)
def test_a_changed_corpus_never_shares_documents(words, tmp_path, changed) -> None:
    counted(words, dataset(FOUR[:1]), tmp_path)
    embedded, _ = counted(words, dataset(FOUR[:1], documents=changed), tmp_path)
    assert embedded[: len(changed)] == [document.text for document in changed]
    with open_base(dataset(documents=changed), words, tmp_path) as base:
        assert {d.id: d for d in base} == {d.id: d for d in changed}


def test_another_space_never_shares_anything(words, tmp_path) -> None:
    counted(words, dataset(FOUR), tmp_path)
    other = type(words)(["red", "apple"])
    embedded, result = counted(other, dataset(FOUR), tmp_path)
    assert {*texts(dataset(FOUR).questions), *(d.text for d in DOCUMENTS)} <= set(embedded)
    assert result["recall@10"] == 0.5
    assert counted(words, dataset(FOUR), tmp_path)[0] == []


def test_without_a_cache_nothing_is_written(words, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    first, _ = counted(words, dataset(FOUR), None)
    assert counted(words, dataset(FOUR), None)[0] == first != []
    assert list(tmp_path.iterdir()) == []


def test_the_default_cache_is_in_the_users_cache_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "gemma-rag"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache() == tmp_path / "home" / ".cache" / "gemma-rag"


def test_a_second_evaluation_embeds_nothing(words, tmp_path) -> None:
    data = dataset(FOUR, DEV)
    for calls in (True, False):
        words.calls.clear()
        with open_base(data, words, tmp_path) as base:
            evaluate(data, base, split="dev")
        assert bool(words.calls) is calls


def test_of_two_processes_that_build_the_same_cache_the_slower_takes_what_is_there(words, tmp_path, monkeypatch) -> None:
    save = KnowledgeBase.save

    def both(base, path) -> None:
        with KnowledgeBase.from_documents(list(base), words) as faster:
            save(faster, path)
        save(base, path)

    monkeypatch.setattr(KnowledgeBase, "save", both)
    data = dataset(FOUR, DEV)
    with open_base(data, words, tmp_path) as base:
        assert len(base) == len(data.documents)
