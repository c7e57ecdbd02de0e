"""Requests to a server: what is tried again and when, what errors say, and how one connection pool serves everybody."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest

from gemma_rag.encoders.transport import Transport
from gemma_rag.errors import EmbeddingServerError, InputError, MissingExtra

from .servers.base import DROP, HALF, Answer, Fault, Request, StandIn, nobody_there, status, wait_until

pytestmark = [pytest.mark.allow_hosts(["127.0.0.1"]), pytest.mark.usefixtures("plain_environment")]

KEY = "k3y-0f-ours"


class Echo(StandIn):
    """Answers with what it was sent."""

    embedding_paths = ("/echo",)

    def route(self, request: Request, fault: Fault | None) -> Answer:
        return Answer({"method": request.method, "path": request.path, "body": request.body})


@pytest.fixture
def server():
    with Echo() as server:
        yield server


@pytest.fixture
def waited() -> list[float]:
    return []


@pytest.fixture
def make(server: Echo, waited: list[float]):
    """Makes transports to the server, which write their pauses down."""

    async def pause(seconds: float) -> None:
        waited.append(seconds)

    def transport(url: str = server.url, **options: object) -> Transport:
        return Transport(url, **{"what": "the echo", "pause": pause, **options})

    return transport


def ask(transport: Transport, body: object = 1) -> object:
    return transport.run(transport.post("/echo", body))


# -- one request ------------------------------------------------------------------------------------------------------


def test_json_goes_there_and_comes_back(make: Callable[..., Transport]):
    body = {"text": "在门户网站重置密码。 \u2028 \x00", "numbers": [1, 2.5, None, True]}
    assert ask(make(), body) == {"method": "POST", "path": "/echo", "body": body}


def test_a_slash_at_the_end_of_the_address_is_no_matter(make: Callable[..., Transport], server: Echo):
    transport = make(f"{server.url}/")
    assert transport.run(transport.get("/echo")) == {"method": "GET", "path": "/echo", "body": None}


def test_half_of_a_surrogate_pair_is_refused_before_anything_is_sent(make: Callable[..., Transport], server: Echo):
    with pytest.raises(InputError, match="surrogate"):
        ask(make(), {"input": ["fine", "broken \ud83d here"]})
    assert server.requests == []


def test_httpx_is_an_extra(make: Callable[..., Transport], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(MissingExtra, match=r"gemma-rag\[server\]"):
        make()


def test_the_key_goes_into_one_header_and_nowhere_else(make: Callable[..., Transport], server: Echo):
    transport = make(secret=KEY)
    ask(transport)
    [request] = server.requests
    assert [name for name, value in request.headers.items() if KEY in value] == ["authorization"]
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert KEY not in repr(transport) + str(transport)
    assert server.url in repr(transport)


@pytest.mark.parametrize("key", ["two words", "line\nend", "schlüssel", ""])
def test_a_key_that_cannot_be_one_is_refused_without_quoting_it(make: Callable[..., Transport], key: str):
    with pytest.raises(InputError, match="key") as caught:
        make(secret=key)
    assert not key or key not in str(caught.value)


# -- trying again -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [*map(status, (408, 425, 429, 502, 503, 504)), DROP, HALF], ids=lambda f: str(f.answer and f.answer.status)
)
def test_a_passing_fault_is_tried_again(make: Callable[..., Transport], server: Echo, waited: list[float], fault: Fault):
    server.fail(fault, fault, fault)
    assert ask(make(retries=3))["body"] == 1
    assert server.asked("/echo") == 4
    assert len(waited) == 3


@pytest.mark.parametrize("code", [400, 401, 402, 403, 404, 405, 406, 409, 410, 413, 415, 418, 422, 424, 500, 501, 505])
def test_any_other_status_is_not(make: Callable[..., Transport], server: Echo, waited: list[float], code: int):
    server.fail(status(code))
    with pytest.raises(EmbeddingServerError) as caught:
        ask(make())
    assert (caught.value.status, server.asked("/echo"), waited) == (code, 1, [])


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_an_error_that_names_where_to(make: Callable[..., Transport], server: Echo, code: int):
    server.fail(status(code, Location="https://elsewhere.example/path"))
    with pytest.raises(EmbeddingServerError, match=r"https://elsewhere\.example/path") as caught:
        ask(make(secret=KEY))
    assert (caught.value.status, server.asked("/echo")) == (code, 1)


def test_the_pauses_grow_with_full_jitter(make: Callable[..., Transport], server: Echo, waited: list[float]):
    """Each is drawn evenly between zero and a bound that doubles: AWS's "exponential backoff and jitter"."""
    transport = make(retries=4, base_delay=1.0)
    runs = []
    for _ in range(40):
        server.fail(*[status(503)] * 4)
        ask(transport)
        runs.append(waited[-4:])
    for i, bound in enumerate((1, 2, 4, 8)):
        drawn = [run[i] for run in runs]
        assert min(drawn) >= 0
        assert bound / 2 < max(drawn) <= bound  # all of 40 draws in the lower half: once in 10**12
        assert min(drawn) < bound / 2
        assert len(set(drawn)) > 30


@pytest.mark.parametrize(("said", "seconds"), [("7", 7), ("0", 0), ("0.5", 0.5), ("3600", 60), ("-5", 0)])
def test_the_server_may_say_how_long_to_wait(
    make: Callable[..., Transport], server: Echo, waited: list[float], said: str, seconds: float
):
    server.fail(status(429, Retry_After=said))
    ask(make(base_delay=100.0))
    assert waited == [seconds]


def test_the_server_may_say_until_when_to_wait(make: Callable[..., Transport], server: Echo, waited: list[float]):
    server.fail(status(503, Retry_After=format_datetime(datetime.now(timezone.utc) + timedelta(seconds=20), usegmt=True)))
    ask(make(base_delay=100.0))
    assert 17 < waited[0] <= 20


def test_a_wait_that_nobody_can_read_is_left_to_the_jitter(make: Callable[..., Transport], server: Echo, waited: list[float]):
    server.fail(status(429, Retry_After="soon"))
    ask(make(base_delay=1.0))
    assert 0 <= waited[0] <= 1


def test_a_slow_answer_is_waited_for_once_more_at_most(make: Callable[..., Transport], server: Echo, waited: list[float]):
    server.fail(*[Fault(delay=5)] * 5)
    began = time.monotonic()
    with pytest.raises(EmbeddingServerError, match=r"0\.2 seconds") as caught:
        ask(make(timeout=0.2, retries=4))
    assert time.monotonic() - began < 2
    assert (caught.value.status, server.asked("/echo"), len(waited)) == (None, 2, 1)


def test_no_connection_is_tried_as_often_as_allowed(make: Callable[..., Transport], waited: list[float]):
    with pytest.raises(EmbeddingServerError, match=r"running.*Start it with: echo") as caught:
        ask(make(nobody_there(), retries=3, hint="Start it with: echo"))
    assert "tried 4 times" in str(caught.value)
    assert (caught.value.status, len(waited)) == (None, 3)


def test_a_server_that_is_not_there_does_not_cost_long(make: Callable[..., Transport]):
    began = time.monotonic()
    with pytest.raises(EmbeddingServerError):
        ask(make(nobody_there(), pause=None))  # with the true pauses
    assert time.monotonic() - began < 2


# -- what errors say --------------------------------------------------------------------------------------------------

SAID = {
    "Ollama": {"error": "the words"},
    "OpenAI": {"error": {"message": "the words", "type": "invalid_request_error", "code": None}},
    "TEI": {"error": "the words", "error_type": "Validation"},
    "vLLM of old": {"object": "error", "message": "the words", "code": 400},
    "FastAPI": {"detail": "the words"},
    "pydantic": {"detail": [{"loc": ["body", "input"], "msg": "the words", "type": "too_long"}]},
    "text": b"the words",
    "a page": b"<html><body><h1>the words</h1></body></html>",
}


@pytest.mark.parametrize("body", SAID.values(), ids=SAID)
def test_an_error_has_the_servers_own_words(make: Callable[..., Transport], server: Echo, body: object):
    server.fail(status(400, body))
    with pytest.raises(EmbeddingServerError) as caught:
        ask(make())
    message = str(caught.value)
    assert message.startswith(f"the echo: {server.url}/echo answered with 400: the words")
    assert "<" not in message
    assert caught.value.url == f"{server.url}/echo"


def test_a_long_error_is_shortened(make: Callable[..., Transport], server: Echo):
    server.fail(status(400, {"error": "so it is " * 1000}))
    with pytest.raises(EmbeddingServerError) as caught:
        ask(make())
    assert 200 < len(str(caught.value)) < 700


CURES = {
    401: "GEMMA_RAG_API_KEY",
    403: "GEMMA_RAG_API_KEY",
    404: "url",
    400: "max_tokens",
    413: "batch_texts",
    422: "batch_texts",
}


@pytest.mark.parametrize(("code", "cure"), CURES.items())
def test_an_error_names_the_cure(make: Callable[..., Transport], server: Echo, code: int, cure: str):
    server.fail(status(code))
    with pytest.raises(EmbeddingServerError, match=cure):
        ask(make())


NO_JSON = {
    "a page": b"<html>It works!</html>",
    "nothing": b"",
    "half of it": b'{"embeddings": [[0.1, 0.2',
    "not a number": b'{"embeddings": [[NaN]]}',
    "infinity": b'{"embeddings": [[-Infinity]]}',
    "bytes": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("body", NO_JSON.values(), ids=NO_JSON)
def test_what_is_no_json_is_refused(make: Callable[..., Transport], server: Echo, body: bytes):
    server.fail(Fault(Answer(body)))
    with pytest.raises(EmbeddingServerError, match=f"{server.url}/echo") as caught:
        ask(make())
    assert (caught.value.status, server.asked("/echo")) == (200, 1)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="a certificate is made with the command openssl")
def test_a_certificate_that_nobody_vouches_for_is_refused(make: Callable[..., Transport], server: Echo, tmp_path):
    command = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=127.0.0.1 -keyout key -out cert"
    subprocess.run(
        ["openssl", *command.split(), "-addext", "subjectAltName=IP:127.0.0.1"], cwd=tmp_path, check=True, capture_output=True
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    server.encrypt(context)
    with pytest.raises(EmbeddingServerError, match="certificate") as caught:
        ask(make(server.url.replace("http://", "https://"), secret=KEY))
    assert caught.value.status is None
    assert server.requests == []


# -- many at a time ---------------------------------------------------------------------------------------------------


def calls(transport: Transport, count: int) -> list[Callable[[], object]]:
    return [lambda i=i: transport.post("/echo", {"input": [str(i)]}) for i in range(count)]


def test_results_come_as_they_complete_with_their_place(make: Callable[..., Transport], server: Echo):
    server.fails_on = {"0": Fault(delay=0.1)}
    transport = make(concurrency=3)
    found = list(transport.each(calls(transport, 3)))
    assert sorted(place for place, _ in found) == [0, 1, 2]
    assert found[-1][0] == 0
    assert all(result["body"] == {"input": [str(place)]} for place, result in found)


def test_the_first_failure_comes_after_all_that_went_well(make: Callable[..., Transport], server: Echo):
    server.fails_on = {"2": status(500, {"error": "two"})}
    transport = make(concurrency=2)
    found = []

    def collect() -> None:
        for place, _ in transport.each(calls(transport, 6)):
            found.append(place)

    with pytest.raises(EmbeddingServerError, match="two"):
        collect()
    assert sorted(found) == [0, 1, 3, 4, 5]


def test_a_server_that_only_fails_is_not_asked_for_ever(make: Callable[..., Transport], server: Echo):
    server.fails_on = {"": status(401)}
    transport = make(concurrency=2)
    with pytest.raises(EmbeddingServerError):
        list(transport.each(calls(transport, 500)))
    assert server.asked("/echo") < 20


def test_whoever_stops_listening_stops_the_requests(make: Callable[..., Transport], server: Echo):
    server.delay = lambda texts: 0.005
    transport = make(concurrency=2)
    results = transport.each(calls(transport, 200))
    next(results)
    results.close()
    time.sleep(0.03)
    assert server.asked("/echo") < 20


def test_each_event_loop_and_thread_shares_one_pool(make: Callable[..., Transport], server: Echo):
    transport = make(concurrency=2)

    async def several() -> int:
        return len([place async for place, _ in transport.aeach(calls(transport, 4))])

    counts = []
    threads = [threading.Thread(target=lambda: counts.append(len(list(transport.each(calls(transport, 4)))))) for _ in range(3)]
    for thread in threads:
        thread.start()
    counts += [asyncio.run(several()), asyncio.run(several())]
    for thread in threads:
        thread.join()
    assert counts == [4] * 5
    assert server.most <= 2
    assert len({request.connection for request in server.requests}) <= 2


def test_a_closed_transport_holds_no_connection_and_can_be_used_again(make: Callable[..., Transport], server: Echo):
    transport = make()
    ask(transport)
    assert server.connected() == 1
    transport.close()
    transport.close()
    assert wait_until(lambda: server.connected() == 0)
    assert ask(transport)["body"] == 1
    transport.close()


def test_a_proxy_is_used_for_others_and_never_for_this_machine(
    make: Callable[..., Transport], server: Echo, monkeypatch: pytest.MonkeyPatch
):
    with Echo() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        ask(make())
        assert (len(server.requests), proxy.requests) == (1, [])
        ask(make("http://embeddings.example"))
        assert [request.path for request in proxy.requests] == ["http://embeddings.example/echo"]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="a thread cannot be interrupted here")
def test_an_interrupt_ends_the_call_and_gives_its_place_back(make: Callable[..., Transport], server: Echo):
    transport = make(concurrency=1)
    main = threading.get_ident()

    def interrupt() -> None:
        wait_until(lambda: server.asked("/echo") == 1)
        signal.pthread_kill(main, signal.SIGINT)

    server.fail(Fault(delay=5))
    other = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a library of another test may have set its own
    other.start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            list(transport.each(calls(transport, 3)))
    finally:
        other.join()
        signal.signal(signal.SIGINT, before)
    assert ask(transport)["body"] == 1
    assert time.monotonic() - began < 2
    assert server.asked("/echo") == 2


PROGRAM = """
import multiprocessing, sys
from gemma_rag.encoders.transport import Transport

transport = Transport(sys.argv[1])
def ask(number):
    return transport.run(transport.post("/echo", {"input": [str(number)]}))["body"]["input"][0]
assert ask(1) == "1"
if hasattr(__import__("os"), "fork"):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(ask, [2, 3]) == ["2", "3"]
assert ask(4) == "4"
print("done")
"""


def test_a_program_ends_without_a_warning_and_may_fork(server: Echo):
    strict = ["-W", "error", "-W", "ignore::DeprecationWarning"]  # Python 3.12 warns of fork itself
    ended = subprocess.run(
        [sys.executable, *strict, "-c", PROGRAM, server.url], capture_output=True, text=True, timeout=30, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")
    assert [json.dumps(request.body) for request in server.requests].count('{"input": ["4"]}') == 1
