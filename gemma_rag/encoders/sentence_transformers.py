"""Vectors computed here, by the sentence-transformers library on torch."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gemma_rag.encoders.base import Input, Space, prompts_digest
from gemma_rag.encoders.models import Source, find_model, load_local_first
from gemma_rag.encoders.settings import EncoderSettings
from gemma_rag.errors import InputError, MissingExtra, ModelUnavailable
from gemma_rag.prompts import EMBEDDINGGEMMA_2, PromptProfile, Task, named_profile, profile_for
from gemma_rag.vectors import Floats, truncate

logger = logging.getLogger(__name__)

_CONTEXT = {EMBEDDINGGEMMA_2.name: 8192}  # where the library reports none
_BATCH_TOKENS = {"cpu": 1024, "mps": 8_192, "cuda": 65_536}
"""By device. The CPU's is measured (benchmarks/results/batch-tokens.json), the others are not."""
_PROGRESS_FROM = 64
"""Texts from which a progress bar is worth its line."""


_LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, AttributeError)


class SentenceTransformerEncoder:
    """An `Encoder` on sentence-transformers.

    Constructing it finds the model and fails at once where it cannot be had; torch and the weights are loaded with the
    first text (or the first look at `space`). Safe to use from several threads; the model works for one at a time.

    Args:
        settings: Which model, and how.

    Raises:
        MissingExtra: sentence-transformers is not installed.
        ModelUnavailable: The model cannot be had.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        self.settings = settings
        if importlib.util.find_spec("sentence_transformers") is None:
            raise MissingExtra("the sentence-transformers runtime", "local")
        token = settings.token.get_secret_value() if settings.token else None
        self._source = find_model(settings.model, revision=settings.revision, token=token)
        self._lock = threading.RLock()
        self._loaded: _Loaded | None = None

    @property
    def space(self) -> Space:
        """What decides this encoder's vectors; loads the model."""
        return self._load().space

    @property
    def profile(self) -> PromptProfile:
        """The prompts that it puts before the texts; loads the model, whose own configuration has a say."""
        return self._load().profile

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special tokens counted, prompts not added, nothing cut."""
        if not texts:
            return []
        loaded = self._load()
        with self._lock:
            ids = loaded.model.tokenizer(
                list(texts), truncation=False, padding=False, return_attention_mask=False, verbose=False
            )["input_ids"]
        return [len(row) for row in ids]

    def encode(self, inputs: Sequence[Input]) -> Floats:
        """Embed texts, each for its own task, in one pass: sorted by length, in batches of bounded tokens.

        Args:
            inputs: What to embed.

        Returns:
            float32 of shape ``(len(inputs), space.dimensions)``, rows of norm 1, in the order given.

        Raises:
            InputError: A text is empty or no string, or longer than the context with ``on_overflow="error"``.
        """
        _check(inputs)
        loaded = self._load()
        if not inputs:
            return np.zeros((0, loaded.space.dimensions), dtype=np.float32)
        with self._lock:
            rendered = self._render(inputs, loaded.profile)
            order = {text: i for i, text in enumerate(dict.fromkeys(rendered))}  # equal texts are computed once
            texts = list(order)
            lengths = self.count_tokens(texts)
            too_long = [i for i, length in enumerate(lengths) if length > loaded.space.max_tokens]
            if too_long:
                vectors = self._encode_with_overflow(inputs, rendered, texts, lengths, too_long, loaded)
            else:
                vectors = self._encode_batches(texts, lengths, loaded)
        return vectors[[order[text] for text in rendered]]

    # -- inside -----------------------------------------------------------------------------------------------------

    def _render(self, inputs: Sequence[Input], profile: PromptProfile) -> list[str]:
        rendered = []
        prompted = 0
        for text, task, title in inputs:
            if self.settings.detect_prompts and profile.is_prompted(text):
                prompted += 1
                rendered.append(text)
            else:
                rendered.append(profile.render(text, task, title))
        if prompted:
            logger.warning(
                "%d of %d texts already start with one of the model's prompts and were left as they are; "
                "gemma-rag puts the prompts itself (detect_prompts=False prompts them all the same)",
                prompted,
                len(rendered),
            )
        return rendered

    def _encode_batches(self, texts: list[str], lengths: list[int], loaded: _Loaded) -> Floats:
        out = np.empty((len(texts), loaded.space.dimensions), dtype=np.float32)
        with _progress(len(texts), self.settings.show_progress) as bar:
            for batch in token_batches([min(n, loaded.space.max_tokens) for n in lengths], loaded.batch_tokens):
                rows = loaded.model.encode(
                    [texts[i] for i in batch], prompt="", batch_size=len(batch), show_progress_bar=False, convert_to_numpy=True
                )
                out[batch] = truncate(rows, loaded.space.dimensions)
                bar.update(len(batch))
        return out

    def _encode_with_overflow(
        self,
        inputs: Sequence[Input],
        rendered: list[str],
        texts: list[str],
        lengths: list[int],
        too_long: list[int],
        loaded: _Loaded,
    ) -> Floats:
        limit = loaded.space.max_tokens
        long_texts = {texts[i] for i in too_long}
        places = [i for i, text in enumerate(rendered) if text in long_texts]
        if self.settings.on_overflow == "error":
            raise InputError(
                f"{len(places)} of {len(inputs)} texts are longer than the context of {limit} tokens, prompt included: index "
                f"{', '.join(map(str, places[:20]))}{' ...' if len(places) > 20 else ''} (the longest has {max(lengths)}). "
                "Cut them into chunks, or choose on_overflow='truncate' or 'average'"
            )
        if self.settings.on_overflow == "truncate":
            logger.warning(
                "%d of %d texts are longer than the context of %d tokens and were cut there (the longest has %d)",
                len(places),
                len(inputs),
                limit,
                max(lengths),
            )
            return self._encode_batches(texts, lengths, loaded)
        parts: list[str] = []
        owner: list[int] = []
        by_text = {text: item for text, item in zip(rendered, inputs, strict=True) if text in long_texts}
        for i, text in enumerate(texts):
            pieces = self._pieces(text, by_text[text], loaded) if text in by_text else [text]
            parts += pieces
            owner += [i] * len(pieces)
        part_lengths = self.count_tokens(parts)
        rows = self._encode_batches(parts, part_lengths, loaded)
        total = np.zeros((len(texts), rows.shape[1]), dtype=np.float64)
        np.add.at(total, owner, rows * np.asarray(part_lengths)[:, None])
        return truncate(total, rows.shape[1])

    def _pieces(self, rendered: str, item: Input, loaded: _Loaded) -> list[str]:
        """Cut a text that is too long into windows of whole tokens, each behind the same prompt."""
        body = item.text if rendered.endswith(item.text) else rendered
        prompt = rendered[: len(rendered) - len(body)]
        room = loaded.space.max_tokens - self.count_tokens([prompt + "x"])[0]  # "x": the special tokens and a token's margin
        if room < 1:
            raise InputError(
                f"the prompt and title alone fill the context of {loaded.space.max_tokens} tokens: {prompt[:80]!r}"
            )
        offsets = loaded.model.tokenizer(
            body, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
        )["offset_mapping"]
        starts = [offsets[i][0] for i in range(0, len(offsets), room)]
        pieces = (body[a:b] for a, b in zip(starts, [*starts[1:], len(body)], strict=True))
        return [prompt + piece for piece in pieces if piece.strip()]

    def _load(self) -> _Loaded:
        with self._lock:
            if self._loaded is None:
                self._loaded = _load(self.settings, self._source)
            return self._loaded


class _Loaded:
    """A model in memory, and what was learned about it while loading."""

    def __init__(self, model: Any, profile: PromptProfile, space: Space, batch_tokens: int) -> None:
        self.model = model
        self.profile = profile
        self.space = space
        self.batch_tokens = batch_tokens


def _load(settings: EncoderSettings, source: Source) -> _Loaded:
    profile = _chosen_profile(settings, source.name)
    _refuse_float16(settings, profile)
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
    profile = _chosen_profile(settings, source.name, dict(model.prompts))
    _refuse_float16(settings, profile)
    model.max_seq_length = _context(settings, model.max_seq_length, profile, source.name)
    native = int(model.get_embedding_dimension())
    space = Space(
        model=source.name,
        weights=weights_digest(model),
        prompts=prompts_digest(profile),
        dimensions=_dimensions(settings, native, profile, source.name),
        max_tokens=model.max_seq_length,
        overflow="average" if settings.on_overflow == "average" else "truncate",
        runtime="sentence-transformers",
        precision=settings.precision,
    )
    batch_tokens = settings.batch_tokens or _BATCH_TOKENS.get(model.device.type, _BATCH_TOKENS["cpu"])
    return _Loaded(model, profile, space, batch_tokens)


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


def _chosen_profile(settings: EncoderSettings, name: str, configured: dict[str, str] | None = None) -> PromptProfile:
    if isinstance(settings.prompts, PromptProfile):
        return settings.prompts
    return named_profile(settings.prompts) if settings.prompts else profile_for(name, configured)


def _refuse_float16(settings: EncoderSettings, profile: PromptProfile) -> None:
    if settings.precision == "float16" and not profile.float16:
        raise InputError(
            "the Gemma embedding models overflow in float16 and give NaN or wrong vectors: "
            "use precision='bfloat16' or precision='float32'"
        )


def _need_sentence_transformers(*minimum: int) -> None:
    version = importlib.metadata.version("sentence-transformers")
    if tuple(int(part) for part in version.split(".")[:2]) < minimum:
        wanted = ".".join(map(str, minimum))
        raise ModelUnavailable(
            f"EmbeddingGemma 2 needs sentence-transformers >= {wanted} and transformers >= 5.19, and sentence-transformers is "
            f"{version}: pip install -U 'sentence-transformers>={wanted}' 'transformers>=5.19'"
        )


def _context(settings: EncoderSettings, reported: int | None, profile: PromptProfile, name: str) -> int:
    known = _CONTEXT.get(profile.name)
    own = reported if reported and reported < 1_000_000 else known
    if own is None:
        if settings.max_tokens is None:
            raise ModelUnavailable(f"{name} does not say how many tokens it takes: give max_tokens")
        return settings.max_tokens
    if settings.max_tokens is not None and settings.max_tokens > own:
        raise InputError(f"max_tokens is {settings.max_tokens}, and {name} takes {own} tokens at most")
    return settings.max_tokens or own


def _dimensions(settings: EncoderSettings, native: int, profile: PromptProfile, name: str) -> int:
    wanted = settings.dimensions
    if wanted is None or wanted == native:
        return native
    if wanted > native:
        raise InputError(f"{name} gives vectors of {native} dimensions: it cannot be asked for {wanted}")
    trained = [d for d in profile.matryoshka if d < native]
    if wanted not in trained and not settings.untrained_dimensions:
        offer = ", ".join(map(str, [native, *trained]))
        raise InputError(
            f"{name} was not trained to be cut to {wanted} dimensions, only {offer}. "
            "untrained_dimensions=True cuts it all the same"
        )
    return wanted


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


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group texts of similar length, so that a batch, padded to its longest, stays within a token budget.

    Args:
        lengths: Tokens of each text.
        budget: Most tokens in a batch, padding counted; a single longer text is a batch of its own.

    Returns:
        Batches of indices into `lengths`, the longest texts first (memory runs out at the start, or not at all).
    """
    batches: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * longest <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
            longest = lengths[i]
    return batches


def _check(inputs: Sequence[Input]) -> None:
    for i, item in enumerate(inputs):
        if not isinstance(item.text, str):
            raise InputError(f"the text at index {i} is no string but {type(item.text).__name__}")
        if not item.text.strip():
            raise InputError(f"the text at index {i} is empty: an empty text has no meaning to embed. Leave it out")
        if not isinstance(item.task, Task):
            raise InputError(f"the task at index {i} is {item.task!r}: use Task.parse to read task names")


def _progress(total: int, wanted: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="embedding", unit="text", disable=None if wanted and total >= _PROGRESS_FROM else True)
