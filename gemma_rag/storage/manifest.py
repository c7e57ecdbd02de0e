"""The manifest of a stored knowledge base: what the folder holds, and the commit point of every change."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gemma_rag.encoders.base import Space
from gemma_rag.errors import KnowledgeBaseError
from gemma_rag.index.compressed import Precision
from gemma_rag.storage.files import canonical_json, replace_file

FORMAT = "gemma-rag knowledge base"
VERSION = 3
MANIFEST = "manifest.json"

EngineName: TypeAlias = Literal["faiss", "milvus", "chroma"]


class GraphFile(BaseModel):
    """A graph over the rows of a large category in a segment, as the manifest names it."""

    model_config = ConfigDict(extra="forbid")

    file: str
    first: int = Field(description="The category's first row in the segment.")
    rows: int
    size: int = Field(description="Bytes.")
    sha256: str


class Segment(BaseModel):
    """A file of vectors, as the manifest names it, and the graphs that `compact` built over its large categories."""

    model_config = ConfigDict(extra="forbid")

    file: str
    rows: int
    sha256: str
    graphs: list[GraphFile] = []


class Attachment(BaseModel):
    """A file that goes with the folder: what was learned from labelled questions."""

    model_config = ConfigDict(extra="forbid")

    file: str
    sha256: str


class EngineAddress(BaseModel):
    """Where the vectors of a knowledge base are; never with a secret in it.

    Attributes:
        name: ``faiss``: in the folder itself; ``milvus`` or ``chroma``: in that database.
        uri: Where it is: ``http://host:port``, or the file or folder of an embedded one. Credentials come from the environment.
        collection: What the knowledge base is called there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: EngineName = "faiss"
    uri: str | None = None
    collection: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> EngineAddress:
        if self.name == "faiss" and (self.uri or self.collection):
            raise ValueError("engine faiss keeps everything in the folder of the knowledge base: leave uri and collection out")
        if self.name != "faiss" and not self.uri:
            raise ValueError(f"engine {self.name} needs a uri: http://host:port, or the path of an embedded one")
        if self.uri and re.match(r"\w+://[^/]*@", self.uri):
            raise ValueError(
                f"the uri carries credentials: put a token into GEMMA_RAG_{self.name.upper()}_TOKEN and leave it out of the uri"
            )
        return self


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
    engine: EngineAddress = EngineAddress()
    tails: Precision = Field(default="float32", description="In what the components after the first 128 are stored.")
    graphs_above: int | None = Field(default=None, description="Rows of a category above which `compact` builds a graph.")
    segments: list[Segment] = []
    pending: list[str] = Field(default=[], description="Documents whose older rows are still to be deleted on the server.")
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
