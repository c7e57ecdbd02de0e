"""One search: stage one, stage two, and what is made of their scores. `TwoStageRetriever` is its face."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from gemma_rag import fusion
from gemma_rag.encoders import Input
from gemma_rag.errors import InputError
from gemma_rag.index.exact import Scored
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.prompts import Task
from gemma_rag.results import CategoryScore, Hit, NearMiss, Outcome, Retrieval
from gemma_rag.routing import Gate
from gemma_rag.thresholds import Threshold, as_threshold, describe
from gemma_rag.vectors import Floats
from gemma_rag.view import View

logger = logging.getLogger(__name__)

Mode: TypeAlias = Literal["auto", "two-stage", "flat", "lexical"]
Scalar: TypeAlias = str | int | float | bool | None
Where: TypeAlias = Mapping[str, Scalar | Sequence[Scalar]]
Bools: TypeAlias = npt.NDArray[np.bool_]

LEXICAL_CATEGORY_THRESHOLD = 0.1
LEXICAL_DOCUMENT_THRESHOLD = 0.15
"""Refuses 5 % (drcd) and 2 % (squad2) of the dev splits' answerable questions; see docs/decisions/0004."""

_CANDIDATES = 100
"""Documents that each side hands to the fusion, at least."""


class Settings(NamedTuple):
    """What `TwoStageRetriever` and one call of it decide together; the fields are the retriever's own."""

    k: int
    category_threshold: float | str | Threshold | None
    document_threshold: float | str | Threshold | None
    mode: Mode
    hybrid: bool
    max_categories: int | None


class _Found(NamedTuple):
    """What the two stages found for one question, before thresholds at stage two."""

    scored: Scored
    category_scores: Floats
    opened: Bools
    refused: bool
    lexical: Floats | None  # for every document of the index


class Search:
    """One call of the retriever, over one generation of the knowledge base.

    Args:
        base: What to search.
        gate: How stage one scores and opens categories.
        settings: Everything else; its mode is not ``auto`` any more.
        categories: Search these only.
        where: Search documents with this metadata only.
    """

    def __init__(
        self, base: KnowledgeBase, gate: Gate, settings: Settings, categories: Sequence[str] | None, where: Where | None
    ) -> None:
        self.base = base
        self.view: View = base.view()
        self.gate = gate
        self.settings = settings
        self.timings: dict[str, float] = {}
        self.eligible = self._eligible(categories)
        self.allowed = self._allowed(where) if where else None
        if self.allowed is not None:
            has_some = np.bincount(self.view.index.codes[self.allowed], minlength=len(self.eligible)) > 0
            self.eligible &= has_some
        self.category_threshold, self.document_threshold = self._thresholds()

    def run(self, questions: list[str]) -> list[Retrieval]:
        """Search for each of the questions."""
        if not questions:
            return []
        started = time.perf_counter()
        if not len(self.base) or not self.eligible.any():
            outcome = Outcome.FILTERED_OUT if len(self.base) else Outcome.EMPTY_KNOWLEDGE_BASE
            return [self._retrieval(question, outcome, (), (), (), 0, started) for question in questions]
        found = self._by_words(questions) if self.settings.mode == "lexical" else self._by_vectors(questions)
        return [self._judge(question, each, started) for question, each in zip(questions, found, strict=True)]

    # -- who may be found -------------------------------------------------------------------------------------------

    def _eligible(self, categories: Sequence[str] | None) -> Bools:
        if categories is None:
            return np.ones(len(self.view.categories), dtype=bool)
        if isinstance(categories, str):
            raise InputError("categories is a list of names, and one string came: put it in a list")
        if unknown := [name for name in categories if name not in self.view.categories]:
            raise InputError(
                f"the knowledge base has no category {', '.join(map(repr, unknown))}. It has "
                f"{', '.join(self.view.categories[:30])}{' ...' if len(self.view.categories) > 30 else ''}"
            )
        return np.isin(np.array(self.view.categories), np.array(list(categories)))

    def _allowed(self, where: Where) -> Bools:
        """Which documents have the metadata asked for."""
        if not isinstance(where, Mapping):
            raise InputError(f"where is a mapping of metadata to values, as in {{'year': 2024}}, and is {where!r}")
        metadata = self.view.metadata
        wanted = {
            key: list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value] for key, value in where.items()
        }
        return np.array(
            [
                all(key in metadata[number] and _matches(metadata[number][key], values) for key, values in wanted.items())
                for number in self.view.index.documents.tolist()
            ],
            dtype=bool,
        )

    def _thresholds(self) -> tuple[Threshold, Threshold]:
        given = (self.settings.category_threshold, self.settings.document_threshold)
        defaults: tuple[float | None, float | None]
        if self.settings.mode == "lexical":
            defaults = (LEXICAL_CATEGORY_THRESHOLD, LEXICAL_DOCUMENT_THRESHOLD)
        elif None in given:
            profile = self.base.encoder.profile
            defaults = (profile.category_threshold, profile.document_threshold)
            first = 1 if self.settings.mode == "flat" else 0
            if any(own is None and default is None for own, default in list(zip(given, defaults, strict=True))[first:]):
                _warn_unmeasured(self.base.space.model)
        else:
            defaults = (None, None)
        stages = []
        for own, default in zip(given, defaults, strict=True):
            stages.append(as_threshold(own if own is not None else default if default is not None else -1.0))
        return stages[0], stages[1]

    # -- the two stages ---------------------------------------------------------------------------------------------

    def _by_vectors(self, questions: list[str]) -> Iterator[_Found]:
        flat = self.settings.mode == "flat"
        tasks = [Task.QUERY] if flat else [Task.QUERY, Task.CLASSIFICATION]
        with self._timed("encode"):
            rows = self.base.encoder.encode([Input(question, task) for task in tasks for question in questions])
        queries = rows[: len(questions)]
        with self._timed("categories"):
            if flat:
                scores = np.full((len(questions), len(self.eligible)), np.nan, dtype=np.float32)
                opened = np.broadcast_to(self.eligible, scores.shape)
                refused = np.zeros(len(questions), dtype=bool)
            else:
                scores = self.gate.scores(rows[len(questions) :], queries, self.view.names, self.view.centroids)
                opened = np.zeros(scores.shape, dtype=bool)
                opened[:, self.eligible] = self.gate.open(scores[:, self.eligible], self.settings.max_categories)
                refused = np.array([not self.category_threshold.apply(row[self.eligible]).keep.any() for row in scores])
        with self._timed("documents"):
            scored = self.view.index.search(queries, opened & ~refused[:, None])
        for i, question in enumerate(questions):
            lexical, _ = self._lexical(question) if self.settings.hybrid and not refused[i] else (None, None)
            yield _Found(self._filtered(scored[i]), scores[i], opened[i] & ~refused[i], bool(refused[i]), lexical)

    def _by_words(self, questions: list[str]) -> Iterator[_Found]:
        """Both stages by matching words: a category scores as its best document does, and every one is looked into."""
        codes = self.view.index.codes
        for question in questions:
            lexical, rows = self._lexical(question)
            places = np.flatnonzero((lexical > 0) & self.eligible[codes])
            scored = self._filtered(Scored(places, lexical[places], rows[places]))
            best = np.zeros(len(self.eligible), dtype=np.float32)
            np.maximum.at(best, codes[scored.places], scored.scores)
            opened = (best > 0) & self.eligible
            if self.settings.max_categories is not None:
                opened[np.argsort(-best, kind="stable")[self.settings.max_categories :]] = False
                scored = Scored(*(column[opened[codes[scored.places]]] for column in scored))
            refused = not self.category_threshold.apply(best[self.eligible]).keep.any()
            yield _Found(scored, best, opened & (not refused), refused, lexical)

    def _lexical(self, question: str) -> tuple[Floats, npt.NDArray[np.int64]]:
        """The lexical score of every document, that of its best chunk, and the row of that chunk."""
        with self._timed("words"):
            rows = self.view.lexical.scores(question)
            places = self.view.index.row_places
            best = np.zeros(len(self.view.index.documents), dtype=np.float32)
            np.maximum.at(best, places, rows)
            order = np.argsort(rows, kind="stable")
            best_rows = np.zeros(len(best), dtype=np.int64)
            best_rows[places[order]] = order  # the last one written, the best, stays
            return best, best_rows

    def _filtered(self, scored: Scored) -> Scored:
        if self.allowed is None:
            return scored
        keep = self.allowed[scored.places]
        return Scored(scored.places[keep], scored.scores[keep], scored.rows[keep])

    # -- judging ----------------------------------------------------------------------------------------------------

    def _judge(self, question: str, found: _Found, started: float) -> Retrieval:
        categories = self._category_scores(found)
        if found.refused:
            return self._retrieval(question, Outcome.CATEGORY_BELOW_THRESHOLD, (), (), categories, 0, started)
        with self._timed("judge"):
            scored = found.scored
            cut = self.document_threshold.apply(scored.scores)
            fused = self._fused(found) if self.settings.hybrid and self.settings.mode != "lexical" else None
            order_by = scored.scores if fused is None else fused
            kept = np.flatnonzero(cut.keep)
            kept = kept[_best(order_by[kept], scored.scores[kept], self.settings.k)]
            failed = np.flatnonzero(~cut.keep)
            failed = failed[_best(scored.scores[failed], scored.scores[failed], self.settings.k)]
            documents = self.view.documents(self.view.index.documents[scored.places[[*kept, *failed]]].tolist())
            places = self.view.chunk_places(scored.rows[kept].tolist())
            hits = []
            for i in kept:
                document = documents[int(self.view.index.documents[scored.places[i]])]
                chunk = places[int(scored.rows[i])]
                hits.append(
                    Hit(
                        document=document,
                        score=float(scored.scores[i]),
                        category_score=self._category_score(found, int(scored.places[i])),
                        passage=document.text[chunk.start : chunk.end],
                        headings=chunk.headings,
                        lexical_score=None if found.lexical is None else float(found.lexical[scored.places[i]]),
                        fused_score=None if fused is None else float(fused[i]),
                    )
                )
            misses = tuple(
                NearMiss(
                    document=documents[int(self.view.index.documents[scored.places[i]])],
                    score=float(scored.scores[i]),
                    category_score=self._category_score(found, int(scored.places[i])),
                    margin=cut.cutoff - float(scored.scores[i]),
                )
                for i in failed
            )
        outcome = Outcome.ANSWERED if hits else Outcome.DOCUMENT_BELOW_THRESHOLD
        return self._retrieval(question, outcome, tuple(hits), misses, categories, len(scored.places), started)

    def _fused(self, found: _Found) -> npt.NDArray[np.float64]:
        """Fuse cosines and lexical scores over the best of both; the others keep their order behind them."""
        scores, words = (
            found.scored.scores.astype(np.float64),
            np.asarray(found.lexical)[found.scored.places].astype(np.float64),
        )
        depth = max(_CANDIDATES, self.settings.k)
        candidates = np.union1d(np.argsort(-scores, kind="stable")[:depth], np.argsort(-words, kind="stable")[:depth])
        matching = np.where(words > 0, words, np.nan)
        out = scores - 2.0  # below every candidate
        out[candidates] = fusion.weighted([scores[candidates], matching[candidates]])
        return out

    def _category_score(self, found: _Found, place: int) -> float:
        return float(found.category_scores[self.view.index.codes[place]])

    def _category_scores(self, found: _Found) -> tuple[CategoryScore, ...]:
        if self.settings.mode == "flat":
            return ()
        order = np.argsort(-found.category_scores, kind="stable")
        return tuple(
            CategoryScore(self.view.categories[i], float(found.category_scores[i]), bool(found.opened[i]))
            for i in order.tolist()
            if self.eligible[i]
        )

    def _retrieval(
        self,
        question: str,
        outcome: Outcome,
        hits: tuple[Hit, ...],
        misses: tuple[NearMiss, ...],
        categories: tuple[CategoryScore, ...],
        scored: int,
        started: float,
    ) -> Retrieval:
        return Retrieval(
            question=question,
            outcome=outcome,
            mode=self.settings.mode,
            hits=hits,
            near_misses=misses,
            categories=categories,
            thresholds={
                "category": None if self.settings.mode == "flat" else describe(self.category_threshold),
                "document": describe(self.document_threshold),
            },
            documents_scored=scored,
            documents_total=len(self.view.index.documents),
            timings_ms={**self.timings, "total": (time.perf_counter() - started) * 1e3},
        )

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.timings[step] = self.timings.get(step, 0.0) + (time.perf_counter() - started) * 1e3


def _best(values: npt.NDArray[Any], ties: npt.NDArray[Any], k: int) -> npt.NDArray[np.int64]:
    """Places of the `k` largest values, best first; equal ones by `ties`, then as they stand. Only the best are sorted."""
    candidates = np.arange(len(values))
    if len(values) > k:
        candidates = np.flatnonzero(values >= np.partition(values, len(values) - k)[len(values) - k])
    return candidates[np.lexsort((-ties[candidates], -values[candidates]))][:k]


def _matches(have: Any, values: list[Any]) -> bool:
    """Whether metadata is one of the values, or, where it is a list, has one of them; true is not 1."""
    if isinstance(have, list):
        return any(_matches(item, values) for item in have)
    return any(have == value and isinstance(have, bool) == isinstance(value, bool) for value in values)


def _warn_unmeasured(model: str) -> None:
    if model not in _warned:
        _warned.add(model)
        logger.warning(
            "nobody has measured thresholds for %s: without category_threshold and document_threshold nothing is refused", model
        )


_warned: set[str] = set()
