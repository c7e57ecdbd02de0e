"""The manifest of a stored knowledge base: what the folder holds, and the commit point of every change."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gemma_rag.encoders.base import Space
from gemma_rag.errors import KnowledgeBaseError
from gemma_rag.storage.files import canonical_json, replace_file

FORMAT = "gemma-rag knowledge base"
VERSION = 2
MANIFEST = "manifest.json"


class Segment(BaseModel):
    """A pair of vector files, as the manifest names it."""

    model_config = ConfigDict(extra="forbid")

    vectors: str
    rows: str
    count: int
    vectors_sha256: str
    rows_sha256: str


class Attachment(BaseModel):
    """A file that goes with the folder: what was learned from labelled questions."""

    model_config = ConfigDict(extra="forbid")

    file: str
    sha256: str


class Manifest(BaseModel):
    """What a folder holds, as of its last commit."""

    model_config = ConfigDict(extra="forbid")

    format: str = FORMAT
    version: int = VERSION
    identity: str = Field(default_factory=lambda: uuid.uuid4().hex, description="Random; another folder has another.")
    generation: int = 0
    space: Space
    fingerprint: str
    recipe: dict[str, Any] = Field(description="Settings that load the same encoder again, without secrets.")
    chunking: dict[str, Any]
    documents: int = 0
    chunks: int = 0
    categories: int = 0
    content_sha256: str = Field(default="0" * 64, description="Sum, modulo 2^256, of a SHA-256 of every row.")
    segments: list[Segment] = []
    attachments: dict[str, Attachment] = {}


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest of a folder.

    Raises:
        KnowledgeBaseError: There is none, or it is damaged, or of another format or version.
    """
    file = path / MANIFEST
    if not path.exists():
        raise KnowledgeBaseError(f"there is no knowledge base at {path}: make one with `gemma-rag index SOURCE --out {path}`")
    damaged = "Restore it from a copy, or index the documents anew"
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise KnowledgeBaseError(f"{path} is no knowledge base: it has no {MANIFEST}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise KnowledgeBaseError(f"{file} is damaged: {error}. {damaged}") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise KnowledgeBaseError(f"{file} was not written by gemma-rag")
    if body.get("version") != VERSION:
        raise KnowledgeBaseError(
            f"{file} is of format version {body.get('version')}, and this gemma-rag reads version {VERSION}: "
            "use the gemma-rag that wrote it, or index the documents anew"
        )
    checksum = body.pop("checksum", None)
    try:
        manifest = Manifest.model_validate(body)
    except ValidationError as error:
        raise KnowledgeBaseError(f"{file} is damaged: {error.error_count()} of its fields are wrong. {damaged}") from None
    if checksum != _checksum(body) or manifest.fingerprint != manifest.space.fingerprint:
        raise KnowledgeBaseError(f"{file} is damaged: its checksum is wrong. {damaged}")
    return manifest


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Make a manifest the current one of a folder, which commits what it names."""
    body = manifest.model_dump(mode="json")
    replace_file(path / MANIFEST, json.dumps({**body, "checksum": _checksum(body)}, indent=1, ensure_ascii=False) + "\n")


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(body).encode("utf-8", "surrogatepass")).hexdigest()
