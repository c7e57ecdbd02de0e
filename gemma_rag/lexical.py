"""Words that match: BM25, for Chinese and for languages that put spaces between words.

Chinese, traditional folded into simplified, is cut into words by rjieba and into single characters and pairs of them;
everything else into runs of letters and digits, with their English stems and, of long ones, their first letters. Scores
are scaled by what the question could score at most, so that they can be compared between questions.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gemma_rag.vectors import Floats

_HAN = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_RUNS = re.compile(rf"[{_HAN}]+|[^\W_{_HAN}]+")
_IS_HAN = re.compile(rf"[{_HAN}]")
_K1, _B = 1.5, 0.75
_STEMMING = threading.Lock()
_START = 4
"""Letters of a long word that stand for its other forms too, in whatever language."""


def reads_as_chinese(text: str) -> bool:
    """Whether at least half of a text's words are Chinese, two Han characters counted as a word."""
    runs = _RUNS.findall(unicodedata.normalize("NFKC", text))
    han = sum(max(1.0, len(run) / 2) for run in runs if _IS_HAN.match(run))
    other = sum(1 for run in runs if not _IS_HAN.match(run))
    return han > 0 and han >= other


def tokenize(text: str) -> list[str]:
    """Cut a text into the terms that are matched.

    Full-width and half-width forms are read alike (Unicode NFKC), so are traditional and simplified characters
    (OpenCC); case is folded, punctuation dropped. A run of Han characters gives the words that rjieba's search mode
    finds, then each character and each pair of neighbours: neither way of cutting alone matches as much
    (docs/decisions/0007). Any other run gives itself, its English stem (Snowball) and, of at least four letters, the
    first four, which does for other languages what the stem does for English: another form of a word is met less well
    than the same one, and still met.

    >>> tokenize("Reset PINs: 重置")
    ['reset', '~reset', 'rese*', 'pins', '~pin', 'pins*', '重置', '重', '置', '重置']
    """
    import rjieba

    plain = unicodedata.normalize("NFKC", text).casefold()
    if _IS_HAN.search(plain):
        plain = _simplified().convert(plain)
    terms: list[str] = []
    for run in _RUNS.findall(plain):
        if _IS_HAN.match(run):
            terms += rjieba.cut_for_search(run)
            terms += run
            terms += [run[i : i + 2] for i in range(len(run) - 1)]
        else:
            terms += [run, f"~{_stem(run)}"]
            if len(run) >= _START:
                terms.append(f"{run[:_START]}*")
    return terms


@lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    with _STEMMING:  # a stemmer keeps the word that it is at
        stem: str = _stemmer().stemWord(word)
        return stem


@lru_cache(maxsize=1)
def _stemmer() -> Any:
    import snowballstemmer

    return snowballstemmer.stemmer("english")


@lru_cache(maxsize=1)
def _simplified() -> Any:
    import opencc

    return opencc.OpenCC("t2s")


class Counted(NamedTuple):
    """How often each term occurs in a text.

    Attributes:
        terms: int32 of shape ``(m,)``: the numbers of its terms in a `Vocabulary`, ascending.
        counts: int32 of shape ``(m,)``.
    """

    terms: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]


class Vocabulary:
    """A number for each term that was ever seen. It grows; several indexes may share it, and so may threads."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._guard = threading.Lock()

    def __len__(self) -> int:
        return len(self._numbers)

    def count(self, text: str) -> Counted:
        """Count the terms of a text."""
        found = Counter(tokenize(text))
        with self._guard:
            pairs = sorted((self._numbers.setdefault(term, len(self._numbers)), n) for term, n in found.items())
        table = np.array(pairs, dtype=np.int32).reshape(-1, 2)
        return Counted(table[:, 0].copy(), table[:, 1].copy())

    def number(self, term: str) -> int | None:
        """The number of a term, or None."""
        return self._numbers.get(term)


class LexicalIndex:
    """BM25 over a fixed list of texts: the form of Lucene, k1 = 1.5, b = 0.75.

    The formula is that of Robertson and Zaragoza (2009), its forms are compared by Kamphuis et al. (ECIR 2020). Texts
    are counted once and indexed often, since a collection changes a little at a time: 100,000 short documents that were
    counted before take about a second.

    Args:
        texts: What to search, as texts or as counted by `vocabulary`; a text may be empty.
        vocabulary: What numbers the terms.
    """

    def __init__(self, texts: Sequence[str | Counted], vocabulary: Vocabulary | None = None) -> None:
        self._vocabulary = vocabulary = vocabulary if vocabulary is not None else Vocabulary()
        counted = [vocabulary.count(text) if isinstance(text, str) else text for text in texts]
        self._count = len(counted)
        terms = np.concatenate([item.terms for item in counted]) if counted else np.zeros(0, dtype=np.int32)
        counts = np.concatenate([item.counts for item in counted]) if counted else np.zeros(0, dtype=np.int32)
        sizes = [len(item.terms) for item in counted]
        places = np.repeat(np.arange(len(counted), dtype=np.int32), sizes)
        lengths = np.bincount(places, weights=counts, minlength=len(counted))
        longer = _K1 * (1.0 - _B + _B * lengths / (lengths.mean() if lengths.any() else 1.0))
        self._document_frequency = np.bincount(terms, minlength=len(vocabulary))
        self._ends = np.cumsum(self._document_frequency)
        order = np.argsort(terms, kind="stable")
        self._places = places[order]
        self._saturated = (counts / (counts + longer[places]))[order].astype(np.float32)

    def scores(self, question: str) -> Floats:
        """Score every text for a question.

        Returns:
            float32 of shape ``(texts,)``, 0 to 1: the BM25 score divided by its least upper bound, the sum of the
            inverse document frequencies of the question's terms (terms that no text has included). 0: none in common.
        """
        total = np.zeros(self._count, dtype=np.float64)
        bound = 0.0
        for term, times in Counter(tokenize(question)).items():
            weight = times * self.weight(term)
            bound += weight
            number = self._vocabulary.number(term)
            if number is not None and number < len(self._ends):
                last = self._ends[number]
                first = last - self._document_frequency[number]
                total[self._places[first:last]] += weight * self._saturated[first:last]
        shares: Floats = np.clip(total / bound if bound else total, 0.0, 1.0).astype(np.float32)
        return shares

    def coverage(self, question: str, passages: Sequence[str]) -> Floats:
        """What share of a question each passage speaks of.

        Args:
            question: The question.
            passages: Any texts, whether indexed or not.

        Returns:
            float32 of shape ``(passages,)``, 0 to 1: the inverse document frequencies of the question's terms that occur in
            the passage, divided by those of all its terms. How often they occur and how long the passage is play no part.
        """
        weights: dict[str, float] = {}
        for term in tokenize(question):
            weights[term] = weights.get(term, 0.0) + self.weight(term)
        total = sum(weights.values())
        if not total:
            return np.zeros(len(passages), dtype=np.float32)
        found = [sum(weights[term] for term in weights.keys() & set(tokenize(passage))) for passage in passages]
        return np.array([min(1.0, share / total) for share in found], dtype=np.float32)

    def weight(self, term: str) -> float:
        """The inverse document frequency of a term, ``ln(1 + (N - n + 0.5) / (n + 0.5))``; always above 0."""
        number = self._vocabulary.number(term)
        n = int(self._document_frequency[number]) if number is not None and number < len(self._ends) else 0
        return float(np.log(1.0 + (self._count - n + 0.5) / (n + 0.5)))
