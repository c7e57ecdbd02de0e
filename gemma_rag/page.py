"""One web page: its markup, its tables, its frame and its style.

Whatever comes from the data is escaped: `tag` takes any text for text, and only what is `Html` for markup.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from gemma_rag.errors import InputError
from gemma_rag.storage.files import replace_file


class Html(str):
    """Markup, which is not escaped again; empty where there is nothing to show."""

    __slots__ = ()


def tag(name: str, *content: object, **attributes: str) -> Html:
    """An HTML element. Content other than `Html` is text and is escaped, None is left out; ``class_`` means ``class``."""
    inner = "".join(part if isinstance(part, Html) else html.escape(str(part)) for part in content if part is not None)
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{written}>{inner}</{name}>")


def section(heading: str, *content: Html) -> Html:
    """A section with a heading, or nothing if there is nothing in it."""
    return tag("section", tag("h2", heading), *content) if any(content) else Html()


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], texts: int = 1, *, best: int | None = None) -> Html:
    """A table without the columns that are empty; the first `texts` columns hold words, the others numbers."""
    columns = [i for i in range(len(headers)) if any(row[i] not in (None, "") for row in rows)]
    if not columns:
        return Html()
    kinds = {i: "words" if i < texts else "number" for i in columns}
    head = tag("tr", *(tag("th", headers[i], class_=kinds[i], scope="col") for i in columns))
    body = [
        tag(
            "tr",
            *(tag("td", row[i], class_=kinds[i], data_label=headers[i]) for i in columns),
            **({"class_": "best"} if n == best else {}),
        )
        for n, row in enumerate(rows)
    ]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="card scroll")


def fact_list(facts: Sequence[tuple[str, object]]) -> Html:
    """Names with their values; those without a value are left out."""
    known = [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts if value not in (None, "")]
    return tag("dl", *known, class_="card") if known else Html()


def write_page(path: Path, title: str, body: Sequence[Html]) -> None:
    """Write a whole page.

    Args:
        path: The file; its folder is made. A failure leaves the old file as it was.
        title: In the heading and in the browser's tab.
        body: The parts below the heading; empty ones are left out.

    Raises:
        InputError: The path is a folder.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder, and the page needs a file: write to {path / 'report.html'}, for example")
    page = _PAGE.format(title=html.escape(title), style=_STYLE, body="\n".join(part for part in body if part))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, page.encode("utf-8", "replace").decode("utf-8"))  # half a surrogate pair cannot be written


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --quiet: #5a6675; --line: #d5dae1; --page: #f4f6f8; --card: #fff;
  --best: #e4eefa; --series-0: #2b6cb0; --series-1: #c2570c; --series-2: #7b4bb3; --series-3: #0f766e; --series-4: #b83267; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e5e9ef; --quiet: #a0abb9; --line: #3a434f; --page: #12161b; --card: #1b2128; --best: #21344b;
    --series-0: #6fb0f2; --series-1: #f39b57; --series-2: #bd9bf0; --series-3: #4bc8b6; --series-4: #f28ab4; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
main { max-width: 70rem; margin: auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1.25rem; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .75rem; }
h3 { font-size: .95rem; margin: 0; }
p { margin: .25rem 0 .75rem; max-width: 46rem; }
ul { margin: 0; padding-left: 1.25rem; }
.quiet, dt, figcaption p { color: var(--quiet); font-size: .85rem; }
.lead { font-size: 1.1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .9rem 1rem; margin: 0 0 1rem; }
.tiles, .plots, dl { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--cell)), 1fr)); }
.tiles { --cell: 15rem; } .plots { --cell: 26rem; } dl { --cell: 13rem; } dd { margin: 0; }
.tiles .card, .plots .card { margin: 0; }
.tiles p { margin: .25rem 0 0; font-size: .9rem; }
.tiles .figure { font-size: 1.9rem; font-weight: 650; line-height: 1.2; }
.plot { display: block; width: 100%; max-width: 34rem; height: auto; margin: auto; }
.plot * { stroke-linejoin: round; } .plot text { fill: currentColor; }
.scroll { overflow-x: auto; padding: 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .5rem .8rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
th { color: var(--quiet); font-weight: 600; vertical-align: bottom; border: 0; }
td.words { min-width: 7.5rem; } td.number { white-space: pre; } th { overflow-wrap: normal; }
.number { text-align: right; } .number, .figure { font-variant-numeric: tabular-nums; }
tr.best { background: var(--best); }
@media screen and (max-width: 52rem) { th, td { padding: .5rem .4rem; } }
@media screen and (max-width: 40rem) {
  thead { display: none; } table, tbody, tr { display: block; } tr { padding: .6rem 1rem; border-top: 1px solid var(--line); }
  tr:first-child { border: 0; } td { display: block; padding: .1rem 0; border: 0; } td:empty { display: none; }
  td.number { display: flex; justify-content: space-between; gap: 1rem; }
  td::before { content: attr(data-label) ": "; color: var(--quiet); text-align: left; white-space: normal; } }
@media print {
  body { background: none; font-size: 10pt; } .plots { --cell: 16rem; }
  table { font-size: .8rem; } th, td { padding: .3rem .5rem; } .card, tr { break-inside: avoid; }
  .card.scroll { overflow: visible; break-inside: auto; }
  h2, h3 { break-after: avoid; } }
"""
