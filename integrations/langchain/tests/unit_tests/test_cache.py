import math
import re
import threading

import numpy as np
import pytest
from langchain_core.embeddings import Embeddings
from langchain_core.stores import InMemoryByteStore
from langchain_gemma_rag import RoleSafeCache
from langchain_gemma_rag.cache import gemma_embeddings
from langchain_tests.unit_tests import EmbeddingsUnitTests

from gemma_rag import GemmaEmbeddings
from gemma_rag.errors import InputError


class RoleEmbeddings(Embeddings):
    """A question ends in 1, a document in 2; counts what it computes."""

    def __init__(self) -> None:
        self.computed: list[tuple[str, list[str]]] = []

    def embed_query(self, text: str) -> list[float]:
        self.computed.append(("query", [text]))
        return [float(len(text)), 1.0]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        self.computed.append(("documents", list(texts)))
        return [[float(len(text)), 2.0] for text in texts]


class CountingStore(InMemoryByteStore):
    """Says which of its methods were called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def mget(self, keys):
        self.calls.append("mget")
        return super().mget(keys)

    def mset(self, key_value_pairs):
        self.calls.append("mset")
        super().mset(key_value_pairs)

    async def amget(self, keys):
        self.calls.append("amget")
        return InMemoryByteStore.mget(self, keys)

    async def amset(self, key_value_pairs):
        self.calls.append("amset")
        InMemoryByteStore.mset(self, key_value_pairs)


@pytest.fixture
def inner() -> RoleEmbeddings:
    return RoleEmbeddings()


@pytest.fixture
def store() -> InMemoryByteStore:
    return InMemoryByteStore()


@pytest.fixture
def cache(inner: RoleEmbeddings, store: InMemoryByteStore) -> RoleSafeCache:
    return RoleSafeCache(inner, store, namespace="role embeddings")


@pytest.fixture(scope="module")
def gemma(tiny_gemma) -> GemmaEmbeddings:
    return GemmaEmbeddings(model=str(tiny_gemma), device="cpu", show_progress=False)


class TestStandard(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return RoleSafeCache

    @property
    def embedding_model_params(self) -> dict:
        return {"embeddings": RoleEmbeddings(), "store": InMemoryByteStore(), "namespace": "role embeddings"}


# -- roles --------------------------------------------------------------------------------------------------------------


def test_the_cache_of_langchain_gives_a_question_the_vector_of_a_document(inner, store, classic):
    langchains = classic("embeddings").CacheBackedEmbeddings.from_bytes_store(
        inner, store, namespace="n", query_embedding_cache=True, key_encoder="sha256"
    )
    assert langchains.embed_documents(["words"]) == [[5.0, 2.0]]
    assert langchains.embed_query("words") == [5.0, 2.0]  # and not [5.0, 1.0]: the reason for our own cache


def test_a_question_never_gets_the_vector_of_a_document(cache):
    assert cache.embed_documents(["words"]) == [[5.0, 2.0]]
    assert cache.embed_query("words") == [5.0, 1.0]
    assert cache.embed_query("words") == [5.0, 1.0]


def test_a_document_never_gets_the_vector_of_a_question(cache):
    assert cache.embed_query("words") == [5.0, 1.0]
    assert cache.embed_documents(["words"]) == [[5.0, 2.0]]


def test_gemma_embeddings_keep_both_their_prompts(gemma, store):
    cache = RoleSafeCache(gemma, store)
    for _ in range(2):
        np.testing.assert_allclose(cache.embed_documents(["words"]), gemma.embed_documents(["words"]), atol=1e-6)
        np.testing.assert_allclose(cache.embed_query("words"), gemma.embed_query("words"), atol=1e-6)


def test_titles_have_entries_of_their_own(gemma, store):
    cache = RoleSafeCache(gemma, store)
    rows = cache.embed_documents(["words", "words", "words"], titles=["T", "U", None])
    np.testing.assert_allclose(rows, gemma.embed_documents(["words"] * 3, ["T", "U", None]), atol=1e-6)
    assert len(list(store.yield_keys())) == 3


def test_an_empty_title_is_no_title(gemma, store):
    RoleSafeCache(gemma, store).embed_documents(["words", "words"], titles=["", None])
    assert len(list(store.yield_keys())) == 1


# -- what is computed ---------------------------------------------------------------------------------------------------


def test_what_is_in_the_store_is_not_computed_again(cache, inner):
    first = cache.embed_documents(["a", "bb"])
    assert cache.embed_documents(["bb", "a"]) == first[::-1]
    assert inner.computed == [("documents", ["a", "bb"])]


def test_only_what_is_missing_is_computed(cache, inner):
    cache.embed_documents(["a"])
    assert cache.embed_documents(["a", "bb", "a"]) == [[1.0, 2.0], [2.0, 2.0], [1.0, 2.0]]
    assert inner.computed[1:] == [("documents", ["bb"])]


def test_the_same_text_is_computed_once(cache, inner):
    assert cache.embed_documents(["a", "a", "bb", "a"]) == [[1.0, 2.0], [1.0, 2.0], [2.0, 2.0], [1.0, 2.0]]
    assert inner.computed == [("documents", ["a", "bb"])]


def test_a_question_is_computed_once(cache, inner):
    assert cache.embed_query("a") == cache.embed_query("a")
    assert inner.computed == [("query", ["a"])]


def test_no_texts_touch_neither_store_nor_model(inner):
    store = CountingStore()
    assert RoleSafeCache(inner, store, namespace="n").embed_documents([]) == []
    assert (store.calls, inner.computed) == ([], [])


def test_documents_are_computed_and_stored_in_batches(inner):
    store = CountingStore()
    RoleSafeCache(inner, store, namespace="n", batch_size=2).embed_documents(["a", "bb", "ccc"])
    assert [texts for _, texts in inner.computed] == [["a", "bb"], ["ccc"]]
    assert store.calls == ["mget", "mset", "mset"]


def test_what_was_stored_before_a_failure_is_kept(store):
    class Failing(RoleEmbeddings):
        def embed_documents(self, texts):
            if "bad" in texts:
                raise RuntimeError("the model stopped")
            return super().embed_documents(texts)

    inner = Failing()
    cache = RoleSafeCache(inner, store, namespace="n", batch_size=1)
    with pytest.raises(RuntimeError):
        cache.embed_documents(["a", "bad"])
    assert cache.embed_documents(["a"]) == [[1.0, 2.0]]
    assert len(inner.computed) == 1


def test_a_vector_is_the_same_before_and_after_it_was_stored(store):
    class Doubles(RoleEmbeddings):
        def embed_query(self, text):
            return [0.1, 1 / 3]

    cache = RoleSafeCache(Doubles(), store, namespace="n")
    first = cache.embed_query("a")
    assert cache.embed_query("a") == first == np.float32([0.1, 1 / 3]).tolist()


# -- keys and values ----------------------------------------------------------------------------------------------------


def test_keys_are_hexadecimal(cache, store):
    cache.embed_query("a/../b")
    assert all(re.fullmatch(r"[0-9a-f]{64}", key) for key in store.yield_keys())


def test_values_are_a_checksum_and_float32(cache, store):
    cache.embed_query("abc")
    ((value,),) = [store.mget(list(store.yield_keys()))]
    assert np.frombuffer(value[4:], dtype="<f4").tolist() == [3.0, 1.0]


def test_models_in_one_store_are_kept_apart_by_the_namespace(inner, store):
    RoleSafeCache(inner, store, namespace="one").embed_query("a")
    RoleSafeCache(inner, store, namespace="two").embed_query("a")
    assert len(inner.computed) == 2


def test_gemma_embeddings_are_kept_apart_by_their_space(gemma, store):
    smaller = gemma.model_copy(update={"dimensions": 16, "untrained_dimensions": True})
    rows = [RoleSafeCache(embeddings, store).embed_query("a") for embeddings in (gemma, smaller)]
    assert [len(row) for row in rows] == [48, 16]


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: value[:-1],
        lambda value: value[:-4],
        lambda value: value[:3],
        lambda value: b"",
        lambda value: value[:-1] + bytes([value[-1] ^ 1]),
        lambda value: b"\0" * len(value),
        lambda value: "text",
    ],
    ids=["cut", "a component short", "three bytes", "empty", "one bit", "zeros", "no bytes"],
)
def test_a_damaged_value_is_computed_again(cache, inner, store, damage):
    cache.embed_documents(["a"])
    (key,) = store.yield_keys()
    store.mset([(key, damage(store.mget([key])[0]))])
    assert cache.embed_documents(["a"]) == [[1.0, 2.0]]
    assert cache.embed_documents(["a"]) == [[1.0, 2.0]]
    assert len(inner.computed) == 2


def test_a_whole_value_of_another_dimension_is_computed_again(gemma, store):
    cache = RoleSafeCache(gemma, store)
    row = cache.embed_query("a")
    (key,) = store.yield_keys()
    RoleSafeCache(RoleEmbeddings(), (other := InMemoryByteStore()), namespace="n").embed_query("a")
    store.mset([(key, other.mget(list(other.yield_keys()))[0])])  # two components, and a checksum that fits
    assert cache.embed_query("a") == row


def test_a_folder_serves_as_the_store(inner, tmp_path, classic):
    local = classic("storage").LocalFileStore
    assert RoleSafeCache(inner, local(tmp_path), namespace="n").embed_query("a: b\\c") == [6.0, 1.0]
    assert RoleSafeCache(inner, local(tmp_path), namespace="n").embed_query("a: b\\c") == [6.0, 1.0]
    assert len(inner.computed) == 1


def test_half_a_character_does_not_break_the_key(cache):
    assert cache.embed_query("\ud800") == [1.0, 1.0]


# -- async --------------------------------------------------------------------------------------------------------------


async def test_the_async_methods_use_those_of_the_store(inner):
    store = CountingStore()
    cache = RoleSafeCache(inner, store, namespace="n")
    assert await cache.aembed_documents(["a", "a"]) == [[1.0, 2.0]] * 2
    assert await cache.aembed_query("a") == [1.0, 1.0]
    assert store.calls == ["amget", "amset", "amget", "amset"]


async def test_sync_and_async_share_their_entries(cache, inner):
    await cache.aembed_documents(["a"])
    await cache.aembed_query("a")
    assert (cache.embed_documents(["a"]), cache.embed_query("a")) == ([[1.0, 2.0]], [1.0, 1.0])
    assert len(inner.computed) == 2


async def test_the_event_loop_goes_on_while_vectors_are_computed(store):
    import asyncio

    released = threading.Event()

    class Waiting(RoleEmbeddings):
        def embed_query(self, text):
            assert released.wait(10), "the event loop stood still"
            return super().embed_query(text)

    async def release():
        released.set()

    row, _ = await asyncio.gather(RoleSafeCache(Waiting(), store, namespace="n").aembed_query("a"), release())
    assert row == [1.0, 1.0]


async def test_titles_reach_the_model_in_async_too(gemma, store):
    rows = await RoleSafeCache(gemma, store).aembed_documents(["words"], titles=["T"])
    np.testing.assert_allclose(rows, gemma.embed_documents(["words"], ["T"]), atol=1e-6)


# -- refusals -----------------------------------------------------------------------------------------------------------


def test_foreign_embeddings_need_a_namespace(inner, store):
    with pytest.raises(InputError, match=r"RoleEmbeddings.*give a namespace"):
        RoleSafeCache(inner, store)


def test_an_empty_namespace_is_none(inner, store):
    with pytest.raises(InputError, match="give a namespace"):
        RoleSafeCache(inner, store, namespace="")


def test_what_are_no_embeddings_is_refused(store):
    with pytest.raises(InputError, match="got a str"):
        RoleSafeCache("minilm", store, namespace="n")


def test_what_is_no_store_is_refused(inner):
    with pytest.raises(InputError, match="got a dict"):
        RoleSafeCache(inner, {}, namespace="n")


@pytest.mark.parametrize("size", [0, -1, True, 1.5])
def test_a_batch_holds_at_least_one_text(inner, store, size):
    with pytest.raises(InputError, match="batch_size"):
        RoleSafeCache(inner, store, namespace="n", batch_size=size)


def test_one_string_for_texts_is_refused(cache):
    with pytest.raises(InputError, match="put it in a list"):
        cache.embed_documents("text")


def test_titles_that_do_not_fit_are_refused(cache):
    with pytest.raises(InputError, match="1 titles came for 2 texts"):
        cache.embed_documents(["a", "b"], titles=["T"])


def test_titles_for_embeddings_that_read_none_are_refused(cache):
    with pytest.raises(InputError, match="does not read titles"):
        cache.embed_documents(["a"], titles=["T"])


@pytest.mark.parametrize("text", [b"a", 5, 0, 1.5, None, ["a"], True])
def test_a_text_that_is_no_string_is_refused(cache, inner, text):
    for embed in (lambda: cache.embed_documents(["a", text]), lambda: cache.embed_query(text)):
        with pytest.raises(InputError, match=f"one is a {type(text).__name__}"):
            embed()
    assert not inner.computed


def test_a_title_that_is_no_string_is_refused(gemma, store):
    with pytest.raises(InputError, match="one is a int"):
        RoleSafeCache(gemma, store).embed_documents(["a"], titles=[7])


def test_the_wrong_number_of_vectors_is_refused(store):
    class Short(RoleEmbeddings):
        def embed_documents(self, texts):
            return [[1.0]]

    with pytest.raises(InputError, match="1 vectors for 2 texts"):
        RoleSafeCache(Short(), store, namespace="n").embed_documents(["a", "b"])


def test_the_repr_names_both_parts(cache):
    assert repr(cache) == "<RoleSafeCache of RoleEmbeddings in InMemoryByteStore>"


def test_the_embeddings_beneath_are_found(gemma, store, inner):
    assert gemma_embeddings(gemma) is gemma
    assert gemma_embeddings(RoleSafeCache(gemma, store)) is gemma
    assert gemma_embeddings(RoleSafeCache(inner, store, namespace="n")) is None


@pytest.mark.parametrize("row", [[math.nan, 1.0], [], None])
def test_a_row_that_is_no_vector_is_an_error_and_is_not_kept(row):
    rows = [row, [1.0, 0.0]]

    class Once(Embeddings):
        def embed_query(self, text):
            return rows.pop(0)

        def embed_documents(self, texts):
            return [self.embed_query(text) for text in texts]

    cache = RoleSafeCache(Once(), InMemoryByteStore(), namespace="once")
    with pytest.raises(InputError, match="no vector of finite numbers"):
        cache.embed_query("a")
    assert cache.embed_query("a") == [1.0, 0.0]
