"""Model folders that need no torch: what `gemma-rag export` writes, and ONNX models as they are published.

An exported folder holds the graph (encoder, pooling, dense layers and norm in one), the tokenizer, and
``gemma_rag_model.json``: the prompts, the sizes, where the weights came from, how well the graph agrees with them, and a
checksum of every file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from gemma_rag.encoders.checks import CONTEXT, chosen_profile
from gemma_rag.encoders.models import fetch_files
from gemma_rag.encoders.settings import EncoderSettings
from gemma_rag.errors import ModelUnavailable
from gemma_rag.prompts import PROFILES, PromptProfile, Task

DESCRIPTION = "gemma_rag_model.json"
FORMAT = "gemma-rag model"
VERSION = 1
TOKENIZER = "tokenizer.json"
_PROFILE_FIELDS = ("category_threshold", "document_threshold", "float16")


class Agreement(BaseModel):
    """How the exported graph's vectors compare with those of the model that it was made from."""

    model_config = ConfigDict(extra="forbid")

    texts: int
    smallest_cosine: float
    mean_cosine: float


class Description(BaseModel):
    """``gemma_rag_model.json``: what an exported folder holds."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    format: str = FORMAT
    version: int = VERSION
    runtime: Literal["onnx", "openvino"]
    precision: Literal["float32", "int8"]
    model: str
    weights: str
    native: int
    max_tokens: int
    profile: dict[str, Any]
    agreement: Agreement
    made_with: dict[str, str]
    files: dict[str, tuple[int, str]]
    """Bytes and SHA-256 of every other file, by its name."""


class Exported:
    """A folder with a graph that an engine can open.

    Attributes:
        runtime: The engine that it is for.
        graph: The graph's file.
        tokenizer: The tokenizer's file.
        name: How people know the model.
        weights: Digest of the weights.
        precision: Number format of the weights.
        native: Components of its vectors; None where the graph has to be asked.
        max_tokens: Its context; None where nothing says it.
        profile: Its prompts.
        agreement: What the export measured; None for a published model.
    """

    def __init__(
        self,
        *,
        runtime: str,
        graph: Path,
        tokenizer: Path,
        name: str,
        weights: str,
        precision: str,
        native: int | None,
        max_tokens: int | None,
        profile: PromptProfile,
        agreement: Agreement | None = None,
    ) -> None:
        self.runtime, self.graph, self.tokenizer = runtime, graph, tokenizer
        self.name, self.weights, self.precision = name, weights, precision
        self.native, self.max_tokens, self.profile, self.agreement = native, max_tokens, profile, agreement


def find(settings: EncoderSettings) -> Exported | None:
    """The folder that the settings ask for; None where they mean a model for sentence-transformers.

    Raises:
        ModelUnavailable: An engine is asked for that the model is not there for, or the folder is damaged.
    """
    wanted = settings.runtime
    if wanted not in ("auto", "onnx", "openvino"):
        return None
    path = Path(settings.model).expanduser()
    if path.suffix == ".onnx" and (path.parent / DESCRIPTION).is_file():
        path = path.parent
    if (path / DESCRIPTION).is_file():
        found = _described(path, settings)
        if wanted not in ("auto", found.runtime):
            raise ModelUnavailable(f"{settings.model} was exported for {found.runtime}, and the runtime {wanted} is asked for")
        return found
    if wanted == "auto" and path.suffix != ".onnx":
        return None
    if wanted == "openvino":
        raise ModelUnavailable(
            f"{settings.model} is no folder that was exported for OpenVINO. Make one, once, with sentence-transformers "
            f"installed: gemma-rag export {settings.model} --to openvino --out FOLDER, and give model='FOLDER'"
        )
    return _published(settings, path)


def check_files(folder: Path) -> None:
    """Compare every file of an exported folder with its checksum; reads all of it.

    Raises:
        ModelUnavailable: A file is absent or damaged; the message names it.
    """
    for name, (_, sha256) in _describe(folder).files.items():
        if file_digest(folder / name) != sha256:
            raise ModelUnavailable(f"{folder / name} is damaged: its checksum is wrong. Export the model anew")


def file_digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def profile_to_json(profile: PromptProfile) -> dict[str, Any]:
    """A profile as plain JSON."""
    return {
        "name": profile.name,
        "known": PROFILES.get(profile.name) == profile,
        "prompts": {task.value: prompt for task, prompt in profile.prompts.items()},
        "matryoshka": list(profile.matryoshka),
        "languages": list(profile.languages),
        **{name: getattr(profile, name) for name in _PROFILE_FIELDS},
    }


def profile_from_json(value: Mapping[str, Any]) -> PromptProfile:
    """The profile that was written; where that was this package's own, what it is now, if the prompts are still the same."""
    prompts = {Task(task): prompt for task, prompt in value["prompts"].items()}
    known = PROFILES.get(value["name"])
    if value["known"] and known is not None and dict(known.prompts) == prompts:
        return known
    return PromptProfile(
        value["name"],
        prompts=prompts,
        matryoshka=tuple(value["matryoshka"]),
        languages=tuple(value["languages"]),
        **{name: value[name] for name in _PROFILE_FIELDS},
    )


# -- inside -------------------------------------------------------------------------------------------------------------


def _describe(folder: Path) -> Description:
    file = folder / DESCRIPTION
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        if body.get("format") != FORMAT or body.get("version") != VERSION:
            raise ModelUnavailable(
                f"{file} is of format version {body.get('version')}, and this gemma-rag reads version {VERSION}: export anew"
            )
        description = Description.model_validate(body)
    except (OSError, ValueError, AttributeError, RecursionError, ValidationError) as error:
        raise ModelUnavailable(f"{file} is damaged ({type(error).__name__}): export the model anew") from None
    for name, (size, _) in description.files.items():
        part = folder / name
        if Path(name).name != name or not part.is_file() or part.stat().st_size != size:
            raise ModelUnavailable(f"{part} is absent or has another size than was exported: export the model anew")
    return description


def _described(folder: Path, settings: EncoderSettings) -> Exported:
    about = _describe(folder)
    try:
        own = profile_from_json(about.profile)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ModelUnavailable(f"{folder / DESCRIPTION} is damaged: its prompts cannot be read. Export anew") from None
    return Exported(
        runtime=about.runtime,
        graph=folder / ("model.onnx" if about.runtime == "onnx" else "model.xml"),
        tokenizer=folder / TOKENIZER,
        name=about.model,
        weights=about.weights,
        precision=about.precision,
        native=about.native,
        max_tokens=about.max_tokens,
        profile=chosen_profile(settings, about.model) if settings.prompts else own,
        agreement=about.agreement,
    )


def _published(settings: EncoderSettings, path: Path) -> Exported:
    """An ONNX model as others publish it: a ``sentence_embedding`` output, and a tokenizer beside it."""
    graph = _graph_file(settings, path)
    folder = graph.parent.parent if graph.parent.name == "onnx" else graph.parent
    if "fp16" in graph.stem.lower() or "f16" in graph.stem.lower():
        raise ModelUnavailable(f"{graph.name} computes in float16, in which the Gemma models overflow: take another file")
    if not (folder / TOKENIZER).is_file():
        raise ModelUnavailable(f"{folder} has no {TOKENIZER}, which the model's texts are read with")
    name = settings.model if not path.exists() else folder.resolve().name
    profile = chosen_profile(settings, name, _configured_prompts(folder))
    stem = graph.stem.lower()
    quantized = any(mark in stem for mark in ("quantized", "int8", "q8", "q4", "uint8", "bnb4"))
    return Exported(
        runtime="onnx",
        graph=graph,
        tokenizer=folder / TOKENIZER,
        name=name,
        weights=_sampled_digest(graph),
        precision=stem.removeprefix("model").strip("_-") or "quantized" if quantized else "float32",
        native=None,
        max_tokens=_configured_context(folder) or CONTEXT.get(profile.name),
        profile=profile,
    )


def _graph_file(settings: EncoderSettings, path: Path) -> Path:
    if path.suffix == ".onnx" and path.is_file():
        return path
    if path.is_dir():
        places = [path / "onnx" / "model.onnx", path / "model.onnx"]
        for place in places:
            if place.is_file():
                return place
    elif path.exists() or settings.model.startswith((".", "/", "~")) or settings.model.count("/") > 1 or path.suffix == ".onnx":
        raise ModelUnavailable(f"there is no ONNX model at {settings.model}")
    elif "/" in settings.model:
        token = settings.token.get_secret_value() if settings.token else None
        needed, also = ["onnx/model.onnx", TOKENIZER], ["onnx/model.onnx_data", "*config*.json"]
        graph = fetch_files(settings.model, needed, also, revision=settings.revision, token=token) / "onnx" / "model.onnx"
        if graph.is_file():
            return graph
    raise ModelUnavailable(
        f"{settings.model} has no onnx/model.onnx. Make an ONNX folder of it, once, with sentence-transformers installed: "
        f"gemma-rag export {settings.model} --to onnx --out FOLDER, and give model='FOLDER'; for EmbeddingGemma there is "
        "also model='onnx-community/embeddinggemma-300m-ONNX'"
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _configured_prompts(folder: Path) -> dict[str, str]:
    prompts = _read_json(folder / "config_sentence_transformers.json").get("prompts")
    return prompts if isinstance(prompts, dict) else {}


def _configured_context(folder: Path) -> int | None:
    for file, field in (("sentence_bert_config.json", "max_seq_length"), ("config.json", "max_position_embeddings")):
        value = _read_json(folder / file).get(field)
        if isinstance(value, int) and 0 < value < 100_000:
            return value
    return None


def _sampled_digest(graph: Path) -> str:
    """Sixteen hexadecimal digits over the sizes and 64 evenly spaced samples of 4 KiB of each of the graph's files."""
    digest = hashlib.sha256()
    for file in sorted(graph.parent.glob(f"{graph.name}*")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for i in range(64):
                stream.seek(size * i // 64)
                digest.update(stream.read(4096))
    return digest.hexdigest()[:16]
