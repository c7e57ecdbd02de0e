"""Folders of Markdown, HTML and text files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from gemma_rag.documents import Document
from gemma_rag.errors import BadRows
from gemma_rag.loading import Loaded, load_documents

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


# Folders


def test_a_file_of_a_folder_becomes_a_document(tmp_path: Path) -> None:
    write(tmp_path / "IT" / "Accounts" / "reset-password.md", "# Reset a password\n\nOpen the portal.\n")
    assert only(load_documents(tmp_path)) == Document(
        id="IT/Accounts/reset-password",
        text="# Reset a password\n\nOpen the portal.",
        title="Reset a password",
        category="IT/Accounts",
        metadata={"source": "IT/Accounts/reset-password.md"},
    )


def test_a_folder_is_read_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/x.txt", "a/z.md", "a/b/c.html", "a/B.txt", "c.markdown", "a.htm"):
        write(tmp_path / name, "x")
    found = [document.id for document in load_documents(tmp_path, category="top").documents]
    assert found == ["a/B", "a/b/c", "a/z", "a", "b/x", "c"]


def test_suffixes_are_known_in_any_case(tmp_path: Path) -> None:
    write(tmp_path / "IT" / "A.MD", "x")
    assert only(load_documents(tmp_path)).id == "IT/A"


@pytest.mark.parametrize("name", [".hidden.md", ".git/a.md", "a.pdf", "a.jsonl", "a"])
def test_other_and_hidden_files_are_ignored(tmp_path: Path, name: str) -> None:
    write(tmp_path / "IT" / "kept.md", "x")
    write(tmp_path / "IT" / name, "x")
    assert only(load_documents(tmp_path)).id == "IT/kept"


def test_a_link_out_of_the_folder_is_ignored(tmp_path: Path) -> None:
    write(tmp_path / "in" / "IT" / "kept.md", "x")
    (tmp_path / "in" / "IT" / "secret.md").symlink_to(write(tmp_path / "out" / "secret.md", "x"))
    (tmp_path / "in" / "IT" / "out").symlink_to(tmp_path / "out")
    assert only(load_documents(tmp_path / "in")).id == "IT/kept"


def test_a_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    target = write(tmp_path / "IT" / ".data" / "real.md", "x")
    (tmp_path / "IT" / "link.md").symlink_to(target)
    assert only(load_documents(tmp_path)).id == "IT/link"


def test_a_link_back_up_is_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "IT" / "kept.md", "x")
    (tmp_path / "IT" / "up").symlink_to(tmp_path)
    assert only(load_documents(tmp_path)).id == "IT/kept"


def test_a_link_to_nothing_is_ignored(tmp_path: Path) -> None:
    write(tmp_path / "IT" / "kept.md", "x")
    (tmp_path / "IT" / "gone.md").symlink_to(tmp_path / "nowhere.md")
    assert only(load_documents(tmp_path)).id == "IT/kept"


def test_a_file_at_the_top_has_no_category(tmp_path: Path) -> None:
    write(tmp_path / "a.md", "x")
    assert problems(tmp_path) == [(0, "no category")]


def test_a_file_at_the_top_gets_the_category_argument(tmp_path: Path) -> None:
    write(tmp_path / "a.md", "x")
    assert only(load_documents(tmp_path, category="misc")).category == "misc"


def test_files_that_differ_in_the_suffix_alone_keep_it_in_their_ids(tmp_path: Path) -> None:
    for name in ("a.md", "a.html", "b.md"):
        write(tmp_path / "IT" / name, "x")
    assert [document.id for document in load_documents(tmp_path).documents] == ["IT/a.html", "IT/a.md", "IT/b"]


def test_an_id_without_suffix_is_never_the_path_of_another_file(tmp_path: Path) -> None:
    for name in ("a.md", "a.txt", "a.md.txt"):
        write(tmp_path / "IT" / name, "x")
    assert [document.id for document in load_documents(tmp_path).documents] == ["IT/a.md", "IT/a.md.txt", "IT/a.txt"]


def test_an_empty_file_is_a_bad_row(tmp_path: Path) -> None:
    write(tmp_path / "IT" / "a.md", " \n")
    assert problems(tmp_path) == [(0, "no text")]


def test_a_file_that_cannot_be_decoded_is_one_bad_row_at_its_first_bad_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "IT" / "a.md", b"one\r\ntwo\n" + "三\n四\n".encode("gbk"))
    with pytest.raises(BadRows) as caught:
        load_documents(tmp_path)
    assert [(row.source, row.line) for row in caught.value.rows] == [(str(path), 3)]


def test_a_folder_in_gbk_is_read(tmp_path: Path) -> None:
    write(tmp_path / "账号" / "a.md", "# 重置密码\n\n请打开门户。".encode("gbk"))
    document = only(load_documents(tmp_path, encoding="gbk"))
    assert (document.title, document.category) == ("重置密码", "账号")


def test_line_ends_of_files_become_newlines(tmp_path: Path) -> None:
    write(tmp_path / "IT" / "a.md", b"\xef\xbb\xbf# One\r\n\r\ntwo\r\n")
    assert only(load_documents(tmp_path)).text == "# One\n\ntwo"


def test_bad_files_are_skipped_and_returned(tmp_path: Path) -> None:
    write(tmp_path / "IT" / "a.md", "")
    write(tmp_path / "IT" / "b.md", "x")
    loaded = load_documents(tmp_path, skip_bad=True)
    assert (len(loaded.documents), len(loaded.bad_rows)) == (1, 1)


@pytest.mark.parametrize(
    ("name", "text", "title"),
    [
        pytest.param("a.md", "intro\n\n## VPN *setup*\n\n# Other", "VPN setup", id="Markdown heading"),
        pytest.param("a.md", "VPN\n===\n\nx", "VPN", id="underlined heading"),
        pytest.param("a.md", "```\n# no\n```\n\n# Yes\n", "Yes", id="not in a code fence"),
        pytest.param("a.md", "#\n\n# VPN\n", "VPN", id="not an empty heading"),
        pytest.param("vpn-set_up  now.md", "no heading", "vpn set up now", id="name of a Markdown file"),
        pytest.param("a.txt", "\nReset a password\n\nOpen the portal.", "Reset a password", id="first line of a text"),
        pytest.param("the-file.txt", "Reset a password\nOpen the portal.", "the file", id="no blank line after the first"),
        pytest.param("the-file.txt", "Reset a password", "the file", id="one line"),
        pytest.param("the-file.txt", "x" * 81 + "\n\ny", "the file", id="long first line"),
        pytest.param("a.txt", "# no Markdown\nx", "a", id="no heading in a text"),
    ],
)
def test_titles_of_files(tmp_path: Path, name: str, text: str, title: str) -> None:
    write(tmp_path / "IT" / name, text)
    assert only(load_documents(tmp_path)).title == title


# HTML

PAGE = """<!doctype html><html><head><title>The page &amp; more</title><style>p {color: red}</style>
<script>alert(1)</script></head><body><nav><h1>Menu</h1><script>x</script></nav><h1>Reset a
<b>password</b></h1><p>Open the <a href="https://example.com">portal</a>, set <code>max_len</code> to a*b.</p>
<script>alert(2)</script><h2>Then</h2><ul><li>log in</li><li>check some_name</li></ul>
<img alt="dot" src="data:image/png;base64,AAAA"></body></html>"""


def html(tmp_path: Path, page: str) -> Document:
    write(tmp_path / "IT" / "page.html", page)
    return only(load_documents(tmp_path))


def test_html_becomes_markdown(tmp_path: Path) -> None:
    assert html(tmp_path, PAGE).text == (
        "# Reset a **password**\n\nOpen the [portal](https://example.com), set `max_len` to a*b.\n\n"
        "## Then\n\n* log in\n* check some_name"
    )


def test_html_is_titled_by_its_first_h1_outside_the_navigation(tmp_path: Path) -> None:
    assert html(tmp_path, PAGE).title == "Reset a password"


def test_html_without_h1_is_titled_by_its_title(tmp_path: Path) -> None:
    assert html(tmp_path, "<head><title>The page &amp;\nmore</title></head><h2>x</h2>").title == "The page & more"


def test_html_without_either_is_titled_by_its_file(tmp_path: Path) -> None:
    assert html(tmp_path, "<p>x</p>").title == "page"


def test_html_without_the_end_of_its_head_keeps_its_body(tmp_path: Path) -> None:
    assert html(tmp_path, "<html><head><title>T</title><body><p>text</p></body></html>").text == "text"


def test_html_nested_too_deeply_is_a_bad_row(tmp_path: Path) -> None:
    write(tmp_path / "IT" / "page.html", "<div>" * 20_000 + "x")
    assert problems(tmp_path) == [(0, "nested too deeply to be read")]


def test_html_that_looks_like_a_file_name_warns_nobody(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert html(tmp_path, "page.html").text == "page.html"


# Front matter


def markdown(tmp_path: Path, text: str) -> Document:
    write(tmp_path / "IT" / "page.md", text)
    return only(load_documents(tmp_path))


@pytest.mark.parametrize("end", ["---", "..."])
def test_front_matter_is_no_part_of_the_text(tmp_path: Path, end: str) -> None:
    assert markdown(tmp_path, f"---\n# note\ntitle: VPN\ntags:\n  - a\n\nx: 1\n{end}\n\n# Head\n").text == "# Head"


def test_empty_front_matter_is_no_part_of_the_text(tmp_path: Path) -> None:
    assert markdown(tmp_path, "---\n---\nx").text == "x"


@pytest.mark.parametrize(
    ("line", "title"),
    [
        ("title: Set up VPN", "Set up VPN"),
        ("title:   重置密码  ", "重置密码"),
        ('title: "A: b # c"', "A: b # c"),
        ("title: 'It''s \"here\"'", 'It\'s "here"'),
        ("title: C# guide # for all", "C# guide"),
        pytest.param("title:", "Head", id="empty"),
        pytest.param('title: ""', "Head", id="empty string"),
        pytest.param("title: |\n  folded", "Head", id="block"),
        pytest.param("title: [a, b]", "Head", id="list"),
        pytest.param('title: "a \\" b"', "Head", id="escape"),
        pytest.param("nested:\n  title: x", "Head", id="nested"),
        pytest.param("subtitle: x", "Head", id="other key"),
    ],
)
def test_simple_titles_of_front_matter_come_before_headings(tmp_path: Path, line: str, title: str) -> None:
    assert markdown(tmp_path, f"---\nother: 1\n{line}\n---\n# Head\n\nx").title == title


def test_the_category_of_front_matter_comes_before_the_folder(tmp_path: Path) -> None:
    assert markdown(tmp_path, "---\ncategory: HR/Leave\n---\nx").category == "HR/Leave"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("---\n# Head\n---\nx", id="a heading between rules"),
        pytest.param("---\n\nNote: prose\n\n---\nx", id="prose between rules"),
        pytest.param("---\ntitle: x\n\nno end", id="no end"),
        pytest.param("x\n\n---\ntitle: x\n---", id="not at the top"),
        pytest.param("---\nhttps://example.com\n---\nx", id="a URL between rules"),
    ],
)
def test_what_is_no_front_matter_stays(tmp_path: Path, text: str) -> None:
    assert markdown(tmp_path, text).text == text
