"""What every encoder is: texts with their tasks in, rows of norm 1 out, and a `Space` that says what made them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol, TypeAlias, TypeGuard

from pydantic import BaseModel, ConfigDict

from gemma_rag.errors import InputError
from gemma_rag.prompts import PromptProfile, Task
from gemma_rag.vectors import Floats

Overflow: TypeAlias = Literal["truncate", "error", "average"]
"""What to do with a text longer than the context: cut it (with one warning that counts them), refuse, or split it and
average the parts' vectors, weighted by their tokens."""


BOUNDS: Mapping[str, float] = MappingProxyType(
    {
        **dict.fromkeys(("float32", "fp32", "f32"), 0.9999),
        **dict.fromkeys(("bfloat16", "bf16", "float16", "fp16", "f16"), 0.995),
        **dict.fromkeys(("int8", "q8_0", "server"), 0.98),
    }
)
"""Smallest cosine with the model's own float32 vectors that is expected, by precision in small letters; a precision that is
not here has that of ``server``."""


class Input(NamedTuple):
    """One text to embed.

    Attributes:
        text: The text itself, without any prompt.
        task: What it is embedded for.
        title: The document's title, for `Task.DOCUMENT` only.
    """

    text: str
    task: Task
    title: str | None = None


class Space(BaseModel):
    """Everything that decides a vector. Two vectors may be compared only if their spaces have the same fingerprint.

    Attributes:
        model: The model's id or folder name, for people to read; not part of the fingerprint, because `weights` is.
        weights: Digest of the weights, or the server's own where they are out of reach.
        prompts: Digest of the prompts that are put before the texts.
        dimensions: Components of a vector.
        max_tokens: Where texts are cut.
        overflow: What happens to longer ones.
        runtime: What computes the vectors.
        precision: The number format of the computation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    weights: str
    prompts: str
    dimensions: int
    max_tokens: int
    overflow: str
    runtime: str
    precision: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every field but `model`, in hexadecimal."""
        fields = self.model_dump(exclude={"model"})
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def differences(self, other: Space) -> dict[str, tuple[object, object]]:
        """The fields in which another space differs, as ``{field: (here, there)}``; empty for the same space."""
        if self.fingerprint == other.fingerprint:
            return {}
        mine, theirs = self.model_dump(), other.model_dump()
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


def prompts_digest(profile: PromptProfile, detect: bool = True) -> str:
    """Sixteen hexadecimal digits over what the profile makes of every task, with and without a title.

    Args:
        profile: The prompts.
        detect: Whether a text that brings its prompt is left alone (`EncoderSettings.detect_prompts`).
    """
    rendered = [profile.render("text", task, title) for task in Task for title in (None, "title")]
    rendered += [] if detect else ["every text is prompted"]
    return hashlib.sha256(json.dumps(rendered).encode()).hexdigest()[:16]


class Encoder(Protocol):
    """Turns texts into vectors. `GemmaEmbeddings` is one, and so is every runtime in this package."""

    @property
    def space(self) -> Space:
        """What decides this encoder's vectors."""
        ...

    @property
    def profile(self) -> PromptProfile:
        """The prompts that it puts before the texts."""
        ...

    def encode(self, inputs: Sequence[Input]) -> Floats:
        """Embed texts, each for its own task; order is kept.

        Returns:
            float32 of shape ``(len(inputs), space.dimensions)``, rows of norm 1.

        Raises:
            InputError: A text is empty or no string; the message names its index.
        """
        ...

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text as the model would read it, special tokens counted, prompts not added, nothing cut."""
        ...


def in_windows(encode: Callable[[list[Input]], Floats], inputs: Iterable[Input], window: int) -> Iterator[Floats]:
    """Embed any number of texts, a window at a time; reads no further than the next window needs.

    Args:
        encode: `Encoder.encode`.
        inputs: What to embed.
        window: Texts at a time, at least 1.

    Yields:
        What `encode` makes of each window, in order.

    Raises:
        InputError: As `encode` raises it; indices count within the window, and the message says where it starts.
    """
    if window < 1:
        raise InputError(f"a window holds at least 1 text, and {window} was asked for")
    rest, done = iter(inputs), 0
    while part := list(islice(rest, window)):
        try:
            yield encode(part)
        except InputError as error:
            raise InputError(f"in the texts from {done}: {error}") from error
        done += len(part)


def is_encoder(value: object) -> TypeGuard[Encoder]:
    """Whether something has all that `Encoder` asks for. Its properties are not read, since reading may load a model."""
    return {"space", "profile", "encode", "count_tokens"} <= set(dir(value))
