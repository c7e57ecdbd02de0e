"""Stage one: which categories a question is let into.

A category is scored by two cosines: the question under the classification prompt against the category's name and
description, and the question under the query prompt against the mean of the category's chunks. Names alone are a poor
router (they lose half of the right answers on our two English sets), the documents' mean is a good one, and a little
of the name helps where a category has few documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gemma_rag.errors import InputError
from gemma_rag.vectors import Floats, cosines, unit

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Gate:
    """How stage one scores categories and how many it keeps.

    Attributes:
        mass: The kept categories hold this share, 0 to 1, of the probability that a softmax over the category scores
            gives. The defaults are those of the dev splits' table in docs/decisions/0002.
        temperature: Of that softmax, above 0; smaller keeps fewer categories.
        name_weight: Share of the name's cosine in the category score, 0 to 1; the centroid's is the rest. 1 is the
            published naive form, which routes by names alone.
    """

    mass: float = 0.98
    temperature: float = 0.05
    name_weight: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 < self.mass <= 1.0:
            raise InputError(f"the mass of a gate is above 0 and at most 1, and is {self.mass}")
        if not (np.isfinite(self.temperature) and self.temperature > 0.0):
            raise InputError(f"the temperature of a gate is above 0, and is {self.temperature}")
        if not 0.0 <= self.name_weight <= 1.0:
            raise InputError(f"the name_weight of a gate is from 0 to 1, and is {self.name_weight}")

    def scores(self, classification: Floats, query: Floats, names: Floats, centroids: Floats) -> Floats:
        """Score every category for every question.

        Args:
            classification: Questions under the classification prompt, shape ``(q, d)``.
            query: The same questions under the query prompt, shape ``(q, d)``.
            names: Category names and descriptions, shape ``(c, d)``.
            centroids: Category centroids, shape ``(c, d)``.

        Returns:
            float32 of shape ``(q, c)``, -1 to 1: a weighted mean of two cosines.
        """
        by_name = cosines(classification, names)
        by_documents = cosines(query, centroids)
        blended: Floats = self.name_weight * by_name + (1.0 - self.name_weight) * by_documents
        return blended.astype(np.float32)

    def open(self, scores: Floats, max_categories: int | None = None) -> npt.NDArray[np.bool_]:
        """Keep the best categories up to the probability mass; the best one always.

        Args:
            scores: Shape ``(q, c)``.
            max_categories: Keep no more than that for a question.

        Returns:
            bool of shape ``(q, c)``.
        """
        if scores.shape[1] == 0:
            return np.zeros(scores.shape, dtype=bool)
        logits = scores.astype(np.float64) / self.temperature
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        order = np.argsort(-logits, axis=1, kind="stable")
        reached = np.cumsum(np.take_along_axis(weights, order, axis=1), axis=1)
        wanted = np.ones(scores.shape, dtype=bool)
        if self.mass < 1.0:  # with 1 all are wanted, also those whose share is 0 to a float
            wanted[:, 1:] = reached[:, :-1] < self.mass
        if max_categories is not None:
            wanted[:, max_categories:] = False
        kept = np.zeros(scores.shape, dtype=bool)
        np.put_along_axis(kept, order, wanted, axis=1)
        return kept


def centroids(vectors: Floats, codes: Ints, count: int) -> Floats:
    """The direction of the mean of each category's vectors.

    Args:
        vectors: Shape ``(n, d)``, sorted by category.
        codes: Category of each row, shape ``(n,)``, ascending; every one of ``0 .. count - 1`` occurs.
        count: How many categories there are.

    Returns:
        float32 of shape ``(count, d)``, rows of norm 1.
    """
    if not count:
        return np.zeros((0, vectors.shape[1]), dtype=np.float32)
    starts = np.searchsorted(codes, np.arange(count))
    sums = np.add.reduceat(vectors, starts, axis=0, dtype=np.float64)
    sums[np.linalg.norm(sums, axis=1) == 0] = 1.0  # opposite vectors cancelled out: any direction is as good
    return unit(sums)
