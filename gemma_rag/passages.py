"""The sentences of a passage."""

from __future__ import annotations

import re

from gemma_rag.chunking import find_headings


def sentences(passage: str) -> list[str]:
    """The sentences of a passage: Markdown's headings left out, list items and table rows taken one by one."""
    blocks: list[str] = []
    running = False
    for heading in reversed(find_headings(passage)):
        passage = f"{passage[: heading.start]}\n{passage[heading.end :]}"
    for line in passage.splitlines():
        stripped = line.strip()
        if not stripped or stripped.startswith(("```", "---", "|-", "| -")):
            running = False
            continue
        item = re.match(r"(?:[-*+•]|\d{1,3}[.)])\s+|\d{1,3}、\s*", stripped)
        if running and not item and not stripped.startswith("|"):
            blocks[-1] += " " + stripped
        else:
            blocks.append(stripped[item.end() :] if item else stripped)
        running = True
    found = (part.strip() for block in blocks for part in _SENTENCE_END.split(_EMPHASIS.sub(r"\2", block)))
    return [sentence for sentence in found if re.search(r"\w", sentence)]


_EMPHASIS = re.compile(r"(\*\*|(?<!\w)__|`)(?=\S)(.+?)(?<=\S)\1")
_SENTENCE_END = re.compile(
    r"(?:(?<=[^\s.][.!?])|(?<=[^\s.][.!?][\"'”’)]))\s+(?=[\"'“‘(\[]?[A-Z0-9À-Þ\u3400-\u9fff])|(?<=[。！？；])(?![。！？；」』”’）])"
)
