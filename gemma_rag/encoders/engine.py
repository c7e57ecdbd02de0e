"""What a runtime has to give: an `Engine`. What all runtimes have in common stands in `gemma_rag.encoders.text_encoder`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

from gemma_rag.encoders.base import Space
from gemma_rag.prompts import PromptProfile
from gemma_rag.vectors import Floats


class Reading(NamedTuple):
    """One text, its prompt included, as an engine takes it.

    Attributes:
        length: Tokens that the model computes for it, special tokens counted.
        payload: What `Engine.run` needs of it: token ids where the model runs in this process, the text for a server.
    """

    length: int
    payload: Any


Batches: TypeAlias = Sequence[Sequence[Reading]]
"""Groups of texts that are computed together."""


class Engine(Protocol):
    """Computes vectors of texts that already carry their prompts. Loaded: making one reads the model, or asks the server.

    Attributes:
        space: What decides its vectors, `Space.dimensions` being those that are asked for.
        profile: The prompts that belong before the texts.
        native: Components of the rows that `run` gives, before they are cut.
        batch_tokens: Most tokens of a batch, padding counted.
        batch_texts: Most texts of a batch; None where tokens alone decide.
    """

    space: Space
    profile: PromptProfile
    native: int
    batch_tokens: int
    batch_texts: int | None

    def read(self, texts: Sequence[str]) -> list[Reading]:
        """Tokenize texts; special tokens are added, nothing is cut."""
        ...

    def cut(self, text: str) -> Reading:
        """A text that is too long, cut to the context (`Space.max_tokens`)."""
        ...

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The characters of each token, from and to, without special tokens."""
        ...

    def run(self, batches: Batches) -> Iterator[tuple[int, Floats]]:
        """Compute batches.

        Yields:
            The batch's place in `batches` and its rows, shape ``(texts, native)``, not yet cut or normalised; in any order.

        Raises:
            EmbeddingServerError: A batch failed for good. Raised last, after all others were yielded.
        """
        ...


class RemoteEngine(Engine, Protocol):
    """An engine that waits for a server, and so can do it without holding a thread."""

    def arun(self, batches: Batches) -> AsyncIterator[tuple[int, Floats]]:
        """`run`, for an event loop; any loop, and several at a time."""
        ...
