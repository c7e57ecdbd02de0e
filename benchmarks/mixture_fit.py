"""Fits the mixture of `mixture.py` on the embeddings of squad2, and compares the two.

usage: python benchmarks/mixture_fit.py [--data FOLDER] [--cache FOLDER] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from environment import environment
from mixture import RESULTS, Doubles, Fit, Ints, Mixture

from gemma_rag import GemmaEmbeddings
from gemma_rag.labelled import Dataset
from gemma_rag.routing import Gate, Overview, Tree
from gemma_rag.summaries import summarize

TOPICS = (0.2, 0.3, 0.4, 0.5)
OWN = (0.4, 0.5, 0.6, 0.7, 0.8)
DECAYS = (0.0, 0.5, 1.0)
TOWARDS = (0.4, 0.6, 0.8, 1.0, 1.2)
OTHERS = (0.6, 0.8, 1.0)
ABROAD = (0.0, 0.2, 0.4, 0.6, 0.8)
"""What is tried for `Fit.topics`, `own`, `decay`, `topic`, `others` and `abroad`."""

_MIDDLE = slice(48, 192)
"""Components whose spectrum follows a power law; from its end on, the law replaces what was measured."""


class Real(NamedTuple):
    """Embedded documents and questions: vectors, category of each document, document of each question."""

    vectors: Doubles
    codes: Ints
    questions: Doubles
    relevant: Ints


def embedded(folder: Path, cache: Path) -> Real:
    """The documents of squad2 and its answerable questions, by the offline MiniLM."""
    dataset = Dataset.load(folder / "squad2")
    encoder = GemmaEmbeddings(model="minilm", cache=cache / "texts", show_progress=False)
    documents = dataset.documents
    asked = [question for split in ("dev", "test") for question in dataset.split(split) if question.answerable]
    places = {document.id: place for place, document in enumerate(documents)}
    return Real(
        np.array(encoder.embed([d.text for d in documents], "document", [d.title for d in documents]), dtype=np.float64),
        np.unique([document.category for document in documents], return_inverse=True)[1].astype(np.int64),
        np.array(encoder.embed([question.question for question in asked], "query"), dtype=np.float64),
        np.array([places[question.relevant[0]] for question in asked], dtype=np.int64),
    )


def fit(real: Real) -> Fit:
    """Fit the mixture: what can be computed is, the rest by trying values until mixtures of the real size look alike."""
    axes = np.linalg.eigh(real.vectors.T @ real.vectors)[1][:, ::-1]
    vectors, questions = real.vectors @ axes, real.questions @ axes
    sizes = np.bincount(real.codes)
    means = np.stack([vectors[real.codes == code].mean(axis=0) for code in range(len(sizes))])
    inner = vectors - means[real.codes]
    within = (inner**2).sum(axis=0) / (len(vectors) - len(sizes))
    traces = np.array([(inner[real.codes == code] ** 2).sum() / (size - 1) for code, size in enumerate(sizes)])
    cosine = (questions * vectors[real.relevant]).sum(axis=1)
    away = (questions - cosine[:, None] * vectors[real.relevant]) / np.sqrt(1.0 - cosine**2)[:, None]
    category = means[real.codes[real.relevant]] - vectors.mean(axis=0)
    category -= (category * vectors[real.relevant]).sum(axis=1)[:, None] * vectors[real.relevant]
    shift = away.mean(axis=0)
    along = ((away - shift) * category).sum(axis=1) / (category**2).sum(axis=1)
    rest = away - shift - along[:, None] * category
    by_chance = (rest.var(axis=0) * category**2).sum(axis=1) / (category**2).sum(axis=1) ** 2
    first = Fit(
        mean=_listed(vectors.mean(axis=0)),
        between=_listed(_between(means, within, sizes)),
        within=_listed(within),
        trace_spread=round(float(np.log(traces).std()), 4),
        own=0.0,
        decay=0.0,
        topics=0.0,
        abroad=0.0,
        cosines=_listed(np.quantile(cosine, np.linspace(0, 1, 101))),
        away=_listed(shift),
        away_spread=_listed(rest.var(axis=0)),
        category=(round(float(along.mean()), 4), round(float(np.sqrt(max(0.0, along.var() - by_chance.mean()))), 4)),
        topic=0.0,
        others=0.0,
    )
    wanted = looks(real)
    shaped = _nearest(first, real, wanted, ("neighbour", "spectrum"), topics=TOPICS, own=OWN, decay=DECAYS)
    return _nearest(shaped, real, wanted, ("recall", "same", "other"), topic=TOWARDS, others=OTHERS, abroad=ABROAD)


def _between(means: Doubles, within: Doubles, sizes: Ints) -> Doubles:
    """The spectrum of the categories' means. A few of them span few directions: a power of the spectrum within stands for
    all, with as many effective directions as the few show (1 / n is what n random ones lack)."""
    centred = means - means.mean(axis=0)
    values = np.linalg.svd(centred, compute_uv=False) ** 2
    effective = 1.0 / ((values**2).sum() / values.sum() ** 2 - 1.0 / (len(means) - 1))
    total = (centred**2).sum() / (len(means) - 1) - within.sum() * float((1.0 / sizes).mean())
    powers = [np.maximum(within, 0.0) ** power for power in np.arange(0.5, 3.0, 0.05)]
    best = min(powers, key=lambda power: abs(power.sum() ** 2 / (power**2).sum() - effective))
    return best * (total / best.sum())


def looks(real: Real) -> dict[str, Doubles]:
    """What a mixture has to have in common with the real vectors, each as an array of numbers."""
    count = int(real.codes.max()) + 1
    same = real.codes[:, None] == real.codes
    asked = real.questions @ real.vectors.T
    own = np.take_along_axis(asked, real.relevant[:, None], axis=1)
    ranks = (asked > own).sum(axis=1)
    np.put_along_axis(asked, real.relevant[:, None], -2.0, axis=1)
    asked_same = same[real.relevant]
    pairs = real.vectors @ real.vectors.T
    np.fill_diagonal(pairs, -2.0)
    spectra = []
    for code in range(count):
        group = real.vectors[real.codes == code]
        values = np.linalg.svd(group - group.mean(axis=0), compute_uv=False) ** 2
        spectra.append(np.sqrt(values[:16] / values.sum()))
    means = np.stack([real.vectors[real.codes == code].mean(axis=0) for code in range(count)])
    means -= means.mean(axis=0)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    return {
        "documents of a category": _quantiles(pairs[same & (pairs > -2.0)]),
        "documents of two categories": _quantiles(pairs[~same]),
        "neighbour": _quantiles(pairs.max(axis=1)),
        "spectrum": np.mean(spectra, axis=0),
        "means of categories, centred": _quantiles((means @ means.T)[~np.eye(count, dtype=bool)]),
        "question and its document": _quantiles(own),
        "same": _quantiles(np.where(asked_same, asked, -2.0).max(axis=1)),
        "other": _quantiles(np.where(asked_same, -2.0, asked).max(axis=1)),
        "question and documents of the category": _quantiles(asked[asked_same & (asked > -2.0)]),
        "question and other documents": _quantiles(asked[~asked_same]),
        "recall": np.array([(ranks < k).mean() for k in (1, 5, 10)]),
    }


def _quantiles(values: Doubles) -> Doubles:
    return np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))


def _nearest(fit: Fit, real: Real, wanted: dict[str, Doubles], by: tuple[str, ...], **grid: Sequence[float]) -> Fit:
    """The fit, with those values of a grid that make a mixture look most like the real vectors."""

    def distance(values: tuple[float, ...]) -> float:
        found = looks(likeness(replace(fit, **dict(zip(grid, values, strict=True))), real))
        return sum(float(((found[name] - wanted[name]) ** 2).mean()) for name in by)

    best = min(itertools.product(*grid.values()), key=distance)
    return replace(fit, **dict(zip(grid, best, strict=True)))


def likeness(fit: Fit, real: Real, dimensions: int = 768) -> Real:
    """A mixture of the same size as the real vectors."""
    mixture = Mixture(fit, len(real.vectors), dimensions=dimensions, sizes=np.bincount(real.codes))
    questions, relevant = mixture.questions(len(real.questions))
    return Real(mixture.vectors().astype(np.float64), mixture.codes, questions.astype(np.float64), relevant)


def _listed(values: Doubles) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def compared(found: Fit, real: Real) -> dict[str, dict[str, list[float]]]:
    """What the real vectors and a mixture of their size look like: quantiles 5, 25, 50, 75 and 95 %, or as the name says."""
    mixture = likeness(found, real)
    out = {}
    for side, one in (("squad2", real), ("mixture", mixture)):
        seen = {name: _listed(values) for name, values in looks(one).items()}
        opened, hidden = gated(one)
        axes = np.linalg.eigh(one.vectors.T @ one.vectors)[1][:, ::-1]
        energy = ((one.vectors @ axes) ** 2).mean(axis=0).cumsum()
        out[side] = {
            **seen,
            "share of documents that the gate opens, routing loss": _listed(np.array([opened, hidden])),
            "energy in the first 64, 128, 256 principal components": _listed(energy[[63, 127, 255]]),
        }
    return {name: {side: out[side][name] for side in out} for name in out["squad2"]}


def gated(real: Real, gate: Gate | None = None) -> tuple[float, float]:
    """Share of the documents that the gate opens by the documents alone, and of questions whose document it hides."""
    sizes = np.bincount(real.codes)
    order = np.argsort(real.codes, kind="stable")
    vectors, queries = real.vectors.astype(np.float32), real.questions.astype(np.float32)
    summaries = summarize(vectors, np.split(order, np.cumsum(sizes)[:-1]))
    overview = Overview([(summaries, np.arange(len(sizes)))], Tree([f"{code:06}" for code in range(len(sizes))]))
    opened = (gate or Gate()).open(overview.expected_best(queries))
    inside = opened[np.arange(len(queries)), real.codes[real.relevant]]
    return float((opened @ sizes).mean() / sizes.sum()), float(1.0 - inside.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("GEMMA_RAG_DATA"))
    parser.add_argument("--cache", type=Path, default=Path(".cache/eval"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.data is None:
        parser.error("say where squad2 is: --data FOLDER, or GEMMA_RAG_DATA")
    real = embedded(Path(options.data), options.cache)
    found = fit(real)
    table = compared(found, real)
    for name, sides in table.items():
        print(
            name, *(f"  {side:8} {' '.join(f'{value:7.3f}' for value in values)}" for side, values in sides.items()), sep="\n"
        )
    result = {**environment(), "compared": table, "fit": asdict(found)}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
