"""No model at all: for collections that are searched by matching words alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gemma_rag.encoders.base import Input, Space
from gemma_rag.prompts import NO_PROMPTS, PromptProfile
from gemma_rag.vectors import Floats


class WordsOnly:
    """An `Encoder` that gives every text the same vector of one component: only ``lexical`` search means anything over it."""

    profile: PromptProfile = NO_PROMPTS
    space = Space(
        model="none",
        weights="",
        prompts=NO_PROMPTS.name,
        dimensions=1,
        max_tokens=512,
        overflow="truncate",
        runtime="none",
        precision="float32",
    )

    def encode(self, inputs: Sequence[Input]) -> Floats:
        """Ones, shape ``(n, 1)``."""
        return np.ones((len(inputs), 1), dtype=np.float32)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """One for each text, so that no document is cut."""
        return [1] * len(texts)
