"""Copying within the embedded engine; from engine to engine it is in the shared suite, tests/index/test_engines.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma_rag import KnowledgeBase
from gemma_rag.copying import MARK, Content, copy_knowledge_base
from gemma_rag.documents import Category, Document
from gemma_rag.errors import InputError, KnowledgeBaseError
from gemma_rag.storage import EngineAddress

COLOURS = ["red", "green", "blue"]
THINGS = {"apple": "fruit", "pear": "fruit", "plum": "fruit", "car": "traffic", "bus": "traffic", "tram": "traffic"}
PAGES = [
    Document(id=f"{c}-{t}", text=f"The {c} {t}.", title=t, category=THINGS[t], metadata={"colour": c})
    for c in COLOURS
    for t in THINGS
]


@pytest.fixture
def base(words, tmp_path) -> KnowledgeBase:
    described = [Category(name="fruit", description="What grows", examples=("red apple",)), Category(name="empty")]
    base = KnowledgeBase.from_documents(PAGES, words, categories=described)
    base.save(tmp_path / "source")
    base.store.attach({"ranking.json": b"{}"})
    return base


class Stop(Exception):
    pass


def stop_after(batches: int):
    left = [batches]

    def progress(done: int, total: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise Stop

    return progress


def stop(base: KnowledgeBase, out: Path, after: int) -> None:
    with pytest.raises(Stop):
        copy_knowledge_base(base, out, batch=4, progress=stop_after(after))


def test_a_copy_holds_the_same(base, tmp_path, words) -> None:
    report = copy_knowledge_base(base, tmp_path / "copy", batch=4)
    assert (report.documents, report.copied, report.deleted, report.categories) == (18, 18, 0, 3)
    with KnowledgeBase.open(tmp_path / "copy", words, verify=True) as copy:
        assert Content.of(copy.store) == Content.of(base.store)
        assert Content.of(copy.store).sha256 == report.content_sha256
        assert sorted(document.id for document in copy) == sorted(document.id for document in PAGES)
        assert copy.get("red-apple") == PAGES[0]
        assert copy.store.attachment("ranking.json") == b"{}"
        assert copy.store.attachment(MARK) is None
        assert copy.manifest.identity != base.manifest.identity


def test_nothing_is_embedded(base, tmp_path, words) -> None:
    words.calls.clear()
    copy_knowledge_base(base, tmp_path / "copy")
    assert words.calls == []


def test_one_in_memory_can_be_copied(words, tmp_path) -> None:
    base = KnowledgeBase.from_documents(PAGES, words)
    assert copy_knowledge_base(base, tmp_path / "copy").documents == 18


def test_an_empty_one_can_be_copied(words, tmp_path) -> None:
    base = KnowledgeBase.from_documents([], words)
    assert copy_knowledge_base(base, tmp_path / "copy").documents == 0


def test_progress_is_told(base, tmp_path) -> None:
    told: list[tuple[int, int]] = []
    copy_knowledge_base(base, tmp_path / "copy", batch=7, progress=lambda done, total: told.append((done, total)))
    assert told == [(7, 18), (14, 18), (18, 18)]


@pytest.mark.parametrize("after", [1, 2, 4, 5])
def test_a_copy_that_was_stopped_goes_on_where_it_was(base, tmp_path, after) -> None:
    stop(base, tmp_path / "copy", after)
    report = copy_knowledge_base(base, tmp_path / "copy", batch=4)
    assert report.copied == 18 - min(18, 4 * after)
    with KnowledgeBase.open(tmp_path / "copy") as copy:
        assert Content.of(copy.store) == Content.of(base.store)


def test_going_on_takes_over_what_has_changed_meanwhile(base, tmp_path) -> None:
    stop(base, tmp_path / "copy", 3)
    base.delete(["red-apple"])
    base.add(
        [Document(id="red-pear", text="The red pear is ripe.", category="fruit"), PAGES[0].model_copy(update={"id": "new"})]
    )
    report = copy_knowledge_base(base, tmp_path / "copy", batch=4)
    assert (report.documents, report.deleted) == (18, 1)
    with KnowledgeBase.open(tmp_path / "copy") as copy:
        assert "red-apple" not in copy
        assert copy.get("red-pear").text == "The red pear is ripe."


def test_a_finished_copy_is_not_written_over(base, tmp_path) -> None:
    copy_knowledge_base(base, tmp_path / "copy")
    with pytest.raises(InputError, match="exists already, and is no unfinished copy"):
        copy_knowledge_base(base, tmp_path / "copy")


def test_an_unfinished_copy_of_another_one_is_not_written_over(base, tmp_path, words) -> None:
    stop(base, tmp_path / "copy", 1)
    with pytest.raises(InputError, match="exists already, and is no unfinished copy"):
        copy_knowledge_base(KnowledgeBase.from_documents(PAGES, words), tmp_path / "copy")


def test_a_copy_onto_itself_is_refused(base, tmp_path) -> None:
    with pytest.raises(InputError, match="is what is to be copied"):
        copy_knowledge_base(base, tmp_path / "other" / ".." / "source")


def test_a_copy_goes_on_with_the_engine_it_began_with(base, tmp_path) -> None:
    stop(base, tmp_path / "copy", 1)
    with pytest.raises(InputError, match="unfinished copy on faiss: finish it with the same engine"):
        copy_knowledge_base(base, tmp_path / "copy", EngineAddress(name="chroma", uri=str(tmp_path / "chroma")))


def test_a_folder_of_somebody_elses_is_left_alone(base, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("hello")
    with pytest.raises(InputError, match="exists already"):
        copy_knowledge_base(base, tmp_path / "mine")


def test_a_source_that_changes_meanwhile_is_said_and_copied_by_the_next_call(base, tmp_path) -> None:
    def change(done: int, total: int) -> None:
        if done == 4:
            base.add([Document(id="late", text="A late plum.", category="fruit")])

    with pytest.raises(KnowledgeBaseError, match="was changed while it was being copied: copy again"):
        copy_knowledge_base(base, tmp_path / "copy", batch=4, progress=change)
    assert copy_knowledge_base(base, tmp_path / "copy").documents == 19


def test_a_copy_that_differs_is_said(base, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = Content.of
    monkeypatch.setattr(Content, "of", classmethod(lambda cls, store: Content(17, 17, genuine(store).digest)))
    with pytest.raises(KnowledgeBaseError, match=r"holds 17 documents in 17 chunks, .* and the source has 18 in 18"):
        copy_knowledge_base(base, tmp_path / "copy")


def test_the_content_is_told_apart_by_everything_that_is_kept(base) -> None:
    [first, *rest] = base.store.entries()
    told = set()
    for entry in (
        first,
        first._replace(vectors=-first.vectors),
        first._replace(chunks=[first.chunks[0].model_copy(update={"headings": ("x",)})]),
        first._replace(document=first.document.model_copy(update={"metadata": {}})),
        first._replace(document=first.document.model_copy(update={"id": "other"})),
    ):
        content = Content()
        for item in (*rest, entry):
            content.add(item)
        told.add(content.sha256)
    assert len(told) == 5


def test_a_report_is_plain_json(base, tmp_path) -> None:
    about = json.loads(json.dumps(copy_knowledge_base(base, tmp_path / "copy").to_json()))
    assert about["engine"]["name"] == "faiss"
    assert about["out"] == str(tmp_path / "copy")
