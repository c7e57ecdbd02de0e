"""The two stages over a store that somebody else filled (Chroma, embedded), beside our own knowledge base.

Measured on the answerable questions of the test split, by vectors alone and with thresholds off: recall at 1 and at 5, and
how many searches of the store a question costs.

usage: python benchmarks/external.py [--sets clinc150 squad2] [--data FOLDER] [--cache FOLDER] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chromadb
from environment import environment
from langchain_chroma import Chroma
from langchain_gemma_rag.stores import StoreSource

from gemma_rag import GemmaEmbeddings, TwoStageRetriever
from gemma_rag.encoders import Encoder
from gemma_rag.evaluation import open_base
from gemma_rag.external import Candidate, ExternalRetriever
from gemma_rag.labelled import Dataset, Labelled
from gemma_rag.results import Retrieval

OFF: dict[str, Any] = {"category_threshold": -1.0, "document_threshold": -1.0}


class Counted:
    """A store that counts how often it is searched."""

    def __init__(self, source: StoreSource) -> None:
        self.source, self.name, self.searches = source, source.name, 0

    def search(self, *asked: Any) -> list[Candidate]:
        self.searches += 1
        return self.source.search(*asked)


def filled(dataset: Dataset, embeddings: GemmaEmbeddings) -> Chroma:
    """A collection with a document of the data set in each entry."""
    store = Chroma(
        dataset.name,
        embeddings,
        client=chromadb.EphemeralClient(),
        collection_configuration={"hnsw": {"space": "cosine"}},
    )
    documents = dataset.documents
    store._collection.add(
        [document.id for document in documents],
        embeddings=embeddings.embed([document.text for document in documents], "document", [d.title for d in documents]),
        documents=[document.text for document in documents],
        metadatas=[{"category": document.category, "title": document.title} for document in documents],
    )
    return store


def recall(retrieve: Callable[[str], Retrieval], questions: list[Labelled]) -> dict[str, float]:
    ranks = []
    for question in questions:
        ids = [hit.document.id for hit in retrieve(question.question).hits]
        ranks.append(next((i for i, found in enumerate(ids, start=1) if found in question.relevant), 99))
    return {f"recall@{k}": round(sum(rank <= k for rank in ranks) / len(ranks), 4) for k in (1, 5)}


def measure(dataset: Dataset, embeddings: GemmaEmbeddings, cache: Path) -> dict[str, Any]:
    questions = [question for question in dataset.split("test") if question.answerable]
    encoder: Encoder = embeddings
    base = open_base(dataset, encoder, cache)
    source = Counted(StoreSource(filled(dataset, embeddings), embeddings=embeddings))
    own = TwoStageRetriever(base, k=5, hybrid=False, **OFF)
    theirs = ExternalRetriever(source, embeddings.embed_query, k=5, **OFF)
    ways: dict[str, Callable[[str], Retrieval]] = {
        "knowledge base, flat": lambda text: own.retrieve(text, mode="flat"),
        "knowledge base, two-stage": own.retrieve,
        "store, flat": lambda text: theirs.retrieve(text, mode="flat"),
        "store, two-stage": theirs.retrieve,
        "store, one category": lambda text: theirs.retrieve(text, max_categories=1),
    }
    out: dict[str, Any] = {}
    for name, retrieve in ways.items():
        source.searches = 0
        out[name] = recall(retrieve, questions)
        if source.searches:
            out[name]["searches"] = round(source.searches / len(questions), 3)
        print(f"{dataset.name:10} {name:28} {out[name]}", flush=True)
    return {"questions": len(questions), "ways": out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=["clinc150", "squad2"])
    parser.add_argument("--data", type=Path, default=os.environ.get("GEMMA_RAG_DATA"))
    parser.add_argument("--cache", type=Path, default=Path(".cache/eval"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.data is None:
        parser.error("say where the data sets are: --data FOLDER, or GEMMA_RAG_DATA")
    embeddings = GemmaEmbeddings(model="minilm", cache=options.cache / "texts", show_progress=False)
    results = {name: measure(Dataset.load(options.data / name), embeddings, options.cache) for name in options.sets}
    if options.out:
        options.out.write_text(json.dumps({**environment(), "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
