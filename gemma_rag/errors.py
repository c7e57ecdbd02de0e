"""Every error that gemma-rag raises on purpose.

    GemmaRagError
    ├── InputError (also ValueError)      what you gave cannot be used: an argument, a file, a question
    │   ├── BadRows                       rows of a source that cannot be ingested, all of them at once
    │   ├── SpaceMismatch                 vectors of two spaces would be compared
    │   └── TooFewLabels                  a promise needs more labelled questions (`gemma_rag.calibration`)
    ├── MissingExtra (also ImportError)   an optional dependency is not installed
    ├── MissingDistribution (also ImportError)  another distribution of ours is not installed
    ├── ModelUnavailable                  a model cannot be reached, read or loaded
    ├── EmbeddingServerError              a server that computes vectors failed, or answered what it should not
    ├── KnowledgeBaseError                the stored knowledge base is absent, damaged, locked or foreign
    └── LanguageModelError                the language model that should write the answer failed

A message says what came, what was expected, and what to do about it. None of them ever carries a secret.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def without_secrets(message: str) -> str:
    """Leave long runs of letters and digits out of a message that others wrote: it may quote a key."""
    return re.sub(r"[A-Za-z0-9_\-]{24,}", "[...]", message)


class GemmaRagError(Exception):
    """The base of all errors raised on purpose by gemma-rag."""


class InputError(GemmaRagError, ValueError):
    """What the caller gave cannot be used."""


class MissingExtra(GemmaRagError, ImportError):
    """An optional dependency is not installed.

    Args:
        what: What was asked for, in the user's words, for example ``"the sentence-transformers runtime"``.
        extra: The extra of this distribution that brings it, as in ``gemma-rag[extra]``.
    """

    def __init__(self, what: str, extra: str) -> None:
        self.what, self.extra = what, extra
        super().__init__(f"{what} is not installed. Install it with: pip install 'gemma-rag[{extra}]'")

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str]]:
        return type(self), (self.what, self.extra)


class MissingDistribution(GemmaRagError, ImportError):
    """Another distribution of this project, an adapter for a framework, is not installed.

    Args:
        what: What was asked for, in the user's words.
        distribution: Its name for pip.
    """

    def __init__(self, what: str, distribution: str) -> None:
        self.what, self.distribution = what, distribution
        super().__init__(f"{what} is not installed. Install it with: pip install {distribution}")

    def __reduce__(self) -> tuple[type[MissingDistribution], tuple[str, str]]:
        return type(self), (self.what, self.distribution)


class ModelUnavailable(GemmaRagError):
    """A model cannot be reached, read or loaded."""


class EmbeddingServerError(GemmaRagError):
    """A server that computes vectors failed for good, or answered what it should not.

    Attributes:
        url: What was asked for, without credentials.
        status: The HTTP status, None where no answer came.
        finished: Rows that were computed all the same, by their index in what was to be embedded; a cache keeps them.
    """

    def __init__(self, message: str, *, url: str, status: int | None = None) -> None:
        self.message, self.url, self.status = message, url, status
        self.finished: dict[int, Any] = {}
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return _server_error, (self.message, self.url, self.status)


def _server_error(message: str, url: str, status: int | None) -> EmbeddingServerError:
    return EmbeddingServerError(message, url=url, status=status)


class KnowledgeBaseError(GemmaRagError):
    """The stored knowledge base is absent, damaged, locked, or not ours."""


class LanguageModelError(GemmaRagError):
    """The language model that should write the answer could not be loaded or failed while answering."""


@dataclass(frozen=True)
class BadRow:
    """One row of a source that cannot be ingested.

    Attributes:
        source: The file, or ``"documents"`` for rows given in memory.
        line: Line number in that file, from 1; 0 where the whole file is meant.
        problem: What is wrong with it.
    """

    source: str
    line: int
    problem: str

    def __str__(self) -> str:
        where = f"{self.source}:{self.line}" if self.line else self.source
        return f"{where}: {self.problem}"


class BadRows(InputError):
    """Rows of a source cannot be used; all of them are in `rows`, the first twenty in the message."""

    shown = 20

    def __init__(
        self, rows: Sequence[BadRow], cure: str = "Mend them, or go on without them with skip_bad=True (--skip-bad)"
    ) -> None:
        self.rows, self.cure = tuple(rows), cure
        lines = [str(row) for row in self.rows[: self.shown]]
        if len(self.rows) > self.shown:
            lines.append(f"... and {len(self.rows) - self.shown} more")
        count = "1 row cannot" if len(self.rows) == 1 else f"{len(self.rows)} rows cannot"
        super().__init__(f"{count} be used. {cure}:\n  " + "\n  ".join(lines))

    def __reduce__(self) -> tuple[type[BadRows], tuple[tuple[BadRow, ...], str]]:
        return type(self), (self.rows, self.cure)


class SpaceMismatch(InputError):
    """Vectors made in one space would be compared with vectors made in another.

    Args:
        differences: For each field that differs, the value stored and the value given.
    """

    def __init__(self, differences: Mapping[str, tuple[object, object]]) -> None:
        self.differences = dict(differences)
        lines = [f"{name}: stored {old!r}, given {new!r}" for name, (old, new) in self.differences.items()]
        super().__init__(
            "these embeddings are not the ones that the knowledge base was built with, so its vectors cannot be "
            "compared with theirs. Open it with the embeddings of the stored column, or index the documents anew:\n  "
            + "\n  ".join(lines)
        )

    def __reduce__(self) -> tuple[type[SpaceMismatch], tuple[dict[str, tuple[object, object]]]]:
        return type(self), (self.differences,)
