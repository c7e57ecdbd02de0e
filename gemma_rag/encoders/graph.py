"""What the engines that open a graph from a folder have in common: tokens in, padded arrays through, rows out."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from gemma_rag.encoders.base import BOUNDS, Space, prompts_digest
from gemma_rag.encoders.checks import chosen_context
from gemma_rag.encoders.engine import Batches, Reading
from gemma_rag.encoders.exported import Exported
from gemma_rag.encoders.settings import EncoderSettings
from gemma_rag.encoders.tokens import FastTokenizer
from gemma_rag.vectors import Floats

logger = logging.getLogger(__name__)


class GraphEngine(ABC):
    """An `Engine` over a graph from ``input_ids`` and ``attention_mask`` to ``sentence_embedding``.

    Args:
        settings: How the model is used.
        folder: The graph and what belongs to it.
    """

    batch_texts: int | None = None
    usual_batch_tokens = 1024
    step = 1
    """Batches are padded to a multiple of so many tokens."""

    def __init__(self, settings: EncoderSettings, folder: Exported) -> None:
        self.profile = folder.profile
        self._tokenizer = FastTokenizer(folder.tokenizer)
        self._lock = threading.Lock()
        self._open(settings, folder)
        self.native = folder.native or self._compute(np.ones((1, 2), np.int64), np.ones((1, 2), np.int64)).shape[1]
        self.batch_tokens = settings.batch_tokens or self.usual_batch_tokens
        self.space = Space(
            model=folder.name,
            weights=folder.weights,
            prompts=prompts_digest(self.profile, settings.detect_prompts),
            dimensions=self.native,
            max_tokens=chosen_context(settings, folder.max_tokens, self.profile, folder.name),
            overflow="average" if settings.on_overflow == "average" else "truncate",
            runtime=folder.runtime,
            precision=_precision(folder.precision, settings.precision),
        )
        bound = BOUNDS.get(folder.precision, 0.0)
        if folder.agreement is not None and folder.agreement.smallest_cosine < bound:
            logger.warning(
                "the %s export of %s agrees with its source to a cosine of %.4f only, and %.4f is expected: "
                "measure what that costs, or use float32",
                folder.precision,
                folder.name,
                folder.agreement.smallest_cosine,
                bound,
            )

    @abstractmethod
    def _open(self, settings: EncoderSettings, folder: Exported) -> None:
        """Read the graph."""

    @abstractmethod
    def _compute(self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> Floats:
        """Rows, shape ``(texts, native)``, for arrays of shape ``(texts, tokens)``."""

    def read(self, texts: Sequence[str]) -> list[Reading]:
        """Tokenize texts; special tokens are added, nothing is cut."""
        return [Reading(len(ids), ids) for ids in self._tokenizer.ids(list(texts))]

    def cut(self, text: str) -> Reading:
        """A text that is too long, cut to the context; the special tokens at its ends stay."""
        ids = self._tokenizer.cut_ids(text, self.space.max_tokens)
        return Reading(len(ids), ids)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The characters of each token, without special tokens."""
        return self._tokenizer.spans(text)

    def run(self, batches: Batches) -> Iterator[tuple[int, Floats]]:
        """Compute batches one after the other; rows as `Engine.run` says."""
        for place, batch in enumerate(batches):
            longest = max(reading.length for reading in batch)
            width = max(longest, min(-(-longest // self.step) * self.step, self.space.max_tokens))
            ids = np.zeros((len(batch), width), dtype=np.int64)
            mask = np.zeros_like(ids)
            for row, reading in enumerate(batch):
                ids[row, : reading.length] = reading.payload
                mask[row, : reading.length] = 1
            with self._lock:
                rows = self._compute(ids, mask)
            yield place, rows


def _precision(weights: str, computed: str) -> str:
    """What both the weights and the computation decide: ``int8``, ``bfloat16``, ``int8, bfloat16`` ..."""
    return computed if weights == "float32" else weights if computed == "float32" else f"{weights}, {computed}"
