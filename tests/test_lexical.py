from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_rag.lexical import LexicalIndex, Vocabulary, reads_as_chinese, tokenize

CORPUS = ["red apple", "red pear car", "blue"]
WORDS = st.sampled_from(["red", "blue", "apple", "pear", "car", "重置", "密码", "zebra"])
TEXTS = st.lists(WORDS, max_size=6).map(" ".join)


# -- tokenize ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # itself, its stem, and from four letters on the first four
        ("Reset the pins", ["reset", "~reset", "rese*", "the", "~the", "pins", "~pin", "pins*"]),
        ("RESET Straße", ["reset", "~reset", "rese*", "strasse", "~strass", "stra*"]),  # case folding, not lower case alone
        (
            "client's well-known",
            ["client", "~client", "clie*", "s", "~s", "well", "~well", "well*", "known", "~known", "know*"],
        ),
        ("3.5", ["3", "~3", "5", "~5"]),
        ("pass_word", ["pass", "~pass", "pass*", "word", "~word", "word*"]),
        ("café", ["café", "~café", "café*"]),
        ("cafe\u0301", ["café", "~café", "café*"]),  # e and an accent beside it are one letter
        ("привет мир", ["привет", "~привет", "прив*", "мир", "~мир"]),
        # words, then characters, then pairs of neighbours
        ("密", ["密", "密"]),
        ("重置密码", ["重置", "密码", "重", "置", "密", "码", "重置", "置密", "密码"]),
        ("重置，登录。", ["重置", "重", "置", "重置", "登录", "登", "录", "登录"]),  # no pair across a comma
        ("用VPN登录", ["用", "用", "vpn", "~vpn", "登录", "登", "录", "登录"]),
        ("ＶＰＮ　２０２４", ["vpn", "~vpn", "2024", "~2024", "2024*"]),
        ("ｖｐｎ：登录", ["vpn", "~vpn", "登录", "登", "录", "登录"]),
        ("?! ... — 、。「」", []),
        ("___", []),
        (" \t\n\u3000", []),
        ("", []),
    ],
)
def test_the_terms_of_a_text(text: str, expected: list[str]) -> None:
    assert tokenize(text) == expected


def test_a_long_chinese_word_comes_with_the_shorter_ones_inside_it() -> None:
    assert {"清华", "大学", "清华大学"} <= set(tokenize("清华大学"))


@pytest.mark.parametrize(
    ("traditional", "simplified"),
    [("清華大學", "清华大学"), ("頭髮", "头发"), ("發展", "发展"), ("皇后", "皇后"), ("以後", "以后")],
)
def test_traditional_characters_give_the_terms_of_the_simplified_ones(traditional: str, simplified: str) -> None:
    assert tokenize(traditional) == tokenize(simplified)


@given(st.text())
def test_no_term_is_empty_or_has_white_space(text: str) -> None:
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

# CORPUS in terms: red, ~red | apple, ~appl, appl* (5); red, ~red | pear, ~pear, pear* | car, ~car (7); blue, ~blue, blue* (3)
# so avgdl = 5, and a term that stands once has tf / (tf + k1 * (1 - b + b * dl / avgdl)) of its weight:
# dl = 5: 1 / (1 + 1.5 * (0.25 + 0.75)) = 1 / 2.5; dl = 7: 1 / (1 + 1.5 * (0.25 + 0.75 * 1.4)) = 1 / 2.95
# dl = 3: 1 / (1 + 1.5 * (0.25 + 0.75 * 0.6)) = 1 / 2.05
# N = 3: two texts have red, ln(1 + 1.5 / 2.5) = ln 1.6; one has apple, ln(1 + 2.5 / 1.5); none has zebra, ln(1 + 3.5 / 0.5)
RED, APPLE, ZEBRA = math.log(1.6), math.log(8 / 3), math.log(8)


def test_the_score_of_one_word_is_bm25_over_its_weight() -> None:
    # both terms of the word weigh the same, so the weight cancels out
    assert LexicalIndex(CORPUS).scores("red") == pytest.approx([1 / 2.5, 1 / 2.95, 0.0])


def test_the_score_of_two_words_is_the_mean_by_the_weights_of_their_terms() -> None:
    # two terms of red, three of apple
    share = 2 * RED / (2 * RED + 3 * APPLE)
    assert LexicalIndex(CORPUS).scores("red apple") == pytest.approx([1 / 2.5, share / 2.95, 0.0])


def test_a_word_that_stands_twice_in_a_text_counts_more_and_less_than_double() -> None:
    # both texts have 4 terms, so dl = avgdl: tf = 2 gives 2 / (2 + 1.5), tf = 1 gives 1 / (1 + 1.5)
    assert LexicalIndex(["red red", "red car"]).scores("red") == pytest.approx([2 / 3.5, 1 / 2.5])


def test_another_form_of_a_word_scores_by_the_terms_in_common() -> None:
    # apples: apples, ~appl, appl*; the first is unknown and weighs ln 8
    expected = 2 * APPLE / (2 * APPLE + ZEBRA) / 2.5
    assert LexicalIndex(CORPUS).scores("apples") == pytest.approx([expected, 0.0, 0.0])


def test_a_word_that_no_text_has_lowers_the_score_by_its_weight() -> None:
    # zebra, ~zebra, zebr*
    expected = 2 * RED / (2 * RED + 3 * ZEBRA) / 2.5
    assert LexicalIndex(CORPUS).scores("red zebra")[0] == pytest.approx(expected)


def test_repeating_a_word_of_the_question_changes_nothing_where_it_is_the_only_one() -> None:
    # twice the score over twice the bound
    index = LexicalIndex(CORPUS)
    assert index.scores("red red red") == pytest.approx(index.scores("red"))


def test_a_repeated_word_of_the_question_weighs_as_often_as_it_stands() -> None:
    # text 2 has only blue, which weighs as much as apple: one part in three
    assert LexicalIndex(CORPUS).scores("apple apple blue")[2] == pytest.approx(1 / 2.05 / 3)


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


@pytest.mark.parametrize(
    ("question", "same", "stem", "start", "other"),
    [("connect", "connect", "connected", "connoisseur", "contact"), ("привет", "привет", "", "приветствие", "при")],
)
def test_the_nearer_the_form_of_a_word_the_higher_the_score(
    question: str, same: str, stem: str, start: str, other: str
) -> None:
    scores = [LexicalIndex([text, "red"]).scores(question)[0] for text in (same, stem, start, other) if text]
    assert scores == sorted(set(scores), reverse=True)
    assert scores[-1] == 0.0


@pytest.mark.parametrize("text", ["重置密码", "重置密碼"])
@pytest.mark.parametrize("question", ["重置密码", "重置密碼"])
def test_traditional_and_simplified_characters_match_each_other(text: str, question: str) -> None:
    assert (
        LexicalIndex([text, "食堂"]).scores(question).tolist() == LexicalIndex(["重置密码", "食堂"]).scores("重置密码").tolist()
    )


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


# -- coverage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passage", "expected"),
    [
        ("red apple", 1.0),
        ("An apple a day", 3 * APPLE / (2 * RED + 3 * APPLE)),
        ("apples", 2 * APPLE / (2 * RED + 3 * APPLE)),  # ~appl and appl*
        ("apple apple and apple pie", 3 * APPLE / (2 * RED + 3 * APPLE)),  # how often and how long play no part
        ("red", 2 * RED / (2 * RED + 3 * APPLE)),
        ("pear", 0.0),
        ("", 0.0),
    ],
)
def test_coverage_by_hand(passage: str, expected: float) -> None:
    assert LexicalIndex(CORPUS).coverage("red apple", [passage]) == pytest.approx([expected])


def test_what_no_text_has_counts_for_coverage() -> None:
    # zebra weighs ln 8, and the passage speaks of it
    found = LexicalIndex(CORPUS).coverage("red zebra", ["a zebra", "red"])
    assert found == pytest.approx([3 * ZEBRA / (2 * RED + 3 * ZEBRA), 2 * RED / (2 * RED + 3 * ZEBRA)])


def test_a_repeated_word_of_the_question_counts_as_often_for_coverage() -> None:
    # blue weighs as much as apple
    assert LexicalIndex(CORPUS).coverage("apple apple blue", ["blue", "apple"]) == pytest.approx([1 / 3, 2 / 3])


@pytest.mark.parametrize("question", ["", "?!"])
def test_a_question_without_words_is_covered_by_nothing(question: str) -> None:
    assert LexicalIndex(CORPUS).coverage(question, ["red", ""]).tolist() == [0.0, 0.0]


def test_no_passages_have_no_coverage() -> None:
    assert LexicalIndex(CORPUS).coverage("red", []).tolist() == []


def test_coverage_is_float32() -> None:
    index = LexicalIndex(CORPUS)
    assert [index.coverage(question, ["red"]).dtype for question in ("red", "")] == [np.float32, np.float32]


@given(st.lists(TEXTS, max_size=4), TEXTS.filter(bool), TEXTS)
def test_a_passage_that_holds_the_question_covers_it(texts: list[str], question: str, more: str) -> None:
    assert LexicalIndex(texts).coverage(question, [f"{more} {question} {more}"]) == pytest.approx([1.0])


@given(st.lists(TEXTS, max_size=4), TEXTS, TEXTS, TEXTS)
def test_a_longer_passage_covers_no_less(texts: list[str], question: str, passage: str, more: str) -> None:
    short, long = LexicalIndex(texts).coverage(question, [passage, f"{passage} {more}"])
    assert 0.0 <= short <= long + 1e-6
    assert long <= 1.0


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


# -- counted once, indexed often ----------------------------------------------------------------------------------------


@given(st.lists(TEXTS, min_size=1, max_size=8), TEXTS)
def test_the_order_and_the_ratios_are_those_of_bm25s(texts: list[str], question: str) -> None:
    import bm25s

    corpus = [tokenize(text) for text in texts]
    known = {term for terms in corpus for term in terms}
    asked = [term for term in tokenize(question) if term in known]
    if not asked:
        return
    engine = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    engine.index(corpus, show_progress=False)
    index = LexicalIndex(texts)
    bound = sum(index.weight(term) for term in tokenize(question))
    assert index.scores(question) * bound == pytest.approx(engine.get_scores(asked), rel=1e-4, abs=1e-5)


@given(st.lists(TEXTS, max_size=6), st.lists(TEXTS, max_size=6), TEXTS)
def test_a_shared_vocabulary_changes_no_score(before: list[str], texts: list[str], question: str) -> None:
    vocabulary = Vocabulary()
    earlier = LexicalIndex([vocabulary.count(text) for text in before], vocabulary)
    scores = earlier.scores(question)
    later = LexicalIndex([vocabulary.count(text) for text in texts], vocabulary)
    assert later.scores(question).tolist() == LexicalIndex(texts).scores(question).tolist()
    assert earlier.scores(question).tolist() == scores.tolist()  # also with terms that it was made without
