"""A second look at passages that were found: a reranker reads them beside the question, `mmr` pushes repetitions back.

>>> def shared_words(question, passages):
...     return [len(set(question.split()) & set(passage.split())) for passage in passages]
>>> rerank(shared_words, "reset the password", ["opening hours", "how to reset a password"]).tolist()
[0.0, 2.0]
"""

from __future__ import annotations

import importlib.util
import reprlib
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gemma_rag.encoders.models import Source, find_model, load_local_first
from gemma_rag.encoders.sentence_transformers import quiet_loading
from gemma_rag.errors import InputError, MissingExtra, ModelUnavailable

_NORM_TOLERANCE = 0.01
"""How far from 1 the norm of a unit row may be: rows that were stored in float16 are off by up to 0.001."""
_LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, AttributeError)


class Reranker(Protocol):
    """Anything that scores passages for a question. A function is one, and so is `CrossEncoderReranker`."""

    def __call__(self, question: str, passages: Sequence[str], /) -> Sequence[float]:
        """Score each passage for the question.

        Returns:
            One finite score per passage, in the order of the passages; higher is better, on any scale.
        """
        ...


class CrossEncoderReranker:
    """A cross-encoder on sentence-transformers: it reads the question and a passage together. A `Reranker`.

    Constructing it finds the model and fails at once where it cannot be had; the weights are loaded with the first
    question, from the hub's cache without asking the hub where they are there. Code that a model brings along is never
    run. Safe to use from several threads; the model works for one at a time.

    Args:
        model: A folder that ``CrossEncoder.save_pretrained`` wrote, or an id on the hub.

    Raises:
        MissingExtra: sentence-transformers is not installed.
        ModelUnavailable: The model cannot be had; the message says what to do.
    """

    def __init__(self, model: str) -> None:
        if importlib.util.find_spec("sentence_transformers") is None:
            raise MissingExtra("the sentence-transformers runtime", "local")
        self._source = _find(model)
        self._lock = threading.Lock()
        self._model: Any = None

    def __repr__(self) -> str:
        return f"CrossEncoderReranker({self._source.name!r})"

    def __call__(self, question: str, passages: Sequence[str]) -> Sequence[float]:
        """The model's own scores of the passages, shape ``(n,)``; what is longer than its context is cut.

        Raises:
            ModelUnavailable: The model cannot be loaded, or is no reranker.
        """
        with self._lock:
            if self._model is None:
                self._model = _load(self._source)
            scores = self._model.predict([(question, passage) for passage in passages], show_progress_bar=False)
        if scores.ndim != 1:
            raise ModelUnavailable(
                f"{self._source.name} gives {scores.shape[1]} numbers for a pair of texts, and a reranker gives one: "
                "it is a classifier. Choose a cross-encoder that was trained to rank"
            )
        listed: list[float] = scores.tolist()
        return listed


def as_reranker(value: str | Reranker) -> Reranker:
    """Read a reranker as users write it: a function, or the name or folder of a sentence-transformers cross-encoder.

    Raises:
        InputError: It is neither.
        MissingExtra: sentence-transformers is not installed.
        ModelUnavailable: The model cannot be had; the message says what to do.
    """
    if isinstance(value, str) and value.strip():
        return CrossEncoderReranker(value)
    if type(value).__module__.startswith("sentence_transformers."):  # callable, but with tensors
        raise InputError(
            f"a {type(value).__name__} is no reranker by itself: give its name or folder, "
            "or a function (question, passages) that calls its predict"
        )
    if callable(value) and not isinstance(value, type):
        return value
    raise InputError(
        "a reranker is a function (question, passages) that gives one score per passage, "
        f"or the name or folder of a cross-encoder, not {value!r}"
    )


def rerank(reranker: Reranker, question: str, passages: Sequence[str]) -> npt.NDArray[np.float64]:
    """Score passages with a reranker, in one call, and check what comes back.

    Args:
        reranker: As `as_reranker` gives it.
        question: The question.
        passages: What to score; where there are none, the reranker is not called.

    Returns:
        float64 of shape ``(len(passages),)``, all finite, higher is better. The scale is the reranker's own.

    Raises:
        InputError: The reranker gave something else than one finite number per passage.
    """
    if isinstance(passages, str):
        raise InputError("passages is a list of strings, and one string came: put it in a list")
    if not len(passages):
        return np.zeros(0)
    given = reranker(question, list(passages))
    name = getattr(reranker, "__qualname__", None) or repr(reranker)
    try:
        scores = np.array(given, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):  # the last one from a tensor that cannot be read as it is
        raise InputError(
            f"the reranker {name} gave {reprlib.repr(given)}, and a list of {len(passages)} numbers was expected"
        ) from None
    if scores.shape != (len(passages),):
        what = f"{len(scores)} scores" if scores.ndim == 1 else f"{reprlib.repr(given)}, of shape {scores.shape},"
        raise InputError(f"the reranker {name} gave {what} for {len(passages)} passages: it must give one score for each")
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise InputError(
            f"the reranker {name} gave {scores[bad[0]]} for the passage at index {bad[0]} "
            f"({len(bad)} of {len(scores)} scores are not finite): such scores cannot be ordered"
        )
    return scores


def mmr(relevance: npt.ArrayLike, vectors: npt.ArrayLike, k: int, diversity: float) -> npt.NDArray[np.int64]:
    """Order items by relevance, less what they repeat of the items before them.

    Maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998): the first item is the most relevant one, and each
    next item is the one with the highest ``(1 - diversity) * relevance - diversity * (its highest cosine with an item
    already chosen)``; `diversity` is 1 - lambda of the paper. The relevance is first scaled to 0..1 over the items, so
    that scores of any kind, a reranker's or fused ones, can stand beside cosines; where all are equal, it plays no part.

    Args:
        relevance: Shape ``(n,)``, higher is better, on any scale.
        vectors: Shape ``(n, d)``, the items' rows of norm 1.
        k: How many items are wanted, at least 0; all of them where there are fewer.
        diversity: 0 to 1. 0 is the order of relevance; 1 looks only at what is most different, after the best item.

    Returns:
        int64 of shape ``(min(k, n),)``: indices, first choice first. Of equal items the one with the lower index comes first.

    Raises:
        InputError: Shapes that do not fit, values that are not finite, rows that are not of norm 1, a negative `k`, or a
            `diversity` outside 0 to 1.
    """
    scores, rows = _checked(relevance, vectors)
    if k < 0:
        raise InputError(f"mmr cannot choose {k} items: k is at least 0")
    if not 0.0 <= diversity <= 1.0:
        raise InputError(f"diversity is from 0 to 1, and is {diversity}")
    by_relevance = np.argsort(-scores, kind="stable")
    if diversity == 0 or not len(scores):
        return by_relevance[:k]
    wanted = (1.0 - diversity) * _scaled(scores)
    chosen = np.empty(min(k, len(scores)), dtype=np.int64)
    closest = np.full(len(scores), -np.inf)
    best = int(by_relevance[0])
    for place in range(len(chosen)):
        chosen[place] = best
        wanted[best] = -np.inf
        # not `rows @ rows[best]`: BLAS may round equal rows differently, and equal items would lose their order
        np.maximum(closest, np.einsum("ij,j->i", rows, rows[best]), out=closest)
        best = int(np.argmax(wanted - diversity * closest))
    return chosen


def _checked(relevance: npt.ArrayLike, vectors: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    scores = np.asarray(relevance, dtype=np.float64)
    rows = np.asarray(vectors, dtype=np.float64)
    if scores.ndim != 1 or rows.ndim != 2 or len(scores) != len(rows):
        raise InputError(f"mmr needs one row of a vector for each score, and got shapes {scores.shape} and {rows.shape}")
    if not np.isfinite(scores).all():
        raise InputError("mmr cannot order NaN or infinite scores")
    norms = np.linalg.norm(rows, axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1.0) <= _NORM_TOLERANCE))
    if len(bad):
        raise InputError(
            f"mmr needs rows of norm 1, and {len(bad)} of {len(rows)} have another, the first in row {bad[0]}: "
            "gemma_rag.vectors.unit scales them"
        )
    return scores, rows


def _scaled(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    halves = scores / 2  # the difference of two huge scores would be infinite
    spread = halves.max() - halves.min()
    scaled: npt.NDArray[np.float64] = (halves - halves.min()) / spread if spread > 0 else np.zeros(len(scores))
    return scaled


def _find(model: str) -> Source:
    try:
        return find_model(model)
    except ModelUnavailable as error:
        problem = str(error).partition(" What you can do:")[0].rstrip(".")  # what follows is advice about embedding models
        raise ModelUnavailable(
            f"the reranker {model!r} cannot be had: {problem}. For a reranker, you can:\n"
            "  - give a folder that CrossEncoder.save_pretrained wrote\n"
            "  - give the id of a cross-encoder on the hub, such as cross-encoder/ms-marco-MiniLM-L6-v2, and check the "
            "connection (log in where the model is private: `hf auth login`)\n"
            "  - give a function (question, passages) of your own that returns one score per passage"
        ) from None


def _load(source: Source) -> Any:
    import torch
    from sentence_transformers import CrossEncoder

    def load(local: bool) -> Any:
        return CrossEncoder(
            source.location, local_files_only=local, trust_remote_code=False, model_kwargs={"dtype": torch.float32}
        )

    try:
        with quiet_loading():
            model = load_local_first(source, load, _LOADING_ERRORS)
    except _LOADING_ERRORS as error:
        raise ModelUnavailable(f"the reranker {source.name} could not be loaded by sentence-transformers: {error}") from error
    _refuse_without_head(model, source.name)
    return model


def _refuse_without_head(model: Any, name: str) -> None:
    """Refuse a model that was saved without a scoring head: the library makes one up, of random weights."""
    inner = model.model
    head = "ForSequenceClassification"
    saved_as = getattr(getattr(inner, "config", None), "architectures", None) or []
    if type(inner).__name__.endswith(head) and saved_as and not any(saved.endswith(head) for saved in saved_as):
        raise ModelUnavailable(
            f"{name} is no reranker: it was saved as {', '.join(saved_as)}, without a scoring head, so that its scores "
            "would be random. Choose a cross-encoder, such as cross-encoder/ms-marco-MiniLM-L6-v2"
        )


__all__: Sequence[str] = ["CrossEncoderReranker", "Reranker", "as_reranker", "mmr", "rerank"]
