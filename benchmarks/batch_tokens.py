"""How many tokens should a batch hold? Our token-budget batches against sentence-transformers' fixed batches.

Random weights in the true sizes of EmbeddingGemma (307.6 million parameters) cost what the true ones cost.

usage: python benchmarks/batch_tokens.py [--model FOLDER] [--repeat N] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from environment import environment

from gemma_rag.encoders import EncoderSettings, Input, load_encoder
from gemma_rag.prompts import EMBEDDINGGEMMA, Task
from gemma_rag.testing import build_random_embeddinggemma

BUDGETS = (128, 256, 512, 1024, 2048, 4096)
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "and",
    "asks",
    "how",
    "to",
    "reset",
    "a",
    "password",
]


def best_of(repeat: int, work: Callable[[], object]) -> float:
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder; default: the full size with random weights")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    options = parser.parse_args()
    rng = random.Random(0)
    lengths = [rng.choice([5, 8, 12, 20, 40, 80, 120]) for _ in range(64)]
    texts = [" ".join(rng.choices(WORDS, k=length)) for length in lengths]
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or build_random_embeddinggemma(Path(scratch) / "full", "full")
        encoder = load_encoder(EncoderSettings(model=str(folder), device="cpu", show_progress=False))
        inputs = [Input(text, Task.DOCUMENT) for text in texts]
        encoder.encode(inputs[:4])
        library = encoder.engine.model
        prompt = EMBEDDINGGEMMA.prompts[Task.DOCUMENT]
        seconds = {
            f"sentence-transformers, batch of {size}": best_of(
                options.repeat, lambda size=size: library.encode(texts, prompt=prompt, batch_size=size)
            )
            for size in (32, 8)
        }
        for budget in BUDGETS:
            encoder.engine.batch_tokens = budget
            seconds[f"gemma-rag, {budget} tokens"] = best_of(options.repeat, lambda: encoder.encode(inputs))
        question = [Input(texts[0], Task.QUERY), Input(texts[0], Task.CLASSIFICATION)]
        one = best_of(options.repeat, lambda: encoder.encode(question))
        two = best_of(options.repeat, lambda: [encoder.encode([item]) for item in question])
        tokens = sum(encoder.count_tokens(texts))
    slowest = seconds["sentence-transformers, batch of 32"]
    print(f"{len(texts)} texts of mixed length, {tokens} tokens, {torch.get_num_threads()} threads")
    for name, value in seconds.items():
        print(f"  {name:40s} {value:6.2f} s   x {slowest / value:.2f}")
    print(f"  {'one question, both prompts in one pass':40s} {one:6.3f} s   x {two / one:.2f} of two passes")
    if options.out:
        result = {
            **environment(),
            "threads": torch.get_num_threads(),
            "texts": len(texts),
            "tokens": tokens,
            "seconds": seconds,
            "question_one_pass_seconds": one,
            "question_two_passes_seconds": two,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
