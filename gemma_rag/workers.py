"""Embedding in several processes on this machine. A worker that dies costs its block only: another one does it again."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeAlias

from gemma_rag.bulk import NOTHING, Block, Embedded, Embedder, embed_block
from gemma_rag.chunking import Chunker
from gemma_rag.encoders import Encoder, Space
from gemma_rag.errors import GemmaRagError, InputError, KnowledgeBaseError, SpaceMismatch, without_secrets

TRIES = 3
"""How often a block may end its worker before the run ends too."""

Load: TypeAlias = Callable[[], Encoder]


def embedded_by_workers(load: Load, space: Space, chunker: Chunker, skip: bool, workers: int) -> Embedder:
    """Embed in processes that each load the encoder; blocks come back in order.

    Args:
        load: Loads the encoder; called in each process, so it has to be picklable.
        space: What the vectors have to be of.
        chunker: Cuts the documents.
        skip: Refuse documents that cannot be embedded, and go on with the others.
        workers: How many processes. On a machine with several GPUs each gets one of them, in turn.

    Raises:
        InputError: `workers` is less than 1; or as `embed_block` raises it.
        SpaceMismatch: A worker loaded an encoder of another space.
        KnowledgeBaseError: A block has ended three workers, or workers die before they are ready.
    """
    if workers < 1:
        raise InputError(f"there must be at least 1 worker, and {workers} were asked for")
    gpus, threads = _gpus(), max(1, _cores() // workers)

    def start(number: int) -> _Worker:
        gpu = gpus[number % len(gpus)] if len(gpus) > 1 else None
        return _Worker(partial(_prepared, gpu, threads, load), space, chunker, skip)

    def run(blocks: Iterable[Block]) -> Iterator[tuple[Block, Embedded]]:
        pool = _Pool(start, workers)
        try:
            yield from pool.run(blocks)
        finally:
            pool.close()

    return run


@dataclass(eq=False)
class _Job:
    block: Block
    tries: int = 0
    result: Embedded | None = None


class _Worker:
    """A process, and what it is doing."""

    def __init__(self, load: Load, space: Space, chunker: Chunker, skip: bool) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy the threads of torch, halfway through something
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, load, space, chunker, skip), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the connection
        self.ready = False
        self.job: _Job | None = None

    def give(self, job: _Job) -> None:
        self.job = job
        with contextlib.suppress(OSError):  # it has died; that is seen when we wait for it
            self.connection.send(job.block.change.to_embed)

    def close(self) -> None:
        self.connection.close()
        if self.process.is_alive():
            self.process.terminate()
        self.process.join()


class _Pool:
    """Workers, and the blocks that are on their way: at most two for each worker."""

    def __init__(self, start: Callable[[int], _Worker], workers: int) -> None:
        self._start = start
        self._workers = [start(number) for number in range(workers)]
        self._queue: deque[_Job] = deque()
        self._early_deaths = 0

    def run(self, blocks: Iterable[Block]) -> Iterator[tuple[Block, Embedded]]:
        rest = iter(blocks)
        under_way: deque[_Job] = deque()
        most = 2 * len(self._workers)
        more = True
        while more or under_way:
            while more and len(under_way) < most:
                if (block := next(rest, None)) is None:
                    more = False
                else:
                    under_way.append(self._take(block))
                    self._assign()
            while under_way and (result := under_way[0].result) is not None:
                yield under_way.popleft().block, result
            if under_way and (not more or len(under_way) == most):
                self._wait()

    def close(self) -> None:
        for worker in self._workers:
            worker.close()

    def _take(self, block: Block) -> _Job:
        job = _Job(block)
        if block.change.to_embed:
            self._queue.append(job)
        else:
            job.result = NOTHING
        return job

    def _assign(self) -> None:
        for worker in self._workers:
            if self._queue and worker.ready and worker.job is None:
                worker.give(self._queue.popleft())

    def _wait(self) -> None:
        """Wait until a worker says something or dies."""
        ready = wait([worker.connection for worker in self._workers])
        for number, worker in enumerate(self._workers):
            if worker.connection in ready:
                try:
                    said = worker.connection.recv()
                except (EOFError, OSError):
                    self._replace(number)
                else:
                    self._listen(worker, said)
        self._assign()

    def _listen(self, worker: _Worker, said: Any) -> None:
        if isinstance(said, Exception):
            raise said
        if worker.job is not None:
            worker.job.result, worker.job = said, None
        worker.ready, self._early_deaths = True, 0

    def _replace(self, number: int) -> None:
        worker = self._workers[number]
        worker.process.join()
        ended = f"exit code {worker.process.exitcode}" + (", as when memory is short" if worker.process.exitcode == -9 else "")
        if (job := worker.job) is not None:
            job.tries += 1
            if job.tries >= TRIES:
                raise KnowledgeBaseError(f"{job.block} has ended {TRIES} workers ({ended}); what came before it is committed")
            self._queue.appendleft(job)
        else:
            self._early_deaths += 1
            if self._early_deaths >= TRIES:
                raise KnowledgeBaseError(f"workers end before they are ready ({ended}): try fewer of them with --workers")
        worker.close()
        self._workers[number] = self._start(number)


# In the worker


def _work(connection: Connection, load: Load, space: Space, chunker: Chunker, skip: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the first one decides
    with contextlib.suppress(EOFError, OSError):  # whoever started it has gone
        encoder = answer(partial(checked, load, space))
        connection.send(encoder if isinstance(encoder, Exception) else None)
        while not isinstance(encoder, Exception):
            connection.send(answer(partial(embed_block, connection.recv(), encoder, chunker, skip)))


def answer(work: Callable[[], Any]) -> Any:
    """What work returns or raises, as something that can be sent."""
    try:
        return work()
    except GemmaRagError as error:
        return error
    except Exception as error:  # of any library, and perhaps not to be sent: the worker lives on, and the run ends with it
        return RuntimeError(f"in a worker: {type(error).__name__}: {without_secrets(str(error))}")


def checked(load: Load, space: Space) -> Encoder:
    """Load an encoder, and refuse one of another space."""
    encoder = load()
    if differences := space.differences(encoder.space):
        raise SpaceMismatch(differences)
    return encoder


def _prepared(gpu: str | None, threads: int, load: Load) -> Encoder:
    """Load the encoder with this process's share of the machine, which torch reads from the environment when it is imported."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    return load()


def _gpus() -> list[str]:
    """What CUDA calls the GPUs that may be used, without asking it: that would make a context on one of them."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    cards = Path("/proc/driver/nvidia/gpus")
    return [str(i) for i, _ in enumerate(cards.iterdir())] if cards.is_dir() else []


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
