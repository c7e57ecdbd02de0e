"""The store: commits, segments, purging, the order of rows, copies, and readers that fell behind."""

from __future__ import annotations

from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from gemma_rag.documents import Category, Chunk, Document
from gemma_rag.encoders import Space
from gemma_rag.errors import InputError, KnowledgeBaseError
from gemma_rag.storage import Entry, Store, StoredCategory, files, merging
from gemma_rag.storage import store as store_module
from gemma_rag.vectors import unit

SPACE = Space(
    model="m", weights="w", prompts="p", dimensions=4, max_tokens=64, overflow="truncate", runtime="test", precision="float32"
)


def vector_of(text: str) -> np.ndarray:
    return unit(np.random.default_rng(list(text.encode())).standard_normal((1, 4)))[0]


def entry(document_id: str, text: str = "", category: str = "fruit", pieces: int = 1, **fields) -> Entry:
    """A document cut into pieces of about the same length."""
    document = Document(id=document_id, text=text or f"the text of {document_id}", category=category, **fields)
    cuts = np.linspace(0, len(document.text), pieces + 1).astype(int).tolist()
    chunks = [Chunk(start=start, end=end) for start, end in pairwise(cuts)]
    return Entry(document, chunks, np.stack([vector_of(document.text[chunk.start : chunk.end]) for chunk in chunks]))


def put(store: Store, *entries: Entry, delete: tuple[str, ...] = ()) -> None:
    """Commit entries, and the categories that they are the first to use."""
    used = {name for item in entries for name in (item.document.category, *item.document.also_in)}
    new = used - {item.category.name for item in store.stored_categories()}
    store.commit(entries, delete, [described(Category(name=name)) for name in sorted(new)])


def described(category: Category) -> StoredCategory:
    """A category with the vectors of its text and of its examples."""
    return StoredCategory(category, np.stack([vector_of(text) for text in (category.text, *category.examples)]))


def living(store: Store) -> list[tuple[str, int, int, bytes]]:
    """The rows of the snapshot that are not dead: category, document, chunk, vector."""
    snapshot = store.snapshot()
    dead = set(snapshot.dead.tolist())
    found = [
        (snapshot.names[category], document, chunk, vector.tobytes())
        for _, data in snapshot.segments
        for category, document, chunk, vector in zip(
            data.categories.tolist(), data.documents.tolist(), data.chunks.tolist(), data.vectors(slice(None)), strict=True
        )
        if document not in dead
    ]
    return sorted(found, key=lambda row: row[:3])


def rows(store: Store) -> list[tuple[str, str, str, bytes]]:
    """The living rows, sorted by category, then by arrival: category, id, the chunk's text, its vector."""
    found = living(store)
    documents, places = store.documents([row[1] for row in found]), store.chunk_places([row[2] for row in found])
    return [
        (category, documents[number].id, documents[number].text[places[chunk].start : places[chunk].end], vector)
        for category, number, chunk, vector in found
    ]


def expected(*entries: Entry) -> list[tuple[str, str, str, bytes]]:
    """The rows that a store with these entries has, when they came in this order."""
    return [
        (category, document.id, text, vector_of(text).tobytes())
        for category in sorted({item.document.category for item in entries})
        for document, chunks, _ in entries
        if document.category == category
        for text in [document.text[chunk.start : chunk.end] for chunk in chunks]
    ]


def arrays(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("segment-*")}


@pytest.fixture
def folder(tmp_path):
    """An empty store in a folder."""
    with closing(Store.create(SPACE, {}, {})) as empty, closing(empty.save(tmp_path / "kb")) as store:
        yield store


@pytest.fixture(params=["memory", "folder"])
def store(request, folder):
    """An empty store of either kind: whatever a store does, both kinds do."""
    with closing(Store.create(SPACE, {}, {})) as memory:
        yield folder if request.param == "folder" else memory


# -- what was committed ---------------------------------------------------------------------------------------------


def test_an_empty_store_has_no_rows(store):
    assert (store.snapshot().segments, rows(store)) == ((), [])


@pytest.mark.parametrize("text", ["plain", " 空白 \n", "a\0b", "\U0001f34e" * 9, "x" * 100_000], ids=range(5))
def test_a_document_comes_back_equal(store, text):
    item = entry("一 a'\"", text, "类别/x", title="T\u2028", metadata={"n": [1, 0.1, None, True], "键": {"b": "a"}})
    put(store, item)
    assert list(store.all_documents()) == [item.document]


def test_rows_are_sorted_by_category_then_by_arrival_then_by_place(store):
    first, second, third = entry("z", category="b", pieces=3), entry("m", category="a", pieces=2), entry("a", category="b")
    put(store, first)
    put(store, second, third)
    assert rows(store) == expected(first, second, third)


def test_a_document_comes_with_its_chunks_and_vectors(store):
    first, second = entry("a", pieces=3), entry("b", pieces=2, category="z", also_in=("fruit",))
    put(store, first)
    put(store, second)
    for item in (first, second):
        found = store.get(item.document.id)
        assert (found.document, list(found.chunks)) == (item.document, list(item.chunks))
        assert found.vectors.tobytes() == item.vectors.tobytes()


def test_chunks_that_come_in_any_order_keep_their_vectors(store):
    item = entry("a", pieces=3)
    put(store, item._replace(chunks=item.chunks[::-1], vectors=item.vectors[::-1]))
    assert store.get("a").vectors.tobytes() == item.vectors.tobytes()


def test_everything_comes_back_in_the_order_of_arrival(store):
    items = [entry(str(i), category="ba"[i % 2], pieces=1 + i % 3) for i in range(40)]
    for item in items:
        put(store, item)
    put(store, delete=("3",))
    found = list(store.entries())
    assert [each.document for each in found] == [item.document for item in items if item.document.id != "3"]
    assert all(each.vectors.tobytes() == items[int(each.document.id)].vectors.tobytes() for each in found)


def test_a_chunk_without_a_vector_is_an_error(store):
    put(store, entry("a"))
    store._database.execute("INSERT INTO chunks (document, start, stop, headings) VALUES (1, 1, 2, '[]')")
    with pytest.raises(KnowledgeBaseError, match="chunks without a vector"):
        store.get("a")


def test_a_new_version_replaces_the_old(store):
    old, new, other = entry("a", "old", pieces=2), entry("a", "new", "traffic"), entry("b")
    put(store, old, other)
    put(store, new)
    assert rows(store) == expected(other, new)


def test_a_category_described_anew_replaces_the_old(store):
    put(store, entry("a"))
    new = described(Category(name="fruit", description="grows on trees"))
    store.commit(categories=[new])
    (found,) = store.snapshot().categories
    assert (found.category, found.vectors.tobytes()) == (new.category, new.vectors.tobytes())


def test_examples_come_back_with_their_vectors(store):
    put(store, entry("a"))
    new = described(Category(name="fruit", examples=("Is it ripe?", "有多甜？")))
    store.commit(categories=[new])
    (found,) = store.snapshot().categories
    assert (found.category, found.vectors.shape, found.vectors.tobytes()) == (new.category, (3, 4), new.vectors.tobytes())


def test_examples_that_were_taken_back_are_gone(store):
    store.commit([entry("a")], categories=[described(Category(name="fruit", examples=("Is it ripe?",)))])
    store.commit(categories=[described(Category(name="fruit"))])
    (found,) = store.snapshot().categories
    assert (found.category.examples, found.vectors.shape) == ((), (1, 4))


# -- further categories ---------------------------------------------------------------------------------------------


def guests(store: Store) -> list[tuple[str, str]]:
    """Each living document that belongs to a further category: its id, and that category."""
    snapshot = store.snapshot()
    dead = set(snapshot.dead.tolist())
    found = [pair for _, data in snapshot.segments for pair in data.guests.tolist() if pair[0] not in dead]
    documents = store.documents([number for number, _ in found])
    return sorted((documents[number].id, snapshot.names[category]) for number, category in found)


def used(store: Store) -> list[str]:
    """The categories that have documents or guests."""
    return sorted({row[0] for row in rows(store)} | {name for _, name in guests(store)})


def test_further_categories_come_back_in_their_order(store):
    put(store, entry("a", also_in=("z", "名/x", "b")))
    assert store.get("a").document.also_in == ("z", "名/x", "b")


def test_a_document_is_a_guest_of_every_further_category(store):
    put(store, entry("a", "aabb", "traffic", pieces=2, also_in=("z", "fruit")), entry("b", "cc"))
    assert guests(store) == [("a", "fruit"), ("a", "z")]


def test_a_store_without_further_categories_has_no_guests(store):
    put(store, entry("a"))
    assert guests(store) == []


def test_a_category_that_has_guests_alone_is_counted(store):
    put(store, entry("a", also_in=("z",)), entry("b", also_in=("z", "fruity")))
    assert (used(store), store.manifest.categories) == (["fruit", "fruity", "z"], 3)


@pytest.mark.parametrize("change", ["updated", "deleted"])
def test_a_category_whose_last_guest_left_is_no_longer_counted(store, change):
    put(store, entry("a", also_in=("z",)), entry("b"))
    put(store, *([entry("a")] if change == "updated" else []), delete=("a",) if change == "deleted" else ())
    assert (guests(store), store.manifest.categories) == ([], 1)


def test_a_changed_further_category_in_the_database_is_noticed(folder):
    put(folder, entry("a", also_in=("zebras",)))
    file = folder.path / "documents.sqlite"
    file.write_bytes(file.read_bytes().replace(b"zebras", b"zebrax"))
    with pytest.raises(KnowledgeBaseError, match=r"documents\.sqlite is damaged"):
        Store.open(folder.path)


def test_a_changed_example_in_the_database_is_noticed(folder):
    folder.commit([entry("a")], categories=[described(Category(name="fruit", examples=("Is it ripe?",)))])
    file = folder.path / "documents.sqlite"
    file.write_bytes(file.read_bytes().replace(b"Is it ripe?", b"Is it rope?"))
    with pytest.raises(KnowledgeBaseError, match=r"documents\.sqlite is damaged"):
        Store.open(folder.path)


# -- deleting and replacing -----------------------------------------------------------------------------------------


def test_a_deleted_document_has_no_rows(store):
    put(store, entry("a"), entry("b"), entry("c"))
    put(store, delete=("b",))
    assert rows(store) == expected(entry("a"), entry("c"))


def test_deleting_unknown_ids_keeps_the_counts(store):
    put(store, entry("a"))
    put(store, delete=("nowhere",))
    assert (store.manifest.documents, store.manifest.chunks) == (1, 1)


def test_after_everything_was_deleted_documents_can_be_added(store):
    put(store, entry("a"), entry("b"))
    put(store, delete=("a", "b"))
    put(store, entry("c"))
    assert rows(store) == expected(entry("c"))


def test_more_ids_than_one_statement_takes_are_found(store):
    put(store, *(entry(str(i)) for i in range(1201)))
    assert len(store.hashes([str(i) for i in range(1201)])) == 1201


def test_an_entry_without_vectors_undoes_the_whole_commit(store):
    with pytest.raises(InputError, match="'b' came with 1 chunks and 0 vectors"):
        put(store, entry("a"), entry("b")._replace(vectors=np.zeros((0, 4), np.float32)))
    assert (store.manifest.documents, list(store.all_documents())) == (0, [])


def test_twenty_commits_keep_every_vector(store):
    entries = [entry(str(i), category="ab"[i % 2], pieces=i % 3 + 1) for i in range(20)]
    for item in entries:
        put(store, item)
    assert rows(store) == expected(*entries)


# -- files on the disk ----------------------------------------------------------------------------------------------


def test_small_stores_have_one_segment_whatever_the_commits(folder):
    for i in range(30):
        put(folder, entry(str(i)))
        assert len(arrays(folder.path)) == 1


def test_n_commits_leave_about_log_n_segments(folder, monkeypatch):
    monkeypatch.setattr(merging, "_SMALL", 0)
    entries = [entry(str(i), category="ab"[i % 2], pieces=i % 3 + 1) for i in range(64)]
    counts = []
    for item in entries:
        put(folder, item)
        counts.append(len(arrays(folder.path)))
    assert max(counts) <= 7
    assert rows(folder) == expected(*entries)


def test_a_segment_too_large_to_merge_is_left_alone(folder, monkeypatch):
    monkeypatch.setattr(merging, "_SMALL", 0)
    monkeypatch.setattr(merging, "_MERGED_AT_ONCE", 10)
    put(folder, *(entry(f"first {i}") for i in range(11)))
    (large,) = arrays(folder.path)
    for i in range(9):
        put(folder, entry(str(i)))
    assert large in arrays(folder.path)


def test_compacting_leaves_one_segment_of_the_living(folder, monkeypatch):
    monkeypatch.setattr(merging, "_SMALL", 0)
    for i in range(9):
        put(folder, entry(str(i % 5), f"version {i}"))
    put(folder, delete=("2",))
    before = rows(folder)
    folder.compact()
    assert rows(folder) == before
    assert [segment.rows for segment in folder.manifest.segments] == [4]


def test_compacting_twice_changes_nothing(store):
    put(store, entry("a"), entry("b"))
    put(store, delete=("a",))
    store.compact()
    before = rows(store)
    store.compact()
    assert rows(store) == before == expected(entry("b"))


def test_compacting_an_empty_store_is_allowed(store):
    store.compact()
    assert rows(store) == []


def test_only_the_manifests_files_are_kept(folder):
    for i in range(30):
        put(folder, entry(str(i % 7), f"version {i}"))
    assert arrays(folder.path) == {segment.file for segment in folder.manifest.segments}


def test_updates_of_one_document_keep_no_dead_vectors_in_a_small_store(folder):
    put(folder, entry("other", pieces=5))
    for i in range(40):
        put(folder, entry("a", f"version {i}"))
    assert sum(segment.rows for segment in folder.manifest.segments) == 6


def test_after_compacting_the_database_does_not_hold_the_old_text(folder):
    put(folder, entry("a", "the secret of the old version"), entry("b", "the secret that was deleted"))
    put(folder, entry("a", "new"), delete=("b",))
    assert b"secret" in (folder.path / "documents.sqlite").read_bytes()
    folder.compact()
    assert b"secret" not in (folder.path / "documents.sqlite").read_bytes()


@pytest.mark.parametrize("small", [0, 2_000], ids=["many segments", "one segment"])
def test_the_text_of_what_was_deleted_is_gone_nine_commits_later(folder, monkeypatch, small):
    monkeypatch.setattr(merging, "_SMALL", small)
    put(folder, *(entry(f"{i}", f"the secret number {i}") for i in range(30)))
    put(folder, delete=tuple(map(str, range(30))))
    for i in range(9):
        put(folder, entry(f"new {i}"))
    assert b"secret" not in (folder.path / "documents.sqlite").read_bytes()
    assert len(rows(folder)) == 9


def test_a_copy_does_not_hold_deleted_texts(store, tmp_path):
    put(store, entry("a", "the secret"), entry("b"), entry("c"), entry("d"))
    put(store, delete=("a",))
    store.save(tmp_path / "copy").close()
    assert b"secret" not in (tmp_path / "copy/documents.sqlite").read_bytes()


def test_a_copy_has_the_same_rows(store, tmp_path):
    put(store, entry("a", category="z", pieces=2, also_in=("y", "fruit")), entry("b"), entry("c"))
    put(store, entry("b", "new"), delete=("c",))
    with closing(store.save(tmp_path / "copy")) as copy:
        assert (rows(copy), guests(copy)) == (rows(store), guests(store))


def test_a_copy_has_one_segment_of_live_rows(store, tmp_path):
    for i in range(7):
        put(store, entry(str(i)))
    put(store, delete=("3",))
    with closing(store.save(tmp_path / "copy")) as copy:
        assert [segment.rows for segment in copy.manifest.segments] == [6]


def test_a_copy_is_another_knowledge_base(folder, tmp_path):
    with closing(folder.save(tmp_path / "copy")) as copy:
        assert copy.manifest.identity != folder.manifest.identity


@pytest.mark.parametrize("there", ["file", "folder"])
def test_saving_to_what_exists_is_refused(store, tmp_path, there):
    target = tmp_path / "there"
    (target if there == "file" else target / "x").parent.mkdir(exist_ok=True)
    (target if there == "file" else target / "x").write_text("mine")
    with pytest.raises(InputError, match="there exists already"):
        store.save(target)


def test_an_empty_folder_is_accepted(store, tmp_path):
    (tmp_path / "empty").mkdir()
    put(store, entry("a"))
    with closing(store.save(tmp_path / "empty")) as copy:
        assert rows(copy) == rows(store)


def test_missing_parents_are_made(store, tmp_path):
    store.save(tmp_path / "a/b/c").close()
    assert (tmp_path / "a/b/c/manifest.json").is_file()


def test_saving_leaves_nothing_beside_the_folder(store, tmp_path):
    store.save(tmp_path / "new/copy").close()
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new/copy"]


@pytest.mark.parametrize("name", ["copy", "copy [1]"])
def test_what_a_killed_save_left_is_removed(store, tmp_path, name):
    left = tmp_path / f".{name}.0123abcd.unfinished"
    left.mkdir()
    (left / "documents.sqlite").write_text("half")
    store.save(tmp_path / name).close()
    assert not left.exists()


def test_what_another_process_is_saving_is_not_removed(store, tmp_path):
    other = tmp_path / ".copy.0123abcd.unfinished"
    other.mkdir()
    with FileLock(other / "lock"):
        store.save(tmp_path / "copy").close()
    assert other.exists()


def test_a_save_about_to_be_renamed_is_not_removed_by_another(store, tmp_path, monkeypatch):
    rename = Path.rename

    def rename_late(self, target):
        files.remove_abandoned(self)  # what another process that saves to the same place does
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_late)
    with closing(store.save(tmp_path / "copy")) as copy:
        assert rows(copy) == []


# -- readers and writers beside each other --------------------------------------------------------------------------

READS = {
    "all_documents": lambda store, seen: [document.text for document in store.all_documents()],
    "get": lambda store, seen: store.get("0").document.text,
    "entries": lambda store, seen: [(item.document, item.vectors.tobytes()) for item in store.entries()],
    "hashes": lambda store, seen: store.hashes(["0", "1", "2"]),
    "documents": lambda store, seen: store.documents([row[1] for row in seen]),
    "chunk_places": lambda store, seen: [store.chunk_places([row[2] for row in seen])[n] for n in [row[2] for row in seen]],
    "metadata": lambda store, seen: [store.metadata()[number] for number in [row[1] for row in seen]],
    "categories": lambda store, seen: [item.category for item in store.stored_categories()],
    "guests": lambda store, seen: guests(store),
    "vectors": lambda store, seen: [row[3] for row in living(store)],
    "rows": lambda store, seen: rows(store),
}
REWRITES = {
    "updated": lambda writer: [put(writer, *(entry(str(i), f"{turn}") for i in range(3))) for turn in range(3)],
    "deleted": lambda writer: put(writer, delete=("0", "1", "2")),
    "merged": lambda writer: [put(writer, entry(f"more {i}")) for i in range(9)],
    "forgotten": lambda writer: [put(writer, entry(str(i % 3), f"{i}")) for i in range(12)],
    "compacted": lambda writer: (put(writer, delete=("0", "1")), writer.compact()),
}


@pytest.mark.parametrize("rewrite", REWRITES)
@pytest.mark.parametrize("read", READS)
def test_a_reader_of_an_older_generation_gets_what_was_there_or_is_told_to_refresh(folder, read, rewrite):
    put(folder, *(entry(str(i), metadata={"i": i}, also_in=("others",)) for i in range(3)))
    with closing(Store.open(folder.path)) as reader:
        seen = living(reader)
        before = READS[read](reader, seen)
        REWRITES[rewrite](folder)
        try:
            after, problem = READS[read](reader, seen), ""
        except KnowledgeBaseError as error:
            after, problem = before, str(error)
        assert after == before
        assert not problem or "refresh it, or open it again" in problem


@pytest.mark.parametrize("read", READS)
def test_a_reader_up_to_eight_commits_behind_reads_on(folder, read):
    put(folder, *(entry(str(i), metadata={"i": i}, also_in=("others",)) for i in range(3)))
    with closing(Store.open(folder.path)) as reader:
        seen = living(reader)
        before = READS[read](reader, seen)
        for i in range(8):
            put(folder, entry("0", f"version {i}"), delete=("1",))
            assert READS[read](reader, seen) == before


def test_a_refreshed_reader_sees_what_a_writer_did(folder):
    with closing(Store.open(folder.path)) as reader:
        REWRITES["updated"](folder)
        reader.refresh()
        assert rows(reader) == rows(folder)


def test_a_writer_that_fell_behind_keeps_what_another_wrote(folder):
    with closing(Store.open(folder.path)) as other:
        put(folder, entry("a"))
        put(other, entry("b"))
        assert rows(other) == expected(entry("a"), entry("b"))


def test_a_writer_waits_for_the_lock_and_gives_up(folder, monkeypatch):
    monkeypatch.setattr(files, "BUSY_SECONDS", 0.01)
    with FileLock(folder.path / "lock"), pytest.raises(KnowledgeBaseError, match=r"another process is writing to .*kb"):
        put(folder, entry("a"))


def test_an_interrupt_during_the_purge_does_not_break_the_next_commit(folder, monkeypatch):
    def interrupt(store, generation):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "purge", interrupt)
        with pytest.raises(KeyboardInterrupt):
            put(folder, entry("a"))
    put(folder, entry("b"))
    assert folder.get("b") is not None
