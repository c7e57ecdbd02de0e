"""The two stages over somebody else's vector store, which holds the vectors already, in categories by their metadata.

Stage one asks the store once for the entries that come closest to the question, whatever their category: a category
scores as the best of them does, which is exact and costs one search. Stage two searches the categories that the gate
opens, unless the first search has found enough of them. Nothing of the store is kept here, so nothing can go stale.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np

from gemma_rag.documents import Document
from gemma_rag.encoders import Encoder
from gemma_rag.errors import InputError
from gemma_rag.judging import warn_unmeasured
from gemma_rag.prompts import PromptProfile
from gemma_rag.results import CategoryScore, Hit, NearMiss, Outcome, Retrieval
from gemma_rag.routing import Gate
from gemma_rag.search import Scalar, Where, wanted_values
from gemma_rag.thresholds import FixedThreshold, Threshold, as_threshold, describe
from gemma_rag.vectors import Floats, unit

Within: TypeAlias = Mapping[str, Sequence[Scalar]]
"""A filter: for each key of the metadata the values that it may have."""


class Candidate(NamedTuple):
    """An entry of a store, as a search found it.

    Attributes:
        document: The entry; its text is the passage.
        score: Its cosine with the question, -1 to 1.
    """

    document: Document
    score: float


class VectorSource(Protocol):
    """A vector store, as far as the two stages need one."""

    @property
    def name(self) -> str:
        """What to call it in a message."""
        ...

    def search(self, vector: Floats, k: int, within: Within) -> list[Candidate]:
        """The entries that come closest to a vector, best first.

        Args:
            vector: float32 of shape ``(dimensions,)``, norm 1.
            k: How many, at most.
            within: Only entries whose metadata has one of these values, for each key; empty for all.
        """
        ...


@dataclass(frozen=True)
class ExternalRetriever:
    """Finds what answers a question in somebody else's vector store, or says why there is nothing. A `Retriever`.

    Every field from `k` to `max_categories` can also be given for a single call.

    Attributes:
        source: The store.
        embed_question: From a question to its vector, by the embeddings that filled the store.
        category_key: Where the metadata of an entry names its category.
        k: Most hits, at least 1.
        category_threshold: What the best category has to reach, as for `TwoStageRetriever`.
        document_threshold: What an entry has to reach, likewise.
        mode: ``two-stage``, or ``flat`` without a stage one. A store's own words are out of our reach: no mode is lexical.
        gate: How many categories stage one opens. Its `name_weight` counts for nothing: the best entry is known.
        max_categories: Most categories to open; None for as many as the gate wants.
        probe: How many entries stage one looks at, at least 1. A category that has none among them is not opened.
        profile: Whose thresholds are the defaults; None for none.
        encoder: What made the vectors, where it is one of ours; quoted answers are chosen with it.
    """

    source: VectorSource
    embed_question: Callable[[str], Sequence[float]]
    category_key: str = "category"
    k: int = 4
    category_threshold: float | str | Threshold | None = None
    document_threshold: float | str | Threshold | None = None
    mode: Literal["two-stage", "flat"] = "two-stage"
    gate: Gate = field(default_factory=Gate)
    max_categories: int | None = None
    probe: int = 64
    profile: PromptProfile | None = None
    encoder: Encoder | None = None

    def __post_init__(self) -> None:
        for name in ("k", "probe", "max_categories"):
            value = getattr(self, name)
            if not (type(value) is int and value >= 1) and not (name == "max_categories" and value is None):
                raise InputError(f"{name} is a number, at least 1, and is {value!r}")
        if not isinstance(self.gate, Gate):
            raise InputError(f"gate is a gemma_rag.routing.Gate, and is {self.gate!r}")
        if self.mode not in ("two-stage", "flat"):
            raise InputError(f"over somebody else's store the mode is 'two-stage' or 'flat', and is {self.mode!r}")
        for threshold in (self.category_threshold, self.document_threshold):
            if threshold is not None:
                as_threshold(threshold)

    def retrieve(
        self,
        question: str,
        k: int | None = None,
        *,
        categories: Sequence[str] | None = None,
        where: Where | None = None,
        **settings: Any,
    ) -> Retrieval:
        """Find what answers a question.

        Args:
            question: The question.
            k: Most hits, instead of the retriever's own number.
            categories: Search these categories only.
            where: Search entries with this metadata only, as for `TwoStageRetriever.retrieve`; a store compares it as it
                does, and lists in the metadata are beyond most.
            settings: Any of the fields from `k` to `max_categories`, for this call.

        Raises:
            InputError: An empty question, an unknown setting, an argument out of its range, a score that is no cosine, or an
                entry without a category.
        """
        if not isinstance(question, str) or not question.strip():
            raise InputError("the question is empty or no string: ask something")
        return _Call(self._with(k=k, **settings), question, self._within(categories, where)).run()

    async def aretrieve(
        self,
        question: str,
        k: int | None = None,
        *,
        categories: Sequence[str] | None = None,
        where: Where | None = None,
        **settings: Any,
    ) -> Retrieval:
        """`retrieve` in a thread, which does not hold up the event loop."""
        return await asyncio.to_thread(self.retrieve, question, k, categories=categories, where=where, **settings)

    def _with(self, **settings: Any) -> ExternalRetriever:
        names = [each.name for each in fields(self)]
        own = names[names.index("k") : names.index("probe")]
        if unknown := [name for name in settings if name not in own]:
            raise InputError(
                f"over somebody else's store a call has no setting {', '.join(map(repr, unknown))}: there are {', '.join(own)}"
            )
        given = {name: value for name, value in settings.items() if value is not None}
        return replace(self, **given) if given else self

    def _within(self, categories: Sequence[str] | None, where: Where | None) -> dict[str, Sequence[Scalar]]:
        if isinstance(categories, str):
            raise InputError("categories is a list of names, and one string came: put it in a list")
        within: dict[str, Sequence[Scalar]] = {} if where is None else dict(wanted_values(where))
        if categories is not None:
            asked = within.get(self.category_key)
            within[self.category_key] = [name for name in categories if asked is None or name in asked]
        return within


class _Call:
    """One question."""

    def __init__(self, asked: ExternalRetriever, question: str, within: dict[str, Sequence[Scalar]]) -> None:
        self.asked, self.question, self.within = asked, question, within
        self.started = time.perf_counter()
        self.timings: dict[str, float] = {}
        self.seen: set[str] = set()
        profile = asked.profile
        defaults = (None, None) if profile is None else (profile.category_threshold, profile.document_threshold)
        given = (asked.category_threshold, asked.document_threshold)
        first = 1 if asked.mode == "flat" else 0
        if any(own is None and default is None for own, default in list(zip(given, defaults, strict=True))[first:]):
            warn_unmeasured(asked.source.name)
        self.category_threshold, self.document_threshold = (
            as_threshold(own) if own is not None else FixedThreshold(-1.0 if default is None else default)
            for own, default in zip(given, defaults, strict=True)
        )

    def run(self) -> Retrieval:
        asked = self.asked
        if not all(len(values) for values in self.within.values()):
            return self.result(Outcome.FILTERED_OUT)
        with_vector = time.perf_counter()
        vector = unit(np.asarray(asked.embed_question(self.question), dtype=np.float32)[None])[0]
        self.timings["encode"] = (time.perf_counter() - with_vector) * 1e3
        flat = asked.mode == "flat"
        found = self.search("documents" if flat else "categories", vector, self.wanted if flat else self.probe, self.within)
        if not found:
            return self.result(Outcome.FILTERED_OUT if self.within else Outcome.EMPTY_KNOWLEDGE_BASE)
        if flat:
            return self.judged(found, ())
        categories = self.gated(found)
        if not self.category_threshold.apply([category.score for category in categories]).keep.any():
            closed = tuple(category._replace(kept=False, why="") for category in categories)
            return self.result(Outcome.CATEGORY_BELOW_THRESHOLD, categories=closed)
        opened = {category.name for category in categories if category.kept}
        inside = [candidate for candidate in found if candidate.document.category in opened]
        if len(inside) < self.wanted:  # how many the store has left cannot be told: a source may drop entries without a text
            key = asked.category_key  # the store knows a category as it stands there, with the white space around it
            names = [str(each.document.metadata.get(key, each.document.category)) for each in inside]
            more = self.search("documents", vector, self.wanted, {**self.within, key: list(dict.fromkeys(names))})
            inside = list({each.document.id: each for each in [*more, *inside]}.values())
            inside.sort(key=lambda candidate: -candidate.score)
        return self.judged(inside, categories)

    @property
    def wanted(self) -> int:
        """Entries that stage two looks at: the hits, and as many near misses."""
        return 2 * self.asked.k

    @property
    def probe(self) -> int:
        """Entries that stage one looks at."""
        return max(self.asked.probe, self.wanted)

    def search(self, step: str, vector: Floats, k: int, within: Within) -> list[Candidate]:
        started = time.perf_counter()
        found = sorted(self.asked.source.search(vector, k, within), key=lambda candidate: -candidate.score)[:k]
        self.timings[step] = (time.perf_counter() - started) * 1e3
        self.seen.update(candidate.document.id for candidate in found)
        return found

    def gated(self, found: list[Candidate]) -> tuple[CategoryScore, ...]:
        """The categories of what stage one found, best first: each scores as its best entry does."""
        asked = self.asked
        best: dict[str, float] = {}
        for candidate in found:
            best.setdefault(candidate.document.category, candidate.score)
        scores = np.array([list(best.values())], dtype=np.float32)
        shares = asked.gate.probabilities(scores)
        kept = asked.gate.keep(shares, scores, asked.max_categories)[0].tolist()
        opened = {name for name, keep in zip(best, kept, strict=True) if keep}
        inside = [candidate.score for candidate in found if candidate.document.category in opened]
        weakest = inside[asked.k - 1] if len(inside) >= asked.k else -1.0
        left = len(best) if asked.max_categories is None else asked.max_categories - len(opened)
        rescued = [name for name, score in best.items() if name not in opened and score > weakest][:left]
        return tuple(
            CategoryScore(name, score, keep or name in rescued, share, "mass" if keep else "rescue" if name in rescued else "")
            for (name, score), keep, share in zip(best.items(), kept, shares[0].tolist(), strict=True)
        )

    def judged(self, found: list[Candidate], categories: tuple[CategoryScore, ...]) -> Retrieval:
        """What of the entries is kept."""
        of_category = {category.name: category.score for category in categories}
        cut = self.document_threshold.apply([candidate.score for candidate in found])
        hits, misses = [], []
        for candidate, keep in zip(found, cut.keep.tolist(), strict=True):
            document, score = candidate
            category_score = of_category.get(document.category, math.nan)
            if keep:
                hits.append(Hit(document, score, category_score, document.text))
            else:
                misses.append(NearMiss(document, score, category_score, cut.cutoff - score))
        k = self.asked.k
        outcome = Outcome.ANSWERED if hits else Outcome.DOCUMENT_BELOW_THRESHOLD
        return self.result(outcome, tuple(hits[:k]), tuple(misses[:k]), categories)

    def result(
        self,
        outcome: Outcome,
        hits: tuple[Hit, ...] = (),
        near_misses: tuple[NearMiss, ...] = (),
        categories: tuple[CategoryScore, ...] = (),
    ) -> Retrieval:
        flat = self.asked.mode == "flat"
        return Retrieval(
            question=self.question,
            outcome=outcome,
            mode=self.asked.mode,
            hits=hits,
            near_misses=near_misses,
            categories=categories,
            thresholds={
                "category": None if flat else describe(self.category_threshold),
                "document": describe(self.document_threshold),
                "acts_on": "cosine",
            },
            documents_scored=len(self.seen),
            documents_total=None,
            timings_ms={**self.timings, "total": (time.perf_counter() - self.started) * 1e3},
        )
