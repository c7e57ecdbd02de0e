"""What the stand-ins share: real HTTP on the loopback, requests kept, bounds counted, faults at a switch.

A stand-in is written from the public documentation of its protocol, and is strict: what the real server refuses, it
refuses with the same status and words. It embeds each text as it comes, so that a prompt too few or too many shows.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import numpy as np

SPECIAL = 2
"""Special tokens that every stand-in counts for a text, one at each end."""
_PATIENCE = 2.0  # seconds; how long `StandIn.hold` waits for requests that never come

Rows = list[list[float]]
Spans = list[tuple[int, int]]


def hashed(dimensions: int) -> Callable[[str], np.ndarray]:
    """Vectors that depend on every character of a text, of any norm but 1."""

    def vector(text: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        return np.random.default_rng(seed).standard_normal(dimensions).astype(np.float32) * 3

    return vector


def unit(row: np.ndarray) -> np.ndarray:
    """A vector scaled to norm 1; apart from the package's own, which is tested with it."""
    return row / np.sqrt((row.astype(np.float64) ** 2).sum())


def words(text: str) -> Spans:
    """A tokenizer to count by hand: each run of letters and digits, and each other visible character, is a token."""
    return [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)]


def characters(text: str) -> Spans:
    """A tokenizer that makes more tokens of a text than any client would expect."""
    return [(i, i + 1) for i in range(len(text))]


@dataclass(frozen=True)
class Request:
    """A request as it came in.

    Attributes:
        method: GET or POST.
        path: Without the host.
        headers: By their names in small letters.
        body: The JSON that it carried, None where there was none.
        connection: The client's port: requests over one connection share it.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any
    connection: int


@dataclass(frozen=True)
class Answer:
    """What goes back: JSON, or the bytes given."""

    body: Any
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    def encoded(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


class Refused(Exception):
    """Raised by a stand-in's own checks: the answer to a request that breaks the contract."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(status, body)
        self.answer = Answer(body, status)


@dataclass(frozen=True)
class Fault:
    """What becomes of one request instead of the right answer.

    Attributes:
        answer: Sent in place of the right one.
        drop: Close the connection without a word.
        half: Announce the whole body, send half of it and close.
        delay: Seconds before anything is sent.
        rows: Spoils the right vectors.
        body: Spoils the right JSON.
    """

    answer: Answer | None = None
    drop: bool = False
    half: bool = False
    delay: float = 0.0
    rows: Callable[[Rows], Rows] | None = None
    body: Callable[[Any], Any] | None = None


def status(code: int, body: Any = None, **headers: str) -> Fault:
    """An error answer; headers by name, an underscore for a hyphen."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Fault(Answer({"error": f"made to fail with {code}"} if body is None else body, code, named))


DROP = Fault(drop=True)
HALF = Fault(half=True)
NOT_JSON = Fault(Answer(b"<html><body>It works!</body></html>", 200, {"Content-Type": "text/html"}))
TOO_FEW = Fault(rows=lambda rows: rows[:-1])
UNEQUAL = Fault(rows=lambda rows: [*rows[:-1], rows[-1][:-1]])
NAN = Fault(rows=lambda rows: [*rows[:-1], [float("nan"), *rows[-1][1:]]])
ZEROS = Fault(rows=lambda rows: [[0.0] * len(rows[0]), *rows[1:]])
OTHER_DIMENSION = Fault(rows=lambda rows: [row[:-2] for row in rows])


class StandIn:
    """A server on a free port of 127.0.0.1; a context manager.

    Args:
        vector: The vector of a text, as the model would give it.
        limit: The context in tokens, the special ones counted.
        tokens: The characters of each token of a text, without special tokens.
        key: The bearer token that is asked for; None for a server open to all.

    Attributes:
        requests: All that came, in order.
        delay: Seconds before an embedding request is answered, by its texts.
        hold: An embedding request is answered only once so many have been under way at a time.
        fails_on: What becomes of every embedding request that has this in one of its texts.
        embedded: All texts that vectors were computed of, as the model read them.
        most: The most embedding requests that were under way at a time.
    """

    embedding_paths: ClassVar[tuple[str, ...]] = ()
    text_keys: ClassVar[tuple[str, ...]] = ("input",)
    host = "127.0.0.1"

    def __init__(
        self,
        vector: Callable[[str], np.ndarray] | None = None,
        *,
        limit: int = 2048,
        tokens: Callable[[str], Spans] = words,
        key: str | None = None,
    ) -> None:
        self.vector = vector or hashed(768)
        self.limit, self.tokens, self.key = limit, tokens, key
        self.requests: list[Request] = []
        self.delay: Callable[[Sequence[str]], float] = lambda texts: 0.0
        self.fails_on: dict[str, Fault] = {}
        self.embedded: list[str] = []
        self.hold = self.most = self._active = 0
        self._faults: list[tuple[str | None, Fault]] = []
        self._change = threading.Condition()
        self.stopping = threading.Event()

    # -- for the tests ----------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self._server.server_address[1]}"

    @property
    def batches(self) -> list[list[str]]:
        """The texts of each embedding request that came, as they came."""
        return [self.texts(request) for request in self.requests if request.path in self.embedding_paths]

    def asked(self, path: str) -> int:
        """How often a path was asked for."""
        return sum(request.path == path for request in self.requests)

    def encrypt(self, context: ssl.SSLContext) -> None:
        """Speak TLS from now on."""
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)

    def connected(self) -> int:
        """How many connections are open."""
        return len(self._server.connections)

    def fail(self, *faults: Fault, path: str | None = None) -> None:
        """Let the next requests fail, one each: the embedding ones, or those to a path."""
        with self._change:
            self._faults += [(path, fault) for fault in faults]

    def forget(self) -> None:
        """Begin to count anew, after an encoder was made."""
        with self._change:
            self.requests.clear()
            self.embedded.clear()
            self.most = 0

    def __enter__(self) -> StandIn:
        self._server = _Server((self.host, 0), _Handler)
        self._server.stand_in = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), name="stand-in")
        self._thread.start()
        return self

    def __exit__(self, *failed: object) -> None:
        self.stopping.set()
        with self._change:
            self._change.notify_all()
        self._server.shutdown()
        self._server.close_connections()
        self._server.server_close()
        self._thread.join()
        if not any(failed) and self._server.broken:
            raise AssertionError("the stand-in itself failed") from self._server.broken[0]

    # -- for the protocols ------------------------------------------------------------------------------------------

    def route(self, request: Request, fault: Fault | None) -> Answer:
        """The right answer, its vectors spoiled where the fault says so.

        Raises:
            Refused: The request breaks the contract.
        """
        raise NotImplementedError

    def texts(self, request: Request) -> list[str]:
        """The texts of an embedding request."""
        body = request.body if isinstance(request.body, dict) else {}
        given = next((body[key] for key in self.text_keys if key in body), [])
        texts = [given] if isinstance(given, str) else given
        return [text for text in texts if isinstance(text, str)] if isinstance(texts, list) else []

    def count(self, text: str) -> int:
        return len(self.tokens(text)) + SPECIAL

    def cut(self, text: str, limit: int) -> str:
        """The start of a text that fits into so many tokens."""
        spans = self.tokens(text)
        room = limit - SPECIAL
        return text if len(spans) <= room else text[: spans[room - 1][1]]

    def rows(self, texts: Sequence[str], fault: Fault | None, *, normalise: bool = True) -> Rows:
        """The vectors of texts, spoiled where a fault says so."""
        self.embedded += texts
        rows = [(unit(self.vector(text)) if normalise else self.vector(text)).tolist() for text in texts]
        return fault.rows(rows) if fault and fault.rows else rows

    def refused_key(self) -> Refused:
        return Refused(401, {"error": "unauthorized"})

    # -- inside -----------------------------------------------------------------------------------------------------

    def serve(self, request: Request, handler: _Handler) -> None:
        embedding = request.path in self.embedding_paths
        fault = self._begin(request, embedding)
        try:
            answer = self._answer(request, fault, self.delay(self.texts(request)) if embedding else 0.0)
            if fault and fault.drop:
                handler.hang_up()
            else:
                handler.send(answer, half=bool(fault and fault.half))
        finally:
            with self._change:
                self._active -= embedding

    def _begin(self, request: Request, embedding: bool) -> Fault | None:
        with self._change:
            self.requests.append(request)
            self._active += embedding
            self.most = max(self.most, self._active)
            self._change.notify_all()
            if embedding:
                self._change.wait_for(lambda: self.most >= self.hold or self.stopping.is_set(), _PATIENCE)
            for i, (path, fault) in enumerate(self._faults):
                if path == request.path or (path is None and embedding):
                    del self._faults[i]
                    return fault
        texts = self.texts(request) if embedding else []
        return next((fault for part, fault in self.fails_on.items() if any(part in text for text in texts)), None)

    def _answer(self, request: Request, fault: Fault | None, delay: float) -> Answer:
        self.stopping.wait(delay + (fault.delay if fault else 0.0))
        if fault and fault.answer:
            return fault.answer
        try:
            if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
                raise self.refused_key()
            answer = self.route(request, fault)
        except Refused as refusal:
            return refusal.answer
        return Answer(fault.body(answer.body)) if fault and fault.body else answer


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # joined when closed, so that no socket is left to the garbage collector
    request_queue_size = 64
    stand_in: StandIn

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.broken: list[BaseException] = []
        self.connections: set[socket.socket] = set()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def close_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().close_request(request)

    def close_connections(self) -> None:
        for connection in list(self.connections):
            hang_up(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        import sys

        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, (ConnectionError, ssl.SSLError)):  # a client that went away is no fault
            self.broken.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        self._take(None)

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            body = json.loads(raw)
        except ValueError:
            body = raw
        self._take(body)

    def _take(self, body: Any) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.stand_in.serve(Request(self.command, self.path, headers, body, self.client_address[1]), self)

    def send(self, answer: Answer, *, half: bool) -> None:
        body = answer.encoded()
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if half else body)
        if half:
            self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True
        hang_up(self.connection)

    def log_message(self, *args: object) -> None:
        pass


def hang_up(connection: socket.socket) -> None:
    """Close a connection that another thread may be reading from."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # the other side was first
        return


def nobody_there() -> str:
    """The address of a port where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def wait_until(true: Callable[[], bool], seconds: float = 2.0) -> bool:
    """Wait for something that another thread does, in steps of a millisecond."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.001)
    return true()
