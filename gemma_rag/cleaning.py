"""Optional cleaning of text before it is stored: white space, full-width characters, URLs and e-mail addresses.

Everything is off unless asked for, because cleaning changes what the user reads in an answer's sources.

>>> Cleaning(punctuation=True, mask_emails=True).apply("联系：ａdmin＠example.com。")
'联系:[EMAIL]。'
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
"""U+FF01 to U+FF5E mirror the printable ASCII characters; U+3000 is the ideographic space."""

_NEWLINE = re.compile(r"\r\n?")
_SPACES = re.compile("[ \t\u00a0\u2000-\u200a\u202f\u205f\u3000]+")
_LINE_END = re.compile(r" +$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")

# What ends a URL: white space, what RFC 3986 forbids, and Chinese, Japanese and Korean characters and punctuation, which
# in practice follow a URL without a space between.
_AFTER_URL = '\\s<>"\\[\\]{}|\\\\^`“”‘’…—\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff'
_URL = re.compile(
    rf"(?:https?://|(?<![A-Za-z0-9@._-])www\.)[^{_AFTER_URL}]*[^{_AFTER_URL}.,;:!?'()*_~]",
    re.IGNORECASE,
)
# RFC 5321 gives the part before the @ 64 characters; without that bound a long word would cost quadratic time.
_EMAIL = re.compile(r"[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,63}")


@dataclass(frozen=True)
class Cleaning:
    """Which cleaning steps to take. Applying them twice gives the same as applying them once.

    ``Cleaning()`` leaves every text as it is; ``Cleaning(collapse_whitespace=True, mask_emails=True)`` takes two steps.

    Attributes:
        collapse_whitespace: Runs of spaces, tabs, no-break and ideographic spaces become one space, lines lose the
            spaces at their ends, and more than two newlines become two. Lines and paragraphs stay, so headings do too;
            the indentation of lists and code does not.
        punctuation: Full-width forms of letters, digits and ASCII punctuation (U+FF01 to U+FF5E, for example ``，`` and
            ``Ａ``) become ASCII, and so does the ideographic space. Other CJK punctuation (``。、「」``) stays.
        mask_urls: ``http://``, ``https://`` and ``www.`` addresses become ``[URL]``.
        mask_emails: E-mail addresses become ``[EMAIL]``.
    """

    collapse_whitespace: bool = False
    punctuation: bool = False
    mask_urls: bool = False
    mask_emails: bool = False

    def apply(self, text: str) -> str:
        """The cleaned text."""
        if self.punctuation:  # first: a full-width URL is a URL only once it is ASCII
            text = text.translate(_FULL_WIDTH)
        if self.mask_urls:  # before the e-mail addresses: a URL may hold one
            text = _URL.sub("[URL]", text)
        if self.mask_emails:
            text = _EMAIL.sub("[EMAIL]", text)
        if self.collapse_whitespace:
            text = _SPACES.sub(" ", _NEWLINE.sub("\n", text))
            text = _BLANK_LINES.sub("\n\n", _LINE_END.sub("", text))
        return text
