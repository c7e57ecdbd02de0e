"""A knowledge base in a folder: the spaces it opens with, saving, several handles, random sequences of everything."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_rag import knowledge_base as module
from gemma_rag.chunking import Chunker
from gemma_rag.documents import Category, Document
from gemma_rag.encoders import EncoderSettings, Input
from gemma_rag.errors import InputError, KnowledgeBaseError, SpaceMismatch
from gemma_rag.knowledge_base import CategoryInfo, Changes, KnowledgeBase
from gemma_rag.learned import Learned, Ranking
from gemma_rag.prompts import Task
from gemma_rag.storage import files

APPLE = Document(id="apple", text="A red apple.", category="fruit")
PEAR = Document(id="pear", text="A green pear.", title="Pear", category="fruit")
CAR = Document(id="car", text="A blue car.", category="traffic")
PLUM = Document(id="plum", text="A plum.", category="fruit")
DOCUMENTS = [CAR, APPLE, PEAR]


@pytest.fixture
def memory(words):
    with KnowledgeBase.from_documents(DOCUMENTS, words) as base:
        yield base


@pytest.fixture
def path(memory, tmp_path) -> Path:
    """A folder with the three documents; `memory` keeps it open."""
    memory.save(tmp_path / "kb")
    return tmp_path / "kb"


@pytest.fixture
def other(path, words):
    """A second handle on the folder."""
    with KnowledgeBase.open(path, words) as base:
        yield base


def in_view(base: KnowledgeBase) -> list[str]:
    view = base.view()
    return sorted(document.id for document in view.documents(view.index.documents.tolist()).values())


# -- the space ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights", "other"),
        ("prompts", "other"),
        ("dimensions", 11),
        ("max_tokens", 99),
        ("overflow", "error"),
        ("runtime", "other"),
        ("precision", "bfloat16"),
    ],
)
def test_an_encoder_of_another_space_is_refused(path, words, field, value):
    stored = words.space.model_dump()[field]
    words.space = words.space.model_copy(update={field: value})
    with pytest.raises(SpaceMismatch, match=f"{field}: stored {stored!r}, given {value!r}"):
        KnowledgeBase.open(path, words)


def test_each_field_that_differs_is_named(path, words):
    with pytest.raises(SpaceMismatch) as caught:
        KnowledgeBase.open(path, type(words)(["red"], max_tokens=99))
    assert set(caught.value.differences) == {"weights", "dimensions", "max_tokens"}


def test_the_same_weights_under_another_name_are_the_same_space(path, words):
    words.space = words.space.model_copy(update={"model": "a copy"})
    with KnowledgeBase.open(path, words) as base:
        assert len(base) == 3


def test_what_is_no_encoder_is_refused_before_the_documents_are_read(words):
    def documents():
        raise AssertionError("the documents were read")
        yield

    with pytest.raises(InputError, match="embeddings must be a GemmaEmbeddings"):
        KnowledgeBase.from_documents(documents(), object())


def test_what_is_no_encoder_is_refused_before_the_folder_is_opened(tmp_path):
    with pytest.raises(InputError, match="embeddings must be a GemmaEmbeddings"):
        KnowledgeBase.open(tmp_path / "nowhere", object())


def test_without_an_encoder_and_without_a_recipe_there_is_none(path):
    with KnowledgeBase.open(path) as base, pytest.raises(InputError, match="give it again"):
        _ = base.encoder


def test_without_an_encoder_documents_can_be_read_and_deleted(path):
    with KnowledgeBase.open(path) as base:
        base.delete(["apple"])
        assert in_view(base) == ["car", "pear"]


def test_without_an_encoder_nothing_new_is_added(path):
    with KnowledgeBase.open(path) as base, pytest.raises(InputError, match="give it again"):
        base.add([PLUM])


def with_recipe(words, path: Path) -> None:
    words.settings = EncoderSettings(model="words", token="hf_secret", dimensions=128)
    with KnowledgeBase.from_documents(DOCUMENTS, words) as base:
        base.save(path)


def test_the_encoder_is_loaded_as_the_recipe_says(words, tmp_path, monkeypatch):
    with_recipe(words, tmp_path / "kb")
    monkeypatch.setattr(module, "load_encoder", lambda given: words if given.dimensions == 128 else None)
    with KnowledgeBase.open(tmp_path / "kb") as base:
        assert base.encoder is words


def test_a_recipe_that_gives_another_space_now_is_refused(words, tmp_path, monkeypatch):
    with_recipe(words, tmp_path / "kb")
    monkeypatch.setattr(module, "load_encoder", lambda given: type(words)(["red"]))
    with KnowledgeBase.open(tmp_path / "kb") as base, pytest.raises(SpaceMismatch, match="weights"):
        _ = base.encoder


def test_no_file_holds_the_token(words, tmp_path):
    with_recipe(words, tmp_path / "kb")
    assert [file.name for file in (tmp_path / "kb").iterdir() if b"hf_secret" in file.read_bytes()] == []


# -- saving ---------------------------------------------------------------------------------------------------------


def test_before_it_is_saved_it_has_no_folder(memory):
    assert memory.path is None


def test_after_saving_what_is_added_is_in_the_folder(memory, path, words):
    memory.add([PLUM])
    with KnowledgeBase.open(path, words) as base:
        assert in_view(base) == ["apple", "car", "pear", "plum"]


def test_after_saving_again_the_first_folder_stays_as_it_was(memory, path, words, tmp_path):
    memory.save(tmp_path / "second")
    memory.add([PLUM])
    with KnowledgeBase.open(path, words) as base:
        assert in_view(base) == ["apple", "car", "pear"]


def test_saving_over_a_knowledge_base_is_refused(memory, path):
    with pytest.raises(InputError, match=r"kb exists already: save .* to a new folder, or open that one and add"):
        memory.save(path)


def test_after_a_refused_save_it_goes_on_where_it_was(memory, path, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError):
        memory.save(tmp_path / "file")
    assert (memory.path, in_view(memory)) == (path, ["apple", "car", "pear"])


def test_a_closed_knowledge_base_says_that_it_is_closed(memory):
    memory.close()
    with pytest.raises(KnowledgeBaseError, match="closed"):
        list(memory)


# -- several handles ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [len, in_view, lambda base: [item.id for item in base]], ids=["len", "view", "iteration"])
def test_another_handle_sees_the_old_until_it_refreshes(memory, other, read):
    before = read(other)
    memory.add([PLUM])
    memory.delete(["car"])
    assert read(other) == before


@pytest.mark.parametrize("read", [len, in_view, lambda base: [item.id for item in base]], ids=["len", "view", "iteration"])
def test_another_handle_sees_the_new_after_it_refreshed(memory, other, read):
    memory.add([PLUM])
    memory.delete(["car"])
    other.refresh()
    assert read(other) == read(memory)


def test_refresh_says_whether_anything_was_new(memory, other):
    memory.add([PLUM])
    assert [other.refresh(), other.refresh()] == [True, False]


def test_a_handle_that_fell_behind_adds_to_the_newest(memory, other):
    memory.add([PLUM])
    assert other.add([PLUM, APPLE]) == Changes(added=0, updated=0, unchanged=2)


def test_a_handle_that_fell_behind_deletes_from_the_newest(memory, other):
    memory.add([PLUM])
    other.delete(["plum"])
    assert in_view(other) == ["apple", "car", "pear"]


USES = {
    "refresh": lambda base: base.refresh(),
    "add": lambda base: base.add([PLUM]),
    "delete": lambda base: base.delete(["apple"]),
}


@pytest.mark.parametrize("use", USES)
def test_a_folder_replaced_by_another_knowledge_base_is_noticed(path, other, words, use):
    shutil.rmtree(path)
    with KnowledgeBase.from_documents([PLUM], words) as foreign:
        foreign.save(path)
    with pytest.raises(KnowledgeBaseError, match="kb was replaced by another knowledge base since it was opened"):
        USES[use](other)


@pytest.mark.parametrize("use", USES)
def test_a_removed_folder_is_noticed(path, other, use):
    shutil.rmtree(path)
    with pytest.raises(KnowledgeBaseError, match=r"there is no knowledge base at .*kb"):
        USES[use](other)


@pytest.mark.parametrize("use", ["add", "delete"])
def test_while_another_process_writes_it_gives_up(path, other, use, monkeypatch):
    monkeypatch.setattr(files, "BUSY_SECONDS", 0.01)
    with FileLock(path / "lock"), pytest.raises(KnowledgeBaseError, match=r"another process is writing to .*kb"):
        USES[use](other)


def test_a_change_that_was_refused_can_be_made_again(path, other, monkeypatch):
    monkeypatch.setattr(files, "BUSY_SECONDS", 0.01)
    with FileLock(path / "lock"), pytest.raises(KnowledgeBaseError):
        other.add([PLUM])
    assert other.add([PLUM]) == Changes(added=1, updated=0, unchanged=0)


def test_reading_needs_no_lock(path, words, monkeypatch):
    monkeypatch.setattr(files, "BUSY_SECONDS", 0.01)
    with FileLock(path / "lock"), KnowledgeBase.open(path, words) as base:
        assert in_view(base) == ["apple", "car", "pear"]


# -- what was learned -----------------------------------------------------------------------------------------------


def learned(base: KnowledgeBase, weight: float) -> Learned:
    fingerprint = base.manifest.fingerprint
    return Learned(Ranking(lexical_weight=weight, router_weight=0, categories=(), fingerprint=fingerprint, questions=9))


def test_what_was_learned_is_there_when_it_is_opened_again(memory, path, words):
    memory.learn(learned(memory, 0.3))
    with KnowledgeBase.open(path, words) as base:
        assert base.learned == learned(memory, 0.3)


def test_what_was_learned_in_memory_goes_into_the_folder(memory, words, tmp_path):
    memory.learn(learned(memory, 0.3))
    memory.save(tmp_path / "kb")
    with KnowledgeBase.open(tmp_path / "kb", words) as base:
        assert base.learned == memory.learned == learned(memory, 0.3)


def test_what_was_learned_stays_when_documents_come(memory, path, words):
    memory.learn(learned(memory, 0.3))
    memory.add([PLUM])
    with KnowledgeBase.open(path, words) as base:
        assert (base.learned, in_view(base)) == (learned(memory, 0.3), ["apple", "car", "pear", "plum"])


def test_another_handle_knows_what_was_learned_after_it_refreshed(memory, other):
    assert other.learned == Learned()
    memory.learn(learned(memory, 0.3))
    seen = [other.learned, other.refresh(), other.learned]
    assert seen == [Learned(), True, learned(memory, 0.3)]


def test_a_handle_that_adds_knows_what_another_learned(memory, other):
    assert other.learned == Learned()
    memory.learn(learned(memory, 0.3))
    other.add([PLUM])
    assert other.learned == learned(memory, 0.3)


def test_what_is_not_kept_is_not_written(memory, path, words):
    memory.learn(learned(memory, 0.3), keep=False)
    with KnowledgeBase.open(path, words) as base:
        assert (memory.learned, base.learned) == (learned(memory, 0.3), Learned())


def test_what_was_learned_in_another_space_is_refused(memory, path):
    foreign = learned(memory, 0.3)
    foreign = foreign._replace(ranking=foreign.ranking.model_copy(update={"fingerprint": "another"}))
    with pytest.raises(SpaceMismatch, match="space of what was learned"):
        memory.learn(foreign)
    assert (memory.learned, list(path.glob("attached-*"))) == (Learned(), [])


# -- random sequences -----------------------------------------------------------------------------------------------

TEXTS = ["Red.", "A green apple", " blue\n\npear ", "# Bus\n\n" + "A red bus. " * 9 + "\n\n## Tram\n\nA plum."]
IDS = st.sampled_from("abcdefg")
CATEGORIES = st.lists(st.sampled_from(["z", "a", "m"]), min_size=1, unique=True)
ADD = st.lists(
    st.builds(
        lambda categories, **fields: Document(category=categories[0], also_in=categories[1:], **fields),
        CATEGORIES,
        id=IDS,
        text=st.sampled_from(TEXTS),
        title=st.sampled_from(["", "Car"]),
        metadata=st.dictionaries(st.just("n"), st.integers(0, 1)),
    ),
    max_size=4,
    unique_by=lambda document: document.id,
)
DESCRIBE = st.builds(
    Category,
    name=st.sampled_from("zam"),
    description=st.sampled_from(["", "plum", "tram"]),
    examples=st.lists(st.sampled_from(["A bus?", "A car?"]), max_size=2),
)
STEP = st.one_of(
    st.tuples(st.just("add"), ADD),
    st.tuples(st.just("delete"), st.sets(IDS, max_size=3)),
    st.tuples(st.just("describe"), DESCRIBE),
    st.tuples(st.sampled_from(["save", "reopen"]), st.none()),
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEP, min_size=4, max_size=25))
def test_any_sequence_of_changes_gives_what_a_dictionary_gives(words, steps):
    model: dict[str, Document] = {}
    described: dict[str, Category] = {}
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base = stack.enter_context(KnowledgeBase.from_documents([], words, chunker=Chunker(max_tokens=16)))
        for number, (verb, what) in enumerate(steps):
            if verb == "add":
                updated = [document for document in what if document.id in model and model[document.id] != document]
                added = [document for document in what if document.id not in model]
                assert base.add(what) == Changes(len(added), len(updated), len(what) - len(added) - len(updated))
                model.update({document.id: document for document in what})
            elif verb == "delete":
                known = sorted(what & set(model))
                assert base.delete(known) == len(known)
                model = {key: document for key, document in model.items() if key not in known}
            elif verb == "describe":
                base.add([], categories=[what])
                described[what.name] = what
            elif verb == "save":
                base.save(place / str(number))
            elif base.path is not None:
                base.close()
                base = stack.enter_context(KnowledgeBase.open(base.path, words))
            assert_agrees(base, model, described, words)


def assert_agrees(base: KnowledgeBase, model: dict[str, Document], described: dict[str, Category], encoder) -> None:
    assert {document.id: document for document in base} == model
    view = base.view()
    places, codes = view.rows
    numbers = view.index.documents[view.index.places_of(places)].tolist()
    documents = view.documents(numbers)
    chunks = view.chunk_places(places.tolist()).values()
    rows = [(documents[number], chunk) for number, chunk in zip(numbers, chunks, strict=True)]
    assert {document.id for document, _ in rows} == set(model)
    assert [document.category for document, _ in rows] == [view.categories[code] for code in codes]
    inputs = [Input(item.text[at.start : at.end], Task.DOCUMENT, at.title(item.title)) for item, at in rows]
    assert view.index.vectors(places).tobytes() == encoder.encode(inputs).tobytes()
    used = [name for document in model.values() for name in (document.category, *document.also_in)]
    names = [described.get(name, Category(name=name)) for name in sorted(set(used))]
    assert base.categories == tuple(CategoryInfo(item.name, item.description, used.count(item.name)) for item in names)
    assert base.manifest.categories == len(names)
    guests = {(documents[int(view.index.documents[place])].id, view.categories[code]) for place, code in view.guests}
    assert guests == {(document.id, name) for document in model.values() for name in document.also_in}
    texts = [[item.text, *item.examples] for item in names]
    vectors, owners = view.names
    assert vectors.tobytes() == encoder.encode([Input(text, Task.CLASSIFICATION) for own in texts for text in own]).tobytes()
    assert owners.tolist() == [code for code, own in enumerate(texts) for _ in own]
