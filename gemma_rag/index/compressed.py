"""The components after the first ones, stored in fewer bits; they are decoded when rows are ranked."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from gemma_rag.vectors import Floats

Precision: TypeAlias = Literal["float32", "float16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8")
"""The finest first."""

Stored: TypeAlias = npt.NDArray[Any]


_BLOCK = 2_048
"""Rows that are decoded at a time to be compared, so that they are still in the cache."""


def compress(tail: Floats, precision: Precision) -> tuple[Stored, Floats | None]:
    """Encode rows.

    Args:
        tail: float32 of shape ``(n, d)``, components between -1 and 1.
        precision: ``float16`` halves the bytes, ``int8`` makes a quarter of them.

    Returns:
        The rows, and for ``int8`` the scale of each, float32 of shape ``(n,)``, by which they are multiplied.
    """
    if precision == "float32":
        return tail, None
    if precision == "float16":
        return tail.astype(np.float16), None
    scales = (np.abs(tail).max(axis=1, initial=0.0) / 127.0).astype(np.float32)
    by = np.where(scales > 0, scales, np.float32(1.0))
    return np.rint(tail / by[:, None]).astype(np.int8), scales


def decoded(tail: Stored, scales: Floats | None = None) -> Floats:
    """The rows as float32, as near as they were stored.

    Args:
        tail: Shape ``(n, d)``: float32, float16 or int8.
        scales: Shape ``(n,)``, of int8.
    """
    if tail.dtype == np.float32:
        return tail
    rows: Floats = tail.astype(np.float32)
    if scales is not None:
        rows *= scales[:, None]
    return rows


def products(queries: Floats, tail: Stored, scales: Floats | None = None) -> Floats:
    """Dot products of questions with rows, which are decoded a few at a time.

    Args:
        queries: float32 of shape ``(q, d)``.
        tail: Shape ``(n, d)``: float32, float16 or int8.
        scales: Shape ``(n,)``, of int8.

    Returns:
        float32 of shape ``(q, n)``.
    """
    if tail.dtype == np.float32:
        whole: Floats = queries @ tail.T
        return whole
    out = np.empty((len(queries), len(tail)), dtype=np.float32)
    for first in range(0, len(tail), _BLOCK):
        rows = slice(first, first + _BLOCK)
        np.matmul(queries, tail[rows].astype(np.float32).T, out=out[:, rows])
    if scales is not None:
        out *= scales
    return out
