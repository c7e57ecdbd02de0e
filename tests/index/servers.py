"""Vector databases for the tests: each in a process of its own, on a free port, and gone when the tests are."""

from __future__ import annotations

import contextlib
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from ..real_server import _PATIENCE, RealServer, _free_port, _running  # noqa: TID252 - no package has a name here

COMMANDS = {
    "chroma": ("chromadb", "chroma run --host 127.0.0.1 --port {port} --path {folder}"),
    "milvus": ("milvus_lite", "milvus-lite server --host 127.0.0.1 --port {port} --data-dir {folder}"),
}


def why_not(engine: str) -> str:
    """Why a server cannot be started here, or nothing."""
    module, command = COMMANDS[engine]
    if find_spec(module) is None:
        return f"{module} is not installed: no server of {engine} is tested"
    return "" if program(command.split()[0]) else f"there is no program {command.split()[0]}: no server of {engine} is tested"


def program(name: str) -> str | None:
    """A program beside this Python."""
    return shutil.which(name, path=str(Path(sys.executable).parent))


@contextlib.contextmanager
def serving(engine: str, folder: Path) -> Iterator[RealServer]:
    """A server that answers, with its data in a folder."""
    first, *words = COMMANDS[engine][1].split()
    port = _free_port()
    words = [word.format(port=port, folder=folder / "data") for word in words]
    with _running([str(program(first)), *words], port, folder) as server:
        _wait_for(server, port)
        yield server


def _wait_for(server: RealServer, port: int) -> None:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end and server.process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return
        time.sleep(0.05)
    raise RuntimeError(f"no answer from {server.url}:\n{server.printed()[-3000:]}")
