"""What a knowledge base has learned from labelled questions: how to order documents, and when to refuse.

Both are bound to the space of the vectors and kept with the knowledge base, as JSON and plain arrays.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from gemma_rag.calibration import OperatingPoint
from gemma_rag.errors import InputError, KnowledgeBaseError, SpaceMismatch
from gemma_rag.probability import ProbabilityMap
from gemma_rag.vectors import Floats

FILES = RANKING, ROUTER, CALIBRATION = ("ranking.json", "router.npy", "calibration.json")
"""The names of the files that a knowledge base keeps."""

Kind: TypeAlias = Literal["dense", "hybrid", "lexical"]
"""How documents were scored: by cosines, by cosines and words, by words."""

Doubles: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Router:
    """Logistic regression from a question's vector to its category, as plain arrays.

    Attributes:
        categories: The categories that it knows.
        weights: float32 of shape ``(c, d)``.
        bias: float32 of shape ``(c,)``.
    """

    categories: tuple[str, ...]
    weights: Floats
    bias: Floats

    def log_probabilities(self, queries: Floats) -> Floats:
        """The logarithm of each category's probability, shape ``(q, c)``.

        Args:
            queries: Questions under the query prompt, shape ``(q, d)``.
        """
        logits = queries.astype(np.float64) @ self.weights.T.astype(np.float64) + self.bias
        logits -= logits.max(axis=1, keepdims=True)
        out: Floats = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)
        return out

    def to_bytes(self) -> bytes:
        """As an array of shape ``(c, d + 1)``, the bias last, in numpy's own format."""
        buffer = io.BytesIO()
        np.save(buffer, np.column_stack([self.weights, self.bias]).astype("<f4"), allow_pickle=False)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, categories: Sequence[str]) -> Router:
        """Read what `to_bytes` wrote.

        Raises:
            ValueError: It is no such array.
        """
        try:
            array = np.load(io.BytesIO(data), allow_pickle=False)
        except EOFError:
            raise ValueError("the router is empty") from None
        if array.ndim != 2 or len(array) != len(categories) or array.shape[1] < 2 or not np.isfinite(array).all():
            raise ValueError(
                f"a router of {len(categories)} categories cannot be an array of shape {array.shape}, or holds NaN"
            )
        return cls(tuple(categories), array[:, :-1].astype(np.float32), array[:, -1].astype(np.float32))


class Ranking(BaseModel):
    """How documents are ordered: ``(1 - w) * cosine + w * lexical + r * log p(category)``.

    Attributes:
        lexical_weight: ``w``, 0 to 1.
        router_weight: ``r``, at least 0; 0 where the router stepped aside.
        categories: Those that the router knows.
        fingerprint: Of the space that it was learned in.
        questions: How many labelled questions it was learned from.
        trials: Mean reciprocal rank at 10 of each pair of weights that was tried, on questions held out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    lexical_weight: float = Field(ge=0.0, le=1.0)
    router_weight: float = Field(ge=0.0)
    categories: tuple[str, ...]
    fingerprint: str
    questions: int
    trials: dict[str, float] = {}


class Evidence(BaseModel):
    """How well a hit answers a question, as one number: a weighted sum of what is known of it.

    Attributes:
        features: Of ``cosine``, ``lexical``, ``coverage`` (how much of the question the best sentence of the passage speaks
            of) and ``router`` (the logarithm of the category's probability).
        coefficients: One for each.
        intercept: Added to the sum.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    features: tuple[str, ...]
    coefficients: tuple[float, ...]
    intercept: float

    @model_validator(mode="after")
    def _paired(self) -> Evidence:
        if len(self.features) != len(self.coefficients) or not self.features:
            raise ValueError("evidence has one coefficient for each feature, and one feature at least")
        return self

    def score(self, values: Mapping[str, npt.ArrayLike]) -> Doubles:
        """The evidence of hits, shape ``(n,)``.

        Args:
            values: Of each feature, shape ``(n,)``.

        Raises:
            InputError: A feature is missing.
        """
        if missing := [name for name in self.features if name not in values]:
            raise InputError(f"the calibration needs {', '.join(missing)}, which this search does not give")
        total: Doubles = np.atleast_1d(
            self.intercept
            + sum(c * np.asarray(values[n], np.float64) for n, c in zip(self.features, self.coefficients, strict=True))
        )
        return total


class KindCalibration(BaseModel):
    """Thresholds for one way of scoring documents.

    Attributes:
        evidence: What the document threshold acts on.
        document: The operating point: the threshold and what it does, on questions that it was not chosen on, if it stood
            alone.
        by_category: Thresholds of categories that differ from it; what they change is not in its numbers.
        category: The operating point of stage one, which acts on the best category's score; None where there is no stage one.
        probability: From evidence to the probability of a right answer; None where all labels were right, or all wrong.
        points: The other operating points that were there to choose from.
        questions: How many labelled questions it rests on: answerable, and not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    evidence: Evidence
    document: OperatingPoint
    by_category: dict[str, float] = {}
    category: OperatingPoint | None = None
    probability: ProbabilityMap | None = None
    points: tuple[OperatingPoint, ...] = ()
    questions: tuple[int, int]

    def threshold(self, category: str) -> float:
        """The threshold for documents of a category."""
        return self.by_category.get(category, self.document.threshold)


class Calibration(BaseModel):
    """Everything that calibrating gave, bound to the space of the vectors.

    Attributes:
        fingerprint: Of the space.
        estimated: Made without labels, from the documents alone.
        kinds: By the way of scoring.
        categories: The categories that there were.
        notes: What its reader should know.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    fingerprint: str
    estimated: bool = False
    kinds: dict[Kind, KindCalibration]
    categories: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """In short, as plain JSON."""
        return {
            "estimated": self.estimated,
            "notes": list(self.notes),
            "kinds": {
                kind: {
                    "rule": item.document.rule,
                    "document": item.document.threshold,
                    "category": item.category.threshold if item.category else None,
                    "statement": item.document.statement,
                    "answerable": item.questions[0],
                    "unanswerable": item.questions[1],
                }
                for kind, item in self.kinds.items()
            },
        }


class Learned(NamedTuple):
    """All that a knowledge base has learned; None for what it has not.

    Attributes:
        ranking: How to order documents.
        router: Belongs to the ranking; None where it stepped aside.
        calibration: When to refuse.
    """

    ranking: Ranking | None = None
    router: Router | None = None
    calibration: Calibration | None = None

    def check(self, fingerprint: str) -> None:
        """Check that it was learned in a space.

        Raises:
            SpaceMismatch: It was learned in another.
        """
        for item in (self.ranking, self.calibration):
            if item is not None and item.fingerprint != fingerprint:
                raise SpaceMismatch({"space of what was learned": (fingerprint, item.fingerprint)})

    def to_files(self) -> dict[str, bytes | None]:
        """As a knowledge base keeps it."""
        return {
            RANKING: None if self.ranking is None else self.ranking.model_dump_json(indent=1).encode(),
            ROUTER: None if self.router is None else self.router.to_bytes(),
            CALIBRATION: None if self.calibration is None else self.calibration.model_dump_json(indent=1).encode(),
        }

    @classmethod
    def from_files(cls, files: Mapping[str, bytes | None], where: str) -> Learned:
        """Read what `to_files` wrote.

        Raises:
            KnowledgeBaseError: It is not of the form that this gemma-rag writes.
        """
        text, array, thresholds = (files[name] for name in FILES)
        try:
            ranking = None if text is None else Ranking.model_validate_json(text)
            router = None if array is None or ranking is None else Router.from_bytes(array, ranking.categories)
            calibration = None if thresholds is None else Calibration.model_validate_json(thresholds)
        except ValueError as error:
            raise KnowledgeBaseError(f"what {where} has learned cannot be read: {error}. Fit and calibrate it again") from error
        return cls(ranking, router, calibration)
