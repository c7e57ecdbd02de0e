from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_rag.cleaning import Cleaning
from gemma_rag.documents import Document
from gemma_rag.errors import BadRows, InputError
from gemma_rag.loading import Loaded, load_documents, validate_documents

GOOD = {"id": "a", "text": "Open the portal.", "title": "VPN", "category": "IT"}


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_jsonl(path: Path, *rows: object) -> Path:
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def problems(source: Path, **options: Any) -> list[tuple[int, str]]:
    with pytest.raises(BadRows) as caught:
        load_documents(source, **options)
    return [(row.line, row.problem) for row in caught.value.rows]


def only(loaded: Loaded) -> Document:
    (document,) = loaded.documents
    return document


# JSON Lines


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".JSONL"])
def test_a_json_lines_file_gives_its_documents(tmp_path: Path, suffix: str) -> None:
    loaded = load_documents(write_jsonl(tmp_path / f"rows{suffix}", GOOD))
    assert loaded == Loaded((Document(**GOOD),), ())


def test_the_source_may_be_a_string(tmp_path: Path) -> None:
    assert only(load_documents(str(write_jsonl(tmp_path / "rows.jsonl", GOOD)))).id == "a"


def test_documents_keep_the_order_of_the_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", *({**GOOD, "id": name} for name in "cab"))
    assert [document.id for document in load_documents(path).documents] == ["c", "a", "b"]


def test_ten_thousand_rows_are_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", *({**GOOD, "id": i} for i in range(10_000)))
    assert [document.id for document in load_documents(path).documents] == [str(i) for i in range(10_000)]


def test_blank_lines_are_ignored(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "\n  \n" + json.dumps(GOOD) + "\r\n\n")
    assert len(load_documents(path).documents) == 1


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert only(load_documents(path)).id == "a"


def test_chinese_is_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", {"id": "一", "text": "重置密码", "title": "密码", "category": "账号"})
    assert only(load_documents(path)) == Document(id="一", text="重置密码", title="密码", category="账号")


def test_another_encoding_is_read_where_it_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", json.dumps({**GOOD, "text": "重置密码"}, ensure_ascii=False).encode("gbk"))
    assert only(load_documents(path, encoding="gbk")).text == "重置密码"


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", {**GOOD, "text": "one\u2028two\x85three"})
    assert only(load_documents(path)).text == "one\u2028two\x85three"


def test_a_whole_number_may_be_an_id(tmp_path: Path) -> None:
    assert only(load_documents(write_jsonl(tmp_path / "rows.jsonl", {**GOOD, "id": 7}))).id == "7"


def test_ids_are_made_of_file_and_line_where_no_row_has_one(tmp_path: Path) -> None:
    row = {"text": "x", "category": "IT"}
    loaded = load_documents(write_jsonl(tmp_path / "rows.jsonl", row, {**row, "id": None}, row))
    assert [document.id for document in loaded.documents] == ["rows-1", "rows-2", "rows-3"]


def test_other_keys_become_metadata(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", {**GOOD, "owner": "desk", "year": 2024})
    assert only(load_documents(path)).metadata == {"owner": "desk", "year": 2024}


def test_an_object_under_metadata_is_merged(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", {**GOOD, "owner": "desk", "metadata": {"year": 2024}})
    assert only(load_documents(path)).metadata == {"owner": "desk", "year": 2024}


def test_a_metadata_key_that_holds_no_object_is_metadata_itself(tmp_path: Path) -> None:
    assert only(load_documents(write_jsonl(tmp_path / "rows.jsonl", {**GOOD, "metadata": 3}))).metadata == {"metadata": 3}


def test_null_metadata_is_none(tmp_path: Path) -> None:
    assert only(load_documents(write_jsonl(tmp_path / "rows.jsonl", {**GOOD, "metadata": None}))).metadata == {}


def test_columns_name_the_keys(tmp_path: Path) -> None:
    row = {"sku": 1, "body": "x", "headline": "VPN", "team": "IT", "text": "kept"}
    columns = {"id": "sku", "text": "body", "title": "headline", "category": "team"}
    document = only(load_documents(write_jsonl(tmp_path / "rows.jsonl", row), columns=columns))
    assert document == Document(id="1", text="x", title="VPN", category="IT", metadata={"text": "kept"})


def test_the_category_argument_fills_in_only_where_there_is_none(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", GOOD, {"id": "b", "text": "x", "category": " "}, {"id": "c", "text": "x"})
    assert [document.category for document in load_documents(path, category="misc").documents] == ["IT", "misc", "misc"]


def test_texts_and_titles_are_cleaned(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", {**GOOD, "text": "a，b", "title": "Ｖ", "category": "，"})
    document = only(load_documents(path, cleaning=Cleaning(punctuation=True)))
    assert (document.text, document.title, document.category) == ("a,b", "V", "，")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        pytest.param({"id": "a", "category": "IT"}, "no text", id="no text"),
        pytest.param({**GOOD, "text": None}, "no text", id="null text"),
        pytest.param({**GOOD, "text": " \n"}, "no text", id="blank text"),
        pytest.param({**GOOD, "text": 5}, "text must be a string, not int", id="text a number"),
        pytest.param({**GOOD, "text": ["x"]}, "text must be a string, not list", id="text a list"),
        pytest.param({**GOOD, "title": 5}, "title must be a string, not int", id="title a number"),
        pytest.param({**GOOD, "id": True}, "id must be a string, not bool", id="id a truth value"),
        pytest.param({**GOOD, "id": 1.5}, "id must be a string, not float", id="id a fraction"),
        pytest.param({"id": "a", "text": "x"}, "no category", id="no category"),
        pytest.param({"id": "a"}, "no text, no category", id="no text and no category"),
        pytest.param([1, 2], "expected a JSON object, got [1, 2]", id="a list"),
        pytest.param("x", 'expected a JSON object, got "x"', id="a string"),
        pytest.param(
            {**GOOD, "k": 1, "metadata": {"k": 2}}, "'k' in the row and in its metadata too: name it once", id="twice"
        ),
    ],
)
def test_a_bad_row_says_what_is_wrong(tmp_path: Path, row: object, problem: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", {**GOOD, "id": "first"}, row)
    assert problems(path) == [(2, problem)]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        pytest.param('{"id": ', "not valid JSON: Expecting value at column 8", id="cut off"),
        pytest.param("[" * 100_000, "not usable JSON: maximum recursion depth exceeded", id="deep nesting"),
        pytest.param('{"id": ' + "9" * 5_000 + "}", "not usable JSON: Exceeds the limit", id="a number without end"),
        pytest.param('{"id": "a", "text": "\\ud800", "category": "c"}', "text: half of a character", id="half a character"),
        pytest.param('{"id": "a", "text": "x", "category": "c", "k": NaN}', "metadata: the metadata must be plain", id="NaN"),
    ],
)
def test_a_line_that_is_no_usable_json_is_a_bad_row(tmp_path: Path, line: str, problem: str) -> None:
    ((number, message),) = problems(write(tmp_path / "rows.jsonl", line))
    assert (number, message[: len(problem)]) == (1, problem)


def test_undecodable_bytes_are_reported_by_their_line(tmp_path: Path) -> None:
    lines = [json.dumps({**GOOD, "id": str(i), "text": "密码"}, ensure_ascii=False) for i in range(3)]
    path = write(tmp_path / "rows.jsonl", b"\n".join([lines[0].encode(), lines[1].encode("gbk"), lines[2].encode()]))
    assert problems(path) == [(2, "bytes that are not utf-8: give the encoding of the source, for example encoding='gbk'")]


def test_bytes_that_the_named_encoding_does_not_know_are_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", json.dumps(GOOD).encode("utf-16") + b"\x00")
    assert problems(path, encoding="utf-16")[0][1].startswith("bytes that are not utf-16")


def test_a_missing_id_is_a_bad_row_where_another_row_has_one(tmp_path: Path) -> None:
    assert problems(write_jsonl(tmp_path / "rows.jsonl", GOOD, {"text": "x", "category": "IT"})) == [(2, "no id")]


def test_a_duplicate_id_names_the_first_line_that_had_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", {**GOOD, "id": "b"}, GOOD, {**GOOD, "id": " a "})
    assert problems(path) == [(3, f"the id 'a' is taken already by {path}:2")]


def test_a_missing_mapped_key_is_named_in_the_problem(tmp_path: Path) -> None:
    rows = [{"id": "a", "body": "x", "category": "IT"}, {"id": "b", "category": "IT"}]
    assert problems(write_jsonl(tmp_path / "rows.jsonl", *rows), columns={"text": "body"}) == [(2, "no text ('body')")]


def test_all_bad_rows_are_reported_at_once(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", 1, GOOD, 2, {**GOOD, "id": "c"}, 3)
    assert [line for line, _ in problems(path)] == [1, 3, 5]


def test_bad_rows_name_the_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", 1)
    with pytest.raises(BadRows) as caught:
        load_documents(path)
    assert caught.value.rows[0].source == str(path)


def test_skipped_rows_are_returned(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", 1, GOOD, 2, GOOD, {**GOOD, "id": "c"})
    loaded = load_documents(path, skip_bad=True)
    assert ([d.id for d in loaded.documents], [row.line for row in loaded.bad_rows]) == (["a", "c"], [1, 3, 4])


def test_skipping_every_row_leaves_no_document(tmp_path: Path) -> None:
    loaded = load_documents(write_jsonl(tmp_path / "rows.jsonl", 1, 2), skip_bad=True)
    assert (len(loaded.documents), len(loaded.bad_rows)) == (0, 2)


def test_a_mapped_key_that_no_row_has_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no 'headline' for the title\. It has 'id', 'text', 'title', 'category'"):
        load_documents(write_jsonl(tmp_path / "rows.jsonl", GOOD), columns={"title": "headline"})


# CSV


def test_a_csv_file_gives_its_documents(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "id,text,title,category,owner\na,Open the portal.,VPN,IT,desk\n")
    assert only(load_documents(path)) == Document(**GOOD, metadata={"owner": "desk"})


def test_a_tsv_file_is_split_at_tabs(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.tsv", "id\ttext\tcategory\na\tone, two\tIT\n")
    assert only(load_documents(path)).text == "one, two"


def test_a_quoted_field_may_hold_several_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", 'id,text,category\r\na,"one\r\n\r\ntwo ""three""",IT\r\n')
    assert only(load_documents(path)).text == 'one\r\n\r\ntwo "three"'


def test_a_csv_row_is_reported_by_the_line_that_it_begins_on(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", 'id,text,category\na,"one\ntwo",IT\n\nb,"three\nfour",\n')
    assert problems(path) == [(5, "no category")]


@pytest.mark.parametrize(("row", "count"), [("b,x", 2), ("b,x,IT,more", 4)], ids=["too few", "too many"])
def test_a_csv_row_of_another_length_is_a_bad_row(tmp_path: Path, row: str, count: int) -> None:
    path = write(tmp_path / "rows.csv", f"id,text,category\na,x,IT\n{row}\n")
    assert problems(path) == [(3, f"{count} fields, but the header has 3")]


def test_a_quotation_mark_that_nothing_closes_swallows_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", 'id,category,text\na,IT,x\nb,IT,"y\nc,IT,z\n')
    assert problems(path) == [(3, "not valid CSV: unexpected end of data")]


def test_rows_after_a_malformed_one_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", 'id,text,category\na,"x"y,IT\nb,z,IT\n')
    loaded = load_documents(path, skip_bad=True)
    assert ([row.line for row in loaded.bad_rows], [d.id for d in loaded.documents]) == ([2], ["b"])


def test_undecodable_bytes_in_a_csv_row_are_reported_by_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "id,text,category\na,x,IT\nb,密码,IT\n".encode("gbk"))
    assert [line for line, _ in problems(path)] == [3]


def test_a_csv_file_in_gbk_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "id,text,category\na,重置密码,账号\n".encode("gbk"))
    assert only(load_documents(path, encoding="gbk")) == Document(id="a", text="重置密码", category="账号")


def test_a_csv_file_with_a_byte_order_mark_has_its_first_column(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", b"\xef\xbb\xbfid,text,category\na,x,IT\n")
    assert only(load_documents(path)).id == "a"


def test_a_very_large_field_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "id,text,category\na," + "x" * 300_000 + ",IT\n")
    assert len(only(load_documents(path)).text) == 300_000


def test_rows_of_empty_cells_are_ignored(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "id,text,category\na,x,IT\n,,\n\n")
    assert len(load_documents(path).documents) == 1


def test_a_column_without_a_name_is_ignored(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "id,text,category,,\na,x,IT,y,\n")
    assert only(load_documents(path)).metadata == {}


def test_csv_ids_are_made_of_file_and_line_where_there_is_no_id_column(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", 'text,category\n"x\ny",IT\nz,IT\n')
    assert [document.id for document in load_documents(path).documents] == ["rows-2", "rows-4"]


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_csv_file_without_a_mapped_column_is_refused_with_those_it_has(tmp_path: Path, skip_bad: bool) -> None:
    path = write(tmp_path / "rows.csv", "id,content,category\na,x,IT\n")
    with pytest.raises(InputError, match=r"no 'body' for the text\. It has 'id', 'content', 'category'"):
        load_documents(path, columns={"text": "body"}, skip_bad=skip_bad)


def test_a_csv_file_without_categories_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no 'category' for the category.* category= names one for all rows"):
        load_documents(write(tmp_path / "rows.csv", "id,text\na,x\n"))


def test_a_csv_file_without_categories_is_read_where_one_is_given(tmp_path: Path) -> None:
    assert only(load_documents(write(tmp_path / "rows.csv", "id,text\na,x\n"), category="IT")).category == "IT"


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'text' more than once"):
        load_documents(write(tmp_path / "rows.csv", "id,text,text\na,x,y\n"))


def test_an_undecodable_header_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"header of .* has bytes that are not utf-8"):
        load_documents(write(tmp_path / "rows.csv", "编号,text\na,x\n".encode("gbk")))


# What is refused


def test_a_source_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no file or folder .*gone\.jsonl"):
        load_documents(tmp_path / "gone.jsonl")


def test_an_empty_path_is_not_the_working_folder() -> None:
    with pytest.raises(InputError, match="there is no file or folder ''"):
        load_documents("")


def test_a_text_given_as_a_path_is_refused() -> None:
    with pytest.raises(InputError, match=r"cannot read|there is no file"):
        load_documents("Open the portal. " * 1_000)


@pytest.mark.parametrize("name", ["rows.json", "rows.xlsx", "page.md"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"expected a \.jsonl, \.ndjson, \.csv, \.tsv file, or a folder"):
        load_documents(write(tmp_path / name, "x"))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no document in .*: expected files that end in \.md"):
        load_documents(tmp_path)


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", "\n\n"), ("a.csv", ""), ("a.csv", "id,text,category\n")])
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(InputError, match=r"there is no document in .*: expected at least one row"):
        load_documents(write(tmp_path / name, text))


def test_an_unknown_field_in_columns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="columns has 'body', but the fields to map are id, text, title, category"):
        load_documents(write_jsonl(tmp_path / "rows.jsonl", GOOD), columns={"body": "text"})


def test_columns_for_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="columns is for files of rows"):
        load_documents(tmp_path, columns={"text": "body"})


def test_an_empty_category_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="category is empty"):
        load_documents(write_jsonl(tmp_path / "rows.jsonl", GOOD), category=" ")


@pytest.mark.parametrize("encoding", ["klingon", "base64"])
def test_an_unknown_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(InputError, match=f"there is no encoding '{encoding}': try utf-8"):
        load_documents(write_jsonl(tmp_path / "rows.jsonl", GOOD), encoding=encoding)


# In memory


def test_documents_in_memory_pass_unchanged() -> None:
    documents = [Document(**GOOD), Document(**{**GOOD, "id": "b"})]
    assert validate_documents(documents) == Loaded(tuple(documents), ())


def test_mappings_in_memory_are_read_like_rows() -> None:
    assert only(validate_documents([{**GOOD, "id": 1, "owner": "desk"}])) == Document(
        **{**GOOD, "id": "1"}, metadata={"owner": "desk"}
    )


def test_no_documents_in_memory_are_none() -> None:
    assert validate_documents([]) == Loaded((), ())


def test_bad_documents_in_memory_are_reported_by_their_place() -> None:
    with pytest.raises(BadRows) as caught:
        validate_documents([Document(**GOOD), {"text": "x", "category": "IT"}, 5, Document(**GOOD)])
    assert [str(row) for row in caught.value.rows] == [
        "documents:2: no id",
        "documents:3: expected a Document or a mapping, got int",
        "documents:4: the id 'a' is taken already by documents:1",
    ]


def test_bad_documents_in_memory_are_skipped_and_returned() -> None:
    loaded = validate_documents([Document(**GOOD), Document(**GOOD)], skip_bad=True)
    assert (len(loaded.documents), len(loaded.bad_rows)) == (1, 1)


def test_metadata_nested_without_end_is_a_bad_document() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(BadRows, match="metadata"):
        validate_documents([{**GOOD, "k": endless}])


def test_a_metadata_key_that_is_no_string_is_a_bad_document() -> None:
    with pytest.raises(BadRows, match="metadata"):
        validate_documents([{**GOOD, "metadata": {1: 2}}])


@pytest.mark.parametrize("one", [Document(**GOOD), GOOD, "text"], ids=["Document", "mapping", "string"])
def test_one_document_instead_of_several_is_refused(one: Any) -> None:
    with pytest.raises(InputError, match="put it in a list"):
        validate_documents(one)


# Properties

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
ROWS = st.fixed_dictionaries({}, optional=dict.fromkeys(("id", "text", "title", "category", "metadata", "k"), JSON))


@given(rows=st.lists(ROWS | JSON, min_size=1, max_size=6))
@settings(deadline=None, max_examples=200)
def test_every_row_is_a_document_or_a_bad_row(tmp_path_factory: pytest.TempPathFactory, rows: list[object]) -> None:
    path = write(tmp_path_factory.mktemp("rows") / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_documents(path, skip_bad=True)
    assert len(loaded.documents) + len(loaded.bad_rows) == len(rows)


@given(data=st.binary(min_size=1, max_size=200), name=st.sampled_from(["a.jsonl", "a.csv", "IT/a.md", "IT/a.html", "IT/a.txt"]))
@settings(deadline=None, max_examples=300)
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str) -> None:
    folder = tmp_path_factory.mktemp("any")
    path = write(folder / name, b"id,text,category\n" + data if name == "a.csv" else data)
    with contextlib.suppress(InputError):
        load_documents(folder if "/" in name else path, category="misc", skip_bad=True)
