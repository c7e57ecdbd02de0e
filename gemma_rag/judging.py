"""From what a search found to what is kept: thresholds, order, reranking, and the `Retrieval` that says why."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gemma_rag.documents import Chunk, Document
from gemma_rag.learned import KindCalibration
from gemma_rag.passages import sentences
from gemma_rag.rerank import mmr, rerank
from gemma_rag.results import CategoryScore, Hit, NearMiss, Outcome, Retrieval
from gemma_rag.search import DIVERSE, Found, Search
from gemma_rag.thresholds import FixedThreshold, as_threshold, describe

logger = logging.getLogger(__name__)

LEXICAL_CATEGORY_THRESHOLD = 0.1
LEXICAL_DOCUMENT_THRESHOLD = 0.15
"""Refuses 5 % (drcd) and 2 % (squad2) of the dev splits' answerable questions; see docs/decisions/0004."""

_SHOWN = 50
"""Categories that a result lists, at least, where there are so many; all that were opened are listed."""

_WEIGHED = 10
"""Documents whose evidence is weighed, at least: those that come first."""

Ints = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]


class _Source(NamedTuple):
    """A document and its best chunk."""

    document: Document
    chunk: Chunk

    @property
    def passage(self) -> str:
        return self.document.text[self.chunk.start : self.chunk.end]


class _Judged(NamedTuple):
    """Which of the scored documents reach the threshold; indices into `Found.scored`, in the order of their merit.

    Attributes:
        kept: Those that do.
        failed: Those that do not.
        margins: By how much each of those falls short.
        evidence: Of each document that was weighed; empty without a calibration.
    """

    kept: Ints
    failed: Ints
    margins: Doubles
    evidence: Mapping[int, float]


class Judge:
    """Decides what is kept of what a search found.

    Args:
        search: The search.

    Attributes:
        category_threshold: What the best category has to reach.
        document_threshold: What a document has to reach; not looked at where a calibration is in force.
        calibrated: The calibration in force, if any.
    """

    def __init__(self, search: Search) -> None:
        self.search = search
        self.view = search.view
        self.calibrated = self._calibration()
        settings = search.settings
        given = (settings.category_threshold, settings.document_threshold)
        defaults: tuple[float | None, float | None] = (None, None)
        if search.kind == "lexical":
            defaults = (LEXICAL_CATEGORY_THRESHOLD, LEXICAL_DOCUMENT_THRESHOLD)
        elif None in given and self.calibrated is None:
            profile = search.base.encoder.profile
            defaults = (profile.category_threshold, profile.document_threshold)
            first = 1 if settings.mode == "flat" else 0
            if any(own is None and default is None for own, default in list(zip(given, defaults, strict=True))[first:]):
                warn_unmeasured(search.base.space.model)
        if self.calibrated is not None:
            point = self.calibrated.category
            defaults = (None if point is None else point.threshold, None)
        self.category_threshold, self.document_threshold = (
            as_threshold(own) if own is not None else FixedThreshold(-1.0 if default is None else min(max(default, -1.0), 1.0))
            for own, default in zip(given, defaults, strict=True)
        )

    def _calibration(self) -> KindCalibration | None:
        """What to judge by, unless the caller gave a document threshold."""
        calibration = self.search.base.learned.calibration
        if calibration is None or self.search.settings.document_threshold is not None:
            return None
        found = calibration.kinds.get(self.search.kind)
        if found is None:
            self.search.notes.append(
                f"the calibration knows nothing of {self.search.kind} search: the default thresholds were used"
            )
        elif "router" in found.evidence.features and self.search.learned.router is None:
            self.search.notes.append(
                "the calibration needs the learned router, which was left out: the default thresholds were used"
            )
            found = None
        return found

    def judge(self, question: str, found: Found, started: float) -> Retrieval:
        """Make the result of one question.

        Args:
            question: The question.
            found: What the search found for it.
            started: When it was asked, by `time.perf_counter`.
        """
        if found.gated.refused:
            return self.retrieval(question, Outcome.CATEGORY_BELOW_THRESHOLD, started, found)
        with self.search.timed("judge"):
            judged = self._by_evidence(question, found, self.calibrated) if self.calibrated else self._by_threshold(found)
            kept, rerank_scores = self._chosen(question, found, judged.kept)
            failed = judged.failed[: self.search.settings.k]
            sources = self._sources(question, found, [*kept.tolist(), *failed.tolist()])
            hits = tuple(self._hit(found, i, sources[i], judged, rerank_scores.get(i)) for i in kept.tolist())
            misses = tuple(
                NearMiss(
                    document=sources[i].document,
                    score=float(found.scored.scores[i]),
                    category_score=self._category_score(found, i),
                    margin=float(margin),
                )
                for i, margin in zip(failed.tolist(), judged.margins.tolist(), strict=False)
            )
        outcome = Outcome.ANSWERED if hits else Outcome.DOCUMENT_BELOW_THRESHOLD
        return self.retrieval(question, outcome, started, found, hits, misses)

    def retrieval(
        self,
        question: str,
        outcome: Outcome,
        started: float,
        found: Found | None = None,
        hits: tuple[Hit, ...] = (),
        near_misses: tuple[NearMiss, ...] = (),
    ) -> Retrieval:
        """The result, with what both stages thought.

        Args:
            question: The question.
            outcome: How it ended.
            started: When it was asked, by `time.perf_counter`.
            found: What the search found; None where there was nothing to search.
            hits: What is kept.
            near_misses: What is not.
        """
        search = self.search
        calibrated = self.calibrated
        return Retrieval(
            question=question,
            outcome=outcome,
            mode=search.settings.mode,
            hits=hits,
            near_misses=near_misses,
            categories=() if found is None or search.settings.mode == "flat" else self._category_scores(found, hits),
            thresholds={
                "category": None if search.settings.mode == "flat" else describe(self.category_threshold),
                "document": describe(self.document_threshold) if calibrated is None else calibrated.document.threshold,
                "acts_on": "evidence" if calibrated else "lexical" if search.kind == "lexical" else "cosine",
            },
            documents_scored=0 if found is None or found.gated.refused else found.scored.compared,
            documents_total=self.view.documents_total,
            timings_ms={**search.timings, "total": (time.perf_counter() - started) * 1e3},
            notes=tuple(search.notes),
        )

    # -- what reaches the threshold ---------------------------------------------------------------------------------

    def _by_threshold(self, found: Found) -> _Judged:
        scores = found.scored.scores.astype(np.float64)
        cut = self.document_threshold.apply(scores)
        kept, failed = np.flatnonzero(cut.keep), np.flatnonzero(~cut.keep)
        kept = kept[best(found.order[kept], scores[kept], self._reach())]
        failed = failed[best(scores[failed], found.order[failed], self.search.settings.k)]
        return _Judged(kept, failed, cut.cutoff - scores[failed], {})

    def _by_evidence(self, question: str, found: Found, calibrated: KindCalibration) -> _Judged:
        """By evidence. What was promised of the calibration holds of the first document: where it fails, none is kept."""
        first = best(found.order, found.scored.scores, max(_WEIGHED, self._reach()))
        evidence = calibrated.evidence.score(self.features(question, found, first, calibrated.evidence.features))
        categories = [self.view.categories[code] for code in self.view.index.codes[found.scored.places[first]].tolist()]
        margins = np.array([calibrated.threshold(name) for name in categories]) - evidence
        keep = margins <= 0
        if not keep[:1].all():
            keep[:] = False
        failed = np.flatnonzero(margins > 0)
        failed = failed[np.argsort(margins[failed], kind="stable")]
        weighed = dict(zip(first.tolist(), evidence.tolist(), strict=True))
        return _Judged(first[keep], first[failed], margins[failed], weighed)

    def features(self, question: str, found: Found, indices: Ints, names: tuple[str, ...]) -> dict[str, Doubles]:
        """What is known of some of the scored documents.

        Args:
            question: The question.
            found: What the search found for it.
            indices: Which ones, shape ``(n,)``.
            names: Which features (`Evidence.features`).

        Returns:
            float64 of shape ``(n,)`` for each.
        """
        values: dict[str, Doubles] = {}
        if "cosine" in names:
            values["cosine"] = found.scored.scores[indices].astype(np.float64)
        if "lexical" in names and found.words is not None:
            values["lexical"] = found.words[indices].astype(np.float64)
        if "router" in names and found.router is not None:
            values["router"] = found.router[indices].astype(np.float64)
        if "coverage" in names:
            passages = [source.passage for source in self._sources(question, found, indices.tolist()).values()]
            best_sentences = [self.view.lexical.coverage(question, sentences(text) or [text]).max() for text in passages]
            values["coverage"] = np.array(best_sentences, dtype=np.float64)
        return values

    # -- which of those, and in what order --------------------------------------------------------------------------

    def _reach(self) -> int:
        """How many documents are looked at to choose ``k`` from."""
        settings = self.search.settings
        return max(
            settings.k,
            settings.rerank_top if settings.reranker is not None else 0,
            DIVERSE * settings.k if settings.diversity else 0,
        )

    def _chosen(self, question: str, found: Found, kept: Ints) -> tuple[Ints, dict[int, float]]:
        """The ``k`` that are given, in their order, and what the reranker gave those that it saw."""
        settings = self.search.settings
        scores: dict[int, float] = {}
        relevance = found.order[kept]
        if settings.reranker is not None and len(kept):
            seen = kept[: settings.rerank_top]
            with self.search.timed("rerank"):
                sources = self._sources(question, found, seen.tolist())
                passages = [f"{source.document.title}\n{source.passage}".strip() for source in sources.values()]
                given = rerank(settings.reranker, question, passages)
            order = np.argsort(-given, kind="stable")
            scores = dict(zip(seen.tolist(), given.tolist(), strict=True))
            kept = np.concatenate([seen[order], kept[len(seen) :]])
            behind = given.min() - 1.0 - np.arange(len(kept) - len(seen))
            relevance = np.concatenate([given[order], behind])
        if settings.diversity and len(kept):
            rows = self.view.index.vectors(np.array(self._rows(question, found, kept.tolist()), dtype=np.int64))
            kept = kept[mmr(relevance, rows, settings.k, settings.diversity)]
        return kept[: settings.k], scores

    # -- making the result ------------------------------------------------------------------------------------------

    def _hit(self, found: Found, i: int, source: _Source, judged: _Judged, rerank_score: float | None) -> Hit:
        evidence = judged.evidence.get(i)
        probability = None
        if evidence is not None and self.calibrated is not None and self.calibrated.probability is not None:
            probability = float(self.calibrated.probability.apply([evidence])[0])
        score = float(found.scored.scores[i])
        plain = self.search.kind == "lexical" or (found.words is None and found.router is None)
        return Hit(
            document=source.document,
            score=score,
            category_score=self._category_score(found, i),
            passage=source.passage,
            headings=source.chunk.headings,
            lexical_score=None if found.words is None else float(found.words[i]),
            fused_score=None if plain else float(found.order[i]),
            evidence=evidence,
            probability=probability,
            rerank_score=rerank_score,
        )

    def _sources(self, question: str, found: Found, indices: list[int]) -> dict[int, _Source]:
        """Documents with their best chunks."""
        numbers = self.view.index.documents[found.scored.places[indices]].tolist() if indices else []
        documents = self.view.documents(numbers)
        rows = self._rows(question, found, indices)
        chunks = self.view.chunk_places(rows)
        return {i: _Source(documents[n], chunks[row]) for i, n, row in zip(indices, numbers, rows, strict=True)}

    def _rows(self, question: str, found: Found, indices: list[int]) -> list[int]:
        """The row of each document's best chunk: by cosine, or in lexical mode by how much of the question it speaks of."""
        if len(found.scored.rows):
            return [int(row) for row in found.scored.rows[indices]]
        out = []
        for place in found.scored.places[indices].tolist():
            rows = self.view.index.rows_of(np.array([place]))
            if len(rows) > 1:
                document = self.view.documents([number := int(self.view.index.documents[place])])[number]
                chunks = self.view.chunk_places(rows.tolist())
                texts = [document.text[chunks[row].start : chunks[row].end] for row in rows.tolist()]
                rows = rows[[int(self.view.lexical.coverage(question, texts).argmax())]]
            out.append(int(rows[0]))
        return out

    def _category_score(self, found: Found, i: int) -> float:
        return float(self.search.of_categories(found.gated.scores, found.scored.places[[i]])[0])

    def _category_scores(self, found: Found, hits: tuple[Hit, ...]) -> tuple[CategoryScore, ...]:
        gate = found.gated
        opened = {self.view.categories[code] for code in np.flatnonzero(gate.opened).tolist()}
        homes = [{hit.document.category, *hit.document.also_in} for hit in hits]
        by_words = {name for home in homes if not home & opened for name in home}
        order = np.argsort(-gate.scores, kind="stable")
        order = order[self.search.eligible[order]]
        named = np.array([self.view.categories[code] in by_words for code in order.tolist()], dtype=bool) if by_words else False
        order = order[(np.arange(len(order)) < _SHOWN) | gate.opened[order] | named]
        return tuple(
            CategoryScore(
                name=(name := self.view.categories[i]),
                score=float(gate.scores[i]),
                kept=bool(gate.opened[i]),
                probability=float(gate.probabilities[i]),
                why=self._why(found, i, name in by_words),
            )
            for i in order.tolist()
        )

    def _why(self, found: Found, code: int, by_words: bool) -> str:
        gate = found.gated
        if gate.opened[code]:
            return "all" if self.search.kind == "lexical" else "rescue" if gate.rescued[code] else "mass"
        return "words" if by_words and not gate.refused else ""


def best(values: npt.NDArray[np.floating], ties: npt.NDArray[np.floating], k: int) -> Ints:
    """Places of the `k` largest values, best first; equal ones by `ties`, then as they stand. Only the best are sorted.

    Args:
        values: Shape ``(n,)``.
        ties: Shape ``(n,)``.
        k: At least 1.
    """
    candidates = np.arange(len(values))
    if len(values) > k:
        candidates = np.flatnonzero(values >= np.partition(values, len(values) - k)[len(values) - k])
    return candidates[np.lexsort((-ties[candidates], -values[candidates]))][:k]


def warn_unmeasured(model: str) -> None:
    """Say once of a model, or of a store of vectors, that nothing is refused unless thresholds are set."""
    if model not in _warned:
        _warned.add(model)
        logger.warning(
            "nobody has measured thresholds for %s: without category_threshold and document_threshold nothing is refused", model
        )


_warned: set[str] = set()
