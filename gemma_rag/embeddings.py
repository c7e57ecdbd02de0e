"""`GemmaEmbeddings`, the front door: a LangChain `Embeddings` that puts the model's prompts right."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.embeddings import Embeddings
from pydantic import PrivateAttr
from typing_extensions import Self

from gemma_rag.encoders import CachedEncoder, EncoderSettings, Input, Space, TextEncoder, load_encoder
from gemma_rag.encoders.text_encoder import WINDOW
from gemma_rag.errors import InputError, MissingDistribution
from gemma_rag.prompts import PromptProfile, Task
from gemma_rag.vectors import Floats, cosines

if TYPE_CHECKING:
    from llama_index_gemma_rag import GemmaEmbedding


class GemmaEmbeddings(EncoderSettings, Embeddings):
    """Embeddings of EmbeddingGemma, and of other models, with the right task prompt for every call.

    Its arguments (`model`, `dimensions`, `device`, `cache` ...) are the fields of `EncoderSettings`.

    A true `langchain_core.embeddings.Embeddings`: give it to anything that takes one. It is also an `Encoder`, so that
    `KnowledgeBase` takes it as it is. Constructing it checks in a few seconds that the model can be had; the weights are
    loaded with the first text.

    Example:
        >>> from gemma_rag import GemmaEmbeddings
        >>> embeddings = GemmaEmbeddings(model="minilm")
        >>> len(embeddings.embed_query("How do I reset my password?"))
        384

    Raises:
        MissingExtra: The runtime, or the package of the offline model, is not installed.
        ModelUnavailable: The model cannot be had; the message says what to do.
    """

    _encoder: TextEncoder | CachedEncoder = PrivateAttr()

    if not TYPE_CHECKING:  # type checkers see the fields

        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self._encoder = load_encoder(self)  # once the settings are known to be right; no server is asked before

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in type(self).model_fields}

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy; with other settings it has an encoder of its own, else it shares the loaded one."""
        return type(self)(**{**self._fields(), **update}) if update else self

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self  # it never changes, and a model in memory is not copied by accident

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_again, (type(self), self._fields())  # another process loads the model for itself

    @property
    def space(self) -> Space:
        """What decides these vectors; loads the model."""
        return self._encoder.space

    @property
    def profile(self) -> PromptProfile:
        """The prompts in use; loads the model."""
        return self._encoder.profile

    def encode(self, inputs: Sequence[Input]) -> Floats:
        """Embed texts of several tasks in one pass, as `Encoder.encode` says."""
        return self._encoder.encode(inputs)

    async def aencode(self, inputs: Sequence[Input]) -> Floats:
        """`encode` without holding up the event loop: servers are awaited, a model in this process works in a thread."""
        return await self._encoder.aencode(inputs)

    def at(self, dimensions: int) -> Self:
        """The same model, its vectors cut to another Matryoshka dimension; nothing is loaded again.

        Raises:
            InputError: The model was not trained for it, or has fewer.
        """
        other = self.model_copy(update={"dimensions": dimensions})
        other._encoder = self._encoder.at(dimensions)
        return other

    def stream(self, inputs: Iterable[Input], window: int = WINDOW) -> Iterator[Floats]:
        """Embed any number of texts without holding them all, as `TextEncoder.stream` says."""
        return self._encoder.stream(inputs, window)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text as the model reads it, special tokens counted, prompts not added."""
        return self._encoder.count_tokens(texts)

    def embed(self, texts: Sequence[str], task: Task | str, titles: Sequence[str | None] | None = None) -> Floats:
        """Embed texts for a task.

        Args:
            texts: What to embed.
            task: What for: a `Task`, its name, or the model's own name of it (``STS``).
            titles: The documents' titles, one per text, None or "" where there is none; for `Task.DOCUMENT` only.

        Returns:
            float32 of shape ``(len(texts), dimensions)``, rows of norm 1.

        Raises:
            InputError: An empty text, an unknown task, or titles that do not fit.
        """
        return self.encode(_inputs(texts, task, titles))

    def embed_documents(self, texts: list[str], titles: Sequence[str | None] | None = None) -> list[list[float]]:
        """Embed documents, each behind the document prompt with its title."""
        rows: list[list[float]] = self.embed(texts, Task.DOCUMENT, titles).tolist()
        return rows

    def embed_query(self, text: str) -> list[float]:
        """Embed a question behind the query prompt."""
        row: list[float] = self.embed([text], Task.QUERY)[0].tolist()
        return row

    async def aembed(self, texts: Sequence[str], task: Task | str, titles: Sequence[str | None] | None = None) -> Floats:
        """`embed` without holding up the event loop."""
        return await self.aencode(_inputs(texts, task, titles))

    async def aembed_documents(self, texts: list[str], titles: Sequence[str | None] | None = None) -> list[list[float]]:
        """`embed_documents` without holding up the event loop."""
        rows: list[list[float]] = (await self.aembed(texts, Task.DOCUMENT, titles)).tolist()
        return rows

    async def aembed_query(self, text: str) -> list[float]:
        """`embed_query` without holding up the event loop."""
        row: list[float] = (await self.aembed([text], Task.QUERY))[0].tolist()
        return row

    def as_llama_index(self) -> GemmaEmbedding:
        """These embeddings as LlamaIndex wants them; the loaded model is shared.

        Raises:
            MissingDistribution: The adapter for LlamaIndex is not installed.
        """
        if importlib.util.find_spec("llama_index_gemma_rag") is None:
            raise MissingDistribution("the adapter for LlamaIndex", "llama-index-gemma-rag")
        from llama_index_gemma_rag import GemmaEmbedding

        return GemmaEmbedding(embeddings=self)

    def similarity(self, texts: Sequence[str], others: Sequence[str]) -> Floats:
        """How alike sentences are: cosines under the symmetric similarity prompt.

        Returns:
            float32 of shape ``(len(texts), len(others))``, -1 to 1.
        """
        rows = self.embed([*texts, *others], Task.SIMILARITY)
        return cosines(rows[: len(texts)], rows[len(texts) :])


def _inputs(texts: Sequence[str], task: Task | str, titles: Sequence[str | None] | None) -> list[Input]:
    if isinstance(texts, str):
        raise InputError("texts is a list of strings, and one string came: put it in a list")
    task = Task.parse(task)
    if titles is not None:
        if task is not Task.DOCUMENT:
            raise InputError(f"only documents have titles, and the task is {task.value}")
        if len(titles) != len(texts):
            raise InputError(f"{len(titles)} titles came for {len(texts)} texts")
    return [Input(text, task, title) for text, title in zip(texts, titles or [None] * len(texts), strict=True)]


def _made_again(kind: type[GemmaEmbeddings], fields: dict[str, Any]) -> GemmaEmbeddings:
    return kind(**fields)
