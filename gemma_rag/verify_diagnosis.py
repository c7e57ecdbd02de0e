"""What is wrong with vectors, found by asking which fault's vectors they fit better than the right ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gemma_rag.prompts import Task
from gemma_rag.vectors import Floats, truncate
from gemma_rag.verify_reference import Alternative, Reference
from gemma_rag.verify_texts import Fault, group_of, probes

Doubles: TypeAlias = npt.NDArray[np.float64]

CURES: Mapping[Fault, str] = MappingProxyType(
    {
        Fault.FAILED: "Make it embed these texts: read the error, and look at the server's limits and the model's precision.",
        Fault.NOT_NORMALISED: "Scale every row to norm 1, and again after a cut to fewer dimensions (vectors.truncate).",
        Fault.PROMPTS_MISSING: "Put the model's prompt for the task before each text, as gemma_rag.GemmaEmbeddings does.",
        Fault.PROMPTS_DOUBLED: "Let one side alone put the prompts: switch off the server's default prompt, or the client's.",
        Fault.WRONG_ROLE: "Embed questions as queries and documents as documents: each task has a prompt of its own.",
        Fault.TITLE_LOST: "Give the title as the document's title (Input.title): it belongs in the prompt, not in the text.",
        Fault.TEXTS_CHANGED: "Hand texts as they are to the model's own tokenizer: replace no line breaks, and strip nothing. "
        "llama.cpp reads Korean and Indic scripts wrongly for BERT models: serve those with another server.",
        Fault.DENSE_MISSING: "Use a conversion of the model that has its Dense layers (2_Dense, 3_Dense) behind the pooling.",
        Fault.TRUNCATED_EARLY: "Raise the limit to the model's context: max_tokens, or the server's num_ctx or input length.",
        Fault.ANOTHER_MODEL: "Load the model that the reference was made with, or make a reference of this one.",
        Fault.LOW_PRECISION: "Use weights of a higher precision, or declare the precision that these have.",
    }
)
"""What to do about each fault."""

_NOISE = 1e-6
"""1 - cosine that float32 arithmetic alone can give."""
_CLEARLY = 0.5
"""A fault's vectors fit better where 1 - cosine with them is less than this part of that with the right ones."""
_NEARLY_ALL = 0.9
_EXACTLY = 0.05
"""A cut is found to the token where 1 - cosine falls to less than this part."""
_STRAY = 20
"""A text whose 1 - cosine is this many times that of the others is off for a reason of its own."""
_LIKE, _NEAR = 0.8, 0.95
"""Least correlation, and least cosine, of the same model computed less precisely."""


@dataclass(frozen=True)
class Finding:
    """One fault of an encoder.

    Attributes:
        name: Which.
        tasks: The tasks whose vectors it spoils.
        evidence: What shows it, with numbers.
    """

    name: Fault
    tasks: tuple[Task, ...]
    evidence: str

    @property
    def cure(self) -> str:
        """What to do about it."""
        return CURES[self.name]


class Findings:
    """Evidence as it comes together; each fault is found once, whatever number of times it shows."""

    def __init__(self) -> None:
        self._places: dict[Fault, set[int]] = {}
        self._evidence: dict[Fault, list[str]] = {}

    def add(self, fault: Fault, places: Iterable[int], evidence: str) -> None:
        """A fault that shows in these probes."""
        self._places.setdefault(fault, set()).update(places)
        self._evidence.setdefault(fault, []).append(evidence)

    def all(self) -> tuple[Finding, ...]:
        """What was found, in the order of `Fault`."""
        tasks = {fault: {probes()[i].task for i in places} for fault, places in self._places.items()}
        return tuple(
            Finding(fault, tuple(task for task in Task if task in tasks[fault]), "; ".join(self._evidence[fault]))
            for fault in Fault
            if fault in tasks
        )


class Diagnosis:
    """Vectors of probes beside the right and the wrong ones.

    Args:
        rows: Unit vectors by probe, all of one dimension.
        reference: What they are compared with.

    Attributes:
        off: 1 - cosine with the right vector, by probe. What must not be judged is taken out.
        wrong: 1 - cosine with the alternatives, by probe.
    """

    def __init__(self, rows: Mapping[int, Floats], reference: Reference) -> None:
        self.reference = reference
        self.rows: dict[int, Doubles] = {i: row.astype(np.float64) for i, row in rows.items()}
        self.dimensions = len(next(iter(self.rows.values())))
        right = cut_to(reference.right, self.dimensions)
        self.off = {i: max(0.0, 1 - float(row @ right[i])) for i, row in self.rows.items()}
        self.wrong: dict[int, list[tuple[Alternative, float]]] = {i: [] for i in self.rows}
        for alternatives, wrong in ((reference.alternatives, reference.wrong), (reference.pooled, reference.pooled_wrong)):
            for alternative, row in zip(alternatives, cut_to(wrong, self.dimensions), strict=True):
                if alternative.probe in self.rows:
                    apart = 1 - float(row @ self.rows[alternative.probe])
                    self.wrong[alternative.probe].append((alternative, apart))

    def leave_out(self, places: Iterable[int]) -> None:
        """Judge these probes not."""
        for i in places:
            self.off.pop(i, None)
            self.wrong.pop(i, None)

    def explain(self, findings: Findings, bound: float) -> None:
        """Name every fault that shows.

        Args:
            findings: Where they are added.
            bound: Smallest cosine that needs no explanation.
        """
        read = self._find_cut(findings)
        whole = [i for i in self.off if self.reference.lengths[i] <= read]
        groups: dict[str, list[int]] = {}
        for i in whole:
            groups.setdefault(group_of(probes()[i]), []).append(i)
        explained = {group for group, places in groups.items() if self._find_misreading(findings, group, places)}
        left = [i for i in whole if not {group_of(probes()[i]), _usual_group(i)} & explained]
        over = [i for i in left if self.off[i] > 1 - bound]
        if not over:
            return
        middle = median(self.off[i] for i in left)
        if len(over) < len(left) / 2 and all(self.off[i] > _STRAY * middle for i in over):
            self._judge_strays(findings, left, over)
        else:
            self._judge_all(findings, left, bound)

    def _find_cut(self, findings: Findings) -> float:
        """Tokens up to which texts are read whole, infinite where they are not cut too early."""
        hits: dict[int, list[tuple[int, float]]] = {}
        for i, alternatives in self.wrong.items():
            for alternative, apart in alternatives:
                if alternative.cut is not None:
                    hits.setdefault(alternative.cut, []).append((i, apart))
        near = {cut: median(apart for _, apart in found) for cut, found in hits.items()}
        fits = [cut for cut, found in hits.items() if self._fits(found)]
        if not fits:
            return float("inf")
        cut = min(fits, key=lambda cut: near[cut])
        right = median(self.off[i] for i, _ in hits[cut])
        context = self.reference.space.max_tokens
        read, where = cut, f"at {cut}"
        if near[cut] > _EXACTLY * right:
            beside = {**{c: near[c] for c in near if c != cut}, context: right}
            neighbours = [max((c for c in beside if c < cut), default=0), min(c for c in beside if c > cut)]
            read, end = sorted((cut, min(neighbours, key=lambda c: beside.get(c, 2.0))))
            where = f"between {read} and {end}"
        evidence = (
            f"longer texts have the vectors of texts cut {where} tokens (cosine {1 - near[cut]:.5f} with those cut at {cut}, "
            f"{1 - right:.5f} with the right ones), and the context has {context}"
        )
        findings.add(Fault.TRUNCATED_EARLY, [i for i in self.off if self.reference.lengths[i] > read], evidence)
        return read

    def _find_misreading(self, findings: Findings, group: str, places: list[int]) -> bool:
        readings: dict[tuple[tuple[Fault, ...], str], list[tuple[int, float]]] = {}
        for i in places:
            for alternative, apart in self.wrong[i]:
                if alternative.cut is None:
                    readings.setdefault((alternative.faults, alternative.how), []).append((i, apart))
        known = len({i for near in readings.values() for i, _ in near})
        fits = {
            reading: median(apart for _, apart in near)
            for reading, near in readings.items()
            if len(near) >= max(2, known / 2) and self._fits(near)
        }
        if not fits:
            return False
        faults, how = best = min(fits, key=lambda reading: fits[reading])
        near = [i for i, _ in readings[best]]
        right = median(self.off[i] for i in near)
        for fault in faults:
            evidence = (
                f"{group}: the vectors are those of {how} (cosine {1 - fits[best]:.5f}; with the right ones {1 - right:.5f})"
            )
            findings.add(fault, near, evidence)
        return True

    def _fits(self, near: list[tuple[int, float]]) -> bool:
        """Whether an alternative, given as 1 - cosine by probe, explains the vectors better than the right ones do."""
        right = [self.off[i] for i, _ in near]
        wrong = [apart for _, apart in near]
        nearer = sum(w < r for w, r in zip(wrong, right, strict=True))
        return median(right) > _NOISE and median(wrong) < _CLEARLY * median(right) and nearer >= _NEARLY_ALL * len(near)

    def _judge_strays(self, findings: Findings, left: list[int], over: list[int]) -> None:
        """A few texts are off, the others are right."""
        lengths = self.reference.lengths
        fitting, shortest = max(lengths[i] for i in left if i not in over), min(lengths[i] for i in over)
        over = sorted(over, key=lambda i: -self.off[i])
        smallest = f"smallest cosine {1 - self.off[over[0]]:.5f}"
        if all(probes()[i].kind == "long" for i in over) and fitting < shortest:
            findings.add(
                Fault.TRUNCATED_EARLY,
                over,
                f"texts of up to {fitting} tokens are right, those of {shortest} and more are not ({smallest}): they are cut "
                f"elsewhere than at the context of {self.reference.space.max_tokens} tokens",
            )
            return
        shown = ", ".join(repr(probes()[i].text[:30]) for i in over[:3])
        evidence = f"{len(over)} of {len(left)} texts are off ({smallest}) and the others right; the worst are {shown}"
        findings.add(Fault.TEXTS_CHANGED, over, evidence)

    def _judge_all(self, findings: Findings, left: list[int], bound: float) -> None:
        """Most texts are off, and no misreading explains it."""
        off = sorted(self.off[i] for i in left)
        numbers = f"the cosines go from {1 - off[-1]:.5f} to {1 - off[0]:.5f} (median {1 - median(off):.5f})"
        given = np.stack([self.rows[i] for i in left])
        right = cut_to(self.reference.right[left], self.dimensions)
        if _shuffled(given, right, bound):
            findings.add(Fault.FAILED, left, "the rows come back in another order than the texts were given in")
        elif 1 - median(off) >= _NEAR and _likeness(given, right) >= _LIKE:
            findings.add(Fault.LOW_PRECISION, left, f"{numbers}, with {bound} asked for, and no other fault explains them")
        else:
            space = self.reference.space
            findings.add(
                Fault.ANOTHER_MODEL,
                left,
                f"{numbers}, and no other fault explains them; vectors of {self.dimensions} dimensions came, and the reference "
                f"is {space.model} (weights {space.weights}) with {space.dimensions}",
            )


def cut_to(rows: npt.NDArray[Any], dimensions: int) -> Doubles:
    """Rows cut to fewer dimensions, of norm 1; zeros, which nothing is near to, where they have not as many."""
    if dimensions > rows.shape[1] or not len(rows):
        return np.zeros((len(rows), dimensions))
    return truncate(rows, dimensions).astype(np.float64)


def _usual_group(place: int) -> str:
    """The group that a special text would belong to if it were a usual one."""
    return group_of(probes()[place]._replace(kind="sentence"))


def _shuffled(given: Doubles, right: Doubles, bound: float) -> bool:
    scores = given @ right.T
    nearest = scores.argmax(axis=1)
    moved = (nearest != np.arange(len(given))).mean() > 0.5
    return bool(moved) and len(set(nearest)) == len(given) and float(np.median(scores.max(axis=1))) >= bound


def _likeness(given: Doubles, right: Doubles) -> float:
    """Correlation once the common direction is left out: 1 for the same vectors, about 0 for those of another model."""
    given, right = given - given.mean(axis=0), right - right.mean(axis=0)
    return float((given * right).sum() / max(float(np.linalg.norm(given) * np.linalg.norm(right)), 1e-12))
