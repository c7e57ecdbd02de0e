"""The suite that every engine passes: a knowledge base behaves the same, wherever its vectors are kept."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4
from zlib import crc32

import numpy as np
import pytest

from gemma_rag import Category, Document, KnowledgeBase, TwoStageRetriever
from gemma_rag.chunking import Chunker
from gemma_rag.copying import MARK, Content, copy_knowledge_base
from gemma_rag.encoders import Input, Space
from gemma_rag.errors import InputError, KnowledgeBaseError, SpaceMismatch
from gemma_rag.prompts import NO_PROMPTS, Task
from gemma_rag.results import Outcome, Retrieval
from gemma_rag.storage import EngineAddress
from gemma_rag.vectors import Floats, unit

from .servers import why_not

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

KILLS = 6
ENGINES = ["folder", "memory", "milvus", "milvus-tcp", "chroma", "chroma-http"]
NEEDS = {"milvus": "milvus_lite", "milvus-tcp": "pymilvus", "chroma": "chromadb", "chroma-http": "chromadb"}
COLOURS = ["red", "green", "blue", "white", "black", "grey", "pink"]
THINGS = {
    "apple": "food/fruit",
    "pear": "food/fruit",
    "plum": "food/fruit",
    "leek": "food/vegetables",
    "car": "traffic",
    "bus": "traffic",
    "tram": "traffic",
    "desk": "office",
    "lamp": "office",
}
DESK = 'Ann\'s "desk"'
EVERYTHING = {"category_threshold": -1.0, "document_threshold": -1.0}
DENSE = {**EVERYTHING, "hybrid": False}


class WordVectors:
    """A direction for every word, at random and always the same; a text has the sum of those of its words."""

    profile = NO_PROMPTS
    space = Space(
        model="word vectors", weights="", prompts="", dimensions=24, max_tokens=64, overflow="truncate", runtime="",
        precision="float32",
    )  # fmt: skip

    def __init__(self) -> None:
        self.embedded = 0

    def encode(self, inputs: Sequence[Input]) -> Floats:
        self.embedded += len(inputs)
        rows = [sum(map(self.direction, f"{item.title or ''} {item.text}".lower().split())) for item in inputs]
        return unit(np.array(rows, dtype=np.float32).reshape(-1, 24))

    def direction(self, word: str) -> Floats:
        return np.random.default_rng(crc32(word.encode())).normal(size=24)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]


def pages() -> list[Document]:
    """70 documents, most of one chunk; one is long, one is Chinese, some are in further categories."""
    out = []
    for i, (colour, thing) in enumerate((colour, thing) for colour in COLOURS for thing in THINGS):
        text = f"The {colour} {thing} of page {i}. It is {colour}, and it is a {thing} of {COLOURS[i % 5]} {i * i}."
        also_in = ("office", "garden") if i % 10 == 0 and THINGS[thing] != "office" else ()
        metadata: dict[str, Any] = {"year": 2020 + i % 5, "tags": [colour, [thing]], "open": i % 2 == 0}
        if i % 3 == 0:
            metadata["owner"] = None if i % 2 else 'Ann\'s "desk"'
        title = f"{colour} {thing}" if i % 4 else ""
        out.append(
            Document(id=f"{colour}-{thing}", title=title, text=text, category=THINGS[thing], also_in=also_in, metadata=metadata)
        )
    long = " ".join(f"Sentence {i} speaks of the {COLOURS[i % 7]} lift and its {list(THINGS)[i % 9]}." for i in range(40))
    out.append(Document(id="long", title="The lift", text=f"\n {long}\t", category="office", metadata={"year": 2021.0}))
    out.append(Document(id="中文 'x' \\ 1", text="红色的苹果。\r\n第二行😀", category="水果/a b", metadata={"year": "2021"}))
    return out


PAGES = pages()
CATEGORIES = [
    Category(name="traffic", description="What drives", examples=("the red bus", "a tram")),
    Category(name="nobody", description="A category without documents"),
]
QUESTIONS = [
    "red apple",
    "the green bus of page 7",
    "blue lamp desk",
    "lift",
    "white tram 289",
    "pink leek",
    "grey pear plum",
    "红色的苹果。",
]

Make = Callable[..., KnowledgeBase]


class Places:
    """Where one engine keeps the knowledge bases of some tests; all that were opened are closed in the end."""

    def __init__(self, engine: str, folder: Path, request: pytest.FixtureRequest) -> None:
        self.engine, self.folder = engine, folder
        self.opened: list[KnowledgeBase] = []
        self._request = request
        need(engine)

    def address(self, engine: str | None = None) -> EngineAddress:
        """A new place."""
        engine = self.engine if engine is None else engine
        name = f"suite_{uuid4().hex}"
        if engine == "milvus":
            return EngineAddress(name="milvus", uri=str(self.folder / f"{name}.db"))
        if engine == "chroma":
            return EngineAddress(name="chroma", uri=str(self.folder / "chroma"), collection=name)
        if engine.endswith(("-tcp", "-http")):
            kind = engine.split("-")[0]
            return EngineAddress(name=kind, uri=self._request.getfixturevalue(f"{kind}_url"), collection=name)
        return EngineAddress()

    def make(self, documents: Sequence[Document] = (), categories: Sequence[Category] = ()) -> KnowledgeBase:
        """A new knowledge base."""
        encoder, chunker = WordVectors(), Chunker(max_tokens=48, overlap=0)
        if self.engine == "memory":
            base = KnowledgeBase.from_documents([], encoder, chunker=chunker)
        else:
            path = self.folder / uuid4().hex
            base = KnowledgeBase.create(path, encoder, chunker=chunker, engine=self.address())
        self.opened.append(base)
        base.add(documents, categories=categories)
        return base

    def again(self, base: KnowledgeBase) -> KnowledgeBase:
        """A second object for the same one."""
        if base.path is None:
            pytest.skip("a knowledge base in memory cannot be opened a second time")
        self.opened.append(KnowledgeBase.open(base.path, WordVectors()))
        return self.opened[-1]

    def close(self) -> None:
        for base in self.opened:
            base.close()


def need(engine: str) -> None:
    """Skip, aloud, where an engine cannot run."""
    if (module := NEEDS.get(engine)) and find_spec(module) is None:
        pytest.skip(f"{module} is not installed: the engine {engine} is not tested")
    if engine.endswith(("-tcp", "-http")) and (reason := why_not(engine.split("-")[0])):
        pytest.skip(reason)


@pytest.fixture(scope="module", params=ENGINES)
def places(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    places = Places(request.param, tmp_path_factory.mktemp(request.param), request)
    yield places
    places.close()


@pytest.fixture
def make(places: Places) -> Make:
    """Makes knowledge bases that a test may change."""
    return places.make


@pytest.fixture(scope="module")
def base(places: Places) -> KnowledgeBase:
    """One that came in several commits and was compacted; no test changes it."""
    base = places.make(PAGES[:40], CATEGORIES)
    base.add([PAGES[40], PAGES[3].model_copy(update={"id": "gone"})])
    base.add(PAGES[41:])
    base.delete(["gone"])
    base.compact()
    return base


@pytest.fixture(scope="module")
def plain() -> Iterator[KnowledgeBase]:
    """The same documents in memory, to compare with."""
    with KnowledgeBase.from_documents(
        PAGES, WordVectors(), categories=CATEGORIES, chunker=Chunker(max_tokens=48, overlap=0)
    ) as base:
        yield base


def ids(found: Retrieval) -> list[str]:
    return [hit.document.id for hit in found.hits]


def told(found: Retrieval) -> Any:
    """All that engines have to agree on."""
    return (
        found.outcome,
        [(hit.document, hit.passage, hit.headings) for hit in found.hits],
        [(category.name, category.kept, category.why) for category in found.categories],
        found.thresholds,
    )


def ask(base: KnowledgeBase, questions: Sequence[str] = QUESTIONS, /, **options: Any) -> list[Retrieval]:
    filters = {name: options.pop(name) for name in ("categories", "where") if name in options}
    return TwoStageRetriever(base, **{"k": 8, **DENSE, **options}).retrieve_many(questions, **filters)


def first(base: KnowledgeBase, question: str, **options: Any) -> Retrieval:
    return ask(base, [question], **options)[0]


def by_id(base: KnowledgeBase) -> dict[str, Document]:
    return {document.id: document for document in base}


# -- what is in it --------------------------------------------------------------------------------------------------


def test_it_counts_what_it_holds(base, plain) -> None:
    assert len(base) == len(PAGES) == 65
    assert (base.manifest.chunks, base.manifest.categories) == (plain.manifest.chunks, plain.manifest.categories)
    assert base.categories == plain.categories


def test_every_document_comes_back_as_it_was(base) -> None:
    assert by_id(base) == {page.id: page for page in PAGES}
    assert [base.get(page.id) for page in PAGES] == PAGES
    assert "long" in base
    assert "gone" not in base


def test_chunks_and_vectors_come_back_bit_by_bit(base, plain) -> None:
    wanted = {entry.document.id: entry for entry in plain.store.entries()}
    seen = set()
    for entry in base.store.entries():
        own = wanted[entry.document.id]
        assert list(entry.chunks) == list(own.chunks)
        assert entry.vectors.tobytes() == own.vectors.tobytes()
        seen.add(entry.document.id)
    assert seen == set(wanted)
    entry = base.store.get("long")
    assert entry.vectors.tobytes() == wanted["long"].vectors.tobytes()
    assert len(entry.chunks) > 3


def test_categories_keep_their_vectors(base, plain) -> None:
    for left, right in zip(base.store.stored_categories(), plain.store.stored_categories(), strict=True):
        assert left.category == right.category
        assert left.vectors.tobytes() == right.vectors.tobytes()


def test_an_empty_one_says_that_it_is(make) -> None:
    assert first(make(), "red apple").outcome is Outcome.EMPTY_KNOWLEDGE_BASE


# -- searching ------------------------------------------------------------------------------------------------------


def test_scores_are_the_cosines_of_numpy_in_their_order(base, plain) -> None:
    entries = list(plain.store.entries())
    queries = WordVectors().encode([Input(question, Task.QUERY) for question in QUESTIONS])
    for query, found in zip(queries, ask(base, mode="flat", k=60), strict=True):
        best = {entry.document.id: float((entry.vectors @ query).max()) for entry in entries}
        expected = sorted(best, key=lambda name: -best[name])[:60]
        assert ids(found) == expected
        assert [hit.score for hit in found.hits] == pytest.approx([best[name] for name in expected], abs=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k": 1},
        {"k": 70},
        {"mode": "flat"},
        {"max_categories": 1},
        {"max_categories": 2, "k": 20},
        {"categories": ["food"]},
        {"categories": ["food/fruit", "office"], "mode": "flat"},
        {"categories": ["garden"]},
        {"category_threshold": 0.3, "document_threshold": 0.5},
        {"document_threshold": 0.7, "k": 30},
        {"category_threshold": "dynamic", "document_threshold": "dynamic"},
        {"diversity": 0.4},
    ],
    ids=str,
)
def test_it_finds_what_one_in_memory_finds(base, plain, options) -> None:
    found, expected = ask(base, **options), ask(plain, **options)
    assert list(map(told, found)) == list(map(told, expected))
    for left, right in zip(found, expected, strict=True):
        assert [hit.score for hit in left.hits] == pytest.approx([hit.score for hit in right.hits], abs=2e-6)
        assert [item.score for item in left.categories] == pytest.approx([item.score for item in right.categories], abs=1e-4)


@pytest.mark.parametrize("mode", ["two-stage", "flat"])
def test_a_batch_finds_what_one_question_at_a_time_finds(base, mode) -> None:
    together = ask(base, mode=mode)
    alone = [first(base, question, mode=mode) for question in QUESTIONS]
    assert list(map(told, together)) == list(map(told, alone))


@pytest.mark.parametrize("category", ["food", "garden", "office", "traffic", "水果"])
def test_a_search_within_categories_finds_all_of_them_and_nothing_else(base, category) -> None:
    def belongs(page: Document) -> bool:
        return any(name == category or name.startswith(f"{category}/") for name in (page.category, *page.also_in))

    found = first(base, "red apple desk", categories=[category], k=70, mode="flat")
    assert sorted(ids(found)) == sorted(page.id for page in PAGES if belongs(page))


@pytest.mark.parametrize(
    ("where", "passes"),
    [
        ({"year": 2021}, lambda page: page.metadata.get("year") == 2021),
        ({"year": [2021.0, "2021"]}, lambda page: page.metadata.get("year") in (2021, "2021")),
        ({"year": "2021"}, lambda page: page.metadata.get("year") == "2021"),
        ({"tags": "red"}, lambda page: "red" in page.metadata.get("tags", [])),
        ({"tags": ["bus", "leek"]}, lambda page: page.metadata.get("tags", [0, [0]])[1][0] in ("bus", "leek")),
        ({"open": True}, lambda page: page.metadata.get("open") is True),
        ({"owner": None}, lambda page: page.metadata.get("owner", 0) is None),
        (
            {"owner": DESK, "year": [2020, 2021]},
            lambda page: page.metadata.get("owner") == DESK and page.metadata["year"] < 2022,
        ),
        ({"open": 1}, lambda page: False),
        ({"year": []}, lambda page: False),
        ({"nothing": "x"}, lambda page: False),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_where_finds_all_that_match_and_nothing_else(base, plain, where, passes) -> None:
    found = first(base, "red apple", where=where, mode="flat", k=70)
    expected = [page.id for page in PAGES if passes(page)]
    assert sorted(ids(found)) == sorted(expected)
    assert found.outcome is (Outcome.ANSWERED if expected else Outcome.FILTERED_OUT)
    assert list(map(told, ask(base, where=where))) == list(map(told, ask(plain, where=where)))


def test_where_and_categories_go_together(base, plain) -> None:
    options = {"where": {"year": [2021, 2022], "open": True}, "categories": ["food", "traffic"], "k": 70}
    assert list(map(told, ask(base, **options))) == list(map(told, ask(plain, **options)))


def test_a_document_is_found_once_though_it_is_in_several_categories(base) -> None:
    found = first(base, "The red apple of page 0.", k=70, mode="flat")
    assert len(ids(found)) == len(set(ids(found)))
    assert ids(found)[0] == "red-apple"


def test_what_falls_short_of_the_threshold_is_a_near_miss_with_its_margin(base) -> None:
    scores = [hit.score for hit in first(base, "blue tram", k=3).hits]
    threshold = (scores[0] + scores[1]) / 2
    found = first(base, "blue tram", k=3, document_threshold=threshold)
    assert [hit.score for hit in found.hits] == pytest.approx(scores[:1], abs=1e-6)
    margins = [miss.margin for miss in found.near_misses[:2]]
    assert margins == pytest.approx([threshold - score for score in scores[1:]], abs=1e-6)


def test_refusals_say_which_stage_refused(base) -> None:
    assert first(base, "zebra crossing", category_threshold=0.9).outcome is Outcome.CATEGORY_BELOW_THRESHOLD
    assert first(base, "zebra crossing", document_threshold=0.95).outcome is Outcome.DOCUMENT_BELOW_THRESHOLD
    assert first(base, "red apple", where={"year": 1789}).outcome is Outcome.FILTERED_OUT


def test_an_unknown_category_is_refused(base) -> None:
    with pytest.raises(InputError, match="no category 'nowhere'"):
        first(base, "red apple", categories=["nowhere"])


def test_words_help_where_vectors_do_not_tell(base) -> None:
    # 289 stands in one document alone, and is one word of many in its vector
    found = first(base, "what about 289", hybrid=True, lexical_weight=0.9, k=5)
    own = next(page.id for page in PAGES if " 289." in page.text)
    assert own in ids(found)
    hit = next(hit for hit in found.hits if hit.document.id == own)
    assert hit.lexical_score == max(hit.lexical_score or 0.0 for hit in found.hits) > 0


def test_hybrid_search_keeps_the_cosine_as_score(base, plain) -> None:
    scores = {hit.document.id: hit.score for hit in first(plain, "green bus", mode="flat", k=70).hits}
    for hit in first(base, "green bus", hybrid=True, k=20).hits:
        assert hit.score == pytest.approx(scores[hit.document.id], abs=2e-6)


def test_a_search_by_words_alone_finds_them_or_is_refused(base) -> None:
    if base.manifest.engine.name == "chroma":
        with pytest.raises(InputError, match="Chroma does not rank by words"):
            first(base, "289", mode="lexical")
        return
    found = first(base, "289", mode="lexical", category_threshold=None, document_threshold=None, k=3)
    assert " 289." in found.hits[0].document.text


# -- changing it ----------------------------------------------------------------------------------------------------


def test_adding_says_what_was_new_and_embeds_only_that(make) -> None:
    base = make(PAGES[:10])
    encoder = base.encoder
    before = encoder.embedded
    changed = PAGES[3].model_copy(update={"text": "The red leek is ripe."})
    moved = PAGES[4].model_copy(update={"category": "office", "metadata": {"year": 1}})
    changes = base.add([PAGES[2], changed, moved, PAGES[20]])
    assert (changes.added, changes.updated, changes.unchanged) == (1, 2, 1)
    assert encoder.embedded - before == 2
    assert len(base) == 11
    assert base.get(changed.id) == changed
    assert ids(first(base, "leek is ripe"))[0] == changed.id
    assert ids(first(base, "red car", where={"year": 1}, categories=["office"])) == [moved.id]


def test_a_changed_document_is_found_as_it_is_now_and_once(make) -> None:
    base = make(PAGES[:30])
    for version in range(3):
        base.add([PAGES[5].model_copy(update={"text": f"zebra number {version}"})])
        found = first(base, f"zebra number {version}", k=40, mode="flat")
        assert found.hits[0].document.text == f"zebra number {version}"
        assert len(ids(found)) == len(set(ids(found))) == 30


def test_a_document_that_lost_chunks_has_no_old_ones(make) -> None:
    base = make([PAGES[-2], *PAGES[:3]])
    base.add([PAGES[-2].model_copy(update={"text": "The lift is short."})])
    assert base.manifest.chunks == 4
    assert len(base.store.get("long").chunks) == 1
    found = first(base, "Sentence 3 speaks of the white lift", k=9)
    assert [hit.passage for hit in found.hits if hit.document.id == "long"] == ["The lift is short."]


def test_what_is_deleted_is_not_found(make) -> None:
    base = make(PAGES[:30])
    assert base.delete([page.id for page in PAGES[:29]]) == 29
    assert len(base) == 1
    assert [category.name for category in base.categories] == [PAGES[29].category]
    assert ids(first(base, PAGES[0].text, k=40)) == [PAGES[29].id]
    assert ids(first(base, PAGES[0].text, k=40, hybrid=True, mode="flat")) == [PAGES[29].id]


def test_what_was_deleted_can_come_back(make) -> None:
    base = make(PAGES[:6])
    base.delete([PAGES[1].id, PAGES[2].id])
    changes = base.add([PAGES[1]])
    assert changes.added == 1
    assert ids(first(base, PAGES[1].text))[0] == PAGES[1].id


def test_deleting_everything_leaves_an_empty_one(make) -> None:
    base = make(PAGES[:3])
    base.delete([page.id for page in PAGES[:3]])
    assert (len(base), base.manifest.chunks, base.categories) == (0, 0, ())
    assert first(base, "red apple").outcome is Outcome.EMPTY_KNOWLEDGE_BASE
    base.add(PAGES[:2])
    assert len(ids(first(base, "red apple"))) == 2


def test_an_unknown_id_is_refused_and_nothing_is_deleted(make) -> None:
    base = make(PAGES[:3])
    with pytest.raises(InputError, match="no documents 'nobody'"):
        base.delete([PAGES[0].id, "nobody"])
    assert len(base) == 3


def test_a_category_can_be_described_anew(make) -> None:
    base = make(PAGES[:9])
    base.add([], categories=[Category(name="traffic", description="Things on wheels")])
    assert {item.name: item.description for item in base.categories}["traffic"] == "Things on wheels"


def test_compacting_changes_nothing_that_is_found(make) -> None:
    base = make(PAGES[:30], CATEGORIES)
    base.add(PAGES[30:])
    base.delete([page.id for page in PAGES[:10]])
    before = ask(base, mode="flat")
    base.compact()
    assert list(map(told, ask(base, mode="flat"))) == list(map(told, before))
    assert len(base) == len(PAGES) - 10 == len(by_id(base))


# -- several objects, and crashes -----------------------------------------------------------------------------------


def test_it_is_there_when_it_is_opened_again(places, make) -> None:
    base = make(PAGES, CATEGORIES)
    base.store.attach({"note.txt": b"kept"})
    before = ask(base)
    again = places.again(base)
    base.close()
    assert list(map(told, ask(again))) == list(map(told, before))
    assert again.store.attachment("note.txt") == b"kept"
    assert again.manifest == base.manifest


def test_a_second_object_sees_a_change_when_it_refreshes(places, make) -> None:
    base = make(PAGES[:20])
    reader = places.again(base)
    assert not reader.refresh()
    base.add(PAGES[20:25])
    base.delete([PAGES[0].id])
    assert reader.refresh()
    assert len(reader) == 24
    assert list(map(told, ask(reader))) == list(map(told, ask(base)))
    reader.add(PAGES[25:30])
    assert base.refresh()
    assert by_id(base) == {page.id: page for page in PAGES[1:30]}


def test_another_encoder_is_refused(places, make) -> None:
    base = make(PAGES[:2])
    if base.path is None:
        pytest.skip("a knowledge base in memory is not opened")
    other = WordVectors()
    other.space = other.space.model_copy(update={"weights": "others"})
    with pytest.raises(SpaceMismatch, match="others"):
        KnowledgeBase.open(base.path, other)


def test_a_reader_beside_a_writer_sees_whole_commits(places, make) -> None:
    def version(number: int) -> list[Document]:
        return [
            page.model_copy(update={"text": f"{page.text} {number}", "metadata": {"version": number}}) for page in PAGES[:12]
        ]

    writer = make(version(0))
    reader = places.again(writer)
    seen, failed = [], []

    def read() -> None:
        try:
            while not seen or seen[-1] < 8:
                found = first(reader, "red apple", k=20, mode="flat")
                versions = {hit.document.metadata["version"] for hit in found.hits}
                assert (len(found.hits), len(versions)) == (12, 1), (len(found.hits), versions)
                seen.append(versions.pop())
                reader.refresh()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(1, 9):
        writer.add(version(number))
    thread.join(60)
    assert not thread.is_alive()
    assert not failed, failed[0]
    assert seen == sorted(seen)


class Killed(BaseException):
    """What a kill looks like from inside."""


def kill(*args: object, **kwargs: object) -> None:
    raise Killed


def committed(base: KnowledgeBase) -> tuple[dict[str, Document], list[Any]]:
    return by_id(base), [told(found) for found in ask(base, k=70)]


def changes(base: KnowledgeBase) -> list[Callable[[], object]]:
    replaced = [page.model_copy(update={"text": f"{page.text} New."}) for page in PAGES[3:8]]
    return [
        lambda: base.add([*replaced, *PAGES[20:30]]),
        lambda: base.delete([page.id for page in PAGES[:4]]),
        base.compact,
    ]


@pytest.mark.parametrize("change", [0, 1, 2], ids=["add", "delete", "compact"])
def test_a_writer_killed_before_it_commits_leaves_what_was(places, make, monkeypatch, change) -> None:
    base = make(PAGES[:20], CATEGORIES)
    if base.path is None:
        pytest.skip("what is in memory dies with its process")
    before = committed(base)
    module = "store" if base.manifest.engine.name == "faiss" else "remote"
    with monkeypatch.context() as patch:
        patch.setattr(f"gemma_rag.storage.{module}.write_manifest", kill)
        with pytest.raises(Killed):
            changes(base)[change]()
    base.close()
    again = places.again(base)
    assert committed(again) == before
    again.add([PAGES[50]])
    assert by_id(again) == before[0] | {PAGES[50].id: PAGES[50]}
    assert_clean(again)


@pytest.mark.parametrize("change", [0, 1, 2], ids=["add", "delete", "compact"])
def test_a_writer_killed_while_it_tidies_up_leaves_what_it_committed(places, make, monkeypatch, change) -> None:
    base, wanted = make(PAGES[:20], CATEGORIES), make(PAGES[:20], CATEGORIES)
    if base.manifest.engine.name == "faiss":
        pytest.skip("the rows of an embedded engine need no tidying up: tests/test_crash.py")
    changes(wanted)[change]()
    with monkeypatch.context() as patch:
        patch.setattr(base.store, "_finish", kill)
        with pytest.raises(Killed):
            changes(base)[change]()
    base.close()
    again = places.again(base)
    assert committed(again) == committed(wanted)
    again.add([PAGES[50]])
    assert_clean(again)


def assert_clean(base: KnowledgeBase) -> None:
    """Nothing is left on the server that the newest generation does not have."""
    if base.manifest.engine.name != "faiss":
        assert base.store.engine.count() == sum(len(entry.chunks) for entry in base.store.entries()) == base.manifest.chunks
        assert base.manifest.pending == []


def test_a_commit_that_the_engine_refuses_changes_nothing(make, monkeypatch) -> None:
    base = make(PAGES[:10])
    if base.manifest.engine.name == "faiss":
        pytest.skip("there is no server to fail")
    before = committed(base)

    def refuse(rows: object) -> None:
        raise KnowledgeBaseError("the disk of the server is full")

    with monkeypatch.context() as patch:
        patch.setattr(base.store.engine, "add", refuse)
        with pytest.raises(KnowledgeBaseError, match="is full"):
            base.add(PAGES[10:20])
    assert committed(base) == before
    base.add(PAGES[10:20])
    assert len(base) == 20


# -- copying --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["folder", "milvus", "milvus-tcp", "chroma", "chroma-http"])
def test_copied_to_another_engine_and_back_it_is_the_same(places, base, plain, tmp_path, target) -> None:
    need(target)
    out = tmp_path / "there"
    report = copy_knowledge_base(base, out, places.address(target), batch=30)
    assert (report.documents, report.copied) == (65, 65)
    with KnowledgeBase.open(out, WordVectors()) as copy:
        assert copy.manifest.engine.name == target.split("-")[0].replace("folder", "faiss")
        assert Content.of(copy.store) == Content.of(plain.store)
        assert list(map(told, ask(copy))) == list(map(told, ask(plain)))
        copy_knowledge_base(copy, tmp_path / "back")
    with KnowledgeBase.open(tmp_path / "back", WordVectors()) as back:
        assert Content.of(back.store) == Content.of(plain.store)
        assert list(map(told, ask(back))) == list(map(told, ask(plain)))


def test_a_copy_that_was_stopped_goes_on_where_it_was(places, plain, tmp_path) -> None:
    if places.engine == "memory":
        pytest.skip("a copy is always kept somewhere")
    address = places.address()

    def stop(done: int, total: int) -> None:
        if done >= 40:
            raise Killed

    with pytest.raises(Killed):
        copy_knowledge_base(plain, tmp_path / "copy", address, batch=10, progress=stop)
    report = copy_knowledge_base(plain, tmp_path / "copy", address, batch=10)
    assert report.copied == 25
    with KnowledgeBase.open(tmp_path / "copy", WordVectors()) as copy:
        assert Content.of(copy.store) == Content.of(plain.store)
        assert_clean(copy)


COPY = """
import sys
from pathlib import Path
from gemma_rag.copying import copy_knowledge_base
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.storage import EngineAddress

source, out, name, uri = sys.argv[1:]
if name != "faiss":
    from gemma_rag.index import remote, chroma, milvus
    import chromadb, pymilvus
with KnowledgeBase.open(source) as base:
    print("ready", flush=True)
    copy_knowledge_base(base, out, EngineAddress(name=name, uri=uri or None), batch=3)
"""


@pytest.mark.slow
def test_a_copy_killed_at_any_moment_is_readable_and_goes_on(places, plain, tmp_path) -> None:
    if places.engine == "memory":
        pytest.skip("a copy is always kept somewhere")
    address, chance = places.address().model_copy(update={"collection": None}), random.Random(places.engine)
    copy_knowledge_base(plain, tmp_path / "source")
    command = [sys.executable, "-c", COPY, str(tmp_path / "source"), str(tmp_path / "copy"), address.name, address.uri or ""]
    with KnowledgeBase.open(tmp_path / "source") as source:
        documents, content = by_id(source), Content.of(source.store)
        for kill in range(KILLS):
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
                assert process.stdout.readline() == "ready\n", process.stderr.read()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(chance.uniform(0.0, 0.2 + 0.2 * kill))
                process.kill()
            assert Content.of(source.store) == content
            if (tmp_path / "copy").exists():
                with KnowledgeBase.open(tmp_path / "copy", WordVectors()) as copy:
                    assert by_id(copy).items() <= documents.items()
                    assert len(by_id(copy)) == len(copy)
                    assert all(len(ids(found)) == min(8, len(copy)) for found in ask(copy, mode="flat"))
                    if copy.store.attachment(MARK) is None:
                        break
        else:
            copy_knowledge_base(source, tmp_path / "copy", address, batch=10)
    with KnowledgeBase.open(tmp_path / "copy", WordVectors()) as copy:
        assert Content.of(copy.store) == content
        assert_clean(copy)
