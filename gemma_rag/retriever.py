"""The two-stage retriever: the category first, then the document, a threshold at each stage."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from gemma_rag import fusion
from gemma_rag.encoders import Input
from gemma_rag.errors import InputError, KnowledgeBaseError
from gemma_rag.index.exact import Scored
from gemma_rag.knowledge_base import KnowledgeBase, View
from gemma_rag.lexical import reads_as_chinese
from gemma_rag.prompts import Task
from gemma_rag.results import CategoryScore, Hit, NearMiss, Outcome, Retrieval
from gemma_rag.routing import Gate
from gemma_rag.thresholds import Threshold, as_threshold, describe
from gemma_rag.vectors import Floats

logger = logging.getLogger(__name__)

Mode: TypeAlias = Literal["auto", "two-stage", "flat", "lexical"]
Scalar: TypeAlias = str | int | float | bool | None
Where: TypeAlias = Mapping[str, Scalar | Sequence[Scalar]]
Bools: TypeAlias = npt.NDArray[np.bool_]

LEXICAL_CATEGORY_THRESHOLD = 0.1
LEXICAL_DOCUMENT_THRESHOLD = 0.15
"""Keeps 97 % (drcd) and 98 % (squad2) of the answerable questions of the dev splits; see docs/decisions."""

_CANDIDATES = 100
"""Documents that each side hands to the fusion, at least."""


@dataclass(frozen=True)
class TwoStageRetriever:
    """Finds the documents that answer a question, or says why there are none.

    Stage one scores every category (see `Gate`), refuses the question if none of them reaches the category threshold,
    and otherwise opens the best ones. Stage two compares the question with the documents of the opened categories and
    keeps those that reach the document threshold. Every field can also be given for a single call.

    Attributes:
        knowledge_base: What to search.
        k: Most hits, at least 1.
        category_threshold: What the best category has to reach: a cosine, a preset's name, ``"dynamic"``, or any
            `Threshold`. None: the default of the model's prompt profile.
        document_threshold: What a document has to reach, likewise.
        mode: ``auto`` is ``two-stage``, except for a question in a language that the model is known not to read, which
            is ``lexical``, with the default thresholds of that mode, and a warning; ``flat`` searches all documents and
            has no stage one; ``lexical`` ranks by matching words alone and needs no model. The result says which it was.
        hybrid: Order hits by cosine and matching words together (`fusion.weighted`); thresholds still act on the cosine.
        gate: How stage one scores categories and how many it opens.
        max_categories: Most categories to open; None for as many as the gate wants. With 1 and
            ``Gate(name_weight=1)`` this is the published naive form.
    """

    knowledge_base: KnowledgeBase
    k: int = 4
    category_threshold: float | str | Threshold | None = None
    document_threshold: float | str | Threshold | None = None
    mode: Mode = "auto"
    hybrid: bool = False
    gate: Gate = field(default_factory=Gate)
    max_categories: int | None = None

    def __post_init__(self) -> None:
        self._settings()

    def retrieve(
        self,
        question: str,
        k: int | None = None,
        *,
        category_threshold: float | str | Threshold | None = None,
        document_threshold: float | str | Threshold | None = None,
        mode: Mode | None = None,
        hybrid: bool | None = None,
        max_categories: int | None = None,
        categories: Sequence[str] | None = None,
        where: Where | None = None,
    ) -> Retrieval:
        """Find the documents that answer a question.

        Args:
            question: The question.
            k: Instead of the retriever's own; so are the next five.
            category_threshold: What the best category has to reach.
            document_threshold: What a document has to reach.
            mode: ``auto``, ``two-stage``, ``flat`` or ``lexical``.
            hybrid: Whether matching words count in the order.
            max_categories: Most categories to open.
            categories: Search these categories only.
            where: Search documents with this metadata only: ``{"year": 2024, "language": ["en", "zh"]}`` means the year
                is 2024 and the language one of the two. A list in the metadata matches if one of its members does.

        Raises:
            InputError: An empty question, an unknown category, or an argument out of its range.
        """
        return self.retrieve_many(
            [question],
            k,
            category_threshold=category_threshold,
            document_threshold=document_threshold,
            mode=mode,
            hybrid=hybrid,
            max_categories=max_categories,
            categories=categories,
            where=where,
        )[0]

    def retrieve_many(
        self,
        questions: Sequence[str],
        k: int | None = None,
        *,
        category_threshold: float | str | Threshold | None = None,
        document_threshold: float | str | Threshold | None = None,
        mode: Mode | None = None,
        hybrid: bool | None = None,
        max_categories: int | None = None,
        categories: Sequence[str] | None = None,
        where: Where | None = None,
    ) -> list[Retrieval]:
        """`retrieve` for several questions, which share the encoder's passes and the reading of the vectors."""
        if isinstance(questions, str):
            raise InputError("questions is a list of strings, and one string came: call retrieve for one question")
        questions = list(questions)
        for i, question in enumerate(questions):
            if not isinstance(question, str) or not question.strip():
                raise InputError(f"the question at index {i} is empty or no string: ask something")
        settings = self._settings(
            k=k,
            category_threshold=category_threshold,
            document_threshold=document_threshold,
            mode=mode,
            hybrid=hybrid,
            max_categories=max_categories,
        )
        if settings.mode == "lexical" or not any(unread := self._unread(questions)):
            if settings.mode == "auto":
                settings = settings._replace(mode="two-stage")
            return self._search(questions, settings, categories, where)
        name, count = self.knowledge_base.space.model, sum(unread)
        if settings.mode != "auto":
            logger.warning("%s does not read Chinese: the scores of %d questions mean little", name, count)
            return self._search(questions, settings, categories, where)
        logger.warning("%s does not read Chinese: %d questions are searched by matching words instead", name, count)
        words = settings._replace(mode="lexical", category_threshold=None, document_threshold=None)
        results: dict[int, Retrieval] = {}
        for by_words, each in ((False, settings._replace(mode="two-stage")), (True, words)):
            places = [i for i in range(len(questions)) if unread[i] is by_words]
            found = self._search([questions[i] for i in places], each, categories, where)
            results.update(zip(places, found, strict=True))
        return [results[i] for i in range(len(questions))]

    def _search(
        self, questions: list[str], settings: _Settings, categories: Sequence[str] | None, where: Where | None
    ) -> list[Retrieval]:
        search = _Search(self.knowledge_base, self.gate, settings, categories, where)
        try:
            return search.run(questions)
        except KnowledgeBaseError:
            if self.knowledge_base.view() is search.view:
                raise
        # another thread has rewritten or saved the knowledge base meanwhile: its new state answers
        return _Search(self.knowledge_base, self.gate, settings, categories, where).run(questions)

    def _unread(self, questions: Sequence[str]) -> list[bool]:
        """Which questions are in a language that the model is known not to read."""
        chinese = [reads_as_chinese(question) for question in questions]
        if not any(chinese) or "zh" in (self.knowledge_base.encoder.profile.languages or ("zh",)):
            return [False] * len(questions)
        return chinese

    def _settings(self, **given: Any) -> _Settings:
        """The retriever's own settings, with those of a call in their places."""
        values = {name: getattr(self, name) if given.get(name) is None else given[name] for name in _Settings._fields}
        settings = _Settings(**values)
        if isinstance(settings.k, bool) or not isinstance(settings.k, int) or settings.k < 1:
            raise InputError(f"k is the number of hits, at least 1, and is {settings.k!r}")
        if settings.max_categories is not None and not (type(settings.max_categories) is int and settings.max_categories >= 1):
            raise InputError(f"max_categories is a number, at least 1, and is {settings.max_categories!r}")
        if settings.mode not in get_args(Mode):
            raise InputError(f"no mode is named {settings.mode!r}: there are {', '.join(get_args(Mode))}")
        for threshold in (settings.category_threshold, settings.document_threshold):
            if threshold is not None:
                as_threshold(threshold)
        return settings


class _Settings(NamedTuple):
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
    best_rows: npt.NDArray[np.int64] | None  # the best row by words, for every document


class _Search:
    """One call of the retriever."""

    def __init__(
        self, base: KnowledgeBase, gate: Gate, settings: _Settings, categories: Sequence[str] | None, where: Where | None
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
            yield _Found(self._filtered(scored[i]), scores[i], opened[i] & ~refused[i], bool(refused[i]), lexical, None)

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
            yield _Found(scored, best, opened & (not refused), refused, lexical, rows)

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
            kept = kept[np.lexsort((-scored.scores[kept], -order_by[kept]))][: self.settings.k]
            failed = np.flatnonzero(~cut.keep)
            failed = failed[np.argsort(-scored.scores[failed], kind="stable")][: self.settings.k]
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
