"""The knowledge base, with an encoder whose vectors can be computed by hand and whose calls are counted."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import numpy as np
import pytest

from gemma_rag.chunking import Chunker
from gemma_rag.documents import Category, Document
from gemma_rag.encoders import Input
from gemma_rag.errors import BadRows, GemmaRagError, InputError
from gemma_rag.knowledge_base import CategoryInfo, Changes, KnowledgeBase
from gemma_rag.prompts import Task
from gemma_rag.storage import building

APPLE = Document(id="apple", text="A red apple.", category="fruit", metadata={"year": 2024})
PEAR = Document(id="pear", text="A green pear.", title="Pear", category="fruit")
CAR = Document(id="car", text="A blue car.", category="traffic")
DOCUMENTS = [CAR, APPLE, PEAR]
LONG = Document(
    id="long",
    title="Fleet",
    text="# Cars\n\n"
    + "The red car waits. " * 6
    + "\n\n## Buses\n\n"
    + "A green bus waits. " * 6
    + "\n\n# Trams\n\nA blue tram.",
    category="traffic",
)


def change(document: Document, **fields: object) -> Document:
    return document.model_copy(update=fields)


def change_category(**fields: object) -> Category:
    return FRUIT.model_copy(update={key: tuple(value) for key, value in fields.items()})


def like(encoder):
    """An encoder of the same space, with calls of its own."""
    return type(encoder)(list(encoder.words))


@pytest.fixture
def memory(words):
    with KnowledgeBase.from_documents(DOCUMENTS, words) as base:
        words.calls.clear()
        yield base


@pytest.fixture
def folder(memory, tmp_path):
    memory.save(tmp_path / "kb")
    return memory


@pytest.fixture(params=["memory", "folder"])
def base(request):
    """The three documents, in memory and in a folder: whatever one can do, the other can too."""
    return request.getfixturevalue(request.param)


def chunks(base: KnowledgeBase) -> list[tuple[str, str, str, str]]:
    """The rows of the view: category, id, the chunk's title, its text."""
    view = base.view()
    rows, codes = view.rows
    numbers = view.index.documents[view.index.places_of(rows)].tolist()
    places, documents = view.chunk_places(rows.tolist()), view.documents(numbers)
    found = []
    for (_, place), number, code in zip(places.items(), numbers, codes.tolist(), strict=True):
        document = documents[number]
        found.append((document.category, document.id, place.title(document.title), document.text[place.start : place.end]))
        assert view.categories[code] == document.category
    return found


def stored(base: KnowledgeBase) -> np.ndarray:
    """The vectors of those rows."""
    view = base.view()
    return view.index.vectors(view.rows[0])


def assert_holds(base: KnowledgeBase, documents: list[Document], encoder) -> None:
    """The knowledge base has these documents and no other, and the vectors of their texts, all computed anew."""
    rows = chunks(base)
    assert {document.id: document for document in base} == {document.id: document for document in documents}
    assert (len(base), base.manifest.chunks) == (len(documents), len(rows))
    assert {document_id for _, document_id, _, _ in rows} == {document.id for document in documents}
    runs = [category for category, _ in groupby(rows, key=lambda row: row[0])]
    assert len(runs) == len(set(runs))  # the rows of a category stand together
    inputs = [Input(text, Task.DOCUMENT, title) for _, _, title, text in rows]
    assert stored(base).tobytes() == like(encoder).encode(inputs).tobytes()


def assert_names(base: KnowledgeBase, inputs: list[Input], owners: list[int], encoder) -> None:
    """Stage one compares questions with the vectors of these texts, and they belong to these categories."""
    vectors, found = base.view().names
    assert (vectors.tobytes(), found.tolist()) == (like(encoder).encode(inputs).tobytes(), owners)


# -- round trip -----------------------------------------------------------------------------------------------------


def test_vectors_are_those_of_the_encoder(base):
    # columns: red green blue apple pear plum car bus tram, and 0.01; rows by category, then as they came; the title counts
    counts = [[1, 0, 0, 1, 0, 0, 0, 0, 0, 0.01], [0, 1, 0, 0, 2, 0, 0, 0, 0, 0.01], [0, 0, 1, 0, 0, 0, 1, 0, 0, 0.01]]
    by_hand = np.array(counts) / np.sqrt([[2.0001], [5.0001], [2.0001]])
    np.testing.assert_allclose(stored(base), by_hand, atol=1e-7)


def test_documents_come_back_in_the_order_in_which_they_came(base):
    assert list(base) == DOCUMENTS


def test_get_gives_a_document_by_its_id(base):
    assert base.get("apple") == APPLE


def test_get_of_an_unknown_id_is_an_error_that_names_it(base):
    with pytest.raises(InputError, match="no document 'plum'"):
        base.get("plum")


@pytest.mark.parametrize(("key", "there"), [("apple", True), ("plum", False), ("", False), (1, False), (None, False)])
def test_contains(base, key, there):
    assert (key in base) is there


def test_the_length_is_the_number_of_documents(base):
    assert len(base) == 3


def test_categories_have_their_counts(base):
    assert base.categories == (CategoryInfo("fruit", "", 2), CategoryInfo("traffic", "", 1))


def test_repr_says_where_and_what(memory):
    assert repr(memory) == "<KnowledgeBase in memory: 3 documents, words, 10 dimensions>"


def test_repr_names_the_folder(folder, tmp_path):
    assert repr(folder) == f"<KnowledgeBase at {tmp_path / 'kb'}: 3 documents, words, 10 dimensions>"


def test_what_is_opened_equals_what_was_saved(words, memory, tmp_path):
    before = (list(memory), memory.categories, chunks(memory), stored(memory).tobytes())
    memory.save(tmp_path / "kb")
    with KnowledgeBase.open(tmp_path / "kb", like(words)) as other:
        assert (list(other), other.categories, chunks(other), stored(other).tobytes()) == before


def test_building_is_one_pass_of_the_encoder(words):
    KnowledgeBase.from_documents(DOCUMENTS, words).close()
    assert len(words.calls) == 1


def test_opening_and_reading_encodes_nothing(words, folder, tmp_path):
    with KnowledgeBase.open(tmp_path / "kb", words) as other:
        assert len(list(other)) == 3
    assert words.calls == []


def test_an_empty_knowledge_base_can_be_saved_and_opened(words, tmp_path):
    with KnowledgeBase.from_documents([], words) as empty:
        empty.save(tmp_path / "kb")
    with KnowledgeBase.open(tmp_path / "kb", words) as other:
        assert (len(other), list(other), other.categories) == (0, [], ())


def test_the_names_of_categories_are_embedded_with_their_descriptions(words):
    described = [Category(name="city-traffic", description="a bus")]
    with KnowledgeBase.from_documents([change(CAR, category="city-traffic")], words, categories=described) as base:
        assert_names(base, [Input("city traffic: a bus", Task.CLASSIFICATION)], [0], words)


def test_a_described_category_without_documents_is_not_listed(words):
    with KnowledgeBase.from_documents([CAR], words, categories=[Category(name="empty")]) as base:
        assert [category.name for category in base.categories] == ["traffic"]


def test_mappings_are_taken_as_documents(words):
    with KnowledgeBase.from_documents([{"id": "a", "text": "red", "category": "c"}], words) as base:
        assert list(base) == [Document(id="a", text="red", category="c")]


# -- add ------------------------------------------------------------------------------------------------------------


def test_add_counts_what_it_did(base):
    new = Document(id="tram", text="A tram.", category="traffic")
    assert base.add([APPLE, change(PEAR, text="A plum."), new]) == Changes(added=1, updated=1, unchanged=1)


def test_unchanged_documents_are_not_encoded(words, base):
    base.add(DOCUMENTS)
    assert words.calls == []


def test_unchanged_documents_make_no_new_generation(base):
    before = base.manifest
    base.add(DOCUMENTS)
    assert base.manifest == before


MOVES = pytest.mark.parametrize(
    "fields", [{"metadata": {"year": 2025}}, {"category": "traffic"}, {"also_in": ("traffic",)}], ids=str
)


@MOVES
def test_a_change_of_metadata_or_category_encodes_nothing(words, base, fields):
    base.add([change(APPLE, **fields)])
    assert words.calls == []


@MOVES
def test_a_change_of_metadata_or_category_keeps_the_vectors(words, base, fields):
    base.add([change(APPLE, **fields)])
    assert_holds(base, [CAR, change(APPLE, **fields), PEAR], words)


@pytest.mark.parametrize("fields", [{"category": "snacks"}, {"also_in": ("traffic", "snacks")}], ids=str)
def test_a_new_category_is_all_that_a_move_encodes(words, base, fields):
    base.add([change(APPLE, **fields)])
    assert words.calls == [[Input("snacks", Task.CLASSIFICATION)]]


def test_a_changed_text_is_all_that_is_encoded(words, base):
    base.add([change(APPLE, text="A green apple."), PEAR])
    assert words.calls == [[Input("A green apple.", Task.DOCUMENT, "")]]


def test_a_changed_title_is_encoded(words, base):
    base.add([change(PEAR, title="Green")])
    assert words.calls == [[Input("A green pear.", Task.DOCUMENT, "Green")]]


@pytest.mark.parametrize("fields", [{"text": "A plum."}, {"title": "T"}, {"category": "x"}, {"metadata": {}}], ids=str)
def test_the_old_version_is_gone(words, base, fields):
    base.add([change(APPLE, **fields)])
    assert_holds(base, [CAR, change(APPLE, **fields), PEAR], words)


def test_an_id_twice_in_one_call_is_refused(base):
    with pytest.raises(BadRows, match="'plum'"):
        base.add([Document(id="plum", text=text, category="fruit") for text in ("one", "two")])


def test_a_bad_document_lets_nothing_in(words, base):
    with pytest.raises(BadRows):
        base.add([Document(id="plum", text="A plum.", category="fruit"), {"id": "bad"}])
    assert_holds(base, DOCUMENTS, words)


def test_a_category_described_anew_is_encoded_again(words, base):
    base.add([], categories=[Category(name="fruit", description="plum")])
    assert words.calls == [[Input("fruit: plum", Task.CLASSIFICATION)]]


def test_a_category_described_anew_has_its_new_vector(words, base):
    base.add([], categories=[Category(name="fruit", description="plum")])
    assert_names(base, [Input(text, Task.CLASSIFICATION) for text in ("fruit: plum", "traffic")], [0, 1], words)


def test_a_description_stays_when_documents_come(base):
    base.add([], categories=[Category(name="fruit", description="plum")])
    base.add([Document(id="plum", text="A plum.", category="fruit")])
    assert base.categories[0] == CategoryInfo("fruit", "plum", 3)


def test_adding_nothing_does_nothing(words, base):
    assert base.add([]) == Changes(added=0, updated=0, unchanged=0)


# -- example questions ----------------------------------------------------------------------------------------------

FRUIT = Category(name="fruit", description="sweet", examples=("Is the plum ripe?", "Where is the pear?"))
OF_FRUIT = [Input(text, Task.CLASSIFICATION) for text in ("fruit: sweet", *FRUIT.examples)]


def test_the_name_and_each_example_are_embedded_alone_under_the_classification_prompt(words, base):
    base.add([], categories=[FRUIT])
    assert words.calls == [OF_FRUIT]


def test_stage_one_compares_with_the_examples_too(words, base):
    base.add([], categories=[FRUIT])
    assert_names(base, [*OF_FRUIT, Input("traffic", Task.CLASSIFICATION)], [0, 0, 0, 1], words)


def test_examples_that_have_not_changed_are_not_embedded_again(words, base):
    base.add([], categories=[FRUIT])
    words.calls.clear()
    base.add([PEAR], categories=[change_category(examples=list(FRUIT.examples))])
    assert words.calls == []


@pytest.mark.parametrize(
    "examples",
    [FRUIT.examples[:1], FRUIT.examples[::-1], (*FRUIT.examples, "A red plum?"), ()],
    ids=["fewer", "another order", "more", "none"],
)
def test_a_change_of_the_examples_embeds_the_category_anew(words, base, examples):
    base.add([], categories=[FRUIT])
    words.calls.clear()
    base.add([], categories=[change_category(examples=examples)])
    new = [Input(text, Task.CLASSIFICATION) for text in ("fruit: sweet", *examples)]
    assert words.calls == [new]
    assert_names(base, [*new, Input("traffic", Task.CLASSIFICATION)], [0] * len(new) + [1], words)


def test_examples_stay_when_documents_come(words, base):
    base.add([], categories=[FRUIT])
    base.add([Document(id="plum", text="A plum.", category="fruit")])
    assert base.view().names[1].tolist() == [0, 0, 0, 1]


def test_examples_survive_saving_and_opening(words, memory, tmp_path):
    memory.add([], categories=[FRUIT])
    memory.save(tmp_path / "kb")
    with KnowledgeBase.open(tmp_path / "kb", like(words)) as other:
        assert_names(other, [*OF_FRUIT, Input("traffic", Task.CLASSIFICATION)], [0, 0, 0, 1], words)


# -- several categories ---------------------------------------------------------------------------------------------

TAXI = Document(id="taxi", text="A red car.", category="traffic", also_in=("snacks", "fruit"))


def counts(base: KnowledgeBase) -> dict[str, int]:
    return {category.name: category.documents for category in base.categories}


def test_a_document_counts_in_each_of_its_categories(base):
    base.add([TAXI])
    assert counts(base) == {"fruit": 3, "snacks": 1, "traffic": 2}


def test_a_document_of_several_categories_is_one_document(words, base):
    base.add([TAXI])
    assert (len(base), base.get("taxi")) == (4, TAXI)
    assert_holds(base, [*DOCUMENTS, TAXI], words)


def test_a_document_of_several_chunks_counts_once_in_a_further_category(words):
    long = change(LONG, also_in=("fruit",))
    with KnowledgeBase.from_documents([long, APPLE], words, chunker=Chunker(max_tokens=16)) as base:
        assert counts(base) == {"fruit": 2, "traffic": 1}


def test_further_categories_are_described_as_any_other(words, base):
    base.add([TAXI], categories=[Category(name="snacks", description="a plum")])
    assert CategoryInfo("snacks", "a plum", 1) in base.categories


@pytest.mark.parametrize(
    ("also_in", "expected"),
    [
        ((), {"fruit": 2, "traffic": 2}),
        (("fruit",), {"fruit": 3, "traffic": 2}),
        (("books", "snacks"), {"books": 1, "fruit": 2, "snacks": 1, "traffic": 2}),
    ],
)
def test_a_change_of_further_categories_is_an_update(base, also_in, expected):
    base.add([TAXI])
    assert base.add([change(TAXI, also_in=also_in)]) == Changes(added=0, updated=1, unchanged=0)
    assert counts(base) == expected


def test_a_deleted_document_has_left_all_of_its_categories(base):
    base.add([TAXI])
    base.delete(["taxi"])
    assert counts(base) == {"fruit": 2, "traffic": 1}


def test_several_categories_survive_saving_and_opening(words, memory, tmp_path):
    memory.add([TAXI])
    before = (memory.categories, memory.view().guests.tolist())
    memory.save(tmp_path / "kb")
    with KnowledgeBase.open(tmp_path / "kb", like(words)) as other:
        assert (other.get("taxi"), other.categories, other.view().guests.tolist()) == (TAXI, *before)


# -- adding that fails ----------------------------------------------------------------------------------------------


def test_vectors_of_another_length_than_the_space_says_are_refused(words, base):
    words.encode = lambda inputs: np.ones((len(inputs), 3), dtype=np.float32)
    with pytest.raises(GemmaRagError, match="3"):
        base.add([Document(id="plum", text="A plum.", category="fruit")])


def test_threads_may_add_at_once(words, base):
    documents = [Document(id=str(i), text="A red tram.", category="traffic") for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda document: base.add([document]), documents))
    assert_holds(base, [*DOCUMENTS, *documents], words)


# -- delete ---------------------------------------------------------------------------------------------------------


def test_delete_says_how_many(base):
    assert base.delete(["apple", "car", "apple"]) == 2


def test_a_deleted_document_is_gone(words, base):
    base.delete(["apple"])
    assert_holds(base, [CAR, PEAR], words)


def test_a_deleted_document_cannot_be_got(base):
    base.delete(["apple"])
    with pytest.raises(InputError, match="'apple'"):
        base.get("apple")


def test_unknown_ids_are_listed(base):
    with pytest.raises(InputError, match="no documents 'plum', 'tram': nothing was deleted"):
        base.delete(["apple", "plum", "tram"])


def test_with_an_unknown_id_nothing_is_deleted(words, base):
    with pytest.raises(InputError):
        base.delete(["apple", "plum"])
    assert_holds(base, DOCUMENTS, words)


def test_one_string_is_no_list_of_ids(base):
    with pytest.raises(InputError, match="put it in a list"):
        base.delete("apple")


def test_everything_can_be_deleted(words, base):
    base.delete(document.id for document in DOCUMENTS)
    assert_holds(base, [], words)


def test_documents_can_be_added_after_everything_was_deleted(words, base):
    base.delete([document.id for document in DOCUMENTS])
    base.add([PEAR])
    assert_holds(base, [PEAR], words)


def test_a_deleted_document_can_be_added_again(words, base):
    base.delete(["apple"])
    assert base.add([APPLE]) == Changes(added=1, updated=0, unchanged=0)


# -- long documents -------------------------------------------------------------------------------------------------


@pytest.fixture
def long(words):
    with KnowledgeBase.from_documents([LONG, APPLE], words, chunker=Chunker(max_tokens=16)) as base:
        yield base


def test_a_long_document_is_cut_and_each_chunk_has_its_vector(words, long):
    assert_holds(long, [LONG, APPLE], words)


def test_a_chunk_holds_no_more_than_the_limit(words, long):
    assert max(words.count_tokens([f"{title} {text}" for *_, title, text in chunks(long)])) <= 16


def test_the_chunks_hold_the_whole_text_in_its_order(long):
    texts = [text for _, document_id, _, text in chunks(long) if document_id == "long"]
    assert "".join("".join(texts).split()) == "".join(LONG.text.split())


def test_chunks_are_embedded_under_their_headings(words, long):
    titles = [item.title for call in words.calls for item in call if item.task is Task.DOCUMENT]
    assert list(dict.fromkeys(titles)) == ["Fleet > Cars", "Fleet > Cars > Buses", "Fleet > Trams", ""]


def test_chunks_are_no_longer_than_the_model_reads(words):
    short = type(words)(list(words.words), max_tokens=20)
    with KnowledgeBase.from_documents([LONG], short) as base:
        assert max(words.count_tokens([f"{title} {text}" for *_, title, text in chunks(base)])) <= 20


def test_words_are_counted_once_for_each_text_that_was_ever_added(words, monkeypatch) -> None:
    counted: list[str] = []
    count = building.count_words
    monkeypatch.setattr(building, "count_words", lambda texts: count([counted.append(text.strip()) or text for text in texts]))
    pages = [Document(id=name, text=f"The {name}.", category="fruit") for name in ("apple", "pear")]
    base = KnowledgeBase.from_documents(pages, words)
    assert base.view().lexical.scores("apple").argmax() == 0
    base.add([Document(id="plum", text="The plum.", category="fruit")])
    assert base.view().lexical.scores("plum").argmax() == 2
    base.delete(["apple"])
    assert base.view().lexical.scores("plum").argmax() == 1
    assert counted == ["The apple.", "The pear.", "The plum."]
