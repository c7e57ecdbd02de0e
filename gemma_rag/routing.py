"""Stage one: which categories a question is let into.

A category is scored by the best cosine that one of its documents is expected to have with the question. To know that
without reading the documents, a category keeps a summary of its vectors: their mean, the few directions in which they
spread most, and how far. Names alone are a poor router (they lose half of the right answers on our two English sets);
a little of the name, the description and the example questions helps where a category has few documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gemma_rag.errors import InputError
from gemma_rag.vectors import Floats, cosines

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_DIRECTIONS = 8
"""Directions of spread kept for a category; docs/decisions/0006 has the measurements."""

_BLOCK = 256
"""Questions that are scored together: bounds the memory of many questions over many categories."""


class Summaries(NamedTuple):
    """What stage one knows of the vectors of each category.

    Attributes:
        means: float32 of shape ``(c, d)``: their means, not normalised.
        sizes: int64 of shape ``(c,)``: how many there are.
        directions: float32 of shape ``(m, d)``, unit rows: the principal directions of all categories, those of a
            category together and in the order of the categories; at most eight each.
        variances: float32 of shape ``(m,)``: the variance along each direction.
        owners: int64 of shape ``(m,)``, ascending: the category of each direction.
        residuals: float32 of shape ``(c,)``: the mean variance along any other direction.
    """

    means: Floats
    sizes: Ints
    directions: Floats
    variances: Floats
    owners: Ints
    residuals: Floats

    def expected_best(self, queries: Floats) -> Floats:
        """The best cosine that a vector of each category is expected to have with each query.

        Cosines of a query with the vectors of a category are taken as normally distributed: their mean is the query's
        product with the mean vector, their variance comes from the directions. The largest of n such values lies
        near ``sqrt(2 ln n)`` standard deviations above the mean, and none can lie more than ``sqrt(n - 1)`` above
        (Samuelson, JASA 1968), which makes the value exact for one vector and for two.

        Args:
            queries: Shape ``(q, d)``, rows of norm 1.

        Returns:
            float32 of shape ``(q, c)``, -1 to 1.
        """
        out = np.empty((len(queries), len(self.means)), dtype=np.float32)
        sizes = np.maximum(self.sizes, 1)
        reach = np.minimum(np.sqrt(2.0 * np.log(sizes)), np.sqrt(sizes - 1.0))
        starts = np.searchsorted(self.owners, np.arange(len(self.means)))
        some = np.flatnonzero(np.bincount(self.owners, minlength=len(self.means)))
        for first in range(0, len(queries), _BLOCK):
            block = queries[first : first + _BLOCK]
            along = np.zeros((len(block), len(self.means)), dtype=np.float32)
            inside = np.zeros_like(along)
            if len(some):
                squares = (block @ self.directions.T) ** 2
                inside[:, some] = np.add.reduceat(squares, starts[some], axis=1)
                along[:, some] = np.add.reduceat(squares * self.variances, starts[some], axis=1)
            variance = along + self.residuals * np.maximum(0.0, 1.0 - inside)
            out[first : first + _BLOCK] = np.clip(block @ self.means.T + reach * np.sqrt(variance), -1.0, 1.0)
        return out


def summarize(vectors: Floats, members: Sequence[Ints]) -> Summaries:
    """Summarise the vectors of each category.

    Args:
        vectors: Shape ``(n, d)``.
        members: For each category the rows of its vectors, at least one.
    """
    d = vectors.shape[1]
    means = np.zeros((len(members), d), dtype=np.float32)
    residuals = np.zeros(len(members), dtype=np.float32)
    directions: list[Floats] = []
    variances: list[Floats] = []
    for code, rows in enumerate(members):
        own = np.asarray(vectors[rows], dtype=np.float32)
        means[code] = own.mean(axis=0, dtype=np.float64)
        axes, along, total = _principal(own - means[code])
        directions.append(axes)
        variances.append(along)
        residuals[code] = max(0.0, total - float(along.sum())) / max(1, d - len(along))
    return Summaries(
        means=means,
        sizes=np.array([len(rows) for rows in members], dtype=np.int64),
        directions=np.concatenate(directions) if directions else np.zeros((0, d), dtype=np.float32),
        variances=np.concatenate(variances) if variances else np.zeros(0, dtype=np.float32),
        owners=np.repeat(np.arange(len(members)), [len(along) for along in variances]).astype(np.int64),
        residuals=residuals,
    )


def _principal(centred: Floats) -> tuple[Floats, Floats, float]:
    """The directions of most variance, shape ``(m, d)``, the variance along each, and the sum over all directions."""
    n, d = centred.shape
    total = float((centred.astype(np.float64) ** 2).sum() / n)
    if total < 1e-12:
        return np.zeros((0, d), dtype=np.float32), np.zeros(0, dtype=np.float32), 0.0
    if n <= 2 * d:
        values, left = np.linalg.eigh(centred.astype(np.float64) @ centred.T)
        values, basis = values[::-1][:_DIRECTIONS], left.T[::-1][:_DIRECTIONS] @ centred
    else:
        values, right = np.linalg.eigh(centred.T.astype(np.float64) @ centred)
        values, basis = values[::-1][:_DIRECTIONS], right.T[::-1][:_DIRECTIONS]
    keep = values > 1e-9 * total * n
    lengths = np.linalg.norm(basis[keep], axis=1, keepdims=True)
    return (basis[keep] / lengths).astype(np.float32), (values[keep] / n).astype(np.float32), total


@dataclass(frozen=True)
class Gate:
    """How stage one scores categories and how many it keeps.

    Attributes:
        mass: The kept categories hold this share, 0 to 1, of the probability that a softmax over the category scores
            gives. The defaults are those of the dev splits' table in docs/decisions/0006.
        temperature: Of that softmax, above 0; smaller keeps fewer categories.
        name_weight: Share of the name's cosine in the score of a category of one document, 0 to 1; the documents' is the
            rest. It shrinks with the square root of their number. 1 is the published naive form: names alone.
    """

    mass: float = 0.9
    temperature: float = 0.05
    name_weight: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 < self.mass <= 1.0:
            raise InputError(f"the mass of a gate is above 0 and at most 1, and is {self.mass}")
        if not (np.isfinite(self.temperature) and self.temperature > 0.0):
            raise InputError(f"the temperature of a gate is above 0, and is {self.temperature}")
        if not 0.0 <= self.name_weight <= 1.0:
            raise InputError(f"the name_weight of a gate is from 0 to 1, and is {self.name_weight}")

    def scores(self, classification: Floats, query: Floats, names: Floats, owners: Ints, summaries: Summaries) -> Floats:
        """Score every category for every question.

        Args:
            classification: Questions under the classification prompt, shape ``(q, d)``.
            query: The same questions under the query prompt, shape ``(q, d)``.
            names: Vectors of category names with their descriptions, and of example questions, shape ``(m, d)``; of
                those of a category, the closest counts.
            owners: The category of each, shape ``(m,)``, ascending; every category has one at least.
            summaries: Of the categories' vectors.

        Returns:
            float32 of shape ``(q, c)``, -1 to 1: a weighted mean of two cosines.
        """
        by_documents = summaries.expected_best(query)
        if not self.name_weight or not len(names):
            return by_documents
        starts = np.searchsorted(owners, np.arange(len(summaries.means)))
        by_name = np.maximum.reduceat(cosines(classification, names), starts, axis=1)
        sizes = np.sqrt(np.maximum(1, summaries.sizes))
        share = self.name_weight / (self.name_weight + (1.0 - self.name_weight) * sizes)
        blended: Floats = (share * by_name + (1.0 - share) * by_documents).astype(np.float32)
        return blended

    def probabilities(self, scores: Floats, groups: Ints | None = None) -> npt.NDArray[np.float64]:
        """The softmax of the scores, over all or, with `groups`, within each group of columns.

        Args:
            scores: Shape ``(q, c)``.
            groups: The group of each column, shape ``(c,)``.

        Returns:
            float64 of shape ``(q, c)``; rows sum to 1 (to 1 in each group).
        """
        groups = np.zeros(scores.shape[1], dtype=np.int64) if groups is None else groups
        order = np.argsort(groups, kind="stable")
        starts = np.flatnonzero(np.diff(groups[order], prepend=groups[order][:1] - 1))
        counts = np.diff(np.append(starts, len(order)))
        logits = scores[:, order].astype(np.float64) / self.temperature
        weights = np.exp(logits - np.repeat(np.maximum.reduceat(logits, starts, axis=1), counts, axis=1))
        out = np.empty(scores.shape, dtype=np.float64)
        out[:, order] = weights / np.repeat(np.add.reduceat(weights, starts, axis=1), counts, axis=1)
        return out

    def open(self, scores: Floats, max_categories: int | None = None) -> Bools:
        """Keep the best categories up to the probability mass; the best one always.

        Args:
            scores: Shape ``(q, c)``.
            max_categories: Keep no more than that for a question.

        Returns:
            bool of shape ``(q, c)``.
        """
        if scores.shape[1] == 0:
            return np.zeros(scores.shape, dtype=bool)
        return self.keep(self.probabilities(scores), scores, max_categories)

    def keep(self, shares: npt.NDArray[np.float64], scores: Floats, max_categories: int | None = None) -> Bools:
        """Keep columns from the top until they hold the mass of their row's sum; the best one always.

        Args:
            shares: Probabilities, shape ``(q, c)``; a row of zeros keeps nothing.
            scores: What orders columns of equal shares, shape ``(q, c)``.
            max_categories: Keep no more than that for a question.
        """
        order = np.lexsort((-scores, -shares), axis=1)
        ranked = np.take_along_axis(shares, order, axis=1)
        reached = np.cumsum(ranked, axis=1)
        wanted = np.ones(shares.shape, dtype=bool)
        if self.mass < 1.0:  # with 1 all are wanted, also those whose share is 0 to a float
            wanted[:, 1:] = reached[:, :-1] < self.mass * reached[:, -1:]
        wanted &= reached[:, -1:] > 0
        if max_categories is not None:
            wanted[:, max_categories:] = False
        kept = np.zeros(shares.shape, dtype=bool)
        np.put_along_axis(kept, order, wanted, axis=1)
        return kept


class Tree:
    """Categories as paths: ``IT/Accounts/Passwords`` lies in ``IT/Accounts``, which lies in ``IT``.

    Args:
        names: Category names, the leaves. One may lie inside another: its own documents are then one of its parts.

    Attributes:
        parents: int64 of shape ``(nodes,)``: the node that each node lies in, -1 at the top; parents come first.
        levels: The nodes of each depth, the top first.
        leaves: int64 of shape ``(names,)``: the node of each name.
    """

    def __init__(self, names: Sequence[str]) -> None:
        paths = [tuple(name.split("/")) for name in names]
        inner = {path[:i] for path in paths for i in range(1, len(path))}
        paths = [(*path, "/") if path in inner else path for path in paths]  # no part of a path is a slash
        known = sorted({path[:i] for path in paths for i in range(1, len(path) + 1)}, key=lambda path: (len(path), path))
        number = {path: i for i, path in enumerate(known)}
        self.parents: Ints = np.array([number.get(path[:-1], -1) for path in known], dtype=np.int64)
        depths = np.array([len(path) for path in known], dtype=np.int64)
        self.levels: list[Ints] = [np.flatnonzero(depths == depth) for depth in np.unique(depths)]
        self.leaves: Ints = np.array([number[path] for path in paths], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.parents)

    def spread(self, members: Sequence[Ints]) -> list[Ints]:
        """For each node, what its leaves hold.

        Args:
            members: What each leaf holds, in the order of the names.
        """
        parts: list[list[Ints]] = [[] for _ in self.parents]
        for leaf, own in zip(self.leaves.tolist(), members, strict=True):
            node = leaf
            while node >= 0:
                parts[node].append(own)
                node = int(self.parents[node])
        return [np.unique(np.concatenate(part)) if len(part) > 1 else part[0] for part in parts]

    def walk(
        self, gate: Gate, scores: Floats, eligible: Bools, max_categories: int | None = None
    ) -> tuple[npt.NDArray[np.float64], Bools]:
        """Go down from the top, and at every depth only into the nodes that hold the gate's mass (a beam).

        A node's probability is its parent's times its share of a softmax among its siblings. The mass of a gate is
        shared out over the depths, so that the leaves that are kept hold all of it.

        Args:
            gate: How much is kept.
            scores: Of the nodes, shape ``(q, nodes)``.
            eligible: Which leaves may be opened, shape ``(names,)``.
            max_categories: Keep no more leaves than that for a question.

        Returns:
            Probability of each leaf, 0 where a node above it was left out, and whether it is kept; both of shape
            ``(q, names)``.
        """
        alive = np.zeros(len(self), dtype=bool)
        alive[self.leaves[eligible]] = True
        for level in reversed(self.levels[1:]):
            alive[self.parents[level[alive[level]]]] = True
        step = replace(gate, mass=gate.mass ** (1.0 / max(1, len(self.levels))))
        shares = np.zeros(scores.shape, dtype=np.float64)
        is_leaf = np.zeros(len(self), dtype=bool)
        is_leaf[self.leaves] = True
        seen: list[Ints] = []
        for level in self.levels:
            nodes = level[alive[level]]
            if not len(nodes):
                continue
            parents = self.parents[nodes]
            above = np.where(parents >= 0, shares[:, parents], 1.0)
            shares[:, nodes] = step.probabilities(scores[:, nodes], parents) * above
            frontier = np.concatenate([*seen, nodes])
            kept = step.keep(shares[:, frontier], scores[:, frontier])
            shares[:, frontier] = np.where(kept, shares[:, frontier], 0.0)
            seen.append(nodes[is_leaf[nodes]])
        leaves = shares[:, self.leaves]
        reached = np.broadcast_to(eligible, leaves.shape) if gate.mass == 1.0 else leaves > 0  # 1 leaves nothing out
        within = np.where(reached, scores[:, self.leaves], -np.inf)
        best = replace(gate, mass=1.0).keep(leaves, within, max_categories)
        return leaves, best & reached
