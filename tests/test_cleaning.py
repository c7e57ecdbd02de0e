from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_rag.cleaning import Cleaning

SPACES = Cleaning(collapse_whitespace=True)
PUNCTUATION = Cleaning(punctuation=True)
URLS = Cleaning(mask_urls=True)
EMAILS = Cleaning(mask_emails=True)

URL_PIECES = ["http://", "https://", "www.", "a.com", "a@b.cc", "@", ".", ",", ")", "-", "_", "[URL]", "[EMAIL]"]
OTHER_PIECES = ["，", "：／／", "＠", "。", "你好", "x", "1", " ", "\u3000", "\u00a0", "\t", "\n", "\r\n", "\r", "# ", "Ａ"]
PIECES = st.sampled_from(URL_PIECES + OTHER_PIECES)
TEXTS = st.lists(PIECES | st.text(max_size=5), max_size=20).map("".join)
CLEANINGS = st.builds(Cleaning, st.booleans(), st.booleans(), st.booleans(), st.booleans())


@given(TEXTS, CLEANINGS)
@settings(deadline=None, max_examples=500)
def test_cleaning_twice_is_cleaning_once(text: str, cleaning: Cleaning) -> None:
    once = cleaning.apply(text)
    assert cleaning.apply(once) == once


@given(TEXTS)
@settings(deadline=None)
def test_everything_is_off_by_default(text: str) -> None:
    assert Cleaning().apply(text) == text


@given(TEXTS)
@settings(deadline=None)
def test_collapsing_keeps_every_character_that_is_not_white_space(text: str) -> None:
    assert "".join(SPACES.apply(text).split()) == "".join(text.split())


def test_runs_of_any_space_become_one_space() -> None:
    assert SPACES.apply("a \t\u00a0\u3000 b") == "a b"


def test_paragraph_breaks_survive_collapsing() -> None:
    assert SPACES.apply("one\n\ntwo") == "one\n\ntwo"


def test_more_than_two_newlines_become_two() -> None:
    assert SPACES.apply("one\n \n\t\n\r\n\ntwo") == "one\n\ntwo"


def test_line_ends_lose_their_spaces() -> None:
    assert SPACES.apply("one  \ntwo\u3000") == "one\ntwo"


def test_windows_newlines_become_newlines() -> None:
    assert SPACES.apply("one\r\ntwo\rthree") == "one\ntwo\nthree"


def test_headings_stay_on_their_own_line() -> None:
    assert SPACES.apply("intro\n#  Title \ntext\n## Next\n") == "intro\n# Title\ntext\n## Next\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("，！？：；（）", ",!?:;()", id="punctuation"),
        pytest.param("Ａｚ０９", "Az09", id="letters and digits"),
        pytest.param("！～", "!~", id="both ends of the block"),
        pytest.param("甲\u3000乙", "甲 乙", id="ideographic space"),
        pytest.param("。、「」《》", "。、「」《》", id="other CJK punctuation stays"),
        pytest.param("｡￥", "｡￥", id="outside the block stays"),
    ],
)
def test_full_width_forms(text: str, expected: str) -> None:
    assert PUNCTUATION.apply(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see https://example.com/a?b=c#d now", "see [URL] now"),
        ("HTTP://EXAMPLE.COM", "[URL]"),
        ("www.example.com", "[URL]"),
        ("请访问https://example.com/重置密码", "请访问[URL]重置密码"),
        ("请访问www.example.com。谢谢", "请访问[URL]。谢谢"),
        ("网址http://example.com，谢谢", "网址[URL]，谢谢"),
        ("(see http://example.com).", "(see [URL])."),
        ("[portal](https://example.com/x), then", "[portal]([URL]), then"),
        ("**http://example.com**", "**[URL]**"),
        ("http://user@example.com/", "[URL]"),
        ("http:// and www. alone", "http:// and www. alone"),
        ("wwww.example and awww.example", "wwww.example and awww.example"),
    ],
)
def test_urls_are_masked(text: str, expected: str) -> None:
    assert URLS.apply(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to first.last+tag@mail.example.com.", "write to [EMAIL]."),
        ("邮箱12345@example.com，谢谢", "邮箱[EMAIL]，谢谢"),
        ("not@localhost and @name", "not@localhost and @name"),
    ],
)
def test_email_addresses_are_masked(text: str, expected: str) -> None:
    assert EMAILS.apply(text) == expected


def test_full_width_url_is_masked_once_it_is_ascii() -> None:
    assert Cleaning(punctuation=True, mask_urls=True).apply("ｈｔｔｐ：／／ａ．ｃｏｍ 见") == "[URL] 见"


LONG_WORDS = {
    "letters": "a" * 300_000,
    "dots": "." * 300_000,
    "www": "www." * 75_000,
    "at": "a@" * 150_000,
    "labels": "a@" + "a." * 150_000,
}


@pytest.mark.parametrize("name", LONG_WORDS)
def test_a_long_word_costs_linear_time(name: str) -> None:
    # Quadratic time would be minutes here; the suite's own patience is the limit.
    assert Cleaning(True, True, True, True).apply(LONG_WORDS[name])
