"""Real embedding servers for the tests: each in a process of its own, on a free port, and gone when the tests are.

This file is also a program: run as one, it is what stands between pytest and the server, and kills the server as soon as
nobody holds its standard input any more, so that none is left behind even where pytest itself was killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

NAME = "all-minilm"
"""What every server calls its model."""
KEY = "key-of-the-tests"
"""What every server wants to be shown."""
_PATIENCE = 60.0  # seconds until a server answers; Infinity imports torch first


@dataclass(frozen=True)
class Kind:
    """A server that may be installed here.

    Attributes:
        name: For people.
        variables: The environment variables that say where it is.
        command: Makes its command line of the values of these variables, the folder of MiniLM and a port.
        cuts: Whether it cuts its vectors to the ``dimensions`` of a request; none normalises them again.
        keeps_vowels: Whether it reads texts as MiniLM's own tokenizer does. llama.cpp's drops more than accents: the vowels
            of Korean, and vowel signs of Indic scripts.
    """

    name: str
    variables: tuple[str, ...]
    command: Callable[[list[Path], str, int], list[str]]
    cuts: bool
    keeps_vowels: bool

    @property
    def missing(self) -> list[str]:
        """The variables that are not set."""
        return [name for name in self.variables if not os.environ.get(name)]

    def start(self, folder: Path, model: str) -> contextlib.AbstractContextManager[RealServer]:
        """Start it, and do not wait for it; what it prints goes to a file in the folder."""
        port = _free_port()
        places = [Path(os.environ[name]).expanduser().absolute() for name in self.variables]
        command = self.command(places, model, port)
        for path in (*places, Path(command[0])):
            if not path.exists():
                raise FileNotFoundError(f"{' and '.join(self.variables)} should name {self.name}: there is no {path}")
        return _running(command, port, folder)


def _infinity(places: list[Path], model: str, port: int) -> list[str]:
    [place] = places  # its Python, or the folder of that; never resolved, as the Python of an environment is a link
    words = "v2 --engine torch --device cpu --dtype float32 --no-bettertransformer --no-model-warmup --url-prefix /v1"
    program = (place if place.is_dir() else place.parent) / "infinity_emb"
    options = ["--model-id", model, "--served-model-name", NAME, "--api-key", KEY, "--host", "127.0.0.1", "--port", str(port)]
    return [str(program), *words.split(), *options]


def _llama_server(places: list[Path], model: str, port: int) -> list[str]:
    program, weights = map(str, places)
    words = f"--embeddings --threads 1 --alias {NAME} --api-key {KEY} --host 127.0.0.1 --port {port}"
    return [program, "--model", weights, *words.split()]


KINDS = (
    Kind("Infinity", ("GEMMA_RAG_INFINITY",), _infinity, cuts=True, keeps_vowels=True),
    Kind("llama-server", ("GEMMA_RAG_LLAMA_SERVER", "GEMMA_RAG_LLAMA_MODEL"), _llama_server, cuts=False, keeps_vowels=False),
)


@dataclass(frozen=True)
class RealServer:
    """A server that runs.

    Attributes:
        url: Its address.
        log: What it prints.
        process: What stands between it and us; first of a process group that has both.
    """

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def wait(self) -> None:
        """Come back when it answers."""
        import httpx

        end = time.monotonic() + _PATIENCE
        with httpx.Client(base_url=self.url, trust_env=False, timeout=5.0) as client:
            while time.monotonic() < end:
                if self.process.poll() is not None:
                    raise RuntimeError(f"the server ended before it answered:\n{self.printed()[-3000:]}")
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/health").is_success:
                        return
                time.sleep(0.05)
        raise RuntimeError(f"no answer from {self.url} within {_PATIENCE:.0f} seconds:\n{self.printed()[-3000:]}")

    def kill(self) -> None:
        """End it at once, whatever it is doing."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def printed(self, start: int = 0) -> str:
        """What it has printed from a place in the file on."""
        return self.log.read_bytes()[start:].decode(errors="replace")


@contextlib.contextmanager
def _running(command: list[str], port: int, folder: Path) -> Iterator[RealServer]:
    folder.mkdir(parents=True, exist_ok=True)
    url, log = f"http://127.0.0.1:{port}", folder / "server.log"
    ours = ("PYTHON", "GEMMA_RAG_", "INFINITY_", "LLAMA_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    settings = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with (
        log.open("wb") as out,
        subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, *command],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**environment, **settings},
            start_new_session=True,
        ) as process,
    ):
        server = RealServer(url, log, process)
        try:
            yield server
        except BaseException:
            print(server.printed()[-3000:])  # pytest shows it beside the failure
            raise
        finally:
            server.kill()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _watch(command: list[str]) -> int:
    """Run a command until it ends; when our standard input ends, the whole process group does."""

    def wait_for_the_end() -> None:
        os.read(0, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    return subprocess.call(command, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(_watch(sys.argv[1:]))
