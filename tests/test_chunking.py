from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_rag.chunking import Chunker, Heading, find_headings
from gemma_rag.documents import Chunk, Document
from gemma_rag.errors import InputError


def count_pieces(text: str) -> int:
    """A stand-in for a tokenizer: Chinese characters one by one, words in pieces of four letters, marks one by one."""
    return len(re.findall(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]{1,4}|[^\w\s]", text))


def count_bytes(text: str) -> int:
    return (len(text.encode("utf-8")) + 2) // 3


def count_unevenly(text: str) -> int:
    """Longer text may have fewer tokens, as happens at the seams of a real tokenizer's merges."""
    return len(text) // 2 + (3 if text.endswith(("o", "。")) else 0)


def overhead_of(count: Callable[[str], int]) -> Callable[[str], int]:
    return lambda title: 4 + count(title)


def cost(text: str) -> int:
    return 4 + count_pieces(text)


def document(text: str, title: str = "") -> Document:
    return Document(id="doc", text=text, title=title, category="IT")


def split(text: str, *, title: str = "", max_tokens: int = 16, overlap: int = 0) -> list[Chunk]:
    return Chunker(max_tokens, overlap).split(document(text, title), count_pieces, cost)


def texts(text: str, chunks: list[Chunk]) -> list[str]:
    return [text[chunk.start : chunk.end] for chunk in chunks]


WORDS = st.sampled_from(
    ["reset", "password", "portal", "o", "network。", "重置", "密码。", "你好，", "世界", "👨‍👩‍👧", "*x*", "`y`", "\x1c"]
)
SENTENCES = st.lists(WORDS, min_size=1, max_size=12).map(" ".join)
BLOCKS = st.one_of(
    st.builds(lambda level, text: "#" * level + " " + text, st.integers(1, 6), SENTENCES),
    SENTENCES.map(lambda text: text + "\n==="),
    SENTENCES,
    SENTENCES.map(lambda text: "- " + text + "\n    - " + text),
    SENTENCES.map(lambda text: "```\n# " + text + "\n```"),
    SENTENCES.map(lambda text: "> # " + text),
    SENTENCES.map(lambda text: "| a | b |\n|---|---|\n| " + text + " | c |"),
    st.sampled_from(["#", "---", "    indented", "\u3000\u3000", "x" * 200, "重" * 200, "😀" * 100, "---\ntitle: x\n---"]),
    st.text(max_size=30),
)
TEXTS = (
    st.lists(st.tuples(BLOCKS, st.sampled_from(["\n\n", "\n", "\r\n\r\n", "\r", "  "])), min_size=1, max_size=12)
    .map(lambda blocks: "".join(block + end for block, end in blocks))
    .filter(lambda text: bool(text.strip()))
)
COUNTERS = st.sampled_from([count_pieces, count_bytes, count_unevenly, len])
CASES = st.tuples(TEXTS, st.sampled_from(["", "VPN", "reset", "重置"]), COUNTERS, st.integers(20, 60), st.integers(0, 9))
Case = tuple[str, str, Callable[[str], int], int, int]


def split_case(case: Case) -> tuple[Document, list[Chunk]]:
    text, title, count, max_tokens, overlap = case
    whole = document(text, title)
    return whole, Chunker(max_tokens, overlap).split(whole, count, overhead_of(count))


@given(CASES)
@settings(deadline=None, max_examples=300)
def test_every_character_but_white_space_is_in_a_chunk(case: Case) -> None:
    whole, chunks = split_case(case)
    covered = {i for chunk in chunks for i in range(chunk.start, chunk.end)}
    assert [i for i, character in enumerate(whole.text) if not character.isspace() and i not in covered] == []


@given(CASES)
@settings(deadline=None, max_examples=300)
def test_every_chunk_with_its_title_is_within_the_limit(case: Case) -> None:
    whole, chunks = split_case(case)
    _, _, count, max_tokens, _ = case
    for chunk in chunks:
        size = count(whole.text[chunk.start : chunk.end]) + overhead_of(count)(chunk.title(whole.title))
        assert size <= max_tokens or chunk.end - chunk.start == 1


@given(CASES)
@settings(deadline=None, max_examples=300)
def test_no_chunk_is_empty(case: Case) -> None:
    whole, chunks = split_case(case)
    assert chunks
    assert all(text.strip() for text in texts(whole.text, chunks))


@given(CASES)
@settings(deadline=None, max_examples=300)
def test_chunks_are_in_order(case: Case) -> None:
    _, chunks = split_case(case)
    assert all(a.start < b.start and a.end < b.end for a, b in pairwise(chunks))


@given(CASES)
@settings(deadline=None, max_examples=100)
def test_chunks_do_not_overlap_unless_asked_to(case: Case) -> None:
    _, chunks = split_case((*case[:4], 0))
    assert all(a.end <= b.start for a, b in pairwise(chunks))


def test_a_document_that_fits_is_one_chunk_over_its_stripped_text() -> None:
    assert split("\n\n  # VPN\n\nOpen the portal.\n") == [Chunk(start=4, end=27)]


def test_a_document_that_fits_exactly_is_one_chunk() -> None:
    assert len(split("one two six ten red sun day sky air sea ice fog")) == 1


def test_a_document_one_token_too_long_is_cut() -> None:
    assert len(split("one two six ten red sun day sky air sea ice fog now")) == 2


def test_cuts_fall_before_headings_first() -> None:
    text = "# One\n\none two six ten.\n\n# Two\n\nred sun day sky.\n"
    assert texts(text, split(text)) == ["# One\n\none two six ten.", "# Two\n\nred sun day sky."]


def test_cuts_fall_between_paragraphs_next() -> None:
    text = "One two six. Ten red.\n\nSun day sky. Air sea.\n\nIce fog."
    assert texts(text, split(text)) == ["One two six. Ten red.", "Sun day sky. Air sea.\n\nIce fog."]


def test_cuts_fall_between_sentences_next() -> None:
    text = "One two six ten red sun. Day sky air sea ice fog hot."
    assert texts(text, split(text)) == ["One two six ten red sun.", "Day sky air sea ice fog hot."]


def test_chinese_is_cut_between_sentences() -> None:
    text = "请打开公司门户。然后点击重置。最后再次登录。"
    assert texts(text, split(text)) == ["请打开公司门户。", "然后点击重置。", "最后再次登录。"]


def test_offsets_count_characters_where_bytes_would_differ() -> None:
    text = "重置密码😀😀请打开门户。\n\n然后登录，完成验证😀。\n\n# 网络\n\n请重启路由器。"
    assert texts(text, split(text, max_tokens=18)) == [
        "重置密码😀😀请打开门户。",
        "然后登录，完成验证😀。",
        "# 网络\n\n请重启路由器。",
    ]


RUNS = {
    "letters": "a" * 10_000,
    "Chinese": "重" * 10_000,
    "emoji": "😀" * 5_000,
    "joined emoji": "👨‍👩‍👧" * 2_000,
    "marks": "<" * 5_000,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_without_any_boundary_is_cut_within_the_limit(name: str) -> None:
    run = RUNS[name]
    chunks = split(run)
    assert all(count_pieces(text) + 4 <= 16 for text in texts(run, chunks))
    assert "".join(texts(run, chunks)) == run


def test_a_piece_that_a_moody_tokenizer_makes_too_big_is_halved() -> None:
    def count(text: str) -> int:
        return 40 if text.count("x") == 8 else len(text) // 10

    text = "x" * 8 + " " + "word " * 40
    chunks = Chunker(16).split(document(text), count, lambda _: 4)
    assert all(count(part) <= 12 for part in texts(text, chunks))


def test_the_heading_path_names_the_headings_above_outermost_first() -> None:
    text = "# IT\n\n## VPN\n\n### Setup\n\n" + "one two six ten. " * 4
    assert split(text, max_tokens=24)[-1].headings == ("IT", "VPN", "Setup")


def test_a_heading_ends_the_path_of_its_siblings() -> None:
    text = "# IT\n\n## VPN\n\n" + "one two six ten. " * 4 + "\n\n## Mail\n\n" + "red sun day sky. " * 4
    assert split(text, max_tokens=24)[-1].headings == ("IT", "Mail")


def test_a_heading_at_the_start_of_a_chunk_is_in_its_path() -> None:
    text = "# One\n\none two six ten.\n\n# Two\n\nred sun day sky.\n"
    assert [chunk.headings for chunk in split(text)] == [("One",), ("Two",)]


def test_a_heading_stays_with_the_beginning_of_a_section_that_is_cut() -> None:
    text = "# VPN\n\n" + "One two six ten. " * 8
    assert texts(text, split(text, max_tokens=24))[0] == "# VPN\n\nOne two six ten. One two six ten. One two six ten."


def test_nested_headings_stay_with_what_they_head() -> None:
    text = "# IT\n\n## VPN\n\n" + "One two six ten. " * 8
    assert texts(text, split(text, max_tokens=32))[0].startswith("# IT\n\n## VPN\n\nOne two")


def test_the_rest_of_a_cut_section_does_not_run_on_into_the_next() -> None:
    text = "# One\n\n" + "One two six ten. " * 3 + "\n\n# Two\n\nRed sun."
    chunks = split(text)
    assert (chunks[-1].headings, texts(text, chunks)[-1]) == (("Two",), "# Two\n\nRed sun.")


def test_sections_that_fit_together_share_a_chunk() -> None:
    text = "# One\n\nOne two.\n\n# Two\n\nSix ten.\n\n# Three\n\nRed sun day sky.\n"
    assert texts(text, split(text)) == ["# One\n\nOne two.\n\n# Two\n\nSix ten.", "# Three\n\nRed sun day sky."]


def test_a_higher_heading_does_not_join_the_lower_one_before_it() -> None:
    text = "# One\n\nRed sun day sky.\n\n## Deep\n\nOne two.\n\n# Two\n\nSix ten.\n"
    assert texts(text, split(text))[1:] == ["## Deep\n\nOne two.", "# Two\n\nSix ten."]


def test_text_before_the_first_heading_has_no_path() -> None:
    text = "one two six ten red sun.\n\n# Two\n\nred sun day sky air sea."
    assert split(text)[0].headings == ()


def test_the_title_of_the_document_is_not_repeated_in_the_path() -> None:
    text = "# VPN\n\n## Setup\n\n" + "one two six ten. " * 4
    assert {chunk.headings for chunk in split(text, title="VPN", max_tokens=24)} == {(), ("Setup",)}


def test_headings_that_take_more_than_half_are_left_out_innermost_first() -> None:
    text = "# IT\n\n## " + "very " * 10 + "\n\n" + "one two six ten. " * 4
    assert {chunk.headings for chunk in split(text)} == {("IT",)}


def test_a_title_that_takes_more_than_half_is_refused_by_the_documents_id() -> None:
    with pytest.raises(InputError, match=r"'doc': the title is too long: .* 9 of the 16 tokens"):
        split("one two six ten " * 10, title="one two six ten red")


def test_a_long_title_is_no_matter_where_the_document_fits() -> None:
    assert len(split("one", title="one two six ten red")) == 1


def test_overlap_repeats_whole_sentences() -> None:
    text = "One two. Six ten red. Sun day. Sky air sea. Ice fog. Hot now."
    assert texts(text, split(text, overlap=5)) == [
        "One two. Six ten red.",
        "Six ten red. Sun day. Sky air sea.",
        "Sky air sea. Ice fog. Hot now.",
    ]


def test_overlap_repeats_whole_words_where_the_sentence_is_too_long() -> None:
    text = " ".join(f"w{i:02}" for i in range(30))
    assert texts(text, split(text, overlap=4))[1] == " ".join(f"w{i:02}" for i in range(4, 16))


def test_overlap_of_chinese_begins_after_its_punctuation() -> None:
    text = "请打开门户。点重置吧。再登录一次。验证密码。"
    assert texts(text, split(text, max_tokens=24, overlap=6)) == ["请打开门户。点重置吧。", "点重置吧。再登录一次。验证密码。"]


def test_overlap_stays_within_a_section() -> None:
    text = "# One\n\n" + "One two six ten. " * 3 + "\n\n# Two\n\nRed sun."
    assert texts(text, split(text, overlap=4))[-1] == "# Two\n\nRed sun."


def test_overlap_never_swallows_the_chunk_before() -> None:
    # The splitter's own overlap makes chunk_indices panic here.
    text = "o\r👨‍👩‍👧 [a](b) o Go.  <b> 密码。\r\n\r\n\u3000\r\n\r\n\u3000 network。 <b> !\r- `y`\n"
    text += "    - network。 o password Go.  Go.  \x1c \x1c 你"
    chunks = Chunker(30, 11).split(document(text), count_bytes, lambda _: 4)
    assert all(a.start < b.start and a.end < b.end for a, b in pairwise(chunks))


def test_each_text_is_counted_once() -> None:
    counted: list[str] = []

    def count(text: str) -> int:
        counted.append(text)
        return count_pieces(text)

    Chunker(16).split(document("# VPN\n\n" + "one two six ten. " * 40), count, cost)
    assert len(counted) == len(set(counted))


def test_a_long_text_is_never_counted_whole_where_its_beginning_is_too_long() -> None:
    longest = 0

    def count(text: str) -> int:
        nonlocal longest
        longest = max(longest, len(text))
        return count_pieces(text)

    Chunker(16).split(document("one two six ten. " * 2_000), count, cost)
    assert longest <= 16 * 8


def test_an_error_of_the_tokenizer_comes_through() -> None:
    def count(text: str) -> int:
        if len(text) < 100:
            raise RuntimeError("no vocabulary")
        return len(text)

    with pytest.raises(RuntimeError, match="no vocabulary"):
        Chunker(16).split(document("one two six ten. " * 40), count, cost)


@pytest.mark.parametrize(
    ("max_tokens", "overlap", "message"),
    [
        pytest.param(15, 0, "max_tokens is 15", id="too few tokens"),
        pytest.param(64, -1, "overlap is -1", id="negative overlap"),
        pytest.param(64, 32, "overlap is 32", id="overlap of half a chunk"),
    ],
)
def test_numbers_out_of_range_are_refused(max_tokens: int, overlap: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Chunker(max_tokens, overlap)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("# One #\n", [(0, 8, 1, "One")], id="ATX"),
        pytest.param("One\n===\n\nTwo\n---\n", [(0, 8, 1, "One"), (9, 17, 2, "Two")], id="underlined"),
        pytest.param("## 重置 **密码** `x` [门户](u)", [(0, 24, 2, "重置 密码 x 门户")], id="marks are dropped"),
        pytest.param("# a\r\n\r\n# b\r# c", [(0, 5, 1, "a"), (7, 11, 1, "b"), (11, 14, 1, "c")], id="line ends"),
        pytest.param("😀\u2028\n   # 题", [(3, 9, 1, "题")], id="characters and indentation"),
        pytest.param("#\n", [(0, 2, 1, "")], id="empty"),
        pytest.param("```\n# no\n```\n~~~\n# no\n", [], id="code fences"),
        pytest.param("    # no\n", [], id="indented code"),
        pytest.param("> # no\n\n- # no\n", [], id="quotations and lists"),
        pytest.param("#no\n\n\\# no", [], id="no space and escaped"),
    ],
)
def test_headings(text: str, expected: list[tuple[int, int, int, str]]) -> None:
    assert find_headings(text) == [Heading(*heading) for heading in expected]
