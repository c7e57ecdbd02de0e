import asyncio
import copy
import pickle
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index_gemma_rag import GemmaEmbedding
from pydantic import BaseModel, PrivateAttr, ValidationError

from gemma_rag import GemmaEmbeddings, Task
from gemma_rag.errors import InputError
from gemma_rag.prompts import EMBEDDINGGEMMA

TEXTS = ["Reset it in the portal.", "Install the client.", "在门户里重置密码。"]


@pytest.fixture
def model(gemma):
    return GemmaEmbedding(gemma)


# -- the six methods ----------------------------------------------------------------------------------------------------


def test_a_question_is_embedded_behind_the_query_prompt(model, gemma):
    assert model.get_query_embedding("How?") == gemma.embed_query("How?")


def test_a_text_is_embedded_behind_the_document_prompt(model, gemma):
    assert model.get_text_embedding(TEXTS[0]) == gemma.embed_documents(TEXTS[:1])[0]


def test_texts_are_embedded_behind_the_document_prompt(model, gemma):
    assert model.get_text_embedding_batch(TEXTS) == gemma.embed_documents(TEXTS)


def test_a_text_and_a_question_of_the_same_words_differ(model):
    assert not np.allclose(model.get_query_embedding("How?"), model.get_text_embedding("How?"), atol=0.01)


async def test_the_asynchronous_methods_give_the_same(model):
    assert await model.aget_query_embedding("How?") == model.get_query_embedding("How?")
    assert await model.aget_text_embedding(TEXTS[0]) == model.get_text_embedding(TEXTS[0])
    assert await model.aget_text_embedding_batch(TEXTS) == model.get_text_embedding_batch(TEXTS)


def test_no_texts_give_no_vectors(model):
    assert model.get_text_embedding_batch([]) == []


async def test_no_texts_give_no_vectors_asynchronously(model):
    assert await model.aget_text_embedding_batch([]) == []


def test_vectors_have_norm_1_after_a_cut_to_fewer_dimensions(tiny_gemma):
    model = GemmaEmbedding(model=str(tiny_gemma), dimensions=24, untrained_dimensions=True, device="cpu", show_progress=False)
    rows = np.array([model.get_query_embedding("How?"), model.get_text_embedding("So.")])
    assert rows.shape == (2, 24)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-6)


# -- calls --------------------------------------------------------------------------------------------------------------


def test_five_hundred_texts_are_one_call(counting):
    GemmaEmbedding(counting).get_text_embedding_batch([f"text {i}" for i in range(500)])
    assert counting._calls == [500]


async def test_five_hundred_texts_are_one_call_asynchronously(counting):
    await GemmaEmbedding(counting).aget_text_embedding_batch([f"text {i}" for i in range(500)])
    assert counting._calls == [500]


async def test_workers_are_given_whole_batches(counting):
    model = GemmaEmbedding(counting, embed_batch_size=20, num_workers=2)
    rows = await model.aget_text_embedding_batch([f"text {i}" for i in range(60)])
    assert counting._calls == [20, 20, 20]
    assert rows == model.get_text_embedding_batch([f"text {i}" for i in range(60)])


async def test_the_event_loop_is_not_held_up(model, monkeypatch):
    loop_thread, seen = threading.get_ident(), []
    inner = model.embeddings._encoder
    encode = inner.encode
    monkeypatch.setattr(inner, "encode", lambda inputs: (seen.append(threading.get_ident()), encode(inputs))[1])
    await asyncio.gather(model.aget_query_embedding("How?"), model.aget_text_embedding_batch(TEXTS))
    assert len(seen) == 2
    assert loop_thread not in seen


async def test_the_event_loop_is_not_held_up_while_the_model_is_loaded(counting, monkeypatch):
    loop_thread, seen = threading.get_ident(), []
    profile = type(counting).profile.fget
    monkeypatch.setattr(
        type(counting), "profile", property(lambda self: (seen.append(threading.get_ident()), profile(self))[1])
    )
    await GemmaEmbedding(counting).aget_text_embedding("text")
    assert seen
    assert loop_thread not in seen


# -- several questions as one -------------------------------------------------------------------------------------------


def test_the_mean_of_questions_has_norm_1(model, gemma):
    rows = gemma.embed(["How?", "Where?"], Task.QUERY)
    mean = rows.mean(axis=0)
    found = model.get_agg_embedding_from_queries(["How?", "Where?"])
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-6)


async def test_the_mean_of_questions_is_the_same_asynchronously(model):
    questions = ["How?", "Where?"]
    assert await model.aget_agg_embedding_from_queries(questions) == model.get_agg_embedding_from_queries(questions)


def test_an_aggregate_of_the_users_own_is_used(model):
    assert model.get_agg_embedding_from_queries(["How?", "Where?"], lambda rows: rows[1]) == model.get_query_embedding("Where?")


def test_similarity_of_two_vectors_is_their_cosine(model, gemma):
    one, two = gemma.embed_documents(TEXTS[:2])
    assert model.similarity(one, two) == pytest.approx(np.dot(one, two), abs=1e-6)


# -- making it ----------------------------------------------------------------------------------------------------------


def test_it_shares_the_model_that_it_is_given(gemma):
    assert GemmaEmbedding(embeddings=gemma).embeddings is gemma


def test_it_is_built_from_the_same_arguments():
    model = GemmaEmbedding(model="minilm", dimensions=256, untrained_dimensions=True)
    assert model.model_name == "minilm"
    assert model.embeddings.dimensions == 256


def test_an_unknown_argument_is_refused():
    with pytest.raises(ValidationError, match="not permitted"):
        GemmaEmbedding(model="minilm", dimension=256)


def test_settings_beside_embeddings_are_refused(gemma):
    with pytest.raises(InputError, match="dimensions came beside them"):
        GemmaEmbedding(gemma, dimensions=24)


def test_the_other_frameworks_name_for_the_model_is_refused_with_ours():
    with pytest.raises(InputError, match="named by `model`"):
        GemmaEmbedding(model_name="minilm")


def test_something_else_than_gemma_embeddings_is_refused():
    with pytest.raises(InputError, match="is a GemmaEmbeddings, and is a str"):
        GemmaEmbedding("minilm")


@pytest.mark.parametrize("size", [0, 2049])
def test_a_batch_size_out_of_range_is_refused(gemma, size):
    with pytest.raises(ValidationError, match="embed_batch_size"):
        GemmaEmbedding(gemma, embed_batch_size=size)


def test_the_default_batch_is_llama_indexs_largest(model):
    assert model.embed_batch_size == 2048


# -- LlamaIndex's cache, which knows no roles ---------------------------------------------------------------------------


def test_llama_indexs_cache_is_refused_with_the_cure(gemma):
    with pytest.raises(InputError, match=r"GemmaEmbeddings\(cache='folder'\)"):
        GemmaEmbedding(gemma, embeddings_cache=SimpleKVStore())


def test_llama_indexs_cache_is_refused_when_it_is_assigned_later(model):
    with pytest.raises(InputError, match="embeddings_cache"):
        model.embeddings_cache = SimpleKVStore()
    assert getattr(model, "embeddings_cache", None) is None


def test_llama_indexs_cache_is_refused_in_a_copy(model):
    with pytest.raises(InputError, match="embeddings_cache"):
        model.model_copy(update={"embeddings_cache": SimpleKVStore()})


def test_our_cache_keeps_questions_and_documents_apart(tiny_gemma, tmp_path):
    uncached = GemmaEmbedding(model=str(tiny_gemma), device="cpu", show_progress=False)
    cached = GemmaEmbedding(model=str(tiny_gemma), device="cpu", show_progress=False, cache=tmp_path)
    for _ in range(2):  # computed, then read
        assert cached.get_text_embedding("How?") == uncached.get_text_embedding("How?")
        assert cached.get_query_embedding("How?") == uncached.get_query_embedding("How?")


# -- writing down, copying ----------------------------------------------------------------------------------------------

SECRET = "hf_" + "madeup" * 5


def test_it_comes_back_from_what_it_writes():
    model = GemmaEmbedding(
        model="minilm", dimensions=128, untrained_dimensions=True, title_key="name", embed_batch_size=32, num_workers=2
    )
    again = GemmaEmbedding.from_dict(model.to_dict())
    assert again.to_dict() == model.to_dict()
    assert again.embeddings.dimensions == 128
    assert (again.title_key, again.embed_batch_size, again.num_workers) == ("name", 32, 2)


def test_it_comes_back_from_json_with_a_prompt_profile_of_the_users_own():
    mine = replace(EMBEDDINGGEMMA, name="mine")
    again = GemmaEmbedding.from_json(GemmaEmbedding(model="minilm", prompts=mine).to_json())
    assert again.embeddings.prompts == mine


def test_its_name_is_written_with_it(model):
    assert model.class_name() == "GemmaEmbedding"
    assert model.to_dict()["class_name"] == "GemmaEmbedding"


def test_models_that_differ_are_written_differently():
    one, two = (GemmaEmbedding(model="minilm", dimensions=n, untrained_dimensions=True) for n in (128, 256))
    assert one.to_dict() != two.to_dict()


def test_no_secret_is_written_or_shown():
    model = GemmaEmbedding(model="minilm", token=SECRET)
    assert model.embeddings.token.get_secret_value() == SECRET
    shown = [model.to_dict(), model.model_dump(), model.to_json(), repr(model), str(model)]
    shown += [model.to_payload()] if hasattr(model, "to_payload") else []  # which older versions of LlamaIndex have not
    assert not any(SECRET in str(each) for each in shown)


def test_a_secret_is_given_beside_what_was_written():
    written = GemmaEmbedding(model="minilm", token=SECRET).to_dict()
    assert GemmaEmbedding.from_dict(written, token=SECRET).embeddings.token.get_secret_value() == SECRET


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda model: model.model_copy(), lambda m: m.model_copy(deep=True)]
)
def test_a_copy_shares_the_loaded_model(gemma, copied):
    again = copied(GemmaEmbedding(gemma, title_key="name"))
    assert again.embeddings is gemma
    assert again.title_key == "name"


def test_pickled_it_is_the_same_model_again(gemma):
    model = GemmaEmbedding(gemma, title_key="name", embed_batch_size=7)
    again = pickle.loads(pickle.dumps(model))
    assert (again.title_key, again.embed_batch_size, again.model_name) == ("name", 7, gemma.model)
    np.testing.assert_allclose(again.get_query_embedding("How?"), model.get_query_embedding("How?"), atol=1e-6)


class EveryCall(BaseModel):
    """A rate limiter; holds a lock, as those of LlamaIndex do."""

    requests_per_minute: float
    _lock: Any = PrivateAttr(default_factory=threading.Lock)

    def acquire(self, num_tokens=0): ...


def test_pickled_it_keeps_its_rate_limiter(gemma):
    if "rate_limiter" not in GemmaEmbedding.model_fields:
        pytest.skip("this llama-index-core has no rate limiters")
    again = pickle.loads(pickle.dumps(GemmaEmbedding(gemma, rate_limiter=EveryCall(requests_per_minute=30))))
    assert again.rate_limiter.requests_per_minute == 30
    assert again.get_text_embedding_batch(["text"])


def test_the_core_makes_one_of_itself(gemma):
    assert gemma.as_llama_index().embeddings is gemma


@pytest.mark.parametrize("asked", [GemmaEmbeddings(model="minilm")])
def test_making_one_loads_no_model(asked):
    GemmaEmbedding(asked)
    assert asked._encoder._loaded is None
