"""The runtime ``tei``, against a stand-in for Text Embeddings Inference."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_rag import GemmaEmbeddings
from gemma_rag.encoders import Input
from gemma_rag.errors import EmbeddingServerError, InputError, ModelUnavailable
from gemma_rag.prompts import Task

from .servers import TEI
from .servers.base import hashed, unit
from .servers.tei import TeiServer

pytestmark = [pytest.mark.allow_hosts(["127.0.0.1"]), pytest.mark.usefixtures("plain_environment")]

QUERY, DOCUMENT = "task: search result | query: ", "title: none | text: "
CONFIGURED = {  # of the model's config_sentence_transformers.json
    "query": QUERY,
    "document": DOCUMENT,
    "BitextMining": QUERY,
    "Clustering": "task: clustering | query: ",
    "Classification": "task: classification | query: ",
    "InstructionRetrieval": "task: code retrieval | query: ",
    "MultilabelClassification": "task: classification | query: ",
    "PairClassification": "task: sentence similarity | query: ",
    "Reranking": QUERY,
    "Retrieval": QUERY,
    "Retrieval-query": QUERY,
    "Retrieval-document": DOCUMENT,
    "STS": "task: sentence similarity | query: ",
    "Summarization": "task: summarization | query: ",
}
INPUTS = [
    Input("What now?", Task.QUERY),
    Input("A text.", Task.DOCUMENT),
    Input("A text.", Task.DOCUMENT, "Of some title"),
    Input("A text.", Task.CLUSTERING),
    Input("A text.", Task.FACT_CHECKING),  # no name of the configuration is for it
]
READ = [
    f"{QUERY}What now?",
    f"{DOCUMENT}A text.",
    "title: Of some title | text: A text.",
    "task: clustering | query: A text.",
    "task: fact checking | query: A text.",
]


def queries(*texts: str) -> list[Input]:
    return [Input(text, Task.QUERY) for text in texts]


def right(*texts: str) -> np.ndarray:
    return np.stack([unit(hashed(768)(text)) for text in texts])


# -- what the server says of itself -----------------------------------------------------------------------------------


def test_the_space_names_what_the_server_computes_with():
    with TeiServer(dtype="float16", limit=1024) as server:
        space = TEI.encoder(server).space
    assert (space.model, space.runtime, space.precision) == ("google/embeddinggemma-300m", "tei", "float16")
    assert server.sha is not None
    assert server.sha[:12] in space.weights
    assert (space.dimensions, space.max_tokens) == (768, 1024)


def test_a_model_without_a_revision_is_known_by_its_name():
    with TeiServer(sha=None) as server, TeiServer("somebody/embeddinggemma-300m-tuned", sha=None) as other:
        weights = TEI.encoder(server).space.weights
        assert weights.startswith("server:")
        assert weights != TEI.encoder(other, model="somebody/embeddinggemma-300m-tuned").space.weights


def test_no_request_has_more_texts_than_the_server_takes():
    texts = [f"number {i}" for i in range(21)]
    with TeiServer(batch=8) as server:
        vectors = TEI.encoder(server).encode(queries(*texts))
        assert max(map(len, server.batches)) == 8
        assert len(server.batches) == 3
    np.testing.assert_allclose(vectors, right(*(QUERY + text for text in texts)), atol=1e-6)


def test_a_request_lets_nothing_be_cut_and_asks_for_no_dimensions():
    with TeiServer() as server:
        TEI.encoder(server, dimensions=128).encode(queries("one"))
        [request] = [request for request in server.requests if request.path == "/embed"]
    assert request.body["truncate"] is False
    assert request.body.keys() <= {"inputs", "truncate", "normalize", "prompt_name"}


def test_more_tokens_than_the_server_takes_are_refused():
    with TeiServer(limit=512) as server, pytest.raises(InputError, match="512"):
        TEI.encoder(server, max_tokens=1024)


@pytest.mark.parametrize("kind", ["reranker", "classifier"])
def test_a_server_of_another_kind_of_model_is_refused(kind: str):
    with TeiServer(kind=kind) as server, pytest.raises((ModelUnavailable, EmbeddingServerError), match="embedding"):
        GemmaEmbeddings(runtime="tei", url=server.url)


def test_a_server_of_another_model_than_asked_for_is_refused():
    with TeiServer("BAAI/bge-small-en-v1.5") as server, pytest.raises(ModelUnavailable, match="bge-small-en") as caught:
        GemmaEmbeddings(runtime="tei", model="google/embeddinggemma-300m", url=server.url)
    assert "google/embeddinggemma-300m" in str(caught.value)


def test_what_is_no_tei_is_told():
    with TeiServer() as server, pytest.raises((ModelUnavailable, EmbeddingServerError), match="/info"):
        GemmaEmbeddings(runtime="tei", url=f"{server.url}/v1")


# -- prompts ----------------------------------------------------------------------------------------------------------

KNOWN = {
    "none": None,
    "all": CONFIGURED,
    "others, for other tasks": {"web": "web: ", "passage_v2": "p: "},
    "the same names with other words": {"query": "query: ", "document": "passage: ", "Clustering": "cluster: "},
    "some": {"document": DOCUMENT},
    "an empty one": {"query": "", "document": ""},
}


@pytest.mark.parametrize("prompts", KNOWN.values(), ids=KNOWN)
def test_each_prompt_is_there_exactly_once_whatever_the_server_knows(prompts: dict[str, str] | None):
    with TeiServer(prompts=prompts) as server:
        vectors = TEI.encoder(server).encode(INPUTS)
        assert Counter(server.embedded) == Counter(READ)
    np.testing.assert_allclose(vectors, right(*READ), atol=1e-6)


def test_the_servers_own_prompts_are_used_by_name():
    with TeiServer(prompts=CONFIGURED) as server:
        TEI.encoder(server).encode(INPUTS)
        asked = [request for request in server.requests if request.path == "/embed"]
    without_name = [text for request in asked if not request.body.get("prompt_name") for text in request.body["inputs"]]
    assert sorted(without_name) == sorted([READ[2], READ[4]])


def test_the_bound_on_requests_holds_for_prompts_by_name_too():
    with TeiServer(prompts=CONFIGURED) as server:
        encoder = TEI.encoder(server, concurrency=2)
        server.hold = 2
        server.delay = lambda batch: 0.01
        vectors = encoder.encode(INPUTS)  # one batch, several names
        assert server.most == 2
    np.testing.assert_allclose(vectors, right(*READ), atol=1e-6)


def test_prompts_of_ones_own_are_put_by_us():
    with TeiServer(prompts=CONFIGURED) as server:
        TEI.encoder(server, prompts="none").encode(INPUTS)
        assert sorted(server.embedded) == ["A text.", "Of some title\nA text.", "What now?"]


@pytest.mark.parametrize("default", [QUERY, DOCUMENT, "represent: "])
@pytest.mark.parametrize("prompts", [None, CONFIGURED], ids=["no names", "names"])
def test_a_server_that_puts_a_prompt_by_itself_is_refused(default: str, prompts: dict[str, str] | None):
    server = TeiServer(prompts=prompts, default_prompt=default)
    with server, pytest.raises(ModelUnavailable, match="without --default-prompt"):
        TEI.encoder(server)


# -- limits -----------------------------------------------------------------------------------------------------------


def test_a_batch_that_is_refused_is_halved_and_the_limit_remembered():
    texts = [f"number {i}" for i in range(16)]
    with TeiServer(batch=16) as server:
        encoder = TEI.encoder(server, concurrency=1)
        server.batch = 4
        vectors = encoder.encode(queries(*texts))
        server.forget()
        encoder.encode(queries(*texts[::-1]))
        assert max(map(len, server.batches)) <= 4
    np.testing.assert_allclose(vectors, right(*(QUERY + text for text in texts)), atol=1e-6)


def test_more_texts_in_a_request_than_the_server_takes_do_no_harm():
    texts = [f"number {i}" for i in range(12)]
    with TeiServer(batch=4) as server:
        vectors = TEI.encoder(server, batch_texts=12).encode(queries(*texts))
    np.testing.assert_allclose(vectors, right(*(QUERY + text for text in texts)), atol=1e-6)


LONG = " ".join(f"word{i}" for i in range(50))


def stricter(server: TeiServer, **options: Any) -> Any:
    """An encoder by whose count `LONG` just fits, while the server finds it four tokens too long."""
    server.limit = TEI.encoder(server).count_tokens([QUERY + LONG])[0]
    encoder = TEI.encoder(server, **options)
    server.limit = server.count(QUERY + LONG) - 4
    return encoder


def test_a_text_that_only_the_server_finds_too_long_is_cut_shorter_with_one_warning(caplog: pytest.LogCaptureFixture):
    with TeiServer() as server:
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
    with TeiServer() as server:
        encoder = stricter(server, on_overflow=overflow)
        with pytest.raises((EmbeddingServerError, InputError), match="word0 word1"):
            encoder.encode(queries("one", LONG))


# -- a real model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True], ids=["our prompts", "the server's"])
def test_vectors_equal_those_of_sentence_transformers(tiny_gemma: Path, named: bool):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(tiny_gemma), device="cpu")
    texts = ["How do I reset my password?", "在门户网站重置密码。", "def f(x): return x  # 🙂", "a"]
    prompts = dict(model.prompts) if named else None
    with TeiServer(vector=lambda text: model.encode(text, prompt="") * 5, prompts=prompts) as server:
        encoder = TEI.encoder(server)
        for task, name in ((Task.QUERY, "query"), (Task.DOCUMENT, "document"), (Task.CLUSTERING, "Clustering")):
            ours = encoder.encode([Input(text, task) for text in texts])
            theirs = model.encode(texts, prompt_name=name, normalize_embeddings=True)
            assert (ours * theirs).sum(axis=1).min() >= 0.9999
