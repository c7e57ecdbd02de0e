"""The runtime ``openai``, against stand-ins for the servers that speak ``/v1/embeddings``, each in its own way."""

from __future__ import annotations

import base64
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_rag import GemmaEmbeddings
from gemma_rag.encoders import Input
from gemma_rag.errors import EmbeddingServerError, InputError, ModelUnavailable
from gemma_rag.prompts import Task

from .servers import OPENAI
from .servers import openai as ways
from .servers.base import Fault, hashed, status, unit
from .servers.openai import OpenAIServer, Ways

pytestmark = [pytest.mark.allow_hosts(["127.0.0.1"]), pytest.mark.usefixtures("plain_environment")]

QUERY = "task: search result | query: "
WAYS = {
    "OpenAI": ways.OPENAI,
    "vLLM": ways.VLLM,
    "llama.cpp": ways.LLAMA_CPP,
    "Infinity": ways.INFINITY,
    "TEI": ways.TEI,
    "LM Studio": ways.LM_STUDIO,
    "rows backwards": ways.BACKWARDS,
    "no base64": ways.NUMBERS_ONLY,
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def queries(*texts: str) -> list[Input]:
    return [Input(text, Task.QUERY) for text in texts]


def right(*texts: str, dimensions: int = 768) -> np.ndarray:
    return np.stack([unit(hashed(768)(text)[:dimensions]) for text in texts])


# -- each server's ways -----------------------------------------------------------------------------------------------


@each_way
@pytest.mark.parametrize("dimensions", [768, 256])
def test_the_vectors_are_right_on_each_server(way: Ways, dimensions: int):
    texts = [f"text {'x ' * i}" for i in range(9)]
    with OpenAIServer(ways=way) as server:
        vectors = OPENAI.encoder(server, dimensions=dimensions, batch_texts=4).encode(queries(*texts))
    np.testing.assert_allclose(vectors, right(*(QUERY + text for text in texts), dimensions=dimensions), atol=1e-6)


def test_a_request_says_all_that_must_be_said_and_no_more():
    with OpenAIServer() as server:
        OPENAI.encoder(server, dimensions=128).encode(queries("one"))
        [request] = server.requests
    assert (request.method, request.path) == ("POST", "/v1/embeddings")
    assert request.body == {"model": "google/embeddinggemma-300m", "input": [f"{QUERY}one"], "encoding_format": "base64"}


def test_a_server_that_knows_no_base64_is_asked_for_it_once_and_then_for_numbers():
    with OpenAIServer(ways=ways.NUMBERS_ONLY) as server:
        encoder = GemmaEmbeddings(runtime="openai", url=server.url, show_progress=False)
        for i in range(3):
            encoder.embed_query(f"number {i}")
        formats = [request.body.get("encoding_format") for request in server.requests if request.path == "/v1/embeddings"]
    assert formats.count("base64") <= 1
    assert set(formats[1:]) <= {"float", None}


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_the_address_may_end_in_v1(end: str):
    with OpenAIServer() as server:
        OPENAI.encoder(server, url=server.url + end).encode(queries("one"))
        assert server.embedded == [f"{QUERY}one"]


BROKEN = {
    "an index that comes twice": lambda data: [{**row, "index": 0} for row in data],
    "an index beyond the end": lambda data: [{**row, "index": row["index"] + 1} for row in data],
    "a negative index": lambda data: [{**row, "index": row["index"] - 1} for row in data],
    "an index that is no number": lambda data: [{**row, "index": "first"} for row in data],
    "a row without a vector": lambda data: [{"index": row["index"]} for row in data],
    "a vector that is no base64": lambda data: [{**row, "embedding": "!!"} for row in data],
    "bytes that are no numbers": lambda data: [{**row, "embedding": base64.b64encode(b"\x00" * 3071).decode()} for row in data],
    "an empty vector": lambda data: [{**row, "embedding": []} for row in data],
    "nothing": lambda data: [],
    "null": lambda data: None,
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_an_answer_that_breaks_the_protocol_is_refused(broken: Any):
    with OpenAIServer() as server:
        encoder = OPENAI.encoder(server)
        server.fail(Fault(body=lambda body: {**body, "data": broken(body["data"])}))
        with pytest.raises(EmbeddingServerError, match=server.url):
            encoder.encode(queries("one", "and two"))
        assert server.asked("/v1/embeddings") == 1


# -- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [["another"], ["one", "another"], ["google/embeddinggemma-2"]])
def test_a_model_that_is_not_listed_is_told_with_those_that_are(listed: list[str]):
    with OpenAIServer(*listed) as server:
        with pytest.raises(ModelUnavailable, match=listed[-1]) as caught:
            GemmaEmbeddings(runtime="openai", model="google/embeddinggemma-300m", url=server.url)
        assert "google/embeddinggemma-300m" in str(caught.value)
        assert server.batches == []


@pytest.mark.parametrize("fault", [None, status(404), status(405)], ids=["an empty list", "404", "405"])
def test_a_server_that_lists_nothing_is_believed_to_have_it(fault: Fault | None):
    with OpenAIServer(listed=[]) as server:
        server.fail(*[fault] if fault else [], path="/v1/models")
        assert OPENAI.encoder(server).encode(queries("one")).shape == (1, 768)


@pytest.mark.parametrize("asked", ["embeddinggemma", "google/embeddinggemma-300m"])
def test_a_short_name_is_translated(asked: str):
    with OpenAIServer("google/embeddinggemma-300m") as server:
        OPENAI.encoder(server, model=asked).encode(queries("one"))
        assert server.requests[-1].body["model"] == "google/embeddinggemma-300m"


def test_a_file_by_which_llama_cpp_lists_its_model_is_a_name_too():
    name = "/models/embeddinggemma-300M-Q8_0.gguf"
    with OpenAIServer(name, ways=ways.LLAMA_CPP) as server:
        OPENAI.encoder(server, model=name).encode(queries("one"))
        assert server.embedded == [f"{QUERY}one"]  # the profile is known by the file's name


@pytest.mark.parametrize("way", [ways.VLLM, ways.LLAMA_CPP], ids=["vLLM", "llama.cpp"])
def test_the_context_is_what_the_server_says(way: Ways):
    with OpenAIServer(ways=way, limit=512) as server:
        assert OPENAI.encoder(server).space.max_tokens == 512
        with pytest.raises(InputError, match="512"):
            OPENAI.encoder(server, max_tokens=1024)


def test_the_context_is_the_familys_where_the_server_says_none():
    with OpenAIServer() as server:
        assert OPENAI.encoder(server).space.max_tokens == 2048


def test_a_model_of_no_known_context_needs_to_be_told_it():
    with OpenAIServer("mystery") as server:
        with pytest.raises(ModelUnavailable, match="max_tokens"):
            OPENAI.encoder(server, model="mystery")
        assert OPENAI.encoder(server, model="mystery", max_tokens=256).space.max_tokens == 256


def test_the_space_names_the_server_and_the_model():
    with OpenAIServer("google/embeddinggemma-300m", "google/embeddinggemma-2") as server:
        space = OPENAI.encoder(server).space
        other = OPENAI.encoder(server, model="google/embeddinggemma-2").space
    assert (space.model, space.runtime, space.precision) == ("google/embeddinggemma-300m", "openai", "server")
    assert space.weights == "server:google/embeddinggemma-300m"
    assert space.fingerprint != other.fingerprint


# -- limits -----------------------------------------------------------------------------------------------------------

LIMITED = {"413, TEI's": ways.TEI, "422, Infinity's": ways.INFINITY, "400, OpenAI's": ways.OPENAI}


@pytest.mark.parametrize("way", LIMITED.values(), ids=LIMITED)
def test_a_batch_that_is_refused_is_halved_and_the_limit_remembered(way: Ways):
    texts = [f"number {i}" for i in range(16)]
    with OpenAIServer(ways=way, batch=5) as server:
        encoder = OPENAI.encoder(server, batch_texts=16, concurrency=1)
        vectors = encoder.encode(queries(*texts))
        server.forget()
        encoder.encode(queries(*texts[::-1]))
        assert max(map(len, server.batches)) <= 5
    np.testing.assert_allclose(vectors, right(*(QUERY + text for text in texts)), atol=1e-6)


LONG = " ".join(f"word{i}" for i in range(50))
STRICT = {"OpenAI": ways.OPENAI, "vLLM": ways.VLLM, "llama.cpp": ways.LLAMA_CPP, "TEI": ways.TEI}
each_strict = pytest.mark.parametrize("way", STRICT.values(), ids=STRICT)


def stricter(server: OpenAIServer, **options: Any) -> Any:
    """An encoder by whose count `LONG` just fits, while the server finds it four tokens too long."""
    counted = OPENAI.encoder(server).count_tokens([QUERY + LONG])[0]
    encoder = OPENAI.encoder(server, max_tokens=counted, **options)
    server.limit = server.count(QUERY + LONG) - 4
    return encoder


@each_strict
def test_a_text_that_only_the_server_finds_too_long_is_cut_shorter_with_one_warning(
    way: Ways, caplog: pytest.LogCaptureFixture, pauses: list[float]
):
    with OpenAIServer(ways=way) as server:
        encoder = stricter(server)
        caplog.clear()
        vectors = encoder.encode(queries("one", LONG, "two"))
        read = next(text for text in server.embedded if "word" in text)
        assert (QUERY + LONG).startswith(read)
        assert len(QUERY + LONG) * 0.7 < len(read) < len(QUERY + LONG)
    np.testing.assert_allclose(vectors, right(f"{QUERY}one", read, f"{QUERY}two"), atol=1e-6)
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    assert pauses == []


@each_strict
@pytest.mark.parametrize("overflow", ["error", "average"])
def test_a_text_that_only_the_server_finds_too_long_is_an_error_where_nothing_may_be_cut(way: Ways, overflow: str):
    with OpenAIServer(ways=way) as server:
        encoder = stricter(server, on_overflow=overflow)
        with pytest.raises((EmbeddingServerError, InputError), match="word0 word1"):
            encoder.encode(queries("one", LONG))


# -- a real model -----------------------------------------------------------------------------------------------------


def test_vectors_equal_those_of_sentence_transformers(tiny_gemma: Path):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(tiny_gemma), device="cpu")
    texts = ["How do I reset my password?", "在门户网站重置密码。", "def f(x): return x  # 🙂", "a"]
    with OpenAIServer(vector=lambda text: model.encode(text, prompt="") * 5, ways=ways.LLAMA_CPP) as server:
        encoder = OPENAI.encoder(server)
        for task, name in ((Task.QUERY, "query"), (Task.DOCUMENT, "document"), (Task.CLUSTERING, "Clustering")):
            ours = encoder.encode([Input(text, task) for text in texts])
            theirs = model.encode(texts, prompt_name=name, normalize_embeddings=True)
            assert (ours * theirs).sum(axis=1).min() >= 0.9999
