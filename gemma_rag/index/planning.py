"""Which plan finds what the exact search finds, and what each one costs: measured on an index and on questions."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_rag.errors import InputError
from gemma_rag.index.embedded import Bools, EmbeddedIndex, Plan, Scored
from gemma_rag.vectors import Floats

DIMENSIONS = (64, 128, 256, 512)
OVERSAMPLING = (1, 2, 4, 8, 16, 32, 64)

_ALIKE = 1.1
"""Two medians this near to each other are taken for equal; the one that reads fewer bytes is chosen."""

_ROUNDING = 1e-6
"""Two cosines that differ by no more are equal: neither document is the better one."""


@dataclass(frozen=True)
class Trial:
    """What one way to search cost, asked one question at a time, and what it found.

    Attributes:
        plan: The way; None for the exact search.
        overlap: Share of the exact search's best ``k`` documents that it found, mean over the questions.
        p50_ms: Milliseconds for a question, the median.
        p95_ms: The same, of the slowest twentieth the fastest.
        bytes_read: Bytes of vectors that were read for a question, mean.
    """

    plan: Plan | None
    overlap: float
    p50_ms: float
    p95_ms: float
    bytes_read: float


@dataclass(frozen=True)
class PlanReport:
    """What was tried, what was chosen, and why.

    Attributes:
        plan: The choice; None: search exactly.
        why: A sentence.
        target_overlap: What had to be reached.
        k: Of how many best documents.
        wanted: Of how many documents a search wants to know the order; a shortlist is a multiple of it.
        questions: How many were asked.
        documents: How many were compared for a question, mean.
        dimensions: Components of a vector.
        exact: The exact search.
        trials: Every plan that was tried: of the same components no longer list once the target is reached.
    """

    plan: Plan | None
    why: str
    target_overlap: float
    k: int
    wanted: int
    questions: int
    documents: float
    dimensions: int
    exact: Trial
    trials: tuple[Trial, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **fields,
            "plan": _plain(self.plan),
            "exact": {**self.exact.__dict__, "plan": None},
            "trials": [{**trial.__dict__, "plan": _plain(trial.plan)} for trial in self.trials],
        }


def plan_for(
    index: EmbeddedIndex,
    queries: Floats,
    opened: Bools,
    k: int,
    target_overlap: float = 0.99,
    *,
    wanted: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> PlanReport:
    """Try plans, and choose the fastest that finds enough.

    Args:
        index: What will be searched.
        queries: float32 of shape ``(q, d)``, rows of norm 1: questions such as will be asked.
        opened: bool of shape ``(q, categories)``: what the gate opens for each.
        k: How many documents a question asks for.
        target_overlap: Share of the exact search's best `k` that has to be found, above 0 to 1.
        wanted: Of how many documents a search wants to know the order, which makes its shortlist; `k` by default.
        clock: Seconds.

    Raises:
        InputError: `k` or the target is out of its range, or no question opens a category that has documents.
    """
    if k < 1 or not 0.0 < target_overlap <= 1.0:
        raise InputError(f"a plan is made for k of at least 1 and an overlap above 0, at most 1; {k} and {target_overlap} came")
    wanted = k if wanted is None else max(k, wanted)
    exact, found = _timed(index, queries, opened, wanted, None, clock)
    asked = np.flatnonzero([len(scored.places) > 0 for scored in found])
    if not len(asked):
        raise InputError("no question opens a category that has documents, so there is nothing to plan with")
    truth = [_kth_best(found[i], k) for i in asked.tolist()]
    exact_bytes = float(index.bytes_to_scan(opened[asked]).mean())
    whole = Trial(None, 1.0, _ms(exact[asked], 50), _ms(exact[asked], 95), exact_bytes)
    trials = []
    for dimensions in sorted({min(size, queries.shape[1]) for size in DIMENSIONS}):
        for oversampling in OVERSAMPLING:
            plan = Plan(dimensions=dimensions, oversampling=oversampling)
            seconds, listed = _timed(index, queries[asked], opened[asked], wanted, plan, clock)
            overlap = float(np.mean([_share(scored, k, *best) for scored, best in zip(listed, truth, strict=True)]))
            read = float(index.bytes_to_scan(opened[asked], dimensions).mean())
            read += float(np.mean([index.bytes_of(index.rows_of(scored.places)) for scored in listed]))
            trials.append(Trial(plan, overlap, _ms(seconds, 50), _ms(seconds, 95), read))
            if overlap >= target_overlap or all(len(scored.places) == scored.compared for scored in listed):
                break
    choice, why = _choice(whole, trials, target_overlap, k)
    return PlanReport(
        plan=choice,
        why=why,
        target_overlap=target_overlap,
        k=k,
        wanted=wanted,
        questions=len(asked),
        documents=float(np.mean([found[i].compared for i in asked.tolist()])),
        dimensions=queries.shape[1],
        exact=whole,
        trials=tuple(trials),
    )


def _choice(exact: Trial, trials: list[Trial], target: float, k: int) -> tuple[Plan | None, str]:
    good = [trial for trial in trials if trial.overlap >= target]
    if not good:
        best = max(trials, key=lambda trial: trial.overlap)
        return None, (
            f"no plan reached an overlap of {target:g} with the exact search's best {k}; the nearest, {_words(best)}, "
            f"reached {best.overlap:.4f}: search exactly ({exact.p50_ms:.2f} ms)"
        )
    fastest = min(trial.p50_ms for trial in good)
    choice = min((trial for trial in good if trial.p50_ms <= _ALIKE * fastest), key=lambda trial: trial.bytes_read)
    if choice.p50_ms >= exact.p50_ms:
        return None, (
            f"the exact search takes {exact.p50_ms:.2f} ms, and the fastest plan of enough overlap, {_words(choice)}, "
            f"{choice.p50_ms:.2f} ms: search exactly"
        )
    return choice.plan, (
        f"{_words(choice)} found {choice.overlap:.4f} of the exact search's best {k} in {choice.p50_ms:.2f} ms instead of "
        f"{exact.p50_ms:.2f} ms, reading {choice.bytes_read / 1e6:.1f} MB instead of {exact.bytes_read / 1e6:.1f} MB: of what "
        f"reached {target:g}, nothing was faster by more than a tenth"
    )


def _words(trial: Trial) -> str:
    plan = trial.plan
    if plan is None:
        return "all components"
    return f"{plan.dimensions} components with {plan.oversampling} times as many documents ranked as wanted"


def _timed(
    index: EmbeddedIndex, queries: Floats, opened: Bools, wanted: int, plan: Plan | None, clock: Callable[[], float]
) -> tuple[Floats, list[Scored]]:
    """Seconds of each question, asked alone, and what it found."""
    seconds, found = [], []
    for i in range(len(queries)):
        if not i:  # what is read for the first time is read from the disk
            index.search(queries[:1], opened[:1], wanted, plan)
        started = clock()
        found += index.search(queries[i : i + 1], opened[i : i + 1], wanted, plan)
        seconds.append(clock() - started)
    return np.array(seconds, dtype=np.float32), found


def _kth_best(scored: Scored, k: int) -> tuple[float, int]:
    """The worst score among the best `k`, and how many these are."""
    count = min(k, len(scored.scores))
    return float(np.partition(scored.scores, len(scored.scores) - count)[len(scored.scores) - count]), count


def _share(scored: Scored, k: int, worst: float, count: int) -> float:
    return min(int((scored.scores >= worst - _ROUNDING).sum()), count) / count


def _ms(seconds: Floats, percentile: int) -> float:
    return float(np.percentile(seconds, percentile) * 1e3)


def _plain(plan: Plan | None) -> dict[str, Any] | None:
    return None if plan is None else plan.model_dump(mode="json")
