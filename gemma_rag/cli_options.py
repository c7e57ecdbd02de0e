"""What the commands share: options, and how they print."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_rag.errors import InputError

if TYPE_CHECKING:
    from gemma_rag.storage import EngineAddress

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="embeddinggemma (the default), embeddinggemma-2, minilm (offline, English), an id on the hub, or a folder.",
        show_default=False,
    ),
]


class RuntimeName(str, Enum):
    """`gemma_rag.encoders.settings.Runtime`, for the command line's help."""

    AUTO = "auto"
    SENTENCE_TRANSFORMERS = "sentence-transformers"
    ONNX = "onnx"
    OPENVINO = "openvino"
    OLLAMA = "ollama"
    TEI = "tei"
    OPENAI = "openai"


RuntimeOption = Annotated[
    RuntimeName,
    typer.Option("--runtime", help="What computes the vectors. auto: an exported folder's engine, else sentence-transformers."),
]
Url = Annotated[str | None, typer.Option(help="Address of the server, as http://localhost:11434.", show_default=False)]
TokenizerOption = Annotated[
    str | None,
    typer.Option("--tokenizer", help="A tokenizer.json or its folder, to count a server's tokens with.", show_default=False),
]
Cache = Annotated[Path | None, typer.Option(help="Keep vectors in this folder: no text is computed twice.", show_default=False)]
Dimensions = Annotated[int | None, typer.Option(help="Matryoshka dimension: 768, 512, 256 or 128.", show_default=False)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps. Default: the best there is.", show_default=False)]
Labelled = Annotated[Path, typer.Argument(help="A .jsonl file: question and relevant, a list of ids, on each line.")]
Split = Annotated[str | None, typer.Option(help="Use the questions of this split only.", show_default=False)]
BaseFolder = Annotated[Path, typer.Argument(metavar="KB", help="The folder of the knowledge base.")]


class EngineName(str, Enum):
    """`gemma_rag.storage.manifest.EngineName`, for the command line's help."""

    FAISS = "faiss"
    MILVUS = "milvus"
    CHROMA = "chroma"


EngineOption = Annotated[
    EngineName,
    typer.Option("--engine", help="What keeps the vectors. faiss: the folder itself; milvus, chroma: that database."),
]
Uri = Annotated[
    str | None,
    typer.Option(
        "--uri",
        help="Where the database is: http://host:port, or the file (milvus) or folder (chroma) of an embedded one. A token "
        "comes from GEMMA_RAG_MILVUS_TOKEN or GEMMA_RAG_CHROMA_TOKEN.",
        show_default=False,
    ),
]
Collection = Annotated[
    str | None,
    typer.Option("--collection", help="What it is called in the database. Default: a name of its own.", show_default=False),
]


def address_from(engine: EngineName, uri: str | None, collection: str | None) -> EngineAddress:
    """Where the vectors go, from the options that were given.

    Raises:
        InputError: They do not go together, or the uri has a password in it.
    """
    from pydantic import ValidationError

    from gemma_rag.storage import EngineAddress

    if uri is not None and "://" not in uri:
        uri = str(Path(uri).absolute())  # the folder remembers it, and will be opened from elsewhere too
    try:
        return EngineAddress(name=engine.value, uri=uri, collection=collection)
    except ValidationError as error:
        raise InputError("; ".join(str(e["msg"]).removeprefix("Value error, ") for e in error.errors())) from None


def settings_from(as_json: bool, **given: Any) -> Any:
    """The encoder's settings, from the options that were given."""
    from pydantic import ValidationError

    from gemma_rag.encoders import EncoderSettings

    plain = {name: value.value if isinstance(value, Enum) else value for name, value in given.items()}
    values = {name: value for name, value in plain.items() if value is not None}
    try:
        return EncoderSettings(**values, show_progress=not as_json)
    except ValidationError as error:
        raise InputError("; ".join(_problem(e) for e in error.errors())) from None


def _problem(error: Any) -> str:
    option = f"--{str(error['loc'][0]).replace('_', '-')}: " if error["loc"] else ""
    return option + str(error["msg"]).removeprefix("Value error, ")


def terminal_for(as_json: bool) -> Any:
    """Where people read; quiet where a program does."""
    from gemma_rag.terminal import Terminal

    return Terminal(quiet=as_json)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on standard output."""
    unicode = "utf" in (sys.stdout.encoding or "").lower()
    sys.stdout.write(json.dumps(value, ensure_ascii=not unicode, indent=2, allow_nan=False) + "\n")
