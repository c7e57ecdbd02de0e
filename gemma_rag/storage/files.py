"""Files under a store: one writer at a time, on the disk before anyone is told, and whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from gemma_rag.errors import KnowledgeBaseError

LOCK = "lock"
BUSY_SECONDS = 30.0
"""How long to wait for another process, at the lock and at the database."""


def connect(file: Path, *, new: bool = False) -> sqlite3.Connection:
    """Open an SQLite file for reading and, where its permissions allow, for writing.

    Raises:
        KnowledgeBaseError: It is missing, or no SQLite file.
    """
    if not new and not file.is_file():
        raise KnowledgeBaseError(f"{file} is missing. Restore it from a copy, or index the documents anew")
    writable = new or (os.access(file, os.W_OK) and os.access(file.parent, os.W_OK))
    mode = "rwc" if new else "rw" if writable else "ro"
    connection = None
    try:
        connection = sqlite3.connect(
            f"{file.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=BUSY_SECONDS,
            check_same_thread=False,
            isolation_level=None,
        )
        if writable:
            connection.execute("PRAGMA journal_mode=DELETE")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA secure_delete=ON")
        connection.execute("SELECT count(*) FROM sqlite_master")
    except (sqlite3.DatabaseError, ValueError) as error:  # a damaged schema's own message may be no UTF-8
        if connection is not None:
            connection.close()
        raise KnowledgeBaseError(
            f"{file} cannot be used: {error}. Restore it from a copy, or index the documents anew"
        ) from error
    return connection


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock file, which the system lets go of when the process dies.

    Raises:
        KnowledgeBaseError: Another process holds it for too long, or it cannot be made.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(file, timeout=BUSY_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        raise KnowledgeBaseError(f"another process is writing to {file.parent}: try again when it is done") from None
    except OSError as error:
        raise KnowledgeBaseError(f"{file.parent} cannot be written: {error}") from error
    try:
        yield
    finally:
        lock.release()


def remove_abandoned(folder: Path) -> None:
    """Remove what a killed `Store.save` left, unless another process is still at it."""
    from filelock import FileLock, Timeout

    with contextlib.suppress(Timeout, OSError), FileLock(folder / LOCK, timeout=0):
        shutil.rmtree(folder, ignore_errors=True)


def sync(descriptor: int) -> None:
    """Wait until the disk has a file."""
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder (POSIX; elsewhere the system sees to it)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_file(file: Path, text: str) -> None:
    """Put a text in the place of a file, all of it or, after a kill, none of it."""
    scratch = file.with_name(f"{file.name}.new")
    with scratch.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        sync(stream.fileno())
    scratch.replace(file)
    sync_folder(file.parent)


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def canonical_json(value: object) -> str:
    """JSON that is the same for equal values."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
