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

_KEPT = np.int32(-0x70000001)  # all bits but the three between the sign and the exponent of a float16
_REBASED = np.float32(2.0**112)  # exponents of float16 count from 15, those of float32 from 127


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
    rows = _widened(tail)
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
        np.matmul(queries, _widened(tail[rows]).T, out=out[:, rows])
    if scales is not None:
        out *= scales
    return out


def _widened(tail: Stored) -> Floats:
    """The numbers as float32; of float16, exactly as numpy does it, of finite numbers, and in a fifth of the time."""
    if tail.dtype != np.float16:
        return tail.astype(np.float32)
    bits = tail.view(np.int16).astype(np.int32)
    bits <<= 13  # exponent and mantissa to where float32 has them; the sign, extended, ends in the highest bit
    bits &= _KEPT
    rows: Floats = bits.view(np.float32)
    rows *= _REBASED
    return rows
