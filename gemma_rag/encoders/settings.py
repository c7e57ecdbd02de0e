"""How an encoder is asked for: one set of fields, shared by `GemmaEmbeddings`, the knowledge base and the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator
from typing_extensions import Self

from gemma_rag.encoders.base import Overflow
from gemma_rag.encoders.models import OFFLINE_MODEL
from gemma_rag.prompts import PromptProfile

DEFAULT_MODEL = "google/embeddinggemma-300m"
API_KEY = "GEMMA_RAG_API_KEY"
"""The environment variable that holds the API key of a server, so that it need not stand in code or in a command."""

Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]
Runtime: TypeAlias = Literal["auto", "sentence-transformers", "onnx", "openvino", "ollama", "tei", "openai"]
REMOTE = ("ollama", "tei", "openai")

_LOCAL_ONLY = ("device", "batch_tokens", "revision", "token")
_REMOTE_ONLY = ("url", "api_key", "tokenizer", "timeout", "retries", "concurrency", "batch_texts")


class EncoderSettings(BaseModel):
    """Which model makes the vectors, where, and how."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, arbitrary_types_allowed=True, protected_namespaces=(), hide_input_in_errors=True
    )

    model: str = Field(
        default=DEFAULT_MODEL,
        description="Id on the Hugging Face hub, a local folder, or one of the short names `embeddinggemma`, "
        "`embeddinggemma-2` and `minilm` (the offline all-MiniLM-L6-v2 of the extra `gemma-rag[minilm]`). For a server: the "
        "name that it knows the model by; the short names are translated.",
    )
    runtime: Runtime = Field(
        default="auto",
        description="What computes the vectors. `auto`: the engine that a folder was exported for with `gemma-rag export`, "
        "else sentence-transformers.",
    )
    dimensions: int | None = Field(
        default=None,
        ge=1,
        description="Matryoshka dimension, 768, 512, 256 or 128 for EmbeddingGemma: vectors are cut to it and "
        "normalised again. None: the model's own.",
    )
    untrained_dimensions: bool = Field(
        default=False, description="Allow a dimension that the model was not trained to be cut to."
    )
    prompts: str | PromptProfile | None = Field(
        default=None,
        description="Name of a prompt profile (`embeddinggemma`, `e5`, `none` ...) or a profile of your own. None: chosen by "
        "the model's own configuration and id.",
    )
    detect_prompts: bool = Field(
        default=True, description="Leave a text alone that already starts with one of the model's prompts (one warning)."
    )
    max_tokens: int | None = Field(
        default=None, ge=8, description="Context in tokens, prompt included. None: all that the model has."
    )
    on_overflow: Overflow = Field(
        default="truncate",
        description="For texts longer than the context: `truncate` (one warning that counts them), `error`, or `average` "
        "(split, and average the parts' vectors weighted by their tokens).",
    )
    device: str | None = Field(default=None, description="`cpu`, `cuda`, `cuda:1`, `mps`. None: the best there is.")
    precision: Precision = Field(
        default="float32",
        description="Number format of the computation. float16 is refused for the Gemma models. The int8 of an exported "
        "folder is the folder's own.",
    )
    batch_tokens: int | None = Field(
        default=None, ge=1, description="Most tokens in a batch, padding counted. None: a measured value for the device."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")
    token: SecretStr | None = Field(default=None, description="Hugging Face token. None: the one you are logged in with.")
    url: str | None = Field(
        default=None,
        description="Address of the server, as http://localhost:11434. None: the server's usual one on this machine.",
    )
    api_key: SecretStr | None = Field(
        default=None, description=f"Key of the server, sent as a bearer token. None: the environment variable {API_KEY}."
    )
    tokenizer: str | None = Field(
        default=None,
        description="Where a server's texts are counted and cut: a tokenizer.json, a folder that has one, or an id on the hub. "
        "None: the server's own, or what of the model is on this machine; else tokens are estimated, on the safe side.",
    )
    timeout: float = Field(default=60.0, gt=0, description="Seconds to wait for a server's answer.")
    retries: int = Field(
        default=4,
        ge=0,
        description="How often a request is tried again where that can help (429, 502, 503, 504, no connection).",
    )
    concurrency: int = Field(default=4, ge=1, le=256, description="Most requests to a server at a time.")
    batch_texts: int | None = Field(
        default=None, ge=1, description="Most texts in a request. None: what the server says, or a usual value."
    )
    keep_alive: str | None = Field(
        default=None, description="How long Ollama keeps the model in memory, as `5m` or `-1` for ever. None: its own default."
    )
    cache: Path | str | None = Field(
        default=None,
        union_mode="left_to_right",  # a string becomes a path
        description="Keep vectors in this folder, so that no text is computed twice. None: nowhere.",
    )
    show_progress: bool = Field(default=True, description="Show a progress bar on long work, on a terminal only.")

    @model_validator(mode="after")
    def _only_what_the_runtime_uses(self) -> Self:
        idle = _LOCAL_ONLY if self.runtime in REMOTE else _REMOTE_ONLY
        unused = [name for name in idle if getattr(self, name) != EncoderSettings.model_fields[name].default]
        if unused:
            raise ValueError(f"the runtime {self.runtime} does not use {', '.join(unused)}")
        if self.keep_alive is not None and self.runtime != "ollama":
            raise ValueError(f"the runtime {self.runtime} does not use keep_alive")
        if self.runtime not in ("auto", "sentence-transformers", "openvino") and self.precision != "float32":
            raise ValueError(f"the precision of the runtime {self.runtime} is its model's own: leave precision out")
        if self.url is not None:
            try:
                parts = urlsplit(self.url)
                good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
            except ValueError:  # its message repeats the address, and a password in it
                good = False
            if not good:
                raise ValueError("url is an address as http://localhost:11434")
            if parts.username is not None or parts.query or parts.fragment:
                raise ValueError("url holds an address alone: no user, no password (give api_key), and nothing after ? or #")
        return self

    def changed(self, **changes: Any) -> EncoderSettings:
        """These settings with some of them replaced, checked as new ones are."""
        return EncoderSettings(**({name: getattr(self, name) for name in EncoderSettings.model_fields} | changes))

    def secret(self) -> str | None:
        """The server's key, from `api_key` or the environment."""
        return self.api_key.get_secret_value() if self.api_key else os.environ.get(API_KEY) or None

    def recipe(self) -> dict[str, Any]:
        """The settings as plain JSON, to load the same encoder again: no secret, and nothing left at its default.

        A model's folder is written out in full, so that it is found from anywhere. A prompt profile of your own is left out
        too: whoever opens the knowledge base has to give it again.
        """
        kept = self.model_dump(
            mode="json", exclude={"token", "api_key", "show_progress", "prompts", "cache"}, exclude_defaults=True
        )
        if isinstance(self.prompts, str):
            kept["prompts"] = self.prompts
        here = self.model != OFFLINE_MODEL and self.runtime not in REMOTE
        kept["model"] = _in_full(self.model) if here else self.model
        if self.tokenizer is not None:
            kept["tokenizer"] = self.tokenizer if self.tokenizer == OFFLINE_MODEL else _in_full(self.tokenizer)
        return kept


def _in_full(name: str) -> str:
    """The whole path of what is on this machine; anything else as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
