"""A small handbook, models with and without prompts, and a listener for LlamaIndex's events."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_index.core.instrumentation as instrument
import pytest
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from pydantic import PrivateAttr

from gemma_rag import Document, GemmaEmbeddings, KnowledgeBase

PAGES = [
    ("vpn", "VPN", "it", "Install the client. Then sign in to the VPN with your card."),
    ("password", "Passwords", "it", "Reset a forgotten password in the self-service portal."),
    ("printer", "Printers", "it", "The printers on the second floor print in colour."),
    ("laptop", "Laptops", "it", "A broken laptop is exchanged at the service desk within a day."),
    ("holiday", "Holidays", "people", "You have thirty days of paid holiday in a year."),
    ("sick", "Illness", "people", "Call your manager on the first morning when you are ill."),
    ("parents", "Parental leave", "people", "Fathers may take eight weeks of parental leave."),
    ("train", "Trains", "travel", "Go by rail where the journey takes less than four hours."),
    ("flight", "Flights", "travel", "Flights are booked in economy class."),
    ("hotel", "Hotels", "travel", "A hotel may cost a hundred and twenty euros a night."),
]


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    return [
        Document(id=id_, title=title, category=category, text=text, metadata={"year": 2020 + i % 2})
        for i, (id_, title, category, text) in enumerate(PAGES)
    ]


@pytest.fixture(scope="session")
def base(documents: list[Document], minilm: GemmaEmbeddings) -> KnowledgeBase:
    return KnowledgeBase.from_documents(documents, minilm)


@pytest.fixture(scope="session")
def gemma(tiny_gemma: Path) -> GemmaEmbeddings:
    """EmbeddingGemma's architecture and prompts, random weights."""
    return GemmaEmbeddings(model=str(tiny_gemma), device="cpu", show_progress=False)


class Counting(GemmaEmbeddings):
    """Counts its calls, and the texts of each."""

    _calls: list[int] = PrivateAttr(default_factory=list)

    def encode(self, inputs: Any) -> Any:
        self._calls.append(len(inputs))
        return super().encode(inputs)

    async def aencode(self, inputs: Any) -> Any:
        self._calls.append(len(inputs))
        return await super().aencode(inputs)


@pytest.fixture
def counting(tiny_gemma: Path) -> Counting:
    return Counting(model=str(tiny_gemma), device="cpu", show_progress=False)


class Listener(BaseEventHandler):
    """Keeps the events that it is told of."""

    heard: list[Any] = []  # noqa: RUF012 - a field of pydantic's, copied for each listener

    def handle(self, event: Any, **kwargs: Any) -> None:
        self.heard.append(event)

    def names(self) -> list[str]:
        return [event.class_name() for event in self.heard]


@pytest.fixture
def listener() -> Iterator[Listener]:
    dispatcher = instrument.get_dispatcher()
    listener = Listener()
    dispatcher.add_event_handler(listener)
    yield listener
    dispatcher.event_handlers.remove(listener)
