"""The code blocks of the Markdown pages, for the tests that run, check and parse them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent

_FENCE = re.compile(r"^( *)```(.*)$")
_COMMENT = re.compile(r"^ *<!-- *(.*?) *-->$")


def _pages() -> Iterator[Path]:
    yield from sorted(ROOT.glob("*.md"))
    for page in sorted((ROOT / "docs").rglob("*.md")):
        if page.parent != ROOT / "docs/cookbook":  # made from the notebooks, which have tests of their own
            yield page
    yield ROOT / "cookbook/README.md"
    yield from sorted((ROOT / "integrations").glob("**/README.md"))


PAGES = list(_pages())
"""The Markdown pages that people read, those of the site and those beside it."""


def name_of(page: Path) -> str:
    """A page's path in the repository, for the names of tests."""
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: The file.
        line: The line of its first line of code, from 1.
        language: What stands behind the fence, ``""`` where nothing does.
        code: What it holds, without the indentation of the fence.
        note: The HTML comment on the line before the fence, ``""`` where there is none: ``type-checked: REASON`` for Python
            that cannot run here, ``raises`` for Python whose error is the block that follows, ``prints`` for Python whose
            output is the block that follows.
    """

    page: Path
    line: int
    language: str
    code: str
    note: str

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    found: list[Block] = []
    opened: tuple[int, str, str] | None = None
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        fence = _FENCE.match(line)
        if fence is None or (opened is not None and (fence[2] or fence[1] != opened[1])):
            continue
        if opened is None:
            opened = number, fence[1], fence[2].strip()
            continue
        start, _, info = opened
        before = _COMMENT.match(lines[start - 1]) if start else None
        code = textwrap.dedent("\n".join(lines[start + 1 : number])) + "\n"
        found.append(Block(page, start + 2, info.split(" ")[0].strip("{}."), code, before[1] if before else ""))
        opened = None
    assert opened is None, f"{name_of(page)}:{opened[0] + 1}: a fence that nothing closes" if opened else ""
    return found


def python_blocks(page: Path) -> list[Block]:
    """The Python of a page, in order."""
    return [block for block in blocks_of(page) if block.language in ("python", "py")]
