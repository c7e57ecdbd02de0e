"""Fixtures for the runtimes that ask a server."""

from __future__ import annotations

import os

import pytest

from gemma_rag.encoders import transport

from .servers import PROTOCOLS, Protocol


@pytest.fixture(params=PROTOCOLS, ids=lambda protocol: protocol.runtime)
def protocol(request: pytest.FixtureRequest) -> Protocol:
    """Each protocol in turn."""
    return request.param


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds between one attempt and the next, written down and not waited."""
    waited: list[float] = []

    async def pause(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(transport, "sleep", pause)
    return waited


@pytest.fixture
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, key or address from outside."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("GEMMA_RAG_API_KEY", "OLLAMA_HOST", "NETRC", "SSL_CERT_FILE"):
            monkeypatch.delenv(name)
