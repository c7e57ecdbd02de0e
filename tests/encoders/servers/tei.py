"""A stand-in for Text Embeddings Inference.

Written from docs/openapi.json, router/src/http/server.rs and core/src/tokenization.rs of
https://github.com/huggingface/text-embeddings-inference: what is validated and in which order, status 413 for every
refused input (a batch too large, a text too long, a prompt name unknown), 422 for a body of the wrong shape, and the
server's own prompt, which it puts before a text whenever no ``prompt_name`` comes with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from .base import Answer, Fault, Refused, Request, StandIn, unit


class TeiServer(StandIn):
    """TEI with one model.

    Args:
        model_id: The model, as ``/info`` has it.
        sha: Its revision; None for a model from a folder.
        dtype: Number format of the computation.
        batch: Most texts in a request (``--max-client-batch-size``).
        prompts: The prompts of the model's configuration by name; None where it has none.
        default_prompt: What is put before texts that come without a prompt name (``--default-prompt``).
        auto_truncate: Cut texts that are too long where the request does not say.
        kind: What the model is for, as ``/info`` has it.
        kwargs: As for `StandIn`.
    """

    embedding_paths = ("/embed",)
    text_keys = ("inputs",)

    def __init__(
        self,
        model_id: str = "google/embeddinggemma-300m",
        *,
        sha: str | None = "57c266a740f537b4dc058e1b0cda161fd15afa75",
        dtype: str = "float32",
        batch: int = 32,
        prompts: Mapping[str, str] | None = None,
        default_prompt: str | None = None,
        auto_truncate: bool = True,
        kind: str = "embedding",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_id, self.sha, self.dtype, self.batch = model_id, sha, dtype, batch
        self.prompts, self.default_prompt, self.auto_truncate = prompts, default_prompt, auto_truncate
        self.kind = kind

    def route(self, request: Request, fault: Fault | None) -> Answer:
        match request.method, request.path:
            case "GET", "/health":
                return Answer(b"")
            case "GET", "/info":
                return Answer(self._info())
            case "POST", "/embed":
                return self._embed(self._fields(request), fault)
            case "POST", "/tokenize":
                return self._tokenize(self._fields(request))
        raise Refused(404, b"")

    def _info(self) -> dict[str, Any]:
        return {
            "model_id": self.model_id,
            "model_sha": self.sha,
            "model_dtype": self.dtype,
            "served_model_name": self.model_id,
            "model_type": {self.kind: {"pooling": "mean"} if self.kind == "embedding" else {"id2label": {}, "label2id": {}}},
            "max_concurrent_requests": 512,
            "max_input_length": self.limit,
            "max_batch_tokens": 16384,
            "max_batch_requests": None,
            "max_client_batch_size": self.batch,
            "auto_truncate": self.auto_truncate,
            "tokenization_workers": 4,
            "version": "1.9.3",
            "sha": "37bbbb5a15d8ee41ec5dcca0e15e0b4e2ab3b3a4",
            "docker_label": "sha-37bbbb5",
        }

    def _embed(self, body: dict[str, Any], fault: Fault | None) -> Answer:
        if self.kind != "embedding":
            raise Refused(424, {"error": "Model is not an embedding model", "error_type": "Backend"})
        texts = self._inputs(body)
        normalise = _optional(body, "normalize", bool)
        truncate = _optional(body, "truncate", bool)
        dimensions = _optional(body, "dimensions", int)
        if body.get("truncation_direction", "Right") not in ("Left", "Right", "left", "right"):
            raise _unreadable("truncation_direction: unknown variant")
        prompted = [self._prompted(text, body) for text in texts]
        rows = self.rows(self._within_limit(prompted, truncate), fault, normalise=False)
        if dimensions is not None and not 0 < dimensions <= len(rows[0]):
            raise _refused(f"`dimensions` should be in range 1..={len(rows[0])}. Given: {dimensions}")
        cut = [np.asarray(row[:dimensions]) for row in rows]
        spoiled = fault is not None and fault.rows is not None
        return Answer([(row if normalise is False or spoiled else unit(row)).tolist() for row in cut])

    def _tokenize(self, body: dict[str, Any]) -> Answer:
        special = _optional(body, "add_special_tokens", bool)
        answers = []
        for text in self._inputs(body):
            text = self._prompted(text, body)
            tokens = [
                {"id": 10 + i, "text": text[a:b], "special": False, "start": a, "stop": b}
                for i, (a, b) in enumerate(self.tokens(text))
            ]
            if special is not False:
                ends = [{"id": i, "text": mark, "special": True, "start": None, "stop": None} for i, mark in enumerate("^$", 1)]
                tokens = [ends[0], *tokens, ends[1]]
            answers.append(tokens)
        return Answer(answers)

    def _inputs(self, body: dict[str, Any]) -> list[str]:
        if "inputs" not in body:
            raise _unreadable("missing field `inputs`")
        given = body["inputs"]
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise _unreadable("inputs: data did not match any variant of untagged enum Input")
        if not texts:
            raise Refused(400, {"error": "`inputs` cannot be empty", "error_type": "Empty"})
        if len(texts) > self.batch:
            message = f"batch size {len(texts)} > maximum allowed batch size {self.batch}"
            raise Refused(413, {"error": message, "error_type": "Validation"})
        if not all(texts):
            raise _refused("`inputs` cannot be empty")
        return texts

    def _prompted(self, text: str, body: dict[str, Any]) -> str:
        name = _optional(body, "prompt_name", str)
        if name is None:
            return (self.default_prompt or "") + text
        if self.prompts is None:
            raise _refused(
                f"`default-prompt-name` is set to `{name}` but no prompts were found in the Sentence Transformers configuration"
            )
        if name not in self.prompts:
            raise _refused(
                f"`default-prompt-name` is set to `{name}` but it was not found in the Sentence Transformers prompts. "
                f"Available prompts: {json.dumps(sorted(self.prompts, key=str.swapcase))}"  # in no order that helps
            )
        return self.prompts[name] + text

    def _within_limit(self, texts: list[str], truncate: bool | None) -> list[str]:
        if self.auto_truncate if truncate is None else truncate:
            return [self.cut(text, self.limit) for text in texts]
        for text in texts:
            if self.count(text) > self.limit:
                raise _refused(f"`inputs` must have less than {self.limit} tokens. Given: {self.count(text)}")
        return texts

    def _fields(self, request: Request) -> dict[str, Any]:
        if request.headers.get("content-type") != "application/json":
            raise Refused(415, b"Expected request with `Content-Type: application/json`")
        if not isinstance(request.body, dict):
            raise Refused(400, b"Failed to parse the request body as JSON")
        return request.body

    def refused_key(self) -> Refused:
        return Refused(401, b"")


def _optional(body: dict[str, Any], name: str, kind: type) -> Any:
    value = body.get(name)
    if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise _unreadable(f"{name}: invalid type")
    return value


def _refused(problem: str) -> Refused:
    return Refused(413, {"error": f"Input validation error: {problem}", "error_type": "Validation"})


def _unreadable(problem: str) -> Refused:
    return Refused(422, f"Failed to deserialize the JSON body into the target type: {problem} at line 1 column 2".encode())
