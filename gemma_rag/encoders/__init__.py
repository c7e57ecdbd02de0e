"""Runtimes that turn texts into vectors, one file each; `load_encoder` chooses by the settings."""

from __future__ import annotations

from collections.abc import Callable

from gemma_rag.encoders.base import Encoder, Input, Overflow, Space, is_encoder
from gemma_rag.encoders.cached import CachedEncoder
from gemma_rag.encoders.engine import Engine
from gemma_rag.encoders.settings import EncoderSettings
from gemma_rag.encoders.text_encoder import TextEncoder

__all__ = [
    "CachedEncoder",
    "Encoder",
    "EncoderSettings",
    "Input",
    "Overflow",
    "Space",
    "TextEncoder",
    "is_encoder",
    "load_encoder",
]


def load_encoder(settings: EncoderSettings) -> TextEncoder | CachedEncoder:
    """The encoder that the settings ask for.

    Whether the model can be had is found out now, within seconds; weights are loaded when first used.

    Raises:
        MissingExtra: The runtime is not installed.
        ModelUnavailable: The model cannot be had; the message says what to do.
        EmbeddingServerError: The server cannot be reached, or refuses.
    """
    encoder = TextEncoder(settings, _engine(settings))
    return encoder if settings.cache is None else CachedEncoder(encoder, settings.cache)


def _engine(settings: EncoderSettings) -> Callable[[], Engine]:
    """What makes the engine, once everything is known to be there; a server is asked at once."""
    from gemma_rag.encoders import exported

    runtime = settings.runtime
    engine: Engine
    if runtime == "ollama":
        from gemma_rag.encoders.ollama import OllamaEngine

        engine = OllamaEngine(settings)
        return lambda: engine
    if runtime == "tei":
        from gemma_rag.encoders.tei import TeiEngine

        engine = TeiEngine(settings)
        return lambda: engine
    if runtime == "openai":
        from gemma_rag.encoders.openai import OpenAIEngine

        engine = OpenAIEngine(settings)
        return lambda: engine
    folder = exported.find(settings)
    if folder is not None and folder.runtime == "onnx":
        from gemma_rag.encoders.onnx import OnnxEngine

        return lambda: OnnxEngine(settings, folder)
    if folder is not None:
        from gemma_rag.encoders.openvino import OpenVinoEngine

        return lambda: OpenVinoEngine(settings, folder)
    from gemma_rag.encoders.sentence_transformers import SentenceTransformerEngine, find_source

    source = find_source(settings)
    return lambda: SentenceTransformerEngine(settings, source)
