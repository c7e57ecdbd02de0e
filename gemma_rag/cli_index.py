"""`gemma-rag index`: from a file or a folder of documents to a knowledge base."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from gemma_rag.cli_options import (
    Cache,
    Collection,
    Device,
    Dimensions,
    EngineName,
    Json,
    Model,
    RuntimeName,
    RuntimeOption,
    TokenizerOption,
    Uri,
    Url,
    address_from,
    print_json,
    settings_from,
    terminal_for,
)
from gemma_rag.errors import InputError


class OverflowName(str, Enum):
    """`gemma_rag.encoders.Overflow`, for the command line's help."""

    TRUNCATE = "truncate"
    ERROR = "error"
    AVERAGE = "average"


class PrecisionName(str, Enum):
    """`gemma_rag.encoders.settings.Precision`, for the command line's help."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def index(
    source: Annotated[Path, typer.Argument(help="A .jsonl or .csv file, or a folder of Markdown, HTML and text files.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the knowledge base; made, or added to.")],
    model: Model = None,
    runtime: RuntimeOption = RuntimeName.AUTO,
    url: Url = None,
    tokenizer: TokenizerOption = None,
    cache: Cache = None,
    dimensions: Dimensions = None,
    untrained_dimensions: Annotated[bool, typer.Option(help="Allow dimensions that the model was not trained for.")] = False,
    device: Device = None,
    precision: Annotated[PrecisionName, typer.Option(help="Number format of the computation.")] = PrecisionName.FLOAT32,
    prompts: Annotated[
        str | None, typer.Option(help="Prompt profile by name. Default: chosen by the model.", show_default=False)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Context in tokens. Default: all that the model has.", show_default=False)
    ] = None,
    on_overflow: Annotated[OverflowName, typer.Option(help="For texts beyond the context.")] = OverflowName.TRUNCATE,
    chunk_tokens: Annotated[
        int | None,
        typer.Option(help="Most tokens of a chunk, its prompt and title included. Default: 512.", show_default=False),
    ] = None,
    chunk_overlap: Annotated[
        int | None, typer.Option(help="Tokens that neighbouring chunks share. Default: 0.", show_default=False)
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="FIELD=NAME: the column that holds id, text, title or category; repeatable.", show_default=False),
    ] = None,
    category: Annotated[str | None, typer.Option(help="Category of documents that have none.", show_default=False)] = None,
    categories: Annotated[
        Path | None, typer.Option(help="A .jsonl file with name and description of categories.", show_default=False)
    ] = None,
    encoding: Annotated[str, typer.Option(help="Encoding of the files, for example gbk.")] = "utf-8",
    clean: Annotated[
        list[str] | None,
        typer.Option(help="whitespace, punctuation, urls or emails; repeatable. Nothing by default.", show_default=False),
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Go on without bad rows, and say how many.")] = False,
    dead_letter: Annotated[
        Path | None,
        typer.Option(help="Go on without bad rows, and write them into this .jsonl file, anew each time.", show_default=False),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Delete documents that are no longer in SOURCE.")] = False,
    batch: Annotated[
        int | None,
        typer.Option(help="Documents of a commit. Default: what takes ten seconds to a minute.", show_default=False),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that embed, each with its own model. Default: this one.", show_default=False)
    ] = None,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Embed on a Ray cluster, on one GPU for each actor where there are any.")
    ] = False,
    engine: Annotated[
        EngineName | None,
        typer.Option(help="What keeps the vectors: faiss (the folder), milvus or chroma. Default: faiss.", show_default=False),
    ] = None,
    uri: Uri = None,
    collection: Collection = None,
    as_json: Json = False,
) -> None:
    """Build a knowledge base, or bring one up to date: only what changed is embedded.

    Every commit is a checkpoint: what was stopped is started again with the same command, and goes on.
    """
    from gemma_rag.ingestion import index_source

    show = terminal_for(as_json)
    with show.progress() as on_progress:
        report = index_source(
            source,
            out,
            settings=settings_from(
                as_json,
                model=model,
                runtime=runtime,
                url=url,
                tokenizer=tokenizer,
                cache=cache,
                dimensions=dimensions,
                untrained_dimensions=untrained_dimensions,
                device=device,
                precision=precision.value,
                prompts=prompts,
                max_tokens=max_tokens,
                on_overflow=on_overflow.value,
            ),
            chosen_model=model is not None,
            chunk_tokens=chunk_tokens,
            chunk_overlap=chunk_overlap,
            columns=pairs(column or [], "--column"),
            category=category,
            categories=categories,
            encoding=encoding,
            clean=clean or [],
            skip_bad=skip_bad,
            dead_letter=dead_letter,
            replace=replace,
            batch=batch,
            workers=workers,
            distributed=distributed,
            engine=None if engine is None and uri is None else address_from(engine or EngineName.FAISS, uri, collection),
            say=show.note,
            on_progress=on_progress,
        )
    if as_json:
        print_json(report.to_json())
    else:
        show.indexed(report)


def pairs(items: Sequence[str], option: str) -> dict[str, str]:
    """The values by their names, of options as ``--column id=nr``."""
    found = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not (key and equals and value):
            raise InputError(f"{option} takes NAME=VALUE, and got {item!r}")
        found[key] = value
    return found
