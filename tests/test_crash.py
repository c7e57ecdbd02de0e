"""Changes that fail or are killed half way: afterwards there is all of a change or none of it, never something between."""

from __future__ import annotations

import contextlib
import inspect
import json
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from gemma_rag.copying import MARK
from gemma_rag.documents import Document
from gemma_rag.encoders import Input, Space
from gemma_rag.errors import KnowledgeBaseError
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.prompts import NO_PROMPTS, Task
from gemma_rag.storage import arrays, files, segments
from gemma_rag.storage import store as store_module
from gemma_rag.vectors import unit

KILLS = 50
"""Of writers, at random moments: of `add`, `delete` and `compact` in turn, of `index_source`, and of copying."""
CALLS = 12


class LetterEncoder:
    """A vector counts the letters of its text; made of numpy alone, so that a process that uses it starts quickly."""

    profile = NO_PROMPTS
    space = Space(
        model="letters",
        weights="",
        prompts="",
        dimensions=26,
        max_tokens=256,
        overflow="error",
        runtime="",
        precision="float32",
    )

    def encode(self, inputs: Sequence[Input]) -> np.ndarray:
        letters = [np.frombuffer(f"{item.title or ''} {item.text}".lower().encode(), dtype=np.uint8) for item in inputs]
        return unit(np.array([np.bincount(row, minlength=123)[97:123] + 0.01 for row in letters]).reshape(-1, 26))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]


def numbered(number: int, version: int) -> Document:
    text = f"Document {number}, as of version {version}: " + " ".join(
        chr(97 + (number * 7 + version * k) % 26) for k in range(30)
    )
    return Document(id=str(number), text=text, category=f"c{number % 5}", metadata={"version": version})


def call(number: int) -> tuple[list[Document], list[str]]:
    """What the given call adds and deletes; it is number 0 that fills the knowledge base with 300 documents."""
    if number == 0:
        return [numbered(i, 0) for i in range(300)], []
    if number % 6 == 5:
        return [], []  # this call compacts
    if number % 4 == 3:
        return [], [str(300 + (number - 1) * 10 + i) for i in range(5)]
    changed = [numbered((number * 41 + i) % 300, number) for i in range(60)]
    return [*changed, *(numbered(300 + number * 10 + i, number) for i in range(10))], []


def make(base: KnowledgeBase, number: int) -> None:
    documents, ids = call(number)
    if documents:
        base.add(documents)
    if ids:
        base.delete(ids)
    if not documents and not ids:
        base.compact()


def contents_after(number: int) -> dict[str, Document]:
    """What calls 0 to `number` leave, without any knowledge base."""
    contents: dict[str, Document] = {}
    for i in range(number + 1):
        documents, ids = call(i)
        contents.update({document.id: document for document in documents})
        contents = {key: document for key, document in contents.items() if key not in ids}
    return contents


def filled(path: Path) -> Path:
    with KnowledgeBase.from_documents(call(0)[0], LetterEncoder()) as base:
        base.save(path)
    return path


def held(path: Path) -> dict[str, Document]:
    """What a knowledge base holds, after its checksums and every vector have been compared."""
    with KnowledgeBase.open(path, LetterEncoder()) as base:
        view = base.view()
        rows, codes = view.rows
        numbers = view.index.documents[view.index.places_of(rows)].tolist()
        by_number = view.documents(numbers)
        documents = [by_number[number] for number in numbers]
        inputs = [Input(document.text, Task.DOCUMENT, document.title) for document in documents]
        assert view.index.vectors(rows).tobytes() == LetterEncoder().encode(inputs).tobytes()
        assert [view.categories[code] for code in codes] == [document.category for document in documents]
        contents = {document.id: document for document in base}
        assert {document.id: document for document in documents} == contents
        assert len(base) == len(contents) == len(documents)
        return contents


# -- failures in the middle of a commit -----------------------------------------------------------------------------


def fail(*args: object, **kwargs: object) -> None:
    raise OSError("no space left on device")


def interrupt(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


PLACES: dict[str, tuple[object, str]] = {
    "vectors": (segments.Segments, "write"),
    "vectors reach the disk": (arrays, "sync"),
    "manifest": (store_module, "write_manifest"),
    "manifest reaches the disk": (files, "sync"),
    "manifest is put in place": (Path, "replace"),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """300 documents in a folder, to be copied."""
    return filled(tmp_path_factory.mktemp("original") / "kb")


@pytest.fixture
def path(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "kb"))


@pytest.fixture
def base(path):
    with KnowledgeBase.open(path, LetterEncoder()) as base:
        yield base


@pytest.fixture(params=PLACES)
def failed(request, base, monkeypatch) -> KnowledgeBase:
    """A knowledge base whose last call failed, once for each place where it can."""
    with monkeypatch.context() as patch:
        patch.setattr(*PLACES[request.param], fail)
        with pytest.raises(KnowledgeBaseError, match="no space left on device"):
            make(base, 1)
    return base


def test_after_a_failure_this_handle_has_the_old_state(failed):
    assert {document.id: document for document in failed} == contents_after(0)


def test_after_a_failure_another_handle_has_the_old_state(failed):
    assert held(failed.path) == contents_after(0)


def test_after_a_failure_the_same_call_works(failed):
    make(failed, 1)
    assert held(failed.path) == contents_after(1)


def test_after_a_failure_another_handle_can_go_on(failed):
    with KnowledgeBase.open(failed.path, LetterEncoder()) as other:
        make(other, 1)
    failed.refresh()
    assert {document.id: document for document in failed} == contents_after(1)


@pytest.mark.parametrize("place", PLACES)
def test_after_an_interrupt_the_same_call_works(base, monkeypatch, place):
    with monkeypatch.context() as patch:
        patch.setattr(*PLACES[place], interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(base, 1)
    make(base, 1)
    assert held(base.path) == contents_after(1)


def test_a_failure_after_the_manifest_is_in_place_leaves_one_state(base, monkeypatch):
    base.view()
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync_folder", fail)
        with pytest.raises(KnowledgeBaseError):
            make(base, 1)
    now = {document.id: document for document in base}
    view = base.view()
    in_view = {document.id: document for document in view.documents(view.index.documents.tolist()).values()}
    assert in_view == now == held(base.path)


def test_a_full_database_is_an_error_that_names_it(base):
    base._store._database.execute("PRAGMA max_page_count = 1")  # SQLite takes the present size where that is more
    with pytest.raises(KnowledgeBaseError, match=r"documents\.sqlite cannot be used: database or disk is full"):
        base.add([numbered(i, 1) for i in range(1000, 1500)])
    assert held(base.path) == contents_after(0)


def test_a_failure_in_memory_leaves_the_old_state(monkeypatch):
    with KnowledgeBase.from_documents(call(0)[0], LetterEncoder()) as base:
        with monkeypatch.context() as patch:
            patch.setattr(*PLACES["vectors"], fail)
            with pytest.raises(KnowledgeBaseError):
                make(base, 1)
        assert {document.id: document for document in base} == contents_after(0)


def test_a_reader_in_the_way_of_a_purge_does_not_break_the_next_commit(path, monkeypatch):
    monkeypatch.setattr(files, "BUSY_SECONDS", 0.01)
    reader = sqlite3.connect(path / "documents.sqlite", isolation_level=None)
    with closing(reader), KnowledgeBase.open(path, LetterEncoder()) as base:

        def read_meanwhile(folder, manifest, write_manifest=store_module.write_manifest):
            write_manifest(folder, manifest)
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM documents").fetchall()

        with monkeypatch.context() as patch:
            patch.setattr(store_module, "write_manifest", read_meanwhile)
            base.delete(list(contents_after(0)))
        reader.execute("COMMIT")
        base.add(call(0)[0])
        assert held(path) == contents_after(0)


def test_a_save_that_failed_leaves_nothing(base, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "write_manifest", fail)
    with pytest.raises(KnowledgeBaseError, match="no space left"):
        base.save(tmp_path / "new/copy")
    assert list((tmp_path / "new").iterdir()) == []


# -- failures in the middle of attaching ------------------------------------------------------------------------------

ATTACHING: dict[str, tuple[object, str]] = {
    "file reaches the disk": (store_module, "sync"),
    **{place: PLACES[place] for place in ("manifest", "manifest reaches the disk", "manifest is put in place")},
}


def attached(path: Path) -> bytes | None:
    """What is attached, as a handle of its own sees it, and that the documents are as they were."""
    assert held(path) == contents_after(0)
    with KnowledgeBase.open(path, LetterEncoder()) as base:
        return base._store.attachment("learned")


@pytest.mark.parametrize("problem", [fail, interrupt], ids=["failure", "interrupt"])
@pytest.mark.parametrize("place", ATTACHING)
def test_when_attaching_fails_the_old_is_in_force_and_the_same_call_works(base, monkeypatch, place, problem):
    base._store.attach({"learned": b"old"})
    with monkeypatch.context() as patch:
        patch.setattr(*ATTACHING[place], problem)
        with pytest.raises((KnowledgeBaseError, KeyboardInterrupt)):
            base._store.attach({"learned": b"new"})
    assert (base._store.attachment("learned"), attached(base.path)) == (b"old", b"old")
    base._store.attach({"learned": b"new"})
    assert (base._store.attachment("learned"), attached(base.path)) == (b"new", b"new")


def test_after_attaching_failed_documents_can_be_added_and_its_file_is_swept(base, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(*PLACES["manifest"], fail)
        with pytest.raises(KnowledgeBaseError):
            base._store.attach({"learned": b"new"})
    make(base, 1)
    assert (held(base.path), list(base.path.glob("attached-*"))) == (contents_after(1), [])


# -- kill -9 --------------------------------------------------------------------------------------------------------


def change_it(path: Path) -> None:
    """The child that changes a knowledge base, call by call."""
    with KnowledgeBase.open(path, LetterEncoder()) as base:
        print("ready", flush=True)
        for number in range(1, CALLS):
            make(base, number)
            print(number, flush=True)


def attach_to_it(path: Path) -> None:
    """The child that attaches ever new files; every attachment is a number, written 10,000 times."""
    with KnowledgeBase.open(path, LetterEncoder()) as base:
        print("ready", flush=True)
        for number in range(1, 100):
            base._store.attach(
                {"learned": f"{number:4}".encode() * 10_000, f"other {number % 2}": None if number % 3 else b"x"}
            )
            print(number, flush=True)


def build_it(path: Path) -> None:
    """The child that builds a knowledge base."""
    print("ready", flush=True)
    with KnowledgeBase.from_documents(call(0)[0], LetterEncoder()) as base:
        print("built", flush=True)
        base.save(path)


def index_it(path: Path) -> None:
    """The child that indexes the rows of a file, 40 at a time."""
    from gemma_rag import ingestion
    from gemma_rag.encoders import EncoderSettings

    ingestion.load_encoder = lambda settings: LetterEncoder()
    print("ready", flush=True)
    ingestion.index_source(path.parent / "rows.jsonl", path, settings=EncoderSettings(), batch=40)


def copy_it(path: Path) -> None:
    """The child that copies a knowledge base, 30 documents at a time."""
    from gemma_rag.copying import copy_knowledge_base

    with KnowledgeBase.open(path.parent / "source", LetterEncoder()) as base:
        print("ready", flush=True)
        copy_knowledge_base(base, path, batch=30)


def add_one_more(path: Path) -> None:
    """The child that comes after a kill."""
    there = path.exists()
    with (
        KnowledgeBase.open(path, LetterEncoder())
        if there
        else KnowledgeBase.from_documents(call(0)[0], LetterEncoder()) as base
    ):
        if not there:
            base.save(path)
        base.add([numbered(9999, 1)])


HEADER = f"""
import sys; from collections.abc import Sequence; from pathlib import Path; import numpy as np
from gemma_rag.documents import Document; from gemma_rag.encoders import Input, Space
from gemma_rag.knowledge_base import KnowledgeBase; from gemma_rag.prompts import NO_PROMPTS; from gemma_rag.vectors import unit
CALLS = {CALLS}
"""


def start(task: Callable[[Path], None], path: Path) -> subprocess.Popen[str]:
    """A process of its own that knows the encoder and the calls of this file, and does one task."""
    parts = [HEADER, *map(inspect.getsource, (LetterEncoder, numbered, call, make, task))]
    script = "\n".join([*parts, f"{task.__name__}(Path(sys.argv[1]))"])
    return subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    with process:
        process.communicate(timeout=60)
    assert process.returncode == 0


def read_until(process: subprocess.Popen[str], word: str) -> None:
    while process.stdout.readline().strip() not in (word, ""):
        pass


def duration(task: Callable[[Path], None], path: Path, word: str) -> float:
    """Seconds from the line with that word to the end of a process that nobody kills."""
    process = start(task, path)
    read_until(process, word)
    started = time.perf_counter()
    finish(process)
    return time.perf_counter() - started


def kill_after(process: subprocess.Popen[str], word: str, seconds: float) -> list[str]:
    """Kill a process that long after it said the word; returns the lines that it said in between."""
    with process:
        read_until(process, word)
        try:
            assert process.wait(timeout=seconds) == 0
        except subprocess.TimeoutExpired:
            process.kill()
        return process.stdout.read().split()


@pytest.mark.slow
def test_whenever_a_writer_is_killed_its_calls_are_there_as_a_whole(original, tmp_path):
    longest = duration(change_it, Path(shutil.copytree(original, tmp_path / "unkilled")), "ready")
    moments = random.Random(20)
    seen = set()
    for i in range(KILLS - 20):
        path = Path(shutil.copytree(original, tmp_path / str(i)))
        said = kill_after(start(change_it, path), "ready", moments.uniform(0, longest))
        contents = held(path)
        committed = len(said) + (contents != contents_after(len(said)))
        assert contents == contents_after(committed)
        finish(start(add_one_more, path))
        assert held(path) == contents_after(committed) | {"9999": numbered(9999, 1)}
        seen.add(committed)
    assert len(seen) > 1  # the kills came at different moments


@pytest.mark.slow
def test_whenever_a_writer_is_killed_its_attachments_are_there_as_a_whole(original, tmp_path):
    longest = duration(attach_to_it, Path(shutil.copytree(original, tmp_path / "unkilled")), "ready")
    moments = random.Random(22)
    seen = set()
    for i in range(5):
        path = Path(shutil.copytree(original, tmp_path / str(i)))
        said = kill_after(start(attach_to_it, path), "ready", moments.uniform(0, longest))
        data = attached(path)
        number = int(data[:4]) if data else 0
        assert number in (len(said), len(said) + 1)
        assert data == (f"{number:4}".encode() * 10_000 if number else None)
        finish(start(add_one_more, path))
        with KnowledgeBase.open(path, LetterEncoder()) as base:
            assert (base._store.attachment("learned"), len(base)) == (data, 301)
            assert len(list(path.glob("attached-*"))) == len(base.manifest.attachments)
        seen.add(number)
    assert len(seen) > 1  # the kills came at different moments


@pytest.mark.slow
@pytest.mark.parametrize("word", ["ready", "built"], ids=["building", "saving"])
def test_whenever_a_builder_is_killed_there_is_all_of_it_or_nothing(tmp_path, word):
    longest = duration(build_it, tmp_path / "unkilled", word)
    moments = random.Random(21)
    for i in range(10):
        path = tmp_path / "folder" / str(i)
        kill_after(start(build_it, path), word, moments.uniform(0, longest))
        assert not path.exists() or held(path) == contents_after(0)
        finish(start(add_one_more, path))
        assert held(path) == contents_after(0) | {"9999": numbered(9999, 1)}
        assert list(path.parent.glob(f".{i}.*")) == []


@pytest.mark.slow
def test_whenever_indexing_is_killed_its_blocks_are_there_and_the_same_command_goes_on(tmp_path):
    documents = [numbered(i, 0) for i in range(600)]
    for name in ("unkilled", *map(str, range(10))):
        (tmp_path / name).mkdir()
        rows = [json.dumps(document.model_dump(mode="json")) for document in documents]
        (tmp_path / name / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    longest = duration(index_it, tmp_path / "unkilled" / "kb", "ready")
    moments = random.Random(23)
    seen = set()
    for i in range(10):
        path = tmp_path / str(i) / "kb"
        kill_after(start(index_it, path), "ready", moments.uniform(0, longest))
        contents = held(path) if path.exists() else {}
        assert list(contents.values()) == documents[: len(contents)]
        assert len(contents) % 40 == 0
        finish(start(index_it, path))
        assert held(path) == {document.id: document for document in documents}
        seen.add(len(contents))
    assert len(seen) > 1  # the kills came at different moments


@pytest.mark.slow
def test_whenever_copying_is_killed_the_source_is_whole_and_the_same_command_goes_on(original, tmp_path):
    for name in ("unkilled", *map(str, range(10))):
        shutil.copytree(original, tmp_path / name / "source")
    longest = duration(copy_it, tmp_path / "unkilled" / "kb", "ready")
    moments = random.Random(24)
    seen = set()
    for i in range(10):
        path = tmp_path / str(i) / "kb"
        kill_after(start(copy_it, path), "ready", moments.uniform(0, longest))
        contents = held(path) if path.exists() else {}
        assert contents.items() <= contents_after(0).items()
        with KnowledgeBase.open(path) if path.exists() else contextlib.nullcontext() as copy:
            finished = copy is not None and bool(contents) and MARK not in copy.manifest.attachments
        if not finished:  # a copy that is finished is a knowledge base of its own, and copying over it is refused
            finish(start(copy_it, path))
        assert held(path) == held(tmp_path / str(i) / "source") == contents_after(0)
        seen.add(len(contents))
    assert len(seen) > 1  # the kills came at different moments
