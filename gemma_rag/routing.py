"""Stage one: which categories a question is let into.

A category is scored by the best cosine that one of its documents is expected to have with the question. To know that
without reading the documents, a summary of its vectors is kept: their mean, the few directions in which they spread most,
and how far. It is made when vectors are stored, one for each segment and category: the best of a union is the best of
its parts, so a category scores as the best of its groups does, and a change costs what it changes. Names alone are a
poor router (they lose half of the right answers on our two English sets); a little of the name, the description and the
example questions helps where a category has few documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from gemma_rag.errors import InputError
from gemma_rag.summaries import DIRECTIONS, Summaries
from gemma_rag.vectors import Floats, cosines

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Doubles = npt.NDArray[np.float64]

_BLOCK = 256
"""Questions that are scored together: bounds the memory of many questions over many categories."""


class Overview:
    """What stage one knows of every node of the tree: of a category, or of a folder of categories.

    The best of a union is the best of its parts: a node scores as the best group below it does.

    Args:
        groups: Of each segment its summaries, and the category of each of their groups, as a place among the tree's names;
            -1 leaves a group out.
        tree: The categories as paths.

    Attributes:
        sizes: int64 of shape ``(nodes,)``: vectors below each node.
    """

    def __init__(self, groups: Sequence[tuple[Summaries, Ints]], tree: Tree) -> None:
        self._tree = tree
        codes = np.concatenate([np.zeros(0, dtype=np.int64), *(codes for _, codes in groups)])
        places = np.flatnonzero(codes >= 0)
        self.sizes: Ints = np.zeros(len(tree), dtype=np.int64)
        if not len(places):
            return
        counts = np.concatenate([np.bincount(item.owners, minlength=len(item.sizes)) for item, _ in groups])
        # groups of many directions first, so that the first direction of each is one run of rows, then the second, ...
        order = places[np.lexsort((codes[places], -counts[places]))]
        firsts = np.cumsum([0, *((counts[order] > j).sum() for j in range(DIRECTIONS))])
        self._runs = [(int(first), int(last)) for first, last in pairwise(firsts) if last > first]
        sizes = np.concatenate([item.sizes for item, _ in groups])[order]
        least = np.maximum(sizes, 1)
        self._reach = np.minimum(np.sqrt(2.0 * np.log(least)), np.sqrt(least - 1.0)).astype(np.float32)
        self._residuals: Floats = np.concatenate([item.residuals for item, _ in groups])[order]
        self._matrix = _stacked([item for item, _ in groups], order, firsts)
        by_leaf = np.argsort(tree.leaves[codes[order]], kind="stable")
        nodes = tree.leaves[codes[order]][by_leaf]
        starts = np.flatnonzero(np.diff(nodes, prepend=-1))
        self._by_leaf = _columns(by_leaf)
        self._starts = None if len(starts) == len(nodes) else starts
        self._leaves = _columns(nodes[starts])
        np.add.at(self.sizes, tree.leaves[codes[order]], sizes)
        self._folded = []
        for level in reversed(tree.levels[1:]):
            parents = tree.parents[level]
            np.add.at(self.sizes, parents, self.sizes[level])
            ranked = np.argsort(parents, kind="stable")
            runs = np.flatnonzero(np.diff(parents[ranked], prepend=-1))
            self._folded.append((level[ranked], runs, parents[ranked][runs]))

    def expected_best(self, queries: Floats) -> Floats:
        """The best cosine that a vector below each node is expected to have with each query.

        Cosines of a query with the vectors of a group are taken as normally distributed: their mean is the query's
        product with the mean vector, their variance comes from the directions. The largest of n such values lies
        near ``sqrt(2 ln n)`` standard deviations above the mean, and none can lie more than ``sqrt(n - 1)`` above
        (Samuelson, JASA 1968), which makes the value exact for one vector and for two.

        Args:
            queries: Shape ``(q, d)``, rows of norm 1.

        Returns:
            float32 of shape ``(q, nodes)``, -1 to 1; -1 where nothing lies below.
        """
        out = np.full((len(queries), len(self._tree)), -1.0, dtype=np.float32)
        if not self.sizes.any():
            return out
        groups = len(self._reach)
        for first in range(0, len(queries), _BLOCK):
            products = queries[first : first + _BLOCK] @ self._matrix.T
            variance = np.repeat(self._residuals[None], len(products), axis=0)
            along = np.square(products[:, groups:], out=products[:, groups:])
            for start, end in self._runs:
                variance[:, : end - start] += along[:, start:end]
            best = np.sqrt(variance, out=variance)
            best *= self._reach
            best += products[:, :groups]
            best = np.clip(best, -1.0, 1.0, out=best)[:, self._by_leaf]
            out[first : first + _BLOCK, self._leaves] = (
                best if self._starts is None else np.maximum.reduceat(best, self._starts, axis=1)
            )
        for children, runs, parents in self._folded:
            # a node of names has no other child: what lies in a folder's own name lies in a leaf of its own
            out[:, parents] = np.maximum.reduceat(out[:, children], runs, axis=1)
        return out


def _stacked(parts: Sequence[Summaries], order: Ints, firsts: Ints) -> Floats:
    """The means of groups in this order, and below them their directions, run by run.

    A direction is scaled by the deviation along it beyond that along any other direction, so that the squares of a query's
    products with those of a group, with the residual, sum to the variance.

    Args:
        parts: What the groups are of.
        order: Places among the groups of all parts.
        firsts: Where the run of each direction begins.
    """
    place = np.full(sum(len(part.sizes) for part in parts), -1, dtype=np.int64)
    place[order] = np.arange(len(order))
    matrix = np.empty((len(order) + int(firsts[-1]), parts[0].means.shape[1]), dtype=np.float32)
    first = 0
    for part in parts:
        own = place[first : first + len(part.sizes)]
        matrix[own[own >= 0]] = part.means[own >= 0]
        of = own[part.owners]
        rank = np.arange(len(of)) - np.searchsorted(part.owners, part.owners)
        beyond = np.sqrt(np.maximum(0.0, part.variances - part.residuals[part.owners]))
        kept = of >= 0
        matrix[len(order) + firsts[rank[kept]] + of[kept]] = (part.directions * beyond[:, None])[kept]
        first += len(part.sizes)
    return matrix


def _columns(numbers: Ints) -> Ints | slice:
    """The same columns, as a slice where they follow one another: that copies nothing."""
    if len(numbers) and numbers[-1] - numbers[0] + 1 == len(numbers) and (np.diff(numbers) == 1).all():
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return numbers


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

    def scores(self, classification: Floats, query: Floats, names: Floats, owners: Ints, overview: Overview) -> Floats:
        """Score every node of the tree for every question.

        Args:
            classification: Questions under the classification prompt, shape ``(q, d)``.
            query: The same questions under the query prompt, shape ``(q, d)``.
            names: Vectors of category names with their descriptions, and of example questions, shape ``(m, d)``; of
                those of a node, the closest counts.
            owners: The node of each, shape ``(m,)``, ascending; every node has one at least.
            overview: Of the documents' vectors.

        Returns:
            float32 of shape ``(q, nodes)``, -1 to 1: a weighted mean of two cosines.
        """
        scores = overview.expected_best(query)
        if not self.name_weight or not len(names):
            return scores
        by_name = cosines(classification, names)
        if len(names) > len(overview.sizes):
            starts = np.searchsorted(owners, np.arange(len(overview.sizes)))
            by_name = np.maximum.reduceat(by_name, starts, axis=1)
        sizes = np.sqrt(np.maximum(1, overview.sizes))
        share = (self.name_weight / (self.name_weight + (1.0 - self.name_weight) * sizes)).astype(np.float32)
        by_name *= share
        scores *= np.float32(1.0) - share
        scores += by_name
        return scores

    def probabilities(self, scores: Floats, groups: Ints | None = None) -> Doubles:
        """The softmax of the scores, over all or, with `groups`, within each group of columns.

        Args:
            scores: Shape ``(q, c)``.
            groups: The group of each column, shape ``(c,)``.

        Returns:
            float64 of shape ``(q, c)``; rows sum to 1 (to 1 in each group).
        """
        if groups is None or (len(groups) and (groups == groups[0]).all()):
            weights = scores.astype(np.float64)
            weights -= weights.max(axis=1, keepdims=True, initial=-np.inf)
            weights /= self.temperature
            np.exp(weights, out=weights)
            weights /= weights.sum(axis=1, keepdims=True)
            return weights
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

    def keep(self, shares: Doubles, scores: Floats, max_categories: int | None = None) -> Bools:
        """Keep columns from the top until they hold the mass of their row's sum; the best one always.

        Args:
            shares: Probabilities, shape ``(q, c)``; a row of zeros keeps nothing.
            scores: What orders columns of equal shares, shape ``(q, c)``.
            max_categories: Keep no more than that for a question.
        """
        count = shares.shape[1]
        most = count if max_categories is None else min(max_categories, count)
        some = shares.sum(axis=1) > 0
        if self.mass == 1.0 and most == count:  # all are wanted, also those whose share is 0 to a float
            return np.repeat(some[:, None], count, axis=1)
        ranked = -np.sort(-shares, axis=1)
        if self.mass == 1.0:
            wanted = np.full(len(shares), most)
        else:
            reached = np.cumsum(ranked, axis=1)
            wanted = np.minimum(1 + (reached[:, :-1] < self.mass * reached[:, -1:]).sum(axis=1), most)
        kept: Bools = (shares >= np.take_along_axis(ranked, wanted[:, None] - 1, axis=1)) & some[:, None]
        for row in np.flatnonzero(kept.sum(axis=1) > wanted):  # equal shares, of which some are wanted
            order = np.lexsort((-scores[row], -shares[row]))
            kept[row, order[wanted[row] :]] = False
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

    def walk(self, gate: Gate, scores: Floats, eligible: Bools, max_categories: int | None = None) -> tuple[Doubles, Bools]:
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
        for depth, level in enumerate(self.levels):
            nodes = level[alive[level]]
            if not len(nodes):
                continue
            own, parents = _columns(nodes), self.parents[nodes]
            shares[:, own] = step.probabilities(scores[:, own], parents)
            if depth:
                shares[:, own] *= shares[:, parents]
            frontier = _columns(np.concatenate([*seen, nodes]))
            shares[:, frontier] *= step.keep(shares[:, frontier], scores[:, frontier])
            seen.append(nodes[is_leaf[nodes]])
        own = _columns(self.leaves)
        leaves = shares[:, own]
        reached = np.repeat(eligible[None], len(leaves), axis=0) if gate.mass == 1.0 else leaves > 0  # 1 leaves nothing out
        if max_categories is None:
            return leaves, reached
        within = np.where(reached, scores[:, own], -np.inf)
        return leaves, replace(gate, mass=1.0).keep(leaves, within, max_categories) & reached
