"""Draws what `search.py` measured: how costs grow with the documents, and with the share of them that is opened.

usage: python benchmarks/search_pictures.py [FILE.json]
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pictures import BLUE, GREEN, INK, LINE, ORANGE, QUIET, WIDTH, Picture

RESULTS = Path(__file__).parent / "results" / "search.json"
LEFT, RIGHT, TOP = 62, WIDTH - 40, 76


class Curve(NamedTuple):
    """Points, as pairs of numbers above 0, and what they are."""

    name: str
    colour: str
    points: list[tuple[float, float]]


def chart(
    file: str, title: str, below: str, ticks: list[tuple[float, str]], unit: Callable[[float], str], *curves: Curve
) -> None:
    """Curves over two logarithmic scales.

    Args:
        file: Its name in docs/images.
        title: What it shows, in a sentence.
        below: What the horizontal scale is.
        ticks: Of the horizontal scale.
        unit: A value of the vertical scale in words.
        curves: One to four.
    """
    picture = Picture(336, title)
    drawn = [curve for curve in curves if curve.points]
    x_low, x_high = np.log10(ticks[0][0]), np.log10(ticks[-1][0])
    values = np.log10([y for curve in drawn for _, y in curve.points])
    y_low, y_high = np.floor(values.min()), np.ceil(values.max())
    bottom = 282

    def across(x: float) -> float:
        return float(LEFT + (np.log10(x) - x_low) / (x_high - x_low) * (RIGHT - LEFT))

    def up(y: float) -> float:
        return float(bottom - (np.log10(y) - y_low) / (y_high - y_low) * (bottom - TOP))

    for power in range(int(y_low), int(y_high) + 1):
        y = up(10.0**power)
        picture.line(LEFT, y, RIGHT, y, stroke=LINE)
        picture.text(LEFT - 8, y + 4, unit(10.0**power), size=11, fill=QUIET, text_anchor="end")
    for value, words in ticks:
        picture.line(across(value), bottom, across(value), bottom + 4, stroke=QUIET)
        picture.text(across(value), bottom + 19, words, size=11, fill=QUIET, text_anchor="middle")
    picture.text((LEFT + RIGHT) / 2, bottom + 40, below, size=12, fill=QUIET, text_anchor="middle")
    for i, curve in enumerate(drawn):
        x, y = 24 + 226 * (i % 2), 28 + 20 * (i // 2)
        picture.line(x, y - 4, x + 20, y - 4, stroke=curve.colour)
        picture.text(x + 27, y, curve.name, size=12)
        places = [(across(px), up(py)) for px, py in curve.points]
        for (x1, y1), (x2, y2) in itertools.pairwise(places):
            picture.line(x1, y1, x2, y2, stroke=curve.colour)
        for px, py in places:
            picture.box(px - 2.5, py - 2.5, 5, 5, fill=curve.colour)
    picture.save(file)


def _ms(value: float) -> str:
    return f"{value:g} ms" if value < 1000 else f"{value / 1000:g} s"


def growth(result: dict[str, Any]) -> None:
    """Latency and build time against the number of documents."""
    sizes = {int(size): each for size, each in result["sizes"].items()}
    powers = result["exponents"]

    def curve(name: str, key: str, colour: str, of: Callable[[dict[str, Any]], float]) -> Curve:
        return Curve(f"{name}: n^{powers[key]:.2f}", colour, [(size, of(each)) for size, each in sizes.items()])

    chart(
        "search-growth.svg",
        "How the time for a question and for building grows with the number of documents.",
        "documents",
        [(10.0**power, f"{10**power:,}") for power in range(4, int(np.ceil(np.log10(max(sizes)))) + 1)],
        _ms,
        curve("question, as planned", "question, planned", GREEN, lambda each: each["serve"]["planned"]["p50_ms"]),
        curve("question, exact", "question, exact", BLUE, lambda each: each["serve"]["exact"]["p50_ms"]),
        curve("question, everything", "flat search", ORANGE, lambda each: each["serve"]["flat, exact"]["p50_ms"]),
        curve("building", "build", INK, lambda each: each["build"]["build"] * 1e3),
    )


def shares(result: dict[str, Any]) -> None:
    """Latency against the share of the documents in the opened categories."""
    points = result["shares"]["points"]

    def curve(name: str, colour: str, *, plan: bool) -> Curve:
        return Curve(name, colour, [(100 * each["share"], each["p50_ms"]) for each in points if each["plan"] is plan])

    chart(
        "search-shares.svg",
        "How the time for a question grows with the share of documents in the opened categories.",
        f"share of {result['documents']:,} documents that is opened",
        [(0.1, "0.1 %"), (1.0, "1 %"), (10.0, "10 %"), (100.0, "100 %")],
        _ms,
        curve("question, as planned", GREEN, plan=True),
        curve("question, exact", BLUE, plan=False),
    )


def main() -> None:
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    result = json.loads(file.read_text(encoding="utf-8"))
    growth(result)
    shares(result)


if __name__ == "__main__":
    main()
