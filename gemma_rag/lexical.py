"""Words that match: BM25, for Chinese and for languages that put spaces between words.

Chinese, traditional folded into simplified, is cut into words by rjieba and into single characters and pairs of them;
everything else into runs of letters and digits, with their English stems and, of long ones, their first letters. Scores
are scaled by what the question could score at most, so that they can be compared between questions.
"""

from __future__ import annotations

import math
import re
import threading
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from gemma_rag.vectors import Floats

Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]

_HAN = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_RUNS = re.compile(rf"[{_HAN}]+|[^\W_{_HAN}]+")
_IS_HAN = re.compile(rf"[{_HAN}]")
_K1, _B = 1.5, 0.75
_STEMMING = threading.Lock()
_START = 4
"""Letters of a long word that stand for its other forms too, in whatever language."""

_BLOCK = 1 << 19
"""Runs of letters that are counted at a time."""

_MERGED = 1 << 21
"""Postings that are merged at a time."""

_CACHED = 1 << 15
"""Postings that are scored at a time."""

_REMEMBERED = 1 << 16
"""Terms of questions of which an index remembers what took a look at all their postings."""

_ROUNDING = 1e-4
"""By how much sums of float32 in another order may differ, generously."""


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
    return [term for run in _runs(text) for term in _terms(run)]


def _runs(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKC", text).casefold()
    if _IS_HAN.search(plain):
        plain = _simplified().convert(plain)
    return _RUNS.findall(plain)


def _terms(run: str) -> list[str]:
    if not _IS_HAN.match(run):
        return [run, f"~{_stem(run)}", f"{run[:_START]}*"] if len(run) >= _START else [run, f"~{_stem(run)}"]
    import rjieba

    return [*rjieba.cut_for_search(run), *run, *(run[i : i + 2] for i in range(len(run) - 1))]


@lru_cache(maxsize=1 << 18)
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


class Postings(NamedTuple):
    """The words of a list of texts: which terms there are, and the texts that each stands in.

    Attributes:
        terms: uint64 of shape ``(t,)``, ascending: a hash of each term, the same in every process.
        starts: int64 of shape ``(t + 1,)``: where the postings of each term begin, and where the last ones end.
        places: int32 of shape ``(p,)``: the place of a text in the list, ascending within a term.
        counts: int8, uint16 or int32, whichever is enough, of shape ``(p,)``: how often the term stands in that text.
        lengths: int32 of shape ``(texts,)``: how many terms each text has.
    """

    terms: npt.NDArray[np.uint64]
    starts: Ints
    places: npt.NDArray[np.int32]
    counts: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]


def count_words(texts: Iterable[str]) -> Postings:
    """Count the terms of texts, which are read one at a time and not kept."""
    blocks, firsts, first = [], [], 0
    numbers: defaultdict[str, int] = defaultdict()
    numbers.default_factory = numbers.__len__  # a new run gets the next number
    runs, sizes = array("i"), array("i")

    def finish() -> None:
        nonlocal first
        blocks.append(_counted(list(numbers), np.array(runs, dtype=np.int64), np.array(sizes, dtype=np.int64)))
        firsts.append(first)
        first += len(sizes)
        numbers.clear()
        del runs[:], sizes[:]

    for text in texts:
        found = _runs(text)
        runs.extend(map(numbers.__getitem__, found))
        sizes.append(len(found))
        if len(runs) >= _BLOCK:
            finish()
    if sizes or not blocks:
        finish()
    if len(blocks) == 1:
        return blocks[0]
    return merged_words([(block, at + np.arange(len(block.lengths))) for block, at in zip(blocks, firsts, strict=True)])


def _counted(names: Sequence[str], runs: Ints, sizes: Ints) -> Postings:
    """The postings of texts that were cut into runs.

    Args:
        names: The runs that there are.
        runs: Shape ``(m,)``: the number of each run of each text, text by text.
        sizes: Shape ``(texts,)``: how many runs each text has.
    """
    terms = [_terms(name) for name in names]
    counts = np.array([len(some) for some in terms], dtype=np.int64)
    hashes = np.array([_hash(term) for some in terms for term in some], dtype=np.uint64)
    distinct, ranks = np.unique(hashes, return_inverse=True)
    starts = np.cumsum(counts) - counts
    each = counts[runs]
    ends = np.cumsum(each)
    found = ranks.reshape(-1)[np.arange(each.sum()) + np.repeat(starts[runs] - (ends - each), each)]
    places = np.repeat(np.repeat(np.arange(len(sizes)), sizes), each)
    keys = np.sort(found * len(sizes) + places)
    firsts = np.flatnonzero(np.diff(keys, prepend=-1))
    keys, often = keys[firsts], np.diff(firsts, append=len(keys))
    of, at = np.divmod(keys, max(1, len(sizes)))
    return Postings(
        terms=distinct,
        starts=np.searchsorted(of, np.arange(len(distinct) + 1)),
        places=at.astype(np.int32),
        counts=_small(often),
        lengths=np.bincount(places, minlength=len(sizes)).astype(np.int32),
    )


def _small(counts: npt.NDArray[Any]) -> npt.NDArray[Any]:
    most = int(counts.max(initial=0))
    return counts.astype(np.int8 if most < 1 << 7 else np.uint16 if most < 1 << 16 else np.int32)


@lru_cache(maxsize=1 << 18)
def _hash(term: str) -> int:
    return int.from_bytes(blake2b(term.encode(), digest_size=8).digest(), "little")


def merged_words(parts: Sequence[tuple[Postings, Ints]]) -> Postings:
    """Several lists of texts as one, or one with texts left out.

    Args:
        parts: The postings of each list, and for each of its texts the place in the new list, each taken once and none
            left free; -1 leaves the text out.
    """
    texts = sum(int((to >= 0).sum()) for _, to in parts)
    lengths = np.zeros(texts, dtype=np.int32)
    for part, to in parts:
        lengths[to[to >= 0]] = part.lengths[to >= 0]
    every = np.unique(np.concatenate([np.zeros(0, dtype=np.uint64), *(part.terms for part, _ in parts)]))
    ranks = [np.searchsorted(every, part.terms) for part, _ in parts]
    sizes = np.zeros(len(every), dtype=np.int64)
    for (part, _), rank in zip(parts, ranks, strict=True):
        sizes[rank] += np.diff(part.starts)
    ends = np.cumsum(sizes)
    found, often, frequencies = [], [], []
    first = 0
    while first < len(every):
        last = max(first + 1, int(np.searchsorted(ends, ends[first] - sizes[first] + _MERGED, side="right")))
        keys, counts = [], []
        for (part, to), rank in zip(parts, ranks, strict=True):
            low, high = np.searchsorted(rank, [first, last]).tolist()
            start, end = part.starts[[low, high]].tolist()
            places = to[part.places[start:end]]
            of = np.repeat(rank[low:high] - first, np.diff(part.starts[low : high + 1]))
            kept = places >= 0
            keys.append((of * texts + places)[kept])
            counts.append(part.counts[start:end][kept])
        key, count = np.concatenate(keys), np.concatenate(counts)
        order = np.argsort(key)
        of, place = np.divmod(key[order], max(1, texts))
        found.append(place.astype(np.int32))
        often.append(_small(count[order]))
        frequencies.append(np.bincount(of, minlength=last - first))
        first = last
    frequency = np.concatenate([np.zeros(0, dtype=np.int64), *frequencies])
    return Postings(
        terms=every[frequency > 0],
        starts=np.concatenate([[0], np.cumsum(frequency[frequency > 0])]).astype(np.int64),
        places=np.concatenate([np.zeros(0, dtype=np.int32), *found]),
        counts=_small(np.concatenate([np.zeros(0, dtype=np.int8), *often])),
        lengths=lengths,
    )


class _Found(NamedTuple):
    """The postings of a term in one part: the number of the part, the places in it, the counts there."""

    part: int
    places: npt.NDArray[np.int32]
    counts: npt.NDArray[Any]


class LexicalIndex:
    """BM25 over a fixed list of texts: the form of Lucene, k1 = 1.5, b = 0.75.

    The formula is that of Robertson and Zaragoza (2009), its forms are compared by Kamphuis et al. (ECIR 2020). Texts
    that are dead play no part: the statistics are those of the living ones alone. Making an index costs little, for
    nothing is read of the postings until a question asks for it.

    Args:
        parts: The texts, in parts whose places follow each other.
        alive: bool of shape ``(texts,)``: which of them count; None: all.
    """

    def __init__(self, parts: Sequence[Postings], alive: Bools | None = None) -> None:
        self._parts = parts
        self._alive = alive
        self._firsts = np.cumsum([0, *(len(part.lengths) for part in parts)]).tolist()
        lengths = np.concatenate([np.zeros(0, dtype=np.int32), *(part.lengths for part in parts)])
        self._count = len(lengths) if alive is None else int(alive.sum())
        total = int(lengths.sum(dtype=np.int64) if alive is None else lengths.sum(where=alive, dtype=np.int64))
        mean = total / self._count if total else 1.0
        self._longer = (_K1 * (1.0 - _B + _B * lengths / mean)).astype(np.float32)
        if alive is not None:
            self._longer[~alive] = np.inf  # the share of a count in it is 0
        self._frequencies: dict[str, int] = {}
        self._ceilings: dict[str, float] = {}

    @classmethod
    def of_texts(cls, texts: Sequence[str]) -> LexicalIndex:
        """An index of texts, each of which may be empty."""
        return cls([count_words(texts)])

    def scores(self, question: str) -> Floats:
        """Score every text for a question.

        Returns:
            float32 of shape ``(texts,)``, 0 to 1: the BM25 score divided by its least upper bound, the sum of the
            inverse document frequencies of the question's terms (terms that no text has included). 0: none in common,
            or dead.
        """
        total = np.zeros(self._firsts[-1], dtype=np.float32)
        for share, _, found in self._asked(question):
            self._add(total, share, found)
        np.minimum(total, np.float32(1.0), out=total)
        return total

    def at(self, question: str, places: Ints) -> Floats:
        """Score some of the texts for a question: cheaper than to score them all where they are few.

        Args:
            question: The question.
            places: Shape ``(n,)``: their places.

        Returns:
            float32 of shape ``(n,)``: what `scores` has there.
        """
        order = np.argsort(places)
        total = np.zeros(len(places), dtype=np.float32)
        for share, _, found in self._asked(question):
            self._look_up(total, share, found, places[order])
        scores = np.empty_like(total)
        scores[order] = np.minimum(total, np.float32(1.0))
        return scores

    def best(self, question: str, n: int) -> tuple[Ints, Floats]:
        """The texts that score best for a question, without scoring them all (MaxScore, Turtle and Flood 1995).

        Terms that can add most come first. Once what the others can add together is less than the n-th best score so
        far, a text with none of the first ones cannot be among the best, and the long lists of common words are only
        looked into for the texts that still can. Where no rare word settles it, all texts are scored.

        Args:
            question: The question.
            n: How many, at least 1.

        Returns:
            Their places, and what `scores` has there: at most n, all above 0, best first, of equals the first.
        """
        asked = [(float(share) * self._ceiling(term, found), share, found) for share, term, found in self._asked(question)]
        asked.sort(key=lambda item: -item[0])
        left = np.cumsum([most for most, _, _ in reversed(asked)])[::-1] * (1.0 + _ROUNDING)
        total = np.zeros(self._firsts[-1], dtype=np.float32)
        cheap = max(len(total) // 8, sum(len(item.places) for _, _, found in asked for item in found) // 4)
        touched = [np.zeros(0, dtype=np.int64)]
        enough = 0.0
        at = 0
        while at < len(asked) and left[at] >= enough:
            _, share, found = asked[at]
            own = np.concatenate([item.places + np.int64(self._firsts[item.part]) for item in found])
            if (cheap := cheap - len(own)) < 0:
                return _first(np.arange(len(total)), self.scores(question), n)
            self._add(total, share, found)
            touched.append(own)
            enough = max(enough, _least_of(total[own], n))
            at += 1
        places = np.concatenate(touched)
        places = np.unique(places[total[places] + left[at:].max(initial=0.0) >= enough])
        partial = total[places]
        for (_, share, found), rest in zip(asked[at:], left[at:].tolist(), strict=True):
            kept = partial + rest >= (enough := max(enough, _least_of(partial, n)))
            places, partial = places[kept], partial[kept]
            self._look_up(partial, share, found, places)
        return _first(places, self.at(question, places), n)

    def coverage(self, question: str, passages: Sequence[str]) -> Floats:
        """What share of a question each passage speaks of.

        Args:
            question: The question.
            passages: Any texts, whether indexed or not.

        Returns:
            float32 of shape ``(passages,)``, 0 to 1: the inverse document frequencies of the question's terms that occur in
            the passage, divided by those of all its terms. How often they occur and how long the passage is play no part.
        """
        weights = self._weights(question)
        total = sum(weights.values())
        if not total:
            return np.zeros(len(passages), dtype=np.float32)
        found = [sum(weights[term] for term in weights.keys() & set(tokenize(passage))) for passage in passages]
        return np.array([min(1.0, share / total) for share in found], dtype=np.float32)

    def weight(self, term: str) -> float:
        """The inverse document frequency of a term, ``ln(1 + (N - n + 0.5) / (n + 0.5))``; always above 0."""
        n = self._frequencies.get(term)
        if n is None:
            if len(self._frequencies) >= _REMEMBERED:
                self._frequencies.clear()
            n = self._frequencies[term] = sum(
                len(standing) if self._alive is None else int(self._alive[self._firsts[number] :][standing].sum())
                for number, standing, _ in self._found(term)
            )
        return math.log(1.0 + (self._count - n + 0.5) / (n + 0.5))

    def _weights(self, question: str) -> dict[str, float]:
        """The terms of a question, each with its inverse document frequency times how often it stands."""
        return {term: times * self.weight(term) for term, times in Counter(tokenize(question)).items()}

    def _asked(self, question: str) -> Iterator[tuple[np.float32, str, list[_Found]]]:
        """The terms of a question that texts have: the share of each in the highest score, and its postings."""
        weights = self._weights(question)
        bound = sum(weights.values())
        for term, weight in weights.items():
            if found := self._found(term):
                yield np.float32(weight / bound), term, found

    def _found(self, term: str) -> list[_Found]:
        wanted = np.uint64(_hash(term))
        found = []
        for number, part in enumerate(self._parts):
            at = int(np.searchsorted(part.terms, wanted))
            if at < len(part.terms) and part.terms[at] == wanted:
                start, end = int(part.starts[at]), int(part.starts[at + 1])
                found.append(_Found(number, part.places[start:end], part.counts[start:end]))
        return found

    def _add(self, total: Floats, share: np.float32, found: Sequence[_Found]) -> None:
        """Add what a term is worth to the texts that it stands in, a few at a time, so that they stay in the cache."""
        for number, standing, counts in found:
            own, longer = (array[self._firsts[number] : self._firsts[number + 1]] for array in (total, self._longer))
            for first in range(0, len(standing), _CACHED):
                places = standing[first : first + _CACHED].astype(np.intp)
                often = counts[first : first + _CACHED].astype(np.float32)
                worth = longer.take(places, mode="clip")  # every place is inside; "raise" would copy
                worth += often
                np.divide(often, worth, out=worth)
                worth *= share
                worth += own.take(places, mode="clip")
                own[places] = worth

    def _look_up(self, total: Floats, share: np.float32, found: Sequence[_Found], places: Ints) -> None:
        """Add what a term is worth to some texts, whose places are ascending."""
        for part, standing, counts in found:
            low, high = np.searchsorted(places, self._firsts[part : part + 2]).tolist()
            wanted = (places[low:high] - self._firsts[part]).astype(np.int32)
            nearest = np.minimum(np.searchsorted(standing, wanted), len(standing) - 1)
            hits = np.flatnonzero(standing[nearest] == wanted)
            often = counts[nearest[hits]].astype(np.float32)
            total[low:high][hits] += share * (often / (often + self._longer[places[low:high][hits]]))

    def _ceiling(self, term: str, found: Sequence[_Found]) -> float:
        """The most that a share of a term is worth in any text."""
        if (most := self._ceilings.get(term)) is None:
            if len(self._ceilings) >= _REMEMBERED:
                self._ceilings.clear()
            most = 0.0
            for number, standing, counts in found:
                often = counts.astype(np.float32)
                worth = often / (often + self._longer[self._firsts[number] :][standing])
                most = max(most, float(worth.max(initial=0.0)))
            self._ceilings[term] = most
        return most


def _least_of(values: Floats, n: int) -> float:
    """What the n best of them reach at least, whatever the order that they were summed in; 0 where there are fewer."""
    return float(np.partition(values, -n)[-n]) * (1.0 - _ROUNDING) if len(values) >= n else 0.0


def _first(places: Ints, scores: Floats, n: int) -> tuple[Ints, Floats]:
    """The n best scores above 0, best first, of equals the first."""
    if len(scores) > n:  # sort no more than is needed
        kept = np.flatnonzero(scores >= np.partition(scores, -n)[-n])
        places, scores = places[kept], scores[kept]
    order = np.lexsort((places, -scores))[:n]
    order = order[scores[order] > 0.0]
    return places[order], scores[order]
