"""Sources that are read a little at a time: the same rows as at once, in little memory."""

from __future__ import annotations

import csv
import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_rag import loading
from gemma_rag.cleaning import Cleaning
from gemma_rag.documents import Document
from gemma_rag.errors import BadRow, BadRows, InputError
from gemma_rag.loading import DocumentStream, _Seen, load_documents, stream_documents

GOOD = {"id": "a", "text": "Open the portal.", "title": "VPN", "category": "IT"}


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[list[str]], delimiter: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def same_as_at_once(source: Path, **options: Any) -> None:
    """Documents and bad rows are those of `load_documents`."""
    rows = list(DocumentStream(source, **options))
    loaded = load_documents(source, skip_bad=True, **options)
    assert tuple(row.document for row in rows if row.document is not None) == loaded.documents
    assert tuple(row.bad for row in rows if row.document is None) == loaded.bad_rows


# -- the same rows ------------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.one_of(
            st.fixed_dictionaries({"id": st.sampled_from("abcdef"), "text": st.text(max_size=5), "category": st.just("c")}),
            st.sampled_from(["", "{", "[1]", "null"]),
        ),
        min_size=1,
        max_size=30,
    ),
    st.integers(1, 7),
)
@settings(max_examples=50)
def test_a_stream_has_the_rows_that_are_loaded_at_once(tmp_path_factory, rows, ahead):
    path = write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", GOOD, *rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_READ_AHEAD", ahead)
        same_as_at_once(path)


def test_ids_made_of_lines_are_the_same(tmp_path):
    same_as_at_once(write_jsonl(tmp_path / "rows.jsonl", *[{"text": "x", "category": "c"}] * 5))


def test_rows_without_an_id_are_bad_where_a_later_one_has_one(tmp_path):
    same_as_at_once(write_jsonl(tmp_path / "rows.jsonl", {"text": "x", "category": "c"}, GOOD))


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_tables_are_the_same(tmp_path, suffix, delimiter):
    rows = [["nr", "text", "category"], ["1", "two\nlines", "c"], ["1", "twice", "c"], ["3", "", "c"], ["4", "x"]]
    same_as_at_once(write_csv(tmp_path / f"rows{suffix}", rows, delimiter), columns={"id": "nr"})


def test_another_encoding_is_the_same(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [json.dumps({**GOOD, "id": i, "text": "重置密码" * 3000}, ensure_ascii=False) for i in range(9)]
    path.write_bytes("\n".join(rows).encode("gb18030"))
    same_as_at_once(path, encoding="gb18030", cleaning=Cleaning(punctuation=True))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_byte_order_mark_is_no_text(tmp_path, encoding):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n", encoding=encoding)
    assert [row.document for row in DocumentStream(path, encoding=encoding)] == [Document(**GOOD)]


def test_bytes_that_cannot_be_decoded_are_told_with_their_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({**GOOD, "id": str(i), "text": "x" * 5000}).encode() for i in range(8)]
    lines[6] = b'{"id": "\xff"}'
    path.write_bytes(b"\n".join(lines))
    same_as_at_once(path)
    (bad,) = [row for row in DocumentStream(path) if row.document is None]
    assert (bad.line, bad.raw) == (7, '{"id": "\ufffd"}')


def test_a_folder_is_the_same(tmp_path):
    for name in ("b/x.txt", "a/z.md", "a/z.txt", "a/b/c.html", "a/B.txt", "a.htm", ".hidden.md", "a/y.txt.md", "a/y.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"the text of {name}")
    (tmp_path / "b/empty.txt").write_text(" ")
    same_as_at_once(tmp_path, category="top")


# -- what cannot be used ------------------------------------------------------------------------------------------------


def test_a_bad_row_comes_with_what_stood_there(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", GOOD, "nonsense", {"id": "b", "category": "c"}, GOOD)
    raw = {row.line: row.raw for row in DocumentStream(path) if row.document is None}
    assert raw == {2: "nonsense", 3: {"id": "b", "category": "c"}, 4: GOOD}


def test_a_bad_row_of_a_table_comes_with_its_cells(tmp_path):
    path = write_csv(tmp_path / "rows.csv", [["id", "text", "category"], ["1", "x", "c"], ["2", "x"], ["3", "", "c"]])
    raw = [row.raw for row in DocumentStream(path) if row.document is None]
    assert raw == [["2", "x"], {"id": "3", "text": "", "category": "c"}]


def test_ids_that_come_twice_are_found_however_far_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_READ_AHEAD", 3)
    path = write_jsonl(tmp_path / "rows.jsonl", *({**GOOD, "id": i % 40} for i in range(50)))
    problems = [(row.line, row.problem) for row in DocumentStream(path) if row.document is None]
    assert problems == [(41 + i, f"the id '{i}' is taken already by {path}:{1 + i}") for i in range(10)]


def test_a_file_whose_id_is_taken_names_the_other_file(tmp_path, monkeypatch):
    monkeypatch.setattr("gemma_rag.reading.hash_of", lambda text: hash(text) & (2**64 - 1))
    monkeypatch.setattr(loading, "hash_of", lambda text: 7)  # as if the two had one
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    _, bad = DocumentStream(tmp_path, category="c")
    assert bad.problem == f"the id 'b' is taken already by {tmp_path / 'a.txt'}"


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", {}, "there is no document in"),
        ('{"id": 1, "text": "x"}', {"columns": {"text": "body"}}, "has no 'body' for the text"),
        ('{"id": 1, "text": "x"}', {"encoding": "klingon"}, "there is no encoding 'klingon'"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused_with_the_first_row(tmp_path, content, options, message):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        next(iter(DocumentStream(tmp_path / "rows.jsonl", **options)))


def test_a_source_that_is_not_there_is_refused_at_once(tmp_path):
    with pytest.raises(InputError, match="there is no file or folder"):
        DocumentStream(tmp_path / "rows.jsonl")


# -- documents one after another ----------------------------------------------------------------------------------------


def test_documents_are_given_out_up_to_the_first_bad_row(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", GOOD, "nonsense", {**GOOD, "id": "b"})
    stream = stream_documents(path)
    assert next(stream) == Document(**GOOD)
    with pytest.raises(BadRows, match=r"rows.jsonl:2: not valid JSON.*|give on_bad"):
        next(stream)


def test_bad_rows_can_be_taken_and_left_out(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", GOOD, "[1]", {**GOOD, "id": "b"})
    bad: list[BadRow] = []
    assert [document.id for document in stream_documents(path, on_bad=bad.append)] == ["a", "b"]
    assert bad == [BadRow(str(path), 2, "expected a JSON object, got [1]")]


# -- little memory ------------------------------------------------------------------------------------------------------


def rows_file(path: Path, count: int) -> Path:
    with path.open("w") as file:
        file.writelines(json.dumps({**GOOD, "id": i, "text": f"{i} " * 100}) + "\n" for i in range(count))
    return path


def peak(path: Path) -> int:
    """Most bytes that were in use while a file was read."""
    tracemalloc.start()
    try:
        for _ in DocumentStream(path):
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_READ_AHEAD", 50)
    few, many = rows_file(tmp_path / "few.jsonl", 500), rows_file(tmp_path / "many.jsonl", 5000)
    peak(few)  # what is loaded with the first use does not count
    assert peak(many) < peak(few) + 0.2 * (many.stat().st_size - few.stat().st_size)


def test_a_source_is_read_as_its_rows_are_asked_for(tmp_path):
    stream = DocumentStream(rows_file(tmp_path / "rows.jsonl", 10_000))
    rows = iter(stream)
    next(rows)
    assert 0 < stream.meter.done < stream.meter.total / 4
    list(rows)
    assert stream.meter.done == stream.meter.total == (tmp_path / "rows.jsonl").stat().st_size


def test_long_texts_are_given_out_early(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_READ_AHEAD_CHARACTERS", 1000)
    path = write_jsonl(tmp_path / "rows.jsonl", *({**GOOD, "id": i, "text": "x" * 100_000} for i in range(10)))
    stream = DocumentStream(path)
    next(iter(stream))
    assert stream.meter.done < stream.meter.total / 2


def test_a_stream_can_be_read_again(tmp_path):
    stream = DocumentStream(write_jsonl(tmp_path / "rows.jsonl", GOOD, {**GOOD, "id": "b"}))
    assert list(stream) == list(stream)


def test_a_stream_knows_which_ids_went_by(tmp_path):
    stream = DocumentStream(write_jsonl(tmp_path / "rows.jsonl", GOOD, {"id": "bad"}))
    list(stream)
    assert stream.holds(["a", "bad", "never"]).tolist() == [True, False, False]


@given(st.lists(st.lists(st.integers(0, 40), max_size=8), max_size=12))
def test_a_set_of_hashes_is_a_dictionary_of_first_numbers(batches):
    seen, expected, number = _Seen(), {}, itertools.count()
    for batch in batches:
        numbers = [next(number) for _ in batch]
        first = []
        for key, place in zip(batch, numbers, strict=True):
            first.append(expected.get(key, -1))
            expected.setdefault(key, place)
        assert seen.add(np.array(batch, dtype=np.uint64), np.array(numbers, dtype=np.int64)).tolist() == first
    keys = np.arange(45, dtype=np.uint64)
    assert seen.places(keys).tolist() == [expected.get(key, -1) for key in range(45)]
