"""Labelled questions: which documents answer them, or that none does."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from gemma_rag.documents import Document, Name
from gemma_rag.errors import BadRow, BadRows, InputError
from gemma_rag.loading import json_rows, load_documents


class Labelled(BaseModel):
    """A question and what answers it.

    Attributes:
        question: The question; ``text`` in the files of a data set.
        relevant: Ids of the documents that answer it; none: the collection has no answer.
        category: The category that it belongs to, where that is known.
        split: ``dev``, ``test``, or empty.
        kind: Why it has no answer, where that is known; ``answerable`` otherwise.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    question: Name
    relevant: tuple[str, ...] = ()
    category: str | None = None
    split: str = ""
    kind: str = ""

    @model_validator(mode="before")
    @classmethod
    def _from_row(cls, row: Any) -> Any:
        if not isinstance(row, Mapping):
            return row
        fields = dict(row)
        if "question" not in fields and "text" in fields:
            fields["question"] = fields["text"]
        relevant, said = fields.get("relevant"), fields.get("answerable")
        if relevant is None and said is not False:
            raise ValueError('"relevant" is missing: a list of ids, [] for a question without an answer')
        if relevant is not None and not isinstance(relevant, (list, tuple)):
            raise ValueError(f'"relevant" is a list of ids, and a {type(relevant).__name__} came')
        fields["relevant"] = relevant = relevant or []
        answerable = bool(relevant)
        if said is not None and said is not answerable:
            raise ValueError(f'"answerable" is {said!r}, and "relevant" has {len(relevant)} ids')
        if not fields.get("kind"):
            fields["kind"] = "answerable" if answerable else "unanswerable"
        return fields

    @property
    def answerable(self) -> bool:
        """Whether a document answers it."""
        return bool(self.relevant)


def load_labelled(source: str | Path, split: str | None = None) -> tuple[Labelled, ...]:
    """Read a JSON Lines file of labelled questions: ``{"question": ..., "relevant": [ids]}`` on each line.

    Args:
        source: The file.
        split: Only the questions of this split.

    Raises:
        BadRows: Some lines cannot be used; all of them are listed.
        InputError: The file cannot be read, or has no question (of that split).
    """
    path = Path(source)
    found: list[Labelled] = []
    bad: list[BadRow] = []
    for where, line, row in json_rows(path):
        if isinstance(row, str):
            bad.append(BadRow(where, line, row))
            continue
        try:
            found.append(Labelled.model_validate(row))
        except ValidationError as error:
            bad.append(BadRow(where, line, _problems(error)))
    if bad:
        raise BadRows(bad, "Mend them")
    chosen = tuple(item for item in found if split is None or item.split == split)
    if not chosen:
        raise InputError(f"there is no labelled question in {path}" + (f" of the split {split!r}" if split else ""))
    return chosen


def as_labelled(items: Iterable[Labelled | Mapping[str, Any]]) -> tuple[Labelled, ...]:
    """Labelled questions given in memory: `Labelled` objects, or mappings that are read like the lines of a file.

    Raises:
        BadRows: Some cannot be used; all of them are listed, with their place, from 1, as the line.
        InputError: One came instead of several.
    """
    if isinstance(items, (str, bytes, Mapping, Labelled)) or not isinstance(items, Iterable):
        raise InputError(f"labelled questions come in a list, and one {type(items).__name__} came: put it in a list")
    found: list[Labelled] = []
    bad: list[BadRow] = []
    for place, item in enumerate(items, 1):
        try:
            found.append(item if isinstance(item, Labelled) else Labelled.model_validate(item))
        except ValidationError as error:
            bad.append(BadRow("labelled questions", place, _problems(error)))
    if bad:
        raise BadRows(bad, "Mend them")
    return tuple(found)


def _problems(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ") for e in error.errors())


def check_ids(labelled: Iterable[Labelled], known: Collection[str]) -> None:
    """Check that every relevant document is there.

    Raises:
        InputError: Some are not; they are listed.
    """
    if missing := sorted({i for item in labelled for i in item.relevant if i not in known}):
        shown = ", ".join(map(repr, missing[:10])) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise InputError(f"the labels name documents that the knowledge base does not have: {shown}")


@dataclass(frozen=True)
class Dataset:
    """Documents and labelled questions about them.

    Attributes:
        name: Of the folder.
        documents: What is searched.
        questions: What is asked, of all splits.
    """

    name: str
    documents: tuple[Document, ...]
    questions: tuple[Labelled, ...]

    @classmethod
    def load(cls, folder: str | Path) -> Dataset:
        """Read a folder with ``corpus.jsonl`` and ``queries.jsonl``.

        Raises:
            BadRows: Some lines cannot be used; all of them are listed.
            InputError: A file is missing, or a label names a document that is not there.
        """
        path = Path(folder)
        files = path / "corpus.jsonl", path / "queries.jsonl"
        if missing := [file.name for file in files if not file.is_file()]:
            raise InputError(f"{path} is no data set: it has no {' and no '.join(missing)}")
        documents, questions = load_documents(files[0]).documents, load_labelled(files[1])
        check_ids(questions, {document.id for document in documents})
        return cls(path.resolve().name, documents, questions)

    def split(self, name: str) -> tuple[Labelled, ...]:
        """The questions of a split.

        Raises:
            InputError: There are none.
        """
        found = tuple(item for item in self.questions if item.split == name)
        if not found:
            splits = sorted({item.split for item in self.questions})
            raise InputError(f"{self.name} has no questions of the split {name!r}: it has {', '.join(map(repr, splits))}")
        return found


def texts(labelled: Sequence[Labelled]) -> list[str]:
    """The questions alone."""
    return [item.question for item in labelled]
