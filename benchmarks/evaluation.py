"""The retrieval table: what was there before beside what gemma-rag does, with and without labels, on four data sets.

Baselines are measured in the same run: flat dense search for English; for Chinese, which MiniLM does not read, BM25 over
jieba's words and TF-IDF over character 1- and 2-grams (scikit-learn). Learned orders and thresholds come from the dev
split; the test split is reported.

usage: python benchmarks/evaluation.py [--data FOLDER] [--cache FOLDER] [--out FILE.json] [SET ...]
       FOLDER holds the data sets; by default it is the environment variable GEMMA_RAG_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment

from gemma_rag import GemmaEmbeddings
from gemma_rag.encoders.words_only import WordsOnly
from gemma_rag.evaluation import evaluate, open_base
from gemma_rag.labelled import Dataset
from gemma_rag.lexical import reads_as_chinese

SETS = ("clinc150", "squad2", "drcd", "stard")
REACH = {
    "clinc150": {
        "no labels": {"recall@1": 0.835, "recall@5": 0.965},
        "dev labels": {"recall@1": 0.85, "recall@5": 0.975, "abstention_auroc": 0.945, "end_to_end": 0.79},
    },
    "squad2": {
        "no labels": {"recall@1": 0.79, "recall@5": 0.95, "documents_scored": -0.20},
        "dev labels": {"recall@1": 0.81, "recall@5": 0.96, "end_to_end": 0.64},
    },
    "drcd": {"no labels": {"recall@1": 0.91, "recall@5": 0.985}},
    "stard": {"no labels": {"recall@1": 0.33, "recall@5": 0.53}, "dev labels": {"recall@1": 0.35}},
}
"""The numbers to reach; a negative one is an upper bound."""

SHOWN = ("recall@1", "recall@5", "documents_scored", "routing_loss", "abstention_auroc", "end_to_end")


def character_tfidf(dataset: Dataset) -> dict[str, float]:
    """The baseline for Chinese: cosines of TF-IDF vectors over character 1- and 2-grams."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 2), sublinear_tf=True)
    documents = vectors.fit_transform([f"{d.title}\n{d.text}" for d in dataset.documents])
    questions = [q for q in dataset.split("test") if q.answerable]
    return _recall(dataset, questions, vectors.transform([q.question for q in questions]) @ documents.T)


def word_bm25(dataset: Dataset) -> dict[str, float]:
    """The other one: BM25 over jieba's words, as they are written."""
    import bm25s
    import rjieba

    def cut(text: str) -> list[str]:
        return [word for word in rjieba.cut(text) if word.strip()]

    engine = bm25s.BM25(method="lucene")
    engine.index([cut(f"{d.title}\n{d.text}") for d in dataset.documents], show_progress=False)
    questions = [q for q in dataset.split("test") if q.answerable]
    known = set(engine.vocab_dict)
    rows = [engine.get_scores(words) if (words := [w for w in cut(q.question) if w in known]) else None for q in questions]
    empty = np.zeros(len(dataset.documents))
    return _recall(dataset, questions, np.stack([empty if row is None else row for row in rows]))


def _recall(dataset: Dataset, questions: list[Any], scores: Any) -> dict[str, float]:
    ids = [document.id for document in dataset.documents]
    found = {1: 0, 5: 0}
    for i, question in enumerate(questions):
        row = scores[i].toarray()[0] if hasattr(scores, "toarray") else scores[i]
        best = [ids[place] for place in np.argsort(-row, kind="stable")[:5]]
        for k in found:
            found[k] += bool(set(best[:k]) & set(question.relevant))
    return {f"recall@{k}": round(count / len(questions), 4) for k, count in found.items()}


def ways(dataset: Dataset, base: Any) -> dict[str, dict[str, Any]]:
    """Every way of searching that the table shows."""
    if base.space.model == "none":
        return {
            "before: BM25, words": word_bm25(dataset),
            "before: TF-IDF, characters": character_tfidf(dataset),
            "no labels": evaluate(dataset, base, mode="lexical").to_json(),
        }
    return {
        "before: flat dense": evaluate(dataset, base, mode="flat").to_json(),
        "before: classic": evaluate(dataset, base, mode="classic").to_json(),
        "two-stage dense": evaluate(dataset, base).to_json(),
        "flat hybrid": evaluate(dataset, base, mode="flat", hybrid=True).to_json(),
        "no labels": evaluate(dataset, base, hybrid=True).to_json(),
        "dev labels": evaluate(dataset, base, hybrid=True, router="learned").to_json(),
    }


def missed(name: str, found: dict[str, dict[str, Any]]) -> list[str]:
    """Which numbers were not reached."""
    out = []
    for way, goals in REACH.get(name, {}).items():
        result = found.get(way) or found["no labels"]
        for number, goal in goals.items():
            if (result[number] > -goal) if goal < 0 else (result[number] < goal):
                out.append(f"{name}, {way}: {number} is {result[number]:.4f}, and {abs(goal)} was to be reached")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=SETS)
    parser.add_argument("--data", type=Path, default=os.environ.get("GEMMA_RAG_DATA"))
    parser.add_argument("--cache", type=Path, default=Path(".cache/eval"))
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    options = parser.parse_args()
    if options.data is None:
        parser.error("say where the data sets are: --data FOLDER, or GEMMA_RAG_DATA")
    embeddings = GemmaEmbeddings(model="minilm", show_progress=False)
    report: dict[str, Any] = {}
    short: list[str] = []
    print(f"{'test split':34s}" + "".join(f"{name:>18s}" for name in SHOWN))
    for name in options.sets:
        dataset = Dataset.load(Path(options.data) / name)
        started = time.perf_counter()
        chinese = reads_as_chinese(dataset.questions[0].question)
        with open_base(dataset, WordsOnly() if chinese else embeddings, options.cache) as base:
            found = ways(dataset, base)
        report[name] = found
        print(f"{name}: {len(dataset.documents)} documents, {time.perf_counter() - started:.0f} s")
        for way, result in found.items():
            numbers = [result.get(number) for number in SHOWN]
            print(f"  {way:32s}" + "".join(f"{'-' if n is None else format(n, '.3f'):>18s}" for n in numbers), flush=True)
            for note in result.get("notes", []):
                print(f"    {note}")
        short += missed(name, found)
    print("\n".join(short) if short else "every number that was to be reached is reached")
    if options.out:
        options.out.write_text(json.dumps({**environment(), "sets": report}, indent=1) + "\n", encoding="utf-8")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
