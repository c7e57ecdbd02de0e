"""Evaluations and calibrations as web pages: one file each, which loads nothing and says its figures in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from gemma_rag import plots
from gemma_rag.page import Html, fact_list, section, table, tag, write_page

SHOWN_CATEGORIES = 30
SHOWN_FLIPS = 100

HEADLINES = {
    "recall@1": ("Right document first", "For {of} questions that the collection can answer, the right document comes first."),
    "recall@5": ("Right document in the first 5", "For {of} questions with an answer, it is among the first five."),
    "recall@10": ("Right document in the first 10", "For {of} questions with an answer, it is among the first ten."),
    "mrr@10": (
        "Mean reciprocal rank",
        "First place counts 1, second 1/2, third 1/3, and so on to the tenth; this is the mean.",
    ),
    "ndcg@10": ("Quality of the order", "The first ten have {percent} of the worth that the best possible order would have."),
    "category_accuracy": ("Right category first", "For {of} questions, the category judged best is the right one."),
    "routing_loss": ("Lost by categories", "For {of} questions, the right document was in a category that was not opened."),
    "documents_scored": ("Documents compared", "On average a question was compared with {percent} of the documents."),
    "abstention_auroc": (
        "Knowing when to be silent",
        "Take a question with an answer and one without: for {of} such pairs, the first has the higher score (guessing: 50).",
    ),
    "end_to_end": (
        "Right from end to end",
        "{Of} questions of both kinds end well: right document first, or silence where there is no answer.",
    ),
    "risk_coverage_area": (
        "Mean risk",
        "Answering the surest questions first and stopping anywhere, {of} answers are wrong on average (best: 0).",
    ),
}
"""For each figure of an evaluation, all 0 to 1: its name and its meaning in plain words."""

LOWER_IS_BETTER = frozenset({"routing_loss", "documents_scored", "risk_coverage_area", "false_answers"})
_UNIT = "\N{NO-BREAK SPACE}%"
_NO_SHARES = frozenset({"mrr@10", "ndcg@10", "abstention_auroc", "risk_coverage_area"})

MADE = {
    "dataset": "Data set",
    "split": "Questions judged",
    "n_queries": "Number of questions",
    "n_answerable": "Of these with an answer",
    "model": "Model",
    "mode": "Mode",
    "hybrid": "Words searched too (hybrid)",
    "router": "Router",
    "thresholds_chosen_on": "Thresholds chosen on",
    "seconds": "Seconds",
}


def write_report(result: Mapping[str, Any], path: Path) -> None:
    """Write the page of one evaluation.

    Args:
        result: Plain JSON. Each key may be missing or null, and its part of the page is then left out. Shares are 0 to 1.

            - The keys of `MADE`: how it was made. Further texts and numbers are listed with them.
            - The keys of `HEADLINES`, and under ``intervals`` for each ``[low, high]`` (95 %).
            - ``auroc_by_kind``: for each kind of question without an answer.
            - ``operating_point``: ``rule``, ``threshold``, ``coverage``, ``false_answers``, ``precision``, ``statement``.
            - ``curves``: ``risk_coverage`` (lists ``coverage``, ``risk``), ``roc`` and ``precision_recall`` (``x``, ``y``).
            - ``answer_scores``: for each kind of question a list of scores.
            - ``per_category``: rows of ``name``, ``questions``, ``recall@1``, ``routing_loss``.
            - ``comparison``: ``mode`` and ``metrics``, for each ``first`` (this run), ``second`` (that mode),
              ``difference`` (first - second), ``low``, ``high``, ``p_value``.
            - ``worst``: rows of ``question``, ``expected``, ``got``, ``score``.
        path: The file, ``.html``; its folder is made. A failure leaves the old file as it was.

    Raises:
        InputError: The path is a folder, or the numbers of a plot do not fit together.
        MissingExtra: matplotlib is not installed.
    """
    comparison = result.get("comparison") or {}
    other = comparison.get("mode") or "the other run"
    title = f"Evaluation: {_or(result.get('dataset'), 'retrieval')}"
    if result.get("split") is not None:
        title += f", {result['split']} questions"
    body = [
        _headlines(result),
        section("How refusing goes", _refusing(result)),
        section("Plots", _drawn(plots.evaluation_plots(result))),
        section("By category, worst first", _categories(result.get("per_category") or [])),
        section(f"Compared with {other}", _comparison(comparison.get("metrics") or {}, result.get("mode"), other)),
        section("The worst questions", _worst(result.get("worst") or [])),
        section("How it was made", _made(result)),
    ]
    write_page(path, title, body)


def write_calibration_page(result: Mapping[str, Any], path: Path) -> None:
    """Write the page of one calibration.

    Args:
        result: Plain JSON, or arrays in place of its lists. Each key may be missing or null.

            - ``title``, and ``notes``: a list of sentences.
            - ``points``: operating points, each with ``rule``, ``threshold``, ``statement``, and ``coverage``,
              ``precision``, ``false_answers``, ``end_to_end``, each of which may have an ``..._interval`` ``[low, high]``;
              ``chosen``: the rule of the one that was taken.
            - ``stages``: for ``document`` and ``category`` the ``scores`` of the questions, whether each is ``answerable``,
              ``threshold``, ``old_threshold``, and the curves ``roc`` and ``precision_recall`` (lists ``x``, ``y``; a
              question with an answer is a positive).
            - ``reliability``: lists ``predicted``, ``observed``, ``count``, one entry a bin.
            - ``flips``: ``newly_answered`` and ``newly_refused``: rows of ``question``, ``score``, ``answerable``, ``right``.
        path: The file, ``.html``; its folder is made. A failure leaves the old file as it was.

    Raises:
        InputError: The path is a folder, or the numbers of a plot do not fit together.
        MissingExtra: matplotlib is not installed.
    """
    points, chosen = result.get("points") or [], result.get("chosen")
    flips, notes = result.get("flips") or {}, result.get("notes") or []
    body = [
        *(
            tag("p", point["statement"], class_="lead")
            for point in points
            if chosen and point.get("rule") == chosen and point.get("statement")
        ),
        section("Operating points, with 95 % intervals", _points(points, chosen)),
        section("Plots", _drawn(plots.calibration_plots(result))),
        section("Newly answered", _flips(flips.get("newly_answered") or [], answered=True)),
        section("Newly refused", _flips(flips.get("newly_refused") or [], answered=False)),
        section("Notes", tag("ul", *(tag("li", note) for note in notes)) if notes else Html()),
    ]
    write_page(path, _or(result.get("title"), "Calibration"), body)


def save_plots(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the plots of an evaluation or of a calibration as PNG files.

    Args:
        result: As for `write_report` or `write_calibration_page`.
        folder: Where; it is made.

    Returns:
        The files written, in the order of the page: ``scores.png``, ``roc.png``, ``document-roc.png`` and so on.

    Raises:
        InputError: The numbers of a plot do not fit together.
        MissingExtra: matplotlib is not installed.
    """
    drawn = plots.evaluation_plots(result) + plots.calibration_plots(result)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{plot.name}.png" for plot in drawn]
    for plot, file in zip(drawn, files, strict=True):
        plots.save(plot.figure, file)
    return files


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def _percent(value: object) -> str:
    share = _number(value)
    return "" if share is None else f"{100 * share:.1f}{_UNIT}"


def _decimals(value: object) -> str:
    number = _number(value)
    return "" if number is None else f"{number:.3f}"


def _of_100(share: float) -> str:
    whole = round(100 * share)
    if whole == 0 and share > 0:
        return "fewer than 1 of 100"
    return "more than 99 of 100" if whole == 100 and share < 1 else f"{whole} of 100"


def _shown(name: str, value: object) -> str:
    return _decimals(value) if name in _NO_SHARES else _percent(value)


def _signed(name: str, value: object) -> str:
    """A difference: of two shares in percentage points."""
    number = _number(value)
    shown = "" if number is None else f"{number:+.3f}" if name in _NO_SHARES else f"{100 * number:+.1f}"
    return shown.replace("-", "\N{MINUS SIGN}")


def _interval(name: str, interval: Sequence[float | None] | None) -> str:
    low, high = (_shown(name, end) for end in interval or (None, None))
    return f"{low.removesuffix(_UNIT)}\N{EN DASH}{high}" if low and high else ""


def _or(value: object, otherwise: str) -> str:
    return otherwise if value is None else str(value)


def _words(name: str) -> str:
    return name.replace("_", " ").strip()


def _headlines(result: Mapping[str, Any]) -> Html:
    tiles = []
    for name, (label, meaning) in HEADLINES.items():
        share = _number(result.get(name))
        if share is None:
            continue
        of = _of_100(share)
        interval = _interval(name, (result.get("intervals") or {}).get(name))
        tiles.append(
            tag(
                "div",
                tag("h3", label),
                tag("p", _shown(name, share), class_="figure"),
                tag("p", f"95 % interval {interval}", class_="quiet") if interval else None,
                tag("p", meaning.format(of=of, Of=of[0].upper() + of[1:], percent=_percent(share))),
                tag("p", tag("code", name), class_="quiet"),
                class_="card",
            )
        )
    return tag("div", *tiles, class_="tiles") if tiles else Html()


def _refusing(result: Mapping[str, Any]) -> Html:
    point = result.get("operating_point") or {}
    says = [
        f"{_of_100(share)} {meaning}"
        for key, meaning in (
            ("coverage", "questions with an answer are answered"),
            ("false_answers", "questions without an answer get one all the same"),
            ("precision", "answers show the right document first"),
        )
        if (share := _number(point.get(key))) is not None
    ]
    sentence = point.get("statement") or (f"With this threshold, {'; '.join(says)}." if says else None)
    how = [
        ("Threshold", _decimals(point.get("threshold"))),
        ("Rule that chose it", _words(_or(point.get("rule"), ""))),
        ("Chosen on", result.get("thresholds_chosen_on")),
    ]
    kinds = [
        (_words(kind), _decimals(auroc)) for kind, auroc in (result.get("auroc_by_kind") or {}).items() if auroc is not None
    ]
    return Html(
        (tag("p", sentence) if sentence else "")
        + (fact_list(how) if point else "")
        + table(("Questions without an answer", "Told apart from those with one (AUROC)"), kinds)
    )


def _drawn(figures: Sequence[plots.Plot]) -> Html:
    cards = [
        tag(
            "figure",
            tag("figcaption", tag("h3", plot.title), tag("p", plot.caption)),
            Html(plots.svg(plot.figure, plot.name, plot.title)),
            class_="card",
        )
        for plot in figures
    ]
    return tag("div", *cards, class_="plots") if cards else Html()


def _categories(rows: Sequence[Mapping[str, Any]]) -> Html:
    def badness(row: Mapping[str, Any]) -> tuple[float, float, str]:
        recall = _number(row.get("recall@1"))
        return math.inf if recall is None else recall, -(_number(row.get("questions")) or 0), str(row.get("name"))

    shown = [
        (row.get("name"), row.get("questions"), _percent(row.get("recall@1")), _percent(row.get("routing_loss")))
        for row in sorted(rows, key=badness)[:SHOWN_CATEGORIES]
    ]
    return Html(
        table(("Category", "Questions", "Right document first", "Lost by categories"), shown)
        + _rest(len(rows) - SHOWN_CATEGORIES, "categories that did better")
    )


def _rest(count: int, of_what: str) -> Html:
    return tag("p", f"\N{HORIZONTAL ELLIPSIS} and {count:,} more {of_what}", class_="quiet") if count > 0 else Html()


def _comparison(metrics: Mapping[str, Any], mode: object, other: str) -> Html:
    rows = []
    for name, test in ((name, test) for name, test in metrics.items() if test):
        low, high, p = _number(test.get("low")), _number(test.get("high")), _number(test.get("p_value"))
        verdict = None
        if low is not None and high is not None:
            better = high < 0 if name in LOWER_IS_BETTER else low > 0
            verdict = "better" if better else "no clear difference" if low <= 0 <= high else "worse"
        label = HEADLINES[name][0] if name in HEADLINES else _words(name)
        apart = [_signed(name, number) for number in (test.get("difference"), low, high)]
        between = f"{apart[1]} to {apart[2]}" if apart[1] and apart[2] else None
        apart[0] += " points" if apart[0] and name not in _NO_SHARES else ""
        chance = None if p is None else "below 0.001" if p < 0.001 else f"{p:.3f}"
        rows.append(
            (label, verdict, _shown(name, test.get("first")), _shown(name, test.get("second")), apart[0], between, chance)
        )
    headers = (
        "Figure",
        f"{_or(mode, 'This run')} is",
        _or(mode, "This run"),
        other,
        "Difference",
        "95 % interval",
        "p",
    )
    return table(headers, rows, texts=2)


def _worst(rows: Sequence[Mapping[str, Any]]) -> Html:
    def name(value: object) -> object:
        return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value

    shown = [
        (row.get("question"), name(row.get("expected")), name(row.get("got")), _decimals(row.get("score"))) for row in rows
    ]
    return table(("Question", "Expected", "Got", "Score"), shown, texts=3)


def _made(result: Mapping[str, Any]) -> Html:
    others = [name for name, value in result.items() if isinstance(value, (str, int, float)) and name not in MADE | HEADLINES]
    facts = []
    for name in [*MADE, *others]:
        value = result.get(name)
        if isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, (int, float)):
            value = f"{round(value, 3):,}"
        facts.append((MADE.get(name, _words(name)), value))
    return fact_list(facts)


def _points(points: Sequence[Mapping[str, Any]], chosen: object) -> Html:
    names = {
        "coverage": "Answered, of those with an answer",
        "false_answers": "Answered, of those without",
        "precision": "Right, of the answers",
        "end_to_end": "Right from end to end",
    }
    rows = []
    for point in points:
        rule = _words(_or(point.get("rule"), "")) + (" (chosen)" if chosen and point.get("rule") == chosen else "")
        cells = []
        for name in names:
            interval = _interval(name, point.get(f"{name}_interval"))
            cells.append(_percent(point.get(name)) + (f"\n{interval}" if interval else ""))
        rows.append((rule, point.get("statement"), _decimals(point.get("threshold")), *cells))
    best = next((i for i, point in enumerate(points) if chosen and point.get("rule") == chosen), None)
    return table(("Rule", "What it does", "Threshold", *names.values()), rows, texts=2, best=best)


def _flips(rows: Sequence[Mapping[str, Any]], *, answered: bool) -> Html:
    fates = [_fate(row, answered) for row in rows]
    counts = [f"{fate}: {fates.count(fate):,}" for fate in dict.fromkeys(fates) if fate is not None]
    shown = [(row.get("question"), fate, _decimals(row.get("score"))) for row, fate in zip(rows, fates, strict=True)]
    return Html(
        (tag("p", f"{len(rows):,} in all. {'; '.join(counts).capitalize()}.") if counts else "")
        + table(("Question", "What that is", "Score"), shown[:SHOWN_FLIPS], texts=2)
        + _rest(len(rows) - SHOWN_FLIPS, "questions")
    )


def _fate(row: Mapping[str, Any], answered: bool) -> str | None:
    right, answerable = row.get("right"), row.get("answerable")
    if right:
        return "right answer gained" if answered else "right answer lost"
    if answerable is not None and not answerable:
        return "answered though there is no answer" if answered else "rightly silent now"
    if right is not None:
        return "answered from a wrong document" if answered else "no longer answered from a wrong document"
    return None
