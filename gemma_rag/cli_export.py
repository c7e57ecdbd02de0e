"""The command `export`: a model as a folder that opens without torch."""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from gemma_rag.cli_options import Json, print_json, settings_from, terminal_for


class EngineName(str, Enum):
    """The engines that a model can be exported for."""

    ONNX = "onnx"
    OPENVINO = "openvino"


class WeightsName(str, Enum):
    """The number formats of exported weights."""

    FLOAT32 = "float32"
    INT8 = "int8"


def export(
    model: Annotated[str, typer.Argument(help="The model, as for --model of the other commands: a name, an id or a folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write, new or empty.")],
    to: Annotated[EngineName, typer.Option(help="The engine that is to open it.")] = EngineName.OPENVINO,
    precision: Annotated[
        WeightsName, typer.Option(help="Number format of the weights; int8 is a quarter of the size, and faster.")
    ] = WeightsName.FLOAT32,
    prompts: Annotated[
        str | None, typer.Option(help="Prompt profile by name. Default: chosen by the model.", show_default=False)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Context in tokens. Default: all that the model has.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model as a folder for OpenVINO or onnxruntime: faster on a CPU, and no torch to import."""
    from gemma_rag.encoders.export import export_model

    show = terminal_for(as_json)
    settings = settings_from(as_json, model=model, prompts=prompts, max_tokens=max_tokens)
    show.note(f"exporting {model} for {to.value} in {precision.value}; the full-size model takes a minute or two")
    started = time.perf_counter()
    about = export_model(settings, out, to=to.value, precision=precision.value)
    size = sum(size for size, _ in about.files.values())
    if as_json:
        print_json({"folder": str(out), "bytes": size, **about.model_dump(mode="json", exclude={"files"})})
        return
    found = about.agreement
    typer.echo(f"{out}: {about.model} for {about.runtime}, {about.precision}, {size / 1e6:.0f} MB, {about.native} dimensions")
    typer.echo(
        f"agrees with its source to a cosine of {found.smallest_cosine:.4f} or more ({found.texts} texts, "
        f"mean {found.mean_cosine:.4f}); {time.perf_counter() - started:.0f} s"
    )
    typer.echo(f"use it: GemmaEmbeddings(model={str(out)!r}), or gemma-rag index SOURCE --model {out} --out KB")
