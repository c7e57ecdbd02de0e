"""The command line: `gemma-rag demo`, `index`, `ask`, `info`, `verify`, `export`, `fit`, `calibrate`, `eval`, `copy` and so on.

Exit status: 0 answered or done, 3 refused, 2 bad usage or input, 1 a fault. Answers go to standard output, everything
else to standard error; with ``--json`` standard output holds one JSON object and nothing else.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from gemma_rag import __version__
from gemma_rag.cli_engines import compact, copy, plan
from gemma_rag.cli_export import export
from gemma_rag.cli_index import index, pairs
from gemma_rag.cli_learning import calibrate, evaluate, fit
from gemma_rag.cli_models import verify
from gemma_rag.cli_options import (
    BaseFolder,
    Json,
    Model,
    RuntimeName,
    RuntimeOption,
    Url,
    print_json,
    settings_from,
    terminal_for,
)
from gemma_rag.errors import GemmaRagError, InputError, without_secrets

ANSWERED, FAULT, BAD_INPUT, REFUSED = 0, 1, 2, 3

# typer brings click along under a name of its own since 0.22, and needs click itself before that
_USAGE_ERRORS: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    name="gemma-rag",
    help="Ask your own documents, on EmbeddingGemma: right vectors, two-stage retrieval, honest refusals.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class ModeName(str, Enum):
    """`gemma_rag.retriever.Mode`, for the command line's help."""

    AUTO = "auto"
    TWO_STAGE = "two-stage"
    FLAT = "flat"
    LEXICAL = "lexical"


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gemma-rag {__version__}")
        raise typer.Exit(ANSWERED)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand after any command.")] = False,
) -> None:
    """Shared options."""


@app.command()
def demo(
    model: Model = None,
    runtime: RuntimeOption = RuntimeName.AUTO,
    url: Url = None,
    out: Annotated[Path | None, typer.Option(help="Keep the knowledge base in this new folder.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Build a knowledge base from the sample handbook and ask it seven questions."""
    from gemma_rag.demo import run_demo

    show = terminal_for(as_json)
    answers = run_demo(settings_from(as_json, model=model, runtime=runtime, url=url), out, show)
    if as_json:
        print_json({"answers": [answer.to_json() for answer in answers]})


app.command()(index)


@app.command()
def ask(
    knowledge_base: BaseFolder,
    question: Annotated[str | None, typer.Argument(help="The question.", show_default=False)] = None,
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Ask one question after another.")] = False,
    llm: Annotated[
        str | None,
        typer.Option(
            help="Write the answer with a language model: provider:model of LangChain (ollama:gemma3), or "
            "transformers:FOLDER_OR_ID. Default: quote the best sentences.",
            show_default=False,
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Most hits.")] = 4,
    category_threshold: Annotated[
        str | None, typer.Option(help="A cosine, a preset, or dynamic. Default: the model's.", show_default=False)
    ] = None,
    document_threshold: Annotated[
        str | None, typer.Option(help="A cosine, a preset, or dynamic. Default: the model's.", show_default=False)
    ] = None,
    mode: Annotated[
        ModeName, typer.Option(help="auto: two-stage, or by matching words (lexical) where the model cannot read.")
    ] = ModeName.AUTO,
    hybrid: Annotated[bool, typer.Option("--hybrid/--dense", help="Order hits by cosine and matching words together.")] = True,
    max_categories: Annotated[int | None, typer.Option(help="Most categories to open.", show_default=False)] = None,
    category: Annotated[
        list[str] | None, typer.Option(help="Search this category only; repeatable.", show_default=False)
    ] = None,
    where: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of the metadata; repeatable.", show_default=False)] = None,
    url: Annotated[
        str | None, typer.Option(help="Where the server that embeds is now. Default: where it was.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask a knowledge base a question."""
    if interactive == (question is not None):
        raise InputError("give a question, or --interactive to ask several")
    if interactive and as_json:
        raise InputError("--json prints one object, and --interactive gives many answers: use one of them")
    from gemma_rag.answer import GroundedAnswerer
    from gemma_rag.knowledge_base import KnowledgeBase
    from gemma_rag.retriever import TwoStageRetriever

    show = terminal_for(as_json)
    options: dict[str, Any] = {"categories": category or None, "where": _where(where or [])}
    embeddings = None if url is None else _moved(knowledge_base, url, as_json)
    with KnowledgeBase.open(knowledge_base, embeddings) as base:
        retriever = TwoStageRetriever(
            base,
            k=k,
            category_threshold=_threshold(category_threshold),
            document_threshold=_threshold(document_threshold),
            mode=mode.value,
            hybrid=hybrid,
            max_categories=max_categories,
        )
        answerer = GroundedAnswerer(retriever, _load_llm(llm))
        show.model(base.space.model if mode is not ModeName.LEXICAL else None)
        if question is not None:
            answer = show.answering(answerer.stream(question, **options))
            if as_json:
                print_json(answer.to_json())
            raise typer.Exit(ANSWERED if answer.outcome.value == "answered" else REFUSED)
        if mode is not ModeName.LEXICAL:
            _ = base.encoder.space  # loaded now, so that the first answer does not wait for it
        for line in show.questions():
            try:
                show.answering(answerer.stream(line, **options))
            except InputError as error:
                show.error(str(error))


@app.command()
def info(knowledge_base: BaseFolder, as_json: Json = False) -> None:
    """Say what a knowledge base holds, after checking every file of it."""
    from gemma_rag.ingestion import describe_base
    from gemma_rag.knowledge_base import KnowledgeBase

    show = terminal_for(as_json)
    with KnowledgeBase.open(knowledge_base, verify=True) as base:
        about = describe_base(base)
    if as_json:
        print_json(about)
    else:
        show.info(about)


app.command()(verify)
app.command()(export)
app.command()(fit)
app.command()(calibrate)
app.command(name="eval")(evaluate)
app.command()(copy)
app.command()(plan)
app.command()(compact)

# -- reading options ----------------------------------------------------------------------------------------------------


def _threshold(text: str | None) -> float | str | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _moved(knowledge_base: Path, url: str, as_json: bool) -> Any:
    """The encoder that a knowledge base was built with, at the server's new address."""
    from gemma_rag.encoders import load_encoder
    from gemma_rag.storage.manifest import read_manifest

    return load_encoder(settings_from(as_json, **{**read_manifest(knowledge_base).recipe, "url": url}))


def _where(items: Sequence[str]) -> dict[str, Any] | None:
    """Metadata to filter on; ``year=2024`` means the number as well as the text, which a CSV file would have."""
    where: dict[str, Any] = {}
    for key, text in pairs(items, "--where").items():
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        where[key] = [*(value if isinstance(value, list) else [value]), text]
    return where or None


def _load_llm(name: str | None) -> Any:
    if name is None:
        return None
    from gemma_rag.llms import load_llm

    return load_llm(name)


def _fail(message: str, status: int, as_json: bool) -> int:
    if as_json:
        print_json({"error": message})
    sys.stderr.write(f"gemma-rag: {message}\n")
    return status


def run(arguments: Sequence[str]) -> int:
    """Run a command.

    Args:
        arguments: What stands after ``gemma-rag``.

    Returns:
        The exit status.
    """
    words = list(arguments)
    options = words[: words.index("--")] if "--" in words else words
    debug, as_json = "--debug" in options, "--json" in options
    if debug:
        words.remove("--debug")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)
    try:
        status = app(words, prog_name="gemma-rag", standalone_mode=False)
        sys.stdout.flush()
    except _USAGE_ERRORS as error:
        return _fail(f"{error.format_message()} See: gemma-rag --help", BAD_INPUT, as_json)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("stopped", 130, as_json)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has left; there is nobody to tell
        return FAULT
    except InputError as error:
        if debug:
            raise
        return _fail(str(error), BAD_INPUT, as_json)
    except GemmaRagError as error:
        if debug:
            raise
        return _fail(str(error), FAULT, as_json)
    except Exception as error:
        if debug:
            raise
        message = f"{type(error).__name__}: {without_secrets(str(error))}. --debug shows where it comes from"
        return _fail(message, FAULT, as_json)
    return status if isinstance(status, int) else ANSWERED


def main() -> NoReturn:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
