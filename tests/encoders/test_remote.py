"""What holds for every runtime that asks a server, on each protocol, against strict stand-ins."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from gemma_rag import Document, GemmaEmbeddings, KnowledgeBase, TwoStageRetriever, cli
from gemma_rag.encoders import EncoderSettings, Input
from gemma_rag.errors import InputError
from gemma_rag.prompts import Task

from .servers import Protocol
from .servers.base import (
    Fault,
    hashed,
    unit,
    wait_until,
)

pytestmark = [pytest.mark.allow_hosts(["127.0.0.1"]), pytest.mark.usefixtures("plain_environment")]

PROMPTS = {  # as the model card has them
    Task.QUERY: "task: search result | query: ",
    Task.DOCUMENT: "title: none | text: ",
    Task.CLASSIFICATION: "task: classification | query: ",
    Task.CLUSTERING: "task: clustering | query: ",
    Task.SIMILARITY: "task: sentence similarity | query: ",
    Task.CODE_QUERY: "task: code retrieval | query: ",
    Task.QUESTION_ANSWERING: "task: question answering | query: ",
    Task.FACT_CHECKING: "task: fact checking | query: ",
    Task.SUMMARIZATION: "task: summarization | query: ",
}
KEY = "k3y-0f-ours"
MIXED = [
    *(Input(f"a {task.value} of some kind", task) for task in Task),
    Input("Reset it in the portal.", Task.DOCUMENT, "Passwords"),
    Input("在门户网站重置密码。", Task.DOCUMENT, " 密码\t与  登录 "),
]
READ = [
    *(PROMPTS[task] + f"a {task.value} of some kind" for task in Task),
    "title: Passwords | text: Reset it in the portal.",
    "title: 密码 与 登录 | text: 在门户网站重置密码。",
]


def queries(*texts: str) -> list[Input]:
    return [Input(text, Task.QUERY) for text in texts]


def right(texts: list[str], dimensions: int = 768) -> np.ndarray:
    """The vectors that a stand-in's model has for prompted texts, cut and normalised by hand."""
    return np.stack([unit(hashed(768)(text)[:dimensions]) for text in texts])


def right_queries(*texts: str) -> np.ndarray:
    return right([PROMPTS[Task.QUERY] + text for text in texts])


# -- vectors ----------------------------------------------------------------------------------------------------------


def test_each_task_has_its_prompt_exactly_once(protocol: Protocol):
    with protocol.server() as server:
        encoder = protocol.encoder(server)
        encoder.encode(MIXED)
        assert Counter(server.embedded) == Counter(READ)


@pytest.mark.parametrize("dimensions", [768, 512, 256, 128])
def test_vectors_are_cut_and_of_norm_one(protocol: Protocol, dimensions: int):
    with protocol.server() as server:
        vectors = protocol.encoder(server, dimensions=dimensions).encode(MIXED)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(vectors, right(READ, dimensions), atol=1e-6)


def test_the_same_engine_serves_another_dimension(protocol: Protocol):
    with protocol.server() as server:
        encoder = protocol.encoder(server)
        np.testing.assert_allclose(encoder.at(128).encode(MIXED), right(READ, 128), atol=1e-6)
        assert server.asked(protocol.path) == len(server.batches) > 0


def test_a_dimension_that_the_model_was_not_trained_for_is_refused(protocol: Protocol):
    with protocol.server() as server, pytest.raises(InputError, match="768, 512, 256, 128"):
        _ = protocol.encoder(server, dimensions=100).space


def test_more_dimensions_than_the_model_has_are_refused(protocol: Protocol):
    with protocol.server() as server, pytest.raises(InputError, match="1024"):
        _ = protocol.encoder(server, dimensions=1024).space


def test_the_server_is_never_asked_to_cut(protocol: Protocol):
    with protocol.server() as server:
        protocol.encoder(server, dimensions=128).encode(MIXED)
        assert not any("dimensions" in request.body for request in server.requests if request.path == protocol.path)


def test_order_is_kept_whichever_answer_comes_first(protocol: Protocol):
    texts = [f"text {'x ' * i}" for i in range(12)]
    with protocol.server() as server:
        encoder = protocol.encoder(server, batch_texts=1, concurrency=4)
        server.delay = lambda batch: len(batch[0]) % 3 * 0.01
        np.testing.assert_allclose(encoder.encode(queries(*texts)), right_queries(*texts), atol=1e-6)


# -- batches and concurrency ------------------------------------------------------------------------------------------


def test_no_request_has_more_texts_than_allowed(protocol: Protocol):
    with protocol.server() as server:
        protocol.encoder(server, batch_texts=4).encode(queries(*map(str, range(10))))
        assert sorted(map(len, server.batches)) == [2, 4, 4]


def test_the_bound_on_requests_is_reached_and_never_passed(protocol: Protocol):
    with protocol.server() as server:
        encoder = protocol.encoder(server, batch_texts=1, concurrency=3)
        server.hold = 3
        server.delay = lambda batch: 0.01  # time for a fourth to show itself
        encoder.encode(queries(*map(str, range(12))))
        assert server.most == 3


def test_the_bound_holds_for_all_threads_together(protocol: Protocol):
    with protocol.server() as server:
        encoder = protocol.encoder(server, batch_texts=1, concurrency=3)
        server.hold = 3
        server.delay = lambda batch: 0.01
        with ThreadPoolExecutor(6) as pool:
            texts = [[f"{i} {j}" for j in range(3)] for i in range(6)]
            results = list(pool.map(lambda some: encoder.encode(queries(*some)), texts))
        for some, vectors in zip(texts, results, strict=True):
            np.testing.assert_allclose(vectors, right_queries(*some), atol=1e-6)
        assert server.most == 3


def test_connections_are_used_again(protocol: Protocol):
    with protocol.server() as server:
        encoder = protocol.encoder(server, batch_texts=1, concurrency=2)
        for i in range(5):
            encoder.encode(queries(f"{i}", f"{i} and more"))
        assert server.asked(protocol.path) == 10
        assert len({request.connection for request in server.requests}) <= 2


# -- asynchronous -----------------------------------------------------------------------------------------------------


def test_one_event_loop_after_the_other_and_a_thread_between(protocol: Protocol):
    with protocol.server() as server:
        encoder = protocol.encoder(server, batch_texts=2)
        first = asyncio.run(encoder.aencode(MIXED))
        between = encoder.encode(MIXED)
        second = asyncio.run(encoder.aencode(MIXED))
    for vectors in (first, between, second):
        np.testing.assert_allclose(vectors, right(READ), atol=1e-6)


def test_asynchronous_calls_run_at_a_time_and_within_the_bound(protocol: Protocol):
    with protocol.server() as server:
        encoder = protocol.encoder(server, batch_texts=1, concurrency=3)
        server.hold = 3
        server.delay = lambda batch: 0.01

        async def all_at_once():
            return await asyncio.gather(*(encoder.aencode(queries(f"number {i}")) for i in range(9)))

        rows = np.concatenate(asyncio.run(all_at_once()))
        np.testing.assert_allclose(rows, right_queries(*(f"number {i}" for i in range(9))), atol=1e-6)
        assert server.most == 3


def test_a_cancelled_call_ends_at_once_and_leaves_its_place_to_others(protocol: Protocol):
    with protocol.server() as server:
        encoder = protocol.encoder(server, concurrency=1)
        server.fail(Fault(delay=5))

        async def cancelled():
            task = asyncio.create_task(encoder.aencode(queries("slow")))
            assert await asyncio.to_thread(wait_until, lambda: server.asked(protocol.path) == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        began = time.monotonic()
        asyncio.run(cancelled())
        np.testing.assert_allclose(encoder.encode(queries("next")), right_queries("next"), atol=1e-6)
        assert time.monotonic() - began < 2


def test_a_call_that_waits_may_be_made_in_an_event_loop_too(protocol: Protocol):
    with protocol.server() as server:
        encoder = protocol.encoder(server)

        async def waits():
            return encoder.encode(queries("one"))

        np.testing.assert_allclose(asyncio.run(waits()), right_queries("one"), atol=1e-6)


def test_the_event_loop_goes_on_meanwhile(protocol: Protocol):
    with protocol.server() as server:
        encoder = protocol.encoder(server)
        server.fail(Fault(delay=0.1))

        async def with_a_clock():
            task, ticks = asyncio.create_task(encoder.aencode(queries("slow"))), 0
            while not task.done():
                await asyncio.sleep(0.005)
                ticks += 1
            return ticks

        assert asyncio.run(with_a_clock()) >= 3


# -- texts that are too long ------------------------------------------------------------------------------------------

LONG = " ".join(f"word{i}" for i in range(400))


def test_a_text_that_is_too_long_is_cut_with_one_warning(protocol: Protocol, caplog: pytest.LogCaptureFixture):
    with protocol.server(limit=64) as server:
        encoder = protocol.encoder(server, max_tokens=64)
        vectors = encoder.encode(queries("short", LONG))
        whole = PROMPTS[Task.QUERY] + LONG
        read = next(text for text in server.embedded if text != PROMPTS[Task.QUERY] + "short")
        assert whole.startswith(read)
        assert server.count(read) <= 64
        np.testing.assert_allclose(vectors, right([PROMPTS[Task.QUERY] + "short", read]), atol=1e-6)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith("1 of 2 texts are longer than the context of 64 tokens")


def test_a_text_that_is_too_long_is_refused_where_asked(protocol: Protocol):
    with protocol.server(limit=64) as server:
        encoder = protocol.encoder(server, max_tokens=64, on_overflow="error")
        with pytest.raises(InputError, match=r"1 of 3 texts are longer than the context of 64 tokens.* index 1"):
            encoder.encode(queries("short", LONG, "shorter"))
        assert server.batches == []


def test_the_parts_of_a_text_that_is_too_long_are_averaged(protocol: Protocol):
    with protocol.server(limit=64) as server:
        encoder = protocol.encoder(server, max_tokens=64, on_overflow="average")
        [vector] = encoder.encode(queries(LONG))
        parts = list(server.embedded)
        assert all(server.count(text) <= 64 for text in parts)
    prompt = PROMPTS[Task.QUERY]
    assert all(text.startswith(prompt) for text in parts)
    pieces = sorted((text.removeprefix(prompt) for text in parts), key=LONG.index)
    assert len(pieces) > 1
    assert "".join(pieces).split() == LONG.split()
    weights, *_ = np.linalg.lstsq(right(parts).T.astype(np.float64), vector.astype(np.float64), rcond=None)
    np.testing.assert_allclose(right(parts).T @ weights, vector, atol=1e-5)
    assert (weights > 0).all()
    np.testing.assert_allclose(np.linalg.norm(vector), 1, atol=1e-6)


# -- settings and the knowledge base ----------------------------------------------------------------------------------


@pytest.mark.parametrize("unused", [{"device": "cpu"}, {"batch_tokens": 512}, {"precision": "bfloat16"}])
def test_settings_that_a_server_does_not_use_are_refused(protocol: Protocol, unused: dict):
    with pytest.raises(ValidationError, match=next(iter(unused))):
        EncoderSettings(runtime=protocol.runtime, **unused)


@pytest.mark.parametrize(
    "unused", [{"url": "http://localhost:1"}, {"api_key": KEY}, {"tokenizer": "t"}, {"timeout": 1.0}, {"concurrency": 2}]
)
def test_settings_that_only_a_server_uses_are_refused_elsewhere(unused: dict):
    with pytest.raises(ValidationError, match=next(iter(unused))) as caught:
        EncoderSettings(runtime="sentence-transformers", model="minilm", **unused)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:11434", "ftp://host", f"http://me:{KEY}@host", f"http://host/?key={KEY}"])
def test_an_address_that_is_none_is_refused_without_quoting_it(protocol: Protocol, url: str):
    with pytest.raises(ValidationError, match="url") as caught:
        EncoderSettings(runtime=protocol.runtime, url=url)
    assert KEY not in str(caught.value)


def test_two_encoders_of_one_server_share_their_space(protocol: Protocol):
    with protocol.server() as server:
        one, other = protocol.encoder(server).space, protocol.encoder(server, concurrency=1).space
        cut = protocol.encoder(server, dimensions=128).space
    assert one.runtime == protocol.runtime
    assert one.dimensions == 768
    assert one.fingerprint == other.fingerprint != cut.fingerprint


def test_a_knowledge_base_is_saved_and_opened_again(protocol: Protocol, tmp_path: Path):
    with protocol.server() as server:
        embeddings = GemmaEmbeddings(runtime=protocol.runtime, model=protocol.model, url=server.url)
        documents = [Document(id=name, text=f"About {name}.", title=name, category=name) for name in ("cats", "dogs", "birds")]
        with KnowledgeBase.from_documents(documents, embeddings) as built:
            built.save(tmp_path / "kb")
        server.forget()
        with KnowledgeBase.open(tmp_path / "kb") as opened:
            assert len(opened) == 3
            TwoStageRetriever(opened, mode="flat").retrieve("About dogs.")
        assert server.embedded[-1] == PROMPTS[Task.QUERY] + "About dogs."


def test_a_server_that_has_moved_is_asked_where_it_is_now(protocol: Protocol, tmp_path: Path, capsys):
    with protocol.server() as server:
        embeddings = GemmaEmbeddings(runtime=protocol.runtime, model=protocol.model, url=server.url)
        with KnowledgeBase.from_documents([Document(id="a", text="About dogs.", category="pets")], embeddings) as built:
            built.save(tmp_path / "kb")
    with protocol.server() as moved:
        assert cli.run(["ask", str(tmp_path / "kb"), "About dogs.", "--url", moved.url, "--json"]) in (0, 3)
        assert PROMPTS[Task.QUERY] + "About dogs." in moved.embedded
    assert cli.run(["ask", str(tmp_path / "kb"), "About dogs.", "--url", "ftp://host", "--json"]) == 2
    assert "url is an address" in capsys.readouterr().err


def test_texts_are_counted_as_the_server_counts_or_above(protocol: Protocol):
    texts = ["one", "What is it, then?", "在门户网站重置密码。", "x" * 90, "naïve café"]
    with protocol.server() as server:
        counts = protocol.encoder(server).count_tokens(texts)
        assert all(count >= server.count(text) for count, text in zip(counts, texts, strict=True))


def test_an_encoder_that_is_dropped_leaves_nothing_open(protocol: Protocol):
    with protocol.server() as server:
        encoder = protocol.encoder(server)
        encoder.encode(queries("one"))
        del encoder
        gc.collect()
        assert wait_until(lambda: not server.connected())
