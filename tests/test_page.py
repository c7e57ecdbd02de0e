"""The parts of a page: what is text stays text, what is empty is left out."""

import re

import pytest

from gemma_rag.errors import InputError
from gemma_rag.page import Html, fact_list, section, table, tag, write_page

ATTACK = """<script>"&'</script>"""
ESCAPED = "&lt;script&gt;&quot;&amp;&#x27;&lt;/script&gt;"


def cells(made):
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr.*?</tr>", made)]


def test_text_is_escaped_and_markup_is_not():
    assert tag("p", ATTACK, tag("b", "&")) == f"<p>{ESCAPED}<b>&amp;</b></p>"


def test_an_attribute_is_escaped_too():
    assert tag("p", class_=ATTACK) == f'<p class="{ESCAPED}"></p>'


def test_attributes_drop_their_last_underscore_and_have_hyphens_for_the_others():
    assert tag("td", class_="number", data_label="Score") == '<td class="number" data-label="Score"></td>'


def test_none_is_left_out_and_0_is_not():
    assert tag("p", None, 0, "") == "<p>0</p>"


def test_a_section_of_nothing_is_nothing():
    assert section("Plots", Html(), Html()) == ""


def test_the_heading_of_a_section_is_escaped():
    assert section(ATTACK, tag("p", "x")) == f"<section><h2>{ESCAPED}</h2><p>x</p></section>"


def test_a_column_without_any_value_is_left_out():
    made = table(("Name", "Questions", "Lost"), [("Rhine", None, 0), ("Main", "", 1)])
    assert cells(made) == [["Name", "Lost"], ["Rhine", "0"], ["Main", "1"]]


@pytest.mark.parametrize("rows", [[], [(None, "")], [("", None), (None, None)]])
def test_a_table_without_any_value_is_nothing(rows):
    assert table(("Name", "Lost"), rows) == ""


def test_the_first_columns_of_a_table_hold_words_and_the_others_numbers():
    made = table(("Name", "What", "Lost"), [("Rhine", "river", 1)], texts=2)
    assert re.findall(r'<td class="(\w+)"', made) == ["words", "words", "number"]


def test_only_the_best_row_is_marked():
    made = table(("Name",), [("Rhine",), ("Main",), ("Elbe",)], best=1)
    assert re.findall(r"<tr[^>]*>(?=<td)", made) == ["<tr>", '<tr class="best">', "<tr>"]


def test_facts_without_a_value_are_left_out():
    made = fact_list([("Model", "MiniLM"), ("Mode", None), ("Router", ""), ("Seconds", 0)])
    assert re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", made) == [("Model", "MiniLM"), ("Seconds", "0")]


def test_no_facts_are_nothing():
    assert fact_list([("Mode", None)]) == ""


def test_the_title_of_a_page_is_escaped_where_it_stands_twice(tmp_path):
    write_page(tmp_path / "page.html", ATTACK, [])
    assert (tmp_path / "page.html").read_text("utf-8").count(ESCAPED) == 2


def test_half_a_surrogate_pair_does_not_stop_a_page(tmp_path):
    write_page(tmp_path / "new" / "page.html", "Law", [tag("p", "law \ud800")])
    assert "<p>law ?</p>" in (tmp_path / "new" / "page.html").read_text("utf-8")


def test_a_folder_is_no_file_for_a_page(tmp_path):
    with pytest.raises(InputError, match=r"is a folder, and the page needs a file: write to .*report.html"):
        write_page(tmp_path, "Law", [])
    assert list(tmp_path.iterdir()) == []
