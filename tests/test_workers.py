"""Embedding in several processes, some of which die."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from gemma_rag.bulk import Block, embedded_here
from gemma_rag.chunking import Chunker
from gemma_rag.embedding import Change
from gemma_rag.encoders import Encoder
from gemma_rag.errors import InputError, KnowledgeBaseError, ModelUnavailable, SpaceMismatch
from gemma_rag.loading import StreamedRow
from gemma_rag.workers import embedded_by_workers

from .letters import LetterEncoder, broken, no_model, numbered

ROOT = Path(__file__).parent.parent
SPACE = LetterEncoder().space


@pytest.fixture(autouse=True)
def _workers_find_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """They import it by its name, which is tests.letters, from a path that they are told."""
    monkeypatch.syspath_prepend(str(ROOT))


def blocks(count: int = 60, trap: int | None = None, kept: bool = False) -> list[Block]:
    """Documents in blocks of ten."""
    documents = numbered(count, trap)
    return [
        Block(
            [StreamedRow("rows.jsonl", i + k + 1, document) for k, document in enumerate(documents[i : i + 10])],
            Change([] if kept else documents[i : i + 10], {}, [], set(), 10 if kept else 0),
        )
        for i in range(0, count, 10)
    ]


def by_workers(load: Callable[[], Encoder], given: list[Block], *, workers: int = 2, skip: bool = False) -> list[np.ndarray]:
    """The vectors of each block, after comparing that blocks came back in order."""
    found = list(embedded_by_workers(load, SPACE, Chunker(), skip, workers)(given))
    assert [block for block, _ in found] == given
    return [result.vectors for _, result in found]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_make_the_vectors_that_this_process_makes(workers):
    expected = [result.vectors for _, result in embedded_here(LetterEncoder(), Chunker(), False)(blocks())]
    found = by_workers(LetterEncoder, blocks(), workers=workers)
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_blocks_with_nothing_to_embed_pass_through():
    assert [len(vectors) for vectors in by_workers(LetterEncoder, blocks(kept=True))] == [0] * 6


def test_no_more_blocks_are_read_ahead_than_twice_the_workers():
    given = blocks(100)
    read: list[Block] = []
    run = embedded_by_workers(LetterEncoder, SPACE, Chunker(), False, 2)(read.append(block) or block for block in given)
    next(run)
    assert len(read) <= 5
    run.close()


def test_a_worker_that_dies_costs_its_block_only(tmp_path):
    load = partial(LetterEncoder, log=tmp_path / "log", trap=tmp_path / "trap")
    found = by_workers(load, blocks(trap=23))
    assert [len(vectors) for vectors in found] == [10] * 6
    times = Counter(int(line.split()[0]) for line in (tmp_path / "log").read_text().splitlines())
    assert {number for number, count in times.items() if count == 2} == set(range(20, 30))
    assert len(times) == 60


def test_a_block_that_ends_every_worker_ends_the_run_and_is_named():
    with pytest.raises(KnowledgeBaseError, match=r"block of 10 documents from rows.jsonl:21 to rows.jsonl:30 has ended 3"):
        by_workers(partial(LetterEncoder, deadly="TRAP"), blocks(trap=23))


def test_what_came_before_a_deadly_block_is_given_out():
    run = embedded_by_workers(partial(LetterEncoder, deadly="TRAP"), SPACE, Chunker(), False, 1)(blocks(trap=23))
    assert [len(next(run)[1].vectors) for _ in range(2)] == [10, 10]
    run.close()


def test_workers_that_die_before_they_are_ready_end_the_run():
    with pytest.raises(KnowledgeBaseError, match=r"end before they are ready \(exit code -9, as when memory is short"):
        by_workers(broken, blocks())


def test_an_error_of_ours_in_a_worker_is_raised_as_it_is():
    with pytest.raises(InputError, match="a text has the word TRAP"):
        by_workers(partial(LetterEncoder, unreadable="TRAP"), blocks(trap=23))


def test_a_model_that_cannot_be_had_is_raised_as_it_is():
    with pytest.raises(ModelUnavailable, match="not here"):
        by_workers(no_model, blocks())


def test_a_foreign_error_in_a_worker_is_named_without_secrets():
    with pytest.raises(RuntimeError, match=r"in a worker: TypeError: .*unexpected keyword"):
        by_workers(partial(LetterEncoder, colour="blue"), blocks())


def test_a_worker_with_other_vectors_is_refused():
    with pytest.raises(SpaceMismatch, match="weights: stored '', given 'other'"):
        by_workers(partial(LetterEncoder, weights="other"), blocks())


def test_documents_that_cannot_be_embedded_are_refused_alone():
    run = embedded_by_workers(partial(LetterEncoder, unreadable="TRAP"), SPACE, Chunker(), True, 2)
    refused = [result.refused for _, result in run(blocks(trap=23))]
    assert refused == [{}, {}, {"23": "a text has the word TRAP"}, {}, {}, {}]


def test_no_worker_is_refused():
    with pytest.raises(InputError, match="at least 1 worker, and 0"):
        embedded_by_workers(LetterEncoder, SPACE, Chunker(), False, 0)


CHILD = """
import multiprocessing, sys
from gemma_rag.chunking import Chunker; from gemma_rag.workers import embedded_by_workers
from tests.letters import LetterEncoder; from tests.test_workers import SPACE, blocks
run = embedded_by_workers(LetterEncoder, SPACE, Chunker(), False, 2)(blocks())
next(run)
print(*[process.pid for process in multiprocessing.active_children()], flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="only Linux tells when a process ends that is not a child")
def test_workers_end_when_the_process_that_started_them_is_killed():
    command = [sys.executable, "-c", CHILD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        workers = [os.pidfd_open(int(number)) for number in process.stdout.readline().split()]
        process.kill()
    poll = select.poll()
    for worker in workers:
        poll.register(worker, select.POLLIN)
    ended = set()
    while len(ended) < len(workers) and (found := poll.poll(30_000)):
        for worker, _ in found:
            ended.add(worker)
            poll.unregister(worker)
    for worker in workers:
        os.close(worker)
    assert (len(workers), ended) == (2, set(workers))
