"""Filling a knowledge base block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from gemma_rag.bulk import Embedded, Pace, Progress, embed_block, embedded_here, fill, in_blocks
from gemma_rag.chunking import Chunker
from gemma_rag.documents import Document
from gemma_rag.errors import InputError
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.loading import StreamedRow

from .letters import LetterEncoder, numbered


def rows(documents: Iterable[Document]) -> list[StreamedRow]:
    return [StreamedRow("rows.jsonl", line, document) for line, document in enumerate(documents, 1)]


def no_bad_rows(row: StreamedRow) -> None:
    raise AssertionError(f"unexpected: {row.bad}")


@pytest.fixture
def base(tmp_path: Path) -> Iterable[KnowledgeBase]:
    with KnowledgeBase.create(tmp_path / "kb", LetterEncoder()) as base:
        yield base


@pytest.fixture
def run(base: KnowledgeBase) -> Callable[..., object]:
    """Fill the knowledge base in blocks of ten."""

    def fill_it(documents: Iterable[Document], encoder: LetterEncoder | None = None, *, skip: bool = False, **options: object):
        embedder = embedded_here(encoder or LetterEncoder(), base.chunker, skip)
        return fill(base, rows(documents), embedder, **{"batch": 10, "on_bad": no_bad_rows, **options})

    return fill_it


def vectors(base: KnowledgeBase) -> dict[str, bytes]:
    return {entry.document.id: np.asarray(entry.vectors).tobytes() for entry in base._store.entries()}


# -- what is in it afterwards -------------------------------------------------------------------------------------------


def test_in_blocks_or_at_once_the_documents_and_vectors_are_the_same(run, base):
    run(numbered(95))
    with KnowledgeBase.from_documents(numbered(95), LetterEncoder()) as at_once:
        assert {document.id: document for document in base} == {document.id: document for document in at_once}
        assert vectors(base) == vectors(at_once)
        assert base.categories == at_once.categories


def test_every_block_is_a_commit(run, base):
    before = base.manifest.generation
    run(numbered(95))
    assert base.manifest.generation == before + 10


def test_what_was_done_is_counted(run):
    run(numbered(20))
    changed = [document.model_copy(update={"text": "new"}) for document in numbered(5)]
    assert run([*changed, *numbered(30)[5:]]) == (10, 5, 15)


def test_a_run_that_stopped_goes_on_where_it_was(run, base, tmp_path):
    with pytest.raises(InputError, match="word TRAP"):
        run(numbered(50, trap=37), LetterEncoder(unreadable="TRAP"))
    assert len(base) == 30
    log = tmp_path / "log"
    run(numbered(50, trap=37), LetterEncoder(log))
    assert len(base) == 50
    assert {int(line.split()[0]) for line in log.read_text().splitlines()} == set(range(30, 50))


def test_where_nothing_changed_nothing_is_embedded_or_committed(run, base, tmp_path):
    run(numbered(50))
    before = base.manifest.generation
    assert run(numbered(50), LetterEncoder(tmp_path / "log")) == (0, 0, 50)
    assert not (tmp_path / "log").exists()
    assert base.manifest.generation == before


def test_where_the_metadata_alone_changed_vectors_are_kept(run, base, tmp_path):
    run(numbered(20))
    before = vectors(base)
    run([document.model_copy(update={"metadata": {"new": True}}) for document in numbered(20)], LetterEncoder(tmp_path / "log"))
    assert not (tmp_path / "log").exists()
    assert vectors(base) == before
    assert base.get("7").metadata == {"new": True}


def test_a_category_is_embedded_with_the_first_block_that_has_it(tmp_path):
    log = tmp_path / "log"
    with KnowledgeBase.create(tmp_path / "kb", LetterEncoder(log)) as base:
        fill(base, rows(numbered(40)), embedded_here(LetterEncoder(), base.chunker, False), batch=10, on_bad=no_bad_rows)
        assert sorted(log.read_text().splitlines()) == ["c0", "c1", "c2", "c3", "c4"]


# -- documents that cannot be embedded ----------------------------------------------------------------------------------


def test_a_document_that_cannot_be_embedded_is_refused_alone_and_told_with_its_line(run, base):
    bad: list[StreamedRow] = []
    documents = numbered(50, trap=37)
    filled = run(documents, LetterEncoder(unreadable="TRAP"), skip=True, on_bad=bad.append)
    assert (filled.added, len(base), "37" in base) == (49, 49, False)
    (row,) = bad
    assert (row.line, row.problem, row.raw) == (38, "a text has the word TRAP", documents[37].model_dump(mode="json"))


def test_the_others_of_its_block_have_their_own_vectors(run, base):
    run(numbered(50, trap=37), LetterEncoder(unreadable="TRAP"), skip=True, on_bad=lambda row: None)
    with KnowledgeBase.from_documents(numbered(50), LetterEncoder()) as whole:
        expected = vectors(whole)
    assert vectors(base) == {name: vector for name, vector in expected.items() if name != "37"}


def test_an_old_version_of_a_refused_document_stays(run, base):
    run(numbered(50))
    filled = run(numbered(50, trap=37), LetterEncoder(unreadable="TRAP"), skip=True, on_bad=lambda row: None)
    assert (filled.updated, base.get("37")) == (0, numbered(50)[37])


def test_a_category_that_only_refused_documents_have_is_not_made(run, base):
    document = Document(id="odd", text="TRAP", category="odd")
    run([*numbered(5), document], LetterEncoder(unreadable="TRAP"), skip=True, on_bad=lambda row: None)
    assert "odd" not in {item.category.name for item in base._store.stored_categories()}


def test_where_no_document_of_a_block_can_be_embedded_the_run_ends():
    documents = [Document(id=str(i), text="TRAP", category="c") for i in range(5)]
    with pytest.raises(InputError, match="none of 5 documents can be embedded, the first: a text has the word TRAP"):
        embed_block(documents, LetterEncoder(unreadable="TRAP"), Chunker(), skip=True)


def test_a_single_document_that_cannot_be_embedded_does_not_end_the_run():
    document = Document(id="a", text="TRAP", category="c")
    found = embed_block([document], LetterEncoder(unreadable="TRAP"), Chunker(), skip=True)
    assert found.refused == {"a": "a text has the word TRAP"}
    assert found.entries([document]) == []


def test_entries_have_the_chunks_and_vectors_of_their_documents():
    documents = [Document(id="long", text="word " * 400, category="c"), Document(id="short", text="word", category="c")]
    found = embed_block(documents, LetterEncoder(), Chunker(), skip=False)
    long, short = found.entries(documents)
    assert (len(long.chunks), len(short.chunks)) == (2, 1)
    assert long.vectors.shape == (2, 26)
    assert short.vectors.tobytes() == found.vectors[2:].tobytes()


def test_nothing_embedded_is_nothing():
    assert Embedded([], np.zeros((0, 0), dtype=np.float32), {}).entries([]) == []


# -- blocks and progress ------------------------------------------------------------------------------------------------


def test_blocks_grow_while_commits_come_fast_up_to_a_limit():
    pace = Pace(None)
    sizes = []
    for _ in range(8):
        sizes.append(pace.size)
        pace.took(0.1)
    assert sizes == [128, 256, 512, 1024, 2048, 2048, 2048, 2048]


def test_blocks_shrink_where_commits_are_a_minute_apart_down_to_a_limit():
    pace = Pace(None)
    sizes = []
    for _ in range(5):
        sizes.append(pace.size)
        pace.took(100.0)
    assert sizes == [128, 64, 32, 16, 16]


def test_a_size_that_was_given_stays():
    pace = Pace(7)
    pace.took(0.1)
    assert pace.size == 7


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(InputError, match="at least 1 document, and 0"):
        Pace(0)


def test_long_texts_end_a_block_early():
    documents = [Document(id=str(i), text="x" * 3_000_000, category="c") for i in range(7)]
    assert [len(block) for block in in_blocks(rows(documents), Pace(100), no_bad_rows)] == [3, 3, 1]


def test_rows_without_a_document_are_in_no_block():
    bad: list[StreamedRow] = []
    mixed = [*rows(numbered(2)), StreamedRow("rows.jsonl", 3, None, "no text")]
    assert [len(block) for block in in_blocks(mixed, Pace(10), bad.append)] == [2]
    assert bad == mixed[2:]


def test_progress_says_how_far_it_is_after_each_block(run):
    run(numbered(20))
    said: list[Progress] = []
    shares = iter([0.25, 0.5, 0.75, 1.0])
    run(numbered(40), share=lambda: next(shares), on_progress=said.append)
    assert said == [(10, 0.25, 0), (20, 0.5, 0), (30, 0.75, 10), (40, 1.0, 20)]
