"""What goes into a knowledge base: documents, their categories, and the chunks that documents are cut into."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator


def _whole_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a character (a lone surrogate) at place {error.start}") from None
    return text


Text: TypeAlias = Annotated[str, AfterValidator(_whole_characters)]
Name: TypeAlias = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1), AfterValidator(_whole_characters)]
Metadata: TypeAlias = dict[str, Any]


UNCATEGORISED = "uncategorised"
"""The category of what somebody else's retriever found and that names none."""


def plain_metadata(metadata: Mapping[Any, Any]) -> Metadata:
    """Metadata of somebody else's as plain JSON.

    Dates are written in ISO 8601, NaN and infinities become None, sets become lists, and what JSON does not know becomes its
    text; halves of characters (lone surrogates), which readers of broken files leave behind, become question marks.
    """
    return {whole_text(key): _plain(value) for key, value in metadata.items()}


def whole_text(value: object) -> str:
    """A value as a text, without halves of characters."""
    return str(value).encode("utf-8", "replace").decode()


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, Mapping):
        return plain_metadata(value)
    if isinstance(value, (list, tuple, set, frozenset, np.ndarray)):
        return [_plain(item) for item in value]
    return whole_text(value)


class Document(BaseModel):
    """One document, as the user knows it: stage two's unit.

    Attributes:
        id: Unique within a knowledge base; adding a document with a known id replaces that document.
        text: The content; white space alone is refused.
        title: Goes into the model's document prompt (``title: {title} | text: ...``); empty where there is none.
        category: The category that stage one chooses; a path where categories lie in each other (``IT/Accounts``).
        also_in: Further categories that it belongs to.
        metadata: Anything that JSON can hold; retrieval can filter on it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Name
    text: Text
    title: Text = ""
    category: Name
    also_in: tuple[Name, ...] = ()
    metadata: Metadata = Field(default_factory=dict)

    @field_validator("text")
    @classmethod
    def _text_has_content(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("the text is empty")
        return text

    @model_validator(mode="after")
    def _categories_differ(self) -> Document:
        if len({self.category, *self.also_in}) <= len(self.also_in):
            raise ValueError(f"also_in names a category twice, or names {self.category!r}, which is its category already")
        return self

    @field_validator("metadata")
    @classmethod
    def _metadata_is_json(cls, metadata: Metadata) -> Metadata:
        try:
            text = json.dumps(metadata, allow_nan=False, sort_keys=True, ensure_ascii=False)
            text.encode()
        except (TypeError, ValueError) as error:  # UnicodeEncodeError is a ValueError
            raise ValueError(f"the metadata must be plain JSON: {error}") from error
        plain: Metadata = json.loads(text)  # as it will come back: lists for tuples, and nobody else's objects
        return plain

    @property
    def content_hash(self) -> str:
        """SHA-256 over all fields but the id, in hexadecimal: equal hashes need no new vectors."""
        fields = [self.text, self.title, self.category, self.also_in, self.metadata]
        return hashlib.sha256(json.dumps(fields, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Category(BaseModel):
    """One category: stage one's unit.

    Attributes:
        name: As it stands in `Document.category`.
        description: What belongs into it, in a sentence or two; embedded together with the name.
        examples: Questions that belong into it, each embedded alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    description: Text = ""
    examples: tuple[Name, ...] = ()

    @property
    def text(self) -> str:
        """What is embedded for it: the name, its separators read as spaces, and the description."""
        words = " ".join(re.split(r"[\s_/-]+", self.name)).strip() or self.name
        return f"{words}: {self.description.strip()}" if self.description.strip() else words


class Chunk(BaseModel):
    """A stretch of a document that is embedded as one vector.

    Attributes:
        start: Where it begins in `Document.text`, in characters.
        end: Where it ends, exclusive: the chunk's text is ``document.text[start:end]``.
        headings: The headings that it stands under, outermost first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: int = Field(ge=0)
    end: int = Field(gt=0)
    headings: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _ends_after_its_start(self) -> Chunk:
        if self.end <= self.start:
            raise ValueError(f"a chunk from {self.start} to {self.end} is empty")
        return self

    def title(self, document_title: str) -> str:
        """The title to embed it under: the document's own, then its headings, each named once."""
        path = [document_title.strip(), *(heading.strip() for heading in self.headings)]
        return " > ".join(part for i, part in enumerate(path) if part and part not in path[:i])
