"""What becomes of faults, on each protocol: what is tried again, what is kept, what an error says, and what it never says."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import traceback
from pathlib import Path

import numpy as np
import pytest

from gemma_rag import GemmaEmbeddings
from gemma_rag.encoders import EncoderSettings, Input
from gemma_rag.errors import EmbeddingServerError
from gemma_rag.prompts import Task

from .servers import Protocol
from .servers.base import (
    DROP,
    HALF,
    NAN,
    NOT_JSON,
    OTHER_DIMENSION,
    TOO_FEW,
    UNEQUAL,
    ZEROS,
    Answer,
    Fault,
    hashed,
    nobody_there,
    status,
    unit,
)

pytestmark = [pytest.mark.allow_hosts(["127.0.0.1"]), pytest.mark.usefixtures("plain_environment")]

QUERY = "task: search result | query: "
KEY = "k3y-0f-ours"  # short: a filter for long words would let it through


def queries(*texts: str) -> list[Input]:
    return [Input(text, Task.QUERY) for text in texts]


def right(*prompted: str) -> np.ndarray:
    """The vectors that a stand-in's model has for prompted texts, normalised by hand."""
    return np.stack([unit(hashed(768)(text)) for text in prompted])


def right_queries(*texts: str) -> np.ndarray:
    return right(*(QUERY + text for text in texts))


# -- faults -----------------------------------------------------------------------------------------------------------

PASSING = {
    **{str(code): status(code) for code in (408, 425, 429, 502, 503, 504)},
    "dropped": DROP,
    "half a body": HALF,
}
LASTING = {
    **{str(code): status(code) for code in (400, 401, 403, 409, 500, 501)},
    "redirected": status(307, Location="http://127.0.0.1:9/api"),
    "no JSON": NOT_JSON,
    "another shape": Fault(body=lambda body: {"unexpected": 1}),
    "a bare number": Fault(body=lambda body: 7),
    "too few rows": TOO_FEW,
    "rows of unequal length": UNEQUAL,
    "not a number": NAN,
    "all zeros": ZEROS,
    "words for numbers": Fault(rows=lambda rows: [["a"] * len(row) for row in rows]),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_a_passing_fault_is_tried_again(protocol: Protocol, pauses: list[float], fault: Fault):
    with protocol.server() as server:
        encoder = protocol.encoder(server)
        server.fail(fault, fault)
        np.testing.assert_allclose(encoder.encode(queries("one", "two")), right_queries("one", "two"), atol=1e-6)
        assert server.asked(protocol.path) == 3
    assert len(pauses) == 2


@pytest.mark.parametrize("fault", LASTING.values(), ids=LASTING)
def test_a_lasting_fault_is_not(protocol: Protocol, pauses: list[float], fault: Fault):
    with protocol.server() as server:
        encoder = protocol.encoder(server)
        server.fail(fault)
        with pytest.raises(EmbeddingServerError) as caught:
            encoder.encode(queries("one", "and two"))
        assert server.asked(protocol.path) == 1
        assert server.url in str(caught.value)
    assert caught.value.url.startswith(server.url)
    assert caught.value.status == (fault.answer.status if fault.answer else 200)
    assert pauses == []


def test_a_slow_answer_is_waited_for_once_more_at_most(protocol: Protocol, pauses: list[float]):
    with protocol.server() as server:
        encoder = protocol.encoder(server, timeout=0.2)
        server.fails_on = {"slow": Fault(delay=5)}
        with pytest.raises(EmbeddingServerError, match=r"0\.2 seconds") as caught:
            encoder.encode(queries("slow"))
        assert server.asked(protocol.path) == 2
    assert caught.value.status is None


def test_it_gives_up_after_as_many_retries_as_are_allowed(protocol: Protocol, pauses: list[float]):
    with protocol.server() as server:
        encoder = protocol.encoder(server, retries=2)
        server.fails_on = {"one": status(503, {"error": "warming up"})}
        with pytest.raises(EmbeddingServerError, match=r"503.*warming up") as caught:
            encoder.encode(queries("one"))
        assert server.asked(protocol.path) == 3
        assert "3 " in str(caught.value)
    assert caught.value.status == 503


def test_no_retries_are_made_where_none_are_wanted(protocol: Protocol, pauses: list[float]):
    with protocol.server() as server:
        encoder = protocol.encoder(server, retries=0)
        server.fail(status(503))
        with pytest.raises(EmbeddingServerError):
            encoder.encode(queries("one"))
        assert server.asked(protocol.path) == 1


def test_rows_of_another_dimension_in_a_later_batch_are_refused(protocol: Protocol):
    with protocol.server() as server:
        encoder = protocol.encoder(server, batch_texts=1)
        server.fails_on = {"second": OTHER_DIMENSION}
        with pytest.raises(EmbeddingServerError, match=r"766.*768|768.*766"):
            encoder.encode(queries("first", "second"))


def test_a_redirect_is_named_and_not_followed(protocol: Protocol):
    with protocol.server() as elsewhere, protocol.server(key=KEY) as server:
        encoder = protocol.encoder(server, api_key=KEY)
        server.fail(status(308, Location=f"{elsewhere.url}{protocol.path}"))
        with pytest.raises(EmbeddingServerError, match=elsewhere.url):
            encoder.encode(queries("one"))
        assert elsewhere.requests == []


def test_a_failed_batch_does_not_lose_the_others(protocol: Protocol):
    texts = ["a", "b b", "c c c", "broken d d", "e e e e e", "f f f f f f"]
    with protocol.server() as server:
        encoder = protocol.encoder(server, batch_texts=2, concurrency=2)
        server.fails_on = {"broken": status(500)}
        inputs = queries(*texts)
        with pytest.raises(EmbeddingServerError) as caught:
            encoder.encode([*inputs, inputs[0]])  # an equal text shares its row
        failed = next(batch for batch in server.batches if any("broken" in text for text in batch))
    finished = caught.value.finished
    prompted = [QUERY + text for text in [*texts, texts[0]]]
    assert set(finished) == {i for i, text in enumerate(prompted) if text not in failed}
    assert len(failed) == 2
    for i, row in finished.items():
        np.testing.assert_allclose(row, right(prompted[i])[0], atol=1e-6)


def test_a_failed_batch_does_not_lose_the_others_in_an_event_loop(protocol: Protocol):
    with protocol.server() as server:
        encoder = protocol.encoder(server, batch_texts=1, concurrency=2)
        server.fails_on = {"broken": status(500)}
        with pytest.raises(EmbeddingServerError) as caught:
            asyncio.run(encoder.aencode(queries("a", "broken", "c c", "d d d")))
    assert set(caught.value.finished) == {0, 2, 3}


def test_any_number_of_refused_texts_does_not_keep_the_others_from_being_embedded(protocol: Protocol):
    refused = [f"refused {'x ' * i}" for i in range(20)]  # the longest come first
    with protocol.server() as server:
        encoder = protocol.encoder(server, batch_texts=1, concurrency=1)
        server.fails_on = {"refused": status(400, {"error": "not these"})}
        with pytest.raises(EmbeddingServerError, match="not these") as caught:
            encoder.encode(queries("a", *refused, "b"))
    assert set(caught.value.finished) == {0, 21}


def test_no_server_is_reported_within_two_seconds(protocol: Protocol, pauses: list[float]):
    url = nobody_there()
    began = time.monotonic()
    with pytest.raises(EmbeddingServerError, match=url) as caught:
        GemmaEmbeddings(runtime=protocol.runtime, model=protocol.model, url=url)
    assert time.monotonic() - began < 2
    assert caught.value.status is None
    assert "running" in str(caught.value)


def test_a_server_that_goes_away_is_reported(protocol: Protocol, pauses: list[float]):
    with protocol.server() as server:
        encoder = protocol.encoder(server)
    with pytest.raises(EmbeddingServerError, match="running"):
        encoder.encode(queries("one"))


# -- secrets ----------------------------------------------------------------------------------------------------------


def everything_said(error: BaseException) -> str:
    """The error, and all that led to it, in every form that somebody might print."""
    return "".join(traceback.format_exception(error)) + repr(error) + str(error) + repr(vars(error))


def test_the_key_is_sent_with_every_request(protocol: Protocol):
    with protocol.server(key=KEY) as server:
        encoder = GemmaEmbeddings(runtime=protocol.runtime, model=protocol.model, url=server.url, api_key=KEY)
        encoder.encode(queries("one"))
        assert {request.headers.get("authorization") for request in server.requests} == {f"Bearer {KEY}"}
        assert not any(KEY in json.dumps([request.path, request.body]) for request in server.requests)


def test_the_key_comes_from_the_environment(protocol: Protocol, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GEMMA_RAG_API_KEY", KEY)
    with protocol.server(key=KEY) as server:
        assert protocol.encoder(server).encode(queries("one")).shape == (1, 768)


def test_no_key_is_sent_where_none_is_given(protocol: Protocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine 127.0.0.1 login somebody password {KEY}\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with protocol.server() as server:
        protocol.encoder(server).encode(queries("one"))
        assert not any("authorization" in request.headers for request in server.requests)


def test_a_missing_key_is_told_and_how_to_give_it(protocol: Protocol):
    with protocol.server(key=KEY) as server, pytest.raises(EmbeddingServerError, match="GEMMA_RAG_API_KEY") as caught:
        GemmaEmbeddings(runtime=protocol.runtime, model=protocol.model, url=server.url)
    assert caught.value.status == 401


def test_a_wrong_key_is_told_and_how_to_give_the_right_one(protocol: Protocol, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    with protocol.server(key="another") as server, pytest.raises(EmbeddingServerError, match="api_key") as caught:
        GemmaEmbeddings(runtime=protocol.runtime, model=protocol.model, url=server.url, api_key=KEY)
    assert caught.value.status == 401
    assert KEY not in everything_said(caught.value) + caplog.text


QUOTING = {
    "an error": status(400, {"error": f"what is {KEY}?"}),
    "OpenAI's error": status(401, {"error": {"message": f"Incorrect API key provided: {KEY}. Bearer {KEY}", "code": KEY}}),
    "a status that is tried again": status(503, {"error": f"no room for {KEY}"}),
    "no JSON": Fault(Answer(f"<p>{KEY}</p>".encode())),
    "a redirect": status(302, Location=f"http://127.0.0.1:9/?key={KEY}"),
    "another shape": Fault(body=lambda body: {KEY: KEY}),
}


@pytest.mark.parametrize("fault", QUOTING.values(), ids=QUOTING)
def test_a_server_that_quotes_the_key_does_not_give_it_away(
    protocol: Protocol, pauses: list[float], caplog: pytest.LogCaptureFixture, fault: Fault
):
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.DEBUG, "gemma_rag")
    with protocol.server(key=KEY) as server:
        encoder = protocol.encoder(server, api_key=KEY)
        server.fail(*[fault] * 5)
        with pytest.raises(EmbeddingServerError) as caught:
            encoder.encode(queries("one"))
        shown = repr(encoder) + repr(encoder.engine) + repr(vars(encoder.engine)) + repr(encoder.settings)
    assert KEY not in everything_said(caught.value) + caplog.text + shown


def test_a_recipe_holds_what_is_needed_and_no_secret(protocol: Protocol):
    with protocol.server(key=KEY) as server:
        settings = protocol.settings(server, api_key=KEY, dimensions=256, batch_texts=3)
    recipe = settings.recipe()
    assert KEY not in json.dumps(recipe)
    assert EncoderSettings(**recipe) == settings.model_copy(update={"api_key": None, "show_progress": True})
