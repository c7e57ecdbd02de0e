"""Arithmetic on rows of vectors: normalise, cut to a Matryoshka dimension, compare.

Everything in gemma-rag that is called a vector has been through `unit`, so that a dot product is a cosine.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gemma_rag.errors import InputError

Floats: TypeAlias = npt.NDArray[np.float32]
"""An array of float32."""


def unit(rows: npt.ArrayLike) -> Floats:
    """Scale each row to Euclidean norm 1.

    Args:
        rows: Shape ``(n, d)``.

    Returns:
        float32 of shape ``(n, d)``, each row of norm 1.

    Raises:
        InputError: A row holds NaN or infinity (an overflow in the model), or only zeros, which have no direction.
    """
    array = _float32(rows)
    if array.ndim != 2:
        raise InputError(f"expected rows of vectors, an array of 2 dimensions, and got one of shape {array.shape}")
    norms = np.linalg.norm(array.astype(np.float64), axis=1)
    bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
    if len(bad):
        raise InputError(
            f"{len(bad)} of {len(array)} vectors have no direction (NaN, infinity or all zeros), the first in row {bad[0]}. "
            "A model run in float16 that needs float32 or bfloat16 gives such rows."
        )
    scaled: Floats = (array / norms[:, None]).astype(np.float32)
    return scaled


def _float32(rows: npt.ArrayLike) -> Floats:
    with np.errstate(over="ignore"):  # too large for float32: infinity, which `unit` refuses
        array: Floats = np.asarray(rows, dtype=np.float32)
    return array


def truncate(rows: npt.ArrayLike, dimensions: int) -> Floats:
    """Keep the first `dimensions` components of each row and scale it to norm 1 again.

    A model trained with Matryoshka Representation Learning (Kusupati et al. 2022, https://arxiv.org/abs/2205.13147)
    puts the most important components first. Without the second normalisation the dot product of two cut rows is
    not their cosine.

    Args:
        rows: Shape ``(n, d)``.
        dimensions: From 1 to ``d``.

    Returns:
        float32 of shape ``(n, dimensions)``, each row of norm 1.

    Raises:
        InputError: `dimensions` is outside 1 to ``d``.
    """
    array = _float32(rows)
    if array.ndim != 2 or not 1 <= dimensions <= array.shape[1]:
        raise InputError(f"cannot cut an array of shape {array.shape} to {dimensions} dimensions")
    return unit(array[:, :dimensions])


def cosines(left: npt.ArrayLike, right: npt.ArrayLike) -> Floats:
    """The cosine of every row of `left` with every row of `right`; both must be rows of norm 1.

    Args:
        left: Shape ``(n, d)``.
        right: Shape ``(m, d)``.

    Returns:
        float32 of shape ``(n, m)``, clipped to -1 to 1 (rounding can step over by 1e-7).

    Raises:
        InputError: The two have different numbers of components.
    """
    a, b = _float32(left), _float32(right)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise InputError(f"cannot compare vectors of shape {a.shape} with vectors of shape {b.shape}")
    scores: Floats = np.clip(a @ b.T, -1.0, 1.0)
    return scores
