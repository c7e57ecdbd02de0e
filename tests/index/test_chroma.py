from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest

from gemma_rag.documents import Chunk, Document
from gemma_rag.errors import InputError, KnowledgeBaseError, MissingExtra
from gemma_rag.index import chroma, chroma_rows
from gemma_rag.index.remote import RemoteRow, document_of, rows_of
from gemma_rag.vectors import Floats, unit

pytest.importorskip("chromadb", reason="chromadb is not installed: its engine is not tested")
pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

SIZE = 8
Make = Callable[..., chroma.ChromaEngine]


@pytest.fixture(params=["embedded", "http"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Makes and opens engines, embedded and over HTTP, and closes them all."""
    uri = str(tmp_path / "chroma") if request.param == "embedded" else request.getfixturevalue("chroma_url")
    opened: list[chroma.ChromaEngine] = []
    collection = f"test-{uuid4().hex}"

    def one(*, create: bool = False, dimensions: int = SIZE, name: str = collection) -> chroma.ChromaEngine:
        opened.append(chroma.ChromaEngine(uri, name, dimensions, create=create))
        return opened[-1]

    yield one
    for engine in opened:
        engine.close()


@pytest.fixture
def engine(make: Make) -> chroma.ChromaEngine:
    return make(create=True)


def vectors(count: int, seed: int = 0) -> Floats:
    return unit(np.random.default_rng(seed).normal(size=(count, SIZE)).astype(np.float32))


def rows(name: str, count: int = 1, *, generation: int = 1, seed: int = 0, **fields: object) -> list[RemoteRow]:
    """A document of so many chunks."""
    text = "".join(f"{name} {i:03d}. " for i in range(count))
    step = len(text) // count
    document = Document.model_validate({"id": name, "text": text, "category": "it", **fields})
    chunks = [Chunk(start=i * step, end=(i + 1) * step, headings=("One", f"{i}")) for i in range(count)]
    return rows_of(document, chunks, vectors(count, seed), generation)


def same(left: RemoteRow, right: RemoteRow) -> bool:
    alike = left._replace(vector=None) == right._replace(vector=None)
    return alike and (left.vector is None or right.vector is None or bool((left.vector == right.vector).all()))


def found(engine: chroma.ChromaEngine, query: Floats, **options: object) -> list[str]:
    asked = {"within": [None], "n": 50, "where": None, "generation": 9, **options}
    return [row.id for row, _ in engine.search(query[None], **asked)[0]]  # type: ignore[arg-type]


# -- rows -----------------------------------------------------------------------------------------------------------


def test_rows_come_back_as_they_were_with_the_same_bits(engine) -> None:
    odd = {"title": 'A "title"\x00', "also_in": ("b\x00", "中文"), "metadata": {"x": [1, None, {"y": 2.5}], "leer": ""}}
    written = [*rows("a\ufeff\x00", 3, **odd), *rows("b", 2, category=" 中 😀/x", seed=1)]
    engine.add(written)
    back = sorted(engine.rows(["b", "a\ufeff\x00", "nobody"], vectors=True), key=lambda row: row.key)
    assert len(back) == 5
    assert all(map(same, back, sorted(written, key=lambda row: row.key)))


def test_a_row_that_is_added_again_is_there_once_as_it_was_last(engine) -> None:
    engine.add(rows("a", also_in=("x",), metadata={"year": 1}))
    engine.add(rows("a", title="New", seed=1))
    [row] = engine.rows(["a"], vectors=True)
    assert same(row, rows("a", title="New", seed=1)[0])
    assert found(engine, vectors(1)[0], where={"year": [1]}) == []


def test_deleting_goes_by_document_and_generation(engine) -> None:
    for generation in (1, 2, 3):
        engine.add([*rows("a", 2, generation=generation), *rows("b", generation=generation)])
    engine.delete(["a", "nobody"], before=3)
    assert sorted((row.id, row.generation) for batch in engine.scan() for row in batch) == [
        ("a", 3),
        ("a", 3),
        ("b", 1),
        ("b", 2),
        ("b", 3),
    ]


def test_undo_deletes_what_came_later(engine) -> None:
    engine.add([*rows("a", generation=1), *rows("a", generation=3), *rows("b", generation=2)])
    engine.undo(after=1)
    assert [(stamp.id, stamp.generation) for stamp in engine.stamps(["a", "b"])] == [("a", 1)]


def test_stamps_tell_the_content(engine) -> None:
    written = rows("a", 4)
    engine.add(written)
    assert {(stamp.id, stamp.hash) for stamp in engine.stamps(["a", "c"])} == {("a", written[0].hash)}


def test_a_scan_gives_every_row_once_and_documents_together(engine) -> None:
    written = [row for i in range(7) for row in rows(f"d{i}", 3, seed=i)]
    engine.add(written)
    scanned = [row for batch in engine.scan(batch=4) for row in batch]
    assert all(map(same, scanned, sorted(written, key=lambda row: row.key)))
    assert len(scanned) == engine.count() == 21
    assert all(row.vector is None for batch in engine.scan(vectors=False) for row in batch)


def test_many_rows_go_in_several_requests(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_most", 10)
    engine.add([row for i in range(5) for row in rows(f"d{i}", 5, seed=i)])
    assert engine.count() == 25


def test_a_long_text_goes_in_requests_that_a_server_takes(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chroma_rows, "_BYTES", 10_000)
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 9_000)))
    chunks = [Chunk(start=start, end=start + 3_000) for start in (0, 3_000, 6_000)]
    written = rows_of(Document(id="long", text=text, category="it"), chunks, vectors(3), 1)
    assert [len(batch) for batch in chroma_rows.batches(written, 100)] == [1, 1, 1]
    engine.add(written)
    assert document_of(engine.rows(["long"])).text == text


def test_a_row_without_a_vector_is_refused_by_its_document(engine) -> None:
    with pytest.raises(InputError, match="document 'a' has a row without a vector of 8 numbers"):
        engine.add([rows("a")[0]._replace(vector=None)])


# -- searching ------------------------------------------------------------------------------------------------------


def test_scores_are_the_cosines_of_numpy_best_first(engine) -> None:
    written = [row for i in range(60) for row in rows(f"d{i}", seed=i)]
    engine.add(written)
    queries = vectors(3, seed=99)
    answers = engine.search(queries, [None] * 3, 20, None, 1)
    cosines = queries @ np.stack([row.vector for row in written]).T
    for answer, own in zip(answers, cosines, strict=True):
        assert [row.id for row, _ in answer] == [written[i].id for i in np.argsort(-own)[:20]]
        np.testing.assert_allclose([score for _, score in answer], np.sort(own)[::-1][:20], atol=1e-6)
        assert all(row.vector is None for row, _ in answer)


def test_each_question_looks_into_its_own_categories(engine) -> None:
    for i, category in enumerate("aabbcc"):
        engine.add(rows(f"{category}{i}", category=category, seed=i))
    within = [["a"], None, ["c", "b"], [], ["nowhere"], ["b", "c"]]
    answers = engine.search(vectors(6, seed=7), within, 50, None, 1)
    assert [sorted({row.category for row, _ in answer}) for answer in answers] == [
        ["a"],
        ["a", "b", "c"],
        ["b", "c"],
        [],
        [],
        ["b", "c"],
    ]


def test_a_document_is_found_in_its_further_categories(engine) -> None:
    engine.add([*rows("x", category="a", also_in=("b",)), *rows("y", category="c", seed=1)])
    assert found(engine, vectors(1)[0], within=[["b"]]) == ["x"]
    assert sorted(found(engine, vectors(1)[0], within=[["b", "c"]])) == ["x", "y"]


def test_further_categories_are_seen_by_a_reader_that_was_open_before(make) -> None:
    writer, reader = make(create=True), make()
    assert found(reader, vectors(1)[0], within=[["b"]], generation=1) == []
    writer.add(rows("x", category="a", also_in=("b",), generation=2))
    assert found(reader, vectors(1)[0], within=[["b"]], generation=2) == ["x"]


def test_later_generations_are_not_seen_and_do_not_crowd_out_what_is(engine) -> None:
    engine.add(rows("old", seed=5))
    engine.add([row._replace(generation=2) for i in range(40) for row in rows(f"new{i}", seed=6)])
    assert found(engine, vectors(1, seed=6)[0], n=1, generation=1) == ["old"]


@pytest.mark.parametrize("where", [{"year": [2024]}, {"year": [2024.0]}, {"tag": ["b", "z"]}, {"ok": [True]}, {"none": [None]}])
def test_metadata_is_asked_for_on_the_server(engine, where) -> None:
    engine.add(rows("yes", metadata={"year": 2024, "tag": ["a", ["b"]], "ok": True, "none": None}))
    engine.add(rows("no", metadata={"year": "2024", "tag": "c", "ok": 1, "none": "x"}, seed=1))
    engine.add(rows("nothing", seed=2))
    assert found(engine, vectors(1)[0], where=where) == ["yes"]


def test_several_keys_must_all_match(engine) -> None:
    engine.add([*rows("x", metadata={"a": 1, "b": 2}), *rows("y", metadata={"a": 1, "b": 3}, seed=1)])
    assert found(engine, vectors(1)[0], where={"a": [1], "b": [3, 4]}, within=[["it"]]) == ["y"]
    assert found(engine, vectors(1)[0], where={"a": []}) == []


def test_the_homes_of_metadata(engine) -> None:
    engine.add([*rows("x", metadata={"a": 1}, category="b", also_in=("c",)), *rows("y", metadata={"a": 2}, seed=1)])
    engine.add(rows("z", metadata={"a": 1}, category="later", generation=2))
    assert engine.homes({"a": [1]}, 1, 10) == {"b", "c"}
    assert engine.homes({"a": [1, 2]}, 1, 1) is None
    assert engine.homes({"a": []}, 1, 1) == set()


def test_chroma_does_not_rank_by_words(engine) -> None:
    assert not engine.has_words
    with pytest.raises(InputError, match="Chroma does not rank by words"):
        engine.words("red", None, 10, None, 1)


# -- records --------------------------------------------------------------------------------------------------------


def test_records_come_back_as_they_were(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chroma, "_PIECE", 10)
    contents = {"empty": b"", "small": bytes(range(10)), "large": os.urandom(205)}
    for name, data in contents.items():
        engine.put(name, b"something else that is longer than ten bytes")
        engine.put(name, data)
    assert engine.records() == sorted(contents)
    assert {name: engine.fetch(name) for name in contents} == contents
    engine.put("large", None)
    assert engine.fetch("large") is None
    assert engine.records() == ["empty", "small"]


def test_a_record_that_lost_a_piece_is_said_to_be_damaged(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chroma, "_PIECE", 10)
    engine.put("large", os.urandom(35))
    engine._records.delete(where={"kind": "piece"})
    with pytest.raises(KnowledgeBaseError, match="record large is damaged"):
        engine.fetch("large")


# -- the collection -------------------------------------------------------------------------------------------------


def test_it_is_there_when_it_is_opened_again(make) -> None:
    first = make(create=True)
    first.add(rows("a", 3))
    first.put("x", b"y")
    first.persist()
    first.close()
    again = make()
    assert (again.count(), again.fetch("x")) == (3, b"y")


def test_a_collection_with_rows_is_not_made_again(make) -> None:
    make(create=True).add(rows("a", 3))
    with pytest.raises(InputError, match="already: choose another name"):
        make(create=True)


def test_an_empty_collection_that_a_killed_maker_left_is_taken(make) -> None:
    make(create=True)
    again = make(create=True)
    again.add(rows("a", 3))
    assert again.count() == 3


def test_a_collection_that_is_not_there_is_not_opened(make) -> None:
    make(create=True).drop()
    with pytest.raises(KnowledgeBaseError, match="has no collection test-"):
        make()


def test_a_collection_of_other_dimensions_is_refused(make) -> None:
    make(create=True)
    with pytest.raises(KnowledgeBaseError, match="not of 16 dimensions"):
        make(dimensions=16)


def test_a_closed_engine_says_so(engine) -> None:
    engine.close()
    engine.close()
    with pytest.raises(KnowledgeBaseError, match="is closed"):
        engine.count()


@pytest.mark.parametrize("name", ["ab", "with space", "-first", ""])
def test_a_name_that_chroma_would_refuse_is_refused_by_us(tmp_path, name) -> None:
    with pytest.raises(InputError, match="no collection named"):
        chroma.ChromaEngine(str(tmp_path / "new"), name, SIZE, create=True)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_not_there_is_not_made_by_opening(tmp_path) -> None:
    with pytest.raises(KnowledgeBaseError, match="no Chroma folder"):
        chroma.ChromaEngine(str(tmp_path / "nowhere"), "name", SIZE)
    assert not (tmp_path / "nowhere").exists()


def test_a_server_that_does_not_answer_is_named() -> None:
    with pytest.raises(KnowledgeBaseError, match=r"Chroma at http://127.0.0.1:9 failed: .*Is the server running"):
        chroma.ChromaEngine("http://127.0.0.1:9", "name", SIZE)


def test_an_address_without_a_host_is_refused() -> None:
    with pytest.raises(InputError, match="no address of a Chroma server"):
        chroma.ChromaEngine("http://", "name", SIZE)


def test_the_token_goes_to_the_server_and_nowhere_else(chroma_url, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(chroma.TOKEN, "a-secret")
    engine = chroma.ChromaEngine(chroma_url, f"test-{uuid4().hex}", SIZE, create=True)
    try:
        assert "a-secret" not in repr(engine)
        sent = engine._client._server._session.headers
        assert (sent["x-chroma-token"], sent["authorization"]) == ("a-secret", "Bearer a-secret")
    finally:
        engine.close()


def test_without_chromadb_the_extra_is_named(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chroma, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"gemma-rag\[chroma\]"):
        chroma.ChromaEngine(str(tmp_path), "name", SIZE, create=True)


def test_a_second_process_is_told_that_the_folder_is_open(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; from gemma_rag.index import chroma, chroma_client; chroma_client._PATIENCE = 0.1\n"
        "try: chroma.ChromaEngine(sys.argv[1], 'name', 8)\n"
        "except Exception as error: print(repr(type(error).__name__), error)"
    )
    engine = chroma.ChromaEngine(str(tmp_path / "chroma"), "name", SIZE, create=True)
    command = [sys.executable, "-c", code, str(tmp_path / "chroma")]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
        assert "KnowledgeBaseError" in said
        assert "chroma run --path" in said
    finally:
        engine.close()
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout == ""


def test_two_engines_of_a_process_share_a_folder(make) -> None:
    first, second = make(create=True), make(create=True, name=f"other-{uuid4().hex}")
    first.add(rows("a"))
    first.close()
    second.add(rows("b"))
    assert [row.id for row in second.rows(["a", "b"])] == ["b"]


def test_rows_deleted_while_chroma_puts_an_answer_together_are_left_out(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.add([row for i in range(4) for row in rows(f"d{i}", seed=i)])
    genuine = engine._rows.query

    def query(**options: object) -> dict:
        answer = genuine(**options)
        answer["metadatas"][0][1] = answer["documents"][0][2] = None
        return answer

    monkeypatch.setattr(engine._rows, "query", query)
    best = [row.id for row, _ in engine.search(vectors(1), [None], 4, None, 1)[0]]
    assert len(best) == 2
    assert best[0] == "d0"
