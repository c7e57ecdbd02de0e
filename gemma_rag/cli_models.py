"""The commands about models themselves: `verify`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_rag.cli_options import (
    Device,
    Dimensions,
    Json,
    Model,
    RuntimeName,
    RuntimeOption,
    TokenizerOption,
    Url,
    print_json,
    settings_from,
    terminal_for,
)
from gemma_rag.errors import InputError, MissingExtra, ModelUnavailable

if TYPE_CHECKING:
    from gemma_rag.encoders import EncoderSettings, Space
    from gemma_rag.verify import Reference

VERIFIED, NOT_VERIFIED = 0, 3


def verify(
    named: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="The model, as for --model.", show_default=False)
    ] = None,
    model: Model = None,
    runtime: RuntimeOption = RuntimeName.AUTO,
    url: Url = None,
    tokenizer: TokenizerOption = None,
    dimensions: Dimensions = None,
    untrained_dimensions: Annotated[bool, typer.Option(help="Allow dimensions that the model was not trained for.")] = False,
    device: Device = None,
    precision: Annotated[
        str | None, typer.Option(help="Number format of the computation: float32, bfloat16, float16.", show_default=False)
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Prompt profile by name, of the reference too. Default: chosen by the model.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Context in tokens, of the reference too. Default: the model's.", show_default=False)
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="FILE_OR_MODEL",
            help="What is right: a file that --write made, or a model for sentence-transformers. Default: the same model.",
            show_default=False,
        ),
    ] = None,
    bound_of: Annotated[
        str | None,
        typer.Option(
            help="Precision whose bound holds: float32, bfloat16, int8 ... Default: the encoder's.", show_default=False
        ),
    ] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Make a reference file of the model, and leave.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that every vector is the one that the model should give; name what is wrong. Exit status 3: it is not."""
    if named is not None and model is not None and named != model:
        raise InputError(f"two models are given, {named} and {model}: give one")
    given = {
        "runtime": None if runtime is RuntimeName.AUTO else runtime,
        "url": url,
        "tokenizer": tokenizer,
        "dimensions": dimensions,
        "untrained_dimensions": untrained_dimensions or None,
        "device": device,
        "precision": precision,
    }
    common = {"model": named or model, "prompts": prompts, "max_tokens": max_tokens}
    if write is not None:
        options = {**given, "reference": reference, "bound_of": bound_of}
        if unused := [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]:
            raise InputError(
                f"a reference is made of MODEL by sentence-transformers, in float32 and whole: leave {', '.join(unused)} out"
            )
        _write(settings_from(as_json, **common), write, as_json)
        return
    settings = settings_from(as_json, **common, **given)
    from gemma_rag.encoders import load_encoder
    from gemma_rag.verify import Reference
    from gemma_rag.verify import verify as compare

    show = terminal_for(as_json)
    known = Reference.load(reference) if reference is not None and _is_file(reference) else None
    encoder = load_encoder(settings)
    if known is None:
        show.note("computing what is right, with sentence-transformers")
        known = _reference(reference, settings, encoder.space)
    with _without_warnings():
        found = compare(encoder, known, precision=bound_of)
    if as_json:
        print_json(found.to_json())
    else:
        typer.echo(found.report())
    raise typer.Exit(VERIFIED if found.passed else NOT_VERIFIED)


def _write(settings: EncoderSettings, file: Path, as_json: bool) -> None:
    from gemma_rag.verify import Reference

    if not file.parent.is_dir():
        raise InputError(f"there is no folder {file.parent} to write {file.name} to")
    made = Reference.from_model(settings)
    made.save(file)
    about: dict[str, Any] = {"written": str(file), "texts": len(made.right), "reference": made.space.model_dump()}
    if as_json:
        print_json(about)
    else:
        typer.echo(f"wrote {file}: {len(made.right)} texts, {made.space.dimensions} dimensions of {made.space.model}")


def _is_file(reference: str) -> bool:
    return reference.endswith(".npz") or Path(reference).expanduser().is_file()


def _reference(wanted: str | None, settings: EncoderSettings, space: Space) -> Reference:
    from gemma_rag.encoders import EncoderSettings
    from gemma_rag.verify import Reference

    model = wanted or _same_model(settings, space)
    try:
        return Reference.from_model(EncoderSettings(model=model, prompts=settings.prompts, max_tokens=settings.max_tokens))
    except (MissingExtra, ModelUnavailable) as error:
        if wanted is not None:
            raise
        raise ModelUnavailable(
            f"there is nothing to compare {space.model} with: {error}\nGive --reference FILE: a file that `gemma-rag verify "
            "MODEL --write FILE` made where the model is; or --reference MODEL, a folder of the model"
        ) from error


def _same_model(settings: EncoderSettings, space: Space) -> str:
    """The name by which sentence-transformers finds the model that a server or an exported folder has."""
    from gemma_rag.encoders.models import OFFLINE_MODEL, SHORT_NAMES
    from gemma_rag.encoders.settings import REMOTE

    if settings.runtime not in REMOTE and (Path(settings.model).expanduser() / "modules.json").is_file():
        return settings.model
    name, _, tag = space.model.rpartition("/")[2].lower().partition(":")
    if name == "all-minilm-l6-v2" or (name == "all-minilm" and not tag.startswith("33m")):  # Ollama's 33m is the L12 model
        return OFFLINE_MODEL
    if space.model.count("/") != 1 and settings.model.count("/") == 1:
        return settings.model  # a server may leave the owner out of a model's name
    return SHORT_NAMES.get(name, space.model)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Some of the texts are too long, or bring their prompt, on purpose: no warnings of that."""
    logger = logging.getLogger("gemma_rag.encoders.text_encoder")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
