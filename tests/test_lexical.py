from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_rag import lexical
from gemma_rag.lexical import LexicalIndex, Postings, count_words, merged_words, reads_as_chinese, tokenize

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
    assert LexicalIndex.of_texts(CORPUS).scores("red") == pytest.approx([1 / 2.5, 1 / 2.95, 0.0])


def test_the_score_of_two_words_is_the_mean_by_the_weights_of_their_terms() -> None:
    # two terms of red, three of apple
    share = 2 * RED / (2 * RED + 3 * APPLE)
    assert LexicalIndex.of_texts(CORPUS).scores("red apple") == pytest.approx([1 / 2.5, share / 2.95, 0.0])


def test_a_word_that_stands_twice_in_a_text_counts_more_and_less_than_double() -> None:
    # both texts have 4 terms, so dl = avgdl: tf = 2 gives 2 / (2 + 1.5), tf = 1 gives 1 / (1 + 1.5)
    assert LexicalIndex.of_texts(["red red", "red car"]).scores("red") == pytest.approx([2 / 3.5, 1 / 2.5])


def test_another_form_of_a_word_scores_by_the_terms_in_common() -> None:
    # apples: apples, ~appl, appl*; the first is unknown and weighs ln 8
    expected = 2 * APPLE / (2 * APPLE + ZEBRA) / 2.5
    assert LexicalIndex.of_texts(CORPUS).scores("apples") == pytest.approx([expected, 0.0, 0.0])


def test_a_word_that_no_text_has_lowers_the_score_by_its_weight() -> None:
    # zebra, ~zebra, zebr*
    expected = 2 * RED / (2 * RED + 3 * ZEBRA) / 2.5
    assert LexicalIndex.of_texts(CORPUS).scores("red zebra")[0] == pytest.approx(expected)


def test_repeating_a_word_of_the_question_changes_nothing_where_it_is_the_only_one() -> None:
    # twice the score over twice the bound
    index = LexicalIndex.of_texts(CORPUS)
    assert index.scores("red red red") == pytest.approx(index.scores("red"))


def test_a_repeated_word_of_the_question_weighs_as_often_as_it_stands() -> None:
    # text 2 has only blue, which weighs as much as apple: one part in three
    assert LexicalIndex.of_texts(CORPUS).scores("apple apple blue")[2] == pytest.approx(1 / 2.05 / 3)


@pytest.mark.parametrize(("word", "count"), [("red", 2), ("apple", 1), ("zebra", 0)])
def test_the_weight_of_a_word_by_hand(word: str, count: int) -> None:
    # ln(1 + (3 - n + 0.5) / (n + 0.5))
    assert LexicalIndex.of_texts(CORPUS).weight(word) == pytest.approx(math.log(1 + (3.5 - count) / (count + 0.5)))


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ["zebra", "?!", "", "redapple", "密码"])
def test_without_a_word_in_common_every_score_is_0(question: str) -> None:
    assert LexicalIndex.of_texts(CORPUS).scores(question).tolist() == [0.0, 0.0, 0.0]


def test_a_rare_word_weighs_more_than_a_common_one() -> None:
    # both texts are of the same length and have one word of the question each
    common, rare = LexicalIndex.of_texts(["red car", "apple car", "red bus", "red tram"]).scores("red apple")[:2]
    assert rare > common


def test_a_short_text_scores_above_a_long_one_with_the_same_word() -> None:
    short, long = LexicalIndex.of_texts(["red", "red pear car bus tram"]).scores("red")
    assert short > long


def test_words_match_whatever_their_case_and_width() -> None:
    index = LexicalIndex.of_texts(["Ｒｅｄ apple", "blue"])
    assert index.scores("RED")[0] > 0


@pytest.mark.parametrize(
    ("question", "same", "stem", "start", "other"),
    [("connect", "connect", "connected", "connoisseur", "contact"), ("привет", "привет", "", "приветствие", "при")],
)
def test_the_nearer_the_form_of_a_word_the_higher_the_score(
    question: str, same: str, stem: str, start: str, other: str
) -> None:
    scores = [LexicalIndex.of_texts([text, "red"]).scores(question)[0] for text in (same, stem, start, other) if text]
    assert scores == sorted(set(scores), reverse=True)
    assert scores[-1] == 0.0


@pytest.mark.parametrize("text", ["重置密码", "重置密碼"])
@pytest.mark.parametrize("question", ["重置密码", "重置密碼"])
def test_traditional_and_simplified_characters_match_each_other(text: str, question: str) -> None:
    assert (
        LexicalIndex.of_texts([text, "食堂"]).scores(question).tolist()
        == LexicalIndex.of_texts(["重置密码", "食堂"]).scores("重置密码").tolist()
    )


def test_chinese_words_match_without_spaces() -> None:
    scores = LexicalIndex.of_texts(["员工可以重置密码。", "食堂在一楼。"]).scores("怎么重置密码")
    assert scores[0] > scores[1] == 0.0


def test_scores_are_float32() -> None:
    assert LexicalIndex.of_texts(CORPUS).scores("red").dtype == np.float32


def test_scores_of_no_match_are_float32() -> None:
    assert LexicalIndex.of_texts(CORPUS).scores("zebra").dtype == np.float32


@given(st.lists(TEXTS, max_size=6), TEXTS)
def test_scores_are_from_0_to_1(texts: list[str], question: str) -> None:
    scores = LexicalIndex.of_texts(texts).scores(question)
    assert ((scores >= 0.0) & (scores <= 1.0)).all()


@given(st.lists(TEXTS, max_size=6), TEXTS)
def test_there_is_a_score_for_each_text(texts: list[str], question: str) -> None:
    assert LexicalIndex.of_texts(texts).scores(question).shape == (len(texts),)


@given(st.lists(TEXTS, min_size=1, max_size=6), TEXTS)
def test_a_score_is_above_0_just_where_a_word_is_shared(texts: list[str], question: str) -> None:
    shared = [bool(set(tokenize(text)) & set(tokenize(question))) for text in texts]
    assert (LexicalIndex.of_texts(texts).scores(question) > 0).tolist() == shared


@given(st.lists(TEXTS, min_size=1, max_size=6), TEXTS)
def test_an_unknown_word_lowers_every_score_that_is_not_0(texts: list[str], question: str) -> None:
    index = LexicalIndex.of_texts(texts)
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
    assert LexicalIndex.of_texts(CORPUS).coverage("red apple", [passage]) == pytest.approx([expected])


def test_what_no_text_has_counts_for_coverage() -> None:
    # zebra weighs ln 8, and the passage speaks of it
    found = LexicalIndex.of_texts(CORPUS).coverage("red zebra", ["a zebra", "red"])
    assert found == pytest.approx([3 * ZEBRA / (2 * RED + 3 * ZEBRA), 2 * RED / (2 * RED + 3 * ZEBRA)])


def test_a_repeated_word_of_the_question_counts_as_often_for_coverage() -> None:
    # blue weighs as much as apple
    assert LexicalIndex.of_texts(CORPUS).coverage("apple apple blue", ["blue", "apple"]) == pytest.approx([1 / 3, 2 / 3])


@pytest.mark.parametrize("question", ["", "?!"])
def test_a_question_without_words_is_covered_by_nothing(question: str) -> None:
    assert LexicalIndex.of_texts(CORPUS).coverage(question, ["red", ""]).tolist() == [0.0, 0.0]


def test_no_passages_have_no_coverage() -> None:
    assert LexicalIndex.of_texts(CORPUS).coverage("red", []).tolist() == []


def test_coverage_is_float32() -> None:
    index = LexicalIndex.of_texts(CORPUS)
    assert [index.coverage(question, ["red"]).dtype for question in ("red", "")] == [np.float32, np.float32]


@given(st.lists(TEXTS, max_size=4), TEXTS.filter(bool), TEXTS)
def test_a_passage_that_holds_the_question_covers_it(texts: list[str], question: str, more: str) -> None:
    assert LexicalIndex.of_texts(texts).coverage(question, [f"{more} {question} {more}"]) == pytest.approx([1.0])


@given(st.lists(TEXTS, max_size=4), TEXTS, TEXTS, TEXTS)
def test_a_longer_passage_covers_no_less(texts: list[str], question: str, passage: str, more: str) -> None:
    short, long = LexicalIndex.of_texts(texts).coverage(question, [passage, f"{passage} {more}"])
    assert 0.0 <= short <= long + 1e-6
    assert long <= 1.0


# -- odd corpora ------------------------------------------------------------------------------------------------------


def test_empty_texts_score_0() -> None:
    assert LexicalIndex.of_texts(["", "red", "?!"]).scores("red")[[0, 2]].tolist() == [0.0, 0.0]


def test_empty_texts_shorten_the_mean_length() -> None:
    # dl = 1, avgdl = (0 + 1) / 2: 1 / (1 + 1.5 * (0.25 + 0.75 * 2)) = 1 / 3.625
    assert LexicalIndex.of_texts(["", "red"]).scores("red")[1] == pytest.approx(1 / 3.625)


@pytest.mark.parametrize("texts", [["", ""], ["?!", " "]])
def test_where_all_texts_are_empty_every_score_is_0(texts: list[str]) -> None:
    assert LexicalIndex.of_texts(texts).scores("red").tolist() == [0.0, 0.0]


def test_no_texts_have_no_scores() -> None:
    assert LexicalIndex.of_texts([]).scores("red").tolist() == []


def test_a_single_text_can_be_searched() -> None:
    # dl = avgdl: 1 / (1 + 1.5)
    assert LexicalIndex.of_texts(["red apple"]).scores("red").tolist() == pytest.approx([0.4])


def test_building_an_index_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        LexicalIndex.of_texts(CORPUS).scores("red")
    assert caplog.records == []


# -- against another engine ---------------------------------------------------------------------------------------------


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
    index = LexicalIndex.of_texts(texts)
    bound = sum(index.weight(term) for term in tokenize(question))
    assert index.scores(question) * bound == pytest.approx(engine.get_scores(asked), rel=1e-4, abs=1e-5)


# -- postings -----------------------------------------------------------------------------------------------------------

LISTS = st.lists(TEXTS, max_size=8)


def spelled_out(words: Postings) -> list[dict[int, int]]:
    """For each text how often it has each hash."""
    texts: list[dict[int, int]] = [{} for _ in words.lengths]
    for i, term in enumerate(words.terms.tolist()):
        for at in range(words.starts[i], words.starts[i + 1]):
            texts[words.places[at]][term] = int(words.counts[at])
    return texts


def hashed(term: str) -> int:
    return int.from_bytes(hashlib.blake2b(term.encode(), digest_size=8).digest(), "little")


def same(one: Postings, other: Postings) -> None:
    for name in Postings._fields:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_a_term_has_the_same_number_in_every_process() -> None:
    assert hashed("vpn") in count_words(["VPN"]).terms.tolist()


@given(LISTS)
def test_postings_say_how_often_each_term_stands_in_each_text(texts: list[str]) -> None:
    expected = [{hashed(term): count for term, count in Counter(tokenize(text)).items()} for text in texts]
    assert spelled_out(count_words(texts)) == expected


@given(LISTS)
def test_postings_are_in_order_and_of_the_types_that_a_segment_keeps(texts: list[str]) -> None:
    words = count_words(texts)
    assert (np.diff(words.terms.astype(object)) > 0).all()
    assert words.starts[0] == 0
    assert words.starts[-1] == len(words.places) == len(words.counts)
    assert all((np.diff(words.places[first:last]) > 0).all() for first, last in pairwise(words.starts.tolist()))
    assert [getattr(words, name).dtype for name in Postings._fields] == [np.uint64, np.int64, np.int32, np.int8, np.int32]
    assert words.lengths.tolist() == [len(tokenize(text)) for text in texts]


@pytest.mark.parametrize(("times", "kind"), [(127, np.int8), (128, np.uint16), (65_535, np.uint16), (65_536, np.int32)])
def test_counts_are_as_small_as_they_can_be(times: int, kind: type) -> None:
    words = count_words(["a " * times, "b"])
    assert (words.counts.dtype, words.counts.max()) == (kind, times)
    merged = merged_words([(count_words(["b"]), np.array([1])), (words, np.array([0, 2]))])
    assert (merged.counts.dtype, merged.counts.max()) == (kind, times)


def test_texts_are_read_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # a generator is enough, and its texts are counted in blocks that come to the same
    texts = [f"red {i} 重置 apple" if i % 3 else "" for i in range(50)]
    whole = count_words(texts)
    monkeypatch.setattr(lexical, "_BLOCK", 7)
    monkeypatch.setattr(lexical, "_MERGED", 5)
    same(count_words(text for text in texts), whole)


@given(st.lists(LISTS, max_size=4), st.randoms(use_true_random=False))
def test_merged_postings_are_those_of_the_merged_texts(lists: list[list[str]], chance: random.Random) -> None:
    kept = [(i, j) for i, texts in enumerate(lists) for j in range(len(texts)) if chance.random() < 0.7]
    chance.shuffle(kept)
    to = [
        np.array([kept.index((i, j)) if (i, j) in kept else -1 for j in range(len(lists[i]))], dtype=np.int64)
        for i in range(len(lists))
    ]
    merged = merged_words([(count_words(texts), own) for texts, own in zip(lists, to, strict=True)])
    same(merged, count_words([lists[i][j] for i, j in kept]))


# -- a collection that changes ------------------------------------------------------------------------------------------


@given(st.lists(LISTS, max_size=4), st.randoms(use_true_random=False), TEXTS)
def test_a_base_that_grew_and_shrank_scores_as_one_built_at_once(
    lists: list[list[str]], chance: random.Random, question: str
) -> None:
    texts = [text for some in lists for text in some]
    alive = np.array([chance.random() < 0.6 for _ in texts], dtype=bool)
    changed = LexicalIndex([count_words(some) for some in lists], alive)
    fresh = LexicalIndex.of_texts([text for text, lives in zip(texts, alive.tolist(), strict=True) if lives])
    scores = changed.scores(question)
    assert scores[alive].tolist() == fresh.scores(question).tolist()
    assert not scores[~alive].any()
    assert [changed.weight(term) for term in tokenize(question)] == [fresh.weight(term) for term in tokenize(question)]
    assert changed.coverage(question, texts).tolist() == fresh.coverage(question, texts).tolist()


def test_where_all_texts_are_dead_every_score_is_0() -> None:
    assert LexicalIndex([count_words(CORPUS)], np.zeros(3, dtype=bool)).scores("red").tolist() == [0.0, 0.0, 0.0]


def test_no_parts_have_no_scores() -> None:
    index = LexicalIndex([])
    assert (index.scores("red").shape, index.weight("red")) == ((0,), pytest.approx(math.log(2)))


def test_postings_may_be_mapped_and_read_only(tmp_path: Path) -> None:
    words = count_words(CORPUS)
    for name, array in words._asdict().items():
        np.save(tmp_path / f"{name}.npy", array)
    mapped = Postings(*(np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in Postings._fields))
    alive = np.array([True, False, True])
    assert (
        LexicalIndex([mapped], alive).scores("red apple").tolist() == LexicalIndex([words], alive).scores("red apple").tolist()
    )
    same(merged_words([(mapped, np.array([0, -1, 1]))]), count_words([CORPUS[0], CORPUS[2]]))


def test_what_is_remembered_of_questions_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lexical, "_REMEMBERED", 2)
    index = LexicalIndex.of_texts(CORPUS)
    expected = index.best("red apple blue pear car", 3)
    again = index.best("red apple blue pear car", 3)
    assert [values.tolist() for values in again] == [values.tolist() for values in expected]
    assert len(index._frequencies) <= 2
    assert len(index._ceilings) <= 2


# -- some of the texts --------------------------------------------------------------------------------------------------


@given(st.lists(LISTS, max_size=4), st.randoms(use_true_random=False), TEXTS)
def test_the_scores_of_some_texts_are_those_among_all(lists: list[list[str]], chance: random.Random, question: str) -> None:
    alive = np.array([chance.random() < 0.8 for some in lists for _ in some], dtype=bool)
    index = LexicalIndex([count_words(some) for some in lists], alive)
    places = np.array([chance.randrange(len(alive)) for _ in range(5 if len(alive) else 0)], dtype=np.int64)
    assert index.at(question, places).tolist() == index.scores(question)[places].tolist()


@given(st.lists(LISTS, max_size=4), st.randoms(use_true_random=False), TEXTS, st.integers(1, 12))
def test_the_best_texts_are_the_first_of_all_in_order(
    lists: list[list[str]], chance: random.Random, question: str, n: int
) -> None:
    alive = np.array([chance.random() < 0.8 for some in lists for _ in some], dtype=bool)
    index = LexicalIndex([count_words(some) for some in lists], alive)
    scores = index.scores(question)
    expected = [place for place in np.argsort(-scores, kind="stable")[:n].tolist() if scores[place] > 0]
    places, values = index.best(question, n)
    assert places.tolist() == expected
    assert values.tolist() == scores[expected].tolist()


def test_common_words_are_not_added_up_for_the_best_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    # the rare word settles who is best; the lists of the common ones are only looked into for those texts
    index = LexicalIndex.of_texts(["red car"] * 500 + ["zebra apple"] * 3 + ["red zebra"])
    added = []
    monkeypatch.setattr(
        index,
        "_add",
        lambda total, share, found: (added.append(len(found[0].places)), LexicalIndex._add(index, total, share, found)),
    )
    places, _ = index.best("the red zebra", 2)
    assert places.tolist() == [503, 500]
    assert max(added) == 4
