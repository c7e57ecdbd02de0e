"""Does the promise hold? Random dev/test splits of a data set, thresholds by `guarantee` on dev, counted on the rest.

Each draw takes as many answerable and unanswerable questions for dev as the data set's own dev split has. Beside the
evidence of two-stage hybrid search, the same promise is kept with one fixed threshold on flat dense cosines.

usage: python benchmarks/guarantee.py [--set clinc150] [--draws 200] [--data FOLDER] [--cache FOLDER] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment

from gemma_rag import GemmaEmbeddings, TwoStageRetriever
from gemma_rag.calibrating import fit_evidence
from gemma_rag.calibration import guarantee
from gemma_rag.evaluation import open_base
from gemma_rag.labelled import Dataset
from gemma_rag.observing import Observed, observe


def draw(some: Observed, sizes: tuple[int, int], seed: int) -> np.ndarray:
    """Which questions are for dev, bool of shape ``(n,)``."""
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(some.fused), dtype=bool)
    for answerable, size in zip((True, False), sizes, strict=True):
        places = np.flatnonzero(some.answerable == answerable)
        chosen[rng.choice(places, size, replace=False)] = True
    return chosen


def outcome(scores: np.ndarray, threshold: float, some: Observed, rest: np.ndarray) -> dict[str, float]:
    answered = scores >= threshold
    return {
        "false_answers": float(answered[rest & ~some.answerable].mean()),
        "coverage": float(answered[rest & some.answerable].mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="clinc150")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--data", type=Path, default=os.environ.get("GEMMA_RAG_DATA"))
    parser.add_argument("--cache", type=Path, default=Path(".cache/eval"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.data is None:
        parser.error("say where the data sets are: --data FOLDER, or GEMMA_RAG_DATA")
    dataset = Dataset.load(Path(options.data) / options.set)
    dev = dataset.split("dev")
    sizes = (sum(q.answerable for q in dev), sum(not q.answerable for q in dev))
    with open_base(dataset, GemmaEmbeddings(model="minilm", show_progress=False), options.cache) as base:
        hybrid = observe(base, dataset.questions, TwoStageRetriever(base))["hybrid"]
        flat = observe(base, dataset.questions, TwoStageRetriever(base, mode="flat", hybrid=False))["dense"]
    rows: list[dict[str, Any]] = []
    for seed in range(options.draws):
        chosen = draw(hybrid, sizes, seed)
        labels = (hybrid.answerable[chosen], hybrid.right[chosen])
        promise = (options.rate, options.confidence)
        evidence, held_out = fit_evidence(hybrid.some(chosen), seed=seed, rate=options.rate)
        ours = outcome(evidence.score(hybrid.values), guarantee(held_out, *labels, *promise).threshold, hybrid, ~chosen)
        fixed = guarantee(flat.fused[chosen], flat.answerable[chosen], flat.right[chosen], *promise).threshold
        rows.append({"ours": ours, "fixed": outcome(flat.fused, fixed, flat, ~chosen)})
    report: dict[str, Any] = {"set": options.set, "draws": options.draws, "dev": sizes, "promise": promise}
    for name in ("ours", "fixed"):
        false = np.array([row[name]["false_answers"] for row in rows])
        report[name] = {
            "held": float((false <= options.rate).mean()),
            "false_answers": float(false.mean()),
            "coverage": float(np.mean([row[name]["coverage"] for row in rows])),
        }
        print(f"{name:6s} held in {report[name]['held']:.1%} of {options.draws} splits; false answers "
              f"{report[name]['false_answers']:.2%}; answerable questions answered {report[name]['coverage']:.1%}")  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps({**environment(), **report}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
