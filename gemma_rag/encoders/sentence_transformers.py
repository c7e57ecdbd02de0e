"""Vectors computed here, by the sentence-transformers library on torch."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gemma_rag.encoders.base import Space, prompts_digest
from gemma_rag.encoders.checks import chosen_context, chosen_profile, refuse_float16
from gemma_rag.encoders.engine import Batches, Reading
from gemma_rag.encoders.models import Source, find_model, load_local_first
from gemma_rag.encoders.settings import EncoderSettings
from gemma_rag.errors import MissingExtra, ModelUnavailable
from gemma_rag.prompts import EMBEDDINGGEMMA_2
from gemma_rag.vectors import Floats

_BATCH_TOKENS = {"cpu": 1024, "mps": 8_192, "cuda": 65_536}
"""By device. The CPU's is measured (benchmarks/results/batch-tokens.json), the others are not."""


_LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, AttributeError)


def find_source(settings: EncoderSettings) -> Source:
    """Where the settings' model is; fails at once where it cannot be had.

    Raises:
        MissingExtra: sentence-transformers is not installed.
        ModelUnavailable: The model cannot be had.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise MissingExtra("the sentence-transformers runtime", "local")
    token = settings.token.get_secret_value() if settings.token else None
    return find_model(settings.model, revision=settings.revision, token=token)


class SentenceTransformerEngine:
    """An `Engine` on sentence-transformers; the model works for one thread at a time.

    Args:
        settings: Which model, and how.
        source: Where it is; None to look for it.

    Raises:
        MissingExtra: sentence-transformers is not installed.
        ModelUnavailable: The model cannot be had, or not be loaded.
    """

    batch_texts: int | None = None

    def __init__(self, settings: EncoderSettings, source: Source | None = None) -> None:
        source = source or find_source(settings)
        self.model = load_model(settings, source)
        self.profile = chosen_profile(settings, source.name, dict(self.model.prompts))
        refuse_float16(settings, self.profile)
        self.model.max_seq_length = chosen_context(settings, self.model.max_seq_length, self.profile, source.name)
        self.native = int(self.model.get_embedding_dimension())
        self.space = Space(
            model=source.name,
            weights=weights_digest(self.model),
            prompts=prompts_digest(self.profile, settings.detect_prompts),
            dimensions=self.native,
            max_tokens=self.model.max_seq_length,
            overflow="average" if settings.on_overflow == "average" else "truncate",
            runtime="sentence-transformers",
            precision=settings.precision,
        )
        self.batch_tokens = settings.batch_tokens or _BATCH_TOKENS.get(self.model.device.type, _BATCH_TOKENS["cpu"])
        self._lock = threading.Lock()

    def read(self, texts: Sequence[str]) -> list[Reading]:
        """Tokenize texts; special tokens are added, nothing is cut."""
        return self._tokenize(list(texts), truncation=False)

    def cut(self, text: str) -> Reading:
        """A text that is too long, cut to the context as the library does it."""
        return self._tokenize([text], truncation=True, max_length=self.space.max_tokens)[0]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The characters of each token, without special tokens."""
        with self._lock:
            spans: list[tuple[int, int]] = self.model.tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
            )["offset_mapping"]
        return spans

    def run(self, batches: Batches) -> Iterator[tuple[int, Floats]]:
        """Compute batches one after the other; rows as `Engine.run` says."""
        import torch

        for place, batch in enumerate(batches):
            columns = {name: [reading.payload[name] for reading in batch] for name in batch[0].payload}
            with self._lock, torch.inference_mode():
                features = self.model.tokenizer.pad(columns, return_tensors="pt").to(self.model.device)
                rows = self.model(dict(features))["sentence_embedding"]
                array: Floats = rows.float().cpu().numpy()
            yield place, array

    def _tokenize(self, texts: list[str], **options: Any) -> list[Reading]:
        with self._lock:
            columns = dict(self.model.tokenizer(texts, padding=False, verbose=False, **options))
        names = list(columns)
        rows = zip(*columns.values(), strict=True)
        return [Reading(len(row[names.index("input_ids")]), dict(zip(names, row, strict=True))) for row in rows]


def load_model(settings: EncoderSettings, source: Source) -> Any:
    """A `SentenceTransformer` as this package uses it: from this machine first, without code of the model's own.

    Raises:
        InputError: float16 for a model that overflows in it.
        ModelUnavailable: It cannot be loaded.
    """
    profile = chosen_profile(settings, source.name)
    refuse_float16(settings, profile)
    import torch
    from sentence_transformers import SentenceTransformer

    extra: dict[str, Any] = {}
    if profile.name == EMBEDDINGGEMMA_2.name:
        _need_sentence_transformers(6, 1)
        extra["config_kwargs"] = {"vision_config": None, "audio_config": None}

    def load(local: bool) -> Any:
        return SentenceTransformer(
            source.location,
            device=settings.device,
            revision=settings.revision,
            token=settings.token.get_secret_value() if settings.token else None,
            local_files_only=local,
            trust_remote_code=False,
            model_kwargs={"dtype": getattr(torch, settings.precision)},
            **extra,
        )

    try:
        with quiet_loading():
            model = load_local_first(source, load, _LOADING_ERRORS)
    except _LOADING_ERRORS as error:
        raise ModelUnavailable(f"the model {source.name} could not be loaded by sentence-transformers: {error}") from error
    for module in model:
        if getattr(module, "include_prompt", True) is False:
            raise ModelUnavailable(f"{source.name} leaves its prompt out of the pooling, which gemma-rag does not do")
    return model


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers' own progress bar off: it flashes by within a second or two, and fills logs."""
    from transformers.utils import logging as library

    was_on = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            library.enable_progress_bar()


def _need_sentence_transformers(*minimum: int) -> None:
    version = importlib.metadata.version("sentence-transformers")
    if tuple(int(part) for part in version.split(".")[:2]) < minimum:
        wanted = ".".join(map(str, minimum))
        raise ModelUnavailable(
            f"EmbeddingGemma 2 needs sentence-transformers >= {wanted} and transformers >= 5.19, and sentence-transformers is "
            f"{version}: pip install -U 'sentence-transformers>={wanted}' 'transformers>=5.19'"
        )


def weights_digest(model: Any) -> str:
    """Sixteen hexadecimal digits over a model's weights, wherever it was loaded from.

    Every tensor counts with its name, shape and up to 64 evenly spaced values, read as float32: milliseconds for 300 M
    parameters, and any training step moves some of those values.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // 64)][:64].float().cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(np.ascontiguousarray(sample).tobytes())
    return digest.hexdigest()[:16]
