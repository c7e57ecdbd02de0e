"""How fast is each runtime? The same texts and the same question, side by side in one run, with the frameworks' own wrappers.

Random weights in the true sizes of EmbeddingGemma (307.6 million parameters) cost what the true ones cost; the model and its
exports are made on the way and take some minutes. Rounds are interleaved, so that what else the machine does falls on all.

usage: python benchmarks/engines.py [--model FOLDER] [--peers PYTHON] [--rounds N] [--keep FOLDER] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment

from gemma_rag.encoders import EncoderSettings, Input, TextEncoder, load_encoder
from gemma_rag.encoders.export import export_model
from gemma_rag.prompts import Task
from gemma_rag.testing import build_random_embeddinggemma

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
QUESTION = "how do I reset my password?"
EXPORTS = (("openvino", "float32"), ("openvino", "int8"), ("onnx", "float32"), ("onnx", "int8"))
DEFAULTS = "sentence-transformers, its defaults"
Work = tuple[Callable[[], object], Callable[[], object]]


def mixed_texts(count: int = 64, seed: int = 0) -> list[str]:
    """Texts of 5 to 120 words, made of a few common words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.choice([5, 8, 12, 20, 40, 80, 120]))) for _ in range(count)]


def exported(model: Path, folder: Path) -> dict[str, Path]:
    made = {}
    for engine, precision in EXPORTS:
        name = f"{engine} {precision}"
        made[name] = folder / name.replace(" ", "-")
        if not made[name].exists():
            started = time.perf_counter()
            about = export_model(EncoderSettings(model=str(model)), made[name], to=engine, precision=precision)
            size = sum(size for size, _ in about.files.values())
            print(
                f"exported {name}: {size / 1e6:.0f} MB in {time.perf_counter() - started:.0f} s, smallest cosine "
                f"{about.agreement.smallest_cosine:.4f}",
                flush=True,
            )
    return made


def ours(encoder: TextEncoder, texts: list[str]) -> Work:
    documents = [Input(text, Task.DOCUMENT) for text in texts]
    question = [Input(QUESTION, Task.QUERY), Input(QUESTION, Task.CLASSIFICATION)]
    return lambda: encoder.encode(documents), lambda: encoder.encode(question)


def library(model: Path, texts: list[str], batch: int) -> Work:
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(str(model), device="cpu", local_files_only=True)

    def two_calls() -> None:
        loaded.encode_query(QUESTION)
        loaded.encode(QUESTION, prompt_name="Classification")

    return lambda: loaded.encode_document(texts, batch_size=batch), two_calls


def measure(works: dict[str, Work], rounds: int) -> dict[str, dict[str, float]]:
    """Best of the rounds, in seconds; each round does everything once (and the question five times)."""
    for bulk, question in works.values():
        question()
        bulk()
    best = {name: {"bulk": float("inf"), "question": float("inf")} for name in works}
    for _ in range(rounds):
        for name, (bulk, question) in works.items():
            for kind, work, times in (("bulk", bulk, 1), ("question", question, 5)):
                for _ in range(times):
                    started = time.perf_counter()
                    work()
                    best[name][kind] = min(best[name][kind], time.perf_counter() - started)
    return best


def peers(python: Path, model: Path, onnx: Path, texts: list[str], rounds: int) -> dict[str, Any]:
    """What the frameworks' own wrappers take, in an environment of their own: see peers.py."""
    work = json.dumps({"model": str(model), "onnx": str(onnx), "texts": texts, "question": QUESTION, "rounds": rounds})
    script = Path(__file__).with_name("peers.py")
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run([str(python), str(script)], input=work, capture_output=True, text=True, check=False, env=quiet)
    if done.returncode:
        sys.exit(f"the peers failed: {done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder; default: the full size with random weights")
    parser.add_argument("--peers", type=Path, help="a Python that has the packages of peers.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="keep the model and its exports in this folder, and take them from there")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    options = parser.parse_args()
    texts = mixed_texts()
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = options.model or folder / "full-embeddinggemma"
        if not model.exists():
            build_random_embeddinggemma(model, "full")
        folders = exported(model, folder)
        encoders = {
            "gemma-rag, sentence-transformers float32": EncoderSettings(model=str(model), device="cpu", show_progress=False),
            "gemma-rag, sentence-transformers bfloat16": EncoderSettings(
                model=str(model), device="cpu", show_progress=False, precision="bfloat16"
            ),
            **{f"gemma-rag, {name}": EncoderSettings(model=str(at), show_progress=False) for name, at in folders.items()},
            "gemma-rag, openvino bfloat16": EncoderSettings(
                model=str(folders["openvino float32"]), show_progress=False, precision="bfloat16"
            ),
        }
        loaded = {name: load_encoder(settings) for name, settings in encoders.items()}
        works = {DEFAULTS: library(model, texts, 32), "sentence-transformers, batch of 8": library(model, texts, 8)}
        works |= {name: ours(encoder, texts) for name, encoder in loaded.items()}
        seconds = measure(works, options.rounds)
        first = loaded["gemma-rag, sentence-transformers float32"]
        inputs = [Input(text, Task.DOCUMENT) for text in texts]
        right = first.encode(inputs)
        cosine = {name: float(np.min((encoder.encode(inputs) * right).sum(axis=1))) for name, encoder in loaded.items()}
        tokens = sum(first.count_tokens([first.profile.render(text, Task.DOCUMENT) for text in texts]))
        versions = {}
        if options.peers:
            loaded.clear()
            works.clear()
            found = peers(options.peers, model, folders["onnx float32"], texts, options.rounds)
            seconds |= found["seconds"]
            versions = found["versions"]
    slowest = seconds[DEFAULTS]
    print(f"{len(texts)} texts of mixed length, {tokens} tokens with their prompts; one question that needs both prompts")
    print(f"  {'':46s} {'bulk':>8s} {'ratio':>6s} {'tokens/s':>9s}   {'question':>8s} {'ratio':>6s}   smallest cosine")
    for name, row in seconds.items():
        ratios = {kind: slowest[kind] / row[kind] for kind in row}
        bulk = f"{row['bulk']:6.2f} s {ratios['bulk']:6.2f} {tokens / row['bulk']:9.0f}"
        question = f"{row['question'] * 1000:5.0f} ms {ratios['question']:6.2f}"
        print(f"  {name:46s} {bulk}   {question}   {f'{cosine[name]:.4f}' if name in cosine else ''}")
    if options.out:
        result = {
            **environment(),
            "threads": os.cpu_count(),
            "texts": len(texts),
            "tokens": tokens,
            "seconds": seconds,
            "smallest_cosine": cosine,
            "peer_versions": versions,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
