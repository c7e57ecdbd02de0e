"""From documents and categories to chunks and vectors, without a knowledge base."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import numpy as np
import pytest

from gemma_rag.chunking import Chunker
from gemma_rag.documents import Category, Document
from gemma_rag.embedding import changes_to, cut, embed, embed_categories, embed_documents
from gemma_rag.encoders import Input
from gemma_rag.errors import InputError
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.prompts import Task
from gemma_rag.storage import KnowledgeStore
from gemma_rag.vectors import Floats

APPLE = Document(id="apple", title="Apple", text="red apple", category="fruit")
LONG = Document(id="long", text="green pear. " * 100, category="fruit", also_in=("things",))


@pytest.fixture
def store(words) -> Iterator[KnowledgeStore]:
    with KnowledgeBase.from_documents([APPLE, LONG], words, categories=[Category(name="fruit", description="red")]) as base:
        yield base._store


def test_a_document_that_fits_is_one_chunk_without_the_white_space_around_it(words):
    ((chunk,),) = cut([APPLE.model_copy(update={"text": " \n red apple \n"})], words, Chunker())
    assert (chunk.start, chunk.end) == (3, 12)


def test_no_chunk_is_longer_than_the_encoder_reads(words):
    (chunks,) = cut([LONG], words, Chunker(max_tokens=100_000))
    assert len(chunks) == 1
    words.space = words.space.model_copy(update={"max_tokens": 50})
    (chunks,) = cut([LONG], words, Chunker(max_tokens=100_000))
    assert max(len(LONG.text[chunk.start : chunk.end].split()) for chunk in chunks) <= 50


def test_every_chunk_has_its_vector(words):
    first, second = embed_documents([APPLE, LONG], words, Chunker(max_tokens=50))
    assert (len(first.chunks), len(second.chunks)) == (1, 4)
    assert (first.vectors.shape, second.vectors.shape) == ((1, 10), (4, 10))
    assert second.vectors[0] @ words.encode([Input("green pear", Task.DOCUMENT)])[0] == pytest.approx(1.0, abs=1e-3)


def test_a_category_has_a_vector_for_its_description_and_one_for_each_example(words):
    (stored,) = embed_categories([Category(name="fruit", description="red", examples=("apple", "pear"))], words)
    assert stored.vectors.shape == (3, 10)
    assert stored.vectors.argmax(axis=1).tolist() == [0, 3, 4]


def test_documents_and_categories_go_through_the_encoder_together(words):
    entries, categories = embed([APPLE], [Category(name="green")], words, Chunker())
    assert len(words.calls) == 1
    assert (entries[0].document, categories[0].category.name) == (APPLE, "green")
    assert categories[0].vectors.argmax() == 1


def test_for_nothing_the_encoder_is_not_looked_at():
    assert embed([], [], None, Chunker()) == ([], [])


def test_vectors_of_another_shape_are_refused(words):
    def encode(inputs: list[Input]) -> Floats:
        return np.zeros((len(inputs), 3), dtype=np.float32)

    words.encode = encode
    with pytest.raises(InputError, match=r"shape \(1, 3\), and its space says \(1, 10\)"):
        embed_documents([APPLE], words, Chunker())


def test_what_is_stored_just_so_needs_nothing(store):
    change = changes_to(store, [APPLE, LONG], {})
    assert (change.documents, change.categories, change.unchanged) == ([], [], 2)


def test_what_is_new_or_has_another_text_is_to_be_embedded(store):
    new, changed = APPLE.model_copy(update={"id": "new"}), APPLE.model_copy(update={"text": "green apple"})
    change = changes_to(store, [new, changed, LONG], {})
    assert change.documents == change.to_embed == [new, changed]
    assert (change.replaced, change.updated, change.unchanged) == ({"apple"}, 1, 1)


def test_where_text_and_title_stay_chunks_and_vectors_do(store):
    moved = LONG.model_copy(update={"category": "things", "also_in": ()})
    change = changes_to(store, [moved], {})
    assert change.to_embed == []
    (entry,) = change.entries([])
    old = store.get("long")
    assert (entry.document, entry.chunks) == (moved, old.chunks)
    assert np.array_equal(entry.vectors, old.vectors)


def test_another_title_is_another_vector(store):
    assert changes_to(store, [APPLE.model_copy(update={"title": "Pear"})], {}).to_embed


def test_categories_that_are_new_or_described_anew_need_a_vector(store):
    same, anew = Category(name="fruit", description="red"), Category(name="things", description="all")
    document = APPLE.model_copy(update={"id": "new", "also_in": ("garden",)})
    change = changes_to(store, [document], {"fruit": same, "things": anew})
    assert change.categories == [anew, Category(name="garden")]


def test_what_was_not_embedded_is_left_out(store):
    documents = [APPLE.model_copy(update={"id": "a"}), APPLE.model_copy(update={"id": "b"})]
    change = changes_to(store, documents, {})
    assert change.entries([]) == []


def test_entries_and_chunkers_can_be_sent_to_another_process(words):
    (entry,) = embed_documents([APPLE], words, Chunker())
    again = pickle.loads(pickle.dumps((entry, Chunker(64))))
    assert (again[0].document, again[1]) == (APPLE, Chunker(64))
