"""What people see in a terminal: answers and reports, laid out with rich."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from gemma_rag.answer import Answer
from gemma_rag.bulk import Progress
from gemma_rag.ingestion import IndexReport
from gemma_rag.results import Outcome

if TYPE_CHECKING:
    from gemma_rag.calibrating import CalibrationReport
    from gemma_rag.evaluation import Evaluation
    from gemma_rag.fitting import FitReport

_PASSAGE = 240
"""Characters of a passage that are shown under a citation."""


_MUCH = 0.1
"""Share of deleted rows from which on `info` says how to get rid of them."""


class Terminal:
    """Prints answers on standard output and notes on standard error.

    Args:
        quiet: Print nothing at all.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._out = Console(highlight=False, quiet=quiet)
        self._notes = Console(stderr=True, highlight=False, quiet=quiet, style="dim")

    def note(self, message: str) -> None:
        """A line about what is going on."""
        self._notes.print(escape(message), soft_wrap=True)

    def error(self, message: str) -> None:
        """A line about what went wrong."""
        self._notes.print(escape(message), style="red", soft_wrap=True)

    def model(self, name: str | None) -> None:
        """Which model runs."""
        self.note(f"model: {name}" if name else "model: none, words are matched (BM25)")

    def questions(self) -> Iterator[str]:
        """Questions typed by the user, until an empty line, ``exit``, or the end of the input."""
        self.note("An empty line ends.")
        while True:
            try:
                line = self._out.input("[bold cyan]?[/] ").strip()
            except EOFError:
                return
            if line in {"", "exit", "quit", ":q"}:
                return
            yield line

    def heading(self, question: str, remark: str) -> None:
        """A question, above its answer."""
        self._out.print()
        self._out.print(f"[dim]{escape(remark)}[/]")
        self._out.print(f"[bold cyan]?[/] [bold]{escape(question)}[/]", soft_wrap=True)

    def answering(self, parts: Iterable[str | Answer]) -> Answer:
        """An answer as it is being written; a piece waits for the next one, since a refusal looks different.

        Args:
            parts: What `GroundedAnswerer.stream` yields.
        """
        held = ""
        rest = iter(parts)
        while not isinstance(part := next(rest), Answer):
            self._out.print(escape(held), end="", soft_wrap=True)
            held = part
        self.answer(part, rest=held if part.kind == "generated" else None)
        return part

    def answer(self, answer: Answer, *, rest: str | None = None) -> None:
        """An answer with its citations, or a refusal with what came closest.

        Args:
            answer: The answer.
            rest: What is to be added to its text, which stands there already; None where nothing of it does.
        """
        if answer.outcome is Outcome.ANSWERED:
            if rest is None:
                self._out.print(Padding(escape(answer.text), (0, 0, 0, 2)))
            else:
                self._out.print(escape(rest), soft_wrap=True)
            self._citations(answer)
        else:
            self._out.print(Padding(f"[yellow]{escape(answer.text)}[/]  [dim]({answer.outcome.value})[/]", (0, 0, 0, 2)))
            self._closest(answer)
        self._how(answer)

    @contextlib.contextmanager
    def progress(self) -> Iterator[Callable[[Progress], None]]:
        """A line that says how far indexing is, with its rate and the time left; on a terminal only."""
        columns = (
            TextColumn("{task.completed:,.0f} documents"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=self._notes, transient=True, disable=not self._notes.is_terminal) as bar:
            task = bar.add_task("", total=None, rate="")

            def show(progress: Progress) -> None:
                total = progress.done / progress.share if progress.share else None
                speed = bar.tasks[0].speed
                rate = f"{speed:,.1f}/s" if speed else ""
                bar.update(task, completed=progress.done, total=total, rate=rate)

            yield show

    def indexed(self, report: IndexReport) -> None:
        """What indexing did."""
        parts = [f"{report.added} added", f"{report.updated} updated", f"{report.unchanged} unchanged"]
        if report.deleted:
            parts.append(f"{report.deleted} deleted")
        self._out.print(
            f"[bold]{escape(str(report.path))}[/]: {report.documents} documents in {report.categories} categories, "
            f"{report.chunks} chunks of {report.dimensions} dimensions ({', '.join(parts)}; {report.seconds:.1f} s)",
            soft_wrap=True,
        )
        if report.bad:
            self.error(f"{report.bad} bad rows were skipped" + (", the first:" if report.bad > 20 else ":"))
            for row in report.skipped[:20]:
                self.error(f"  {row}")

    def info(self, about: dict[str, Any]) -> None:
        """What a knowledge base holds."""
        space = about["space"]
        rows = {
            "documents": f"{about['documents']} in {len(about['categories'])} categories, {about['chunks']} chunks",
            "model": f"{space['model']}, {space['dimensions']} dimensions, {space['max_tokens']} tokens, {space['precision']}",
            "space": about["fingerprint"][:16],
            "generation": str(about["generation"]),
        }
        engine, stored = about["engine"], f"{(about['bytes'] or 0) / 1e6:.1f} MB"
        if engine["name"] == "faiss":
            segments = "1 segment" if about["segments"] == 1 else f"{about['segments']} segments"
            dead = f", {about['stale']:.0%} of the rows deleted: gemma-rag compact" if about["stale"] >= _MUCH else ""
            rows["on disk"] = f"{stored} in {segments}{dead}; checksums right"
        else:
            rows["engine"] = f"{engine['name']} at {engine['uri']}, collection {engine['collection']}"
        if plan := about["plan"]:
            rows["plan"] = f"{plan['dimensions']} components, {plan['oversampling']} times as many documents ranked as wanted"
        if ranking := about["learned"]["ranking"]:
            router = f"router {ranking['router_weight']:g}" if ranking["router_weight"] else "no router"
            rows["order"] = f"learned from {ranking['questions']} questions: words {ranking['lexical_weight']:g}, {router}"
        if calibration := about["learned"]["calibration"]:
            kinds = ", ".join(f"{kind} by {item['rule'].replace('_', '-')}" for kind, item in calibration["kinds"].items())
            rows["thresholds"] = f"{'estimated without labels' if calibration['estimated'] else 'calibrated'}: {kinds}"
        facts = Table.grid(padding=(0, 2))
        for name, value in rows.items():
            facts.add_row(f"[dim]{name}[/]", escape(value))
        self._out.print(f"[bold]{escape(str(about['path']))}[/]", soft_wrap=True)
        self._out.print(Padding(facts, (0, 0, 1, 2)))
        table = Table(box=None, padding=(0, 2), header_style="dim")
        table.add_column("category")
        table.add_column("documents", justify="right")
        table.add_column("description", overflow="fold")
        for category in about["categories"]:
            table.add_row(escape(category["name"]), str(category["documents"]), escape(category["description"]))
        self._out.print(table)

    def fitted(self, report: FitReport) -> None:
        """What fitting found."""
        router = f"a router with weight {report.router_weight:g}" if report.router_weight else "no router: it did not help"
        self._out.print(
            f"Fitted on {report.questions} questions: lexical weight {report.lexical_weight:g}, {router}.\n"
            f"Mean reciprocal rank at 10, on questions held out: {report.before:.3f} before, {report.after:.3f} now.",
            soft_wrap=True,
        )
        for note in report.notes:
            self.note(note)

    def calibrated(self, report: CalibrationReport) -> None:
        """What calibrating found: the chosen operating point of each kind of search, and the others beside it."""
        for kind, item in report.calibration.kinds.items():
            self._out.print(f"[bold]{kind} search[/]", soft_wrap=True)
            self._out.print(Padding(escape(item.document.statement), (0, 0, 1, 2)))
            table = Table(box=None, padding=(0, 2), header_style="dim")
            for name in ("rule", "threshold", "answered", "right of those", "false answers", "end to end"):
                table.add_column(name, justify="left" if name == "rule" else "right")
            for point in (item.document, *item.points):
                cells = (point.coverage, point.precision, point.false_answers, point.end_to_end)
                shown = ["-" if value is None else f"{100 * value:.1f} %" for value in cells]
                style = "bold" if point is item.document else "dim"
                table.add_row(point.rule.replace("_", "-"), f"{point.threshold:.3f}", *shown, style=style)
            self._out.print(table)
        for note in report.notes:
            self.note(note)

    def evaluated(self, found: Evaluation) -> None:
        """The numbers of an evaluation, with their intervals, and beside another one where there is one."""
        result = found.result
        how = [
            result["mode"],
            *(["hybrid"] if result["hybrid"] else []),
            *(["learned"] if result["router"] == "learned" else []),
        ]
        self._out.print(
            f"[bold]{escape(result['dataset'])}[/], {result['split']}: {result['n_queries']} questions, "
            f"{result['n_answerable']} of them answerable; {' '.join(how)}, {escape(result['model'])}, "
            f"{result['seconds']:.1f} s",
            soft_wrap=True,
        )
        numbers = [name for name in result if name in result["intervals"] or name == "risk_coverage_area"]
        compared = result.get("comparison")
        table = Table(box=None, padding=(0, 1), header_style="dim")
        for name in ("", "value", "95 % interval", *([compared["mode"], "difference", "p"] if compared else [])):
            table.add_column(name, justify="right" if name else "left", no_wrap=True)
        for name in numbers:
            if result.get(name) is None:
                continue
            low, high = result["intervals"].get(name, (None, None))
            row = [name, f"{result[name]:.3f}", "" if low is None else f"{low:.3f}-{high:.3f}"]
            if compared and (test := compared["metrics"].get(name)):
                row += [f"{test['second']:.3f}", f"{test['difference']:+.3f}", f"{test['p_value']:.3f}"]
            table.add_row(*row)
        self._out.print(Padding(table, (0, 0, 0, 2)))
        for kind, value in result["auroc_by_kind"].items():
            refused = result["refused_by_kind"].get(kind)
            said = f", {100 * refused:.0f} % refused" if refused is not None else ""
            self._out.print(f"  [dim]{escape(kind)}: AUROC {value:.3f}{said}[/]", soft_wrap=True)
        for note in result["notes"]:
            self.note(note)

    def _citations(self, answer: Answer) -> None:
        for citation in answer.citations:
            hit = answer.retrieval.hits[citation.number - 1]
            kind = "match" if answer.retrieval.mode == "lexical" else "cosine"
            sure = "" if hit.probability is None else f" · {100 * hit.probability:.0f} % sure"
            self._out.print(
                f"  [bold]\\[{citation.number}][/] {escape(citation.title or citation.id)}  "
                f"[dim]{escape(citation.category)} · {kind} {hit.score:.2f}{sure}[/]",
                soft_wrap=True,
            )
            if answer.kind == "generated":
                passage = " ".join(citation.quote.split())
                shown = passage if len(passage) <= _PASSAGE else passage[:_PASSAGE].rstrip() + " ..."
                self._out.print(Padding(f"[dim]{escape(shown)}[/]", (0, 0, 0, 6)))
        if answer.unknown_citations:
            made_up = ", ".join(f"[{number}]" for number in answer.unknown_citations)
            self.error(f"The model cites {made_up}, which it was not given: do not trust these statements.")
        elif answer.kind == "generated" and not answer.citations:
            self.error("The model cites no source: check its answer.")

    def _closest(self, answer: Answer) -> None:
        retrieval = answer.retrieval
        if retrieval.near_misses:
            miss = retrieval.near_misses[0]
            short = f"{miss.score:.2f}, {miss.margin:.2f} short of the threshold"
            if retrieval.thresholds["acts_on"] == "evidence":
                short = f"cosine {miss.score:.2f}; its evidence is {miss.margin:.2f} short"
            self._out.print(
                f"  [dim]closest: {escape(miss.document.title or miss.document.id)} ({short})[/]",
                soft_wrap=True,
            )
        elif retrieval.categories and answer.outcome is Outcome.CATEGORY_BELOW_THRESHOLD:
            best = retrieval.categories[0]
            self._out.print(
                f"  [dim]closest category: {escape(best.name)} ({best.score:.2f}; threshold "
                f"{retrieval.thresholds['category']})[/]",
                soft_wrap=True,
            )

    def _how(self, answer: Answer) -> None:
        retrieval = answer.retrieval
        opened = [category.name for category in retrieval.categories if category.kept]
        parts = [f"{answer.kind}" if answer.outcome is Outcome.ANSWERED else "refused"]
        if retrieval.mode == "lexical":
            parts.append("words matched")
        elif opened:
            shown = ", ".join(opened[:3]) + (f" and {len(opened) - 3} more" if len(opened) > 3 else "")
            parts.append(f"opened {shown}")
        of = "" if retrieval.documents_total is None else f" of {retrieval.documents_total}"
        parts.append(f"{retrieval.documents_scored}{of} documents compared")
        parts.append(f"{retrieval.timings_ms['total']:.0f} ms")
        self._out.print(f"  [dim]{escape(' · '.join(parts))}[/]", soft_wrap=True)
        for note in retrieval.notes:
            self.note(note)
