from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_rag.documents import Chunk, Document
from gemma_rag.errors import InputError, KnowledgeBaseError, MissingExtra
from gemma_rag.index import milvus, milvus_rows
from gemma_rag.index.remote import EVERY, RemoteRow, document_of, facet, facets_of, matches, open_engine, rows_of
from gemma_rag.vectors import Floats, unit

pytest.importorskip("pymilvus", reason="pymilvus is not installed: its engine is not tested")
pytest.importorskip("milvus_lite", reason="milvus-lite is not installed: the engine for Milvus is not tested")
pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

SIZE = 8
Make = Callable[..., milvus.MilvusEngine]


@pytest.fixture(params=["file", "tcp"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Makes and opens engines, on a file and over TCP, and closes them all."""
    uri = str(tmp_path / "lite.db") if request.param == "file" else request.getfixturevalue("milvus_url")
    opened: list[milvus.MilvusEngine] = []
    collection = f"test_{uuid4().hex}"

    def one(*, create: bool = False, dimensions: int = SIZE) -> milvus.MilvusEngine:
        opened.append(milvus.MilvusEngine(uri, collection, dimensions, create=create))
        return opened[-1]

    yield one
    for engine in opened:
        engine.close()


@pytest.fixture
def engine(make: Make) -> milvus.MilvusEngine:
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


def found(engine: milvus.MilvusEngine, query: Floats, **options: object) -> list[str]:
    asked = {"within": [None], "n": 50, "where": None, "generation": 9, **options}
    return [row.id for row, _ in engine.search(query[None], **asked)[0]]  # type: ignore[arg-type]


# -- rows -----------------------------------------------------------------------------------------------------------


def test_rows_come_back_as_they_were_with_the_same_bits(engine) -> None:
    odd = {"title": 'A "title"\r\n', "also_in": ("b\\", "中文"), "metadata": {"x": [1, None, {"y": 2.5}], "leer": ""}}
    written = [*rows("a'\ufeff\"", 3, **odd), *rows("b", 2, category=" 中 😀/x", seed=1)]
    engine.add(written)
    engine.persist()
    back = sorted(engine.rows(["b", "a'\ufeff\"", "nobody"], vectors=True), key=lambda row: row.key)
    assert len(back) == 5
    assert all(map(same, back, sorted(written, key=lambda row: row.key)))


def test_a_row_that_is_added_again_is_there_once_as_it_was_last(engine) -> None:
    engine.add(rows("a", metadata={"year": 1}))
    engine.persist()
    engine.add(rows("a", title="New", seed=1))
    [row] = engine.rows(["a"], vectors=True)
    assert same(row, rows("a", title="New", seed=1)[0])
    assert engine.count() == 1


def test_deleting_goes_by_document_and_generation(engine) -> None:
    for generation in (1, 2, 3):
        engine.add([*rows("a", 2, generation=generation, also_in=("b",)), *rows("b", generation=generation)])
    engine.delete(["a", "nobody"], before=3)
    left = sorted((row.id, row.generation) for batch in engine.scan() for row in batch)
    assert left == [("a", 3), ("a", 3), ("b", 1), ("b", 2), ("b", 3)]
    assert found(engine, vectors(1)[0], within=[["b"]], generation=2) == []


def test_undo_deletes_what_came_later(engine) -> None:
    engine.add([*rows("a", generation=1), *rows("a", generation=3), *rows("b", generation=2)])
    engine.undo(after=1)
    assert [(stamp.id, stamp.generation) for stamp in engine.stamps(["a", "b"])] == [("a", 1)]


def test_stamps_tell_the_content_once_for_each_commit(engine) -> None:
    written = rows("a", 4, also_in=("x",))
    engine.add(written)
    assert [(stamp.id, stamp.hash) for stamp in engine.stamps(["a", "c"])] == [("a", written[0].hash)]


def test_a_scan_gives_every_row_once_and_documents_together(engine) -> None:
    written = [row for i in range(7) for row in rows(f"d{i}", 3, seed=i, also_in=("x",))]
    engine.add(written[:9])
    engine.persist()
    engine.add(written[9:])
    scanned = [row for batch in engine.scan(batch=4) for row in batch]
    assert all(map(same, scanned, sorted(written, key=lambda row: row.key)))
    assert len(scanned) == engine.count() == 21
    assert all(row.vector is None for batch in engine.scan(vectors=False) for row in batch)


def test_many_rows_go_in_several_requests(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus, "_BATCH_ROWS", 10)
    sizes = []
    send = engine._client.upsert
    monkeypatch.setattr(engine._client, "upsert", lambda name, batch: (sizes.append(len(batch)), send(name, batch)))
    engine.add([row for i in range(5) for row in rows(f"d{i}", 5, seed=i)])
    assert (engine.count(), sizes) == (25, [10, 10, 5])


def test_the_rows_of_a_document_of_very_many_chunks_all_come(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus, "_AT_ONCE", 10)
    written = rows("a", 25)
    engine.add(written)
    assert [row.place for row in sorted(engine.rows(["a"]), key=lambda row: row.place)] == list(range(25))


def test_a_text_that_is_longer_than_a_field_comes_back_whole(engine) -> None:
    document = Document(id="long", text="中文字 " * 40_000, title="字" * 100, category="it", metadata={"note": "é" * 70_000})
    end = len(document.text)
    engine.add(rows_of(document, [Chunk(start=0, end=end // 2), Chunk(start=end // 2, end=end)], vectors(2), 1))
    engine.persist()
    assert document_of(engine.rows(["long"])) == document
    assert [row.id for row in engine.words("中文字", None, 1, None, 1)] == ["long"]


@pytest.mark.parametrize("fields", [{"id": "x" * 65_536}, {"category": "é" * 40_000}, {"also_in": ("x" * 65_536,)}])
def test_what_does_not_fit_is_refused_by_the_document(engine, fields) -> None:
    document = Document.model_validate({"id": "a", "text": "t", "category": "c", **fields})
    with pytest.raises(InputError, match=r"document '[ax]+' does not fit into Milvus: .* more than 65,535 bytes"):
        engine.add(rows_of(document, [Chunk(start=0, end=1)], vectors(1), 1))


# -- searching ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written_out", [False, True])
def test_scores_are_the_cosines_of_numpy_best_first(engine, written_out) -> None:
    written = [row for i in range(60) for row in rows(f"d{i}", seed=i)]
    engine.add(written)
    if written_out:
        engine.persist()
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
    homes = [sorted({row.category for row, _ in answer}) for answer in answers]
    assert homes == [["a"], ["a", "b", "c"], ["b", "c"], [], [], ["b", "c"]]


def test_a_cluster_is_asked_about_several_sets_of_categories_at_a_time(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "lite", False)
    engine.add([*rows("x", category="a"), *rows("y", category="b", seed=1)])
    answers = engine.search(vectors(2), [["a"], ["b"]], 5, None, 1)
    assert [[row.id for row, _ in answer] for answer in answers] == [["x"], ["y"]]


def test_a_document_is_found_once_in_its_further_categories(engine) -> None:
    engine.add([*rows("x", category="a", also_in=("b",)), *rows("y", category="c", seed=1)])
    assert found(engine, vectors(1)[0], within=[["b"]]) == ["x"]
    assert sorted(found(engine, vectors(1)[0], within=[["a", "b", "c"]])) == ["x", "y"]
    assert engine.count() == 2


@pytest.mark.parametrize("name", ['quo"te', "back\\slash", "line\nend", "tab\tand\r", "it's", "中文 😀", "{x}", "%_"])
def test_a_category_is_found_whatever_it_is_called(engine, name) -> None:
    engine.add([*rows("x", category=f"a{name}b"), *rows("y", category="other", seed=1)])
    assert found(engine, vectors(1)[0], within=[[f"a{name}b"]]) == ["x"]


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


def test_metadata_with_too_many_values_to_tell_is_left_to_the_caller(engine) -> None:
    engine.add(rows("many", metadata={"a": list(range(5000))}))
    assert found(engine, vectors(1)[0], where={"a": [1]}) == ["many"]
    assert found(engine, vectors(1)[0], where={"b": [1]}) == ["many"]


def test_the_homes_of_metadata(engine) -> None:
    engine.add([*rows("x", metadata={"a": 1}, category="b", also_in=("c",)), *rows("y", metadata={"a": 2}, seed=1)])
    engine.add(rows("z", metadata={"a": 1}, category="later", generation=2))
    assert engine.homes({"a": [1]}, 1, 10) == {"b", "c"}
    assert engine.homes({"a": [1, 2]}, 1, 1) is None
    assert engine.homes({"a": []}, 1, 1) == set()


def test_words_are_ranked_on_the_server_in_chinese_and_english(engine) -> None:
    engine.add(rows("weather", text="今天天气很好,适合散步。", seed=1, category="a"))
    engine.add(rows("bank", text="银行账户的利率是多少?", title="Reset a Password", seed=2, category="b", also_in=("c",)))
    engine.add(rows("none", text="???", seed=3, category="a"))
    assert [row.id for row in engine.words("天气怎么样", None, 5, None, 1)] == ["weather"]
    [row] = engine.words("PASSWORD", ["b", "c"], 5, None, 1)
    assert row.id == "bank"
    np.testing.assert_array_equal(row.vector, vectors(1, 2)[0])
    assert engine.words("password", ["a"], 5, None, 1) == []
    assert engine.words("password", [], 5, None, 1) == engine.words(" ", None, 5, None, 1) == []
    assert engine.words("password", None, 5, {"year": [1]}, 1) == []
    assert engine.words("password", None, 5, None, 0) == []


values = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([0.0, -0.0, 1.0, 2.5]), st.sampled_from(["1", "a"])
)


@given(
    st.dictionaries(st.sampled_from("ab"), st.recursive(values, lambda inner: st.lists(inner, max_size=3), max_leaves=4)),
    st.dictionaries(st.sampled_from("ab"), st.lists(values, max_size=3), min_size=1),
)
def test_facets_say_what_matching_says(metadata, where) -> None:
    facets = set(facets_of(metadata, 100))
    by_facets = all(any(facet(key, value) in facets for value in wanted) for key, wanted in where.items())
    assert by_facets == matches(metadata, where)


def test_too_many_facets_are_one_that_stands_for_every() -> None:
    assert facets_of({"a": [1, 2, 3]}, 2) == [EVERY]


# -- records --------------------------------------------------------------------------------------------------------


def test_records_come_back_as_they_were(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus, "LONGEST", 10)
    monkeypatch.setattr(milvus, "_PIECES_AT_ONCE", 3)
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
    monkeypatch.setattr(milvus, "LONGEST", 10)
    engine.put("large", os.urandom(35))
    engine._client.delete(engine._records, filter="place == 1")
    with pytest.raises(KnowledgeBaseError, match=r"record 'large' of .* is damaged"):
        engine.fetch("large")


def test_a_record_is_called_by_letters_and_digits(engine) -> None:
    with pytest.raises(InputError, match="letters, digits and hyphens"):
        engine.put('a" or 1 == 1', b"")


# -- the collection -------------------------------------------------------------------------------------------------


def test_it_is_there_when_it_is_opened_again(make) -> None:
    first = make(create=True)
    first.add(rows("a", 3))
    first.put("x", b"y")
    first.persist()
    first.close()
    again = make()
    assert (again.count(), again.fetch("x")) == (3, b"y")
    assert found(again, vectors(1)[0]) != []


def test_a_second_engine_sees_what_the_first_one_adds(make) -> None:
    first, second = make(create=True), make()
    first.add(rows("a"))
    assert found(second, vectors(1)[0]) == ["a"]


def test_a_collection_is_made_once_and_taken_while_it_is_empty(make) -> None:
    make(create=True)
    make(create=True).add(rows("a"))
    with pytest.raises(InputError, match="already: open the knowledge base"):
        make(create=True)


def test_a_collection_that_is_not_there_is_not_opened(make) -> None:
    make(create=True).drop()
    with pytest.raises(KnowledgeBaseError, match="has no collection 'test_"):
        make()


def test_a_collection_of_other_dimensions_is_refused(make) -> None:
    make(create=True)
    with pytest.raises(KnowledgeBaseError, match=r"has vectors of 8 dimensions, and the knowledge base has 16"):
        make(dimensions=16)


def test_somebody_elses_collection_is_refused(engine, make) -> None:
    engine._client.drop_collection(engine.collection)
    engine._client.create_collection(engine.collection, dimension=SIZE)
    with pytest.raises(KnowledgeBaseError, match="was not made by gemma-rag"):
        make()


def test_a_collection_is_called_by_letters_digits_and_underscores(tmp_path) -> None:
    with pytest.raises(InputError, match="not 'a-b'"):
        open_engine("milvus", str(tmp_path / "x.db"), "a-b", SIZE, create=True)


def test_a_uri_is_an_address_or_a_file_of_milvus_lite(tmp_path) -> None:
    with pytest.raises(InputError, match=r"a path that ends in \.db, and not"):
        open_engine("milvus", str(tmp_path / "x"), "name", SIZE, create=True)


def test_a_server_that_does_not_answer_is_named_and_the_token_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(milvus.TOKEN, "root:short-secret")
    with pytest.raises(KnowledgeBaseError, match=r"Milvus at http://127\.0\.0\.1:9 could not") as caught:
        open_engine("milvus", "http://127.0.0.1:9", "name", SIZE)
    assert "secret" not in str(caught.value)


def test_the_token_is_given_to_the_client_and_stands_in_no_repr(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    import pymilvus

    given = {}
    monkeypatch.setenv(milvus.TOKEN, "root:short-secret")
    monkeypatch.setattr(pymilvus, "MilvusClient", lambda uri, **options: given.update(options))
    engine._connected()
    assert given["token"] == "root:short-secret"
    assert "secret" not in repr(engine)


def test_without_pymilvus_the_extra_is_named(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(MissingExtra, match=r"gemma-rag\[milvus\]"):
        open_engine("milvus", str(tmp_path / "x.db"), "name", SIZE, create=True)


def test_without_milvus_lite_a_file_names_the_extra(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "milvus_lite", None)
    with pytest.raises(MissingExtra, match=r"gemma-rag\[milvus\]"):
        open_engine("milvus", str(tmp_path / "x.db"), "name", SIZE, create=True)


def test_another_engine_is_refused() -> None:
    with pytest.raises(InputError, match="no engine 'qdrant': take one of milvus, chroma"):
        open_engine("qdrant", "http://x", "name", SIZE)


def test_a_second_process_is_told_that_the_file_is_open(tmp_path) -> None:
    code = (
        "import logging, sys; logging.disable(logging.CRITICAL)\n"
        "from gemma_rag.index.milvus import MilvusEngine\n"
        "try: MilvusEngine(sys.argv[1], 'name', 8)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lite.db")]

    def said() -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout

    engine = milvus.MilvusEngine(str(tmp_path / "lite.db"), "name", SIZE, create=True)
    try:
        assert "KnowledgeBaseError" in (first := said())
        assert "milvus-lite server --data-dir" in first
    finally:
        engine.close()
        engine.close()
    assert said() == ""


def test_an_error_is_raised_and_not_printed_too(engine, caplog: pytest.LogCaptureFixture) -> None:
    engine._client.drop_collection(engine.collection)
    with pytest.raises(KnowledgeBaseError, match="could not do it"):
        engine.search(vectors(1), [None], 5, None, 1)
    assert [record for record in caplog.records if record.name.startswith("pymilvus")] == []


def test_nothing_is_logged_by_ordinary_use(engine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        engine.add(rows("a", text="中文"))
        assert [row.id for batch in engine.scan() for row in batch] == ["a"]
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("number", ["0", "1025", "-1", "many", "", "1e3"])
def test_a_number_of_partitions_out_of_range_is_refused(number) -> None:
    with pytest.raises(InputError, match=f"1 to 1024 partitions, and the uri asks for '{number}'"):
        milvus.partitions_of(f"http://localhost:19530?partitions={number}")


@pytest.mark.parametrize(("uri", "expected"), [("", 64), ("?partitions=512", 512)])
def test_a_server_is_asked_for_the_partitions(tmp_path, monkeypatch, uri, expected) -> None:
    engine = milvus.MilvusEngine(str(tmp_path / "x.db"), "one", SIZE, create=True)
    asked: dict[str, object] = {}
    engine.lite = False
    _, engine._partitions = milvus.partitions_of(f"http://localhost:19530{uri}")
    monkeypatch.setattr(engine._client, "create_collection", lambda name, **options: asked.update(options))
    monkeypatch.setattr(engine._client, "create_index", lambda *args, **options: None)
    engine._make("another", *milvus_rows.schema_of_rows(SIZE, lite=False), partitioned=True)
    engine.lite = True
    engine.close()
    assert asked["num_partitions"] == expected
