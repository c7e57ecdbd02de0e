"""Making segments: of new documents, and of older segments whose dead rows are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from gemma_rag.index.compressed import Precision, compress
from gemma_rag.lexical import count_words, merged_words
from gemma_rag.storage.arrays import Array, Blocks
from gemma_rag.storage.segments import HEAD, Ints, SegmentData
from gemma_rag.summaries import Summaries, summarize
from gemma_rag.vectors import Floats

Bools: TypeAlias = npt.NDArray[np.bool_]

_BLOCK = 1 << 15
"""Rows that are held at a time while segments are merged."""


class NewDocument(NamedTuple):
    """A document as it goes into a segment.

    Attributes:
        number: Its own, higher than any before.
        category: Number of its category.
        further: Numbers of the other categories that it belongs to.
        chunks: Numbers of its chunks.
        vectors: float32 of shape ``(len(chunks), d)``.
        text: What its words are counted of.
    """

    number: int
    category: int
    further: Sequence[int]
    chunks: Sequence[int]
    vectors: Floats
    text: str


def segment_of(documents: Sequence[NewDocument], dimensions: int, precision: Precision = "float32") -> SegmentData:
    """The segment of new documents, at least one, its tails of some precision."""
    documents = sorted(documents, key=lambda document: (document.category, document.number))
    counts = [len(document.chunks) for document in documents]
    vectors = np.concatenate([np.asarray(document.vectors, dtype=np.float32) for document in documents])
    numbers = np.repeat(np.array([document.number for document in documents], dtype=np.int64), counts)
    categories = np.repeat(np.array([document.category for document in documents], dtype=np.int64), counts)
    guests = np.array([(document.number, code) for document in documents for code in document.further], dtype=np.int64).reshape(
        -1, 2
    )
    head = min(HEAD, dimensions)
    summaries, summarised = _summarised(lambda rows: vectors[rows], numbers, categories, guests)
    tail, scales = compress(np.ascontiguousarray(vectors[:, head:]), precision)
    return SegmentData(
        head=np.ascontiguousarray(vectors[:, :head]),
        tail=tail,
        chunks=np.array([chunk for document in documents for chunk in document.chunks], dtype=np.int64),
        documents=numbers,
        categories=categories,
        guests=guests,
        words=count_words(document.text for document in documents),
        summaries=summaries,
        summarised=summarised,
        scales=scales,
    )


def merged(parts: Sequence[SegmentData], dead: Ints, precision: Precision = "float32") -> tuple[int, dict[str, Array | Blocks]]:
    """Several segments as one, without the rows of dead documents.

    Args:
        parts: The segments.
        dead: Numbers of documents, ascending.
        precision: Of the tails. Tails that have it come out as they went in, the scales of 8 bits to a last digit.

    Returns:
        How many rows there are, and the arrays, the vectors as blocks: they are read while they are written.
    """
    sources = np.repeat(np.arange(len(parts)), [len(part.documents) for part in parts])
    rows = np.concatenate([np.arange(len(part.documents)) for part in parts])
    documents = np.concatenate([part.documents for part in parts])
    categories = np.concatenate([part.categories for part in parts])
    order = np.lexsort((documents, categories))  # stable: the rows of a document stay in their order
    order = order[~_among(documents[order], dead)]
    sources, rows, documents, categories = sources[order], rows[order], documents[order], categories[order]
    guests = np.concatenate([part.guests for part in parts])
    guests = guests[~_among(guests[:, 0], dead)]

    def gathered(some: Ints, of: Callable[[SegmentData, Ints], Floats]) -> Floats:
        own = [np.flatnonzero(sources[some] == i) for i in range(len(parts))]
        taken = np.concatenate([of(part, rows[some[at]]) for part, at in zip(parts, own, strict=True)])
        out = np.empty_like(taken)
        out[np.concatenate(own)] = taken
        return out

    def heads(some: Ints) -> Floats:
        return gathered(some, lambda part, at: part.head[at])

    def tails(some: Ints) -> Floats:
        return gathered(some, SegmentData.tails)

    summaries, summarised = _kept_summaries(
        parts, lambda some: np.concatenate([heads(some), tails(some)], axis=1), documents, categories, guests
    )
    chunks = np.concatenate([part.chunks for part in parts])[order]
    starts = np.flatnonzero(np.diff(documents, prepend=-1))
    words = merged_words([(part.words, _places(_in_order(part.documents), documents[starts])) for part in parts])
    empty = np.zeros((0, 0), dtype=np.float32)
    rest = SegmentData(empty, empty, chunks, documents, categories, guests, words, summaries, summarised).arrays()
    count, scales = len(rows), list[Floats]()
    kind = np.dtype(precision).newbyteorder("<").str
    vectors: dict[str, Array | Blocks] = {
        "head": Blocks("<f4", (count, parts[0].head.shape[1]), _blocks(heads, count)),
        "tail": Blocks(kind, (count, parts[0].tail.shape[1]), _compressed(_blocks(tails, count), precision, scales)),
    }
    if precision == "int8":
        vectors["scales"] = Blocks("<f4", (count,), scales)  # complete by the time that the tails have been written
    return count, {**rest, **vectors}


def _blocks(gathered: Callable[[Ints], Floats], count: int) -> Iterator[Floats]:
    for first in range(0, count, _BLOCK):
        yield gathered(np.arange(first, min(first + _BLOCK, count)))


def _compressed(tails: Iterator[Floats], precision: Precision, scales: list[Floats]) -> Iterator[Array]:
    """The tails as they are stored; their scales, where they have any, go into the list."""
    for block in tails:
        tail, own = compress(block, precision)
        if own is not None:
            scales.append(own)
        yield tail


def _in_order(documents: Ints) -> Ints:
    """The documents of a segment, from those of its rows."""
    return documents[np.flatnonzero(np.diff(documents, prepend=-1))]


def _places(numbers: Ints, among: Ints) -> Ints:
    """Where each number stands among others, -1 where it does not."""
    if not len(among):
        return np.full(len(numbers), -1, dtype=np.int64)
    order = np.argsort(among)
    at = order[np.minimum(np.searchsorted(among, numbers, sorter=order), len(among) - 1)]
    return np.where(among[at] == numbers, at, -1)


def _among(numbers: Ints, some: Ints) -> Bools:
    return np.isin(numbers, some) if len(some) else np.zeros(len(numbers), dtype=bool)


def _members(documents: Ints, categories: Ints, guests: Ints) -> tuple[Ints, list[Ints]]:
    """The categories that have rows or guests, and the rows of each."""
    summarised = np.union1d(categories, guests[:, 1])
    firsts = np.searchsorted(categories, summarised, side="left")
    lasts = np.searchsorted(categories, summarised, side="right")
    members = [np.arange(first, last) for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)]
    if len(guests):
        order = np.argsort(documents, kind="stable")
        ordered = documents[order]
        for number, category in guests.tolist():
            first, last = np.searchsorted(ordered, [number, number + 1]).tolist()
            at = int(np.searchsorted(summarised, category))
            members[at] = np.concatenate([members[at], order[first:last]])
    return summarised, members


def _kept_summaries(
    parts: Sequence[SegmentData], vectors: Callable[[Ints], Floats], documents: Ints, categories: Ints, guests: Ints
) -> tuple[Summaries, Ints]:
    """Summaries of merged rows: those of a category that one segment alone has, and of which nothing died, are taken over."""
    summarised, members = _members(documents, categories, guests)
    sources: dict[int, list[tuple[SegmentData, int]]] = {}
    for part in parts:
        for group, category in enumerate(part.summarised.tolist()):
            sources.setdefault(category, []).append((part, group))
    kept: dict[int, Summaries] = {}
    fresh = []
    for at, category in enumerate(summarised.tolist()):
        (part, group), *others = sources[category]
        if not others and int(part.summaries.sizes[group]) == len(members[at]):
            kept[at] = group_of(part.summaries, group)
        else:
            fresh.append(at)
    made = summarize(vectors, [members[at] for at in fresh])
    kept |= {at: group_of(made, i) for i, at in enumerate(fresh)}
    return joined_summaries([kept[at] for at in range(len(summarised))], made), summarised


def group_of(summaries: Summaries, group: int) -> Summaries:
    """The summary of one group alone."""
    first, last = np.searchsorted(summaries.owners, [group, group + 1]).tolist()
    return Summaries(
        means=summaries.means[group : group + 1],
        sizes=summaries.sizes[group : group + 1],
        directions=summaries.directions[first:last],
        variances=summaries.variances[first:last],
        owners=np.zeros(last - first, dtype=np.int64),
        residuals=summaries.residuals[group : group + 1],
    )


def joined_summaries(groups: Sequence[Summaries], empty: Summaries) -> Summaries:
    """Summaries of one group each, in their order, as one.

    Args:
        groups: One at a time.
        empty: Any summaries, for the shapes where there is no group.
    """
    if not groups:
        return empty
    columns = {name: np.concatenate([getattr(group, name) for group in groups]) for name in Summaries._fields}
    columns["owners"] = np.repeat(np.arange(len(groups)), [len(group.owners) for group in groups]).astype(np.int64)
    return Summaries(**columns)


def _summarised(vectors: Callable[[Ints], Floats], documents: Ints, categories: Ints, guests: Ints) -> tuple[Summaries, Ints]:
    summarised, members = _members(documents, categories, guests)
    return summarize(vectors, members), summarised
