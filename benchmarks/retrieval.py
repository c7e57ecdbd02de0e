"""What the category stage costs and saves: recall, share of documents compared, and refusals, by mode.

The data sets have a `corpus.jsonl` (id, category, title, text) and a `queries.jsonl` (id, text, split, relevant,
answerable, kind). Choices are made on `dev`, `test` is for reporting.

usage: python benchmarks/retrieval.py DATASET [--split test] [--lexical-only] [--sweep] [--out FILE.json]
       DATASET is a folder, or its name below the folder in the environment variable GEMMA_RAG_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from environment import environment

from gemma_rag import GemmaEmbeddings, KnowledgeBase, TwoStageRetriever
from gemma_rag.loading import load_documents
from gemma_rag.results import Retrieval
from gemma_rag.routing import Gate
from gemma_rag.search import LEXICAL_CATEGORY_THRESHOLD, LEXICAL_DOCUMENT_THRESHOLD

OFF: dict[str, Any] = {"category_threshold": -1.0, "document_threshold": -1.0}


def summary(results: list[Retrieval], queries: list[dict[str, Any]]) -> dict[str, float]:
    """Recall and refusals over the queries of one split."""
    answerable = [(r, set(q["relevant"])) for r, q in zip(results, queries, strict=True) if q["answerable"]]
    out: dict[str, float] = {}
    for k in (1, 5):
        found = [bool({hit.document.id for hit in r.hits[:k]} & relevant) for r, relevant in answerable]
        out[f"recall@{k}"] = sum(found) / len(found)
    out["documents_scored"] = sum(r.documents_scored / r.documents_total for r in results) / len(results)
    out["answerable_refused"] = sum(not r.hits for r, _ in answerable) / len(answerable)
    for kind in sorted({q["kind"] for q in queries} - {"answerable"}):
        refused = [not r.hits for r, q in zip(results, queries, strict=True) if q["kind"] == kind]
        out[f"{kind}_refused"] = sum(refused) / len(refused)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--split", default="test", choices=("dev", "test"))
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--lexical-only", action="store_true", help="for languages that the model does not read")
    parser.add_argument("--sweep", action="store_true", help="try other gates and thresholds too")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    options = parser.parse_args()
    folder = Path(options.dataset)
    if not folder.is_dir():
        folder = Path(os.environ.get("GEMMA_RAG_DATA", ".")) / options.dataset
    lines = (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    queries = [query for query in map(json.loads, lines) if query["split"] == options.split]
    documents = load_documents(folder / "corpus.jsonl").documents
    embeddings = GemmaEmbeddings(model=options.model, show_progress=False)
    started = time.perf_counter()
    base = KnowledgeBase.from_documents(documents, embeddings)
    print(f"{folder.name}: {len(base)} documents in {len(base.categories)} categories, {base.manifest.chunks} chunks, "
          f"indexed in {time.perf_counter() - started:.1f} s")  # fmt: skip
    runs: dict[str, tuple[Gate, dict[str, Any]]] = {"lexical, default thresholds": (Gate(), {"mode": "lexical"})}
    runs["lexical, no thresholds"] = (Gate(), {"mode": "lexical", **OFF})
    if not options.lexical_only:
        runs |= {
            "flat, no thresholds": (Gate(), {"mode": "flat", **OFF}),
            "two-stage, no thresholds": (Gate(), OFF),
            "flat, default thresholds": (Gate(), {"mode": "flat"}),
            "two-stage, default thresholds": (Gate(), {}),
            "two-stage hybrid, no thresholds": (Gate(), {"hybrid": True, **OFF}),
            "names only, one category": (Gate(name_weight=1.0), {"max_categories": 1, **OFF}),
            "one category": (Gate(), {"max_categories": 1, **OFF}),
        }
    if options.sweep and options.lexical_only:
        for value in (0.05, LEXICAL_CATEGORY_THRESHOLD, LEXICAL_DOCUMENT_THRESHOLD, 0.2, 0.25, 0.3):
            runs[f"lexical, document threshold {value}"] = (Gate(), {"mode": "lexical", **OFF, "document_threshold": value})
    elif options.sweep:
        for mass in (0.97, 0.98, 0.99, 0.995):
            for weight in (0.0, 0.2, 0.5):
                runs[f"mass {mass}, name weight {weight}"] = (Gate(mass=mass, name_weight=weight), OFF)
        for value in (0.05, 0.1, 0.15, 0.2):
            runs[f"category threshold {value}"] = (Gate(), {**OFF, "category_threshold": value})
        for value in (0.2, 0.25, 0.3, 0.35, 0.4):
            runs[f"document threshold {value}"] = (Gate(), {**OFF, "document_threshold": value})
    report: dict[str, dict[str, float]] = {}
    for name, (gate, settings) in runs.items():
        retriever = TwoStageRetriever(base, k=5, gate=gate)
        report[name] = summary(retriever.retrieve_many([query["text"] for query in queries], **settings), queries)
        print(f"  {name:34s} " + "  ".join(f"{key} {value:.3f}" for key, value in report[name].items()), flush=True)
    if options.out:
        result = {**environment(), "dataset": folder.name, "split": options.split, "model": base.space.model, "runs": report}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
