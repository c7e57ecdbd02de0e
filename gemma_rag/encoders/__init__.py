"""Runtimes that turn texts into vectors, one file each; `load_encoder` chooses by the settings."""

from __future__ import annotations

from gemma_rag.encoders.base import Encoder, Input, Overflow, Space, is_encoder
from gemma_rag.encoders.settings import EncoderSettings

__all__ = ["Encoder", "EncoderSettings", "Input", "Overflow", "Space", "is_encoder", "load_encoder"]


def load_encoder(settings: EncoderSettings) -> Encoder:
    """The encoder that the settings ask for. It loads its weights when first used.

    Raises:
        MissingExtra: The runtime is not installed.
        ModelUnavailable: The model cannot be had; the message says what to do.
    """
    from gemma_rag.encoders.sentence_transformers import SentenceTransformerEncoder

    return SentenceTransformerEncoder(settings)
