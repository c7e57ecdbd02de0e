"""Searching a knowledge base whose rows are in a vector database: the gate here, the documents of what it opened there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from gemma_rag.errors import InputError, KnowledgeBaseError
from gemma_rag.fusion import reciprocal_rank
from gemma_rag.index.embedded import Scored
from gemma_rag.index.remote import RemoteRow, Wanted, matches
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.remote_view import RemoteView
from gemma_rag.search import _RESCUED_FOR, Found, Gated, Search, Settings, Where, wanted_values
from gemma_rag.thresholds import Threshold
from gemma_rag.vectors import Floats
from gemma_rag.view import Bools

_FEWEST = 50
"""Rows that are asked for at least, for each question."""

_TIMES = 10
"""Rows that are asked for, times ``k``."""

_CONSTANT = 60.0
"""Of reciprocal rank fusion."""

_PATIENCE = 3
"""Times that a search is disturbed by a writer until its result is taken as it is."""

_MOST = 16_384
"""Rows that are asked for at most: more than Milvus gives at a time is never looked at."""

_HOMES = 10_000
"""Rows with the metadata asked for that are read to know their categories; where there are more, the gate chooses among all."""


class RemoteSearch(Search):
    """One call of the retriever, over a knowledge base in a vector database.

    The gate is the one of `Search`. The database then gives, for each question, the nearest rows of the categories that it
    opened, ten times as many as there are to be hits. With words, its BM25 gives as many again, wherever the gate would look
    for them, and the hits are ordered by reciprocal rank fusion of both; thresholds act on the cosine, as everywhere.

    Args:
        base: What to search.
        settings: How; its mode is not ``auto`` any more.
        categories: Search these only, and those inside them.
        where: Search documents with this metadata only.

    Raises:
        InputError: The mode is ``lexical``, and the database does not rank by words.
    """

    view: RemoteView

    def __init__(self, base: KnowledgeBase, settings: Settings, categories: Sequence[str] | None, where: Where | None) -> None:
        base.refresh()  # the rows of an earlier generation may be gone
        self._where: Wanted | None = wanted_values(where) if where else None
        super().__init__(base, settings, categories, None)
        if isinstance(view := base.view(), RemoteView):  # it is
            self.view = view.session()
        self.engine = self.view.store.engine
        if self._where is not None:
            homes = self.engine.homes(self._where, self.view.generation, _HOMES)
            if homes is not None:
                self.eligible &= np.array([name in homes for name in self.view.categories], dtype=bool)
        self._name = {"milvus": "Milvus", "chroma": "Chroma"}.get(self.engine.name, self.engine.name)
        if self.kind == "lexical" and not self.engine.has_words:
            raise InputError(
                f"{self._name} does not rank by words, so that there is no mode 'lexical' on it: search with another mode, or "
                "copy the knowledge base to engine faiss or milvus with `gemma-rag copy`"
            )
        if self.kind == "hybrid":
            self.notes.append(
                f"hits are ordered by the ranks of cosine and BM25 of {self._name}, fused (reciprocal rank fusion)"
                if self.engine.has_words
                else f"{self._name} does not rank by words: BM25 orders the documents that it found by their vectors, and "
                "brings in no others"
            )

    # -- rows from the database -------------------------------------------------------------------------------------

    @property
    def _asked(self) -> int:
        return max(_FEWEST, _TIMES * self.settings.k, 2 * self.wanted)

    def _names(self, opened: Bools) -> list[str] | None:
        """The names of the opened categories; None for all there are."""
        return None if opened.all() else [self.view.categories[code] for code in np.flatnonzero(opened).tolist()]

    def _is_meant(self, row: RemoteRow) -> bool:
        return self.view.store.is_visible(row) and (self._where is None or matches(row.metadata, self._where))

    def _nearest(self, queries: Floats, opened: Sequence[Bools]) -> list[list[tuple[RemoteRow, float]]]:
        """For each question the nearest rows that are meant: more are asked for until there are enough documents."""
        found: list[list[tuple[RemoteRow, float]]] = [[] for _ in opened]
        todo = [i for i, some in enumerate(opened) if some.any()]
        n = self._asked
        while todo:
            answers = self.engine.search(
                queries[todo], [self._names(opened[i]) for i in todo], n, self._where, self.view.generation
            )
            short = []
            for i, answer in zip(todo, answers, strict=True):
                found[i] = [(row, score) for row, score in answer if self._is_meant(row)]
                if len({row.id for row, _ in found[i]}) < self.wanted and len(answer) >= n:
                    short.append(i)
            if n >= _MOST:
                break
            todo, n = short, min(_MOST, 4 * n)
        return found

    def _best_words(self, question: str, opened: Bools) -> list[RemoteRow]:
        with self.timed("words"):
            found = self.engine.words(question, self._names(opened), self._asked, self._where, self.view.generation)
        return [row for row in found if self._is_meant(row)]

    def _check_undisturbed(self) -> None:
        """Begin anew where somebody has committed meanwhile: what was replaced is gone from the generation that is read.

        Where that happens again and again, the result is given, with a note.

        Raises:
            KnowledgeBaseError: For `TwoStageRetriever`, which refreshes and begins anew.
        """
        store = self.view.store
        if not store.has_moved(self.view.generation):
            store.disturbed = 0
            return
        store.disturbed += 1
        if store.disturbed < _PATIENCE:
            raise KnowledgeBaseError(f"another process has committed to {store.path} during the search: search again")
        self.notes.append("another process was writing during the search: documents that it replaced may be missing")

    # -- the two stages ---------------------------------------------------------------------------------------------

    def _by_vectors(self, questions: list[str], threshold: Threshold) -> Iterator[Found]:
        flat = self.settings.mode == "flat"
        with self.timed("encode"):
            queries, classification = self.encoded(questions, classify=not flat)
        with self.timed("categories"):
            gates = self._flat(len(questions)) if flat else self.gated(classification, queries, threshold)
        with self.timed("documents"):
            nothing = np.zeros(len(self.eligible), dtype=bool)
            near = self._nearest(queries, [nothing if gate.refused else gate.opened for gate in gates])
            if not flat:
                gates, near = self._rescued(gates, queries, near)
            self._check_undisturbed()
            router = None if self.learned.router is None else self.learned.router.log_probabilities(queries)
        for i, question in enumerate(questions):
            by_words: list[RemoteRow] = []
            if self.kind == "hybrid" and self.engine.has_words and not gates[i].refused:
                narrow = self.settings.max_categories is not None or flat
                by_words = self._best_words(question, gates[i].opened if narrow else self.eligible)
            with self.timed("documents"):
                scored, ranks = self._scored(queries[i], near[i], by_words, gates[i].opened)
            yield self._fused(question, gates[i], scored, ranks, None if router is None else router[i])

    def _rescued(
        self, gates: list[Gated], queries: Floats, near: list[list[tuple[RemoteRow, float]]]
    ) -> tuple[list[Gated], list[list[tuple[RemoteRow, float]]]]:
        """Open the categories that promise more than the last hit holds, as `Search` does."""
        wanted = min(self.settings.k, _RESCUED_FOR)
        more = []
        for gate, rows in zip(gates, near, strict=True):
            best: dict[str, float] = {}
            for row, score in rows:
                if gate.opened[self.view.code_of[row.category]]:  # guests do not count in `Search` either
                    best.setdefault(row.id, score)
            weakest = sorted(best.values())[-wanted] if len(best) >= wanted else -1.0
            rescued = self.eligible & ~gate.opened & (gate.scores > weakest)
            if self.settings.max_categories is not None:
                left = max(0, self.settings.max_categories - int(gate.opened.sum()))
                rescued[np.argsort(-np.where(rescued, gate.scores, -np.inf), kind="stable")[left:]] = False
            more.append(rescued & (not gate.refused))
        if any(rescued.any() for rescued in more):
            found = self._nearest(queries, more)
            near = [own + others for own, others in zip(near, found, strict=True)]
        gates = [
            gate._replace(opened=gate.opened | rescued, rescued=rescued) for gate, rescued in zip(gates, more, strict=True)
        ]
        return gates, near

    def _scored(
        self, query: Floats, near: Sequence[tuple[RemoteRow, float]], by_words: Sequence[RemoteRow], opened: Bools
    ) -> tuple[Scored, dict[int, int]]:
        """Each document by the best of its rows, and the rank by words of those that have one, by place."""
        best: dict[int, tuple[float, int]] = {}
        ranks: dict[int, int] = {}
        cosines = np.clip([row.vector @ query for row in by_words if row.vector is not None], -1.0, 1.0)
        for row, score in [*near, *zip(by_words, cosines.tolist(), strict=True)]:
            place, number = self.view.index.row(row)
            if place not in best or score > best[place][0]:
                best[place] = (score, number)
        for row in by_words:
            ranks.setdefault(self.view.index.row(row)[0], len(ranks) + 1)
        places = np.array(list(best), dtype=np.int64)
        scores = np.array([score for score, _ in best.values()], dtype=np.float32)
        rows = np.array([number for _, number in best.values()], dtype=np.int64)
        compared = max(len(places), min(self.view.documents_total, int(self.view.counts()[opened].sum())))
        return Scored(places, scores, rows, compared if self._where is None else len(places)), ranks

    def _fused(self, question: str, gate: Gated, scored: Scored, ranks: dict[int, int], router: Floats | None) -> Found:
        cosines = scored.scores.astype(np.float64)
        words, order = None, (1.0 - self.lexical_weight) * cosines
        if self.kind == "hybrid" and not gate.refused:
            with self.timed("words"):
                words = self._lexical(question, scored)
            if self.engine.has_words:
                by_words = np.array([-ranks.get(place, np.nan) for place in scored.places.tolist()], dtype=np.float64)
                weights = [1.0 - self.lexical_weight, self.lexical_weight]
                if len(cosines):  # scaled so that who is first in both has 1
                    order = (_CONSTANT + 1.0) * reciprocal_rank([cosines, by_words], weights, _CONSTANT)
            else:
                order += self.lexical_weight * words
        by_category = None
        if router is not None and self.learned.ranking is not None:
            by_category = self.of_categories(router, scored.places)
            order = order + self.learned.ranking.router_weight * by_category
        return Found(gate, scored, words, by_category, order)

    def _lexical(self, question: str, scored: Scored) -> Floats:
        """The lexical scores of documents; of long ones those of the chunks that were found."""
        index = self.view.index
        texts = [index.text(place, row) for place, row in zip(scored.places.tolist(), scored.rows.tolist(), strict=True)]
        return self.view.lexical.scores_of(question, texts)

    def _by_words(self, question: str, threshold: Threshold) -> Found:
        """Both stages by matching words: a category scores as its best document does, and every one is looked into."""
        best: dict[int, int] = {}
        for row in self._best_words(question, self.eligible):
            place, number = self.view.index.row(row)
            best.setdefault(place, number)
        places, rows = (np.array(list(some), dtype=np.int64) for some in (best.keys(), best.values()))
        scored = Scored(places, np.zeros(len(places), dtype=np.float32), rows, len(places))
        words = self._lexical(question, scored)
        inside = words > 0
        places, rows, words = places[inside], rows[inside], words[inside]
        scores = np.zeros(len(self.eligible), dtype=np.float32)
        homes = [[self.view.code_of[name] for name in self.view.index.first(place).categories] for place in places.tolist()]
        for codes, score in zip(homes, words.tolist(), strict=True):
            scores[codes] = np.maximum(scores[codes], score)
        scores[~self.eligible] = 0.0
        opened = scores > 0
        if self.settings.max_categories is not None:
            opened[np.argsort(-scores, kind="stable")[self.settings.max_categories :]] = False
            kept = np.array([bool(opened[codes].any()) for codes in homes], dtype=bool)
            places, rows, words = places[kept], rows[kept], words[kept]
        refused = not threshold.apply(scores[self.eligible]).keep.any()
        none = np.zeros(len(scores), dtype=bool)
        gate = Gated(scores, np.zeros(len(scores)), none if refused else opened, none, refused)
        return Found(gate, Scored(places, words, rows, len(places)), words, None, words.astype(np.float64))
