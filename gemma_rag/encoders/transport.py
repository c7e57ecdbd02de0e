"""The one way to an HTTP server: one connection pool, one bound on requests, retries where they can help.

All requests of a process run on one event loop in a background thread, so that synchronous callers from any thread and
asynchronous callers from any event loop share the connections, also after their own event loop has ended.

    GET, POST          no connection yet; connection lost, half an answer; 408, 425, 429, 502, 503, 504   tried again
                       no answer in time                                                                 once more
                       any other status, an answer that is no JSON, a certificate that is not trusted     an error at once

Embedding the same text twice gives the same vector, so a POST may be repeated whatever became of the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import itertools
import json
import logging
import queue
import random
import re
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from gemma_rag.encoders.background import background, close_client, users
from gemma_rag.encoders.settings import API_KEY
from gemma_rag.errors import EmbeddingServerError, GemmaRagError, InputError, MissingExtra, without_secrets

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)
T = TypeVar("T")

RETRIED = frozenset({408, 425, 429, 502, 503, 504})
"""HTTP statuses after which the same request may well succeed."""
LONGEST_PAUSE = 60.0
"""Seconds; a server that asks for more patience gets this much."""
_LONGEST_BACKOFF = 30.0
_FOR_A_STRANGER = 0.25  # seconds between tries at a server that never answered yet: most likely it does not run
_CONNECTING = 10.0  # seconds; a listening server accepts at once
_NOT_THE_TEXTS = (None, 429, 502, 503, 504)  # how a server fails that has trouble of its own
_HOPELESS_IN_A_ROW = 8  # failed calls, with none that succeeded between them, after which no further ones are begun
_END = object()


class ServerFailure(EmbeddingServerError):
    """A request that failed for good.

    Attributes:
        detail: The server's own words, without secrets; "" where it said nothing.
        hopeless: Whether other requests will fail for the same reason: nobody listens, the key is refused.
    """

    def __init__(self, message: str, *, url: str, status: int | None = None, detail: str = "", hopeless: bool = False) -> None:
        super().__init__(message, url=url, status=status)
        self.detail, self.hopeless = detail, hopeless


@dataclass(frozen=True)
class _Failure:
    """One try that failed.

    Attributes:
        problem: What happened, to follow the URL in a sentence.
        cure: What to do about it; "" where nobody knows.
        again: How often it may be tried again for this reason; None for as often as the settings allow.
        wait: Seconds that the server asks for.
        longest: Seconds that a pause may last at most where it asks for none.
        hopeless: As in `ServerFailure`.
    """

    problem: str
    cure: str = ""
    status: int | None = None
    detail: str = ""
    again: int | None = 0
    wait: float | None = None
    longest: float = _LONGEST_BACKOFF
    hopeless: bool = False


class Transport:
    """Requests to one server.

    Args:
        url: The server's address, without a slash at the end.
        secret: Its key, sent as a bearer token and shown nowhere.
        timeout: Seconds to wait for an answer.
        retries: How often a request is tried again.
        concurrency: Most requests at a time.
        what: The server in words, for errors: ``"Ollama"``.
        hint: What to do where nobody listens: ``"Start it with: ollama serve"``.
        pause: Waits between tries, given seconds; None for `sleep` of this module.
        base_delay: Seconds; the first pause is at most this long, each further one at most twice as long.
    """

    def __init__(
        self,
        url: str,
        *,
        secret: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        concurrency: int = 4,
        what: str = "the server",
        hint: str = "",
        pause: Callable[[float], Awaitable[None]] | None = None,
        base_delay: float = 0.5,
    ) -> None:
        _httpx()
        if secret is not None and not re.fullmatch(r"[!-~]+", secret):
            raise InputError(
                "the API key holds spaces, line ends or letters outside ASCII, which no key has: was it copied whole?"
            )
        self.url, self.what, self.hint = url.rstrip("/"), what, hint
        self.timeout, self.retries, self.concurrency = timeout, retries, concurrency
        self._secret, self._pause, self._base_delay = secret, pause, base_delay
        self._connection: _Connection | None = None
        self._answered = False

    def __repr__(self) -> str:
        return f"Transport({self.url!r})"

    # -- requests, on the background loop --------------------------------------------------------------------------

    async def get(self, path: str) -> Any:
        """The JSON at a path. To be awaited on the background loop: through `run`, `arun` or `each`."""
        return await self._request("GET", path, None)

    async def post(self, path: str, body: Any) -> Any:
        """The JSON that the server answers to a JSON body. To be awaited on the background loop.

        Raises:
            EmbeddingServerError: It failed for good.
            InputError: The body holds half of a surrogate pair, which is no text.
        """
        try:
            content = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError as error:
            near = error.object[max(0, error.start - 20) : error.start]
            raise InputError(f"a text holds half of a surrogate pair, which is no text, after {near!r}") from None
        return await self._request("POST", path, content)

    async def _request(self, method: str, path: str, content: bytes | None) -> Any:
        connection = self._connection or self._connected()
        url = self.url + path
        delay = self._base_delay
        reasons: dict[str, int] = {}
        async with connection.slots:
            for tries in itertools.count(1):
                answer = await self._try(connection.client, method, url, content)
                if not isinstance(answer, _Failure):
                    self._answered = True
                    return answer
                reasons[answer.problem] = reasons.get(answer.problem, 0) + 1
                allowed = self.retries if answer.again is None else min(answer.again, self.retries)
                if tries > self.retries or reasons[answer.problem] > allowed:
                    raise self._failed(answer, url, tries)
                # full jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
                jitter = random.uniform(0, min(delay, answer.longest))  # noqa: S311 - no secret is made of it
                wait = jitter if answer.wait is None else answer.wait
                delay *= 2
                logger.debug("%s %s; trying again in %.1f s", url, answer.problem, wait)
                await (self._pause or sleep)(wait)
        raise AssertionError("unreachable")  # pragma: no cover

    async def _try(self, client: httpx.AsyncClient, method: str, url: str, content: bytes | None) -> Any:
        """One try: the parsed answer, or a `_Failure`."""
        httpx = _httpx()
        try:
            response = await asyncio.wait_for(client.request(method, url, content=content), self.timeout)
        except (asyncio.TimeoutError, httpx.ReadTimeout, httpx.WriteTimeout):
            return _Failure(
                f"did not answer within {self.timeout:g} seconds (timeout)",
                "Give it more time (timeout=) or smaller batches",
                again=1,
            )
        except httpx.TransportError as error:
            return self._no_answer(error)
        except (httpx.DecodingError, httpx.InvalidURL) as error:
            return _Failure(f"gave no answer that can be read ({type(error).__name__})", again=None)
        if response.is_success:
            return self._parsed(response)
        return self._refused(response)

    def _no_answer(self, error: Exception) -> _Failure:
        httpx = _httpx()
        kind = type(error).__name__
        if "CERTIFICATE" in str(error):
            return _Failure(
                f"shows a certificate that is not trusted ({kind})",
                "Name the file of your own certificate authority in the environment variable SSL_CERT_FILE",
                hopeless=True,
            )
        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError)):
            cure = f"Is the server running, and the url right? {self.hint}".rstrip()
            again = 1 if isinstance(error, httpx.ConnectTimeout) else None
            longest = _LONGEST_BACKOFF if self._answered else _FOR_A_STRANGER
            return _Failure(f"cannot be reached ({kind})", cure, again=again, longest=longest, hopeless=True)
        if isinstance(error, (httpx.NetworkError, httpx.RemoteProtocolError)):
            return _Failure(f"broke the connection off ({kind})", "Its own log may say why", again=None)
        return _Failure(f"cannot be asked ({kind})")

    def _parsed(self, response: httpx.Response) -> Any:
        try:
            return json.loads(response.content, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            what = str(error) if isinstance(error, _NoNumberError) else "what is no JSON"
            said = self._clean(response.text)
            return _Failure(f"answered with {what}: {said!r}", "Is the url right?", status=response.status_code)

    def _refused(self, response: httpx.Response) -> _Failure:
        status = response.status_code
        if response.has_redirect_location:
            to = re.sub(r"(?<=//)[^/@]*@|[?#].*", "", response.headers["location"])
            problem = f"answered with {status}, a redirect to {self._clean(to)}"
            return _Failure(problem, "It is not followed: give that url", status=status)
        detail = self._clean(_words(response.text), 2000)
        return _Failure(
            f"answered with {status}" + (f": {self._clean(detail)}" if detail else ""),
            self._cure(status),
            status=status,
            detail=detail,
            again=None if status in RETRIED else 0,
            wait=_seconds(response.headers.get("retry-after")) if status in RETRIED else None,
            hopeless=status in (401, 403),
        )

    def _cure(self, status: int) -> str:
        if status in (401, 403):
            return "The key is not accepted: check api_key" if self._secret else f"Give api_key, or set {API_KEY}"
        if status in (400, 413, 422):
            return "If texts are too long or too many for it, lower max_tokens or batch_texts"
        return {
            404: "Is the url right?",
            405: "Is the url right?",
            429: "It is asked too much at a time: lower concurrency",
        }.get(status, "Its own log may say why" if status >= 500 else "")

    def _clean(self, words: str, most: int = 300) -> str:
        """What others wrote, without the key, on one line of at most `most` characters."""
        if self._secret:
            words = words.replace(self._secret, "[...]")
        words = without_secrets(" ".join(words.split()))
        return words if len(words) <= most else f"{words[: most - 3]}..."

    def _failed(self, failure: _Failure, url: str, tries: int) -> ServerFailure:
        often = f" (tried {tries} times)" if tries > 1 else ""
        cure = f". {failure.cure}" if failure.cure else ""
        return ServerFailure(
            f"{self.what}: {url} {failure.problem}{often}{cure}",
            url=url,
            status=failure.status,
            detail=failure.detail,
            hopeless=failure.hopeless,
        )

    # -- from outside ------------------------------------------------------------------------------------------------

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the background loop and wait for it; an interrupt cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._connected().loop)
        try:
            return future.result()
        finally:
            future.cancel()

    async def arun(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the background loop and await it in the caller's own; cancelling the caller cancels it."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._connected().loop))

    def each(self, calls: Sequence[Callable[[], Awaitable[T]]]) -> Iterator[tuple[int, T]]:
        """Make calls, as many at a time as `concurrency` says.

        A call that fails does not keep the others from being made, unless it is clear that they will fail too.

        Yields:
            A call's place in `calls` and its result, in the order in which they complete.

        Raises:
            GemmaRagError: The first failure, after everything else was yielded.
        """
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        future = asyncio.run_coroutine_threadsafe(self._make(calls, results.put), self._connected().loop)
        try:
            while (item := results.get()) is not _END:
                yield item
            future.result()
        finally:
            future.cancel()

    async def aeach(self, calls: Sequence[Callable[[], Awaitable[T]]]) -> AsyncIterator[tuple[int, T]]:
        """`each`, for the caller's own event loop."""
        loop = asyncio.get_running_loop()
        results: asyncio.Queue[Any] = asyncio.Queue()

        def put(item: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the caller's loop has ended: nobody waits any more
                loop.call_soon_threadsafe(results.put_nowait, item)

        future = asyncio.run_coroutine_threadsafe(self._make(calls, put), self._connected().loop)
        try:
            while (item := await results.get()) is not _END:
                yield item
            await asyncio.wrap_future(future)
        finally:
            future.cancel()

    async def _make(self, calls: Sequence[Callable[[], Awaitable[Any]]], put: Callable[[Any], None]) -> None:
        todo = iter(enumerate(calls))
        failures: list[GemmaRagError] = []
        in_a_row = 0

        async def work() -> None:
            nonlocal in_a_row
            for place, call in todo:
                try:
                    result = await call()
                except GemmaRagError as error:
                    failures.append(error)
                    in_a_row += getattr(error, "status", None) in _NOT_THE_TEXTS
                    if in_a_row >= _HOPELESS_IN_A_ROW or getattr(error, "hopeless", False):
                        for _ in todo:
                            pass
                else:
                    in_a_row = 0
                    put((place, result))

        workers = [asyncio.ensure_future(work()) for _ in range(min(self.concurrency, len(calls)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            put(_END)
        if failures:
            raise failures[0]

    def close(self) -> None:
        """Close the connections. A further request opens new ones."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.finalizer.detach()
            close_client(connection.loop, connection.client, wait=threading.current_thread() is not background.thread)

    def _connected(self) -> _Connection:
        """The connections of this process, ready before the loop needs them: reading certificates takes a while."""
        loop = background.get()
        with background.lock:
            if self._connection is None or self._connection.loop is not loop:  # another loop: this process was forked
                client = self._new_client()
                finalizer = weakref.finalize(self, close_client, loop, client)
                finalizer.atexit = False  # `Background.stop` closes then what is open
                users.add(self)
                self._connection = _Connection(loop, client, asyncio.Semaphore(self.concurrency), finalizer)
            return self._connection

    def _new_client(self) -> httpx.AsyncClient:
        host = urlsplit(self.url).hostname or ""
        no_proxy = {f"all://{f'[{host}]' if ':' in host else host}": None} if _is_this_machine(host) else None
        client: httpx.AsyncClient = _httpx().AsyncClient(
            auth=_httpx().Auth(),  # the header below alone: never a password that a .netrc file has for the host
            headers={
                "content-type": "application/json",
                "accept": "application/json",
                "user-agent": "gemma-rag",
                **({"authorization": f"Bearer {self._secret}"} if self._secret else {}),
            },
            timeout=_httpx().Timeout(None, connect=min(self.timeout, _CONNECTING)),
            limits=_httpx().Limits(max_connections=None, max_keepalive_connections=self.concurrency),
            follow_redirects=False,
            mounts=no_proxy,
        )
        return client


@dataclass(frozen=True)
class _Connection:
    loop: asyncio.AbstractEventLoop
    client: httpx.AsyncClient
    slots: asyncio.Semaphore
    finalizer: weakref.finalize[Any, Any]


async def sleep(seconds: float) -> None:
    """Wait between two tries. Tests put something shorter in its place."""
    await asyncio.sleep(seconds)


def _httpx() -> Any:
    try:
        import httpx
    except ImportError:
        raise MissingExtra("talking to an embedding server", "server") from None
    return httpx


def _is_this_machine(host: str) -> bool:
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d+){3}", host) is not None


class _NoNumberError(ValueError):
    """JSON with NaN or infinity in it, which JSON does not have."""


def _no_number(name: str) -> float:
    raise _NoNumberError(f"{name} among the numbers")


def _words(text: str) -> str:
    """What a server says in an error: the message inside its JSON, or the text of a page."""
    return re.sub(r"<[^>]*>", " ", text) if text.lstrip().startswith("<") else _dig(text, 4)


def _dig(value: Any, depth: int) -> str:
    if isinstance(value, str):
        if depth and value.lstrip().startswith(("{", "[")):
            with contextlib.suppress(ValueError, RecursionError):
                return _dig(json.loads(value), depth - 1)
        return value
    if isinstance(value, dict) and depth:
        for key in ("error", "message", "detail", "msg", "error_message"):
            if value.get(key) and not isinstance(value[key], bool):
                return _dig(value[key], depth - 1)
    if isinstance(value, list) and depth:
        return "; ".join(_dig(item, depth - 1) for item in value[:3])
    return str(value)


def _seconds(retry_after: str | None) -> float | None:
    """The header Retry-After (RFC 9110, 10.2.3), seconds or a date; None where there is none, or none that can be read."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(retry_after)
        except ValueError:
            return None
        date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
        seconds = (date - datetime.now(timezone.utc)).total_seconds()
    return min(max(seconds, 0.0), LONGEST_PAUSE) if seconds == seconds else None
