"""The runtime ``ollama``, against a stand-in for Ollama."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_rag import GemmaEmbeddings
from gemma_rag.encoders import Input
from gemma_rag.errors import EmbeddingServerError, InputError, ModelUnavailable
from gemma_rag.prompts import Task

from .servers import OLLAMA
from .servers.base import hashed, nobody_there, unit
from .servers.ollama import GEMMA, MINILM, Model, OllamaServer

pytestmark = [pytest.mark.allow_hosts(["127.0.0.1"]), pytest.mark.usefixtures("plain_environment")]

QUERY = "task: search result | query: "


def queries(*texts: str) -> list[Input]:
    return [Input(text, Task.QUERY) for text in texts]


def right(*texts: str) -> np.ndarray:
    return np.stack([unit(hashed(768)(text)) for text in texts])


# -- the model --------------------------------------------------------------------------------------------------------

NAMES = [
    ("embeddinggemma:300m", "embeddinggemma:300m"),
    ("embeddinggemma", "embeddinggemma:latest"),
    ("embeddinggemma", "embeddinggemma:300m"),
    ("embeddinggemma", "embeddinggemma:300m-qat-q8_0"),
    ("google/embeddinggemma-300m", "embeddinggemma:300m"),
    ("google/embeddinggemma-300m", "embeddinggemma:latest"),
    ("embeddinggemma-2", "embeddinggemma-2:latest"),
    ("google/embeddinggemma-2", "embeddinggemma-2:latest"),
    ("minilm", "all-minilm:latest"),
    ("all-minilm", "all-minilm:latest"),
    ("all-minilm:l6-v2", "all-minilm:l6-v2"),
    ("somebody/embeddinggemma:tuned", "somebody/embeddinggemma:tuned"),
]


@pytest.mark.parametrize(("asked", "there"), NAMES)
def test_a_model_is_found_by_each_of_its_names(asked: str, there: str):
    with OllamaServer(Model("llama3.2:latest", digest="0" * 64), Model(there, digest="1" * 64)) as server:
        encoder = OLLAMA.encoder(server, model=asked)
        assert encoder.space.weights.endswith("1" * 16)
        encoder.encode(queries("one"))
        used = server.requests[-1].body["model"]
    assert (used if ":" in used else f"{used}:latest") == there


@pytest.mark.parametrize(
    ("asked", "there", "pull"),
    [
        ("embeddinggemma:300m", "llama3.2:latest", "ollama pull embeddinggemma:300m"),
        ("google/embeddinggemma-300m", "llama3.2:latest", "ollama pull embeddinggemma"),
        ("embeddinggemma", "embeddinggemma-2:latest", "ollama pull embeddinggemma"),
        ("embeddinggemma-2", "embeddinggemma:300m", "ollama pull embeddinggemma-2"),
        ("minilm", "embeddinggemma:300m", "ollama pull all-minilm"),
        ("embeddinggemma:300m", "embeddinggemma:300m-qat-q4_0", "ollama pull embeddinggemma:300m"),  # it was named exactly
        ("minilm", "all-minilm:33m", "ollama pull all-minilm"),  # that is all-MiniLM-L12-v2
        ("all-minilm:33m", "all-minilm:22m", "ollama pull all-minilm:33m"),
    ],
)
def test_a_model_that_is_not_there_is_told_with_the_command_that_fetches_it(asked: str, there: str, pull: str):
    with OllamaServer(Model(there)) as server:
        with pytest.raises(ModelUnavailable, match=pull) as caught:
            GemmaEmbeddings(runtime="ollama", model=asked, url=server.url)
        assert there in str(caught.value)
        assert server.batches == []


def test_a_server_without_any_model_is_told_too():
    with OllamaServer() as server:
        server.models.clear()
        with pytest.raises(ModelUnavailable, match="ollama pull embeddinggemma"):
            GemmaEmbeddings(runtime="ollama", url=server.url)


def test_a_model_that_is_removed_meanwhile_does_not_make_the_server_one_of_old():
    with OllamaServer() as server:
        encoder = OLLAMA.encoder(server)
        server.models.clear()
        with pytest.raises(EmbeddingServerError, match=r'"embeddinggemma:300m" not found, try pulling it first'):
            encoder.encode(queries("one"))
        assert server.asked("/api/embeddings") == 0


@pytest.mark.parametrize("version", ["0.11.9", "0.9.12", "0.1.44"])
def test_a_server_too_old_for_the_model_is_refused(version: str):
    with OllamaServer(version=version) as server, pytest.raises(ModelUnavailable, match=r"0\.11\.10") as caught:
        GemmaEmbeddings(runtime="ollama", model="embeddinggemma:300m", url=server.url)
    assert version in str(caught.value)


@pytest.mark.parametrize(("version", "model"), [("0.11.10", GEMMA), ("0.12.0-rc1", GEMMA), ("1.0.0", GEMMA), ("0.9.0", MINILM)])
def test_a_server_new_enough_is_not(version: str, model: Model):
    with OllamaServer(model, version=version) as server:
        assert OLLAMA.encoder(server, model=model.name).encode(queries("one")).shape == (1, 768)


def test_no_server_is_told_with_the_command_that_starts_it(pauses: list[float]):
    with pytest.raises(EmbeddingServerError, match="ollama serve"):
        GemmaEmbeddings(runtime="ollama", url=nobody_there())


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_the_address_comes_from_ollamas_own_variable(scheme: str, monkeypatch: pytest.MonkeyPatch):
    with OllamaServer() as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url.replace("http://", scheme))
        GemmaEmbeddings(runtime="ollama", show_progress=False).embed_query("one")
        assert server.embedded[-1] == f"{QUERY}one"


def test_the_space_names_what_the_server_computes_with():
    with OllamaServer() as server:
        space = OLLAMA.encoder(server).space
    assert (space.model, space.runtime, space.precision.upper()) == ("embeddinggemma:300m", "ollama", "BF16")
    assert GEMMA.digest[:12] in space.weights
    assert (space.dimensions, space.max_tokens) == (768, 2048)


def test_another_build_of_the_model_is_another_space():
    builds = [GEMMA, Model("embeddinggemma:300m", digest="f" * 64), Model("embeddinggemma:300m", quantization="Q4_0")]
    with OllamaServer() as server:
        spaces = set()
        for build in builds:
            server.models[:] = [build]
            spaces.add(OLLAMA.encoder(server).space.fingerprint)
    assert len(spaces) == 3


# -- requests ---------------------------------------------------------------------------------------------------------


def test_a_request_says_all_that_must_be_said_and_no_more():
    with OllamaServer() as server:
        OLLAMA.encoder(server, max_tokens=512, dimensions=128).encode(queries("one", "two"))
        [request] = server.requests
    assert (request.method, request.path) == ("POST", "/api/embed")
    body = dict(request.body)
    assert sorted(body.pop("input")) == [f"{QUERY}one", f"{QUERY}two"]
    assert body == {"model": "embeddinggemma:300m", "truncate": False, "options": {"num_ctx": 512}}


@pytest.mark.parametrize(
    ("given", "sent"),
    [("5m", {"5m"}), ("1h30m", {"1h30m"}), ("-1", {-1, "-1s", "-1m"}), ("0", {0, "0"}), ("300", {300, "300s"})],
)
def test_how_long_the_model_is_kept_is_said_so_that_ollama_reads_it(given: str, sent: set[Any]):
    with OllamaServer() as server:
        OLLAMA.encoder(server, keep_alive=given).encode(queries("one"))
        assert server.requests[-1].body["keep_alive"] in sent


def test_the_context_is_the_models_own():
    with OllamaServer(Model("embeddinggemma:300m", context=512)) as server:
        assert OLLAMA.encoder(server).space.max_tokens == 512
        with pytest.raises(InputError, match="512"):
            OLLAMA.encoder(server, max_tokens=1024)


def test_the_context_is_the_familys_where_the_server_says_none():
    with OllamaServer(Model("embeddinggemma:300m", context=None)) as server:
        assert OLLAMA.encoder(server).space.max_tokens == 2048


def test_a_model_of_no_known_context_needs_to_be_told_it():
    with OllamaServer(Model("mystery:latest", context=None), limit=512) as server:
        with pytest.raises(ModelUnavailable, match="max_tokens"):
            OLLAMA.encoder(server, model="mystery")
        assert OLLAMA.encoder(server, model="mystery", max_tokens=256).encode(queries("one")).shape == (1, 768)


# -- servers of old ---------------------------------------------------------------------------------------------------


def test_a_server_of_old_is_asked_one_text_at_a_time():
    texts = [f"text {'x ' * i}" for i in range(6)]
    with OllamaServer(MINILM, version="0.1.44", old=True) as server:
        encoder = OLLAMA.encoder(server, model="minilm", concurrency=3, batch_texts=4)
        vectors = encoder.encode(queries(*texts))
        assert server.asked("/api/embeddings") == 6
        assert server.asked("/api/embed") <= 3  # those that were on their way before it was known
        server.forget()
        encoder.encode(queries("known by now"))
        assert [request.path for request in server.requests] == ["/api/embeddings"]
    np.testing.assert_allclose(vectors, right(*texts), atol=1e-6)  # of norm 1, which the server's are not


def test_a_server_of_old_reads_no_text_that_it_would_cut_in_silence():
    text = " ".join(["word"] * 400)
    with OllamaServer(MINILM, version="0.1.44", old=True) as server:
        encoder = OLLAMA.encoder(server, model="minilm", max_tokens=64)
        encoder.encode(queries(text))
        [sent] = server.batches[-1]
        assert text.startswith(sent)
        assert server.count(sent) <= 64


# -- a server that counts more tokens than we do ----------------------------------------------------------------------

LONG = " ".join(f"word{i}" for i in range(50))


def stricter(server: OllamaServer, **options: Any) -> Any:
    """An encoder by whose count `LONG` just fits, while the server finds it four tokens too long."""
    counted = OLLAMA.encoder(server).count_tokens([QUERY + LONG])[0]
    server.models[0] = Model("embeddinggemma:300m", context=counted)
    encoder = OLLAMA.encoder(server, **options)
    server.limit = server.count(QUERY + LONG) - 4
    return encoder


def test_a_text_that_only_the_server_finds_too_long_is_cut_shorter_with_one_warning(caplog: pytest.LogCaptureFixture):
    with OllamaServer() as server:
        encoder = stricter(server)
        caplog.clear()
        vectors = encoder.encode(queries("one", LONG, "two"))
        read = next(text for text in server.embedded if "word" in text)
        assert (QUERY + LONG).startswith(read)
        assert len(QUERY + LONG) * 0.7 < len(read) < len(QUERY + LONG)
    np.testing.assert_allclose(vectors, right(f"{QUERY}one", read, f"{QUERY}two"), atol=1e-6)
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


@pytest.mark.parametrize("overflow", ["error", "average"])
def test_a_text_that_only_the_server_finds_too_long_is_an_error_where_nothing_may_be_cut(overflow: str):
    with OllamaServer() as server:
        encoder = stricter(server, on_overflow=overflow)
        with pytest.raises((EmbeddingServerError, InputError), match="word0 word1"):
            encoder.encode(queries("one", LONG))


# -- a real model -----------------------------------------------------------------------------------------------------


def test_vectors_equal_those_of_sentence_transformers(tiny_gemma: Path):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(tiny_gemma), device="cpu")
    texts = ["How do I reset my password?", "在门户网站重置密码。", "def f(x): return x  # 🙂", "a"]
    with OllamaServer(Model("embeddinggemma:latest"), vector=lambda text: model.encode(text, prompt="") * 5) as server:
        encoder = OLLAMA.encoder(server, model="embeddinggemma")
        for task, name in ((Task.QUERY, "query"), (Task.DOCUMENT, "document"), (Task.CLUSTERING, "Clustering")):
            ours = encoder.encode([Input(text, task) for text in texts])
            theirs = model.encode(texts, prompt_name=name, normalize_embeddings=True)
            assert (ours * theirs).sum(axis=1).min() >= 0.9999
