"""Thresholds without labels: a floor from the documents alone."""

from __future__ import annotations

from collections import Counter

import numpy as np

from gemma_rag.calibrating import CalibrationReport, taken_over
from gemma_rag.calibration import estimate
from gemma_rag.errors import InputError
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.labelled import Labelled
from gemma_rag.learned import Evidence, Kind, KindCalibration
from gemma_rag.lexical import tokenize
from gemma_rag.observing import Observed, observe
from gemma_rag.passages import sentences
from gemma_rag.retriever import TwoStageRetriever

FEWEST = 20
"""Documents, at least, from which thresholds are estimated."""

QUESTIONS = 500
"""Documents that are made questions of, at most."""

HELD_OUT = 0.25
PRESENT = 0.4
"""The floor: the score that a quarter of the questions stay below when their document is held out, and not more than 0.4
of the median with it, since a title fits its own document better than any question does; docs/decisions/0008."""

_TERMS = 3
"""Terms of a title, at least, that can stand for a question."""


def calibrate_self(
    base: KnowledgeBase, *, retriever: TwoStageRetriever | None = None, seed: int = 0, keep: bool = True
) -> CalibrationReport:
    """Estimate a threshold without labels, from the documents alone.

    Each document's title, or its first sentence where the title is shared by others, is asked as a question that has
    an answer, and asked again as if the document were not there. Nobody words questions like that, so this is an
    estimate of a floor, and says so; docs/decisions/0008 compares it with labelled thresholds. It acts on the score that
    documents are ordered by, and stage one refuses nothing.

    Args:
        base: What to calibrate.
        retriever: How questions will be searched; the default one otherwise.
        seed: Of the choice of documents.
        keep: Commit it to the knowledge base's folder.

    Raises:
        InputError: There are fewer than 20 documents.
        MissingExtra: scipy is not installed.
    """
    documents = list(base)
    if len(documents) < FEWEST:
        raise InputError(f"estimating thresholds takes {FEWEST} documents, and the knowledge base has {len(documents)}")
    titles = Counter(document.title.strip().casefold() for document in documents)
    chosen = np.random.default_rng(seed).permutation(len(documents))[:QUESTIONS]
    labelled = []
    for i in sorted(chosen.tolist()):
        document = documents[i]
        title = document.title.strip()
        asked = title if titles[title.casefold()] == 1 and len(tokenize(title)) >= _TERMS else ""
        question = asked or next(iter(sentences(document.text)), document.text)
        labelled.append(Labelled(question=question, relevant=(document.id,)))
    present, absent = observe(base, labelled, retriever), observe(base, labelled, retriever, held_out=True)
    kinds: dict[Kind, KindCalibration] = {}
    observed: dict[Kind, Observed] = {}
    evidence = {}
    for kind, some in present.items():
        observed[kind] = both = some.beside(absent[kind])
        fused = Evidence(features=tuple(some.weights), coefficients=tuple(some.weights.values()), intercept=0.0)
        evidence[kind] = scores = fused.score(both.values)
        floor = min(
            float(np.quantile(scores[~both.answerable], HELD_OUT)),
            PRESENT * float(np.median(scores[both.answerable])),
        )
        kinds[kind] = KindCalibration(
            evidence=fused,
            document=estimate(floor, scores, both.answerable, both.right),
            questions=(int(both.answerable.sum()), int((~both.answerable).sum())),
        )
    notes = (
        "an estimate from the documents alone: real questions are worded otherwise, so label some and calibrate with them",
    )
    calibration = taken_over(base, kinds, notes, estimated=True, keep=keep)
    return CalibrationReport(calibration, observed, evidence, tuple(labelled), notes)
