"""Is an encoder's every vector the one that the model should give? If not, what is wrong, by name, and what to do.

An encoder embeds the fixed texts of `gemma_rag.verify_texts`, and its vectors are compared with a `Reference`: with the right
vector of each text, and with what each fault would give. A fault is named where its vectors fit better than the right ones on
nearly all the texts that it concerns. How alike two texts are, which differs from model to model, does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_rag.encoders.base import BOUNDS, Encoder, Input, Space, is_encoder, prompts_digest
from gemma_rag.errors import GemmaRagError, InputError, without_secrets
from gemma_rag.prompts import NO_PROMPTS, PromptProfile, Task
from gemma_rag.vectors import Floats, truncate, unit
from gemma_rag.verify_diagnosis import CURES, Diagnosis, Finding, Findings, cut_to
from gemma_rag.verify_reference import Reference
from gemma_rag.verify_texts import PROMPTED_AGAIN, Fault, probes

__all__ = ["BOUNDS", "CURES", "Agreement", "Fault", "Finding", "Reference", "Verification", "verify"]

_NORM = 1e-3
_LENGTHS = (16, 64, 256, 1024)


@dataclass(frozen=True)
class Agreement:
    """How near the vectors of some texts are to the right ones.

    Attributes:
        texts: How many.
        smallest: The smallest cosine.
        mean: The mean cosine.
    """

    texts: int
    smallest: float
    mean: float


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        passed: Whether there is no fault.
        faults: What is wrong, each fault once.
        overall: Cosines with the right vectors, over all texts that were compared; None where none could be.
        groups: The same by ``task``, ``title``, ``language``, ``length`` (in tokens), ``kind`` and ``dimensions``.
        bound: Smallest cosine allowed.
        precision: What that bound is for.
        space: What the encoder says decides its vectors; None for an object that says nothing.
        reference: What decided the right ones.
        notes: What was not compared, or was assumed.
    """

    passed: bool
    faults: tuple[Finding, ...]
    overall: Agreement | None
    groups: Mapping[str, Mapping[str, Agreement]]
    bound: float
    precision: str
    space: Space | None
    reference: Space
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything, in plain JSON types."""
        return {
            "passed": self.passed,
            "faults": [
                {"name": f.name.value, "tasks": [task.value for task in f.tasks], "evidence": f.evidence, "cure": f.cure}
                for f in self.faults
            ],
            "overall": vars(self.overall).copy() if self.overall else None,
            "groups": {name: {key: vars(found).copy() for key, found in by.items()} for name, by in self.groups.items()},
            "bound": self.bound,
            "precision": self.precision,
            "space": self.space.model_dump() if self.space else None,
            "reference": self.reference.model_dump(),
            "notes": list(self.notes),
        }

    def report(self) -> str:
        """For people to read."""
        lines = ["verified" if self.passed else "NOT verified"]
        if self.overall:
            lines[0] += (
                f": {self.overall.texts} texts, cosine with the right vectors {self.overall.smallest:.5f} at least and "
                f"{self.overall.mean:.5f} in the mean; {self.bound} is asked for {self.precision}"
            )
        if self.space:
            lines.append(f"  encoder: {self.space.model}, {self.space.runtime}, {self.space.dimensions} dimensions")
        lines.append(f"  reference: {self.reference.model}, {self.reference.dimensions} dimensions")
        for name, by in self.groups.items():
            worst = sorted(by.items(), key=lambda item: item[1].smallest)[:5]
            shown = ", ".join(f"{key} {found.smallest:.5f}" for key, found in worst)
            lines.append(f"  smallest by {name}: {shown}{' ...' if len(by) > len(worst) else ''}")
        for fault in self.faults:
            tasks = ", ".join(task.value for task in fault.tasks)
            lines += ["", f"{fault.name.value.replace('_', ' ')} ({tasks})", f"  {fault.evidence}", f"  Cure: {fault.cure}"]
        return "\n".join([*lines, *([""] if self.notes else []), *(f"note: {note}" for note in self.notes)])


def verify(encoder: Any, reference: Reference, *, precision: str | None = None) -> Verification:
    """Embed the fixed texts and compare the vectors with the right ones.

    Args:
        encoder: An `Encoder`; or any object with ``embed_query`` and ``embed_documents``, as LangChain's, which can be asked
            for questions and for documents without title only.
        reference: The right vectors, at the model's own dimension; an encoder that cuts is compared with their cut.
        precision: Whose bound holds, as in `BOUNDS`. None: what the encoder says of itself, else float32.

    Raises:
        InputError: `encoder` is neither of the two.
    """
    if is_encoder(encoder):
        space: Space | None = encoder.space
        return _verify(encoder, space, range(len(probes())), reference, precision or encoder.space.precision)
    if not all(callable(getattr(encoder, name, None)) for name in ("embed_query", "embed_documents")):
        raise InputError(
            f"expected an Encoder, or something with embed_query and embed_documents, not {type(encoder).__name__}"
        )
    known = [i for i, p in enumerate(probes()) if p.task in (Task.QUERY, Task.DOCUMENT) and not p.titled]
    return _verify(_FrameworkEncoder(encoder, reference.space), None, known, reference, precision or "float32")


class _FrameworkEncoder:
    """A framework's embeddings as an `Encoder`, for the two tasks that they know."""

    profile: PromptProfile = NO_PROMPTS

    def __init__(self, embeddings: Any, space: Space) -> None:
        self.embeddings, self.space = embeddings, space

    def encode(self, inputs: Sequence[Input]) -> Any:
        """Rows as the framework gives them."""
        documents = [item.text for item in inputs if item.task is Task.DOCUMENT]
        rows = iter(self.embeddings.embed_documents(documents) if documents else [])
        return [next(rows) if item.task is Task.DOCUMENT else self.embeddings.embed_query(item.text) for item in inputs]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """The framework does not say."""
        raise NotImplementedError


def _verify(encoder: Encoder, space: Space | None, places: Sequence[int], reference: Reference, precision: str) -> Verification:
    bound = BOUNDS.get(precision.lower(), BOUNDS["server"])
    findings, notes = Findings(), []
    if space is None:
        notes.append("only questions and documents without title could be asked for")
    if precision.lower() not in BOUNDS or precision == "server":
        notes.append(f"how precise {precision!r} should be is not known: the bound of int8 holds")
    rows = _ask(encoder, space, places, reference, findings, notes)
    off: dict[int, float] = {}
    dimensions: dict[int, Iterable[float]] = {}
    if rows:
        diagnosis = Diagnosis(rows, reference)
        _respect_settings(diagnosis, encoder, space, notes)
        diagnosis.explain(findings, bound)
        off = diagnosis.off
        dimensions = {diagnosis.dimensions: off.values()}
        if space is not None:
            dimensions |= _at_other_dimensions(encoder, rows, reference, findings, bound)
    faults = findings.all()
    return Verification(
        passed=not faults,
        faults=faults,
        overall=_agreement(off.values()),
        groups=_groups(off, dimensions, reference),
        bound=bound,
        precision=precision,
        space=space,
        reference=reference.space,
        notes=tuple(notes),
    )


# -- asking -------------------------------------------------------------------------------------------------------------


def _ask(
    encoder: Encoder, space: Space | None, places: Sequence[int], reference: Reference, findings: Findings, notes: list[str]
) -> dict[int, Floats]:
    """Unit rows by probe; what failed, and what was not of norm 1, is among the findings."""
    rows, errors = _embed(encoder, [i for i in places if probes()[i].kind != "long"])
    more, failed = _embed(encoder, [i for i in places if probes()[i].kind == "long"])
    rows, errors = rows | more, errors | failed
    context = min(reference.space.max_tokens, space.max_tokens if space else reference.space.max_tokens)
    if rows and errors and all(reference.lengths[i] > context for i in errors):
        notes.append(f"texts beyond the context of {context} tokens are refused: {next(iter(errors.values()))}")
        errors = {}
    widths = [len(row) for row in rows.values()]
    expected = space.dimensions if space else max(widths, key=widths.count, default=0)
    for i, row in rows.items():
        if len(row) != expected:
            errors[i] = f"{len(row)} dimensions came, and {expected} were expected"
        elif not np.isfinite(row).all() or not row.any():
            errors[i] = "the vector holds NaN, infinity or only zeros"
    rows = {i: row for i, row in rows.items() if i not in errors}
    if errors:
        first, error = next(iter(errors.items()))
        text = repr(probes()[first].text[:40])
        findings.add(Fault.FAILED, errors, f"{len(errors)} of {len(places)} texts have no vector, the first is {text}: {error}")
    _check_norms(rows, "", findings)
    return {i: unit(row[None])[0] for i, row in rows.items()}


def _embed(encoder: Encoder, places: list[int]) -> tuple[dict[int, Floats], dict[int, str]]:
    """Rows by probe, and the errors of those that have none: found out one by one where all together fail."""
    rows, error = _encode(encoder, places)
    if rows is not None:
        return dict(zip(places, rows, strict=True)), {}
    found: dict[int, Floats] = {}
    errors: dict[int, str] = {}
    for i in places if len(places) > 1 else []:
        alone, own = _encode(encoder, [i])
        if alone is None:
            errors[i] = own
        else:
            found[i] = alone[0]
        if len(errors) == 3 and not found:
            break
    if not errors or not found:  # it fails whatever the text is, or only for many together
        return {}, dict.fromkeys(places, error)
    return found, errors


def _encode(encoder: Encoder, places: Sequence[int]) -> tuple[Floats | None, str]:
    try:
        rows = np.asarray(encoder.encode([probes()[i].input for i in places]), dtype=np.float32)
    except Exception as error:  # whatever it raises is what we are here to find
        return None, f"{type(error).__name__}: {without_secrets(str(error))[:300]}"
    if rows.ndim != 2 or len(rows) != len(places):
        return None, f"{len(places)} texts gave an array of shape {rows.shape}"
    return rows, ""


def _check_norms(rows: Mapping[int, Floats], where: str, findings: Findings) -> None:
    norms = {i: float(np.linalg.norm(row.astype(np.float64))) for i, row in rows.items()}
    bad = {i: norm for i, norm in norms.items() if abs(norm - 1) > _NORM}
    if bad:
        span = f"from {min(bad.values()):.4f} to {max(bad.values()):.4f}"
        findings.add(Fault.NOT_NORMALISED, bad, f"{where}{len(bad)} of {len(norms)} vectors have norms {span}")


def _respect_settings(diagnosis: Diagnosis, encoder: Encoder, space: Space | None, notes: list[str]) -> None:
    """What the encoder does otherwise by its own settings, and says so, is no fault."""
    reference = diagnosis.reference
    if space is None or space.prompts == prompts_digest(encoder.profile, detect=False):
        for i in diagnosis.off:
            again = [apart for alternative, apart in diagnosis.wrong[i] if alternative.how == PROMPTED_AGAIN]
            if again:
                diagnosis.off[i] = min(diagnosis.off[i], *again)
                diagnosis.wrong[i] = []
        notes.append("texts that bring a prompt may be prompted again or left as they are: either was taken as right")
    if space is None:
        return
    context = reference.space.max_tokens
    if space.max_tokens < context and space.overflow == "truncate":
        notes.append(f"the encoder's context is set to {space.max_tokens} tokens, and that of the reference to {context}")
    elif space.max_tokens > context or space.overflow != "truncate":
        beyond = [i for i in diagnosis.off if reference.lengths[i] > min(context, space.max_tokens)]
        diagnosis.leave_out(beyond)
        how = "are averaged" if space.overflow != "truncate" else f"are read up to {space.max_tokens}"
        notes.append(f"{len(beyond)} texts beyond the context of {min(context, space.max_tokens)} tokens {how}: not compared")


# -- other dimensions, and numbers --------------------------------------------------------------------------------------


def _at_other_dimensions(
    encoder: Any, rows: Mapping[int, Floats], reference: Reference, findings: Findings, bound: float
) -> dict[int, Iterable[float]]:
    """1 - cosine of ten texts at each dimension that the encoder can be asked for besides its own."""
    own = len(next(iter(rows.values())))
    chosen = [i for i in rows if probes()[i].kind != "long"]
    chosen = chosen[:: max(1, len(chosen) // 10)][:10]
    off: dict[int, Iterable[float]] = {}
    for dimensions in reference.matryoshka if hasattr(encoder, "at") else ():
        if dimensions == own:
            continue
        where = f"at {dimensions} dimensions: "
        try:
            cut, error = _encode(encoder.at(dimensions), chosen)
        except GemmaRagError as refusal:
            cut, error = None, str(refusal)
        if cut is None or cut.shape[1] != dimensions or not np.isfinite(cut).all() or not cut.any(axis=1).all():
            findings.add(Fault.FAILED, chosen, where + (error or "rows of another dimension came, or NaN"))
            continue
        _check_norms(dict(zip(chosen, cut, strict=True)), where, findings)
        cut = unit(cut)
        off[dimensions] = (1 - (cut * cut_to(reference.right[chosen], dimensions)).sum(axis=1)).tolist()
        both = min(dimensions, own)
        smallest = float((truncate(cut, both) * truncate(np.stack([rows[i] for i in chosen]), both)).sum(axis=1).min())
        if smallest < bound:
            evidence = f"the first {both} components point elsewhere than those at {own} dimensions (cosine {smallest:.5f})"
            findings.add(Fault.ANOTHER_MODEL, chosen, where + evidence)
    return off


def _groups(
    off: Mapping[int, float], dimensions: Mapping[int, Iterable[float]], reference: Reference
) -> dict[str, dict[str, Agreement]]:
    context = reference.space.max_tokens
    ends = [*(end for end in _LENGTHS if end < context), context]

    def length(i: int) -> str:
        return next((f"to {end}" for end in ends if reference.lengths[i] <= end), "beyond the context")

    keys: dict[str, Callable[[int], str]] = {
        "task": lambda i: probes()[i].task.value,
        "title": lambda i: "with" if probes()[i].titled else "without",
        "language": lambda i: probes()[i].language,
        "length": length,
        "kind": lambda i: probes()[i].kind,
    }
    groups: dict[str, dict[str, list[float]]] = {name: {} for name in keys}
    for name, key in keys.items():
        for i, apart in off.items():
            if key(i):
                groups[name].setdefault(key(i), []).append(apart)
    groups["dimensions"] = {str(d): list(apart) for d, apart in sorted(dimensions.items())}
    return {n: {key: found for key, apart in by.items() if (found := _agreement(apart))} for n, by in groups.items()}


def _agreement(off: Iterable[float]) -> Agreement | None:
    cosines = [1 - apart for apart in off]
    return Agreement(len(cosines), min(cosines), sum(cosines) / len(cosines)) if cosines else None
