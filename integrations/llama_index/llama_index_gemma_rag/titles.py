r"""The title of a node, found again in the text that LlamaIndex hands over to be embedded.

LlamaIndex writes a node's metadata before its text, a line for each key and then a blank line, and an embedding model is
given the whole and nothing else:

>>> split_title("author: Mei\ntitle: Passwords\n\nReset it in the portal.", "title")
('author: Mei\n\nReset it in the portal.', 'Passwords')
"""

from __future__ import annotations

import re

_LINE = re.compile(r"[^\s:](?:[^:\n]|:(?! |$)){0,127}:( .*)?")
"""A line of LlamaIndex's form of metadata, ``key: value``; a key may have colons (``dc:author``), a value may be empty."""
_LONGEST_TITLE = 300
"""Characters. What is longer is a paragraph that begins as a title does."""


def split_title(text: str, key: str) -> tuple[str, str | None]:
    """Take the title out of the metadata that stand before a text.

    The metadata are the lines before the first blank one. Up to the title's own line all of them have to be of the form
    ``key: value``; a title of several lines ends where the next line of that form begins. Everything else stays.

    Args:
        text: What LlamaIndex gives to an embedding model.
        key: The metadata key of titles.

    Returns:
        The text without the title's lines, and the title; the text as it came, and None, where it has none. Of a node that
        has a title and nothing else, the title is the text.
    """
    header, blank, body = text.partition("\n\n")
    lines = header.split("\n")
    is_field = [bool(_LINE.fullmatch(line)) for line in lines]
    start = next((i for i, line in enumerate(lines) if line == f"{key}:" or line.startswith(f"{key}: ")), len(lines))
    if start == len(lines) or not all(is_field[:start]) or not (blank or all(is_field)):
        return text, None
    end = next((i for i in range(start + 1, len(lines)) if is_field[i]), len(lines))
    title = " ".join(" ".join(lines[start:end])[len(key) + 1 :].split())
    if len(title) > _LONGEST_TITLE:
        return text, None
    title = "" if title == "None" else title  # as LlamaIndex writes a title that is None
    others = "\n".join(lines[:start] + lines[end:])
    rest = f"{others}{blank}{body}" if others else body
    return (rest, title or None) if rest.strip() else (title or text, None)
