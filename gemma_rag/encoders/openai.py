"""Vectors from any server that speaks OpenAI's ``/v1/embeddings``: vLLM, llama.cpp, TEI, Infinity, LM Studio, OpenAI itself.

The request has no field for what a text is for, so that prompts are put here. ``dimensions`` is not asked for: llama.cpp
ignores it, Infinity cuts without normalising again, vLLM refuses it; vectors are cut here.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from gemma_rag.encoders.models import OFFLINE_MODEL, SHORT_NAMES
from gemma_rag.encoders.remote import Served, ServerEngine
from gemma_rag.encoders.tokens import ServerTokens, Spans, Tokenizer
from gemma_rag.encoders.transport import ServerFailure
from gemma_rag.errors import EmbeddingServerError, ModelUnavailable

_FULL_NAMES = {**SHORT_NAMES, OFFLINE_MODEL: "sentence-transformers/all-MiniLM-L6-v2"}


class OpenAIEngine(ServerEngine):
    """A model behind ``/v1/embeddings``."""

    runtime = "openai"
    name = "the embedding server"
    usual_url = "http://localhost:8000"
    usual_texts = 64

    _base64 = True

    def _address(self) -> str:
        address = super()._address().rstrip("/")
        version = re.search(r"/v\d+$", address)
        self._version = version.group() if version else "/v1"
        self.path = f"{self._version}/embeddings"
        return address.removesuffix(self._version)

    async def _meet(self) -> Served:
        entry = match_model(self.settings.model, await self._listed(), self.transport.url)
        self._model = str(entry["id"])
        meta = entry.get("meta")
        said = [entry.get("max_model_len"), *((meta.get("n_ctx"), meta.get("n_ctx_train")) if isinstance(meta, dict) else ())]
        return Served(
            model=self._model,
            known_as=self._model if is_same(full_name(self.settings.model), self._model) else full_name(self.settings.model),
            weights=f"server:{self._model}",
            context=min((tokens for tokens in said if isinstance(tokens, int) and tokens > 0), default=None),
        )

    async def _listed(self) -> list[dict[str, Any]]:
        try:
            answer = await self.transport.get(f"{self._version}/models")
        except ServerFailure as error:
            if error.status in (404, 405, 501):
                return []
            raise
        data = answer.get("data") if isinstance(answer, dict) else None
        return [entry for entry in data or [] if isinstance(entry, dict) and entry.get("id")]

    async def _embed(self, texts: list[str]) -> Any:
        body = {"model": self._model, "input": texts, "encoding_format": "base64" if self._base64 else "float"}
        try:
            answer = await self.transport.post(self.path, body)
        except ServerFailure as error:
            first = self._base64 and not self.native
            if not (first and error.status in (400, 415, 422, 500, 501)):
                raise
            self._base64 = False  # it may not know the form; if it is something else, the next answer says so
            return await self._embed(texts)
        data = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(data, list) or not all(isinstance(item, dict) and "embedding" in item for item in data):
            raise self._wrong("no list of embeddings under 'data'. Is the url right?")
        return [self._vector(item["embedding"]) for item in self._in_order(data, len(texts))]

    def _in_order(self, data: list[dict[str, Any]], texts: int) -> list[dict[str, Any]]:
        if len(data) != texts:
            raise self._wrong(f"{len(data)} rows for {texts} texts")
        places = [item.get("index", i) for i, item in enumerate(data)]
        if sorted(places, key=str) != sorted(range(texts), key=str):
            raise self._wrong(f"the indices {places[:10]} for {texts} texts")
        return [data[i] for i in np.argsort(places)]

    def _vector(self, embedding: Any) -> Any:
        if not isinstance(embedding, str):
            return embedding
        try:
            return np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4")
        except (binascii.Error, ValueError):
            raise self._wrong("a vector that is no base64 of float32") from None

    def _server_tokenizer(self) -> Tokenizer | None:
        forms = (
            partial(self._tokens, "/tokenize", "content", {"add_special": True}),  # llama.cpp
            partial(self._tokens, "/tokenize", "prompt", {"model": self._model, "add_special_tokens": True}),  # vLLM
            partial(self._tokens, "/extras/tokenize", "input", {}),  # llama-cpp-python
        )
        for ask in forms:
            with contextlib.suppress(EmbeddingServerError):
                ask(["a b"])
                return ServerTokens(ask)
        return None

    def _tokens(self, path: str, name: str, others: dict[str, Any], texts: Sequence[str]) -> list[Spans]:
        """Tokenize texts, one a request, each under a name of the body that the servers differ in."""
        tokens: list[Spans] = [[]] * len(texts)
        calls = [partial(self.transport.post, path, {**others, name: text}) for text in texts]
        for place, answer in self.transport.each(calls):
            ids = answer.get("tokens") if isinstance(answer, dict) else None
            if not isinstance(ids, list):
                raise self._wrong("no 'tokens'", path)
            tokens[place] = [None] * len(ids)
        return tokens


def match_model(model: str, served: Sequence[dict[str, Any]], url: str) -> dict[str, Any]:
    """The entry of a model in ``/v1/models``.

    Servers name a model by its id on the hub, by an alias, or by the path of its file. Without a list, the name is taken as
    it is given.

    Raises:
        ModelUnavailable: The server has others only; the message lists them.
    """
    full = full_name(model)
    for same in (model, full, _last(full)):
        for entry in served:
            if same.lower() in (str(entry["id"]).lower(), _last(str(entry["id"])).lower()):
                return entry
    if len(served) == 1 and is_same(full, str(served[0]["id"])):
        return served[0]
    if served:
        names = ", ".join(str(entry["id"]) for entry in served)
        raise ModelUnavailable(f"the server at {url} has no model {full}. It has {names}: give one of these as model=")
    return {"id": full}


def is_same(wanted: str, served: str) -> bool:
    """Whether a served name, which may be a path or carry a quantisation, means the wanted model.

    >>> is_same("google/embeddinggemma-300m", "/models/embeddinggemma-300M-Q8_0.gguf")
    True
    >>> is_same("google/embeddinggemma-2", "embeddinggemma-270m")
    False
    """
    bare = re.escape(_bare(_last(wanted)))
    return re.search(rf"(?<![a-z0-9]){bare}(?![0-9])", _bare(_last(served))) is not None


def is_path(name: str) -> bool:
    """Whether a served name is a place on the server's disk, which may say nothing of the model."""
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or "\\" in name


def full_name(model: str) -> str:
    """A model's id on the hub, for the short names that gemma-rag has; others are as they are."""
    return _FULL_NAMES.get(model, model)


def _last(name: str) -> str:
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _bare(name: str) -> str:
    return re.sub(r"[-_. ]", "", name.lower())
