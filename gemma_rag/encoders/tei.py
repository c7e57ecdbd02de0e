"""Vectors from Hugging Face's text-embeddings-inference (TEI), by its own ``/embed``.

TEI puts a prompt before a text where the request names one (``prompt_name``) or the server was started with a default one.
Its ``/info`` lists no prompts. Their names stand in its answer to a name that it does not know; and whether a name means the
prompt that the model's profile has is found out once, while loading: a text sent under the name has to give the same vector
as the prompt and the text sent together. Such a name is used for the texts that have just that prompt, in a request for each
name; all others, documents with a title among them, carry their prompt themselves. The same comparison, and ``/tokenize``,
show a default prompt, which would come on top of ours: such a server is refused.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import itertools
import logging
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from gemma_rag.encoders.openai import full_name, is_path, is_same
from gemma_rag.encoders.remote import Served, ServerEngine, limit_after, problem_of
from gemma_rag.encoders.tokens import ServerTokens, Spans, Tokenizer
from gemma_rag.encoders.transport import ServerFailure
from gemma_rag.errors import EmbeddingServerError, InputError, ModelUnavailable
from gemma_rag.prompts import Task
from gemma_rag.vectors import Floats, unit

logger = logging.getLogger(__name__)

_PROBE = "Which planet is known as the Red Planet?"
_UNKNOWN = "gemma-rag asks which names there are"
_SAME = 0.9998
"""Cosine above which two vectors are of the same text: batches and number formats move it by far less, prompts by far more."""


class TeiEngine(ServerEngine):
    """A model that TEI serves."""

    runtime = "tei"
    name = "text-embeddings-inference"
    hint = "Start it with: text-embeddings-router --model-id ..."
    usual_url = "http://localhost:8080"
    path = "/embed"

    async def _meet(self) -> Served:
        info = await self.transport.get("/info")
        if not isinstance(info, dict) or not isinstance(info.get("model_id"), str):
            raise self._wrong("no model_id: is this text-embeddings-inference?", "/info")
        kind = info.get("model_type")
        if isinstance(kind, dict) and kind and "embedding" not in kind:
            raise ModelUnavailable(f"{info['model_id']} at {self.transport.url} is no embedding model but a {', '.join(kind)}")
        model: str = info["model_id"]
        wanted = full_name(self.settings.model)
        path = is_path(model)
        if not is_same(wanted, model) and not (path and "model" in self.settings.model_fields_set):
            name = "the model's name, so that its prompts are known" if path else repr(model)
            raise ModelUnavailable(f"the server at {self.transport.url} serves {model}, and not {wanted}: give model={name}")
        return Served(
            model=model,
            known_as=wanted if path else model,
            weights=str(info.get("model_sha") or f"server:{model}"),
            precision=str(info.get("model_dtype") or "server"),
            context=_number(info.get("max_input_length")),
            batch_texts=_number(info.get("max_client_batch_size")),
        )

    async def _get_ready(self) -> None:
        self._prompts: dict[str, str] = {}
        self._tokenizes = await self._learn_offsets()
        names = await self._names()
        if names:
            self._prompts = await self._proved(names)

    async def _learn_offsets(self) -> bool:
        """Find out whether there is a ``/tokenize``, and how it counts characters; refuse a default prompt that it shows."""
        try:
            plain, accented = await self._post("/tokenize", {"inputs": ["a", "éa"], "add_special_tokens": True})
            ends = [max(token["stop"] for token in tokens if not token["special"]) for tokens in (plain, accented)]
        except EmbeddingServerError as error:
            if error.status in (401, 403):
                raise
            return False
        except (TypeError, ValueError, KeyError):
            return False
        if ends[0] > 1:
            raise self._has_default_prompt()
        self._bytes = ends[1] > 2
        return True

    async def _names(self) -> dict[str, str]:
        """Names that the server has for our prompts, as far as it lists them: for each prompt one name, unproved."""
        try:
            await self._embed_under(_UNKNOWN, ["a"])
        except ServerFailure as error:
            if error.status not in (400, 413, 422):
                raise
            listed = re.findall(r'"((?:[^"\\]|\\.)*)"', error.detail.partition("Available prompts")[2])
        else:
            return {}  # it takes any name: it knows none, and ignores them
        names: dict[str, str] = {}
        for name in sorted(listed):
            with contextlib.suppress(InputError):  # a name that stands for no task of ours
                prompt = self.profile.prompt(Task.parse(name))
                if prompt:
                    names.setdefault(prompt, name)
        return names

    async def _proved(self, names: dict[str, str]) -> dict[str, str]:
        """Those of the names that stand for our prompts: the vectors tell."""

        async def vector(text: str, name: str | None = None) -> Floats:
            row: Floats = unit(self._checked(await self._embed_under(name, [text]), 1))[0]
            return row

        bare = await vector(_PROBE)
        proved: dict[str, str] = {}
        for prompt, name in names.items():
            named, together = await asyncio.gather(vector(_PROBE, name), vector(prompt + _PROBE))
            if float(named @ together) >= _SAME:
                proved[prompt] = name
            elif not self._tokenizes and float(named @ bare) >= _SAME:
                raise self._has_default_prompt()
            else:
                logger.info("the server's prompt %r is not %r: the prompt is sent with the text", name, prompt)
        if not proved and not self._tokenizes:
            raise self._has_default_prompt()  # or each of its prompts differs from ours, which is as wrong
        return proved

    def _has_default_prompt(self) -> ModelUnavailable:
        return ModelUnavailable(
            f"the server at {self.transport.url} puts a default prompt before every text, and gemma-rag puts the right one: "
            "start it without --default-prompt and --default-prompt-name"
        )

    async def _embed(self, texts: list[str]) -> Any:
        groups: dict[str, list[int]] = {}
        for i, text in enumerate(texts):
            start = next((prompt for prompt in self._prompts if text.startswith(prompt) and text != prompt), "")
            groups.setdefault(start, []).append(i)
        calls = [
            self._embed_under(self._prompts.get(start), [texts[i][len(start) :] for i in group])
            for start, group in groups.items()
        ]
        rows: list[Any] = [None] * len(texts)
        for group, answer in zip(groups.values(), await asyncio.gather(*calls), strict=True):
            if len(answer) != len(group):
                raise self._wrong(f"{len(answer)} rows for {len(group)} texts")
            for i, row in zip(group, answer, strict=True):
                rows[i] = row
        return rows

    async def _embed_under(self, name: str | None, texts: list[str]) -> list[Any]:
        named = {} if name is None else {"prompt_name": name}
        return await self._post("/embed", {"inputs": texts, "truncate": False, "normalize": True, **named})

    async def _post(self, path: str, body: dict[str, Any]) -> list[Any]:
        answer = await self.transport.post(path, body)
        if not isinstance(answer, list):
            raise self._wrong("no list: is this text-embeddings-inference?", path)
        return answer

    def _server_tokenizer(self) -> Tokenizer | None:
        return ServerTokens(self._tokenize) if self._tokenizes else None

    def _tokenize(self, texts: Sequence[str]) -> list[Spans]:
        size = self.batch_texts or len(texts)
        parts = [list(texts[i : i + size]) for i in range(0, len(texts), size)]
        calls = [partial(self._post, "/tokenize", {"inputs": part, "add_special_tokens": True}) for part in parts]
        try:
            answers = dict(self.transport.each(calls))
        except ServerFailure as error:
            if size == 1 or problem_of(error) != "too many":
                raise
            self.batch_texts = limit_after(error.detail, size)
            return self._tokenize(texts)
        return [
            self._spans_of(text, tokens)
            for place, part in enumerate(parts)
            for text, tokens in zip(part, answers[place], strict=True)
        ]

    def _spans_of(self, text: str, tokens: list[dict[str, Any]]) -> Spans:
        spans: Spans = [None if token["special"] else (token["start"], token["stop"]) for token in tokens]
        if not self._bytes or text.isascii():
            return spans
        ends = list(itertools.accumulate(len(character.encode()) for character in text))  # after each character, in bytes
        return [span and (bisect.bisect_right(ends, span[0]), bisect.bisect_left(ends, span[1]) + 1) for span in spans]


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
