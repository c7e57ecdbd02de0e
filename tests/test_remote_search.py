from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_rag import KnowledgeBase, TwoStageRetriever
from gemma_rag.chunking import Chunker
from gemma_rag.encoders import Input
from gemma_rag.errors import InputError
from gemma_rag.lexical import LexicalIndex
from gemma_rag.remote_view import RemoteView, RemoteWords
from gemma_rag.results import Outcome, Retrieval
from gemma_rag.storage import EngineAddress, remote
from gemma_rag.storage.catalogue import Words
from gemma_rag.vectors import Floats, unit

from .storage.memory_engine import MemoryEngine

ADDRESS = EngineAddress(name="milvus", uri="http://127.0.0.1:1", collection="c")
OPEN = {"category_threshold": -1.0, "document_threshold": -1.0}
FRUIT = ["red apple", "green apple pear", "green pear", "plum plum red", "blue plum"]
TRAFFIC = ["red car bus", "blue tram", "bus bus tram", "green car"]
DOCUMENTS = [
    *({"id": f"f{i}", "text": text, "category": "fruit", "metadata": {"year": 2020 + i}} for i, text in enumerate(FRUIT)),
    *({"id": f"t{i}", "text": text, "category": "traffic/road", "metadata": {"tag": ["x"]}} for i, text in enumerate(TRAFFIC)),
    {"id": "both", "text": "red plum car", "category": "traffic", "also_in": ["fruit"], "metadata": {"year": 2020}},
]
QUESTIONS = ["red apple bus", "green", "blue tram plum", "car", "nothing known"]


class NoTies:
    """Texts as sums of random vectors, one for each word, weighted by its place: no two cosines are equal."""

    def __init__(self, words: Any) -> None:
        self.profile, self.space, self.count_tokens = words.profile, words.space, words.count_tokens

    def encode(self, inputs: Sequence[Input]) -> Floats:
        rows = np.zeros((len(inputs), self.space.dimensions), dtype=np.float32)
        for row, item in zip(rows, inputs, strict=True):
            for place, word in enumerate(re.findall(r"\w+", f"{item.title or ''} {item.text}".lower())):
                row += np.random.default_rng(list(word.encode())).normal(size=len(row)) / (1.0 + 0.1 * place)
        return unit(rows) if len(rows) else rows


@pytest.fixture
def encoder(words) -> NoTies:
    return NoTies(words)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> MemoryEngine:
    engine = MemoryEngine()
    monkeypatch.setattr(remote, "open_engine", lambda *address, create=False: engine)
    return engine


@pytest.fixture
def base(engine: MemoryEngine, encoder: NoTies, tmp_path: Path) -> KnowledgeBase:
    made = KnowledgeBase.create(tmp_path / "kb", encoder, engine=ADDRESS)
    made.add(DOCUMENTS)
    return made


@pytest.fixture
def local(encoder: NoTies) -> KnowledgeBase:
    """The same documents in the embedded engine."""
    return KnowledgeBase.from_documents(DOCUMENTS, encoder)


def asked(base: KnowledgeBase, question: str = "red apple bus", **options: object) -> Retrieval:
    return TwoStageRetriever(base).retrieve(question, **{**OPEN, **options})  # type: ignore[arg-type]


def shown(found: Retrieval) -> object:
    """What a reader sees of a result, apart from notes and times."""
    hits = [(hit.document, round(hit.score, 5), hit.passage, f"{hit.category_score:.5f}") for hit in found.hits]
    categories = [(each.name, round(each.score, 5), each.kept, each.why) for each in found.categories]
    return found.outcome, hits, categories, found.documents_total, found.thresholds


OPTIONS = [
    {},
    {"k": 2},
    {"mode": "flat"},
    {"mode": "flat", "categories": ["fruit"]},
    {"categories": ["traffic"]},
    {"max_categories": 1},
    {"where": {"year": [2020, 2021]}},
    {"where": {"tag": "x"}, "mode": "flat"},
    {"where": {"year": 1999}},
    {"where": {"tag": "x"}, "categories": ["fruit"]},
    {"document_threshold": 0.5},
    {"category_threshold": 0.9},
    {"category_threshold": 0.9, "document_threshold": "dynamic"},
    {"diversity": 0.7, "k": 3},
    {"reranker": lambda question, passages: [len(passage) for passage in passages]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options))
@pytest.mark.parametrize("question", QUESTIONS)
def test_vectors_find_what_they_find_in_the_embedded_engine(base, local, question, options) -> None:
    options = {"hybrid": False, **options}
    assert shown(asked(base, question, **options)) == shown(asked(local, question, **options))


def test_a_batch_finds_what_each_question_finds_alone(base) -> None:
    retriever = TwoStageRetriever(base, hybrid=False)
    together = retriever.retrieve_many(QUESTIONS, **OPEN)
    assert [shown(each) for each in together] == [shown(asked(base, question, hybrid=False)) for question in QUESTIONS]


@pytest.mark.parametrize("question", QUESTIONS[:4])
def test_words_alone_find_what_they_find_in_the_embedded_engine(base, local, question) -> None:
    for options in ({}, {"categories": ["fruit"]}, {"max_categories": 1}, {"where": {"tag": "x"}}):
        assert shown(asked(base, question, mode="lexical", **options)) == shown(
            asked(local, question, mode="lexical", **options)
        )


def test_hybrid_fuses_the_ranks_and_says_so(base) -> None:
    found = asked(base, "red apple", k=3)
    assert found.notes == ("hits are ordered by the ranks of cosine and BM25 of Milvus, fused (reciprocal rank fusion)",)
    first = found.hits[0]
    assert (first.document.id, first.fused_score) == ("f0", pytest.approx(1.0))  # first in both
    assert all(0.0 < hit.fused_score < 1.0 for hit in found.hits[1:])


def test_lexical_scores_are_those_of_the_embedded_engine(base, local) -> None:
    ours = {hit.document.id: hit.lexical_score for hit in asked(base, "red apple", k=9).hits}
    theirs = {hit.document.id: hit.lexical_score for hit in asked(local, "red apple", k=9).hits}
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_what_only_words_find_has_its_cosine(base, engine, local) -> None:
    engine.search = lambda queries, *rest: [[] for _ in queries]  # type: ignore[method-assign]
    hits = {hit.document.id: hit.score for hit in asked(base, "red apple", k=9).hits}
    assert set(hits) == {"f0", "f1", "f3", "t0", "both"}
    cosines = {hit.document.id: hit.score for hit in asked(local, "red apple", k=9, hybrid=False).hits}
    assert hits == pytest.approx({name: cosines[name] for name in hits}, abs=1e-5)


def test_without_words_on_the_server_those_of_the_candidates_order(base, engine, local) -> None:
    engine.has_words = False
    found = asked(base, "red apple", k=4)
    assert [note.split(":")[0] for note in found.notes] == ["Milvus does not rank by words"]
    assert [hit.document.id for hit in found.hits] == [hit.document.id for hit in asked(local, "red apple", k=4).hits]
    assert "words" not in engine.calls
    with pytest.raises(InputError, match="no mode 'lexical' on it"):
        asked(base, mode="lexical")


def test_ten_times_as_many_rows_are_asked_for_as_there_are_hits(base, engine) -> None:
    asked(base, k=3, hybrid=False)
    asked(base, k=20, hybrid=False)
    assert set(engine.asked) == {50, 200}


def test_more_are_asked_for_where_what_came_is_not_meant(base, engine, monkeypatch) -> None:
    monkeypatch.setattr("gemma_rag.remote_search._FEWEST", 2)
    monkeypatch.setattr("gemma_rag.remote_search._TIMES", 1)
    monkeypatch.setattr("gemma_rag.search._FEWEST", 1)
    search = engine.search
    engine.search = lambda queries, within, n, where, g: search(queries, within, n, None, g)  # type: ignore[method-assign]
    found = asked(base, "blue tram", k=1, hybrid=False, mode="flat", where={"year": 2021})
    assert [hit.document.id for hit in found.hits] == ["f1"]
    assert engine.asked == [4, 16]


def test_the_categories_that_have_such_metadata_are_chosen_from_unless_there_are_too_many(base, monkeypatch) -> None:
    narrow = asked(base, "bus", where={"year": 2021}, hybrid=False)
    assert [each.name for each in narrow.categories] == ["fruit"]
    monkeypatch.setattr("gemma_rag.remote_search._HOMES", 0)
    wide = asked(base, "bus", where={"year": 2021}, hybrid=False)
    assert len(wide.categories) == 3
    assert [hit.document.id for hit in wide.hits] == [hit.document.id for hit in narrow.hits] == ["f1"]


def test_long_documents_come_whole_with_their_best_passage(engine, words, tmp_path) -> None:
    text = "green pear. " * 12 + "red apple. " * 8 + "blue bus. " * 12
    made = KnowledgeBase.create(tmp_path / "long", words, chunker=Chunker(max_tokens=16, overlap=2), engine=ADDRESS)
    made.add([{"id": "long", "text": text, "category": "c"}, {"id": "short", "text": "tram", "category": "c"}])
    assert made.manifest.chunks > 3
    found = asked(made, "red apple", hybrid=False)
    assert found.hits[0].document.text == text
    assert "red apple" in found.hits[0].passage
    assert asked(made, "red apple", mode="lexical").hits[0].document.text == text
    assert len(asked(made, "red apple", diversity=0.5).hits) == 2


def test_a_second_object_sees_changes_with_its_next_question(base, encoder, tmp_path) -> None:
    reader = KnowledgeBase.open(tmp_path / "kb", encoder)
    assert asked(reader, "tram").hits
    base.delete(["t1", "t2"])
    base.add([{"id": "new", "text": "tram tram", "category": "new"}])
    found = asked(reader, "tram")
    assert found.hits[0].document.id == "new"
    assert not {"t1", "t2"} & {hit.document.id for hit in found.hits}


def test_a_search_that_a_writer_disturbs_is_begun_anew(base, engine, encoder, tmp_path) -> None:
    reader, search, left = KnowledgeBase.open(tmp_path / "kb", encoder), engine.search, [1]

    def disturbed(*arguments: object) -> object:
        if left[0]:
            left[0] -= 1
            base.add([{"id": "t1", "text": f"blue tram {left[0]}", "category": "traffic/road"}])
        return search(*arguments)

    engine.search = disturbed  # type: ignore[method-assign]
    found = asked(reader, "blue tram", hybrid=False)
    assert (found.hits[0].document.text, found.notes) == ("blue tram 0", ())
    left[0] = 9
    notes = asked(reader, "blue tram", hybrid=False).notes
    assert notes == ("another process was writing during the search: documents that it replaced may be missing",)


def test_an_empty_base_says_so(engine, words, tmp_path) -> None:
    made = KnowledgeBase.create(tmp_path / "empty", words, engine=ADDRESS)
    assert asked(made).outcome is Outcome.EMPTY_KNOWLEDGE_BASE
    assert made.categories == ()


def test_counts_and_categories_are_told_without_a_search(base, local, engine) -> None:
    assert base.categories == local.categories
    assert (len(base), "f0" in base, "zz" in base, base.get("both")) == (10, True, False, local.get("both"))


def test_what_needs_every_vector_is_refused_with_a_way_out(base) -> None:
    view = base.view()
    assert isinstance(view, RemoteView)
    with pytest.raises(InputError, match="copy the knowledge base into a folder with `gemma-rag copy`"):
        view.rows  # noqa: B018
    with pytest.raises(InputError, match="fitting reads all of them"):
        base.fit_router([{"question": "red", "relevant": ["f0"]}])
    with pytest.raises(InputError, match="the database filters by it"):
        view.metadata  # noqa: B018


def test_word_weights_and_scores_are_those_of_an_index_of_all_texts() -> None:
    texts = ["red apple", "green apple pear apple", "", "天气很好", "red red running"]
    whole, words = LexicalIndex.of_texts(texts), RemoteWords(Words.of_texts(texts))
    for question in ("red apple", "run", "天气", "nothing", "apple apple red"):
        np.testing.assert_allclose(words.scores_of(question, texts), whole.scores(question), atol=1e-6)
        np.testing.assert_allclose(words.coverage(question, texts), whole.coverage(question, texts), atol=1e-6)
    assert words.scores_of("?", texts).tolist() == [0.0] * 5


def test_it_can_be_calibrated_where_it_is(base, engine) -> None:
    labelled = [{"question": item["text"], "relevant": [item["id"]]} for item in DOCUMENTS] * 6
    labelled += [{"question": f"nothing of it {i}", "relevant": []} for i in range(60)]
    base.calibrate([{**item, "question": f"{item['question']} {i}"} for i, item in enumerate(labelled)])
    found = TwoStageRetriever(base).retrieve("red apple")
    assert found.thresholds["acts_on"] == "evidence"
    assert all(hit.evidence is not None for hit in found.hits)
