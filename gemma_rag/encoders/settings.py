"""How an encoder is asked for: one set of fields, shared by `GemmaEmbeddings`, the knowledge base and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from gemma_rag.encoders.base import Overflow
from gemma_rag.encoders.models import OFFLINE_MODEL
from gemma_rag.prompts import PromptProfile

DEFAULT_MODEL = "google/embeddinggemma-300m"

Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]


class EncoderSettings(BaseModel):
    """Which model makes the vectors, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, protected_namespaces=())

    model: str = Field(
        default=DEFAULT_MODEL,
        description="Id on the Hugging Face hub, a local folder, or one of the short names `embeddinggemma`, "
        "`embeddinggemma-2` and `minilm` (the offline all-MiniLM-L6-v2 of the extra `gemma-rag[minilm]`).",
    )
    runtime: Literal["sentence-transformers"] = Field(default="sentence-transformers", description="What computes the vectors.")
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
        default="float32", description="Number format of the computation. float16 is refused for the Gemma models."
    )
    batch_tokens: int | None = Field(
        default=None, ge=1, description="Most tokens in a batch, padding counted. None: a measured value for the device."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")
    token: SecretStr | None = Field(default=None, description="Hugging Face token. None: the one you are logged in with.")
    show_progress: bool = Field(default=True, description="Show a progress bar on long work, on a terminal only.")

    def recipe(self) -> dict[str, Any]:
        """The settings as plain JSON, to load the same encoder again: no secret, and nothing left at its default.

        A model's folder is written out in full, so that it is found from anywhere. A prompt profile of your own is left out
        too: whoever opens the knowledge base has to give it again.
        """
        kept = self.model_dump(mode="json", exclude={"token", "show_progress", "prompts"}, exclude_defaults=True)
        if isinstance(self.prompts, str):
            kept["prompts"] = self.prompts
        folder = Path(self.model).expanduser()
        local = self.model != OFFLINE_MODEL and folder.is_dir()
        return {**kept, "model": str(folder.resolve()) if local else self.model}
