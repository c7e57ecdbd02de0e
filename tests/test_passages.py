"""The sentences of a passage, which extractive answers quote and calibrated thresholds weigh."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_rag.passages import sentences


@pytest.mark.parametrize(
    ("passage", "expected"),
    [
        ("It is soft. It is sweet.", ["It is soft.", "It is sweet."]),
        ("Is it? It is! Good.", ["Is it?", "It is!", "Good."]),
        ("No full stop", ["No full stop"]),
        ("One line\nwrapped here. Two.", ["One line wrapped here.", "Two."]),
        ("One paragraph\n\nAnother one", ["One paragraph", "Another one"]),
        ("One line\r\nwrapped.", ["One line wrapped."]),
        ("", []),
        (" \n\t\n", []),
        ("...\n\n?!", []),
    ],
)
def test_sentences_of_plain_text(passage, expected) -> None:
    assert sentences(passage) == expected


@pytest.mark.parametrize(
    ("passage", "expected"),
    [
        ("Bring fruit, e.g. pears. Or plums.", ["Bring fruit, e.g. pears.", "Or plums."]),
        ("Use it, i.e. this one.", ["Use it, i.e. this one."]),
        ("It costs 3.5 euros. Or 4.", ["It costs 3.5 euros.", "Or 4."]),
        ("See v2.0.1 for it.", ["See v2.0.1 for it."]),
        ("Wait ... Then go.", ["Wait ... Then go."]),
        ("Mail it@example.com or see example.com. Done.", ["Mail it@example.com or see example.com.", "Done."]),
    ],
)
def test_a_full_stop_inside_a_sentence_does_not_end_it(passage, expected) -> None:
    assert sentences(passage) == expected


@pytest.mark.parametrize(
    ("passage", "expected"),
    [
        ('It says "Go." Then stop.', ['It says "Go."', "Then stop."]),
        ("It says “Go.” Then stop.", ["It says “Go.”", "Then stop."]),
        ("(See page 3.) Then stop.", ["(See page 3.)", "Then stop."]),
        ("It stops. “Go” comes next.", ["It stops.", "“Go” comes next."]),
    ],
)
def test_closing_marks_stay_with_their_sentence(passage, expected) -> None:
    assert sentences(passage) == expected


@pytest.mark.parametrize(
    ("passage", "expected"),
    [
        ("打开门户。点击重置。", ["打开门户。", "点击重置。"]),
        ("真的吗？是的！好；行。", ["真的吗？", "是的！", "好；", "行。"]),
        ("他说：“走。”然后离开。再见。", ["他说：“走。”然后离开。", "再见。"]),
        ("写明「不知道。」即可。完。", ["写明「不知道。」即可。", "完。"]),
        ("真的吗？！好。", ["真的吗？！", "好。"]),
        ("重置需要 3.5 分钟。完成。", ["重置需要 3.5 分钟。", "完成。"]),
        ("第一句。Second one. 第三句。", ["第一句。", "Second one.", "第三句。"]),
    ],
)
def test_sentences_of_chinese_text(passage, expected) -> None:
    assert sentences(passage) == expected


@pytest.mark.parametrize(
    ("passage", "expected"),
    [
        ("# Pears\n\nThey are soft.", ["They are soft."]),
        ("### Pears ###\nThey are soft.", ["They are soft."]),
        ("Pears\n=====\n\nThey are soft.", ["They are soft."]),
        ("Pears\n---\nThey are soft.", ["They are soft."]),
        ("They are soft.\n# Plums\nThey are sour.", ["They are soft.", "They are sour."]),
    ],
)
def test_headings_are_no_sentences(passage, expected) -> None:
    assert sentences(passage) == expected


def test_a_line_that_starts_with_a_ticket_number_is_no_heading() -> None:
    assert sentences("#42 is the ticket.") == ["#42 is the ticket."]


@pytest.mark.parametrize(
    ("passage", "expected"),
    [
        ("- soft\n- sweet", ["soft", "sweet"]),
        ("* soft\n* sweet. Very.", ["soft", "sweet.", "Very."]),
        ("+ soft\n  and ripe\n+ sweet", ["soft and ripe", "sweet"]),
        ("• soft", ["soft"]),
        ("1. Open it.\n2. Close it.", ["Open it.", "Close it."]),
        ("10) Open it.", ["Open it."]),
        ("1、打开门户\n2、点击重置", ["打开门户", "点击重置"]),
        ("Steps:\n- one\n- two", ["Steps:", "one", "two"]),
        ("3.5 euros\n-4 degrees", ["3.5 euros -4 degrees"]),  # no items
    ],
)
def test_list_items_are_taken_one_by_one(passage, expected) -> None:
    assert sentences(passage) == expected


def test_table_rows_are_taken_one_by_one_without_the_ruled_line() -> None:
    table = "| Fruit | Taste |\n|:---|---:|\n| Pear | sweet |\n| --- | --- |\n| Plum | sour |"
    assert sentences(table) == ["| Fruit | Taste |", "| Pear | sweet |", "| Plum | sour |"]


@pytest.mark.parametrize(
    ("passage", "expected"),
    [
        ("It is **very** soft.", ["It is very soft."]),
        ("It is __very__ soft.", ["It is very soft."]),
        ("Run `open portal` first.", ["Run open portal first."]),
        ("**It is soft.** It is sweet.", ["It is soft.", "It is sweet."]),
        ("**It is soft. It is sweet.**", ["It is soft.", "It is sweet."]),
        ("Call `__init__` first.", ["Call __init__ first."]),  # in code, these are no marks
        ("Set MODEL__NAME to 2**3.", ["Set MODEL__NAME to 2**3."]),  # nor inside a word, nor alone
    ],
)
def test_marks_of_emphasis_and_code_are_left_out(passage, expected) -> None:
    assert sentences(passage) == expected


def test_the_marks_of_a_code_fence_are_left_out() -> None:
    assert sentences("Run this:\n```bash\nopen portal\n```\nThen wait.") == ["Run this:", "open portal", "Then wait."]


LINES = st.sampled_from(
    [
        "It is soft. It is",
        "e.g. pears.",
        "# Pears",
        "- one.",
        "1. Two",
        "| a | b |",
        "|---|---|",
        "```",
        "打开。「好。」",
        '"Go." So',
        "",
        "  ",
    ]
)


def words_only(text: str) -> str:
    """The text in one line, without Markdown's marks of emphasis and code."""
    return " ".join(re.sub(r"[*_`]", "", text).split())


@given(st.lists(st.one_of(LINES, st.text(max_size=20)), max_size=8).map("\n".join))
def test_every_sentence_stands_word_for_word_in_the_passage(passage) -> None:
    assert [sentence for sentence in sentences(passage) if words_only(sentence) not in words_only(passage)] == []
