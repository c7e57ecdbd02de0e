from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_rag.documents import Category, Chunk, Document
from gemma_rag.encoders.base import Space
from gemma_rag.errors import InputError, KnowledgeBaseError
from gemma_rag.lexical import LexicalIndex
from gemma_rag.storage import EngineAddress, Entry, StoredCategory, catalogue, remote
from gemma_rag.storage.catalogue import Record, Words
from gemma_rag.storage.manifest import read_manifest, write_manifest
from gemma_rag.storage.remote import RemoteStore
from gemma_rag.summaries import summarize
from gemma_rag.vectors import Floats, unit

from .memory_engine import Killed, MemoryEngine

SIZE = 6
SPACE = Space(
    model="m", weights="w", prompts="p", dimensions=SIZE, max_tokens=9, overflow="truncate", runtime="t", precision="float32"
)
ADDRESS = EngineAddress(name="milvus", uri="http://127.0.0.1:1", collection="c")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> MemoryEngine:
    """The database that every store of the test is in."""
    engine = MemoryEngine()
    monkeypatch.setattr(remote, "open_engine", lambda *address, create=False: engine)
    return engine


@pytest.fixture
def store(engine: MemoryEngine, tmp_path: Path) -> RemoteStore:
    return RemoteStore.create(tmp_path / "kb", ADDRESS, SPACE, {"model": "m"}, {"max_tokens": 9})


def vectors(count: int, seed: int = 0) -> Floats:
    return unit(np.random.default_rng(seed).normal(size=(count, SIZE)).astype(np.float32))


def entry(name: str, text: str = "red apple", chunks: int = 1, seed: int = 0, **fields: object) -> Entry:
    document = Document.model_validate({"id": name, "text": text, "category": "it", **fields})
    step = len(text) // chunks
    places = [Chunk(start=i * step, end=(i + 1) * step, headings=(f"h{i}",)) for i in range(chunks)]
    return Entry(document, places, vectors(chunks, seed))


def category(name: str, seed: int = 0, **fields: object) -> StoredCategory:
    described = Category.model_validate({"name": name, **fields})
    return StoredCategory(described, vectors(1 + len(described.examples), seed))


def filled(store: RemoteStore) -> RemoteStore:
    store.commit(
        [entry("a", "one two three four", 3), entry("b", seed=1, category="hr", also_in=("it",))],
        categories=[category("it"), category("hr", 1, description="People", examples=("Who?",))],
    )
    return store


def same(left: Entry | None, right: Entry) -> bool:
    return (
        left is not None
        and (left.document, list(left.chunks)) == (right.document, list(right.chunks))
        and np.array_equal(left.vectors, right.vectors)
    )


# -- making and opening ---------------------------------------------------------------------------------------------


def test_a_folder_has_the_manifest_and_no_vectors(store, tmp_path) -> None:
    filled(store)
    assert sorted(file.name for file in (tmp_path / "kb").iterdir()) == ["lock", "manifest.json"]
    assert json.loads((tmp_path / "kb" / "manifest.json").read_text())["engine"] == ADDRESS.model_dump()


def test_the_path_of_an_embedded_database_is_kept_whole_and_a_collection_gets_a_name(engine, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    address = EngineAddress(name="milvus", uri="lite.db")
    made = RemoteStore.create(Path("kb"), address, SPACE, {}, {})
    assert made.manifest.engine.uri == str(tmp_path / "lite.db")
    assert made.manifest.engine.collection == f"gemma_rag_{made.manifest.identity}"


def test_a_folder_that_is_there_is_refused_before_the_database_is_touched(store, engine, tmp_path) -> None:
    engine.calls.clear()
    with pytest.raises(InputError, match="kb exists already"):
        RemoteStore.create(tmp_path / "kb", ADDRESS, SPACE, {}, {})
    assert engine.calls == []


def test_a_folder_that_cannot_be_made_leaves_no_collection(engine, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KnowledgeBaseError, match="cannot be written"):
        RemoteStore.create(tmp_path / "file" / "kb", ADDRESS, SPACE, {}, {})
    assert engine.calls == ["close"]


def test_it_is_the_same_when_it_is_opened_again(store, tmp_path) -> None:
    filled(store)
    again = RemoteStore.open(tmp_path / "kb")
    assert again.manifest == store.manifest
    assert same(again.get("a"), entry("a", "one two three four", 3))
    assert again.get("nobody") is None
    assert again.hashes(["a", "b", "c"]) == {name: again.get(name).document.content_hash for name in ("a", "b")}
    assert [item.category for item in again.stored_categories()] == [
        Category(name="hr", description="People", examples=("Who?",)),
        Category(name="it"),
    ]
    np.testing.assert_array_equal(again.stored_categories()[0].vectors, vectors(2, 1))


# -- changing -------------------------------------------------------------------------------------------------------


def test_counts_follow_every_change(store, engine) -> None:
    filled(store)
    assert (store.manifest.documents, store.manifest.chunks, store.manifest.categories) == (2, 4, 2)
    assert store.counts() == {"hr": 1, "it": 2}
    store.commit([entry("a", seed=3), entry("c", seed=4)], ["b", "nobody"])
    assert (store.manifest.documents, store.manifest.chunks, store.manifest.categories) == (2, 2, 1)
    assert (store.counts(), engine.count(), store.manifest.pending) == ({"it": 2}, 2, [])
    assert [item.category.name for item in store.stored_categories()] == ["hr", "it"]


def test_a_base_that_grew_and_shrank_has_the_checksum_of_one_made_at_once(store, engine, tmp_path) -> None:
    filled(store).commit([entry("c", seed=9)], ["a"])
    store.commit([entry("a", "one two three four", 3)], ["c"])
    other = filled(RemoteStore.create(tmp_path / "other", ADDRESS, SPACE, {}, {}))
    assert store.manifest.content_sha256 == other.manifest.content_sha256
    other.commit([], ["a", "b"])
    other.commit(categories=[category("it", 5)])
    assert other.manifest.content_sha256 != store.manifest.content_sha256


def test_everything_is_streamed_once(store) -> None:
    filled(store).commit([entry("a", "new text", 2, seed=5)])
    found = {each.document.id: each for each in store.entries()}
    assert set(found) == {"a", "b"}
    assert same(found["a"], entry("a", "new text", 2, seed=5))
    assert sorted(document.id for document in store.all_documents()) == ["a", "b"]


def test_a_category_without_vectors_is_refused_and_nothing_is_written(store, engine) -> None:
    with pytest.raises(InputError, match="categories 'it' are new and came without vectors"):
        store.commit([entry("a")])
    assert (engine.count(), store.manifest.generation) == (0, 0)


def test_chunks_and_vectors_must_be_as_many(store) -> None:
    with pytest.raises(InputError, match="came with 1 chunks and 2 vectors"):
        store.commit([entry("a")._replace(vectors=vectors(2))], categories=[category("it")])


def test_chunks_are_kept_in_the_order_of_the_text(store) -> None:
    document, chunks, rows = entry("a", "one two three four", 3)
    store.commit([Entry(document, chunks[::-1], rows[::-1])], categories=[category("it")])
    assert same(store.get("a"), Entry(document, chunks, rows))


def test_attachments_stay_in_the_folder(store, engine, tmp_path) -> None:
    filled(store).attach({"x.json": b"1", "y.json": b"2"})
    store.attach({"x.json": b"3", "y.json": None})
    again = RemoteStore.open(tmp_path / "kb")
    assert (again.attachment("x.json"), again.attachment("y.json"), again.counts()) == (b"3", None, {"hr": 1, "it": 2})
    assert len(list((tmp_path / "kb").glob("attached-*"))) == 1
    next((tmp_path / "kb").glob("attached-*")).write_bytes(b"4")
    with pytest.raises(KnowledgeBaseError, match="is damaged: its checksum is wrong"):
        again.attachment("x.json")


# -- several processes ----------------------------------------------------------------------------------------------


def test_a_reader_moves_on_by_refresh(store, tmp_path) -> None:
    reader = RemoteStore.open(tmp_path / "kb")
    assert (list(reader.entries()), reader.refresh()) == ([], False)
    filled(store)
    assert reader.hashes(["a"]) == {}
    assert reader.refresh()
    assert reader.counts() == {"hr": 1, "it": 2}
    assert not reader.refresh()


def test_a_writer_starts_from_what_another_one_committed(store, tmp_path) -> None:
    other = RemoteStore.open(tmp_path / "kb")
    filled(store)
    other.commit([entry("c", seed=2)])
    store.commit([], ["a"])
    assert (store.manifest.documents, store.counts()) == (2, {"hr": 1, "it": 2})


def test_a_reader_whose_records_are_gone_says_so(store, tmp_path) -> None:
    filled(store)
    reader = RemoteStore.open(tmp_path / "kb")
    store.commit([entry("a", seed=8)])
    with pytest.raises(KnowledgeBaseError, match="another process has written since it was opened"):
        reader.counts()
    reader.refresh()
    assert reader.counts() == {"hr": 1, "it": 2}


def test_a_folder_that_was_replaced_is_noticed(store, tmp_path) -> None:
    write_manifest(tmp_path / "kb", store.manifest.model_copy(update={"identity": "another"}))
    with pytest.raises(KnowledgeBaseError, match="was replaced by another knowledge base"):
        store.refresh()


def test_a_document_that_lost_a_row_is_said_to_be_damaged(store, engine) -> None:
    filled(store)
    engine.kept = {key: row for key, row in engine.kept.items() if row.place != 1}
    with pytest.raises(KnowledgeBaseError, match="document 'a' is damaged in the database: 2 of its 3 rows are there"):
        store.get("a")
    with pytest.raises(KnowledgeBaseError, match="no longer has 'a'"):
        list(store.entries())


def changes(store: RemoteStore) -> None:
    """A commit with something of everything."""
    new = [entry("a", "five six", 2, seed=7), entry("c", seed=8, category="new")]
    store.commit(new, ["b"], categories=[category("new", 9)])


def state(store: RemoteStore) -> object:
    return (
        sorted((each.document.id, each.document.text, each.vectors.tobytes()) for each in store.entries()),
        store.counts(),
        store.hashes(["a", "b", "c"]),
        [item.category.name for item in store.stored_categories()],
        store.manifest.documents,
        store.words().frequencies.tolist(),
    )


@pytest.mark.parametrize("small", [0, 2_000])
def test_a_writer_killed_at_any_moment_leaves_the_old_state_or_the_new_one(monkeypatch, tmp_path, small) -> None:
    monkeypatch.setattr(remote, "_SMALL", small)

    def start(folder: Path) -> tuple[MemoryEngine, RemoteStore]:
        engine = MemoryEngine()
        monkeypatch.setattr(remote, "open_engine", lambda *address, create=False: engine)
        return engine, filled(RemoteStore.create(folder, ADDRESS, SPACE, {}, {}))

    engine, store = start(tmp_path / "whole")
    before = state(store)
    engine.calls.clear()
    changes(store)
    after, writes = state(store), len([name for name in engine.calls if name not in ("rows", "search")])
    assert before != after
    seen = set()
    for left in range(writes):
        engine, store = start(tmp_path / str(left))
        engine.left = left
        with pytest.raises(Killed):
            changes(store)
        engine.left = None
        found = RemoteStore.open(tmp_path / str(left))
        assert state(found) in (before, after), left
        is_new = state(found) == after
        seen.add(is_new)
        found.commit([], ["nobody"])  # the next writer finishes or undoes
        assert state(found) == (after if is_new else before), left
        assert engine.count() == found.manifest.chunks, left
        assert len(engine.records()) == len(found._known()), left
        changes(found)
        assert state(RemoteStore.open(tmp_path / str(left))) == after
    assert seen == {False, True}


def test_rows_of_what_is_pending_are_hidden_until_they_are_gone(store, engine, tmp_path) -> None:
    filled(store)
    old = dict(engine.kept)
    changes(store)
    engine.kept |= old
    write_manifest(tmp_path / "kb", store.manifest.model_copy(update={"pending": ["a", "b"]}))
    reader = RemoteStore.open(tmp_path / "kb")
    assert set(reader.hashes(["a", "b", "c"])) == {"a", "c"}
    assert reader.get("b") is None
    assert same(reader.get("a"), entry("a", "five six", 2, seed=7))
    assert sorted(each.document.id for each in reader.entries()) == ["a", "c"]
    reader.attach({})
    assert (engine.count(), read_manifest(tmp_path / "kb").pending) == (3, [])


# -- the records ----------------------------------------------------------------------------------------------------


def test_many_commits_leave_few_records(store, engine, monkeypatch) -> None:
    monkeypatch.setattr(remote, "_SMALL", 0)
    store.commit(categories=[category("it")])
    for i in range(60):
        store.commit([entry(f"d{i}", f"word{i} apple", seed=i)])
    assert len(engine.records()) <= 6
    [mean] = {name: group.mean for groups in store.groups()[-1:] for name, group in groups.items()}.values()
    assert mean.shape == (SIZE,)
    assert sum(group.size for groups in store.groups() for group in groups.values()) == 60


def test_compacting_makes_the_summaries_anew(store, engine, monkeypatch) -> None:
    monkeypatch.setattr(remote, "_SMALL", 0)
    monkeypatch.setattr(remote, "_SUMMARISED_AT_ONCE", 3)
    store.commit([entry(f"d{i}", seed=i) for i in range(9)], categories=[category("it")])
    store.commit([], [f"d{i}" for i in range(4)])
    assert store.stale == pytest.approx(4 / 9)
    before = state(store)
    store.compact()
    assert (store.stale, state(store), len(engine.records())) == (0.0, before, 1)
    [groups] = store.groups()
    expected = summarize(np.concatenate([vectors(1, i) for i in range(4, 9)]), [np.arange(5)])
    np.testing.assert_allclose(groups["it"].mean, expected.means[0], atol=1e-6)
    assert groups["it"].size == 5
    assert groups["it"].total == pytest.approx(float(expected.variances.sum()) + expected.residuals[0], abs=1e-5)


def test_a_small_base_has_summaries_as_of_one_made_at_once(store, engine) -> None:
    store.commit([entry(f"d{i}", seed=i) for i in range(6)], categories=[category("it")])
    store.commit([entry("d1", seed=7)], ["d0", "d2"])
    assert (store.stale, len(engine.records())) == (0.0, 1)
    expected = summarize(np.concatenate([vectors(1, i) for i in (3, 4, 5, 7)]), [np.arange(4)])
    np.testing.assert_allclose(store.groups()[0]["it"].mean, expected.means[0], atol=1e-6)


def test_word_statistics_are_those_of_the_documents_that_are_there(store) -> None:
    texts = {"a": "red apple", "b": "green apple pear", "c": "apple apple"}
    store.commit([entry(name, text) for name, text in texts.items()], categories=[category("it")])
    store.commit([entry("a", "blue plum")], ["c"])
    now = Words.of_texts(["\nblue plum", "\ngreen apple pear"])
    assert [part.tolist() if isinstance(part, np.ndarray) else part for part in store.words()] == [
        part.tolist() if isinstance(part, np.ndarray) else part for part in now
    ]
    assert LexicalIndex.of_texts(["\nblue plum"]).weight("plum")


def test_a_damaged_record_is_named(store, engine, tmp_path) -> None:
    filled(store)
    engine.files = dict.fromkeys(engine.files, b"junk")
    with pytest.raises(KnowledgeBaseError, match="a record of the knowledge base is damaged"):
        RemoteStore.open(tmp_path / "kb").counts()


def test_a_record_with_a_pickle_is_refused() -> None:
    import io

    buffer = io.BytesIO()
    np.savez(buffer, head=np.array([{}], dtype=object))
    with pytest.raises(KnowledgeBaseError, match="damaged"):
        Record.from_bytes(buffer.getvalue(), SIZE)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=4), st.integers(0, 1000))
def test_joined_groups_have_the_mean_the_size_and_the_variance_of_the_whole(sizes, seed) -> None:
    rows = vectors(sum(sizes), seed)
    bounds = np.cumsum([0, *sizes])
    members = [np.arange(first, last) for first, last in itertools.pairwise(bounds.tolist())]
    whole = catalogue.joined(catalogue.groups_of(summarize(rows, members)))
    [exact] = catalogue.groups_of(summarize(rows, [np.arange(len(rows))]))
    np.testing.assert_allclose(whole.mean, exact.mean, atol=1e-6)
    assert whole.size == exact.size
    assert whole.total == pytest.approx(exact.total, abs=1e-5)
    np.testing.assert_allclose(whole.variances.sum(), exact.variances.sum(), atol=1e-4)  # 6 dimensions: none is lost


def test_a_joined_record_stands_for_its_parts() -> None:
    names = [f"state-{since:010d}-{last:010d}" for since, last in ((1, 3), (4, 4), (5, 5), (4, 5), (6, 6), (7, 9))]
    assert catalogue.chosen([*names, "other"], 6) == [names[0], names[3], names[4]]
    assert catalogue.chosen(names, 9)[-1] == names[5]
