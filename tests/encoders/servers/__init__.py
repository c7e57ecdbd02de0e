"""Strict stand-ins for the three protocols, written from their public documentation and sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gemma_rag.encoders import EncoderSettings, TextEncoder, load_encoder

from .base import StandIn
from .ollama import OllamaServer
from .openai import OpenAIServer
from .tei import TeiServer


@dataclass(frozen=True)
class Protocol:
    """A runtime of ours and the stand-in that speaks its protocol.

    Attributes:
        runtime: Its name in `EncoderSettings`.
        model: The model that its stand-in serves where nothing else is said.
        server: Makes the stand-in.
        path: Where texts are embedded.
    """

    runtime: str
    model: str
    server: Callable[..., StandIn]
    path: str

    def settings(self, server: StandIn, **options: Any) -> EncoderSettings:
        options = {"model": self.model, "url": server.url, "show_progress": False, **options}
        return EncoderSettings(runtime=self.runtime, **options)

    def encoder(self, server: StandIn, **options: Any) -> TextEncoder:
        """An encoder that has asked the stand-in all that it wants to know; what it asked is forgotten."""
        encoder = load_encoder(self.settings(server, **options))
        assert isinstance(encoder, TextEncoder)
        _ = encoder.space
        server.forget()
        return encoder


OLLAMA = Protocol("ollama", "embeddinggemma:300m", OllamaServer, "/api/embed")
TEI = Protocol("tei", "google/embeddinggemma-300m", TeiServer, "/embed")
OPENAI = Protocol("openai", "google/embeddinggemma-300m", OpenAIServer, "/v1/embeddings")
PROTOCOLS = (OLLAMA, TEI, OPENAI)
