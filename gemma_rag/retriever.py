"""The two-stage retriever: the category first, then the document, a threshold at each stage."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from gemma_rag.errors import InputError, KnowledgeBaseError
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.lexical import reads_as_chinese
from gemma_rag.results import Retrieval
from gemma_rag.routing import Gate
from gemma_rag.search import Mode, Search, Settings, Where
from gemma_rag.thresholds import Threshold, as_threshold

logger = logging.getLogger(__name__)


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
            if places:
                found = self._search([questions[i] for i in places], each, categories, where)
                results.update(zip(places, found, strict=True))
        return [results[i] for i in range(len(questions))]

    def _search(
        self, questions: list[str], settings: Settings, categories: Sequence[str] | None, where: Where | None
    ) -> list[Retrieval]:
        search = Search(self.knowledge_base, self.gate, settings, categories, where)
        try:
            return search.run(questions)
        except KnowledgeBaseError:
            if self.knowledge_base.view() is search.view:
                raise
        # another thread has rewritten or saved the knowledge base meanwhile: its new state answers
        return Search(self.knowledge_base, self.gate, settings, categories, where).run(questions)

    def _unread(self, questions: Sequence[str]) -> list[bool]:
        """Which questions are in a language that the model is known not to read."""
        chinese = [reads_as_chinese(question) for question in questions]
        if not any(chinese) or "zh" in (self.knowledge_base.encoder.profile.languages or ("zh",)):
            return [False] * len(questions)
        return chinese

    def _settings(self, **given: Any) -> Settings:
        """The retriever's own settings, with those of a call in their places."""
        values = {name: getattr(self, name) if given.get(name) is None else given[name] for name in Settings._fields}
        settings = Settings(**values)
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
