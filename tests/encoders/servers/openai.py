"""A stand-in for servers that speak OpenAI's ``/v1/embeddings``, each with its own ways.

Written from OpenAI's API reference (https://platform.openai.com/docs/api-reference/embeddings) and the documentation and
sources of vLLM, llama.cpp, Infinity and TEI: how each takes ``dimensions`` and ``encoding_format``, and how it refuses.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .base import Answer, Fault, Refused, Request, StandIn, unit

FIELDS = {"model", "input", "encoding_format", "dimensions", "user"}


@dataclass(frozen=True)
class Ways:
    """What one server does in its own way.

    Attributes:
        dimensions: Cuts and normalises again, cuts alone, ignores them, or refuses the request.
        encoded: What becomes of ``encoding_format="base64"``: given, ignored (numbers come), or refused.
        normalised: Whether vectors have norm 1.
        order: In which order the rows of the answer come; each has its ``index``.
        refuses: Whose words its refusals use.
        unknown_fields: Whether a field that the protocol does not have is a fault.
        context: Where ``/v1/models`` says the context: as vLLM, as llama.cpp, or nowhere.
        tokenize: Whose ``/tokenize`` it has.
    """

    dimensions: Literal["right", "cut", "ignored", "refused"] = "right"
    encoded: Literal["given", "ignored", "refused"] = "given"
    normalised: bool = True
    order: Literal["as asked", "reversed"] = "as asked"
    refuses: Literal["openai", "vllm", "llama.cpp", "infinity", "tei"] = "openai"
    unknown_fields: Literal["refused", "ignored"] = "refused"
    context: Literal["vllm", "llama.cpp", "nowhere"] = "nowhere"
    tokenize: Literal["vllm", "llama.cpp", "none"] = "none"


OPENAI = Ways()
VLLM = Ways(dimensions="refused", refuses="vllm", unknown_fields="ignored", context="vllm", tokenize="vllm")
LLAMA_CPP = Ways(
    dimensions="ignored",
    normalised=False,
    refuses="llama.cpp",
    unknown_fields="ignored",
    context="llama.cpp",
    tokenize="llama.cpp",
)
INFINITY = Ways(dimensions="cut", refuses="infinity", unknown_fields="ignored")
TEI = Ways(dimensions="right", encoded="given", refuses="tei", unknown_fields="ignored")
LM_STUDIO = Ways(dimensions="ignored", encoded="ignored", unknown_fields="ignored")
BACKWARDS = Ways(order="reversed")
NUMBERS_ONLY = Ways(encoded="refused", refuses="infinity", unknown_fields="ignored")


class OpenAIServer(StandIn):
    """A server of ``/v1/embeddings``.

    Args:
        models: The ids that ``/v1/models`` lists.
        ways: Whose ways it has.
        batch: Most texts in a request.
        kwargs: As for `StandIn`.
    """

    embedding_paths = ("/v1/embeddings",)

    def __init__(
        self, *models: str, ways: Ways = OPENAI, batch: int = 2048, listed: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.models = list(models or ("google/embeddinggemma-300m",))
        self.listed = self.models if listed is None else list(listed)
        self.ways, self.batch = ways, batch

    def route(self, request: Request, fault: Fault | None) -> Answer:
        match request.method, request.path:
            case "GET", "/v1/models":
                return Answer({"object": "list", "data": [self._entry(model) for model in self.listed]})
            case "POST", "/v1/embeddings":
                return self._embeddings(self._fields(request), fault)
            case "POST", "/tokenize" if self.ways.tokenize != "none":
                return self._tokenize(self._fields(request))
        raise self._refusal(404, "Not Found")

    def _entry(self, model: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"id": model, "object": "model", "created": 1763676000, "owned_by": "stand-in"}
        if self.ways.context == "vllm":
            entry |= {"root": model, "parent": None, "max_model_len": self.limit, "permission": []}
        if self.ways.context == "llama.cpp":
            entry["meta"] = {
                "vocab_type": 1,
                "n_vocab": 262144,
                "n_ctx_train": self.limit,
                "n_embd": 768,
                "n_params": 307581696,
            }
        return entry

    def _embeddings(self, body: dict[str, Any], fault: Fault | None) -> Answer:
        texts = self._checked(body)
        dimensions, encoded = body.get("dimensions"), body.get("encoding_format", "float")
        rows = self.rows(texts, fault, normalise=self.ways.normalised)
        spoiled = fault is not None and fault.rows is not None
        data = [
            {"object": "embedding", "index": i, "embedding": self._form(row, dimensions, encoded, spoiled)}
            for i, row in enumerate(rows)
        ]
        tokens = sum(map(self.count, texts))
        answer = {
            "object": "list",
            "data": data[::-1] if self.ways.order == "reversed" else data,
            "model": body["model"],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        return Answer(answer)

    def _form(self, row: Sequence[float], dimensions: int | None, encoded: str, spoiled: bool) -> Any:
        if not all(isinstance(number, float) for number in row):
            return row  # spoiled
        vector = np.asarray(row, dtype="<f4")
        if dimensions and self.ways.dimensions in ("right", "cut"):
            vector = vector[:dimensions]
        if self.ways.dimensions == "right" and self.ways.normalised and not spoiled:
            vector = unit(vector).astype("<f4")
        if encoded == "base64" and self.ways.encoded == "given":
            return base64.b64encode(vector.tobytes()).decode()
        return vector.tolist()

    def _checked(self, body: dict[str, Any]) -> list[str]:
        if self.ways.unknown_fields == "refused" and (unknown := sorted(body.keys() - FIELDS)):
            raise self._refusal(400, f"Unrecognized request argument supplied: {', '.join(unknown)}")
        if not isinstance(body.get("model"), str):
            raise self._refusal(400, "you must provide a model parameter")
        if body["model"] not in self.models and self.ways.refuses not in ("llama.cpp", "tei"):  # these two do not look
            raise self._refusal(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
        texts = [body["input"]] if isinstance(body.get("input"), str) else body.get("input")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise self._refusal(400, "'$.input' is invalid. Please check the API reference.")
        if body.get("encoding_format", "float") not in ("float", "base64"):
            raise self._refusal(400, "encoding_format must be float or base64")
        if body.get("encoding_format") == "base64" and self.ways.encoded == "refused":
            problem = {"type": "literal_error", "loc": ["body", "encoding_format"], "msg": "Input should be 'float'"}
            raise Refused(422, {"detail": [problem | {"input": "base64", "ctx": {"expected": "'float'"}}]})
        if body.get("dimensions") is not None and self.ways.dimensions == "refused":
            message = f"Model '{body['model']}' does not support Matryoshka embeddings; dimensions must be unset"
            raise self._refusal(400, message, "BadRequestError")
        if len(texts) > self.batch:
            raise self._too_many(len(texts))
        for text in texts:
            if self.count(text) > self.limit and self.ways.refuses != "infinity":
                raise self._too_long(self.count(text))
        return [self.cut(text, self.limit) for text in texts]  # Infinity's way with long texts: in silence

    def _tokenize(self, body: dict[str, Any]) -> Answer:
        if self.ways.tokenize == "llama.cpp":
            ids = [10 + i for i, _ in enumerate(self.tokens(body.get("content", "")))]
            return Answer({"tokens": [1, *ids, 2] if body.get("add_special") is True else ids})
        if not isinstance(body.get("prompt"), str):
            raise self._refusal(400, "prompt: Field required")
        ids = [10 + i for i, _ in enumerate(self.tokens(body["prompt"]))]
        whole = ids if body.get("add_special_tokens") is False else [1, *ids, 2]
        return Answer({"count": len(whole), "max_model_len": self.limit, "tokens": whole, "token_strs": None})

    def _fields(self, request: Request) -> dict[str, Any]:
        if request.headers.get("content-type") != "application/json" or not isinstance(request.body, dict):
            raise self._refusal(400, "We could not parse the JSON body of your request.")
        return request.body

    # -- how each refuses -------------------------------------------------------------------------------------------

    def refused_key(self) -> Refused:
        message = "Incorrect API key provided. You can find your API key in the settings."
        return self._refusal(401, message, "invalid_request_error", "invalid_api_key")

    def _refusal(self, status: int, message: str, kind: str = "invalid_request_error", code: Any = None) -> Refused:
        match self.ways.refuses:
            case "infinity":
                return Refused(status, {"detail": message})
            case "tei":
                return Refused(status, {"message": message, "code": status, "type": "Validation"})
            case "vllm":
                return Refused(
                    status, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}
                )
            case "llama.cpp":
                return Refused(status, {"error": {"code": status, "message": message, "type": "server_error"}})
        return Refused(status, {"error": {"message": message, "type": kind, "param": None, "code": code}})

    def _too_many(self, count: int) -> Refused:
        match self.ways.refuses:
            case "infinity":
                message = f"List should have at most {self.batch} items after validation, not {count}"
                return Refused(422, {"detail": [{"type": "too_long", "loc": ["body", "input"], "msg": message}]})
            case "tei":
                return self._refusal(413, f"batch size {count} > maximum allowed batch size {self.batch}")
        message = f"Invalid 'input': array too long. Expected an array with maximum length {self.batch}, "
        message += f"but got an array with length {count} instead."
        return self._refusal(400, message, code="array_above_max_length")

    def _too_long(self, count: int) -> Refused:
        match self.ways.refuses:
            case "vllm":
                message = (
                    f"This model's maximum context length is {self.limit} tokens. However, you requested {count} tokens in "
                )
                return self._refusal(
                    400, message + "the input for embedding generation. Please reduce the length of the input."
                )
            case "llama.cpp":
                message = (
                    f"input ({count} tokens) is too large to process. increase the physical batch size (current batch size: "
                )
                return self._refusal(500, f"{message}{self.limit})")
            case "tei":
                return self._refusal(
                    413, f"Input validation error: `inputs` must have less than {self.limit} tokens. Given: {count}"
                )
        return self._refusal(400, f"Invalid 'input[0]': maximum input length is {self.limit} tokens.")
