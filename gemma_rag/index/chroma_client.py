"""The way to Chroma: the folders that this process has open, and clients of servers."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from gemma_rag.errors import InputError, KnowledgeBaseError

TOKEN = "GEMMA_RAG_CHROMA_TOKEN"  # noqa: S105 - the name of a variable

_PATIENCE = 5.0
"""Seconds to wait for another process to close a folder."""


class Folders:
    """Folders of embedded Chromas that this process has open, each locked against other processes."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._open: dict[Path, tuple[Any, int]] = {}

    def enter(self, folder: Path) -> None:
        """Open a folder once more.

        Raises:
            KnowledgeBaseError: Another process has it open, or it cannot be made.
        """
        from filelock import FileLock, Timeout

        with self._guard:
            lock, users = self._open.get(folder, (None, 0))
            if lock is None:
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    lock = FileLock(folder / "gemma-rag.lock", timeout=_PATIENCE, thread_local=False)
                    lock.acquire()
                except Timeout:
                    raise KnowledgeBaseError(
                        f"another process has the Chroma folder {folder} open, and an embedded Chroma serves one at a time: "
                        f"close it there, or run `chroma run --path {folder}` and use that server's address"
                    ) from None
                except OSError as error:
                    raise KnowledgeBaseError(f"the Chroma folder {folder} cannot be used: {error}") from error
            self._open[folder] = (lock, users + 1)

    def leave(self, folder: Path) -> None:
        """Let go of it once."""
        with self._guard:
            lock, users = self._open.pop(folder)
            if users > 1:
                self._open[folder] = (lock, users - 1)
            else:
                lock.release()


FOLDERS = Folders()


def connected(uri: str, folder: Path | None) -> Any:
    """A client of Chroma's.

    Args:
        uri: The address of a server; the token comes from the environment.
        folder: Of an embedded one, instead of a server.

    Raises:
        InputError: The address has no host.
    """
    import chromadb
    from chromadb.config import Settings

    settings = Settings(anonymized_telemetry=False)
    if folder is not None:
        return chromadb.PersistentClient(str(folder), settings=settings)
    parts = urlsplit(uri)
    if not parts.hostname:
        raise InputError(f"{uri!r} is no address of a Chroma server: http://host:port is one")
    secure, token, chosen = parts.scheme == "https", os.environ.get(TOKEN), parse_qs(parts.query)
    return chromadb.HttpClient(
        host=parts.hostname,
        port=parts.port or (443 if secure else 8000),
        ssl=secure,
        headers={"x-chroma-token": token, "authorization": f"Bearer {token}"} if token else None,
        settings=settings,
        **{name: chosen[name][0] for name in ("tenant", "database") if name in chosen},
    )
