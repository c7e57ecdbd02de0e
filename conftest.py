"""Models for the tests: EmbeddingGemma's architecture with random weights, the offline MiniLM, and one to compute by hand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from gemma_rag.encoders import Encoder, Input, Space
from gemma_rag.prompts import NO_PROMPTS, PromptProfile
from gemma_rag.vectors import Floats, unit

hypothesis.settings.register_profile("gate", deadline=None, derandomize=True)  # the same examples on every machine
hypothesis.settings.load_profile("gate")

if "PYTEST_XDIST_WORKER" in os.environ:  # workers that each use all cores wait for each other most of the time
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny EmbeddingGemma: 48 dimensions, random weights."""
    from gemma_rag.testing import build_random_embeddinggemma

    return build_random_embeddinggemma(tmp_path_factory.mktemp("models") / "tiny-embeddinggemma")


@pytest.fixture(scope="session")
def tiny_gemma_2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny EmbeddingGemma of the second generation: 48 dimensions, random weights."""
    from gemma_rag.testing import build_random_embeddinggemma

    return build_random_embeddinggemma(tmp_path_factory.mktemp("models") / "tiny-embeddinggemma-2", generation=2)


@pytest.fixture(scope="session")
def tiny_language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Gemma 3 language model with random weights."""
    from gemma_rag.testing import build_random_gemma

    return build_random_gemma(tmp_path_factory.mktemp("models") / "tiny-gemma")


@pytest.fixture(scope="session")
def minilm():
    """The offline all-MiniLM-L6-v2."""
    from gemma_rag import GemmaEmbeddings

    return GemmaEmbeddings(model="minilm", device="cpu", show_progress=False)


class WordEncoder:
    """Vectors to compute by hand: one component for each known word, counted, plus a small last one.

    Texts that share no word have a cosine near 0; equal texts have 1.
    """

    def __init__(self, words: Sequence[str], *, profile: PromptProfile = NO_PROMPTS, max_tokens: int = 256) -> None:
        self.words = {word: i for i, word in enumerate(words)}
        self.profile = profile
        self.calls: list[list[Input]] = []
        self.space = Space(
            model="words",
            weights=" ".join(words),
            prompts=profile.name,
            dimensions=len(words) + 1,
            max_tokens=max_tokens,
            overflow="truncate",
            runtime="test",
            precision="float32",
        )

    def encode(self, inputs: Sequence[Input]) -> Floats:
        self.calls.append(list(inputs))
        rows = np.full((len(inputs), len(self.words) + 1), 0.0, dtype=np.float32)
        rows[:, -1] = 0.01
        for row, item in zip(rows, inputs, strict=True):
            for word in f"{item.title or ''} {item.text}".lower().replace("?", " ").replace(".", " ").split():
                if word in self.words:
                    row[self.words[word]] += 1.0
        return unit(rows) if len(rows) else rows

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]


@pytest.fixture
def words() -> WordEncoder:
    encoder: Encoder = WordEncoder(["red", "green", "blue", "apple", "pear", "plum", "car", "bus", "tram"])
    assert isinstance(encoder, WordEncoder)
    return encoder
