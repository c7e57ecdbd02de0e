"""Two rankings of the same items into one.

A fused score orders and nothing more: it depends on the other items of the list, so no threshold is ever put on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gemma_rag.errors import InputError

Scores = npt.NDArray[np.float64]


def _check(lists: Sequence[npt.ArrayLike], weights: Sequence[float]) -> list[Scores]:
    arrays = [np.asarray(scores, dtype=np.float64) for scores in lists]
    if not arrays or any(a.ndim != 1 or a.shape != arrays[0].shape for a in arrays):
        raise InputError(f"fusion needs lists of scores for the same items, and got shapes {[a.shape for a in arrays]}")
    if len(weights) != len(arrays) or not np.isfinite(weights).all() or min(weights) < 0 or sum(weights) <= 0:
        raise InputError(
            f"fusion needs one weight of at least 0 per list, not all 0, and got {list(weights)} for {len(arrays)} lists"
        )
    if any(np.isinf(a).any() for a in arrays):
        raise InputError("fusion cannot use infinite scores")
    return arrays


def weighted(lists: Sequence[npt.ArrayLike], weights: Sequence[float] = (0.7, 0.3)) -> Scores:
    """Weighted sum of min-max scaled scores.

    Each list is scaled to 0..1 over the items that it scored (a list in which all are equal becomes all 1); an item
    that a list did not score, NaN, gets 0 from it.

    Args:
        lists: Lists of scores over the same items, higher is better, NaN for "not scored"; by convention dense first.
        weights: One per list, at least 0; scaled to sum to 1.

    Returns:
        float64 of shape ``(items,)``, in 0..1.

    Raises:
        InputError: Lists of different lengths, infinite scores, or weights that do not fit.
    """
    arrays = _check(lists, weights)
    total = np.zeros(len(arrays[0]))
    for scores, weight in zip(arrays, weights, strict=True):
        known = ~np.isnan(scores)
        if known.any():
            low, high = scores[known].min(), scores[known].max()
            scaled = (scores[known] - low) / (high - low) if high > low else np.ones(int(known.sum()))
            total[known] += weight / sum(weights) * scaled
    return total


def reciprocal_rank(lists: Sequence[npt.ArrayLike], weights: Sequence[float] | None = None, constant: float = 60.0) -> Scores:
    """Reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009): the sum of ``1 / (constant + rank)``.

    Items with equal scores share the better rank, so that their order in the list does not matter.

    Args:
        lists: Lists of scores over the same items, higher is better, NaN for "not ranked" (adds nothing).
        weights: One per list; equal by default.
        constant: 60 in the paper; larger values care less about the first places.

    Returns:
        float64 of shape ``(items,)``.

    Raises:
        InputError: Lists of different lengths, infinite scores, weights that do not fit, or a negative constant.
    """
    weights = [1.0] * len(lists) if weights is None else weights
    arrays = _check(lists, weights)
    if not (np.isfinite(constant) and constant >= 0):
        raise InputError(f"the constant of reciprocal rank fusion must be at least 0, and is {constant}")
    total = np.zeros(len(arrays[0]))
    for scores, weight in zip(arrays, weights, strict=True):
        known = ~np.isnan(scores)
        ordered = np.sort(scores[known])
        ranks = 1 + len(ordered) - np.searchsorted(ordered, scores[known], side="right")
        total[known] += weight / (constant + ranks)
    return total
