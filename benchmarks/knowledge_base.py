"""What a knowledge base costs without its encoder: building, saving, opening, searching, adding.

The vectors are random, so that nothing is said about what is found; two-stage search has little to gain here, because
random categories are all alike.

usage: python benchmarks/knowledge_base.py [--documents N] [--dimensions D] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from environment import environment

from gemma_rag import Document, KnowledgeBase, TwoStageRetriever
from gemma_rag.encoders import Input, Space
from gemma_rag.prompts import NO_PROMPTS
from gemma_rag.vectors import Floats, unit


class RandomEncoder:
    """An encoder that costs next to nothing."""

    profile = replace(NO_PROMPTS, category_threshold=-1.0, document_threshold=-1.0)

    def __init__(self, dimensions: int) -> None:
        self._random = np.random.default_rng(0)
        self.space = Space(
            model="random",
            weights="random",
            prompts="none",
            dimensions=dimensions,
            max_tokens=256,
            overflow="truncate",
            runtime="random",
            precision="float32",
        )

    def encode(self, inputs: Sequence[Input]) -> Floats:
        return unit(self._random.standard_normal((len(inputs), self.space.dimensions), dtype=np.float32))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [10] * len(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    options = parser.parse_args()
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str, repeat: int = 1) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[name] = (time.perf_counter() - started) / repeat
        print(f"  {name:34s} {seconds[name] * 1e3:10.1f} ms", flush=True)

    documents = [
        Document(id=str(i), title="A title", text=f"The text of document number {i}. " * 5, category=f"category {i % 100}")
        for i in range(options.documents)
    ]
    print(f"{options.documents} documents in 100 categories, {options.dimensions} dimensions")
    encoder = RandomEncoder(options.dimensions)
    with tempfile.TemporaryDirectory() as scratch:
        with timed("build in memory"):
            base = KnowledgeBase.from_documents(documents, encoder)
        with timed("save"):
            base.save(Path(scratch) / "kb")
        base.close()
        with timed("open, checksums not compared"), KnowledgeBase.open(Path(scratch) / "kb", encoder, verify=False):
            pass
        with timed("open"):
            base = KnowledgeBase.open(Path(scratch) / "kb", encoder)
        retriever = TwoStageRetriever(base)
        for mode in ("flat", "two-stage", "lexical"):
            with timed(f"first question, {mode}"):
                retriever.retrieve("number 77", mode=mode)
            with timed(f"question, {mode}", repeat=20):
                for i in range(20):
                    retriever.retrieve(f"number {i}", mode=mode)
        with timed("1,000 questions together, two-stage"):
            retriever.retrieve_many([f"number {i}" for i in range(1000)], mode="two-stage")
        with timed("add 100 documents"):
            base.add([document.model_copy(update={"id": f"new {document.id}"}) for document in documents[:100]])
        with timed("next question, two-stage"):
            retriever.retrieve("number 77")
        with timed("delete 100 documents"):
            base.delete([f"new {document.id}" for document in documents[:100]])
        base.close()
    if options.out:
        result = {**environment(), "documents": options.documents, "dimensions": options.dimensions, "seconds": seconds}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
