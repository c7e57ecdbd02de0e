from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_rag.lexical import LexicalIndex, reads_as_chinese, tokenize

CORPUS = ["red apple", "red pear car", "blue"]
WORDS = st.sampled_from(["red", "blue", "apple", "pear", "car", "重置", "密码", "zebra"])
TEXTS = st.lists(WORDS, max_size=6).map(" ".join)


# -- tokenize ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Reset the password", ["reset", "the", "password"]),
        ("RESET Straße", ["reset", "strasse"]),  # case folding, not lower case alone
        ("the client's well-known 3.5", ["the", "client", "s", "well", "known", "3", "5"]),
        ("snake_case", ["snake", "case"]),
        ("café", ["café"]),
        ("cafe\u0301", ["café"]),  # e and an accent beside it are one letter
        ("重置密码", ["重置", "密码"]),
        ("重置密码，然后登录。", ["重置", "密码", "然后", "登录"]),
        ("用VPN登录", ["用", "vpn", "登录"]),
        ("ＶＰＮ　２０２４", ["vpn", "2024"]),
        ("ｒｅｓｅｔ：重置", ["reset", "重置"]),
        ("?! ... — 、。「」", []),
        ("___", []),
        (" \t\n\u3000", []),
        ("", []),
        ("привет мир", ["привет", "мир"]),
    ],
)
def test_the_words_of_a_text(text: str, expected: list[str]) -> None:
    assert tokenize(text) == expected


def test_a_long_chinese_word_comes_with_the_shorter_ones_inside_it() -> None:
    assert {"清华", "大学", "清华大学"} <= set(tokenize("清华大学"))


@given(st.text())
def test_no_word_is_empty_or_has_white_space(text: str) -> None:
    assert [word for word in tokenize(text) if not word.strip() or word.split() != [word]] == []


# -- reads_as_chinese -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("如何重置密码？", True),
        ("密码", True),
        ("VPN 密码", True),  # two characters are one word, against one
        ("如何用VPN登录?", True),  # five characters are two and a half words, against one
        ("VPN 密", True),  # a run counts as one word at least, against one
        ("what does 密码 mean", False),  # one word against three
        ("How do I reset my password?", False),
        ("ＶＰＮ　密码", True),
        ("2024", False),
        ("？！", False),
        ("", False),
    ],
)
def test_a_text_reads_as_chinese_from_half_of_its_words_on(text: str, expected: bool) -> None:
    assert reads_as_chinese(text) is expected


# -- scores by hand ---------------------------------------------------------------------------------------------------


def test_the_score_of_one_word_is_bm25_over_its_weight() -> None:
    # the weight cancels out: tf / (tf + k1 * (1 - b + b * dl / avgdl)), with tf = 1, avgdl = (2 + 3 + 1) / 3 = 2
    # dl = 2: 1 / (1 + 1.5 * (0.25 + 0.75 * 2 / 2)) = 1 / 2.5 = 0.4
    # dl = 3: 1 / (1 + 1.5 * (0.25 + 0.75 * 3 / 2)) = 1 / 3.0625 = 0.326531
    assert LexicalIndex(CORPUS).scores("red") == pytest.approx([0.4, 1 / 3.0625, 0.0])


def test_the_score_of_two_words_is_the_mean_by_their_weights() -> None:
    # N = 3: weight(red) = ln(1 + 1.5 / 2.5) = ln 1.6; weight(apple) = ln(1 + 2.5 / 1.5) = ln(8 / 3)
    # text 0: (0.4 * ln 1.6 + 0.4 * ln(8/3)) / (ln 1.6 + ln(8/3)) = 0.4
    # text 1: (0.326531 * ln 1.6) / (ln 1.6 + ln(8/3)) = 0.326531 * 0.470004 / 1.450833
    red, apple = math.log(1.6), math.log(8 / 3)
    assert LexicalIndex(CORPUS).scores("red apple") == pytest.approx([0.4, red / (red + apple) / 3.0625, 0.0])


def test_a_word_that_stands_twice_in_a_text_counts_more_and_less_than_double() -> None:
    # both texts have 2 words, so dl = avgdl: tf = 2 gives 2 / (2 + 1.5), tf = 1 gives 1 / (1 + 1.5)
    assert LexicalIndex(["red red", "red car"]).scores("red") == pytest.approx([2 / 3.5, 1 / 2.5])


def test_a_word_that_no_text_has_lowers_the_score_by_its_weight() -> None:
    # weight(zebra) = ln(1 + 3.5 / 0.5) = ln 8; text 0: 0.4 * ln 1.6 / (ln 1.6 + ln 8)
    expected = 0.4 * math.log(1.6) / (math.log(1.6) + math.log(8))
    assert LexicalIndex(CORPUS).scores("red zebra")[0] == pytest.approx(expected)


def test_repeating_a_word_of_the_question_changes_nothing_where_it_is_the_only_one() -> None:
    # twice the score over twice the bound
    index = LexicalIndex(CORPUS)
    assert index.scores("red red red") == pytest.approx(index.scores("red"))


def test_a_repeated_word_of_the_question_weighs_as_often_as_it_stands() -> None:
    # text 2 has only "blue": 1 / (1 + 1.5 * (0.25 + 0.75 * 1 / 2)) = 1 / 1.9375, of one part in three
    # weight(blue) = weight(apple) = ln(8 / 3)
    assert LexicalIndex(CORPUS).scores("apple apple blue")[2] == pytest.approx(1 / 1.9375 / 3)


@pytest.mark.parametrize(("word", "count"), [("red", 2), ("apple", 1), ("zebra", 0)])
def test_the_weight_of_a_word_by_hand(word: str, count: int) -> None:
    # ln(1 + (3 - n + 0.5) / (n + 0.5))
    assert LexicalIndex(CORPUS).weight(word) == pytest.approx(math.log(1 + (3.5 - count) / (count + 0.5)))


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ["zebra", "?!", "", "redapple", "密码"])
def test_without_a_word_in_common_every_score_is_0(question: str) -> None:
    assert LexicalIndex(CORPUS).scores(question).tolist() == [0.0, 0.0, 0.0]


def test_a_rare_word_weighs_more_than_a_common_one() -> None:
    # both texts are of the same length and have one word of the question each
    common, rare = LexicalIndex(["red car", "apple car", "red bus", "red tram"]).scores("red apple")[:2]
    assert rare > common


def test_a_short_text_scores_above_a_long_one_with_the_same_word() -> None:
    short, long = LexicalIndex(["red", "red pear car bus tram"]).scores("red")
    assert short > long


def test_words_match_whatever_their_case_and_width() -> None:
    index = LexicalIndex(["Ｒｅｄ apple", "blue"])
    assert index.scores("RED")[0] > 0


def test_chinese_words_match_without_spaces() -> None:
    scores = LexicalIndex(["员工可以重置密码。", "食堂在一楼。"]).scores("怎么重置密码")
    assert scores[0] > scores[1] == 0.0


def test_scores_are_float32() -> None:
    assert LexicalIndex(CORPUS).scores("red").dtype == np.float32


def test_scores_of_no_match_are_float32() -> None:
    assert LexicalIndex(CORPUS).scores("zebra").dtype == np.float32


@given(st.lists(TEXTS, max_size=6), TEXTS)
def test_scores_are_from_0_to_1(texts: list[str], question: str) -> None:
    scores = LexicalIndex(texts).scores(question)
    assert ((scores >= 0.0) & (scores <= 1.0)).all()


@given(st.lists(TEXTS, max_size=6), TEXTS)
def test_there_is_a_score_for_each_text(texts: list[str], question: str) -> None:
    assert LexicalIndex(texts).scores(question).shape == (len(texts),)


@given(st.lists(TEXTS, min_size=1, max_size=6), TEXTS)
def test_a_score_is_above_0_just_where_a_word_is_shared(texts: list[str], question: str) -> None:
    shared = [bool(set(tokenize(text)) & set(tokenize(question))) for text in texts]
    assert (LexicalIndex(texts).scores(question) > 0).tolist() == shared


@given(st.lists(TEXTS, min_size=1, max_size=6), TEXTS)
def test_an_unknown_word_lowers_every_score_that_is_not_0(texts: list[str], question: str) -> None:
    index = LexicalIndex(texts)
    before, after = index.scores(question), index.scores(f"{question} unheard")
    assert (after[before > 0] < before[before > 0]).all()


# -- odd corpora ------------------------------------------------------------------------------------------------------


def test_empty_texts_score_0() -> None:
    assert LexicalIndex(["", "red", "?!"]).scores("red")[[0, 2]].tolist() == [0.0, 0.0]


def test_empty_texts_shorten_the_mean_length() -> None:
    # dl = 1, avgdl = (0 + 1) / 2: 1 / (1 + 1.5 * (0.25 + 0.75 * 2)) = 1 / 3.625
    assert LexicalIndex(["", "red"]).scores("red")[1] == pytest.approx(1 / 3.625)


@pytest.mark.parametrize("texts", [["", ""], ["?!", " "]])
def test_where_all_texts_are_empty_every_score_is_0(texts: list[str]) -> None:
    assert LexicalIndex(texts).scores("red").tolist() == [0.0, 0.0]


def test_no_texts_have_no_scores() -> None:
    assert LexicalIndex([]).scores("red").tolist() == []


def test_a_single_text_can_be_searched() -> None:
    # dl = avgdl: 1 / (1 + 1.5)
    assert LexicalIndex(["red apple"]).scores("red").tolist() == pytest.approx([0.4])


def test_building_an_index_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        LexicalIndex(CORPUS).scores("red")
    assert caplog.records == []
