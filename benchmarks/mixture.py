"""Vectors with the structure of real ones: a mixture of categories, fitted on the MiniLM embeddings of squad2.

What is fitted, in the principal components of the documents: how much the means of categories and the documents within
one spread along each component; how much of the spread within is a category's own; how near a question is to its
document, and where it goes from there. A category's vectors come from a random generator of its own, so that a million
of them are made one category at a time, the same whatever is made before.

The components come in the order of their variance. That is what Matryoshka training aims at, and the favourable case
for searches that read the first ones only; `Mixture(order="random")` turns the space at random, the unfavourable case.
Past the 384 components of MiniLM the spectrum goes on as the power law that its middle follows.

`mixture_fit.py` made the fit.

usage: python benchmarks/mixture.py FOLDER [--documents N] [--order variance|random]    writes them as .npy files
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from gemma_rag.vectors import Floats, unit

Ints = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
RESULTS = Path(__file__).parent / "results" / "mixture.json"

_SPIKES = 32
"""Directions along which a category spreads more than the others do."""

_ON_A_TOPIC = 4
"""Documents on one topic, on average."""

_MIDDLE = slice(48, 192)
"""Components whose spectrum follows a power law; from its end on, the law replaces what was measured."""


@dataclass(frozen=True)
class Fit:
    """What is known of the real vectors; a list has one number for each principal component, largest variance first.

    Attributes:
        mean: Of the documents.
        between: Variance of the means of categories.
        within: Variance of documents about the mean of their category, pooled.
        trace_spread: Standard deviation of the logarithm of a category's variance within.
        own: Share of the variance within that lies along a category's own directions.
        decay: Those directions' variances fall as ``k ** -decay``.
        topics: Share of a document's place in its category that it has in common with those on its topic.
        abroad: Share of a topic that lies towards some other category.
        cosines: Of questions with their documents: quantiles at equal steps from 0 to 1.
        away: Mean of where a question goes from its document (a unit vector at a right angle to it).
        away_spread: Variance of that.
        category: How much of it is along the mean of the document's category: mean and standard deviation.
        topic: How much of it is along the document's topic.
        others: How much of its variance is shaped as the category's documents are.
    """

    mean: list[float]
    between: list[float]
    within: list[float]
    trace_spread: float
    own: float
    decay: float
    topics: float
    abroad: float
    cosines: list[float]
    away: list[float]
    away_spread: list[float]
    category: tuple[float, float]
    topic: float
    others: float

    @classmethod
    def load(cls, path: Path = RESULTS) -> Fit:
        """The fit that was written before."""
        return cls(**json.loads(path.read_text(encoding="utf-8"))["fit"])


def _spikes(random: np.random.Generator, within: Doubles) -> Floats:
    """A category's own directions, shape ``(spikes, d)``, of mean squared norm 1: drawn as its documents are."""
    return (random.standard_normal((_SPIKES, len(within))) * np.sqrt(within / within.sum())).astype(np.float32)


def continued(values: list[float], dimensions: int) -> Doubles:
    """A spectrum, continued past the middle of what was measured by the power law that the middle follows."""
    measured = np.array(values)
    places = np.arange(1, len(measured) + 1)[_MIDDLE]
    slope, level = np.polyfit(np.log(places), np.log(np.maximum(measured[_MIDDLE], 1e-9)), 1)
    law: Doubles = np.exp(level + slope * np.log(np.arange(1, dimensions + 1)))
    law[: _MIDDLE.stop] = measured[: _MIDDLE.stop]
    return law


class Mixture:
    """Documents in categories of uneven size, and questions about them.

    Args:
        fit: What real vectors are like.
        documents: How many.
        categories: How many; their sizes are log-normal, the standard deviation of the logarithm is `spread`.
        dimensions: Components of a vector.
        order: Of the components: by their variance, or a random rotation of that.
        sizes: Of the categories, instead of random ones.
        seed: Of all that is random. The categories' means do not depend on the number of documents.
    """

    def __init__(
        self,
        fit: Fit,
        documents: int,
        categories: int = 1000,
        dimensions: int = 768,
        order: Literal["variance", "random"] = "variance",
        spread: float = 1.0,
        sizes: Ints | None = None,
        seed: int = 0,
    ) -> None:
        self.fit, self.documents, self.dimensions, self.order, self._seed = fit, documents, dimensions, order, seed
        random = np.random.default_rng([seed, 0])
        shares = random.lognormal(0.0, spread, categories)
        self.sizes = _shared_out(documents, shares) if sizes is None else sizes
        self._within = continued(fit.within, dimensions)
        self._within *= sum(fit.within) / self._within.sum()
        between = continued(fit.between, dimensions)
        between *= sum(fit.between) / between.sum()
        self._mean = _padded(fit.mean, dimensions)
        self._away = _padded(fit.away, dimensions)
        self._away_spread = continued(fit.away_spread, dimensions)
        self._away_spread *= sum(fit.away_spread) / self._away_spread.sum()
        self._between = between
        self._means = (random.standard_normal((len(self.sizes), dimensions)) * np.sqrt(between)).astype(np.float32)
        self._turn: Floats | None = None
        if order == "random":
            self._turn = np.linalg.qr(random.standard_normal((dimensions, dimensions)))[0].astype(np.float32)

    @property
    def codes(self) -> Ints:
        """The category of each document, ascending."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def category_vectors(self) -> Floats:
        """A vector for each category, as a description of it would have: its mean, shape ``(categories, d)``."""
        return self._turned(unit(self._mean + self._means))

    def category(self, code: int) -> Floats:
        """The vectors of the documents of a category, shape ``(n, d)``, of norm 1."""
        return self._turned(self._documents(code)[0])

    def vectors(self, out: Floats | None = None) -> Floats:
        """All of them, one category after the other.

        Args:
            out: Where to write them, shape ``(documents, d)``: a memory map, or nothing for a new array.
        """
        out = np.empty((int(self.sizes.sum()), self.dimensions), dtype=np.float32) if out is None else out
        end = 0
        for code, size in enumerate(self.sizes.tolist()):
            out[end : end + size] = self.category(code)
            end += size
        return out

    def questions(self, n: int) -> tuple[Floats, Ints]:
        """Questions about documents drawn at random: their vectors, shape ``(n, d)``, and the rows of the documents."""
        random = np.random.default_rng([self._seed, 1, n])
        relevant = np.sort(random.integers(0, int(self.sizes.sum()), n))
        starts = np.cumsum(self.sizes) - self.sizes
        codes = np.searchsorted(starts, relevant, side="right") - 1
        out = np.empty((n, self.dimensions), dtype=np.float32)
        for code in np.unique(codes).tolist():
            mine = np.flatnonzero(codes == code)
            out[mine] = self._asked(random, code, relevant[mine] - starts[code])
        shuffled = random.permutation(n)
        return self._turned(out[shuffled]), relevant[shuffled]

    def _documents(self, code: int) -> tuple[Floats, Floats, Ints]:
        """The documents of a category, its topics, and the topic of each document."""
        random, spikes, scale = self._shape(code)
        size = int(self.sizes[code])
        topics = self._inner(random, self._within * scale, max(1, size // _ON_A_TOPIC), spikes)
        abroad = self._means[random.integers(0, len(self.sizes), len(topics))]
        topics *= np.float32(np.sqrt(1.0 - self.fit.abroad))
        topics += np.float32(np.sqrt(self.fit.abroad * self._within.sum() * scale / self._between.sum())) * abroad
        topic = random.integers(0, len(topics), size)
        rows = self._inner(random, self._within * scale, size, spikes)
        rows *= np.float32(np.sqrt(1.0 - self.fit.topics))
        rows += (np.float32(np.sqrt(self.fit.topics)) * topics)[topic]
        rows += (self._mean + self._means[code]).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return rows, topics, topic

    def _shape(self, code: int) -> tuple[np.random.Generator, Floats, float]:
        """The generator of a category, its own directions, and how far it spreads."""
        random = np.random.default_rng([self._seed, 2, code])
        spikes = _spikes(random, self._within)
        return random, spikes, float(np.exp(self.fit.trace_spread * random.standard_normal()))

    def _inner(self, random: np.random.Generator, within: Doubles, n: int, spikes: Floats) -> Floats:
        """Places about the mean of a category, shape ``(n, d)``."""
        weights = np.arange(1, _SPIKES + 1) ** -self.fit.decay
        along = np.sqrt(self.fit.own * within.sum() * weights / weights.sum()).astype(np.float32)
        rows: Floats = random.standard_normal((n, len(within)), dtype=np.float32)
        rows *= np.sqrt((1.0 - self.fit.own) * within).astype(np.float32)
        rows += (random.standard_normal((n, _SPIKES), dtype=np.float32) * along) @ spikes
        return rows

    def _asked(self, random: np.random.Generator, code: int, places: Ints) -> Doubles:
        """Questions about documents of a category, before the space is turned."""
        rows, topics, topic = self._documents(code)
        documents, fit = rows[places], self.fit
        away = random.standard_normal((len(places), self.dimensions)) * np.sqrt((1.0 - fit.others) * self._away_spread)
        like = self._within * (fit.others * self._away_spread.sum() / self._within.sum())
        away += self._inner(random, like, len(places), self._shape(code)[1])
        away += self._away + fit.topic * topics[topic[places]]
        away += (fit.category[0] + fit.category[1] * random.standard_normal((len(places), 1))) * self._means[code]
        away -= (away * documents).sum(axis=1)[:, None] * documents
        away /= np.linalg.norm(away, axis=1, keepdims=True)
        cosine = np.interp(random.random(len(places)), np.linspace(0, 1, len(fit.cosines)), fit.cosines)[:, None]
        asked: Doubles = cosine * documents + np.sqrt(1.0 - cosine**2) * away
        return asked

    def _turned(self, rows: Floats) -> Floats:
        return rows if self._turn is None else rows @ self._turn


def _padded(values: list[float], dimensions: int) -> Doubles:
    return np.pad(np.array(values), (0, max(0, dimensions - len(values))))[:dimensions]


def _shared_out(total: int, shares: Doubles) -> Ints:
    """Whole numbers in proportion to the shares, at least one each, that sum to the total."""
    sizes = np.maximum(1, np.floor(total * shares / shares.sum())).astype(np.int64)
    sizes[np.argsort(-shares)[: abs(total - sizes.sum())]] += np.sign(total - sizes.sum())
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--order", choices=["variance", "random"], default="variance")
    options = parser.parse_args()
    mixture = Mixture(Fit.load(), options.documents, order=options.order)
    options.folder.mkdir(parents=True, exist_ok=True)
    shape = (options.documents, mixture.dimensions)
    mixture.vectors(np.lib.format.open_memmap(options.folder / "vectors.npy", "w+", np.float32, shape))
    questions, relevant = mixture.questions(2000)
    for name, rows in (("categories", mixture.codes), ("questions", questions), ("relevant", relevant)):
        np.save(options.folder / f"{name}.npy", rows)


if __name__ == "__main__":
    main()
