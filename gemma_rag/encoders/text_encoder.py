"""`TextEncoder`: everything between texts and vectors that is the same on every runtime.

Checks, prompts, equal texts once, tokens counted, texts beyond the context, batches of similar length, the cut to a
Matryoshka dimension and the norm. Texts pass through in windows, so that memory does not grow with their number.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemma_rag.encoders.base import Input, Space, in_windows
from gemma_rag.encoders.checks import check_inputs, chosen_dimensions
from gemma_rag.encoders.engine import Engine, Reading
from gemma_rag.encoders.settings import EncoderSettings
from gemma_rag.errors import EmbeddingServerError, InputError
from gemma_rag.prompts import PromptProfile
from gemma_rag.vectors import Floats, truncate

logger = logging.getLogger(__name__)

WINDOW = 4096
"""Texts that are sorted by length, and held as tokens, at a time."""
_PROGRESS_FROM = 64
"""Texts from which a progress bar is worth its line."""


class TextEncoder:
    """An `Encoder` on any engine. Safe to use from several threads.

    Args:
        settings: How texts are treated.
        load: Makes the engine; called once, with the first text or the first look at `space`.
    """

    def __init__(self, settings: EncoderSettings, load: Callable[[], Engine]) -> None:
        self.settings = settings
        self._load = load
        self._lock = threading.Lock()
        self._loaded: tuple[Engine, Space] | None = None

    @property
    def engine(self) -> Engine:
        """What computes the vectors; loaded when first asked for."""
        return self._ready()[0]

    @property
    def space(self) -> Space:
        """What decides this encoder's vectors; loads the model."""
        return self._ready()[1]

    @property
    def profile(self) -> PromptProfile:
        """The prompts that it puts before the texts; loads the model, whose own configuration has a say."""
        return self.engine.profile

    def at(self, dimensions: int) -> TextEncoder:
        """The same engine, its vectors cut to another Matryoshka dimension.

        Raises:
            InputError: The model was not trained for it, or has fewer.
        """
        engine, space = self._ready()
        chosen_dimensions(dimensions, self.settings.untrained_dimensions, engine.native, engine.profile, space.model)
        return TextEncoder(self.settings.changed(dimensions=dimensions), lambda: engine)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special tokens counted, prompts not added, nothing cut."""
        return [reading.length for reading in self.engine.read(list(texts))] if texts else []

    def encode(self, inputs: Sequence[Input]) -> Floats:
        """Embed texts, each for its own task: sorted by length, in batches of bounded tokens.

        Args:
            inputs: What to embed.

        Returns:
            float32 of shape ``(len(inputs), space.dimensions)``, rows of norm 1, in the order given.

        Raises:
            InputError: A text is empty or no string, or longer than the context with ``on_overflow="error"``.
            EmbeddingServerError: The server failed for good; its `finished` has the rows that came.
        """
        check_inputs(inputs)
        engine, space = self._ready()
        self._refuse_too_long(engine, space, inputs)
        out = np.empty((len(inputs), space.dimensions), dtype=np.float32)
        with _Notes(self.settings, space, len(inputs)) as notes:
            for start in range(0, len(inputs), WINDOW):
                plan = self._plan(engine, space, inputs[start : start + WINDOW], notes)
                partly = _Rows(plan, space.dimensions, notes)
                try:
                    for place, rows in engine.run(plan.batches):
                        partly.take(place, rows)
                except EmbeddingServerError as error:
                    _keep(error, out[:start], partly)
                    raise
                out[start : start + len(plan.place)] = partly.whole()
        return out

    async def aencode(self, inputs: Sequence[Input]) -> Floats:
        """`encode` without holding up the event loop: a server is awaited, a model in this process works in a thread."""
        if not inputs or not hasattr(await asyncio.to_thread(lambda: self.engine), "arun"):
            return await asyncio.to_thread(self.encode, inputs)
        check_inputs(inputs)
        engine: Any
        engine, space = self._ready()
        await asyncio.to_thread(self._refuse_too_long, engine, space, inputs)
        out = np.empty((len(inputs), space.dimensions), dtype=np.float32)
        with _Notes(self.settings, space, len(inputs)) as notes:
            for start in range(0, len(inputs), WINDOW):
                plan = await asyncio.to_thread(self._plan, engine, space, inputs[start : start + WINDOW], notes)
                partly = _Rows(plan, space.dimensions, notes)
                try:
                    async for place, rows in engine.arun(plan.batches):
                        partly.take(place, rows)
                except EmbeddingServerError as error:
                    _keep(error, out[:start], partly)
                    raise
                out[start : start + len(plan.place)] = partly.whole()
        return out

    def stream(self, inputs: Iterable[Input], window: int = WINDOW) -> Iterator[Floats]:
        """Embed any number of texts without holding them all.

        Args:
            inputs: What to embed; read as far as the next window needs.
            window: Texts at a time, at least 1.

        Returns:
            Arrays of float32, shape ``(window, space.dimensions)``, the last one shorter; rows in the order of the texts.

        Raises:
            InputError: As `encode`; indices count within the window, and the message says where it starts.
        """
        return in_windows(self.encode, inputs, window)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _ready(self) -> tuple[Engine, Space]:
        with self._lock:
            if self._loaded is None:
                engine = self._load()
                name = engine.space.model
                dimensions = chosen_dimensions(
                    self.settings.dimensions, self.settings.untrained_dimensions, engine.native, engine.profile, name
                )
                self._loaded = engine, engine.space.model_copy(update={"dimensions": dimensions})
            return self._loaded

    def _refuse_too_long(self, engine: Engine, space: Space, inputs: Sequence[Input]) -> None:
        if self.settings.on_overflow != "error":
            return
        places: list[int] = []
        longest = 0
        for start in range(0, len(inputs), WINDOW):
            texts = [_render(self.settings, engine.profile, item)[0] for item in inputs[start : start + WINDOW]]
            for i, reading in enumerate(engine.read(texts)):
                if reading.length > space.max_tokens:
                    places.append(start + i)
                    longest = max(longest, reading.length)
        if places:
            raise InputError(
                f"{len(places)} of {len(inputs)} texts are longer than the context of {space.max_tokens} tokens, prompt "
                f"included: index {', '.join(map(str, places[:20]))}{' ...' if len(places) > 20 else ''} (the longest has "
                f"{longest}). Cut them into chunks, or choose on_overflow='truncate' or 'average'"
            )

    def _plan(self, engine: Engine, space: Space, inputs: Sequence[Input], notes: _Notes) -> _Plan:
        first: dict[str, Input] = {}
        rendered = []
        for item in inputs:
            text, prompted = _render(self.settings, engine.profile, item)
            notes.prompted += prompted
            first.setdefault(text, item)  # equal texts are computed once
            rendered.append(text)
        order = {text: i for i, text in enumerate(first)}
        place = [order[text] for text in rendered]
        readings, owner = [], []
        long_texts = {}
        for i, (text, reading) in enumerate(zip(first, engine.read(list(first)), strict=True)):
            parts = [reading]
            if reading.length > space.max_tokens:
                long_texts[i] = reading.length
                average = self.settings.on_overflow == "average"
                parts = self._pieces(engine, space, text, first[text]) if average else [engine.cut(text)]
            readings += parts
            owner += [i] * len(parts)
        notes.long(sum(i in long_texts for i in place), max(long_texts.values(), default=0))
        groups = token_batches([reading.length for reading in readings], engine.batch_tokens, engine.batch_texts)
        return _Plan(place, owner, [reading.length for reading in readings], groups, [[readings[i] for i in g] for g in groups])

    def _pieces(self, engine: Engine, space: Space, rendered: str, item: Input) -> list[Reading]:
        """Cut a text that is too long into windows of whole tokens, each behind the same prompt."""
        own = rendered == item.text  # it brings its prompt, or has none
        prompt = engine.profile.prompt_of(rendered) if own else rendered[: len(rendered) - len(item.text)]
        body = rendered[len(prompt) :]
        room = space.max_tokens - engine.read([prompt + "x"])[0].length  # "x": the special tokens and a token's margin
        if room < 1:
            raise InputError(f"the prompt and title alone fill the context of {space.max_tokens} tokens: {prompt[:80]!r}")
        spans = engine.spans(body)
        starts = [spans[i][0] for i in range(0, len(spans), room)]
        pieces = (body[a:b] for a, b in zip(starts, [*starts[1:], len(body)], strict=True))
        texts = [prompt + piece for piece in pieces if piece.strip()]
        whole = zip(texts, engine.read(texts), strict=True)
        return [reading if reading.length <= space.max_tokens else engine.cut(text) for text, reading in whole]


@dataclass(frozen=True)
class _Plan:
    """How a window of inputs is computed: parts of texts, in batches.

    Attributes:
        place: For each input, its text.
        owner: For each part, the text that it is of; several parts of a text are averaged.
        tokens: For each part, its length.
        groups: The parts of each batch.
        batches: What the engine takes.
    """

    place: list[int]
    owner: list[int]
    tokens: list[int]
    groups: list[list[int]]
    batches: list[list[Reading]]


class _Rows:
    """Rows of a plan as they come in."""

    def __init__(self, plan: _Plan, dimensions: int, notes: _Notes) -> None:
        self.plan, self.notes = plan, notes
        self.rows = np.zeros((len(plan.owner), dimensions), dtype=np.float32)
        self.done = np.zeros(len(plan.owner), dtype=bool)

    def take(self, place: int, rows: Floats) -> None:
        group = self.plan.groups[place]
        self.rows[group] = truncate(rows, self.rows.shape[1])
        self.done[group] = True
        self.notes.bar.update(len(group))

    def texts(self) -> Floats:
        """A row for each text, its parts averaged, weighted by their tokens."""
        owner = self.plan.owner
        if len(owner) == (owner[-1] + 1 if owner else 0):
            return self.rows
        total = np.zeros((owner[-1] + 1, self.rows.shape[1]), dtype=np.float64)
        np.add.at(total, owner, self.rows * np.asarray(self.plan.tokens)[:, None])
        return truncate(total, self.rows.shape[1])

    def whole(self) -> Floats:
        return self.texts()[self.plan.place]

    def finished(self) -> dict[int, Floats]:
        """Rows of the inputs all of whose parts are there."""
        missing = {self.plan.owner[i] for i in np.flatnonzero(~self.done)}
        self.rows[~self.done] = 1.0  # any direction: these are left out below
        rows = self.texts()
        return {i: rows[text] for i, text in enumerate(self.plan.place) if text not in missing}


def _keep(error: EmbeddingServerError, before: Floats, partly: _Rows) -> None:
    error.finished = {**dict(enumerate(before)), **{len(before) + i: row for i, row in partly.finished().items()}}


@dataclass
class _Notes:
    """What is said once at the end of a call, and the progress bar meanwhile."""

    settings: EncoderSettings
    space: Space
    total: int
    prompted: int = 0
    too_long: int = 0
    longest: int = 0
    bar: Any = field(init=False)

    def __enter__(self) -> _Notes:
        from tqdm.auto import tqdm

        quiet = not self.settings.show_progress or self.total < _PROGRESS_FROM
        self.bar = tqdm(total=self.total, desc="embedding", unit="text", disable=True if quiet else None)
        return self

    def long(self, count: int, longest: int) -> None:
        self.too_long += count
        self.longest = max(self.longest, longest)

    def __exit__(self, *failed: object) -> None:
        self.bar.close()
        if self.prompted:
            logger.warning(
                "%d of %d texts already start with one of the model's prompts and were left as they are; "
                "gemma-rag puts the prompts itself (detect_prompts=False prompts them all the same)",
                self.prompted,
                self.total,
            )
        if self.too_long and self.settings.on_overflow == "truncate":
            logger.warning(
                "%d of %d texts are longer than the context of %d tokens and were cut there (the longest has %d)",
                self.too_long,
                self.total,
                self.space.max_tokens,
                self.longest,
            )


def _render(settings: EncoderSettings, profile: PromptProfile, item: Input) -> tuple[str, bool]:
    """The text with its prompt, and whether it came with one."""
    if settings.detect_prompts and profile.is_prompted(item.text):
        return item.text, True
    return profile.render(item.text, item.task, item.title), False


def token_batches(lengths: Sequence[int], budget: int, most: int | None = None) -> list[list[int]]:
    """Group texts of similar length, so that a batch, padded to its longest, stays within a token budget.

    Args:
        lengths: Tokens of each text.
        budget: Most tokens in a batch, padding counted; a single longer text is a batch of its own.
        most: Most texts in a batch; None for any number.

    Returns:
        Batches of indices into `lengths`, the longest texts first (memory runs out at the start, or not at all).
    """
    batches: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        full = batches and most is not None and len(batches[-1]) >= most
        if batches and not full and (len(batches[-1]) + 1) * longest <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
            longest = lengths[i]
    return batches
