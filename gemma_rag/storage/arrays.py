"""Named arrays in one file that is written once and memory-mapped: a line that says what it is, a table in JSON, the bytes.

Nothing in such a file is evaluated or unpickled: the table is plain JSON, and every array has one of a few number types.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from gemma_rag.errors import KnowledgeBaseError
from gemma_rag.storage.files import sync

Array: TypeAlias = npt.NDArray[Any]

CURE = "Restore it from a copy, or index the documents anew"
"""What to do about a damaged file."""

_MAGIC = b"gemma-rag arrays 1\n"
_LENGTH = 8  # bytes of the number that says how long the table is
_DIGEST = 8  # bytes of the table's own checksum, so that it can be trusted without reading the arrays
_BEFORE = len(_MAGIC) + _LENGTH + _DIGEST
_ALIGNED = 64
_LONGEST_TABLE = 1 << 20
_TYPES = ("<f4", "<f2", "|i1", "<i4", "<i8", "<u2", "<u4", "<u8")


class Blocks(NamedTuple):
    """An array that is too large to be held: its type, its shape, and its rows, some at a time."""

    dtype: str
    shape: tuple[int, ...]
    rows: Iterable[Array]


def write_arrays(file: Path, arrays: Mapping[str, Array | Blocks]) -> str:
    """Write a file; it is on the disk when this returns.

    Args:
        file: Where; nothing is there yet.
        arrays: What goes in.

    Returns:
        SHA-256 of the file, in hexadecimal.
    """
    parts = {name: part if isinstance(part, Blocks) else _whole(part) for name, part in arrays.items()}
    table, at = {}, 0
    for name, part in parts.items():
        table[name] = [part.dtype, list(part.shape), at]
        at = _aligned(at + _size(part.dtype, part.shape))
    text = json.dumps(table).encode()
    text += b" " * (_aligned(_BEFORE + len(text)) - _BEFORE - len(text))
    digest = hashlib.sha256()
    with file.open("wb") as stream:

        def put(data: Any) -> None:
            stream.write(data)
            digest.update(data)

        put(_MAGIC + len(text).to_bytes(_LENGTH, "little") + _digest(text) + text)
        for part in parts.values():
            size = 0
            for rows in part.rows:
                plain = np.ascontiguousarray(rows, dtype=part.dtype)
                put(plain.reshape(-1).view(np.uint8).data)
                size += plain.nbytes
            if size != _size(part.dtype, part.shape):
                raise KnowledgeBaseError(f"{size} bytes came for an array of {part.dtype} of shape {part.shape}")
            put(bytes(_aligned(size) - size))
        stream.flush()
        sync(stream.fileno())
    return digest.hexdigest()


def read_arrays(file: Path) -> dict[str, Array]:
    """Map a file into memory; only its table is read.

    Raises:
        KnowledgeBaseError: It is missing, too short or too long, or does not start as `write_arrays` has it start.
    """
    try:
        with file.open("rb") as stream:
            if stream.read(len(_MAGIC)) != _MAGIC:
                raise KnowledgeBaseError(f"{file} is damaged: it does not start as a file of vectors does. {CURE}")
            length = int.from_bytes(stream.read(_LENGTH), "little")
            digest = stream.read(_DIGEST)
            text = stream.read(length) if length <= _LONGEST_TABLE else b""
            if _digest(text) != digest:
                raise KnowledgeBaseError(f"{file} is damaged: its table of arrays has another checksum. {CURE}")
            size = stream.seek(0, 2)
            entries = dict(_entries(text))
            first = _BEFORE + length
            ends = [at + _aligned(_size(kind, shape)) for kind, shape, at in entries.values()]
            if size != first + max(ends, default=0):
                raise KnowledgeBaseError(f"{file} is damaged: it has {size} bytes, too few or too many. {CURE}")
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise KnowledgeBaseError(f"{file} is missing or cannot be read: {error}. {CURE}") from error
    except (ValueError, TypeError, KeyError, RecursionError):
        raise KnowledgeBaseError(f"{file} is damaged: its table of arrays cannot be read. {CURE}") from None
    return {
        name: np.frombuffer(mapped, dtype=kind, count=int(np.prod(shape)), offset=first + at).reshape(shape)
        if np.prod(shape)
        else np.zeros(shape, dtype=kind)
        for name, (kind, shape, at) in entries.items()
    }


def read_here_and_there(array: Array) -> None:
    """Tell the system that few rows of a mapped array will be read, so that it reads no others along with them.

    Without it a row of a few kilobytes brings its whole neighbourhood into memory. Nothing happens where the array is not
    mapped, or the system cannot be told.
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    if not isinstance(base, mmap.mmap) or not array.nbytes or not hasattr(mmap, "MADV_RANDOM"):
        return
    begin = array.ctypes.data - np.frombuffer(base, dtype=np.uint8).ctypes.data
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (begin + array.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0:
        base.madvise(mmap.MADV_RANDOM, first, length)


def _entries(text: bytes) -> Iterator[tuple[str, tuple[str, tuple[int, ...], int]]]:
    for name, (kind, shape, at) in json.loads(text).items():
        if kind not in _TYPES or not all(type(number) is int and number >= 0 for number in (*shape, at)):
            raise ValueError(name)
        yield name, (kind, tuple(shape), at)


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=_DIGEST).digest()


def _whole(array: Array) -> Blocks:
    return Blocks(array.dtype.newbyteorder("<").str, array.shape, [array])


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _size(kind: str, shape: tuple[int, ...]) -> int:
    return int(np.dtype(kind).itemsize * np.prod(shape, dtype=np.int64))
