"""The plots of the reports, drawn by matplotlib: as SVG that takes the colours of its page, or as files.

Figures are made through matplotlib's object interface, so that nobody's pyplot state or style is touched, and the same
numbers always give the same picture.
"""

from __future__ import annotations

import contextlib
import html
import importlib.util
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gemma_rag.errors import InputError, MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET, LINE = "#1c2430", "#5a6675", "#d5dae1"
SERIES = ("#2b6cb0", "#c2570c", "#7b4bb3", "#0f766e", "#b83267")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1, 1.5, 1)), (0, (3, 3)))
"""Each series has a colour and a dash: print without colour, and eyes that see few colours, can tell them apart."""

BINS = 40

Floats: TypeAlias = npt.NDArray[np.float64]

_ON_A_PAGE = {INK: "currentColor", QUIET: "var(--quiet)", LINE: "var(--line)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)
}
_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.figsize": (4.5, 3.3),
    "font.size": 10.0,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "savefig.dpi": 160,
    "svg.fonttype": "none",
    "svg.hashsalt": "gemma-rag",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.color": QUIET,
    "ytick.labelcolor": INK,
}


def histogram(
    groups: Mapping[str, npt.ArrayLike], lines: Mapping[str, float] | None = None, *, xlabel: str = "score"
) -> Figure:
    """Scores of several groups of questions over the same bins, each as shares of its own group.

    Args:
        groups: For each group its scores, shape ``(n,)``; None and NaN, a question without a score, are left out, and
            so is a group without any score.
        lines: Upright lines, thresholds for example, each with its name.
        xlabel: What the scores are.

    Returns:
        A figure.

    Raises:
        InputError: There is no score at all.
        MissingExtra: matplotlib is not installed.
    """
    scores = {name: finite(values) for name, values in groups.items()}
    scores = {name: values[~np.isnan(values)] for name, values in scores.items() if not np.isnan(values).all()}
    if not scores:
        raise InputError("a histogram needs at least one score, and got none")
    low, high = min(v.min() for v in scores.values()), max(v.max() for v in scores.values())
    margin = 0.05 if high - low < 1e-6 else 0.0
    edges = np.linspace(low - margin, high + margin, BINS + 1)
    with _figure(xlabel, "share of the group") as (figure, axes):
        for i, (name, values) in enumerate(scores.items()):
            share = np.histogram(values, edges)[0] / len(values)
            colour, dash = SERIES[i % len(SERIES)], DASHES[i % len(DASHES)]
            axes.stairs(share, edges, fill=True, color=colour, alpha=0.16)
            axes.stairs(share, edges, color=colour, linestyle=dash, linewidth=1.6, label=f"{name} ({len(values):,})")
        for i, (name, value) in enumerate((lines or {}).items()):
            axes.axvline(value, color=INK, linestyle=DASHES[i % len(DASHES)], linewidth=1.4, label=f"{name} {value:.3f}")
        _percent(axes, x=False)
        figure.legend(loc="outside upper left", ncols=2)
    return figure


def curve(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    xlabel: str,
    ylabel: str,
    point: tuple[float, float] | None = None,
    guessing: bool = False,
    whole: bool = True,
) -> Figure:
    """A curve of one share over another.

    Args:
        x: Shares, shape ``(n,)``, 0 to 1, in the order of the curve.
        y: Shares, shape ``(n,)``, 0 to 1.
        xlabel: What x is.
        ylabel: What y is.
        point: Where the threshold in use stands, marked with a dot.
        guessing: Also draw the diagonal, which scores without any worth would give in a ROC plot.
        whole: Show y up to 1, else only as far as the curve goes.

    Returns:
        A figure.

    Raises:
        InputError: x and y differ in length, or have fewer than two points.
        MissingExtra: matplotlib is not installed.
    """
    across, up = finite(x), finite(y)
    if across.shape != up.shape or len(across) < 2:
        raise InputError(f"a curve needs as many x as y, at least 2, and got {len(across)} and {len(up)}")
    with _figure(xlabel, ylabel) as (figure, axes):
        axes.plot(across, up, color=SERIES[0])
        if guessing:
            axes.plot([0, 1], [0, 1], color=QUIET, linestyle=DASHES[4], linewidth=1.2, label="guessing")
        if point is not None:
            axes.plot(*point, "o", color=SERIES[1], markersize=8, label="the threshold in use", clip_on=False)
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02 if whole else None)
        _percent(axes)
        if guessing or point is not None:
            figure.legend(loc="outside upper left", ncols=2)
    return figure


def reliability(predicted: npt.ArrayLike, observed: npt.ArrayLike, count: npt.ArrayLike) -> Figure:
    """A reliability diagram: of the questions given some probability of a right answer, how many had one.

    Args:
        predicted: Mean probability of each bin, shape ``(bins,)``, 0 to 1.
        observed: Share of right answers of each bin, 0 to 1; bins with None or NaN here or above are left out.
        count: Questions of each bin, which the area of its dot shows; bins with none are left out.

    Returns:
        A figure.

    Raises:
        InputError: The three differ in length, or no bin holds a question.
        MissingExtra: matplotlib is not installed.
    """
    across, up, weight = finite(predicted), finite(observed), finite(count)
    if not across.shape == up.shape == weight.shape:
        raise InputError(
            f"a reliability diagram needs as many predicted as observed and count: {len(across)}, {len(up)}, {len(weight)}"
        )
    used = np.isfinite(across) & np.isfinite(up) & (weight > 0)
    if not used.any():
        raise InputError("a reliability diagram needs at least one bin with a question, and got none")
    with _figure("probability given", "share that was right") as (figure, axes):
        axes.plot([0, 1], [0, 1], color=QUIET, linestyle=DASHES[4], linewidth=1.2, label="as promised")
        axes.plot(across[used], up[used], color=SERIES[0], linewidth=1.2)
        axes.scatter(
            across[used], up[used], s=16 + 160 * weight[used] / weight[used].max(), color=SERIES[0], alpha=0.7, zorder=3
        )
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        _percent(axes)
        figure.legend(loc="outside upper left")
    return figure


def finite(values: npt.ArrayLike | None) -> Floats:
    """A list of numbers as float64 of shape ``(n,)``, with NaN for null and infinite ones; None is an empty list.

    Raises:
        InputError: It is no flat list of numbers.
    """
    try:
        array = np.asarray([] if values is None else values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"a plot needs lists of numbers: {error}") from error
    if array.ndim != 1:
        raise InputError(f"a plot needs flat lists of numbers, and got an array of shape {array.shape}")
    return np.where(np.isfinite(array), array, np.nan)


@dataclass(frozen=True)
class Plot:
    """A figure with what a report says about it.

    Attributes:
        name: Lower-case letters, digits and hyphens: the name of its file.
        title: The heading.
        caption: How to read it, in a sentence or two.
        figure: The figure.
    """

    name: str
    title: str
    caption: str
    figure: Figure


def evaluation_plots(result: Mapping[str, Any]) -> list[Plot]:
    """The plots of one evaluation, of the form that `gemma_rag.report.write_report` takes; what it lacks is left out.

    Raises:
        InputError: A list of numbers is none, or a curve does not fit together.
        MissingExtra: matplotlib is not installed.
    """
    plots: list[Plot] = []
    point = result.get("operating_point") or {}
    groups = {name.replace("_", " ").strip(): scores for name, scores in (result.get("answer_scores") or {}).items()}
    if any(np.isfinite(finite(scores)).any() for scores in groups.values()):
        caption = "The less the groups overlap, the better a threshold can tell them apart. " + _SHARES
        lines = _lines({"threshold": point.get("threshold")})
        plots.append(Plot("scores", "Scores by kind of question", caption, histogram(groups, lines)))
    curves = result.get("curves") or {}
    caption = "The surest questions are answered first. The lower the line starts and the longer it stays low, the better."
    title = "Wrong answers by how much is answered"
    plots += _curve(curves.get("risk_coverage"), "coverage", "risk", "risk-coverage", title, caption, **_RISK)
    across, up = point.get("false_answers"), point.get("coverage")
    return plots + _curves(curves, "", "", None if across is None or up is None else (across, up), None)


def calibration_plots(result: Mapping[str, Any]) -> list[Plot]:
    """The plots of one calibration, of the form that `gemma_rag.report.write_calibration_page` takes.

    Raises:
        InputError: A list of numbers is none, or lists that belong together differ in length.
        MissingExtra: matplotlib is not installed.
    """
    plots: list[Plot] = []
    stages = {name: stage for name, stage in (result.get("stages") or {}).items() if stage}
    for name, stage in stages.items():
        file, title = f"{re.sub('[^a-z0-9]+', '-', name.lower())}-", f"{name.replace('_', ' ').capitalize()} stage: "
        known = stage.get("scores") is not None and stage.get("answerable") is not None
        scores, answerable = (finite(stage["scores"]), finite(stage["answerable"]) == 1) if known else _NO_QUESTIONS
        if scores.shape != answerable.shape:
            raise InputError(f"stage {name!r} has {len(scores)} scores and {len(answerable)} labels: each question needs both")
        if np.isfinite(scores).any():
            groups = {"has an answer": scores[answerable], "has none": scores[~answerable]}
            lines = _lines({"threshold": stage.get("threshold"), "old threshold": stage.get("old_threshold")})
            caption = "Questions to the right of the threshold pass. " + _SHARES
            plots.append(Plot(f"{file}scores", f"{title}scores", caption, histogram(groups, lines)))
        plots += _curves(stage, file, title, *_standing(scores, answerable, stage.get("threshold")))
    bins = result.get("reliability") or {}
    if np.nansum(finite(bins.get("count"))) > 0:
        caption = "On the dashed line a probability keeps its word: of the questions given 0.8, 80 in 100 are right. "
        caption += "Larger dots stand for more questions."
        figure = reliability(bins.get("predicted", []), bins.get("observed", []), bins["count"])
        plots.append(Plot("reliability", "Do the probabilities keep their word?", caption, figure))
    return plots


_SHARES = "The bars of each group add up to 100\N{NO-BREAK SPACE}%."
_RISK = {"xlabel": "share of questions answered", "ylabel": "share of answers that are wrong", "whole": False}
_ROC = {"xlabel": "passing, of those without an answer", "ylabel": "passing, of those with one", "guessing": True}
_PRECISION = {"xlabel": "recall", "ylabel": "precision"}
_NO_QUESTIONS = (np.zeros(0), np.zeros(0, dtype=bool))

_Point: TypeAlias = "tuple[float, float] | None"


def _curves(curves: Mapping[str, Any], file: str, title: str, roc: _Point, precision: _Point) -> list[Plot]:
    caption = "Each point is a threshold. The nearer the line comes to the upper left corner, the better the scores tell apart."
    plots = _curve(curves.get("roc"), "x", "y", f"{file}roc", f"{title}ROC curve", caption, **_ROC, point=roc)
    caption = "Recall: how many of the questions with an answer pass. Precision: how many of those that pass have one."
    name, heading = f"{file}precision-recall", f"{title}precision and recall"
    return plots + _curve(curves.get("precision_recall"), "x", "y", name, heading, caption, **_PRECISION, point=precision)


def _curve(
    numbers: Mapping[str, Any] | None, x: str, y: str, name: str, title: str, caption: str, **options: Any
) -> list[Plot]:
    """A list of one plot, or of none where there are no numbers."""
    across, up = (numbers or {}).get(x), (numbers or {}).get(y)
    if across is None or up is None or not max(len(across), len(up)):
        return []
    return [Plot(name, title[:1].upper() + title[1:], caption, curve(across, up, **options))]


def _standing(scores: Floats, answerable: npt.NDArray[np.bool_], threshold: float | None) -> tuple[_Point, _Point]:
    """Where a threshold stands in the ROC and in the precision-recall plot; None where that is not defined."""
    if threshold is None or not answerable.any():
        return None, None
    passing = scores >= threshold
    recall = float(passing[answerable].mean())
    roc = None if answerable.all() else (float(passing[~answerable].mean()), recall)
    return roc, (recall, float(answerable[passing].mean())) if passing.any() else None


def _lines(lines: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in lines.items() if value is not None and np.isfinite(value)}


def svg(figure: Figure, name: str, description: str) -> str:
    """A figure as an ``<svg>`` element to stand in an HTML page.

    It is transparent, its ink is the text's colour, and the others are the CSS variables ``--quiet``, ``--line`` and
    ``--series-0`` to ``--series-4``; text stays text, in the font of the page.

    Args:
        figure: The figure.
        name: Letters, digits and hyphens, each name once a page: it keeps the ids of the page's figures apart.
        description: Read aloud in place of the picture.

    Returns:
        Markup.
    """
    text = _rendered(figure, "svg").decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)  # it would style the page
    viewbox = re.search(r'viewBox="[^"]*"', text)
    head = f'<svg class="plot" {viewbox.group() if viewbox else ""} role="img" aria-label="{html.escape(description)}"'
    text = re.sub(r"<svg[^>]*", lambda _: head, text, count=1)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r' id="', f' id="{name}-', text)
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', text).replace("url(#", f"url(#{name}-")
    for colour, variable in _ON_A_PAGE.items():
        text = text.replace(colour, variable)
    return text


def save(figure: Figure, path: Path) -> None:
    """Write a figure to a file, ``.png`` (at 160 dots per inch, on white) or ``.svg``; a failure leaves the old file.

    Raises:
        InputError: The name of the file ends otherwise.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in {"png", "svg"}:
        raise InputError(f"a plot is written to a .png or an .svg file, not to {path.name!r}")
    scratch = path.with_name(f"{path.name}.new")
    scratch.write_bytes(_rendered(figure, kind))
    scratch.replace(path)


def _rendered(figure: Figure, kind: str) -> bytes:
    stream = io.BytesIO()
    silent = {"Software": None} if kind == "png" else dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with _style():
        figure.savefig(stream, format=kind, metadata=silent, transparent=kind == "svg")
    return stream.getvalue()


def _percent(axes: Axes, *, x: bool = True) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if x:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))


@contextlib.contextmanager
def _figure(xlabel: str, ylabel: str) -> Iterator[tuple[Figure, Axes]]:
    with _style():
        from matplotlib.figure import Figure

        figure = Figure()
        axes = figure.add_subplot()
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        yield figure, axes


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """Our style in place of the user's, who gets theirs back."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("matplotlib, which draws the plots,", "eval")
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # in an SVG the reader's fonts count
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield
