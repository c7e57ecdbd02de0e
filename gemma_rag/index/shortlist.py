"""Which documents of the opened categories deserve a full comparison, by the first components of their vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from gemma_rag.index.compressed import Stored, products
from gemma_rag.vectors import Floats

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_TOGETHER = 4
"""So many questions are worth a matrix product; fewer are looked at one by one."""

_QUESTIONS = 4_096
"""Questions that are looked at together, at most."""

_SAMPLED = 32
"""One row of so many is looked at first, to learn what score will do."""

_SAMPLE = 8_192
"""Rows of a sample, at most, for one question."""

_SCORES = 1 << 18
"""Scores that are computed at once: 1 MiB of them, so that they are still in the cache when they are sifted."""


_SHOWN = 0.5
"""A graph is asked only where more of its documents than this share may be found."""


class Neighbours(Protocol):
    """Something that knows which of a run's rows are near, without a look at each (`gemma_rag.index.graph`)."""

    def nearest(self, query: Floats, n: int) -> Ints:
        """About `n` rows of a run that are nearest to a question of shape ``(d,)``, counted from the run's first."""
        ...


class Run(NamedTuple):
    """The rows of one category in one segment.

    Attributes:
        head: float32 of shape ``(n, h)``: their first components.
        tail: Shape ``(n, d - h)``: the others, as they are stored.
        row: The first row.
        place: The place of the first document.
        end: The place after that of the last.
        starts: The first row of each document, counted from `row`; None where every document has one.
        alive: bool of each document; None where all are there.
        scales: float32 of shape ``(n,)`` where the tail is int8; None elsewhere.
        graph: What finds near rows without a look at each; None: each is looked at.
    """

    head: Floats
    tail: Stored
    row: int
    place: int
    end: int
    starts: Ints | None
    alive: Bools | None
    scales: Floats | None
    graph: Neighbours | None


def shortlists(
    runs: Sequence[Sequence[Run]], queries: Floats, opened: Bools, dimensions: int, length: int, allowed: Bools | None = None
) -> list[Ints]:
    """The documents that score best by the dot product of their first components, of several chunks the best.

    That product is the cosine without what the other components add to it. Divided by the lengths of the cut vectors it
    would find a little more, and a list of twice the length finds more still and costs less (docs/decisions/0011).

    Args:
        runs: Of each category.
        queries: float32 of shape ``(q, d)``.
        opened: bool of shape ``(q, categories)``.
        dimensions: How many components to look at; the ``h`` of the runs is fastest.
        length: How many documents each list should have; it has fewer only where there are no more.
        allowed: bool of each place: others are passed over; None: all may come.

    Returns:
        For each question the places, ascending.
    """
    if len(queries) < _TOGETHER:
        return [_alone(runs, query, gate, dimensions, length, allowed) for query, gate in zip(queries, opened, strict=True)]
    lists = []
    for first in range(0, len(queries), _QUESTIONS):
        some = slice(first, first + _QUESTIONS)
        lists += _together(runs, queries[some], opened[some], dimensions, length, allowed)
    return lists


def _alone(
    runs: Sequence[Sequence[Run]], query: Floats, gate: Bools, dimensions: int, length: int, allowed: Bools | None
) -> Ints:
    """The shortlist of one question."""
    own = [run for code in np.flatnonzero(gate).tolist() for run in runs[code]]
    by_graph = [run for run in own if run.graph is not None and run.end - run.place > length]
    near = {id(run): named for run in by_graph if (named := _near(run, query, dimensions, length, allowed)) is not None}
    own = [run for run in own if id(run) not in near]
    places = np.array([run.place for run in own], dtype=np.int64)
    sizes = np.array([run.end - run.place for run in own], dtype=np.int64)
    ends = np.cumsum(sizes)
    scores = np.empty(int(sizes.sum()), dtype=np.float32)
    for run, first, last in zip(own, (ends - sizes).tolist(), ends.tolist(), strict=True):
        mine = scores[first:last]
        if run.starts is None:
            _row_products(query, run, dimensions, mine)
        else:
            np.maximum.reduceat(_row_products(query, run, dimensions), run.starts, out=mine)
        if (hidden := _hidden(run, allowed, run.place, run.end)) is not None:
            mine[hidden] = -np.inf
    best = _top(scores, length)
    found = best + (places - ends + sizes)[np.searchsorted(ends, best, side="right")] if len(best) else best
    if near:
        found = np.concatenate([found, *(some for some, _ in near.values())])
        found = found[_top(np.concatenate([scores[best], *(of for _, of in near.values())]), length)]
    return np.sort(found)


def _near(run: Run, query: Floats, dimensions: int, length: int, allowed: Bools | None) -> tuple[Ints, Floats] | None:
    """Places that the graph of a run names, and their scores; None: it names too few, as where most are hidden."""
    if run.graph is None:
        return None
    hidden = _hidden(run, allowed, run.place, run.end)
    shown = 1.0 if hidden is None else 1.0 - float(hidden.mean())
    documents = run.end - run.place
    asked = int(1.2 * length * len(run.head) / documents / shown) if shown > _SHOWN else 0
    rows = np.sort(run.graph.nearest(query, asked)) if asked else np.zeros(0, dtype=np.int64)
    owners = rows if run.starts is None else np.searchsorted(run.starts, rows, side="right") - 1
    if hidden is not None:
        rows, owners = rows[~hidden[owners]], owners[~hidden[owners]]
    found, firsts = np.unique(owners, return_index=True)
    if len(found) < length:
        return None
    named = run._replace(head=run.head[rows], tail=run.tail[rows], scales=None if run.scales is None else run.scales[rows])
    return found + run.place, np.maximum.reduceat(_row_products(query, named, dimensions), firsts)


def _row_products(query: Floats, run: Run, dimensions: int, out: Floats | None = None) -> Floats:
    width = run.head.shape[1]
    head = run.head if dimensions >= width else run.head[:, :dimensions]
    scores: Floats = np.dot(head, query[: min(dimensions, width)], out=out)
    if dimensions > width:
        scores += products(query[None, width:dimensions], run.tail[:, : dimensions - width], run.scales)[0]
    return scores


def _hidden(run: Run, allowed: Bools | None, first: int, last: int) -> Bools | None:
    """Which documents from one place to another must not come; None: all may."""
    dead = None if run.alive is None else ~run.alive[first - run.place : last - run.place]
    if allowed is None:
        return dead
    return ~allowed[first:last] if dead is None else dead | ~allowed[first:last]


def _top(scores: Floats, n: int) -> Ints:
    """Where the `n` largest scores stand, in no order; those of minus infinity are none."""
    candidates: Ints | None = None
    if len(scores) > 2 * _SAMPLED * n:  # a sample says what is certainly too low, so that few are left to choose from
        candidates = np.flatnonzero(scores > _least(scores[::_SAMPLED], n / _SAMPLED))
    if candidates is None or len(candidates) < n:
        candidates = np.flatnonzero(scores > -np.inf)
    if len(candidates) > n:
        candidates = candidates[np.argpartition(scores[candidates], len(candidates) - n)[len(candidates) - n :]]
    return candidates


def _least(sample: Floats, expected: float) -> float:
    """A score that, of the whole, more than are wanted will surpass, except once in many hundred times.

    Args:
        sample: Some of the scores.
        expected: How many of the sample would be among those wanted.
    """
    rank = int(expected + 3.0 * np.sqrt(expected) + 3.0)  # three standard deviations of how many of them a sample catches
    if rank >= len(sample):
        return -np.inf
    lowest = np.partition(sample, len(sample) - rank)[len(sample) - rank]
    return float(np.nextafter(lowest, np.float32(-np.inf)))


def _together(
    runs: Sequence[Sequence[Run]], queries: Floats, opened: Bools, dimensions: int, length: int, allowed: Bools | None
) -> list[Ints]:
    """The shortlists of many questions: each category is looked at once, for all who opened it."""
    asked = [
        (run, np.flatnonzero(opened[:, code])) for code in np.flatnonzero(opened.any(axis=0)).tolist() for run in runs[code]
    ]
    cut = np.ascontiguousarray(queries[:, :dimensions])
    least = _thresholds(asked, cut, length, allowed)
    askers, places, scores = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.float32)]
    for run, asking in asked:
        own, bar = cut[asking], least[asking, None]
        for first, found in _blocks(run, own, allowed):
            hits = np.flatnonzero(found > bar)
            question, place = np.divmod(hits, found.shape[1])
            askers.append(asking[question])
            places.append(place + first)
            scores.append(found.reshape(-1)[hits])
    asker = np.concatenate(askers)
    order = np.argsort(asker.astype(np.uint16), kind="stable")  # of 16 bits, so that it is sorted by counting
    place, score = np.concatenate(places)[order], np.concatenate(scores)[order]
    ends = np.cumsum(np.bincount(asker, minlength=len(queries))).tolist()
    lists = []
    for i, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end - begin < length and least[i] > -np.inf:  # the sample promised too much
            lists.append(_alone(runs, queries[i], opened[i], dimensions, length, allowed))
        else:
            lists.append(np.sort(place[begin:end][_top(score[begin:end], length)]))
    return lists


def _thresholds(asked: Sequence[tuple[Run, Ints]], cut: Floats, length: int, allowed: Bools | None) -> Floats:
    """For each question a score that few more than are wanted will surpass."""
    rows = np.zeros(len(cut), dtype=np.int64)
    documents = np.zeros(len(cut), dtype=np.int64)
    for run, asking in asked:
        rows[asking] += len(run.head)
        documents[asking] += run.end - run.place
    step = max(_SAMPLED, -(-int(rows.max(initial=0)) // _SAMPLE))
    samples: list[list[Floats]] = [[] for _ in cut]
    for run, asking in asked:
        start = -run.row % step  # by rows of the whole, so that small runs do not weigh more than they hold
        scores = _products(cut[asking], run, slice(start, None, step))
        if run.alive is not None or allowed is not None:
            taken = np.arange(start, len(run.head), step)
            if run.starts is not None:
                taken = np.searchsorted(run.starts, taken, side="right") - 1
            hidden = _hidden(run, allowed, run.place, run.end)
            if hidden is not None:
                scores = scores[:, ~hidden[taken]]
        for question, own in zip(asking.tolist(), scores, strict=True):
            samples[question].append(own)
    chunks = rows / np.maximum(documents, 1)
    return np.array(
        [
            _least(np.concatenate(own), length * each / step) if own else -np.inf
            for own, each in zip(samples, chunks.tolist(), strict=True)
        ],
        dtype=np.float32,
    )


def _blocks(run: Run, queries: Floats, allowed: Bools | None) -> Iterator[tuple[int, Floats]]:
    """Scores of the documents of a run, a cacheful at a time, each with the place of its first document."""
    rows = max(1, _SCORES // len(queries))
    if run.starts is None:
        firsts = list(range(0, len(run.head), rows))
    else:
        firsts = np.unique(np.searchsorted(run.starts, np.arange(0, len(run.head), rows), side="right") - 1).tolist()
    for first, last in zip(firsts, [*firsts[1:], run.end - run.place], strict=True):
        if run.starts is None:
            scores = _products(queries, run, slice(first, last))
        else:
            row = int(run.starts[first])
            end = int(run.starts[last]) if last < len(run.starts) else len(run.head)
            scores = np.maximum.reduceat(_products(queries, run, slice(row, end)), run.starts[first:last] - row, axis=1)
        if (hidden := _hidden(run, allowed, run.place + first, run.place + last)) is not None:
            scores[:, hidden] = -np.inf
        yield run.place + first, scores


def _products(queries: Floats, run: Run, rows: slice) -> Floats:
    """Dot products of cut questions with rows of a run, shape ``(q, rows)``."""
    dimensions, width = queries.shape[1], run.head.shape[1]
    scores: Floats = queries[:, :width] @ run.head[rows, :dimensions].T
    if dimensions > width:
        scales = None if run.scales is None else run.scales[rows]
        scores += products(queries[:, width:], run.tail[rows, : dimensions - width], scales)
    return scores
