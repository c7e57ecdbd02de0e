"""Attachments: files that a store keeps beside its documents, replaced as a whole, checked, copied and swept."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from gemma_rag.documents import Category, Chunk, Document
from gemma_rag.encoders import Space
from gemma_rag.errors import KnowledgeBaseError
from gemma_rag.storage import Entry, Store, StoredCategory, files

SPACE = Space(
    model="m", weights="w", prompts="p", dimensions=4, max_tokens=64, overflow="truncate", runtime="test", precision="float32"
)
ROW = np.eye(4, dtype=np.float32)[:1]
ALL_BYTES = bytes(range(256))


def put(store: Store, *ids: str) -> None:
    entries = [Entry(Document(id=name, text=f"text {name}", category="c"), [Chunk(start=0, end=6)], ROW) for name in ids]
    store.commit(entries, categories=[StoredCategory(Category(name="c"), ROW)])


def attached(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("attached-*")}


@pytest.fixture
def folder(tmp_path):
    """A store of one document in a folder."""
    with closing(Store.create(SPACE, {}, {})) as memory:
        put(memory, "a")
        with closing(memory.save(tmp_path / "kb")) as store:
            yield store


@pytest.fixture(params=["memory", "folder"])
def store(request, folder):
    """A store of one document, of either kind."""
    with closing(Store.create(SPACE, {}, {})) as memory:
        put(memory, "a")
        yield folder if request.param == "folder" else memory


# -- attaching ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"one", ALL_BYTES * 5000], ids=["empty", "short", "long"])
def test_what_was_attached_comes_back(store, data):
    store.attach({"ranking.json": data})
    assert store.attachment("ranking.json") == data


def test_what_was_never_attached_is_none(store):
    assert store.attachment("ranking.json") is None


def test_several_are_attached_as_one_generation(store):
    before = store.manifest.generation
    store.attach({"a": b"1", "b": b"2"})
    assert (store.attachment("a"), store.attachment("b"), store.manifest.generation) == (b"1", b"2", before + 1)


def test_a_new_one_replaces_the_old_and_leaves_the_others(store):
    store.attach({"a": b"1", "b": b"2"})
    store.attach({"a": b"3"})
    assert (store.attachment("a"), store.attachment("b")) == (b"3", b"2")


def test_none_lets_go_of_one_and_leaves_the_others(store):
    store.attach({"a": b"1", "b": b"2"})
    store.attach({"a": None})
    assert (store.attachment("a"), store.attachment("b"), set(store.manifest.attachments)) == (None, b"2", {"b"})


def test_none_for_what_is_not_there_is_no_error(store):
    store.attach({"a": None})
    assert store.manifest.attachments == {}


def test_a_commit_keeps_what_is_attached(store):
    store.attach({"a": b"1"})
    put(store, "b")
    assert (store.attachment("a"), store.manifest.documents) == (b"1", 2)


def test_attaching_keeps_the_documents_and_their_vectors(store):
    before = store.get("a")
    store.attach({"a": b"1"})
    after = store.get("a")
    assert [document.id for document in store.all_documents()] == ["a"]
    assert (after.vectors.tobytes(), after.chunks) == (before.vectors.tobytes(), before.chunks)


# -- the folder -----------------------------------------------------------------------------------------------------


def test_it_is_there_when_the_folder_is_opened_again(folder):
    folder.attach({"a": ALL_BYTES})
    with closing(Store.open(folder.path)) as other:
        assert other.attachment("a") == ALL_BYTES


def test_replaced_and_removed_files_are_swept(folder):
    folder.attach({"a": b"1", "b": b"2"})
    folder.attach({"a": b"3", "b": None})
    assert attached(folder.path) == {folder.manifest.attachments["a"].file}


def test_what_a_killed_writer_left_is_swept_by_the_next(folder):
    (folder.path / "attached-99-a").write_bytes(b"half")
    put(folder, "b")
    assert attached(folder.path) == set()


def test_a_store_in_memory_keeps_only_what_is_in_force(store):
    for number in range(5):
        store.attach({"a": bytes([number])})
    assert set(store._files) == ({store.manifest.attachments["a"].file} if store.path is None else set())


@pytest.mark.parametrize("replaced", [False, True], ids=["once", "replaced"])
def test_a_copy_has_what_is_in_force(store, tmp_path, replaced):
    if replaced:
        store.attach({"a": b"old", "gone": b"old"})
    store.attach({"a": ALL_BYTES, "gone": None})
    with closing(store.save(tmp_path / "copy")) as copy:
        assert (copy.attachment("a"), copy.attachment("gone"), len(attached(tmp_path / "copy"))) == (ALL_BYTES, None, 1)


def test_a_copy_goes_its_own_way(folder, tmp_path):
    folder.attach({"a": b"1"})
    with closing(folder.save(tmp_path / "copy")) as copy:
        copy.attach({"a": b"2"})
    assert folder.attachment("a") == b"1"


# -- damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(folder) -> Path:
    """The file of the one attachment."""
    folder.attach({"ranking.json": b"0123456789"})
    return folder.path / folder.manifest.attachments["ranking.json"].file


DAMAGE = {
    "missing": (lambda file: file.unlink(), "is missing or cannot be read"),
    "cut": (lambda file: file.write_bytes(b"01234"), "is damaged: its checksum is wrong"),
    "changed": (lambda file: file.write_bytes(b"0123456780"), "is damaged: its checksum is wrong"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_when_the_folder_is_opened(file, damage):
    do, words = DAMAGE[damage]
    do(file)
    with pytest.raises(KnowledgeBaseError, match=f"{file.name} {words}.*(Restore|index)"):
        Store.open(file.parent)


@pytest.mark.parametrize("damage", DAMAGE)
def test_without_verifying_damage_is_named_when_it_is_read(file, damage):
    do, words = DAMAGE[damage]
    do(file)
    with closing(Store.open(file.parent, verify=False)) as store:
        assert [document.id for document in store.all_documents()] == ["a"]
        with pytest.raises(KnowledgeBaseError, match=f"{file.name} {words}"):
            store.attachment("ranking.json")


def test_damage_to_one_can_be_mended_by_attaching_it_anew(file):
    file.unlink()
    with closing(Store.open(file.parent, verify=False)) as store:
        store.attach({"ranking.json": b"new"})
    with closing(Store.open(file.parent)) as store:
        assert store.attachment("ranking.json") == b"new"


# -- several processes ----------------------------------------------------------------------------------------------


@pytest.fixture
def other(folder):
    """A second handle on the folder, with one attachment."""
    folder.attach({"a": b"1"})
    with closing(Store.open(folder.path)) as store:
        yield store


def test_another_handle_sees_the_new_one_after_it_refreshed(folder, other):
    folder.attach({"a": b"2", "b": b"3"})
    assert (other.refresh(), other.attachment("a"), other.attachment("b")) == (True, b"2", b"3")


def test_another_handle_does_not_see_a_new_name_until_it_refreshes(folder, other):
    folder.attach({"b": b"3"})
    assert (other.attachment("a"), other.attachment("b")) == (b"1", None)


def test_a_handle_whose_file_was_replaced_is_told_to_refresh(folder, other):
    folder.attach({"a": b"2"})
    with pytest.raises(KnowledgeBaseError, match="refresh it, or open it again"):
        other.attachment("a")


def test_a_handle_that_fell_behind_attaches_to_the_newest(folder, other):
    folder.attach({"b": b"2"})
    put(folder, "b")
    other.attach({"c": b"3"})
    assert [other.attachment(name) for name in "abc"] == [b"1", b"2", b"3"]
    assert sorted(document.id for document in other.all_documents()) == ["a", "b"]


def test_while_another_process_writes_it_gives_up(folder, monkeypatch):
    monkeypatch.setattr(files, "BUSY_SECONDS", 0.01)
    with FileLock(folder.path / "lock"), pytest.raises(KnowledgeBaseError, match=r"another process is writing to .*kb"):
        folder.attach({"a": b"1"})
