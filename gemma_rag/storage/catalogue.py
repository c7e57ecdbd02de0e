"""What a knowledge base on a server keeps beside its rows: categories, their sizes, what stage one and BM25 have to know.

Every commit writes one record of what it changed, put together with the records before it that are not much larger, so that
of n commits about log2(n) records remain. Joining the summaries of two groups is exact in sizes, means and total variance;
the directions of spread are those of what both groups kept of theirs (as in incremental PCA: Levey and Lindenbaum, 2000).
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from gemma_rag.documents import Category
from gemma_rag.errors import KnowledgeBaseError
from gemma_rag.lexical import count_words
from gemma_rag.storage.base import StoredCategory
from gemma_rag.summaries import Summaries
from gemma_rag.vectors import Floats

PREFIX = "state-"
_DIRECTIONS = 8
_MOST_RECORDS = 12


class Group(NamedTuple):
    """What stage one knows of some vectors of one category.

    Attributes:
        mean: float32 of shape ``(d,)``.
        size: How many vectors there are.
        directions: float32 of shape ``(m, d)``, unit rows, m at most 8.
        variances: float32 of shape ``(m,)``: along each direction.
        residual: The mean variance along any other direction.
    """

    mean: Floats
    size: int
    directions: Floats
    variances: Floats
    residual: float

    @property
    def total(self) -> float:
        """The variance over all directions."""
        return float(self.variances.sum()) + self.residual * max(1, len(self.mean) - len(self.variances))


class Words(NamedTuple):
    """In how many documents each word occurs: what BM25 asks of a collection; in a record, by how much that has changed.

    Attributes:
        terms: uint64 of shape ``(t,)``, ascending: hashes, as in `gemma_rag.lexical.Postings`.
        frequencies: int64 of shape ``(t,)``.
        documents: How many documents there are.
        length: How many terms they have together.
    """

    terms: npt.NDArray[np.uint64]
    frequencies: npt.NDArray[np.int64]
    documents: int
    length: int

    @classmethod
    def of_texts(cls, texts: Iterable[str], sign: int = 1) -> Words:
        """Of texts; with -1 as the sign, what it means that they are gone."""
        counted = count_words(texts)
        length = int(counted.lengths.sum(dtype=np.int64))
        return cls(counted.terms, sign * np.diff(counted.starts), sign * len(counted.lengths), sign * length)

    def plus(self, other: Words) -> Words:
        """Both together; a word that no document has any more is forgotten."""
        terms, where = np.unique(np.concatenate([self.terms, other.terms]), return_inverse=True)
        total = np.zeros(len(terms), dtype=np.int64)
        np.add.at(total, where, np.concatenate([self.frequencies, other.frequencies]))
        some = total != 0
        return Words(terms[some], total[some], self.documents + other.documents, self.length + other.length)

    def frequency(self, term: np.uint64) -> int:
        """How many documents have the word with this hash."""
        at = int(np.searchsorted(self.terms, term))
        return int(self.frequencies[at]) if at < len(self.terms) and self.terms[at] == term else 0


NO_WORDS = Words(np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64), 0, 0)


class Record(NamedTuple):
    """What commits of generations `since` to `generation` changed.

    Attributes:
        since: The first.
        generation: The last.
        content: `Manifest.content_sha256` after the last.
        counts: For each category how many documents it has after the last, guests included; 0 for one that has lost all.
        stale: How many rows were deleted since stage one's summaries were made anew.
        described: Categories that were added or described anew, by name.
        groups: What was added to each category, by its name.
        words: What was added, and what went.
    """

    since: int
    generation: int
    content: str
    counts: dict[str, int]
    stale: int
    described: dict[str, StoredCategory]
    groups: dict[str, Group]
    words: Words

    @property
    def weight(self) -> int:
        """About how many bytes it has."""
        return sum(4 * group.mean.size * (1 + len(group.variances)) for group in self.groups.values()) + 16 * len(
            self.words.terms
        )

    @property
    def name(self) -> str:
        """What it is kept under."""
        return f"{PREFIX}{self.since:010d}-{self.generation:010d}"

    def to_bytes(self) -> bytes:
        """What `from_bytes` reads: JSON and arrays, without pickles."""
        head = {
            "since": self.since,
            "generation": self.generation,
            "content": self.content,
            "counts": self.counts,
            "stale": self.stale,
            "described": [
                {**item.category.model_dump(mode="json"), "vectors": _text(item.vectors)} for item in self.described.values()
            ],
            "groups": list(self.groups),
            "words": [self.words.documents, self.words.length],
        }
        summaries = summaries_of(self.groups.values()) if self.groups else None
        buffer = io.BytesIO()
        np.savez(
            buffer,
            head=np.frombuffer(json.dumps(head, ensure_ascii=False).encode(), dtype=np.uint8),
            terms=self.words.terms,
            frequencies=self.words.frequencies,
            **({} if summaries is None else summaries._asdict()),
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, dimensions: int) -> Record:
        """Read a record.

        Raises:
            KnowledgeBaseError: It is damaged.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                head = json.loads(arrays["head"].tobytes())
                words = Words(arrays["terms"], arrays["frequencies"], *map(int, head["words"]))
                groups: dict[str, Group] = {}
                if head["groups"]:
                    summaries = Summaries(**{name: arrays[name] for name in Summaries._fields})
                    groups = dict(zip(head["groups"], groups_of(summaries), strict=True))
            described = {}
            for item in head["described"]:
                vectors = np.frombuffer(base64.b64decode(item.pop("vectors")), dtype="<f4").reshape(-1, dimensions)
                described[item["name"]] = StoredCategory(Category.model_validate(item), vectors.astype(np.float32))
            counts = {str(name): int(count) for name, count in head["counts"].items()}
            spans = (int(head["since"]), int(head["generation"]), str(head["content"]))
            return cls(*spans, counts, int(head["stale"]), described, groups, words)
        except (ValueError, KeyError, TypeError, AttributeError, OSError, BadZipFile) as error:
            raise KnowledgeBaseError(f"a record of the knowledge base is damaged: {error}. Index the documents anew") from None

    def after(self, older: Record) -> Record:
        """This record and the one before it as one."""
        groups = dict(older.groups)
        for name, group in self.groups.items():
            groups[name] = joined([groups[name], group]) if name in groups else group
        return self._replace(
            since=older.since,
            described={**older.described, **self.described},
            groups=groups,
            words=older.words.plus(self.words),
        )


def is_to_be_joined(record: Record, older: Sequence[Record]) -> bool:
    """Whether a new record is put together with the newest of those before it."""
    return bool(older) and (older[-1].weight <= 2 * record.weight or len(older) >= _MOST_RECORDS)


def chosen(names: Iterable[str], generation: int) -> list[str]:
    """Of all records those that say everything of a generation, the oldest first; a joined one stands for its parts."""
    spans = sorted((span for name in names if (span := span_of(name)) is not None), key=lambda span: (-span[1], span[0]))
    out: list[str] = []
    below = generation + 1
    for since, last, name in spans:
        if last < below:
            out.insert(0, name)
            below = since
    return out


def span_of(name: str) -> tuple[int, int, str] | None:
    """The first and last generation of a record, and its name; None for other names."""
    if not name.startswith(PREFIX):
        return None
    since, last = name.removeprefix(PREFIX).split("-")
    return int(since), int(last), name


def groups_of(summaries: Summaries) -> list[Group]:
    """Summaries of several groups, one by one."""
    bounds = np.searchsorted(summaries.owners, np.arange(len(summaries.means) + 1)).tolist()
    return [
        Group(
            summaries.means[i],
            int(summaries.sizes[i]),
            summaries.directions[bounds[i] : bounds[i + 1]],
            summaries.variances[bounds[i] : bounds[i + 1]],
            float(summaries.residuals[i]),
        )
        for i in range(len(summaries.means))
    ]


def summaries_of(groups: Iterable[Group]) -> Summaries:
    """Groups, at least one, as one set of summaries."""
    every = list(groups)
    return Summaries(
        means=np.stack([group.mean for group in every]).astype(np.float32),
        sizes=np.array([group.size for group in every], dtype=np.int64),
        directions=np.concatenate([group.directions for group in every]).astype(np.float32),
        variances=np.concatenate([group.variances for group in every]).astype(np.float32),
        owners=np.repeat(np.arange(len(every)), [len(group.variances) for group in every]).astype(np.int64),
        residuals=np.array([group.residual for group in every], dtype=np.float32),
    )


def joined(groups: Sequence[Group]) -> Group:
    """Two or more groups of a category as one."""
    sizes = np.array([group.size for group in groups], dtype=np.float64)
    shares = sizes / sizes.sum()
    means = np.stack([group.mean for group in groups]).astype(np.float64)
    mean = shares @ means
    apart = (means - mean) * np.sqrt(shares)[:, None]
    spread = [group.directions * np.sqrt(share * group.variances)[:, None] for group, share in zip(groups, shares, strict=True)]
    stacked = np.concatenate([apart, *spread])
    total = float((apart**2).sum() + sum(share * group.total for group, share in zip(groups, shares, strict=True)))
    values, left = np.linalg.eigh(stacked @ stacked.T)
    values, left = values[::-1][:_DIRECTIONS], left.T[::-1][:_DIRECTIONS]
    keep = values > 1e-9 * max(total, 1e-12)
    axes = left[keep] @ stacked / np.sqrt(values[keep])[:, None]
    rest = max(0.0, total - float(values[keep].sum())) / max(1, len(mean) - int(keep.sum()))
    return Group(mean.astype(np.float32), int(sizes.sum()), axes.astype(np.float32), values[keep].astype(np.float32), rest)


def added(counts: Mapping[str, int], changes: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Counts after changes; a category that has lost all its documents keeps a 0."""
    out = dict(counts)
    for name, change in changes:
        out[name] = out.get(name, 0) + change
    return out


def _text(vectors: Floats) -> str:
    return base64.b64encode(np.ascontiguousarray(vectors, dtype="<f4").tobytes()).decode()
