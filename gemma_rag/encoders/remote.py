"""What the engines on a server have in common: `ServerEngine`."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np

from gemma_rag.encoders.base import Space, prompts_digest
from gemma_rag.encoders.checks import CONTEXT, chosen_context, chosen_dimensions, chosen_profile
from gemma_rag.encoders.engine import Batches, Reading
from gemma_rag.encoders.settings import EncoderSettings
from gemma_rag.encoders.tokens import EstimatedTokens, Tokenizer, find_tokenizer
from gemma_rag.encoders.transport import ServerFailure, Transport
from gemma_rag.errors import EmbeddingServerError
from gemma_rag.prompts import MINILM, NO_PROMPTS, PromptProfile, Task
from gemma_rag.vectors import Floats

logger = logging.getLogger(__name__)

_USUAL_CONTEXT = {MINILM.name: 256}  # what sentence-transformers cuts it to, though it can be asked for more
_SHORTER = (0.9, 0.8, 0.65, 0.5, 0.35)
"""Shares of the context to which a text is cut, one after the other, that a server still finds too long."""

_TOO_LONG = re.compile(
    r"context[ _](length|size|window)|maximum (input|sequence|model) length|input (length|is too long)|too large to process"
    r"|too long|tokens? (limit|exceed)|exceeds?.{0,40}(tokens|context|length)|(less|more|fewer) than \d+ (tokens|characters)"
    r"|maximum.{0,30}tokens|tokens.{0,30}maximum",
    re.IGNORECASE,
)
_TOO_MANY = re.compile(
    r"batch.?size|batch is too|batch too|too many (inputs|texts|items)|array.{0,20}(too long|maximum length)|at most \d+ items"
    r"|number of inputs|maximum allowed batch|too_long|max_client_batch",
    re.IGNORECASE,
)
_REFUSALS = (400, 413, 422, 500)  # llama.cpp answers 500 to a text that is too long


@dataclass(frozen=True)
class Served:
    """What a server says about the model that it serves.

    Attributes:
        model: The server's name of it.
        known_as: The name by which its prompts and its tokenizer are found.
        weights: A digest of its weights, or what comes nearest.
        precision: The number format that it computes in.
        context: Its context in tokens.
        batch_texts: Most texts in a request.
    """

    model: str
    known_as: str
    weights: str
    precision: str = "server"
    context: int | None = None
    batch_texts: int | None = None


class ServerEngine:
    """An engine whose vectors come from a server. Making one asks the server for the model and for one vector.

    Prompts, the cut to the context, the cut to a Matryoshka dimension and the norm are ours: servers differ in each of them.
    Every answer is checked: as many rows as texts, all of the model's dimensions, finite, none all zeros. A batch that is
    too large for the server is halved, and the limit kept; a text that it finds too long, though it was not by our count,
    is cut shorter where ``on_overflow`` allows it.

    Args:
        settings: Which model, where, and how.
        transport: How the server is asked; None for what the settings say.

    Attributes:
        space: What decides its vectors.
        profile: The prompts that belong before the texts.
        native: Components of the server's vectors.
        batch_tokens: Most tokens of a batch.
        batch_texts: Most texts of a batch; smaller once the server has refused one.

    Raises:
        MissingExtra: httpx is not installed.
        ModelUnavailable: The server does not have the model, or is too old for it.
        EmbeddingServerError: The server cannot be reached, refuses, or answers what it should not.
    """

    runtime: ClassVar[str]
    name: ClassVar[str]
    hint: ClassVar[str] = ""
    usual_url: ClassVar[str]
    usual_texts: ClassVar[int] = 32
    path: str

    space: Space
    profile: PromptProfile
    native: int
    batch_tokens: int = 4096  # some seconds of work for a server on a CPU, four at a time within the usual timeout
    batch_texts: int | None

    def __init__(self, settings: EncoderSettings, transport: Transport | None = None) -> None:
        self.settings = settings
        self.transport = transport or Transport(
            self._address(),
            secret=settings.secret(),
            timeout=settings.timeout,
            retries=settings.retries,
            concurrency=settings.concurrency,
            what=self.name,
            hint=self.hint,
        )
        self._warned = False
        self.native = 0
        served = self.transport.run(self._meet())
        self.profile = chosen_profile(settings, served.known_as)
        if self.profile is NO_PROMPTS and settings.prompts is None:
            logger.warning(
                "no prompts are known for %s: its texts go without. prompts= chooses some, or 'none'", served.known_as
            )
        self.batch_texts = min(filter(None, (settings.batch_texts or self.usual_texts, served.batch_texts)))
        self._context = self._chosen_context(served)
        self.transport.run(self._get_ready())
        self._tokenizer = self._chosen_tokenizer(served)
        self.native = self.transport.run(self._rows([self.profile.render("probe", Task.QUERY)])).shape[1]
        self.space = Space(
            model=served.model,
            weights=served.weights,
            prompts=prompts_digest(self.profile, settings.detect_prompts),
            dimensions=chosen_dimensions(
                settings.dimensions, settings.untrained_dimensions, self.native, self.profile, served.model
            ),
            max_tokens=self._context,
            overflow="average" if settings.on_overflow == "average" else "truncate",
            runtime=self.runtime,
            precision=served.precision,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.transport.url!r})"

    # -- what each server does in its own way ----------------------------------------------------------------------

    def _address(self) -> str:
        return self.settings.url or self.usual_url

    async def _meet(self) -> Served:
        """Ask the server what it serves, and refuse what cannot work."""
        raise NotImplementedError

    async def _get_ready(self) -> None:
        """Find out what else there is to know, once profile and context are known."""

    async def _embed(self, texts: list[str]) -> Any:
        """One request: the rows of these texts, in their order, as the server gives them."""
        raise NotImplementedError

    def _server_tokenizer(self) -> Tokenizer | None:
        """The server's own tokenizer, where it lets others use it."""
        return None

    # -- an engine ---------------------------------------------------------------------------------------------------

    def read(self, texts: Sequence[str]) -> list[Reading]:
        """Count the tokens of texts; nothing is cut."""
        return [Reading(length, text) for length, text in zip(self._tokenizer.count(texts), texts, strict=True)]

    def cut(self, text: str) -> Reading:
        """A text that is too long, cut to the context."""
        start = self._tokenizer.cut(text, self._context)
        return self.read([start])[0]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The characters of each token, from and to, without special tokens."""
        return self._tokenizer.spans(text)

    def run(self, batches: Batches) -> Iterator[tuple[int, Floats]]:
        """Compute batches, several at a time.

        Yields:
            The batch's place in `batches` and its rows, shape ``(texts, native)``, in the order of the answers.

        Raises:
            EmbeddingServerError: A batch failed for good; raised after all others were yielded.
        """
        yield from self.transport.each([partial(self._rows, [reading.payload for reading in batch]) for batch in batches])

    async def arun(self, batches: Batches) -> AsyncIterator[tuple[int, Floats]]:
        """`run`, for an event loop; any loop, and several at a time."""
        calls = [partial(self._rows, [reading.payload for reading in batch]) for batch in batches]
        async for place, rows in self.transport.aeach(calls):
            yield place, rows

    # -- inside ------------------------------------------------------------------------------------------------------

    def _chosen_context(self, served: Served) -> int:
        own = CONTEXT.get(self.profile.name)
        reported = min(filter(None, (served.context, own)), default=None)
        usual = _USUAL_CONTEXT.get(self.profile.name)
        if usual is not None and self.settings.max_tokens is None:
            return min(filter(None, (usual, reported)))
        if own and reported and reported < own and self.settings.max_tokens is None:
            logger.info("%s takes %d tokens of a text, and %s would %d", self.transport.url, reported, served.model, own)
        return chosen_context(self.settings, reported, self.profile, served.model)

    def _chosen_tokenizer(self, served: Served) -> Tokenizer:
        own = find_tokenizer(self.settings.tokenizer, served.known_as, self.settings.model) or self._server_tokenizer()
        if own is None:
            logger.info(
                "no tokenizer of %s is at hand: tokens are estimated, on the safe side, so that texts are cut somewhat early "
                "(tokenizer= names the model's own)",
                served.model,
            )
        return own or EstimatedTokens()

    async def _rows(self, texts: list[str]) -> Floats:
        """The rows of a batch, in as many requests as the server needs."""
        done: list[Floats] = []
        start = 0
        while start < len(texts):
            part = texts[start : start + (self.batch_texts or len(texts))]
            done.append(await self._part(part))
            start += len(part)
        return done[0] if len(done) == 1 else np.concatenate(done)

    async def _part(self, texts: list[str]) -> Floats:
        try:
            return self._checked(await self._embed(texts), len(texts))
        except ServerFailure as error:
            problem = problem_of(error)
            if problem is None or (problem == "too many" and len(texts) == 1):
                raise
            if len(texts) == 1:
                return await self._shortened(texts[0], error)
            if problem == "too many":
                self.batch_texts = limit_after(error.detail, len(texts))
                logger.info("%s takes no %d texts in a request; from now on %d", self.name, len(texts), self.batch_texts)
                return await self._rows(texts)
        return np.concatenate([await self._part([text]) for text in texts])

    async def _shortened(self, text: str, error: ServerFailure) -> Floats:
        (counted,) = await asyncio.to_thread(self._tokenizer.count, [text])
        counted_as = f"{counted} tokens{'' if self._tokenizer.exact else ' at most'} by our count"
        if self.settings.on_overflow == "truncate":
            for share in _SHORTER:
                limit = int(min(counted, self._context) * share)
                if limit < 8:
                    break
                start = await asyncio.to_thread(self._tokenizer.cut, text, limit)
                try:
                    rows = self._checked(await self._embed([start]), 1)
                except ServerFailure as again:
                    if problem_of(again) is None:
                        raise
                    continue
                self._warn(f"{counted_as}, and was cut to {limit}")
                return rows
        raise ServerFailure(
            f"{self.name}: {error.url} finds a text too long for it that has {counted_as}, with a context of {self._context}: "
            f"{text[:60]!r} ... It says: {error.detail or error.status}. Lower max_tokens, or raise the server's own limit "
            "(llama-server: -ub and -c; vLLM: --max-model-len)",
            url=error.url,
            status=error.status,
            detail=error.detail,
        ) from None

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s found a text too long that has %s; further ones are treated alike, without a warning. "
                "Give tokenizer= (the model's own) or a lower max_tokens",
                self.name,
                what,
            )

    def _checked(self, answer: Any, texts: int) -> Floats:
        try:
            rows = np.asarray(answer, dtype=np.float32)
        except (ValueError, TypeError):
            raise self._wrong("rows that are no table of numbers") from None
        if rows.ndim != 2 or rows.shape[1] == 0:
            raise self._wrong(f"numbers of shape {rows.shape} where {texts} rows were expected")
        if len(rows) != texts:
            raise self._wrong(f"{len(rows)} rows for {texts} texts")
        if self.native and rows.shape[1] != self.native:
            raise self._wrong(
                f"rows of {rows.shape[1]} dimensions, and of {self.native} before: does it serve another model now?"
            )
        if not np.isfinite(rows).all():
            raise self._wrong("NaN or infinity. A model run in float16 that needs float32 or bfloat16 gives such rows")
        if not rows.any(axis=1).all():
            raise self._wrong("a row of zeros, which has no direction")
        return rows

    def _wrong(self, what: str, path: str | None = None) -> EmbeddingServerError:
        """The error for an answer that cannot be right."""
        url = self.transport.url + (path or self.path)
        return ServerFailure(f"{self.name}: {url} answered with {what}", url=url, status=200)


def problem_of(error: ServerFailure) -> Literal["too long", "too many"] | None:
    """What a server minds about a request, as far as its status and words tell."""
    if error.status not in _REFUSALS:
        return None
    if _TOO_MANY.search(error.detail) and not re.search(r"physical batch size", error.detail):
        return "too many"
    if _TOO_LONG.search(error.detail):
        return "too long"
    return "too many" if error.status == 413 else None


def limit_after(detail: str, sent: int) -> int:
    """How many texts a server takes: what it says, where that is a number that makes sense, else half of what was sent."""
    said = [int(number) for number in re.findall(r"\d+", detail)]
    return max((number for number in said if 0 < number < sent), default=max(1, sent // 2))
