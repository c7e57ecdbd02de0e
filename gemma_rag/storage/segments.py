"""Vectors in files that are written once and memory-mapped: a segment is one array of vectors and one of their chunks."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gemma_rag.errors import KnowledgeBaseError
from gemma_rag.storage.files import sha256_of, sync
from gemma_rag.storage.manifest import Segment
from gemma_rag.vectors import Floats

Ints: TypeAlias = npt.NDArray[np.int64]


class Segments:
    """The vector files of a store.

    Args:
        path: The store's folder, or None to keep the arrays in memory.
        dimensions: Components of a vector.
    """

    def __init__(self, path: Path | None, dimensions: int) -> None:
        self.path = path
        self.dimensions = dimensions
        self._memory: dict[str, npt.NDArray[Any]] = {}

    def write(self, generation: int, vectors: Floats, chunks: Ints) -> Segment:
        """Write the segment of a generation; it is on the disk when this returns.

        Args:
            generation: Part of the files' names.
            vectors: Shape ``(n, dimensions)``.
            chunks: Shape ``(n,)``: the chunk that each vector belongs to.
        """
        names = (f"vectors-{generation}.npy", f"rows-{generation}.npy")
        sums = ["", ""]
        for i, array in enumerate((np.ascontiguousarray(vectors, dtype="<f4"), chunks.astype("<i8"))):
            if self.path is None:
                self._memory[names[i]] = array
                continue
            with (self.path / names[i]).open("wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                sync(file.fileno())
            sums[i] = sha256_of(self.path / names[i])
        return Segment(vectors=names[0], rows=names[1], count=len(chunks), vectors_sha256=sums[0], rows_sha256=sums[1])

    def gather(self, segments: Sequence[Segment], wanted: Ints, extra: tuple[Ints, Floats] | None = None) -> Floats:
        """The vectors of chunks, in the order asked for; a view of the file where that is the file's own order.

        Args:
            segments: Where to look.
            wanted: Numbers of chunks, shape ``(n,)``.
            extra: Chunks and vectors that are not in a segment yet.

        Raises:
            KnowledgeBaseError: A chunk has no vector, or a file is damaged.
        """
        stored: list[tuple[Ints, Floats]] = [(self._array(s, s.rows), self._array(s, s.vectors)) for s in segments]
        if extra is not None:
            stored.append(extra)
        if len(stored) == 1 and np.array_equal(stored[0][0], wanted):
            return stored[0][1]
        rows = np.concatenate([part[0] for part in stored]) if stored else np.zeros(0, dtype=np.int64)
        order = np.argsort(rows, kind="stable")
        at = np.searchsorted(rows, wanted, sorter=order)
        if len(wanted) and (at.max() >= len(rows) or not np.array_equal(rows[order[at]], wanted)):
            raise KnowledgeBaseError(f"{self.path or 'the knowledge base'} is damaged: chunks without a vector. {CURE}")
        place = order[at] if len(wanted) else at
        out = np.empty((len(wanted), self.dimensions), dtype=np.float32)
        first = 0
        for numbers, vectors in stored:
            inside = (place >= first) & (place < first + len(numbers))
            out[inside] = vectors[place[inside] - first]
            first += len(numbers)
        return out

    def check(self, segments: Sequence[Segment], *, checksums: bool) -> None:
        """Check that every file is there and has its shape, and, where asked, its checksum.

        Raises:
            KnowledgeBaseError: One is not as it was written; the file is named.
        """
        for segment in segments:
            for name, expected in ((segment.vectors, segment.vectors_sha256), (segment.rows, segment.rows_sha256)):
                self._array(segment, name)
                if checksums and self.path is not None and sha256_of(self.path / name) != expected:
                    raise KnowledgeBaseError(f"{self.path / name} is damaged: its checksum is wrong. {CURE}")

    def sweep(self, segments: Sequence[Segment]) -> None:
        """Remove the files of all other segments."""
        kept = {name for segment in segments for name in (segment.vectors, segment.rows)}
        self._memory = {name: array for name, array in self._memory.items() if name in kept}
        if self.path is None:
            return
        for file in [*self.path.glob("vectors-*.npy"), *self.path.glob("rows-*.npy")]:
            if file.name not in kept:
                with contextlib.suppress(OSError):  # a reader on Windows holds it; the next commit tries again
                    file.unlink()

    def _array(self, segment: Segment, name: str) -> Any:
        if self.path is None:
            return self._memory[name]
        file = self.path / name
        shape, kind = ((segment.count, self.dimensions), "<f4") if name == segment.vectors else ((segment.count,), "<i8")
        try:
            with file.open("rb") as stream:
                header = _HEADER.match(stream.read(_LONGEST_HEADER))
            size = file.stat().st_size
        except OSError as error:
            raise KnowledgeBaseError(f"{file} is missing or cannot be read: {error}. {CURE}") from error
        expected = [kind.encode(), *(str(length).encode() for length in shape)]
        if header is None or [group for group in header.groups() if group] != expected:
            raise KnowledgeBaseError(
                f"{file} is damaged: it does not start as an array of {kind} of shape {shape} does. {CURE}"
            )
        if size != header.end() + int(np.prod(shape)) * np.dtype(kind).itemsize:
            raise KnowledgeBaseError(f"{file} is damaged: it has {size} bytes, too few or too many for shape {shape}. {CURE}")
        return np.memmap(file, dtype=kind, mode="r", offset=header.end(), shape=shape)


_LONGEST_HEADER = 256
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(<f4|<i8)', 'fortran_order': False, 'shape': \((\d+), ?(\d*)\), \} *\n", re.DOTALL
)
"""The header that numpy.save writes for our arrays. Ours are read by this pattern and not by numpy.load, which would
evaluate a header's text, open archives and, were it allowed to, unpickle."""

CURE = "Restore it from a copy, or index the documents anew"
"""What to do about a damaged file."""
