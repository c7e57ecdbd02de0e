"""What vector stores call a score, and the cosine that it stands for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, cast

import numpy as np

from gemma_rag.errors import InputError

Metric: TypeAlias = Literal[
    "cosine",
    "cosine-distance",
    "inner-product",
    "inner-product-distance",
    "l2-squared",
    "l2",
    "relevance",
    "exp-cosine-distance",
]
"""What a store calls a score: the cosine itself, 1 - cos, the inner product, 1 - it, the squared Euclidean distance, the
distance, (1 + cos) / 2, exp(cos - 1). Those of inner products and distances are cosines for vectors of norm 1 only."""

_TO_COSINE: dict[str, Callable[[float], float]] = {
    "cosine": lambda score: score,
    "cosine-distance": lambda score: 1.0 - score,
    "inner-product": lambda score: score,
    "inner-product-distance": lambda score: 1.0 - score,
    "l2-squared": lambda score: 1.0 - score / 2.0,  # |a - b|^2 = 2 - 2 cos for vectors of norm 1
    "l2": lambda score: 1.0 - score * score / 2.0,
    "relevance": lambda score: 2.0 * score - 1.0,
    "exp-cosine-distance": lambda score: 1.0 + math.log(score) if score > 0.0 else math.nan,
}
_ROUNDING = 1e-3
"""How far beyond 1 a store's rounding may put a cosine."""


def check_metric(metric: str) -> Metric:
    """A metric by its name.

    Raises:
        InputError: There is none of that name; the message lists them.
    """
    if metric not in _TO_COSINE:
        raise InputError(f"no metric is named {metric!r}: there are {', '.join(_TO_COSINE)}")
    return cast("Metric", metric)


def cosine_of(score: float, metric: Metric) -> float:
    """The cosine that a store's score stands for.

    Args:
        score: As the store gave it.
        metric: What the store calls a score.

    Returns:
        -1 to 1, higher is better.

    Raises:
        InputError: No cosine has that score: the metric is another one, or the vectors have not norm 1.
    """
    cosine = _TO_COSINE[check_metric(metric)](float(score))
    if not -1.0 - _ROUNDING <= cosine <= 1.0 + _ROUNDING:
        raise InputError(
            f"a score of {score:g} is no {metric} of two vectors of norm 1: the store uses another metric (name it: "
            f"metric=..., one of {', '.join(_TO_COSINE)}), or its vectors were not normalised"
        )
    return min(1.0, max(-1.0, cosine))


# -- what known stores call it ------------------------------------------------------------------------------------------

NAMES: Mapping[str, Mapping[str, Metric]] = MappingProxyType(
    {
        "Chroma": {"cosine": "cosine-distance", "ip": "inner-product-distance", "l2": "l2-squared"},
        "Milvus": {"COSINE": "cosine", "IP": "inner-product", "L2": "l2-squared"},
        "Qdrant": {"Cosine": "cosine", "Dot": "inner-product", "Euclid": "l2"},
    }
)
"""For each store, what its scores are by the name that it has for its metric."""

_NEED_UNIT_VECTORS: tuple[Metric, ...] = ("inner-product", "inner-product-distance", "l2-squared", "l2")
_NORM_ERROR = 1e-2
"""How far from 1 rounding, in float16 too, may put a norm."""


def named(store: str, name: str) -> Metric:
    """The metric of a known store by the store's own name for it.

    Args:
        store: ``Chroma``, ``Milvus`` or ``Qdrant``.
        name: As its configuration has it, ``COSINE``.

    Raises:
        InputError: Its scores have no cosine.
    """
    names = NAMES[store]
    if name not in names:
        raise InputError(
            f"the {store} collection compares by {name}, which has no cosine: fill one that compares by one of "
            f"{', '.join(names)}"
        )
    return names[name]


def chroma_space(collection: Any) -> str:
    """The name of a Chroma collection's metric: in its configuration, or its metadata before Chroma 1.0; ``l2`` by default."""
    configuration = getattr(collection, "configuration", None)
    parts = [configuration.get(kind) for kind in ("hnsw", "spann")] if isinstance(configuration, Mapping) else []
    spaces = [part["space"] for part in parts if part and part.get("space")]
    return str(next(iter(spaces), None) or (collection.metadata or {}).get("hnsw:space") or "l2")


def check_norm(vector: Sequence[float], metric: Metric | None, *, model: str, store: str) -> None:
    """Refuse vectors whose scores are no cosines.

    Args:
        vector: Of a question.
        metric: What the store calls a score.
        model: What made the vector, for the message.
        store: The store, for the message.

    Raises:
        InputError: The vector has not norm 1, and the store's scores are cosines for such vectors only.
    """
    norm = float(np.linalg.norm(np.asarray(vector, dtype=np.float64)))
    if metric in _NEED_UNIT_VECTORS and abs(norm - 1.0) > _NORM_ERROR:
        raise InputError(
            f"the vectors of {model} have not norm 1 (that of the question has {norm:.4g}), and {store} compares them by "
            f"{metric}, which is a cosine for such vectors only: have the embeddings normalise, or fill a store that "
            "compares by cosine"
        )
