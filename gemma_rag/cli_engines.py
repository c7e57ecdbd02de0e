"""The commands about where and how vectors are kept: `copy`, `plan`, `compact`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_rag.cli_options import (
    BaseFolder,
    Collection,
    EngineName,
    EngineOption,
    Json,
    Uri,
    address_from,
    print_json,
)
from gemma_rag.errors import InputError

if TYPE_CHECKING:
    from gemma_rag.copying import CopyReport
    from gemma_rag.index.planning import PlanReport, Trial


def copy(
    knowledge_base: BaseFolder,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The folder of the copy. Default: KB-ENGINE, beside it.", show_default=False),
    ] = None,
    engine: EngineOption = EngineName.FAISS,
    uri: Uri = None,
    collection: Collection = None,
    batch: Annotated[int, typer.Option(min=1, help="Documents that are written together.")] = 1_000,
    as_json: Json = False,
) -> None:
    """Copy a knowledge base to another engine, without embedding again. Stopped on the way, it goes on when called again."""
    from gemma_rag.copying import copy_knowledge_base
    from gemma_rag.knowledge_base import KnowledgeBase

    address = address_from(engine, uri, collection)
    folder = out if out is not None else _beside(knowledge_base, engine.value)
    with KnowledgeBase.open(knowledge_base) as base, _bar(as_json) as progress:
        report = copy_knowledge_base(base, folder, address, batch=batch, progress=progress)
    if as_json:
        print_json(report.to_json())
    else:
        _show_copy(report)


def plan(
    knowledge_base: BaseFolder,
    questions: Annotated[
        Path | None,
        typer.Option(
            help="A .jsonl file with a question on each line, to measure with. Default: titles of the documents.",
            show_default=False,
        ),
    ] = None,
    target_overlap: Annotated[
        float, typer.Option(help="Share of the exact search's best documents that has to be found, above 0 to 1.")
    ] = 0.99,
    keep: Annotated[bool, typer.Option("--keep/--dry-run", help="Search by the plan from now on, or only measure.")] = True,
    exact: Annotated[bool, typer.Option("--exact", help="Forget the plan: search exactly from now on.")] = False,
    as_json: Json = False,
) -> None:
    """Measure by how few components of a vector the same documents are found, and search so from now on."""
    from gemma_rag.knowledge_base import KnowledgeBase

    if exact and (questions is not None or not keep):
        raise InputError("--exact measures nothing: leave the other options out")
    with KnowledgeBase.open(knowledge_base) as base:
        if exact:
            base.use_plan(None)
            report = None
        else:
            asked = None if questions is None else _read_questions(questions)
            report = base.plan(target_overlap=target_overlap, questions=asked, keep=keep)
    if as_json:
        print_json({"plan": None} if report is None else report.to_json())
    elif report is None:
        typer.echo("The opened categories are searched exactly.")
    else:
        _show_plan(report, keep=keep)


class Tails(str, Enum):
    """`gemma_rag.index.compressed.Precision`, for the command line's help."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"


def compact(
    knowledge_base: BaseFolder,
    tails: Annotated[
        Tails | None,
        typer.Option(
            help="Store all but the first 128 components of vectors in this from now on; there is no way back. Cosines are off "
            "by up to about 2e-5 (float16) or 1e-3 (int8). Default: as they are.",
            show_default=False,
        ),
    ] = None,
    graphs_above: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Build a graph (extra faiss) over each category of more chunks than this, for searches by a plan; 0: none. "
            "Default: as before.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Forget what was deleted, and put together what many commits have scattered."""
    from gemma_rag.knowledge_base import KnowledgeBase

    with KnowledgeBase.open(knowledge_base) as base:
        before = _bytes(knowledge_base)
        segments = len(base.manifest.segments)
        base.compact(tails=None if tails is None else tails.value, graphs_above=graphs_above)
        now = base.manifest
    about = {
        "documents": now.documents,
        "generation": now.generation,
        "segments": {"before": segments, "after": len(now.segments)},
        "tails": now.tails,
        "graphs": sum(len(item.graphs) for item in now.segments),
        "bytes": {"before": before, "after": _bytes(knowledge_base)},
    }
    if as_json:
        print_json(about)
        return
    sizes = f"; segments {segments} -> {len(now.segments)}, {before / 1e6:.1f} -> {_bytes(knowledge_base) / 1e6:.1f} MB"
    typer.echo(f"{knowledge_base}: {now.documents} documents{sizes if now.engine.name == 'faiss' else ''}")


# -- inside -----------------------------------------------------------------------------------------------------------


def _beside(folder: Path, engine: str) -> Path:
    folder = folder.absolute()
    return folder.with_name(f"{folder.name}-{engine}")


@contextmanager
def _bar(quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on standard error, for people only."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("copying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("copying", total=None)

        def tell(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield tell


def _show_copy(report: CopyReport) -> None:
    at = report.engine
    where = "" if at.uri is None else f" on {at.name} at {at.uri}, collection {at.collection}"
    deleted = f", {report.deleted} deleted" if report.deleted else ""
    typer.echo(
        f"{report.out}{where}: {report.documents} documents in {report.categories} categories, {report.chunks} chunks "
        f"({report.copied} copied{deleted}; {report.seconds:.1f} s)"
    )
    typer.echo(f"Read again and compared: counts and checksum {report.content_sha256[:16]} are those of the source.")


def _show_plan(report: PlanReport, *, keep: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2), header_style="dim")
    for name in ("components", "shortlist", f"overlap@{report.k}", "p50 ms", "p95 ms", "MB read"):
        table.add_column(name, justify="right", no_wrap=True)
    for trial in (report.exact, *report.trials):
        table.add_row(*_cells(trial, report), style="bold" if trial.plan == report.plan else "dim")
    Console(highlight=False).print(table)
    typer.echo(report.why)
    if not keep:
        typer.echo("Nothing was changed (--dry-run).")


def _cells(trial: Trial, report: PlanReport) -> list[str]:
    if trial.plan is None:
        first = [str(report.dimensions), "exact"]
    else:
        first = [str(trial.plan.dimensions), f"{trial.plan.oversampling} x {report.wanted}"]
    return [
        *first,
        f"{trial.overlap:.4f}",
        f"{trial.p50_ms:.2f}",
        f"{trial.p95_ms:.2f}",
        f"{trial.bytes_read / 1e6:.2f}",
    ]


def _read_questions(file: Path) -> list[str]:
    """The questions of a .jsonl file; labels beside them are passed over."""
    import json

    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the questions {file} cannot be read: {error}") from None
    asked = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        question = row.get("question") if isinstance(row, dict) else row
        if not isinstance(question, str) or not question.strip():
            raise InputError(f"{file}:{number}: each line is an object with a question, as in " + '{"question": "Who ...?"}')
        asked.append(question)
    if not asked:
        raise InputError(f"{file} has no question")
    return asked


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
