"""From a source to a knowledge base on disk, in runs that stop and go on."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_rag import ingestion
from gemma_rag.bulk import Progress
from gemma_rag.documents import Document
from gemma_rag.encoders import EncoderSettings
from gemma_rag.errors import BadRows, InputError, KnowledgeBaseError
from gemma_rag.ingestion import IndexReport, index_source
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.storage.manifest import EngineAddress

from .letters import LetterEncoder, numbered

ROOT = Path(__file__).parent.parent
Index = Callable[..., IndexReport]


def written(path: Path, *rows: Document | str) -> Path:
    """A JSON Lines file of documents, and of lines as they are."""
    lines = [row if isinstance(row, str) else row.model_dump_json() for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def index(monkeypatch, tmp_path) -> Index:
    """`index_source` into the folder ``kb``, with the encoder that counts letters."""

    def run(source: Path, encoder: LetterEncoder | None = None, **options: Any) -> IndexReport:
        monkeypatch.setattr(ingestion, "load_encoder", lambda settings: encoder or LetterEncoder())
        return index_source(source, tmp_path / "kb", settings=EncoderSettings(model="letters"), **options)

    return run


def contents(tmp_path: Path) -> dict[str, Document]:
    with KnowledgeBase.open(tmp_path / "kb") as base:
        return {document.id: document for document in base}


def entries(path: Path) -> dict[str, tuple[Document, bytes]]:
    """Documents and the bytes of their vectors, after every checksum was compared."""
    with KnowledgeBase.open(path, verify=True) as base:
        return {entry.document.id: (entry.document, entry.vectors.tobytes()) for entry in base._store.entries()}


# -- building and bringing up to date -----------------------------------------------------------------------------------


def test_a_source_becomes_a_knowledge_base(index, tmp_path):
    report = index(written(tmp_path / "rows.jsonl", *numbered(300)), batch=100)
    assert (report.added, report.updated, report.unchanged, report.deleted, report.bad) == (300, 0, 0, 0, 0)
    assert (report.documents, report.chunks, report.categories, report.dimensions) == (300, 300, 5, 26)
    assert contents(tmp_path) == {document.id: document for document in numbered(300)}


def test_it_holds_what_it_would_hold_if_it_were_made_at_once(index, tmp_path):
    index(written(tmp_path / "rows.jsonl", *numbered(300)), batch=7)
    with KnowledgeBase.from_documents(numbered(300), LetterEncoder()) as at_once:
        at_once.save(tmp_path / "at once")
    assert entries(tmp_path / "kb") == entries(tmp_path / "at once")


def test_many_commits_are_put_together_at_the_end(index, tmp_path, monkeypatch):
    monkeypatch.setattr(ingestion, "_SCATTERED", 0)
    index(written(tmp_path / "rows.jsonl", *numbered(300)), batch=10)
    with KnowledgeBase.open(tmp_path / "kb") as base:
        assert len(base.manifest.segments) == 1


def test_a_second_run_embeds_nothing(index, tmp_path):
    source = written(tmp_path / "rows.jsonl", *numbered(50))
    index(source)
    report = index(source, LetterEncoder(log=tmp_path / "log"))
    assert (report.added, report.updated, report.unchanged) == (0, 0, 50)
    assert not (tmp_path / "log").exists()


def test_replacing_deletes_what_the_source_does_not_have(index, tmp_path):
    index(written(tmp_path / "rows.jsonl", *numbered(50)))
    report = index(written(tmp_path / "rows.jsonl", *numbered(20)), replace=True)
    assert (report.unchanged, report.deleted, report.documents) == (20, 30, 20)


@pytest.mark.parametrize("options", [{"skip_bad": True}, {"dead_letter": "dead.jsonl"}])
def test_replacing_is_refused_where_rows_are_bad_before_anything_is_done(index, tmp_path, options):
    index(written(tmp_path / "rows.jsonl", *numbered(50)))
    options = {name: tmp_path / value if value == "dead.jsonl" else value for name, value in options.items()}
    with pytest.raises(InputError, match="leave --replace out"):
        index(written(tmp_path / "rows.jsonl", *numbered(100)[60:], "nonsense"), replace=True, **options)
    assert len(contents(tmp_path)) == 50


def test_descriptions_of_categories_are_kept(index, tmp_path):
    described = tmp_path / "categories.jsonl"
    described.write_text('{"name": "c1", "description": "Number one"}\n')
    source = written(tmp_path / "rows.jsonl", *numbered(10))
    index(source)
    index(source, categories=described)
    with KnowledgeBase.open(tmp_path / "kb") as base:
        assert {item.name: item.description for item in base.categories}["c1"] == "Number one"


def test_progress_goes_from_the_first_block_to_the_whole_source(index, tmp_path):
    said: list[Progress] = []
    index(written(tmp_path / "rows.jsonl", *numbered(3000)), batch=500, on_progress=said.append)
    assert [progress.done for progress in said] == [500, 1000, 1500, 2000, 2500, 3000]
    shares = [progress.share for progress in said]
    assert shares == sorted(shares)
    assert shares[0] < 0.5
    assert shares[-1] == 1.0


@pytest.mark.slow
def test_several_processes_make_the_same_knowledge_base(tmp_path):
    source = written(tmp_path / "rows.jsonl", *numbered(40))
    settings = EncoderSettings(model="minilm", device="cpu")
    for name, workers in (("one", None), ("two", 2)):
        index_source(source, tmp_path / name, settings=settings, batch=10, workers=workers)
    with KnowledgeBase.open(tmp_path / "one") as one, KnowledgeBase.open(tmp_path / "two") as two:
        for here, there in zip(one._store.entries(), two._store.entries(), strict=True):
            assert here.document == there.document
            assert abs(here.vectors - there.vectors).max() < 1e-5


# -- bad rows -----------------------------------------------------------------------------------------------------------


def test_bad_rows_are_all_named_before_anything_is_done(index, tmp_path):
    source = written(tmp_path / "rows.jsonl", *numbered(3000), "nonsense", *numbered(2))
    with pytest.raises(BadRows) as caught:
        index(source, LetterEncoder(log=tmp_path / "log"))
    assert [row.line for row in caught.value.rows] == [3001, 3002, 3003]
    assert not (tmp_path / "kb").exists()
    assert not (tmp_path / "log").exists()


def test_bad_rows_can_be_skipped_and_are_counted(index, tmp_path):
    report = index(written(tmp_path / "rows.jsonl", *numbered(10), "nonsense", *numbered(2)), skip_bad=True)
    assert (report.added, report.bad, [row.line for row in report.skipped]) == (10, 3, [11, 12, 13])


def test_a_report_holds_the_first_bad_rows_only(index, tmp_path, monkeypatch):
    monkeypatch.setattr(ingestion, "_SHOWN", 4)
    report = index(written(tmp_path / "rows.jsonl", *numbered(10), *["nonsense"] * 9), skip_bad=True)
    assert (report.bad, len(report.skipped)) == (9, 4)


def test_bad_rows_go_to_the_dead_letter_file_with_what_stood_there(index, tmp_path):
    source = written(tmp_path / "rows.jsonl", *numbered(2), "[1, 2]", '{"id": "x", "category": "c"}')
    report = index(source, dead_letter=tmp_path / "letters" / "dead.jsonl")
    letters = [json.loads(line) for line in (tmp_path / "letters" / "dead.jsonl").read_text().splitlines()]
    assert report.bad == 2
    assert letters == [
        {"source": str(source), "line": 3, "problem": "expected a JSON object, got [1, 2]", "row": "[1, 2]"},
        {"source": str(source), "line": 4, "problem": "no text", "row": {"id": "x", "category": "c"}},
    ]


def test_documents_that_cannot_be_embedded_go_there_too(index, tmp_path):
    source = written(tmp_path / "rows.jsonl", *numbered(20, trap=7))
    index(source, LetterEncoder(unreadable="TRAP"), dead_letter=tmp_path / "dead.jsonl")
    (letter,) = [json.loads(line) for line in (tmp_path / "dead.jsonl").read_text().splitlines()]
    assert (letter["line"], letter["problem"], letter["row"]["id"]) == (8, "a text has the word TRAP", "7")
    assert len(contents(tmp_path)) == 19


def test_a_dead_letter_file_is_written_anew_by_every_run(index, tmp_path):
    source = written(tmp_path / "rows.jsonl", *numbered(2), "nonsense")
    for _ in range(2):
        index(source, dead_letter=tmp_path / "dead.jsonl")
    assert len((tmp_path / "dead.jsonl").read_text().splitlines()) == 1


def test_what_is_in_the_dead_letter_file_can_be_mended_and_indexed(index, tmp_path):
    index(written(tmp_path / "rows.jsonl", *numbered(2), '{"id": "x", "category": "c"}'), dead_letter=tmp_path / "dead.jsonl")
    row = json.loads((tmp_path / "dead.jsonl").read_text())["row"]
    report = index(written(tmp_path / "mended.jsonl", json.dumps({**row, "text": "mended"})))
    assert (report.added, report.documents) == (1, 3)


def test_the_source_is_no_dead_letter_file(index, tmp_path):
    source = written(tmp_path / "rows.jsonl", *numbered(2))
    with pytest.raises(InputError, match="is the source or a folder"):
        index(source, dead_letter=source)
    assert source.stat().st_size


# -- runs that stop -----------------------------------------------------------------------------------------------------


def test_a_first_run_that_commits_nothing_leaves_no_folder(index, tmp_path):
    source = written(tmp_path / "rows.jsonl", *numbered(20, trap=7))
    with pytest.raises(InputError, match="the word TRAP"):
        index(source, LetterEncoder(unreadable="TRAP"))
    assert not (tmp_path / "kb").exists()


def test_a_run_that_stopped_says_how_to_go_on_and_goes_on(index, tmp_path):
    said: list[str] = []
    source = written(tmp_path / "rows.jsonl", *numbered(50, trap=37))
    with pytest.raises(InputError, match="the word TRAP"):
        index(source, LetterEncoder(unreadable="TRAP"), batch=10, say=said.append)
    assert said[-1] == "stopped: 30 documents are committed, and the same command goes on from there"
    report = index(source, LetterEncoder(log=tmp_path / "log"), batch=10)
    assert (report.added, report.unchanged) == (20, 30)
    assert {int(line.split()[0]) for line in (tmp_path / "log").read_text().splitlines()} == set(range(30, 50))


def test_a_commit_that_fails_ends_the_run_and_the_next_goes_on(index, tmp_path, monkeypatch):
    source = written(tmp_path / "rows.jsonl", *numbered(50))
    commits = iter([True, True, False])
    commit = KnowledgeBase.commit

    def failing(base: KnowledgeBase, *what: Any) -> None:
        if not next(commits):
            raise KnowledgeBaseError("no space left on device")
        commit(base, *what)

    with monkeypatch.context() as patch:
        patch.setattr(KnowledgeBase, "commit", failing)
        with pytest.raises(KnowledgeBaseError, match="no space left"):
            index(source, batch=10)
    assert len(contents(tmp_path)) == 20
    assert (index(source).added, len(contents(tmp_path))) == (30, 50)


CHILD = """
import sys; from pathlib import Path
from gemma_rag import ingestion; from gemma_rag.encoders import EncoderSettings; from tests.letters import LetterEncoder
source, out, log = sys.argv[1:]
ingestion.load_encoder = lambda settings: LetterEncoder(Path(log))
print("ready", flush=True)
ingestion.index_source(Path(source), Path(out), settings=EncoderSettings(model="letters"), batch=20, skip_bad=True)
"""


@pytest.mark.slow
def test_whenever_a_run_is_killed_the_next_goes_on_and_nothing_is_lost_or_embedded_twice(tmp_path):
    source = written(tmp_path / "rows.jsonl", *numbered(1000))

    def start(out: Path, log: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CHILD, str(source), str(out), str(log)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    started = time.perf_counter()
    with start(tmp_path / "whole", tmp_path / "whole.log") as process:
        assert process.wait(timeout=120) == 0
    longest = time.perf_counter() - started
    expected = entries(tmp_path / "whole")
    moments = random.Random(23)
    found: set[int] = set()
    for i in range(10):
        out, log = tmp_path / str(i), tmp_path / f"{i}.log"
        with start(out, log) as process:
            try:
                process.wait(timeout=moments.uniform(0, longest))
            except subprocess.TimeoutExpired:
                process.kill()
        committed = 0
        if out.exists():
            with KnowledgeBase.open(out, verify=True) as base:
                committed = len(base)
        assert committed % 20 == 0
        with start(out, log) as process:
            assert process.wait(timeout=120) == 0
        assert entries(out) == expected
        times = Counter(int(line.split()[0]) for line in log.read_text().splitlines() if line[0].isdigit())
        assert set(times) == set(range(1000))
        assert sum(times.values()) <= 1020  # the block that was under way
        found.add(committed)
    assert len(found) > 1  # the kills came at different moments


@pytest.mark.allow_hosts(["127.0.0.1"])
@pytest.mark.parametrize(("engine", "module"), [("milvus", "milvus_lite"), ("chroma", "chromadb")])
def test_a_run_into_a_database_goes_on_and_replaces_too(index, tmp_path, engine, module):
    pytest.importorskip(module, reason=f"{module} is not installed: indexing into {engine} is not tested")
    source = written(tmp_path / "rows.jsonl", *numbered(50, trap=37))
    address = EngineAddress(name=engine, uri=str(tmp_path / "vectors.db"))
    with pytest.raises(InputError, match="the word TRAP"):
        index(source, LetterEncoder(unreadable="TRAP"), batch=10, engine=address)
    report = index(source, LetterEncoder(log=tmp_path / "log"), batch=10)
    assert (report.added, report.unchanged, report.documents, report.categories) == (20, 30, 50, 5)
    assert {int(line.split()[0]) for line in (tmp_path / "log").read_text().splitlines()} == set(range(30, 50))
    report = index(written(source, *numbered(40)), replace=True)
    assert (report.updated, report.deleted, report.documents) == (1, 10, 40)


# -- arguments ----------------------------------------------------------------------------------------------------------


def test_a_knowledge_base_keeps_its_engine(index, tmp_path):
    source = written(tmp_path / "rows.jsonl", *numbered(5))
    index(source)
    with pytest.raises(InputError, match="is kept by faiss, and another engine was asked for"):
        index(source, engine=EngineAddress(name="milvus", uri="http://localhost:19530"))


def test_a_folder_is_not_its_own_database(index, tmp_path):
    source = written(tmp_path / "rows.jsonl", *numbered(5))
    with pytest.raises(InputError, match="name another --uri"):
        index(source, engine=EngineAddress(name="chroma", uri=str(tmp_path / "kb")))


def test_the_engine_that_it_has_may_be_named(index, tmp_path):
    source = written(tmp_path / "rows.jsonl", *numbered(5))
    index(source)
    assert index(source, engine=EngineAddress(name="faiss")).unchanged == 5


@pytest.mark.parametrize("options", [{"workers": 0}, {"batch": 0}])
def test_nothing_is_refused_as_a_number(index, tmp_path, options):
    with pytest.raises(InputError, match="at least 1"):
        index(written(tmp_path / "rows.jsonl", *numbered(5)), **options)
    assert not (tmp_path / "kb").exists()
