"""What every runtime checks before it computes: inputs, prompts, dimensions and context, with errors that name the cure."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_rag.encoders.base import Input
from gemma_rag.encoders.settings import EncoderSettings
from gemma_rag.errors import InputError, ModelUnavailable
from gemma_rag.prompts import EMBEDDINGGEMMA, EMBEDDINGGEMMA_2, PromptProfile, Task, named_profile, profile_for

CONTEXT = {EMBEDDINGGEMMA.name: 2048, EMBEDDINGGEMMA_2.name: 8192}
"""Context in tokens by profile, for where nothing else says it."""


def check_inputs(inputs: Sequence[Input]) -> None:
    """Refuse what cannot be embedded.

    Raises:
        InputError: A text is empty or no string, or a task is no `Task`; the message names its index.
    """
    for i, item in enumerate(inputs):
        if not isinstance(item, Input):
            raise InputError(f"what stands at index {i} is no Input(text, task) but {type(item).__name__}")
        _check_string(item.text, f"the text at index {i}")
        if not item.text.strip():
            raise InputError(f"the text at index {i} is empty: an empty text has no meaning to embed. Leave it out")
        if not isinstance(item.task, Task):
            raise InputError(f"the task at index {i} is {item.task!r}: use Task.parse to read task names")
        if item.title is not None:
            _check_string(item.title, f"the title at index {i}")


def _check_string(value: object, name: str) -> None:
    if not isinstance(value, str):
        raise InputError(f"{name} is no string but {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} has half of a surrogate pair at character {error.start}: it was cut or read wrongly"
        ) from None


def chosen_profile(settings: EncoderSettings, name: str, configured: dict[str, str] | None = None) -> PromptProfile:
    """The user's profile, else the one that fits the model's name and its own configuration."""
    if isinstance(settings.prompts, PromptProfile):
        return settings.prompts
    return named_profile(settings.prompts) if settings.prompts else profile_for(name, configured)


def refuse_float16(settings: EncoderSettings, profile: PromptProfile) -> None:
    """Refuse float16 for models that overflow in it."""
    if settings.precision == "float16" and not profile.float16:
        raise InputError(
            "the Gemma embedding models overflow in float16 and give NaN or wrong vectors: "
            "use precision='bfloat16' or precision='float32'"
        )


def chosen_context(settings: EncoderSettings, reported: int | None, profile: PromptProfile, name: str) -> int:
    """The context in tokens: what the user asks for, within what the model has.

    Args:
        settings: With `EncoderSettings.max_tokens`.
        reported: What the model or the server says; None, or a huge number, where it says nothing.
        profile: The model's prompts, by which its family is known.
        name: The model's name, for the errors.
    """
    own = reported if reported and reported < 1_000_000 else CONTEXT.get(profile.name)
    if own is None:
        if settings.max_tokens is None:
            raise ModelUnavailable(f"{name} does not say how many tokens it takes: give max_tokens")
        return settings.max_tokens
    if settings.max_tokens is not None and settings.max_tokens > own:
        raise InputError(f"max_tokens is {settings.max_tokens}, and {name} takes {own} tokens at most")
    return settings.max_tokens or own


def chosen_dimensions(wanted: int | None, untrained: bool, native: int, profile: PromptProfile, name: str) -> int:
    """The dimensions of the vectors.

    Args:
        wanted: What the user asks for; None for the model's own.
        untrained: Whether a dimension is allowed that the model was not trained to be cut to.
        native: What the model gives.
        profile: With `PromptProfile.matryoshka`.
        name: The model's name, for the errors.
    """
    if wanted is None or wanted == native:
        return native
    if wanted < 1:
        raise InputError(f"a vector has at least 1 dimension, and {wanted} were asked for")
    if wanted > native:
        raise InputError(f"{name} gives vectors of {native} dimensions: it cannot be asked for {wanted}")
    trained = [d for d in profile.matryoshka if d < native]
    if wanted not in trained and not untrained:
        offer = ", ".join(map(str, [native, *trained]))
        raise InputError(
            f"{name} was not trained to be cut to {wanted} dimensions, only {offer}. "
            "untrained_dimensions=True cuts it all the same"
        )
    return wanted
