"""What stage one keeps of the vectors of a group of documents: their mean, the directions of most spread, and how far.

Groups are the documents of a category that one segment holds, summarised when the segment is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gemma_rag.vectors import Floats

Ints = npt.NDArray[np.int64]

DIRECTIONS = 8
"""Directions of spread kept for a group; docs/decisions/0006 has the measurements."""

_EXACT = 256
"""Vectors, or components, up to which directions come from an eigendecomposition."""

_KRYLOV = (8, 6)
"""Beyond: the width of a block, and how many blocks. A thousand vectors of 768 components take 4 ms for 330."""

_SAMPLE = 16_384
"""Vectors of a group from which its directions are found, at most; its mean and its variances come from all of them."""


class Summaries(NamedTuple):
    """What stage one knows of groups of vectors: of the documents of a category that one segment holds.

    Attributes:
        means: float32 of shape ``(c, d)``: their means, not normalised.
        sizes: int64 of shape ``(c,)``: how many there are.
        directions: float32 of shape ``(m, d)``, unit rows: the principal directions of all groups, those of a
            group together and in the order of the groups; at most eight each.
        variances: float32 of shape ``(m,)``: the variance along each direction.
        owners: int64 of shape ``(m,)``, ascending: the group of each direction.
        residuals: float32 of shape ``(c,)``: the mean variance along any other direction.
    """

    means: Floats
    sizes: Ints
    directions: Floats
    variances: Floats
    owners: Ints
    residuals: Floats


def summarize(vectors: Callable[[Ints], Floats] | Floats, members: Sequence[Ints]) -> Summaries:
    """Summarise groups of vectors, one group in memory at a time.

    The same vectors give the same summaries: what is random has a fixed seed.

    Args:
        vectors: Shape ``(n, d)``, or what gives the rows that it is asked for, shape ``(len(rows), d)``.
        members: For each group the rows of its vectors, at least one.
    """
    if callable(vectors):
        read = vectors
    else:
        array = vectors

        def read(rows: Ints) -> Floats:
            return array[rows]

    d = read(np.zeros(0, dtype=np.int64)).shape[1]
    means = np.zeros((len(members), d), dtype=np.float32)
    residuals = np.zeros(len(members), dtype=np.float32)
    directions = [np.zeros((0, d), dtype=np.float32)]
    variances = [np.zeros(0, dtype=np.float32)]
    for group, rows in enumerate(members):
        means[group], axes, along, total = _spread(read, rows)
        directions.append(axes)
        variances.append(along)
        residuals[group] = max(0.0, total - float(along.sum())) / max(1, d - len(along))
    return Summaries(
        means=means,
        sizes=np.array([len(rows) for rows in members], dtype=np.int64),
        directions=np.concatenate(directions),
        variances=np.concatenate(variances),
        owners=np.repeat(np.arange(len(members)), [len(along) for along in variances[1:]]).astype(np.int64),
        residuals=residuals,
    )


def _spread(read: Callable[[Ints], Floats], rows: Ints) -> tuple[Floats, Floats, Floats, float]:
    """The mean of some vectors, their principal directions, the variance along each, and the sum over all directions."""
    n = len(rows)
    if n <= _SAMPLE:
        own = np.asarray(read(rows), dtype=np.float32)
        mean = own.mean(axis=0, dtype=np.float64).astype(np.float32)
        centred = own - mean
        total = _squares(centred) / n
        return mean, *_principal(centred, total), total
    blocks = [rows[first : first + _SAMPLE] for first in range(0, n, _SAMPLE)]
    mean = (sum(read(block).sum(axis=0, dtype=np.float64) for block in blocks) / n).astype(np.float32)
    sample = read(rows[:: -(-n // _SAMPLE)]) - mean
    axes, _ = _principal(sample, _squares(sample) / len(sample))
    total, along = 0.0, np.zeros(len(axes))
    for block in blocks:
        centred = read(block) - mean
        total += _squares(centred) / n
        along += ((centred @ axes.T) ** 2).sum(axis=0, dtype=np.float64) / n
    order = np.argsort(-along, kind="stable")
    return mean, axes[order], along[order].astype(np.float32), total


def _squares(rows: Floats) -> float:
    return float(np.einsum("ij,ij->i", rows, rows).sum(dtype=np.float64))


def _principal(centred: Floats, total: float) -> tuple[Floats, Floats]:
    """The directions of most variance, shape ``(m, d)``, and the variance along each.

    Args:
        centred: Shape ``(n, d)``, of mean 0.
        total: The sum of the variances over all directions.
    """
    n, d = centred.shape
    if total < 1e-12:
        return np.zeros((0, d), dtype=np.float32), np.zeros(0, dtype=np.float32)
    if min(n, d) > _EXACT:
        basis = _krylov(centred)
        inside = centred @ basis
        values, right = np.linalg.eigh((inside.T @ inside).astype(np.float64))
        found, least = (basis @ right[:, ::-1][:, :DIRECTIONS]).T, 1e-6  # of float32's making below that
    elif n <= d:
        values, left = np.linalg.eigh(centred.astype(np.float64) @ centred.T)
        found, least = left.T[::-1][:DIRECTIONS] @ centred, 1e-9
    else:
        values, right = np.linalg.eigh(centred.T.astype(np.float64) @ centred)
        found, least = right.T[::-1][:DIRECTIONS], 1e-9
    values = values[::-1][:DIRECTIONS]
    keep = values > least * total * n
    lengths = np.linalg.norm(found[keep], axis=1, keepdims=True)
    return (found[keep] / lengths).astype(np.float32), (values[keep] / n).astype(np.float32)


def _krylov(centred: Floats) -> Floats:
    """An orthonormal basis, shape ``(d, b)``, of a space that holds the principal directions almost wholly.

    Block Krylov iteration (Musco and Musco 2015, https://arxiv.org/abs/1504.05477): far fewer passes than the power
    method where the spectrum is flat, as that of text is.
    """
    width, depth = _KRYLOV
    block = np.random.default_rng(0).standard_normal((centred.shape[1], width), dtype=np.float32)
    blocks = []
    for _ in range(depth):
        block, _ = np.linalg.qr(centred.T @ (centred @ block))
        blocks.append(block)
    basis: Floats = np.linalg.qr(np.concatenate(blocks, axis=1))[0]
    return basis
