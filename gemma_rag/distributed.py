"""Embedding on the machines of a Ray cluster, with Ray Data (extra ``ray``).

A reader on the machine of the source cuts it into blocks; actors, one for each GPU where there are any, fetch blocks by
their number, cut the documents into chunks and embed them; this process commits what comes back, in order. A block is made
again from its number alone, so when something dies on the way, Ray does that block again and nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from gemma_rag.bulk import NOTHING, Block, Embedded, Embedder, Pace, embed_block, in_blocks
from gemma_rag.chunking import Chunker
from gemma_rag.documents import Chunk, Document
from gemma_rag.encoders import Encoder, Space
from gemma_rag.errors import InputError, KnowledgeBaseError, MissingExtra, without_secrets
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.loading import DocumentStream
from gemma_rag.workers import TRIES, Load, answer, checked

BATCH = 512
"""Documents of a block, where nobody says how many: reader and committer have to cut the source alike."""
_KEPT = 16
"""Blocks that the reader keeps after it gave them out."""
_CORES = 4
"""Of an actor that has no GPU."""

_Row: TypeAlias = dict[str, Any]
_Mask: TypeAlias = npt.NDArray[np.bool_]


def embedded_by_ray(
    base: KnowledgeBase, stream: DocumentStream, load: Load, chunker: Chunker, skip: bool, batch: int, actors: int | None
) -> Embedder:
    """Embed on a Ray cluster: the one of ``RAY_ADDRESS``, or that was started on this machine, or one of its own.

    gemma-rag, and the model where it is a folder, have to be on every machine; the source on this one only.

    Args:
        base: Says which documents need to be embedded; nothing is written to it.
        stream: The source; it is read twice more, and the blocks given have to come from it.
        load: Loads the encoder in each actor.
        chunker: Cuts the documents.
        skip: Refuse documents that cannot be embedded, and go on with the others.
        batch: Documents of a block, as for the blocks given.
        actors: How many at most. None: as many as there are GPUs, or one for every four CPU cores.

    Raises:
        MissingExtra: Ray is not installed.
        KnowledgeBaseError: The cluster failed, or a block ended three actors.
    """
    if actors is not None and actors < 1:
        raise InputError(f"there must be at least 1 worker, and {actors} were asked for")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtra("Ray, which --distributed runs on,", "ray") from error

    def run(blocks: Iterable[Block]) -> Iterator[tuple[Block, Embedded]]:
        work = _work(base, copy.copy(stream), batch)
        with contextlib.ExitStack() as stack:
            results: Iterator[_Row] = iter(())
            if work:
                stack.enter_context(_cluster(ray))
                settings = _Settings(load, base.space, chunker, skip)
                results = stack.enter_context(contextlib.closing(_results(ray, stream, work, settings, batch, actors)))
            for number, block in enumerate(blocks):
                todo = block.change.to_embed
                row = next(results) if number in work else None
                if row is not None and row["names"] == _names(todo):
                    yield block, _unpacked(row, base.space.dimensions)
                elif todo:  # the source or the knowledge base has changed since they were compared
                    yield block, embed_block(todo, base.encoder, chunker, skip)
                else:
                    yield block, NOTHING

    return run


class _Settings(NamedTuple):
    """What an actor needs to know."""

    load: Load
    space: Space
    chunker: Chunker
    skip: bool


class _Reader:
    """Cuts the source into blocks, and gives those with documents to embed out by their number.

    Actors ask for blocks nearly in order. The last ones are kept, for an actor that takes over from one that died; an older
    one is found again by reading from the beginning.
    """

    def __init__(self, stream: DocumentStream, work: Mapping[int, _Mask], batch: int) -> None:
        self._stream, self._work, self._batch = stream, work, batch
        self._asked: Counter[int] = Counter()
        self._problem: Exception | None = None
        self._start()

    def block(self, number: int) -> list[Document]:
        """Documents to embed.

        Raises:
            KnowledgeBaseError: Whoever asked for it has died, too often: Ray itself would go on for ever.
        """
        self._asked[number] += 1
        documents = self._found(number)
        if self._asked[number] > TRIES:
            raise KnowledgeBaseError(
                f"the block of {len(documents)} documents from {documents[0].id!r} to {documents[-1].id!r} has ended {TRIES} "
                "actors; what came before it is committed"
            )
        return documents

    def take(self, problem: Exception) -> None:
        """Keep what ended the work of an actor."""
        self._problem = self._problem or problem

    def problem(self) -> Exception | None:
        """What was taken first."""
        return self._problem

    def _found(self, number: int) -> list[Document]:
        if number < self._next and number not in self._ahead and number not in self._given:
            self._start()
        while self._next <= number:
            rows = next(self._blocks, [])
            if self._next in self._work:
                documents = [row.document for row in rows if row.document is not None]
                mask = self._work[self._next]
                self._ahead[self._next] = [document for document, todo in zip(documents, mask, strict=False) if todo]
            self._next += 1
        if number in self._ahead:
            self._given[number] = self._ahead.pop(number)
        while len(self._given) > _KEPT:
            del self._given[next(iter(self._given))]
        return self._given[number]

    def _start(self) -> None:
        self._ahead: dict[int, list[Document]] = {}
        self._given: dict[int, list[Document]] = {}
        self._next = 0
        self._blocks = in_blocks(self._stream, Pace(self._batch), lambda row: None)


class _Embedding:
    """An actor of the pool."""

    def __init__(self, reader: Any, settings: _Settings) -> None:
        self._reader, self._settings = reader, settings
        self._encoder: Encoder | None = None  # loaded with the first block

    def __call__(self, row: _Row) -> _Row:
        import ray

        made = answer(partial(self._embed, row["number"]))
        if isinstance(made, Exception):  # Ray would hand on its text alone
            ray.get(self._reader.take.remote(made))
            return {"failed": True, "names": "", "chunks": "", "vectors": b"", "refused": ""}
        return {"failed": False, **made}

    def _embed(self, number: int) -> _Row:
        import ray

        if self._encoder is None:
            self._encoder = checked(self._settings.load, self._settings.space)
        try:
            documents = ray.get(self._reader.block.remote(number))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        result = embed_block(documents, self._encoder, self._settings.chunker, self._settings.skip)
        return {
            "names": _names(documents),
            "chunks": json.dumps([[chunk.model_dump() for chunk in pieces] for pieces in result.chunks]),
            "vectors": np.ascontiguousarray(result.vectors, dtype="<f4").tobytes(),
            "refused": json.dumps(result.refused),
        }


def _names(documents: Sequence[Document]) -> str:
    return json.dumps([[document.id, document.content_hash] for document in documents])


def _unpacked(row: _Row, dimensions: int) -> Embedded:
    chunks = [[Chunk.model_validate(chunk) for chunk in pieces] for pieces in json.loads(row["chunks"])]
    vectors = np.frombuffer(row["vectors"], dtype="<f4").reshape(-1, dimensions)
    return Embedded(chunks, vectors, json.loads(row["refused"]))


def _work(base: KnowledgeBase, stream: DocumentStream, batch: int) -> dict[int, _Mask]:
    """The blocks with documents to embed, by number: for each document whether it is one."""
    work = {}
    for number, rows in enumerate(in_blocks(stream, Pace(batch), lambda row: None)):
        documents = [row.document for row in rows if row.document is not None]
        todo = {document.id for document in base.changes(documents).to_embed}
        if todo:
            work[number] = np.array([document.id in todo for document in documents])
    return work


@contextlib.contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    """Be connected to a cluster; to the one of the caller, where there is a connection already."""
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it tells of every step; we have a progress of our own
    own = not ray.is_initialized()
    if own:
        try:
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise KnowledgeBaseError(
                f"the Ray cluster cannot be reached: {without_secrets(str(error))}. Look at RAY_ADDRESS, and whether the "
                "cluster runs the same Ray and Python"
            ) from error
    try:
        yield
    finally:
        logger.setLevel(level)
        if own:
            ray.shutdown()


def _results(
    ray: Any, stream: DocumentStream, work: Mapping[int, _Mask], settings: _Settings, batch: int, actors: int | None
) -> Generator[_Row, None, None]:
    """What the actors made of each block, in order."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # where the source is
    reader = (
        ray.remote(_Reader)
        .options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)
        .remote(stream, dict(work), batch)
    )
    most, resources = _pool(ray)
    size = min(actors or most, most, len(work))
    numbers = ray.data.from_items([{"number": number} for number in work], override_num_blocks=len(work))
    embedded = numbers.map(
        _Embedding,
        fn_constructor_args=(reader, settings),
        compute=ray.data.ActorPoolStrategy(size=size),
        **resources,
    )
    embedded.context.execution_options.preserve_order = True
    embedded.context.enable_progress_bars = False
    try:
        for row in embedded.iter_rows():
            if row["failed"]:
                raise ray.get(reader.problem.remote())
            yield row
    except ray.exceptions.RayError as error:
        lines = without_secrets(str(error)).strip().splitlines() or [type(error).__name__]
        raise KnowledgeBaseError(f"the Ray cluster failed; what was committed stands: {lines[-1]}") from error
    finally:
        ray.kill(reader)


def _pool(ray: Any) -> tuple[int, dict[str, float]]:
    """How many actors the cluster has room for, and what each of them takes."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if gpus := int(sum(node.get("GPU", 0) for node in nodes)):
        return gpus, {"num_gpus": 1}
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1] or [1]
    each = min(_CORES, *cores)
    return sum(count // each for count in cores), {"num_cpus": each}
