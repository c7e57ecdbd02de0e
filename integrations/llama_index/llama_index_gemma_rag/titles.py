r"""The title of a node, found again in the text that LlamaIndex hands over to be embedded.

LlamaIndex writes a node's metadata before its text, a line for each key and then a blank line, and an embedding model is
given the whole and nothing else:

>>> split_title("author: Mei\ntitle: Passwords\n\nReset it in the portal.", "title")
('author: Mei\n\nReset it in the portal.', 'Passwords')

Where the node itself is at hand nothing has to be found again: `NodeText`.
"""

from __future__ import annotations

import re

from llama_index.core.schema import BaseNode, MetadataMode
from typing_extensions import Self

_LINE = re.compile(r"[^\s:](?:[^:\n]|:(?! |$)){0,127}:( .*)?")
"""A line of LlamaIndex's form of metadata, ``key: value``; a key may have colons (``dc:author``), a value may be empty."""
_LONGEST_TITLE = 300
"""Characters. What is longer, and has no other metadata beside it, is a paragraph that begins as a title does."""


class NodeText(str):
    """What LlamaIndex embeds of a node, which remembers what of it is the title.

    Attributes:
        parts: The text without the title, and the title; None where it has none.
    """

    parts: tuple[str, str | None]

    @classmethod
    def of(cls, node: BaseNode, key: str | None) -> Self:
        """The text of a node.

        Args:
            node: The node.
            key: The metadata key of titles; None where titles stay in the text.
        """
        whole = node.get_content(metadata_mode=MetadataMode.EMBED)
        text = cls(whole)
        text.parts = (whole, None)
        if key is not None and key in node.metadata and key not in node.excluded_embed_metadata_keys:
            value = node.metadata[key]
            title = "" if value is None else " ".join(str(value).split())
            others = {"excluded_embed_metadata_keys": [*node.excluded_embed_metadata_keys, key]}
            rest = node.model_copy(update=others).get_content(metadata_mode=MetadataMode.EMBED)
            text.parts = (rest, title or None) if rest.strip() else (title or rest, None)
        return text


def split_title(text: str, key: str) -> tuple[str, str | None]:
    """Take the title out of the metadata that stand before a text.

    The metadata are the lines before the first blank one. The first of them has to be of the form ``key: value``, and so have
    all of them where no text follows; a value of several lines, and a title of several, ends where the next line of that form
    begins. Everything else stays.

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
    if start == len(lines) or not is_field[0] or not (blank or all(is_field)):
        return text, None
    end = next((i for i in range(start + 1, len(lines)) if is_field[i]), len(lines))
    title = " ".join(" ".join(lines[start:end])[len(key) + 1 :].split())
    if len(title) > _LONGEST_TITLE and sum(is_field) == 1:
        return text, None
    title = "" if title == "None" else title  # as LlamaIndex writes a title that is None
    others = "\n".join(lines[:start] + lines[end:])
    rest = f"{others}{blank}{body}" if others else body
    return (rest, title or None) if rest.strip() else (title or text, None)
