"""Vectors from Ollama, by its ``/api/embed``.

Ollama puts no prompts before texts; its ``truncate`` cuts in silence, so that it is switched off and texts are cut here;
its ``dimensions`` is not asked for, since a value that is too large is ignored in silence: vectors are cut here too.
The older ``/api/embeddings``, one text a request and not normalised, is used only where the server has nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from typing import Any
from urllib.parse import urlsplit

from gemma_rag.encoders.models import OFFLINE_MODEL, SHORT_NAMES
from gemma_rag.encoders.remote import Served, ServerEngine
from gemma_rag.encoders.transport import ServerFailure
from gemma_rag.errors import InputError, ModelUnavailable
from gemma_rag.prompts import EMBEDDINGGEMMA, profile_for

logger = logging.getLogger(__name__)

_NAMES = {
    **dict.fromkeys(("embeddinggemma", SHORT_NAMES["embeddinggemma"]), "embeddinggemma:300m"),
    **dict.fromkeys(("embeddinggemma-2", SHORT_NAMES["embeddinggemma-2"]), "embeddinggemma-2"),
    **dict.fromkeys((OFFLINE_MODEL, "sentence-transformers/all-minilm-l6-v2"), "all-minilm"),
}
"""Ollama's names of the models that gemma-rag has other names for."""
_OTHER = re.compile(r"^all-minilm:.*(33m|l12)", re.IGNORECASE)
"""Tags that are another model: all-MiniLM-L12-v2."""
_FIRST_WITH_GEMMA = (0, 11, 10)  # https://github.com/ollama/ollama/releases/tag/v0.11.10
_PORT = 11434


class OllamaEngine(ServerEngine):
    """A model that Ollama serves."""

    runtime = "ollama"
    name = "Ollama"
    hint = "Start it with: ollama serve"
    usual_url = f"http://localhost:{_PORT}"

    path = "/api/embed"

    _legacy = False

    def _address(self) -> str:
        return self.settings.url or ollama_url(os.environ.get("OLLAMA_HOST", ""))

    async def _meet(self) -> Served:
        tags = await self.transport.get("/api/tags")
        models = tags.get("models") if isinstance(tags, dict) else None
        if not isinstance(models, list):
            raise self._wrong("no list of models: is this Ollama?", "/api/tags")
        entry = _find(self.settings.model, [model for model in models if isinstance(model, dict)], self.transport.url)
        name = self._model = str(entry["name"])
        if profile_for(name) is EMBEDDINGGEMMA:
            await self._check_version()
        details = entry.get("details") or {}
        return Served(
            model=name,
            known_as=name,
            weights=str(entry.get("digest") or f"server:{name}"),
            precision=str(details.get("quantization_level") or "server"),
            context=await self._context_of(name),
        )

    async def _check_version(self) -> None:
        answer = await self.transport.get("/api/version")
        version = str(answer.get("version", "")) if isinstance(answer, dict) else ""
        numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
        if any(numbers) and numbers < _FIRST_WITH_GEMMA:
            raise ModelUnavailable(
                f"Ollama at {self.transport.url} has the version {version}, and EmbeddingGemma needs "
                f"{'.'.join(map(str, _FIRST_WITH_GEMMA))} or later. Update it: https://ollama.com/download"
            )

    async def _context_of(self, name: str) -> int | None:
        try:
            shown = await self.transport.post("/api/show", {"model": name})
        except ServerFailure as error:
            if error.status is None or error.status in (401, 403):
                raise
            return None
        info = shown.get("model_info") if isinstance(shown, dict) else None
        lengths = [value for key, value in (info or {}).items() if key.endswith(".context_length")]
        return lengths[0] if lengths and isinstance(lengths[0], int) else None

    async def _embed(self, texts: list[str]) -> Any:
        if self._legacy:
            return await asyncio.gather(*map(self._embed_one, texts))
        try:
            answer = await self.transport.post("/api/embed", self._body(input=texts, truncate=False))
        except ServerFailure as error:
            if error.status != 404 or "model" in error.detail:
                raise
            logger.info("%s has no /api/embed: its older /api/embeddings is used, one text a request", self.transport.url)
            self._legacy, self.path = True, "/api/embeddings"
            return await self._embed(texts)
        return _field(self, answer, "embeddings", "/api/embed")

    async def _embed_one(self, text: str) -> Any:
        answer = await self.transport.post("/api/embeddings", self._body(prompt=text))
        return _field(self, answer, "embedding", "/api/embeddings")

    def _body(self, **own: Any) -> dict[str, Any]:
        keep = self.settings.keep_alive
        kept = {} if keep is None else {"keep_alive": int(keep) if re.fullmatch(r"-?\d+", keep) else keep}
        return {"model": self._model, **own, **kept, "options": {"num_ctx": self._context}}


def _field(engine: OllamaEngine, answer: Any, name: str, path: str) -> Any:
    if not isinstance(answer, dict) or name not in answer:
        raise engine._wrong(f"no {name!r}: is this Ollama?", path)
    return answer[name]


def _find(model: str, served: list[dict[str, Any]], url: str) -> dict[str, Any]:
    """The entry of a model in ``/api/tags``: exactly that name, its ``:latest``, or any tag where none is named."""
    entries = {str(entry.get("name") or entry.get("model")): entry for entry in served}
    known = {name.lower(): name for name in entries}
    wanted = _NAMES.get(model, _NAMES.get(model.lower(), model))
    for name in (wanted, f"{wanted}:latest"):
        if name.lower() in known:
            return {**entries[known[name.lower()]], "name": known[name.lower()]}
    if ":" not in model:  # no tag was asked for, so that any will do
        base = wanted.partition(":")[0].lower()
        tags = [name for name in entries if name.partition(":")[0].lower() == base and not _OTHER.search(name)]
        if tags:
            logger.info("Ollama has no %s; its %s is used", wanted, min(tags))
            return {**entries[min(tags)], "name": min(tags)}
    raise ModelUnavailable(
        f"Ollama at {url} has no model {wanted}. Get it with: ollama pull {wanted}\n"
        f"  It has {', '.join(sorted(entries)) or 'none at all'}"
    )


def ollama_url(host: str) -> str:
    """The server's address from the environment variable ``OLLAMA_HOST``, read as Ollama's own client reads it.

    >>> ollama_url(""), ollama_url("0.0.0.0"), ollama_url("gpu:8000"), ollama_url("https://example.org")
    ('http://localhost:11434', 'http://localhost:11434', 'http://gpu:8000', 'https://example.org:443')

    Raises:
        InputError: It is no address.
    """
    host = host.strip().strip("\"'")
    parts = urlsplit(host if "://" in host else f"//{host}")
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("", "http", "https") or port == -1 or parts.username is not None or re.search(r"\s", host):
        raise InputError("the environment variable OLLAMA_HOST is no address as localhost:11434; give url")
    name = parts.hostname or "localhost"
    name = "localhost" if name in ("0.0.0.0", "::") else name  # noqa: S104 - where a server listens, not where it is
    usual = {"http": 80, "https": 443}.get(parts.scheme, _PORT)
    return f"{parts.scheme or 'http'}://{f'[{name}]' if ':' in name else name}:{port or usual}{parts.path.rstrip('/')}"
