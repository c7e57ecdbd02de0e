"""How good rankings are, question by question.

>>> values = ranking_metrics([["a", "b", "c"], ["d", "e"]], [{"b"}, {"z"}])
>>> {name: value.tolist() for name, value in values.items() if name != "ndcg@10"}
{'recall@1': [0.0, 0.0], 'recall@5': [1.0, 0.0], 'recall@10': [1.0, 0.0], 'mrr@10': [0.5, 0.0]}
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gemma_rag.errors import InputError, MissingExtra

FloatArray: TypeAlias = npt.NDArray[np.float64]
"""An array of float64."""

DEPTH = 10
"""How many documents of a ranking count."""


def ranking_metrics(ranked: Sequence[Sequence[str]], relevant: Sequence[Collection[str]]) -> dict[str, FloatArray]:
    """Judge a ranking for each question; the mean over the questions is the figure that people quote.

    - ``recall@1``, ``recall@5``, ``recall@10``: 1 if at least one relevant document is among the first k, else 0. Their
      mean is the share of questions that find one. TREC, and so ir_measures, call this Success@k; their Recall@k is the
      share of a question's relevant documents that are found, which is the same where each question has just one.
    - ``mrr@10``: 1 / place of the first relevant document; 0 if none is among the first ten (Kantor and Voorhees,
      Information Retrieval 2, 2000).
    - ``ndcg@10``: the sum of 1 / log2(1 + place) over the relevant documents among the first ten, divided by the most
      that it can be (Jarvelin and Kekalainen, TOIS 20, 2002, with relevance 0 or 1).

    The values are computed by ir_measures through pytrec_eval, trec_eval's own code. An empty ranking gets 0 throughout.

    Args:
        ranked: For each question the ids of the documents found, best first, each once; only the first ten count.
        relevant: For each question the ids of the right documents, at least one. Leave out questions without any: none
            of these figures is defined for them.

    Returns:
        The five names in the order above, each with float64 of shape ``(n,)``, 0 to 1, in the order of the questions.

    Raises:
        InputError: The two lists differ in length, a ranking repeats a document, a question has no relevant document, or
            a plain string stands where a list of ids belongs.
        MissingExtra: ir_measures is not installed.
    """
    if len(ranked) != len(relevant):
        raise InputError(
            f"each question needs a ranking and its relevant documents: {len(ranked)} rankings, {len(relevant)} sets"
        )
    for question, (found, right) in enumerate(zip(ranked, relevant, strict=True)):
        _check(question, found, right)
    if importlib.util.find_spec("ir_measures") is None:
        raise MissingExtra("ir_measures, which computes the retrieval metrics,", "eval")
    from ir_measures import RR, Success, nDCG, pytrec_eval

    # pytrec_eval knows the reciprocal rank without a cutoff only; the rankings that it sees end at place ten.
    measures = {
        "recall@1": Success @ 1,
        "recall@5": Success @ 5,
        "recall@10": Success @ DEPTH,
        "mrr@10": RR,
        "ndcg@10": nDCG @ DEPTH,
    }
    names = {measure: name for name, measure in measures.items()}
    run = {str(q): {str(place): -float(place) for place in range(len(found[:DEPTH]))} for q, found in enumerate(ranked)}
    qrels = {
        str(q): dict.fromkeys(_by_place(found, set(right)), 1)
        for q, (found, right) in enumerate(zip(ranked, relevant, strict=True))
    }
    values = {name: np.zeros(len(ranked)) for name in measures}
    for metric in pytrec_eval.iter_calc(list(measures.values()), qrels, run):
        values[names[metric.measure]][int(metric.query_id)] = metric.value
    return values


def _check(question: int, found: Sequence[str], right: Collection[str]) -> None:
    for ids in (found, right):
        if isinstance(ids, str):
            raise InputError(f"question {question}: expected a list of document ids, and got the text {ids!r}: write [{ids!r}]")
    if len(set(found)) != len(found):
        twice = next(doc for place, doc in enumerate(found) if doc in found[:place])
        raise InputError(f"question {question}: the ranking names document {twice!r} more than once; keep its best place only")
    if not len(right):
        raise InputError(f"question {question} has no relevant document, so its ranking cannot be judged: leave it out")


def _by_place(found: Sequence[str], right: set[str]) -> Iterable[str]:
    """Relevant documents named by their place, as in the run.

    pytrec_eval hands ids to C: one with a NUL is cut short there, and one that is no UTF-8 ends the process.
    """
    yield from (str(place) for place, document in enumerate(found) if document in right)
    yield from (f"unfound {i}" for i in range(len(right.difference(found))))
