"""What does an engine, or a precision, cost in recall? MiniLM on squad2, documents ordered by cosine alone, test questions.

usage: GEMMA_RAG_DATA=FOLDER python benchmarks/engine_quality.py [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment

from gemma_rag.encoders import EncoderSettings, Input, load_encoder
from gemma_rag.encoders.export import export_model
from gemma_rag.prompts import Task

ALLOWED = 0.5
"""Points of recall that an engine may lose before it has to warn."""


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def recall(settings: EncoderSettings, corpus: list[dict[str, Any]], questions: list[dict[str, Any]]) -> tuple[dict, np.ndarray]:
    encoder = load_encoder(settings)
    documents = encoder.encode([Input(row["text"], Task.DOCUMENT, row["title"]) for row in corpus])
    asked = encoder.encode([Input(row["text"], Task.QUERY) for row in questions])
    place = {row["id"]: i for i, row in enumerate(corpus)}
    ranks = []
    for scores, row in zip(asked @ documents.T, questions, strict=True):
        best = max(scores[place[relevant]] for relevant in row["relevant"])
        ranks.append(int((scores > best).sum()) + 1)
    found = np.array(ranks)
    return {"recall@1": float((found <= 1).mean()), "recall@5": float((found <= 5).mean())}, np.concatenate([documents, asked])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    options = parser.parse_args()
    data = Path(os.environ["GEMMA_RAG_DATA"]) / "squad2"
    corpus = rows(data / "corpus.jsonl")
    questions = [row for row in rows(data / "queries.jsonl") if row["split"] == "test" and row["answerable"]]
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        plain = {"show_progress": False}
        engines = {
            "sentence-transformers float32": EncoderSettings(model="minilm", device="cpu", **plain),
            "sentence-transformers bfloat16": EncoderSettings(model="minilm", device="cpu", precision="bfloat16", **plain),
        }
        for engine in ("openvino", "onnx"):
            for precision in ("float32", "int8"):
                folder = Path(scratch) / f"{engine}-{precision}"
                export_model(EncoderSettings(model="minilm"), folder, to=engine, precision=precision)
                engines[f"{engine} {precision}"] = EncoderSettings(model=str(folder), **plain)
        engines["openvino bfloat16"] = engines["openvino float32"].changed(precision="bfloat16")
        right: np.ndarray | None = None
        for name, settings in engines.items():
            results[name], vectors = recall(settings, corpus, questions)
            right = vectors if right is None else right
            cosines = (right * vectors).sum(axis=1)
            results[name] |= {"smallest_cosine": float(cosines.min()), "mean_cosine": float(cosines.mean())}
    base = results["sentence-transformers float32"]
    print(f"MiniLM, squad2, {len(corpus)} documents, {len(questions)} answerable test questions")
    for name, row in results.items():
        lost = [100 * (base[kind] - row[kind]) for kind in ("recall@1", "recall@5")]
        row["points_lost"] = lost
        mark = "" if max(lost) <= ALLOWED else f"   more than {ALLOWED} points lost"
        print(
            f"  {name:32s} R@1 {row['recall@1']:.4f} ({-lost[0]:+.2f})   R@5 {row['recall@5']:.4f} ({-lost[1]:+.2f})   "
            f"cosine {row['smallest_cosine']:.4f} at least, {row['mean_cosine']:.4f} on average{mark}"
        )
    if options.out:
        result = {**environment(), "documents": len(corpus), "questions": len(questions), "results": results}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
