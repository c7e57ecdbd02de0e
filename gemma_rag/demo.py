"""The demonstration: a handbook of 42 documents, half English and half Chinese, and seven questions."""

from __future__ import annotations

import tempfile
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_rag.answer import Answer, GroundedAnswerer
from gemma_rag.encoders import EncoderSettings
from gemma_rag.ingestion import index_source
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.retriever import TwoStageRetriever

if TYPE_CHECKING:
    from gemma_rag.terminal import Terminal

QUESTIONS: tuple[tuple[str, str], ...] = (
    ("An answer, quoted and cited", "Can I fly to a city that I could also reach by rail in four hours?"),
    ("Another", "I still have some holiday left at the end of the year. Do I lose it?"),
    ("A third", "My wife is expecting our first baby. How much time off do I get as the father?"),
    ("Off topic: refused, because it fits no category", "Why do cats purr?"),
    (
        "On topic, but not in the handbook: refused, because no document is close enough",
        "Will the company pay for a removal van if I relocate?",
    ),
    ("Chinese: where the model reads English only, words are matched", "供应商塞给我一个 U 盘，我能直接插到自己电脑上看吗？"),
    ("Chinese, and refused: the handbook says nothing about cameras", "大门口的监控录像会保存多少天？"),
)


def run_demo(settings: EncoderSettings, out: Path | None, show: Terminal) -> list[Answer]:
    """Build the sample knowledge base and ask it the questions.

    Args:
        settings: The encoder.
        out: A new folder for the knowledge base; None for one that is removed afterwards.
        show: Told what happens.

    Returns:
        The answers, in the order of `QUESTIONS`.
    """
    with tempfile.TemporaryDirectory() as scratch, as_file(files("gemma_rag") / "sample") as sample:
        folder = out or Path(scratch) / "handbook"
        report = index_source(
            sample / "handbook", folder, settings=settings, categories=sample / "categories.jsonl", say=show.note
        )
        show.note(f"indexed {report.documents} documents of the sample handbook in {report.seconds:.1f} s")
        answers = []
        with KnowledgeBase.open(folder) as base:
            answerer = GroundedAnswerer(TwoStageRetriever(base))
            for remark, question in QUESTIONS:
                show.heading(question, remark)
                answer = answerer.answer(question)
                show.answer(answer)
                answers.append(answer)
    return answers
