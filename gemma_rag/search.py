"""The two stages of one search: which categories are opened, which documents are scored. `judging` makes the result."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from typing_extensions import TypedDict

from gemma_rag.encoders import Input
from gemma_rag.errors import InputError
from gemma_rag.index.embedded import Scored, joined
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.learned import Kind, Learned
from gemma_rag.lexical import LexicalIndex
from gemma_rag.prompts import Task
from gemma_rag.rerank import Reranker
from gemma_rag.routing import Gate
from gemma_rag.thresholds import Threshold
from gemma_rag.vectors import Floats
from gemma_rag.view import View

Mode: TypeAlias = Literal["auto", "two-stage", "flat", "lexical"]
Scalar: TypeAlias = str | int | float | bool | None
Where: TypeAlias = Mapping[str, Scalar | Sequence[Scalar]]
Bools: TypeAlias = npt.NDArray[np.bool_]
Ints: TypeAlias = npt.NDArray[np.int64]

LEXICAL_WEIGHT = 0.5
"""Share of the lexical score in the fused one, unless it was learned; docs/decisions/0007 has the measurements."""

_BY_WORDS = 10
"""Documents outside the opened categories that are scored because they match the question's words best, at least."""


_FEWEST = 10
"""Documents that are ranked, at least: those whose evidence a calibration weighs."""

DIVERSE = 4
"""Times ``k``: the documents from which diverse ones are chosen."""

_RESCUED_FOR = 5
"""A category that the gate left out is opened if it promises more than the last of this many hits (or of ``k``) holds."""


class Settings(NamedTuple):
    """What `TwoStageRetriever` and one call of it decide together; the fields are the retriever's own."""

    k: int
    category_threshold: float | str | Threshold | None
    document_threshold: float | str | Threshold | None
    mode: Mode
    hybrid: bool
    lexical_weight: float | None
    gate: Gate
    max_categories: int | None
    reranker: Reranker | None
    rerank_top: int
    diversity: float


class Overrides(TypedDict, total=False):
    """The same, each of them for one call; None for the retriever's own."""

    category_threshold: float | str | Threshold | None
    document_threshold: float | str | Threshold | None
    mode: Mode | None
    hybrid: bool | None
    lexical_weight: float | None
    gate: Gate | None
    max_categories: int | None
    reranker: Reranker | str | None
    rerank_top: int | None
    diversity: float | None


class Gated(NamedTuple):
    """What stage one made of one question.

    Attributes:
        scores: float32 of shape ``(categories,)``; NaN in flat mode.
        probabilities: float64 of shape ``(categories,)``.
        opened: bool of shape ``(categories,)``: whose documents were searched.
        rescued: bool of shape ``(categories,)``: those of them that were opened afterwards.
        refused: The best category was not good enough.
    """

    scores: Floats
    probabilities: npt.NDArray[np.float64]
    opened: Bools
    rescued: Bools
    refused: bool


class Found(NamedTuple):
    """What the two stages found for one question, before thresholds at stage two.

    Attributes:
        gated: Of stage one.
        scored: The documents that were scored; by their lexical scores in lexical mode.
        words: float32 of shape ``(n,)``: their lexical scores; None where words were not looked at.
        router: float32 of shape ``(n,)``: log-probability of their categories; None without a learned router.
        order: float64 of shape ``(n,)``: what they are ordered by.
    """

    gated: Gated
    scored: Scored
    words: Floats | None
    router: Floats | None
    order: npt.NDArray[np.float64]


class Matched:
    """How well documents match the words of one question.

    Args:
        index: Their words.
        question: The question.
        few: Score the documents that are asked for, and no others; else all of them, at once.

    Attributes:
        every: float32 of shape ``(documents,)``: the scores of all; None with `few`.
    """

    def __init__(self, index: LexicalIndex, question: str, *, few: bool) -> None:
        self._index, self._question = index, question
        self.every: Floats | None = None if few else index.scores(question)

    def at(self, places: Ints) -> Floats:
        """The scores of some documents."""
        return self._index.at(self._question, places) if self.every is None else self.every[places]

    def best(self, n: int) -> Ints:
        """The places of the `n` best, or of fewer, those that score above 0."""
        return self._index.best(self._question, n)[0]


class Search:
    """One call of the retriever, over one generation of the knowledge base.

    Args:
        base: What to search.
        settings: How; its mode is not ``auto`` any more.
        category_threshold: What the best category has to reach.
        categories: Search these only, and those inside them.
        where: Search documents with this metadata only.

    Attributes:
        kind: How documents are scored.
        lexical_weight: Share of the lexical score in the fused one.
        timings: Milliseconds by step.
        notes: What the reader of the result should know.
    """

    def __init__(
        self,
        base: KnowledgeBase,
        settings: Settings,
        categories: Sequence[str] | None,
        where: Where | None,
    ) -> None:
        self.base = base
        self.view: View = base.view()
        self.settings = settings
        self.timings: dict[str, float] = {}
        self.notes: list[str] = []
        self.eligible = self._eligible(categories)
        self.allowed = self._allowed(where) if where else None
        if self.allowed is not None:
            self.eligible &= self._have_documents(self.allowed)
        self.learned = self._in_force(base.learned if settings.mode != "lexical" else Learned())
        self.lexical_weight = self._lexical_weight()
        self.kind: Kind = "lexical" if settings.mode == "lexical" else "hybrid" if self.lexical_weight else "dense"

    def find(self, questions: list[str], category_threshold: Threshold) -> Iterator[Found]:
        """Both stages for each of the questions.

        Args:
            questions: At least one.
            category_threshold: What the best category has to reach.
        """
        if self.kind == "lexical":
            return (self._by_words(question, category_threshold) for question in questions)
        return self._by_vectors(questions, category_threshold)

    # -- who may be found -------------------------------------------------------------------------------------------

    def _eligible(self, categories: Sequence[str] | None) -> Bools:
        names = self.view.categories
        if categories is None:
            return np.ones(len(names), dtype=bool)
        if isinstance(categories, str):
            raise InputError("categories is a list of names, and one string came: put it in a list")
        inside = {wanted: [name == wanted or name.startswith(f"{wanted}/") for name in names] for wanted in categories}
        if unknown := [wanted for wanted, matches in inside.items() if not any(matches)]:
            raise InputError(
                f"the knowledge base has no category {', '.join(map(repr, unknown))}. It has "
                f"{', '.join(names[:30])}{' ...' if len(names) > 30 else ''}"
            )
        chosen: Bools = np.zeros(len(names), dtype=bool)
        for matches in inside.values():
            chosen |= np.array(matches)
        return chosen

    def _have_documents(self, places: Bools) -> Bools:
        """Which categories have some of the documents."""
        count = np.bincount(self.view.index.codes[places], minlength=len(self.view.categories))
        guests = self.view.guests
        count += np.bincount(guests[places[guests[:, 0]], 1], minlength=len(count))
        return count > 0

    def _allowed(self, where: Where) -> Bools:
        """Which documents have the metadata asked for."""
        metadata, wanted = self.view.metadata, wanted_values(where)
        return np.array(
            [
                all(key in metadata[number] and _matches(metadata[number][key], values) for key, values in wanted.items())
                for number in self.view.index.documents.tolist()
            ],
            dtype=bool,
        )

    def _in_force(self, learned: Learned) -> Learned:
        """What was learned, without the router where the categories are no longer those that it knows."""
        router = learned.router
        if router is None or router.categories == self.view.categories:
            return learned
        new = sorted(set(self.view.categories) - set(router.categories))
        gone = sorted(set(router.categories) - set(self.view.categories))
        changes = [f"{word}: {', '.join(names[:5])}" for word, names in (("new", new), ("gone", gone)) if names]
        self.notes.append(
            f"the learned router was left out: the categories have changed since it was fitted ({'; '.join(changes)}). "
            "Fit it again with `gemma-rag fit`"
        )
        return learned._replace(router=None)

    def _lexical_weight(self) -> float:
        if not self.settings.hybrid:
            return 0.0
        if self.settings.lexical_weight is not None:
            return self.settings.lexical_weight
        return LEXICAL_WEIGHT if self.learned.ranking is None else self.learned.ranking.lexical_weight

    # -- the two stages ---------------------------------------------------------------------------------------------

    def _by_vectors(self, questions: list[str], threshold: Threshold) -> Iterator[Found]:
        flat = self.settings.mode == "flat"
        with self.timed("encode"):
            queries, classification = self.encoded(questions, classify=not flat)
        with self.timed("categories"):
            gates = self._flat(len(questions)) if flat else self.gated(classification, queries, threshold)
        with self.timed("documents"):
            opened = np.stack([gate.opened for gate in gates])
            inside = self.view.index.search(queries, opened, self.wanted, self.base.search_plan, self.allowed)
            router = None if self.learned.router is None else self.learned.router.log_probabilities(queries)
        for i, question in enumerate(questions):
            words = self._words(question) if self.lexical_weight and not gates[i].refused else None
            with self.timed("documents"):
                gate, scored = self._widened(gates[i], queries[i], inside[i], words)
            yield self._found(gate, scored, words, None if router is None else router[i])

    def encoded(self, questions: list[str], *, classify: bool) -> tuple[Floats, Floats]:
        """The questions under the query prompt and under the classification prompt, each text embedded once."""
        inputs = [Input(question, Task.QUERY) for question in questions]
        profile = self.base.encoder.profile
        if not classify or profile.prompt(Task.QUERY) == profile.prompt(Task.CLASSIFICATION):
            rows = self.base.encoder.encode(inputs)
            return rows, rows
        rows = self.base.encoder.encode([*inputs, *(Input(question, Task.CLASSIFICATION) for question in questions)])
        return rows[: len(questions)], rows[len(questions) :]

    def _flat(self, count: int) -> list[Gated]:
        nothing = np.full(len(self.eligible), np.nan, dtype=np.float32)
        none = np.zeros(len(self.eligible), dtype=bool)
        return [Gated(nothing, np.zeros(len(none)), self.eligible, none, refused=False)] * count

    def gated(self, classification: Floats, queries: Floats, threshold: Threshold) -> list[Gated]:
        """Stage one.

        Args:
            classification: Questions under the classification prompt, shape ``(q, d)``.
            queries: The same under the query prompt.
            threshold: What the best category has to reach.
        """
        gate, tree = self.settings.gate, self.view.tree
        nodes = gate.scores(classification, queries, *self.view.names, self.view.overview)
        shares, opened = tree.walk(gate, nodes, self.eligible, self.settings.max_categories)
        scores = nodes[:, tree.leaves]
        none = np.zeros(len(self.eligible), dtype=bool)
        out = []
        for row, share, kept in zip(scores, shares, opened, strict=True):
            refused = not threshold.apply(row[self.eligible]).keep.any()
            out.append(Gated(row, share, none if refused else kept, none, refused))
        return out

    def _widened(self, gate: Gated, query: Floats, scored: Scored, words: Matched | None) -> tuple[Gated, Scored]:
        """Score what the gate left out and should not have: promising categories, guests, documents that match by words."""
        if gate.refused:
            return gate, scored
        opened, rescued, parts = gate.opened, gate.rescued, [scored]
        if self.settings.mode != "flat":
            rescued = self._promising(gate, scored)
            if rescued.any():
                parts += self.view.index.search(query[None], rescued[None], self.wanted, self.base.search_plan, self.allowed)
            opened = opened | rescued
        guests = self.view.guests
        further = guests[opened[guests[:, 1]], 0]
        if words is not None and self.settings.max_categories is None and self.settings.mode != "flat":
            further = np.concatenate([further, self._best_by_words(words)])
        elif words is not None and self.base.search_plan is not None:  # the shortlist was made without them
            best_words = self._best_by_words(words)
            further = np.concatenate([further, best_words[opened[self.view.index.codes[best_words]]]])
        if self.allowed is not None:
            further = further[self.allowed[further]]
        if not len(further):
            return gate._replace(opened=opened, rescued=rescued), joined(parts)
        further = np.setdiff1d(further, np.concatenate([part.places for part in parts]))
        if self.view.index.alive is not None:
            further = further[self.view.index.alive[further]]
        return gate._replace(opened=opened, rescued=rescued), joined([*parts, self.view.index.score(query, further)])

    def _promising(self, gate: Gated, scored: Scored) -> Bools:
        """Categories that promise more than what was found holds, as many as may still be opened."""
        left = len(gate.opened)
        if self.settings.max_categories is not None:
            left = self.settings.max_categories - int(gate.opened.sum())
        if left <= 0:
            return gate.rescued
        wanted = min(self.settings.k, _RESCUED_FOR)
        enough = len(scored.places) >= wanted
        weakest = float(np.partition(scored.scores, -wanted)[-wanted]) if enough else -1.0
        rescued: Bools = self.eligible & ~gate.opened & (gate.scores > weakest)
        if int(rescued.sum()) > left:
            rescued[np.argsort(-np.where(rescued, gate.scores, -np.inf), kind="stable")[left:]] = False
        return rescued

    @property
    def wanted(self) -> int:
        """Documents of which stage two has to know the order: the hits, what they are chosen from, and as many near misses."""
        settings = self.settings
        return max(
            _FEWEST,
            2 * settings.k,
            settings.rerank_top if settings.reranker is not None else 0,
            DIVERSE * settings.k if settings.diversity else 0,
        )

    def _best_by_words(self, words: Matched) -> Ints:
        """The documents that match the question's words best, wherever the gate would look for them."""
        wanted = max(_BY_WORDS, self.settings.k)
        if words.every is None:
            return words.best(wanted)
        candidates = words.every
        if not self.eligible.all():
            candidates = np.where(self.view.places_in(self.eligible), candidates, 0.0)
        if self.allowed is not None:
            candidates = np.where(self.allowed, candidates, 0.0)
        wanted = min(len(candidates), wanted)
        best_words = np.argpartition(-candidates, wanted - 1)[:wanted]
        return best_words[candidates[best_words] > 0]

    def _by_words(self, question: str, threshold: Threshold) -> Found:
        """Both stages by matching words: a category scores as its best document does, and every one is looked into."""
        with self.timed("words"):
            words = self.view.lexical.scores(question)
        inside = (words > 0) & self.view.places_in(self.eligible)
        if self.allowed is not None:
            inside &= self.allowed
        best = np.zeros(len(self.eligible), dtype=np.float32)
        places = np.flatnonzero(inside)
        np.maximum.at(best, self.view.index.codes[places], words[places])
        guests = self.view.guests[inside[self.view.guests[:, 0]]]
        np.maximum.at(best, guests[:, 1], words[guests[:, 0]])
        best[~self.eligible] = 0.0
        opened = best > 0
        if self.settings.max_categories is not None:
            opened[np.argsort(-best, kind="stable")[self.settings.max_categories :]] = False
            places = np.flatnonzero(inside & self.view.places_in(opened))
        refused = not threshold.apply(best[self.eligible]).keep.any()
        none = np.zeros(len(best), dtype=bool)
        gate = Gated(best, np.zeros(len(best)), none if refused else opened, none, refused)
        scored = Scored(places, words[places], np.zeros(0, dtype=np.int64), len(places))
        return Found(gate, scored, words[places], None, words[places].astype(np.float64))

    def _found(self, gate: Gated, scored: Scored, words: Matched | None, router: Floats | None) -> Found:
        weight = self.lexical_weight
        order = (1.0 - weight) * scored.scores.astype(np.float64)
        own = None if words is None else words.at(scored.places)
        if own is not None:
            order += weight * own
        by_category = None
        if router is not None and self.learned.ranking is not None:
            by_category = self.of_categories(router, scored.places)
            order += self.learned.ranking.router_weight * by_category
        return Found(gate, scored, own, by_category, order)

    def weights(self) -> dict[str, float]:
        """The weight of each part of the fused score."""
        if self.kind == "lexical":
            return {"lexical": 1.0}
        parts = {"cosine": 1.0 - self.lexical_weight}
        if self.lexical_weight:
            parts["lexical"] = self.lexical_weight
        if self.learned.router is not None and self.learned.ranking is not None:
            parts["router"] = self.learned.ranking.router_weight
        return parts

    def of_categories(self, values: Floats, places: Ints) -> Floats:
        """For each document the value of its category; of several categories the best.

        Args:
            values: Of the categories.
            places: Of the documents.
        """
        own: Floats = values[self.view.index.codes[places]]
        guests = self.view.guests
        if len(guests) and not np.isnan(values).any():
            firsts, lasts = (np.searchsorted(guests[:, 0], places, side=side) for side in ("left", "right"))
            for i in np.flatnonzero(lasts > firsts).tolist():
                own[i] = max(own[i], values[guests[firsts[i] : lasts[i], 1]].max())
        return own

    def _words(self, question: str) -> Matched:
        few = self.base.search_plan is not None and self.allowed is None and bool(self.eligible.all())
        with self.timed("words"):
            return Matched(self.view.lexical, question, few=few)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the time of what is done inside to a step's."""
        started = time.perf_counter()
        yield
        self.timings[step] = self.timings.get(step, 0.0) + (time.perf_counter() - started) * 1e3


def searching(base: KnowledgeBase, settings: Settings, categories: Sequence[str] | None, where: Where | None) -> Search:
    """The search of a call, by what keeps the vectors."""
    if base.manifest.engine.name == "faiss":
        return Search(base, settings, categories, where)
    from gemma_rag.remote_search import RemoteSearch

    return RemoteSearch(base, settings, categories, where)


def wanted_values(where: Where) -> dict[str, list[Scalar]]:
    """For each key of the metadata the values that are searched for.

    Raises:
        InputError: `where` is no mapping, or one of the values is no text, number, truth value or None.
    """
    if not isinstance(where, Mapping):
        raise InputError(f"where is a mapping of metadata to values, as in {{'year': 2024}}, and is {where!r}")
    wanted: dict[str, list[Scalar]] = {}
    for key, given in where.items():
        values: list[Any] = list(given) if isinstance(given, (list, tuple, set, frozenset)) else [given]
        plain = [value.item() if isinstance(value, np.generic) else value for value in values]
        for value in plain:
            if not (value is None or isinstance(value, (str, int, float))):
                raise InputError(
                    f"where has {value!r} for {key!r}, and a value is a text, a number, true, false or None, or a list of "
                    "them: there are no operators such as $gte"
                )
        wanted[key] = plain
    return wanted


def _matches(have: Any, values: list[Any]) -> bool:
    """Whether metadata is one of the values, or, where it is a list, has one of them; true is not 1."""
    if isinstance(have, list):
        return any(_matches(item, values) for item in have)
    return any(have == value and isinstance(have, bool) == isinstance(value, bool) for value in values)
