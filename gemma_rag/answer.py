"""A grounded answer: from the retrieved passages only, cited, or an honest refusal.

Without a language model the answer is extractive: the sentences of the best passages that come closest to the
question, quoted word for word. With one, the model sees the numbered passages and nothing else, and is not called at
all where the retriever kept nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, cast

import numpy as np

from gemma_rag.encoders import Encoder, Input
from gemma_rag.errors import InputError
from gemma_rag.grounding import Language, cited_numbers, declines, grounded_prompt, may_decline, piece_text, without_thoughts
from gemma_rag.lexical import LexicalIndex, reads_as_chinese
from gemma_rag.passages import sentences
from gemma_rag.prompts import Task
from gemma_rag.results import Outcome, Retrieval
from gemma_rag.retriever import Retriever
from gemma_rag.vectors import cosines

Writer: TypeAlias = Callable[[str, str], Iterable[str]]
"""A language model: takes the system's and the user's message, gives the answer piece by piece."""

_QUOTED_HITS = 3
_QUOTED_SENTENCES = 2
_QUOTED_SHARE = 0.8
"""A second sentence is quoted only if it scores at least this share of the best one."""


class ChatModel(Protocol):
    """What we need of a LangChain chat model."""

    def stream(self, input: Any, /) -> Iterator[Any]:  # noqa: A002 - LangChain's own name
        """Answer a list of ``(role, text)`` pairs, piece by piece."""
        ...


@dataclass(frozen=True)
class Citation:
    """A passage that the answer rests on.

    Attributes:
        number: As it stands in the answer's text: ``[1]``.
        id: Of the document.
        title: Its title.
        category: Its category.
        quote: The passage.
    """

    number: int
    id: str
    title: str
    category: str
    quote: str


@dataclass(frozen=True)
class Answer:
    """What a question got.

    Attributes:
        question: The question.
        text: The answer, or, where there is none, the reason.
        outcome: Whether it was answered, or why not.
        kind: ``extractive`` (quoted sentences), ``generated`` (written by a language model), or ``refusal``.
        citations: The passages cited in `text`, in the order of their numbers.
        unknown_citations: Numbers in `text` that no passage has: the model made them up.
        retrieval: What the answer was made from.
    """

    question: str
    text: str
    outcome: Outcome
    kind: Literal["extractive", "generated", "refusal"]
    citations: tuple[Citation, ...]
    unknown_citations: tuple[int, ...]
    retrieval: Retrieval

    def to_json(self) -> dict[str, Any]:
        """The answer and its retrieval as one plain JSON object."""
        return {
            **self.retrieval.to_json(),
            "outcome": self.outcome.value,
            "answer": self.text,
            "kind": self.kind,
            "citations": [
                {"number": c.number, "id": c.id, "title": c.title, "category": c.category, "quote": c.quote}
                for c in self.citations
            ],
            "unknown_citations": list(self.unknown_citations),
        }


class Draft:
    """An answer that a language model is writing, piece by piece; for the loop of whoever calls the model.

    What may still turn out to be "I don't know" is held back, so that nobody is shown words that are then taken back: all
    that `add` and `finish` return, joined, is the text of the answer. Thoughts that the model writes before it,
    ``<think> ... </think>``, are no part of it.

    Args:
        retrieval: What to answer from; it has hits.
        language: Of the prompt and of a refusal; None for Chinese where the question is Chinese, else English.

    Raises:
        InputError: The retrieval has no hits: there is nothing to ask a model about.
    """

    def __init__(self, retrieval: Retrieval, language: Language | None = None) -> None:
        if not retrieval.hits:
            raise InputError("nothing was retrieved, so there is nothing to write: make a refusal of it with `refuse`")
        self.retrieval = retrieval
        self.language = _language(retrieval, language)
        self._written = ""
        self._shown = 0

    @property
    def messages(self) -> tuple[str, str]:
        """The system's and the user's message for the model."""
        return grounded_prompt(self.retrieval.question, self.retrieval.hits, self.language)

    def add(self, piece: str) -> str:
        """Take a piece that the model wrote.

        Returns:
            What can be shown of the answer now and was not shown before; may be empty.
        """
        self._written += piece
        text = without_thoughts(self._written, finished=False)
        return "" if not self._shown and may_decline(text) else self._news(text)

    def finish(self) -> tuple[str, Answer]:
        """The model has written all.

        Returns:
            The rest of the text to show, and the answer; a refusal where the model knew nothing.
        """
        text = without_thoughts(self._written, finished=True)
        if not text or declines(text):
            refusal = _refusal(self.retrieval, Outcome.DECLINED_BY_MODEL, self.language)
            return refusal.text, refusal
        return self._news(text), _answer(self.retrieval, text, "generated", cited_numbers(text))

    def _news(self, text: str) -> str:
        news, self._shown = text[self._shown :], len(text)
        return news


class GroundedAnswerer:
    """Answers questions from a knowledge base.

    Args:
        retriever: Finds the passages.
        llm: Writes the answer: a LangChain chat model, or a `Writer`. None for extractive answers.
        language: Language of the prompt and of refusals; None for Chinese where the question is Chinese, else English.
    """

    def __init__(
        self, retriever: Retriever, llm: ChatModel | Writer | None = None, *, language: Language | None = None
    ) -> None:
        if language not in (None, "en", "zh"):
            raise InputError(f"the language of an answer is 'en' or 'zh', and is {language!r}")
        self.retriever = retriever
        self.language = language
        self._write = None if llm is None else as_writer(llm)

    def answer(self, question: str, **options: Any) -> Answer:
        """Answer a question.

        Args:
            question: The question.
            options: As for `TwoStageRetriever.retrieve`.

        Raises:
            InputError: As `TwoStageRetriever.retrieve` raises it. What the language model raises comes through as it is.
        """
        return self.answer_from(self.retriever.retrieve(question, **options))

    def answer_from(self, retrieval: Retrieval) -> Answer:
        """Answer from what was retrieved before."""
        return next(part for part in self.stream_from(retrieval) if isinstance(part, Answer))

    def stream(self, question: str, **options: Any) -> Iterator[str | Answer]:
        """Answer a question as `answer` does, and show the text as it is written.

        Yields:
            Pieces of the text, which joined are the answer's, and at the end the `Answer`.
        """
        yield from self.stream_from(self.retriever.retrieve(question, **options))

    def stream_from(self, retrieval: Retrieval) -> Iterator[str | Answer]:
        """`stream`, from what was retrieved before."""
        if self._write is None or not retrieval.hits:
            by_words = not retrieval.hits or retrieval.mode == "lexical"
            answer = extract(retrieval, None if by_words else self.retriever.encoder, self.language)
            yield from (answer.text, answer)
            return
        draft = Draft(retrieval, self.language)
        for piece in self._write(*draft.messages):
            if shown := draft.add(piece):
                yield shown
        rest, answer = draft.finish()
        if rest:
            yield rest
        yield answer


def extract(retrieval: Retrieval, encoder: Encoder | None, language: Language | None = None) -> Answer:
    """The sentences of the best passages that come closest to the question, quoted.

    Args:
        retrieval: What to quote from; without hits the answer is a refusal.
        encoder: Compares the sentences with the question; None, and after a lexical search, matching words do.
        language: Of the quotation marks, or of the refusal, as for `GroundedAnswerer`.
    """
    if not retrieval.hits:
        return refuse(retrieval, language)
    found = [
        (number, sentence)
        for number, hit in enumerate(retrieval.hits[:_QUOTED_HITS], start=1)
        for sentence in dict.fromkeys(sentences(hit.passage))
    ]
    if not found:
        found = [(1, " ".join(retrieval.hits[0].passage.split()))]
    texts = [sentence for _, sentence in found]
    if encoder is None or retrieval.mode == "lexical":
        scores = LexicalIndex.of_texts(texts).scores(retrieval.question)
        if scores.max() <= 0.0:  # no word matches, and nothing tells one sentence from another: the best passage, whole
            found, scores = [(1, " ".join(retrieval.hits[0].passage.split()))], np.zeros(1, dtype=np.float32)
    else:
        rows = encoder.encode([Input(retrieval.question, Task.QUERY), *(Input(text, Task.DOCUMENT) for text in texts)])
        scores = cosines(rows[:1], rows[1:])[0]
        if retrieval.mode != "external":  # of two like sentences the one in the better document is the better source
            scores = scores + np.array([retrieval.hits[number - 1].score for number, _ in found], dtype=np.float32)
    best = np.argsort(-scores, kind="stable")[:_QUOTED_SENTENCES]
    chosen = sorted(int(i) for i in best if i == best[0] or scores[i] >= _QUOTED_SHARE * scores[best[0]])
    opening, closing = ("「", "」") if _language(retrieval, language) == "zh" else ("“", "”")
    text = " ".join(f"{opening}{found[i][1]}{closing} [{found[i][0]}]" for i in chosen)
    return _answer(retrieval, text, "extractive", [found[i][0] for i in chosen])


def refuse(retrieval: Retrieval, language: Language | None = None) -> Answer:
    """The refusal that a retrieval without hits makes, with its reason in words."""
    return _refusal(retrieval, retrieval.outcome, _language(retrieval, language))


def _language(retrieval: Retrieval, language: Language | None) -> Language:
    return language or ("zh" if reads_as_chinese(retrieval.question) else "en")


def _answer(retrieval: Retrieval, text: str, kind: Literal["extractive", "generated"], numbers: Sequence[int]) -> Answer:
    known = sorted(number for number in set(numbers) if 1 <= number <= len(retrieval.hits))
    citations = tuple(
        Citation(number, hit.document.id, hit.document.title, hit.document.category, hit.passage)
        for number in known
        for hit in [retrieval.hits[number - 1]]
    )
    unknown = tuple(number for number in dict.fromkeys(numbers) if number not in known)
    return Answer(retrieval.question, text, Outcome.ANSWERED, kind, citations, unknown, retrieval)


_REFUSALS_ZH = {
    Outcome.CATEGORY_BELOW_THRESHOLD: "我不知道：没有哪个类别与这个问题足够相关。",
    Outcome.DOCUMENT_BELOW_THRESHOLD: "我不知道：所选类别中没有文档与这个问题足够接近。",
    Outcome.FILTERED_OUT: "我不知道：没有文档符合筛选条件。",
    Outcome.EMPTY_KNOWLEDGE_BASE: "我不知道：知识库中没有文档。",
    Outcome.DECLINED_BY_MODEL: "我不知道：语言模型在文档中没有找到答案。",
    Outcome.NOTHING_RETRIEVED: "我不知道：没有检索到任何文档。",
}


def _refusal(retrieval: Retrieval, outcome: Outcome, language: Language) -> Answer:
    text = _REFUSALS_ZH[outcome] if language == "zh" else f"I don't know. {outcome.reason}"
    return Answer(retrieval.question, text, outcome, "refusal", (), (), retrieval)


def as_writer(llm: ChatModel | Writer) -> Writer:
    """Anything that writes, as a `Writer`.

    Raises:
        InputError: It is neither a chat model nor a function.
    """
    if hasattr(llm, "stream"):
        return _ChatWriter(llm)
    if callable(llm):
        return llm
    raise InputError(f"llm must be a LangChain chat model or a function of two messages, and is a {type(llm).__name__}")


async def in_thread(pieces: Iterator[str]) -> AsyncIterator[str]:
    """What a `Writer` gives, each piece waited for in a thread, so that the event loop goes on."""
    end = object()
    while (piece := await asyncio.to_thread(next, pieces, end)) is not end:
        yield cast("str", piece)


class _ChatWriter:
    """A chat model of LangChain's form: pieces have their text in `text` or `content`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, system: str, user: str) -> Iterator[str]:
        return map(piece_text, self._model.stream([("system", system), ("human", user)]))
