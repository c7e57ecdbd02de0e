r"""Cutting a document into chunks that an embedding model can read whole, along its headings, paragraphs and sentences.

A chunk is a stretch of the document, given by offsets, together with the headings that it stands under; both are embedded,
so both count towards the limit.

>>> text = "# VPN\n\n" + "Open the portal. " * 5 + "\n\n# Printers\n\nAsk the desk."
>>> document = Document(id="it", text=text, category="IT")
>>> for chunk in Chunker(max_tokens=16).split(document, lambda text: len(text.split()), lambda title: len(title.split())):
...     print(chunk.headings, repr(text[chunk.start : chunk.end]))
('VPN',) '# VPN\n\nOpen the portal. Open the portal. Open the portal. Open the portal.'
('VPN',) 'Open the portal.'
('Printers',) '# Printers\n\nAsk the desk.'
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TypeAlias

from markdown_it import MarkdownIt
from markdown_it.token import Token

from gemma_rag.documents import Chunk, Document
from gemma_rag.errors import InputError

_LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n|\Z)")  # the line ends that CommonMark knows, as markdown-it counts them
_SENTENCE_END = re.compile(r"(?<=[.!?;:])\s+|[。！？；：]\s*|\s*\n\s*")
_WORD_END = re.compile(r"\s+|[，、]")
_CHARACTERS_PER_TOKEN = 8
"""More than tokenizers put into one token on average; where a text does exceed it, the text is counted in full."""

HeadingPath: TypeAlias = tuple[str, ...]
Stretch: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Heading:
    """A Markdown heading.

    Attributes:
        start: Where its line begins in the text, in characters.
        end: Where the next line begins, or for an underlined heading the line after the underline.
        level: 1 for the highest, up to 6.
        text: What it says, without Markdown's marks; "" where it says nothing.
    """

    start: int
    end: int
    level: int
    text: str


def find_headings(text: str) -> list[Heading]:
    """The headings of a Markdown text in their order: ATX (``# ...``) and underlined ones.

    Lines in code fences are not headings; neither are headings inside a quotation or a list, which head nothing that
    comes after.
    """
    markdown = MarkdownIt("commonmark").disable("inline")  # of the inline content we need that of headings alone
    tokens = markdown.parse(text)
    line_starts = list(accumulate((len(line) for line in _LINE.findall(text)), initial=0))
    return [
        Heading(
            start=line_starts[token.map[0]],
            end=line_starts[token.map[1]],
            level=int(token.tag[1:]),
            text=_plain(markdown, tokens[i + 1].content),
        )
        for i, token in enumerate(tokens)
        if token.type == "heading_open" and token.level == 0 and token.map
    ]


def _plain(markdown: MarkdownIt, inline: str) -> str:
    tokens: list[Token] = []
    markdown.inline.parse(inline, markdown, {}, tokens)
    words = "".join(" " if token.type.endswith("break") else token.content for token in tokens if token.type != "html_inline")
    return " ".join(words.split())


@dataclass(frozen=True)
class Chunker:
    """How documents are cut.

    ``Chunker()`` fills chunks up to 512 tokens; ``Chunker(max_tokens=256, overlap=32)`` makes smaller ones, each of which
    repeats up to 32 tokens of the one before.

    Attributes:
        max_tokens: The most tokens of a chunk, its prompt and title included; at least 16.
        overlap: The most tokens that a chunk repeats from the chunk before; less than half of `max_tokens`.

    Raises:
        InputError: A number is out of its range.
    """

    max_tokens: int = 512
    overlap: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 16:
            raise InputError(f"max_tokens is {self.max_tokens}; a chunk needs at least 16 tokens")
        if not 0 <= self.overlap < self.max_tokens // 2:
            raise InputError(
                f"overlap is {self.overlap}; it must be at least 0 and less than half of max_tokens ({self.max_tokens})"
            )

    def split(self, document: Document, count_tokens: Callable[[str], int], overhead: Callable[[str], int]) -> list[Chunk]:
        """Cut a document: not at all where it fits, else at headings, paragraphs, sentences, words, in this order.

        Sections that fit together share a chunk; a section that has to be cut shares none. Chunks overlap within such a
        section only.

        For every chunk ``count_tokens(its text) + overhead(chunk.title(document.title))`` is at most `max_tokens`. Where
        the headings would take more than half of that, the innermost are left out of ``Chunk.headings``. A heading that
        repeats the document's title is left out too. The one exception to the limit is a single character that exceeds
        it alone: characters are never cut.

        Args:
            document: The document.
            count_tokens: The number of tokens of a text, without the tokens that every text gets.
            overhead: The number of tokens that stand around a text of that title: prompt, title and special tokens.

        Returns:
            The chunks in order, at least one. Together they hold every character that is not white space.

        Raises:
            InputError: The title leaves less than half of `max_tokens` for the text.
        """
        text = document.text
        count = _counter(count_tokens, self.max_tokens)
        overhead = lru_cache(maxsize=None)(overhead)
        whole = Chunk(start=len(text) - len(text.lstrip()), end=len(text.rstrip()))
        if count(text[whole.start : whole.end]) + overhead(whole.title(document.title)) <= self.max_tokens:
            return [whole]
        headings = find_headings(text)
        paths, cost = self._heading_paths(document, headings, overhead)
        starts = [heading.start for heading in headings]
        capacity = self.max_tokens - cost
        cutter = _Cutter(text, count, capacity, min(self.overlap, capacity // 2))
        return [
            Chunk(start=start, end=end, headings=paths[bisect_right(starts, start)])
            for start, end in cutter.stretches(headings)
        ]

    def _heading_paths(
        self, document: Document, headings: Sequence[Heading], overhead: Callable[[str], int]
    ) -> tuple[list[HeadingPath], int]:
        """The path before the first heading and after each of them, and the overhead of the most expensive one."""

        def cost(path: HeadingPath) -> int:
            return overhead(Chunk(start=0, end=1, headings=path).title(document.title))

        affordable = self.max_tokens // 2
        most = cost(())
        if most > affordable:
            raise InputError(
                f"document {document.id!r}: the title is too long: with its prompt it takes {most} of the {self.max_tokens} "
                "tokens of a chunk, more than half. Shorten the title or raise max_tokens"
            )
        paths: list[HeadingPath] = [()]
        above: list[Heading] = []
        for heading in headings:
            while above and above[-1].level >= heading.level:
                above.pop()
            above.append(heading)
            path = tuple(each.text for each in above if each.text not in ("", document.title.strip()))
            while cost(path) > affordable:  # ends at the empty path at the latest, see above
                path = path[:-1]
            most = max(most, cost(path))
            paths.append(path)
        return paths, most


def _counter(count_tokens: Callable[[str], int], limit: int) -> Callable[[str], int]:
    """Count tokens, each text once; of a text far too long only so much that it is known to exceed the limit.

    The splitter asks for the size of ever smaller parts of the same text, first of all for that of the whole text.
    """
    cached = lru_cache(maxsize=None)(count_tokens)
    enough = limit * _CHARACTERS_PER_TOKEN

    def count(text: str) -> int:
        if len(text) > enough:
            tokens = cached(text[:enough])
            if tokens > limit:
                return tokens
        return cached(text)

    return count


@dataclass(frozen=True)
class _Section:
    """A heading with the text up to the next one, or the text before the first heading.

    Attributes:
        start: Where it begins in the text.
        body: Where its headings end: several where a lower heading follows a heading at once.
        end: Where it ends.
        level: The level of its first heading; 0 where it has none.
    """

    start: int
    body: int
    end: int
    level: int


def _sections(text: str, headings: Sequence[Heading]) -> Iterator[_Section]:
    start, body, level, innermost = 0, 0, 0, 0
    for heading in headings:
        if text[body : heading.start].strip() or heading.level <= innermost:
            yield _Section(start, body, heading.start, level)
            start, level = heading.start, heading.level
        elif not level:  # only white space before the first heading
            level = heading.level
        body, innermost = heading.end, heading.level
    yield _Section(start, body, len(text), level)


@dataclass(frozen=True)
class _Cutter:
    """Cuts one text.

    Attributes:
        text: The text.
        count: The number of tokens of a part of it.
        capacity: The most tokens of a stretch.
        overlap: The most tokens that a stretch repeats, at most half of `capacity`.
    """

    text: str
    count: Callable[[str], int]
    capacity: int
    overlap: int

    def stretches(self, headings: Sequence[Heading]) -> Iterator[Stretch]:
        """Whole sections, several where they fit together, and the pieces of each that does not fit alone.

        The sections are found here, because the splitter lets the end of one that it cut run on into the next, which would
        then stand under the headings of the one before.
        """
        for section in self._grouped(_sections(self.text, headings)):
            start, end = self._stripped(section.start, section.end)
            if self._tokens(start, end) <= self.capacity:
                yield start, end
            else:
                body, _ = self._stripped(section.body, section.end)
                long_heading = self._tokens(start, body) > self.capacity // 4
                yield from self._cut(start, start if long_heading else body, end)

    def _grouped(self, sections: Iterable[_Section]) -> Iterator[_Section]:
        """Sections joined as long as they fit together and none stands above the first of them."""
        group: _Section | None = None
        total = 0
        for section in sections:
            tokens = self._tokens(section.start, section.end)
            if group is not None and section.level >= group.level and total + tokens <= self.capacity:
                group = replace(group, end=section.end)
                total += tokens
            else:
                if group is not None:
                    yield group
                group, total = section, tokens
        if group is not None:
            yield group

    def _cut(self, start: int, body: int, end: int) -> Iterator[Stretch]:
        """The pieces of a section, with the heading in the first and the overlap in the others.

        The splitter would make the heading a piece of its own, which answers nothing. Its overlap is not used, because with
        it `chunk_indices` of 0.33.1 panics on some texts, and a chunk may hold the one before it.
        """
        pieces = list(self._pieces(body, end, self.capacity - max(self._tokens(start, body), self.overlap)))
        first_start, first_end = pieces[0]
        if start == body or self._tokens(start, first_end) <= self.capacity:
            yield start, first_end
        else:
            yield self._stripped(start, body)
            yield first_start, first_end
        for (before, _), (piece_start, piece_end) in pairwise(pieces):
            yield self._overlap_start(before, piece_start, piece_end), piece_end

    def _overlap_start(self, before: int, start: int, end: int) -> int:
        """Where the piece from `start` to `end` begins when it repeats the end of the one that begins at `before`.

        That is the earliest beginning of a sentence that the overlap allows, or else of a word.
        """

        def fits(place: int) -> bool:
            return self._tokens(place, start) <= self.overlap and self._tokens(place, end) <= self.capacity

        if self.overlap:
            for boundary in (_SENTENCE_END, _WORD_END):
                ends = (match.end() for match in boundary.finditer(self.text, before, start))
                places = [place for place in ends if before < place < start]
                found = bisect_left(places, True, key=fits)
                if found < len(places):
                    return places[found]
        return start

    def _pieces(self, start: int, end: int, capacity: int) -> Iterator[Stretch]:
        """The pieces that the splitter makes of a stretch, mended where one holds too much or nothing."""
        from semantic_text_splitter import MarkdownSplitter  # here, so that reading a knowledge base does not need it

        splitter = MarkdownSplitter.from_callback(self.count, capacity, trim=True)
        for offset, piece in splitter.chunk_indices(self.text[start:end]):
            piece_start = start + offset
            for part_start, part_end in self._halved(piece_start, piece_start + len(piece), capacity):
                if not self.text[part_start:part_end].isspace():
                    yield part_start, part_end

    def _halved(self, start: int, end: int, capacity: int) -> Iterator[Stretch]:
        """The stretch, cut in halves until each fits.

        The splitter searches by halving, which takes it for granted that more text never has fewer tokens. Tokenizers break
        that rule now and then, and then a piece can be too big.
        """
        if end - start == 1 or self._tokens(start, end) <= capacity:
            yield start, end
        else:
            middle = (start + end) // 2
            yield from self._halved(start, middle, capacity)
            yield from self._halved(middle, end, capacity)

    def _tokens(self, start: int, end: int) -> int:
        return self.count(self.text[start:end])

    def _stripped(self, start: int, end: int) -> Stretch:
        stretch = self.text[start:end]
        return end - len(stretch.lstrip()), start + len(stretch.rstrip())
