"""The two-stage retriever: the category first, then the document, a threshold at each stage."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, get_args

import numpy as np
from typing_extensions import Unpack

from gemma_rag.encoders import Encoder
from gemma_rag.errors import InputError, KnowledgeBaseError
from gemma_rag.judging import Judge
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.lexical import reads_as_chinese
from gemma_rag.rerank import Reranker, as_reranker
from gemma_rag.results import Outcome, Retrieval
from gemma_rag.routing import Gate
from gemma_rag.search import Mode, Overrides, Search, Settings, Where, searching
from gemma_rag.thresholds import Threshold, as_threshold

logger = logging.getLogger(__name__)

_TRIES = 5
"""How often a search is begun anew because a writer took away what it was reading."""


class Retriever(Protocol):
    """Anything that finds documents for a question: `TwoStageRetriever`, or `gemma_rag.external.ExternalRetriever`."""

    @property
    def encoder(self) -> Encoder | None:
        """What embeds questions; None where there is none of ours."""
        ...

    @property
    def retrieve(self) -> Callable[..., Retrieval]:
        """From a question, and options by name, to what was found: `TwoStageRetriever.retrieve`."""
        ...


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
        hybrid: Order hits by cosine and matching words together; documents outside the opened categories come in where they
            match the words best. Without a calibration, thresholds act on the cosine. False: words count for nothing.
        lexical_weight: Share of the lexical score, 0 to 1, in that order; None for what the knowledge base has learned from
            labelled questions, or a half.
        gate: How stage one scores categories and how many it opens.
        max_categories: Most categories to open; None for as many as the gate wants. With 1 and
            ``Gate(name_weight=1)`` and ``hybrid=False`` this is the published naive form. With it, words do not bring in
            documents from elsewhere.
        reranker: A callable from a question and passages to scores, or the name or folder of a sentence-transformers
            CrossEncoder; orders the first `rerank_top` hits anew. Thresholds do not look at its scores.
        rerank_top: How many it sees.
        diversity: 0 to 1: how much a hit's likeness to those before it counts against it (maximal marginal relevance).
    """

    knowledge_base: KnowledgeBase
    k: int = 4
    category_threshold: float | str | Threshold | None = None
    document_threshold: float | str | Threshold | None = None
    mode: Mode = "auto"
    hybrid: bool = True
    lexical_weight: float | None = None
    gate: Gate = field(default_factory=Gate)
    max_categories: int | None = None
    reranker: Reranker | str | None = None
    rerank_top: int = 20
    diversity: float = 0.0

    def __post_init__(self) -> None:
        self._settings()

    @property
    def encoder(self) -> Encoder:
        """What embeds questions: the knowledge base's own."""
        return self.knowledge_base.encoder

    def retrieve(
        self,
        question: str,
        k: int | None = None,
        *,
        categories: Sequence[str] | None = None,
        where: Where | None = None,
        **settings: Unpack[Overrides],
    ) -> Retrieval:
        """Find the documents that answer a question.

        Args:
            question: The question.
            k: Most hits, instead of the retriever's own number.
            categories: Search these categories only, and those inside them.
            where: Search documents with this metadata only: ``{"year": 2024, "language": ["en", "zh"]}`` means the year
                is 2024 and the language one of the two. A list in the metadata matches if one of its members does.
            settings: Any of the retriever's own fields but the knowledge base, for this call.

        Raises:
            InputError: An empty question, an unknown category or setting, or an argument out of its range.
        """
        return self.retrieve_many([question], k, categories=categories, where=where, **settings)[0]

    async def aretrieve(
        self,
        question: str,
        k: int | None = None,
        *,
        categories: Sequence[str] | None = None,
        where: Where | None = None,
        **settings: Unpack[Overrides],
    ) -> Retrieval:
        """`retrieve` in a thread, which does not hold up the event loop."""
        return await asyncio.to_thread(self.retrieve, question, k, categories=categories, where=where, **settings)

    def retrieve_many(
        self,
        questions: Sequence[str],
        k: int | None = None,
        *,
        categories: Sequence[str] | None = None,
        where: Where | None = None,
        **settings: Unpack[Overrides],
    ) -> list[Retrieval]:
        """`retrieve` for several questions, which share the encoder's passes and the reading of the vectors."""
        asked = self._questions(questions)
        results: dict[int, Retrieval] = {}
        for places, each in self.plan(asked, k=k, **settings):
            found = self._search([asked[i] for i in places], each, categories, where)
            results.update(zip(places, found, strict=True))
        return [results[i] for i in range(len(asked))]

    def plan(
        self, questions: Sequence[str], k: int | None = None, **settings: Unpack[Overrides]
    ) -> list[tuple[list[int], Settings]]:
        """How each question will be searched: in ``auto`` mode, those that the model cannot read go by words.

        Args:
            questions: The questions.
            k: Most hits.
            settings: As in `retrieve`.

        Returns:
            The places of the questions that are searched alike, and how.
        """
        chosen = self._settings(k=k, **settings)
        everything = list(range(len(questions)))
        two_stage = chosen._replace(mode="two-stage") if chosen.mode == "auto" else chosen
        unread = self._unread(questions) if chosen.mode != "lexical" else []
        if not any(unread):
            return [(everything, two_stage)]
        name, count = self.knowledge_base.space.model, sum(unread)
        counted = "1 question is" if count == 1 else f"{count} questions are"
        if chosen.mode != "auto":
            logger.warning("%s does not read Chinese: %s scored, and the scores mean little", name, counted)
            return [(everything, two_stage)]
        logger.warning("%s does not read Chinese: %s searched by matching words instead", name, counted)
        words = chosen._replace(mode="lexical", category_threshold=None, document_threshold=None)
        parts = [
            ([i for i in everything if unread[i] is by_words], each) for by_words, each in ((False, two_stage), (True, words))
        ]
        return [(places, each) for places, each in parts if places]

    def _search(
        self, questions: list[str], settings: Settings, categories: Sequence[str] | None, where: Where | None
    ) -> list[Retrieval]:
        for left in reversed(range(_TRIES)):
            search = None
            try:
                search = searching(self.knowledge_base, settings, categories, where)
                return _run(search, questions)
            except KnowledgeBaseError:
                # another thread or process has rewritten or saved the knowledge base meanwhile: its new state answers
                moved = self.knowledge_base.refresh()
                replaced = search is not None and self.knowledge_base.view() is not search.view
                if not left or not (moved or replaced):
                    raise
        raise AssertionError("unreachable")

    @staticmethod
    def _questions(questions: Sequence[str]) -> list[str]:
        if isinstance(questions, str):
            raise InputError("questions is a list of strings, and one string came: call retrieve for one question")
        asked = list(questions)
        for i, question in enumerate(asked):
            if not isinstance(question, str) or not question.strip():
                raise InputError(f"the question at index {i} is empty or no string: ask something")
        return asked

    def _unread(self, questions: Sequence[str]) -> list[bool]:
        """Which questions are in a language that the model is known not to read."""
        chinese = [reads_as_chinese(question) for question in questions]
        if not any(chinese) or "zh" in (self.knowledge_base.encoder.profile.languages or ("zh",)):
            return [False] * len(questions)
        return chinese

    def _settings(self, **given: Any) -> Settings:
        """The retriever's own settings, with those of a call in their places."""
        if unknown := [name for name in given if name not in Settings._fields]:
            raise InputError(f"a retriever has no setting {', '.join(unknown)}: there are {', '.join(Settings._fields)}")
        values = {name: getattr(self, name) if given.get(name) is None else given[name] for name in Settings._fields}
        if isinstance(values["reranker"], str):
            values["reranker"] = _reranker(values["reranker"])
        elif values["reranker"] is not None:
            values["reranker"] = as_reranker(values["reranker"])
        settings = Settings(**values)
        if isinstance(settings.k, bool) or not isinstance(settings.k, int) or settings.k < 1:
            raise InputError(f"k is the number of hits, at least 1, and is {settings.k!r}")
        if settings.max_categories is not None and not (type(settings.max_categories) is int and settings.max_categories >= 1):
            raise InputError(f"max_categories is a number, at least 1, and is {settings.max_categories!r}")
        if settings.mode not in get_args(Mode):
            raise InputError(f"no mode is named {settings.mode!r}: there are {', '.join(get_args(Mode))}")
        for name, low, high in (("lexical_weight", 0.0, 1.0), ("diversity", 0.0, 1.0)):
            value = values[name]
            number = isinstance(value, (int, float, np.floating)) and not isinstance(value, bool)
            if value is not None and not (number and low <= value <= high):
                raise InputError(f"{name} is from 0 to 1, and is {value!r}")
        if type(settings.rerank_top) is not int or settings.rerank_top < 1:
            raise InputError(
                f"rerank_top is the number of hits that the reranker sees, at least 1, and is {settings.rerank_top!r}"
            )
        if not isinstance(settings.gate, Gate):
            raise InputError(f"gate is a gemma_rag.routing.Gate, and is {settings.gate!r}")
        if not isinstance(settings.hybrid, bool):
            raise InputError(f"hybrid is True or False, and is {settings.hybrid!r}")
        for threshold in (settings.category_threshold, settings.document_threshold):
            if threshold is not None:
                as_threshold(threshold)
        return settings


@lru_cache(maxsize=4)
def _reranker(name: str) -> Reranker:
    """A cross-encoder by its name, loaded once."""
    return as_reranker(name)


def _run(search: Search, questions: list[str]) -> list[Retrieval]:
    if not questions:
        return []
    started = time.perf_counter()
    judge = Judge(search)
    if not len(search.base) or not search.eligible.any():
        outcome = Outcome.FILTERED_OUT if len(search.base) else Outcome.EMPTY_KNOWLEDGE_BASE
        return [judge.retrieval(question, outcome, started) for question in questions]
    found = search.find(questions, judge.category_threshold)
    return [judge.judge(question, each, started) for question, each in zip(questions, found, strict=True)]
