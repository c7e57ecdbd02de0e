"""An encoder made of numpy alone for tests with several processes, which import it by its name; and how it fails."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gemma_rag.documents import Document
from gemma_rag.encoders import Input, Space
from gemma_rag.errors import InputError, ModelUnavailable
from gemma_rag.prompts import NO_PROMPTS
from gemma_rag.vectors import Floats, unit


class LetterEncoder:
    """A vector counts the letters of its text.

    Args:
        log: A line is added here for every text that is embedded, before it is.
        trap: The process dies when it embeds a text with the word TRAP and this file does not exist; then it does.
        deadly: The word with which the process dies every time.
        unreadable: The word with which a text is refused.
        weights: Another name for another space.
    """

    profile = NO_PROMPTS

    def __init__(
        self,
        log: Path | None = None,
        trap: Path | None = None,
        deadly: str | None = None,
        unreadable: str | None = None,
        weights: str = "",
    ) -> None:
        self.log, self.trap, self.deadly, self.unreadable = log, trap, deadly, unreadable
        self.space = Space(
            model="letters",
            weights=weights,
            prompts="",
            dimensions=26,
            max_tokens=256,
            overflow="error",
            runtime="",
            precision="float32",
        )

    def encode(self, inputs: Sequence[Input]) -> Floats:
        texts = [f"{item.title or ''} {item.text}" for item in inputs]
        if self.log is not None:
            with self.log.open("a") as file:
                file.writelines(f"{text.strip()}\n" for text in texts)
        everything = " ".join(texts)
        if self.trap is not None and "TRAP" in everything and not self.trap.exists():
            self.trap.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.deadly is not None and self.deadly in everything:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.unreadable is not None and self.unreadable in everything:
            raise InputError(f"a text has the word {self.unreadable}")
        letters = [np.frombuffer(text.lower().encode(), dtype=np.uint8) for text in texts]
        return unit(np.array([np.bincount(row, minlength=123)[97:123] + 0.01 for row in letters]).reshape(-1, 26))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]


def numbered(count: int, trap: int | None = None) -> list[Document]:
    """Documents that all differ, in five categories; one of them with the word TRAP."""
    return [
        Document(
            id=str(i),
            text=f"{i} " + " ".join(chr(97 + (i * 7 + k * k) % 26) * (1 + k % 3) for k in range(20)) + (" TRAP" * (i == trap)),
            category=f"c{i % 5}",
            metadata={"number": i},
        )
        for i in range(count)
    ]


def no_model() -> LetterEncoder:
    """A model that cannot be had."""
    raise ModelUnavailable("the model is not here")


def broken() -> LetterEncoder:
    """A model that is too large for the memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


class NodeEncoder(LetterEncoder):
    """Writes down which node of a Ray cluster it is on, before it embeds."""

    def __init__(self, nodes: Path) -> None:
        super().__init__()
        self.nodes = nodes

    def encode(self, inputs: Sequence[Input]) -> Floats:
        import ray

        with self.nodes.open("a") as file:
            file.write(f"{ray.get_runtime_context().get_node_id()}\n")
        return super().encode(inputs)
