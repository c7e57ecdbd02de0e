"""A stand-in for Ollama.

Written from docs/api.md and server/routes.go of https://github.com/ollama/ollama: the paths, the fields and their types,
the status codes and the words of the errors. What Go's JSON reader ignores (fields it does not know) is ignored here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import Answer, Fault, Refused, Request, StandIn, unit

TOO_LONG = "the input length exceeds the context length"
_DURATION = re.compile(r"[-+]?(0|((\d+(\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h))+)")  # what time.ParseDuration reads
_DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class Model:
    """A model that was pulled."""

    name: str
    digest: str = "85462619ee721b466c5927d109d4cb765861907d5417b9109caebc4e614679f1"
    architecture: str = "gemma3"
    quantization: str = "BF16"
    context: int | None = 2048

    def listed(self) -> dict[str, Any]:
        details = {
            "parent_model": "",
            "format": "gguf",
            "family": self.architecture,
            "families": [self.architecture],
            "parameter_size": "307.58M",
            "quantization_level": self.quantization,
        }
        return {
            "name": self.name,
            "model": self.name,
            "modified_at": "2026-11-04T14:56:49.277302595-07:00",
            "size": 621875917,
            "digest": self.digest,
            "details": details,
        }

    def shown(self) -> dict[str, Any]:
        info: dict[str, Any] = {"general.architecture": self.architecture, "general.parameter_count": 307581696}
        if self.context is not None:
            info[f"{self.architecture}.context_length"] = self.context
        return {
            "modelfile": "",
            "parameters": "",
            "template": "{{ .Prompt }}",
            "details": self.listed()["details"],
            "model_info": info,
            "capabilities": ["embedding"],
        }


GEMMA = Model("embeddinggemma:300m")
MINILM = Model("all-minilm:latest", digest="1b226e2802dbb772b5fc32a58f103ca1804ef7501331012de126ab22f67475ef", context=256)


class OllamaServer(StandIn):
    """Ollama with the models given.

    Args:
        models: What was pulled.
        version: What ``/api/version`` says.
        old: A server before ``/api/embed``, which knows ``/api/embeddings`` alone.
        kwargs: As for `StandIn`; `limit` is the context that the models were built with.
    """

    embedding_paths = ("/api/embed", "/api/embeddings")
    text_keys = ("input", "prompt")

    def __init__(self, *models: Model, version: str = "0.12.6", old: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.models = list(models or (GEMMA,))
        self.version, self.old = version, old

    def route(self, request: Request, fault: Fault | None) -> Answer:
        match request.method, request.path:
            case "GET", "/api/version":
                return Answer({"version": self.version})
            case "GET", "/api/tags":
                return Answer({"models": [model.listed() for model in self.models]})
            case "POST", "/api/show":
                return Answer(self._model(self._fields(request), "model", "name").shown())
            case "POST", "/api/embed" if not self.old:
                return self._embed(self._fields(request), fault)
            case "POST", "/api/embeddings":
                return self._embed_one(self._fields(request), fault)
        raise Refused(404, b"404 page not found")

    def _embed(self, body: dict[str, Any], fault: Fault | None) -> Answer:
        given = body.get("input")
        texts = ([given] if given else []) if isinstance(given, str) else given
        if texts is not None and not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            raise Refused(400, {"error": "invalid input type"})
        _typed(body, "truncate", bool, "bool")
        _typed(body, "dimensions", int, "int")
        model = self._model(body, "model")
        context = self._context(body, model)
        cut = []
        for text in texts or []:
            if self.count(text) > context and body.get("truncate") is False:
                raise Refused(400, {"error": TOO_LONG})
            cut.append(self.cut(text, context))
        rows = self.rows(cut, fault)
        answer = {
            "model": body["model"],
            "embeddings": [self._shorter(row, body.get("dimensions")) for row in rows],
            "total_duration": 14143917,
            "load_duration": 1019500,
            "prompt_eval_count": sum(map(self.count, cut)),
        }
        return Answer(answer)

    def _embed_one(self, body: dict[str, Any], fault: Fault | None) -> Answer:
        _typed(body, "prompt", str, "string")
        model = self._model(body, "model")
        text = self.cut(body.get("prompt", ""), self._context(body, model))  # in silence: nothing says that it was cut
        rows = self.rows([text] if text else [], fault, normalise=False)
        return Answer({"embedding": rows[0] if rows else []})

    def _shorter(self, row: Sequence[float], dimensions: int | None) -> list[float]:
        return unit(np.asarray(row[:dimensions])).tolist() if dimensions and dimensions < len(row) else list(row)

    def _context(self, body: dict[str, Any], model: Model) -> int:
        options = body.get("options") or {}
        if not isinstance(options, dict):
            raise Refused(400, {"error": "json: cannot unmarshal into Go struct field EmbedRequest.options"})
        asked = options.get("num_ctx", _DEFAULT_CONTEXT)
        if not isinstance(asked, int) or isinstance(asked, bool):
            raise Refused(500, {"error": 'option "num_ctx" must be of type integer'})
        return min(asked, self.limit, model.context or self.limit)

    def _fields(self, request: Request) -> dict[str, Any]:
        if not isinstance(request.body, dict):
            raise Refused(400, {"error": "missing request body" if not request.body else "invalid character"})
        kept = request.body.get("keep_alive")
        if isinstance(kept, str) and not _DURATION.fullmatch(kept):
            raise Refused(400, {"error": f'time: missing unit in duration "{kept}"'})
        if kept is not None and not isinstance(kept, (str, int, float)):
            raise Refused(400, {"error": f"Unsupported type: {type(kept).__name__}"})
        return request.body

    def _model(self, body: dict[str, Any], *keys: str) -> Model:
        name = next((body[key] for key in keys if body.get(key)), "")
        if not isinstance(name, str) or not name:
            raise Refused(400, {"error": "model is required"})
        full = name if ":" in name.rpartition("/")[2] else f"{name}:latest"
        for model in self.models:
            if model.name.lower() == full.lower():
                return model
        raise Refused(404, {"error": f'model "{name}" not found, try pulling it first'})


def _typed(body: dict[str, Any], name: str, kind: type, go: str) -> None:
    value = body.get(name)
    if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise Refused(400, {"error": f"json: cannot unmarshal into Go struct field EmbedRequest.{name} of type {go}"})
