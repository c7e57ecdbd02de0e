"""What is good enough to keep. Each threshold works alone, on any list of scores (cosines, higher is better).

>>> kept = DynamicThreshold(floor=0.3).apply([0.80, 0.79, 0.52, 0.51, 0.50])
>>> kept.keep.tolist(), round(kept.cutoff, 4)
([True, True, False, False, False], 0.5304)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gemma_rag.errors import InputError


@dataclass(frozen=True)
class Cut:
    """What a threshold did to a list of scores.

    Attributes:
        keep: bool of shape ``(n,)``: which of the scores are kept.
        cutoff: The lowest score that would have been kept; a score fails by ``cutoff - score``.
    """

    keep: npt.NDArray[np.bool_]
    cutoff: float


class Threshold(Protocol):
    """Anything that decides which scores are good enough."""

    def apply(self, scores: npt.ArrayLike) -> Cut:
        """Decide for a list of scores, shape ``(n,)``, in any order."""
        ...


def _scores(scores: npt.ArrayLike) -> npt.NDArray[np.float64]:
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 1:
        raise InputError(f"a threshold needs a list of scores, and got an array of shape {array.shape}")
    if not np.isfinite(array).all():
        raise InputError("a threshold cannot judge NaN or infinite scores")
    return array


def _cosine(name: str, value: float) -> None:
    if not -1.0 <= value <= 1.0:
        raise InputError(f"{name} is a cosine, from -1 to 1, and is {value}")


@dataclass(frozen=True)
class FixedThreshold:
    """Keep scores of at least `value`.

    0.4 for both stages is the published starting point for EmbeddingGemma's question-to-document cosines.

    Args:
        value: A cosine, -1 to 1.
    """

    value: float

    def __post_init__(self) -> None:
        _cosine("a fixed threshold", self.value)

    def apply(self, scores: npt.ArrayLike) -> Cut:
        """Keep every score that is at least `value`."""
        return Cut(_scores(scores) >= self.value, self.value)


@dataclass(frozen=True)
class DynamicThreshold:
    """Keep scores of at least `ratio` times the mean of the `top_n` best ones.

    The best score is never below the mean of the best ones, so over positive scores and with a ratio up to 1 this
    always keeps at least one: it trims a result and cannot refuse one. Refusing needs the `floor`.

    Args:
        ratio: 0 to 1; the published value is 0.85.
        top_n: How many of the best scores are averaged, at least 1; the published value is 5. Fewer where there are fewer.
        floor: A cosine below which nothing is kept whatever the others are; None for no floor.
    """

    ratio: float = 0.85
    top_n: int = 5
    floor: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio <= 1.0:
            raise InputError(f"the ratio of a dynamic threshold is from 0 to 1, and is {self.ratio}")
        if self.top_n < 1:
            raise InputError(f"a dynamic threshold averages at least 1 score, not {self.top_n}")
        if self.floor is not None:
            _cosine("the floor of a dynamic threshold", self.floor)

    def apply(self, scores: npt.ArrayLike) -> Cut:
        """Keep every score that is at least the ratio times the mean of the best ones, and at least the floor."""
        array = _scores(scores)
        lowest = -1.0 if self.floor is None else self.floor
        if not len(array):
            return Cut(np.zeros(0, dtype=bool), lowest)
        best = np.sort(array)[-self.top_n :]
        mean = min(float(best.mean()), float(best[-1]))  # rounding can put the mean of equal scores above them
        cutoff = max(self.ratio * mean, lowest)
        return Cut(array >= cutoff, cutoff)


PRESETS = {"strict": 0.85, "balanced": 0.72, "loose": 0.58}
"""Cosines for **symmetric sentence similarity** (is this ticket the same as that one?), both texts embedded with
`Task.SIMILARITY`. They are too high for questions against documents, whose cosines are lower: use a
`FixedThreshold` near 0.4, or a calibrated one, there."""


def preset(name: str) -> FixedThreshold:
    """The fixed threshold of a preset: ``strict`` 0.85, ``balanced`` 0.72, ``loose`` 0.58 (see `PRESETS`).

    Raises:
        InputError: No preset has that name.
    """
    if name not in PRESETS:
        raise InputError(f"no threshold preset is named {name!r}: there are {', '.join(PRESETS)}")
    return FixedThreshold(PRESETS[name])


def as_threshold(value: float | str | Threshold) -> Threshold:
    """Read a threshold as users write it: a cosine, the name of a preset, ``"dynamic"``, or a threshold itself.

    Raises:
        InputError: It is none of these.
    """
    if isinstance(value, str):
        return DynamicThreshold() if value == "dynamic" else preset(value)
    if isinstance(value, (int, float, np.floating)) and not isinstance(value, bool):
        return FixedThreshold(float(value))
    if hasattr(value, "apply") and not isinstance(value, type):
        return value
    raise InputError(f"a threshold is a cosine, a preset ({', '.join(PRESETS)}), 'dynamic' or a Threshold, not {value!r}")


def describe(threshold: Threshold) -> str | float | dict[str, object]:
    """A threshold as plain JSON: a number for a fixed one, its fields for a dynamic one, else its repr."""
    if isinstance(threshold, FixedThreshold):
        return float(threshold.value)
    if isinstance(threshold, DynamicThreshold):
        return {"ratio": threshold.ratio, "top_n": threshold.top_n, "floor": threshold.floor}
    return repr(threshold)


__all__: Sequence[str] = [
    "PRESETS",
    "Cut",
    "DynamicThreshold",
    "FixedThreshold",
    "Threshold",
    "as_threshold",
    "describe",
    "preset",
]
