"""What stands around the model: our own code's share, memory over a million texts, the cache, and the start of `gemma-rag ask`.

usage: python benchmarks/encoding.py [--texts N] [--stream N] [--documents N] [--keep FOLDER] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engines import WORDS, mixed_texts
from environment import environment

from gemma_rag import Document, KnowledgeBase
from gemma_rag.encoders import CachedEncoder, EncoderSettings, Input, TextEncoder, load_encoder
from gemma_rag.encoders.export import export_model
from gemma_rag.prompts import Task
from gemma_rag.testing import build_random_embeddinggemma


class Clock:
    """How long some of an object's methods take, in all."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, holder: Any, name: str) -> None:
        inner: Callable[..., Any] = getattr(holder, name)

        def timed(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*args, **options)
            finally:
                self.seconds += time.perf_counter() - started

        setattr(holder, name, timed)


def own_share(folder: Path, count: int) -> dict[str, float]:
    """Seconds of the model, of the tokenizer's library, and of everything else, for MiniLM in OpenVINO float32."""
    encoder = load_encoder(EncoderSettings(model=str(folder), show_progress=False))
    assert isinstance(encoder, TextEncoder)
    inputs = [Input(f"{text} {i}", Task.DOCUMENT) for i, text in enumerate(mixed_texts(count, seed=1))]
    encoder.encode(inputs[:64])
    model, tokenizer = Clock(), Clock()
    model.around(encoder.engine, "_compute")
    tokenizer.around(encoder.engine._tokenizer, "ids")
    started = time.perf_counter()
    encoder.encode(inputs)
    whole = time.perf_counter() - started
    return {
        "whole": whole,
        "model": model.seconds,
        "tokenizer": tokenizer.seconds,
        "own": whole - model.seconds - tokenizer.seconds,
    }


def short_texts(count: int) -> Iterator[Input]:
    rng = random.Random(2)
    for i in range(count):
        yield Input(f"{rng.choice(WORDS)} {rng.choice(WORDS)} {i}", Task.QUERY)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def memory(folder: Path, count: int) -> dict[str, Any]:
    """Resident memory while texts stream through: after a tenth of them, when all buffers are there, and at the end."""
    encoder = load_encoder(EncoderSettings(model=str(folder), show_progress=False))
    done, marks = 0, []
    started = time.perf_counter()
    for rows in encoder.stream(short_texts(count)):
        done += len(rows)
        if not marks or done >= len(marks) * count / 10:
            marks.append(round(resident_mb(), 1))
    return {"texts": done, "seconds": time.perf_counter() - started, "resident_mb": marks}


def caching(model: Path, count: int, scratch: Path) -> dict[str, float]:
    """Indexing a corpus with the full-size model, and once more from the cache."""
    encoder = CachedEncoder(
        load_encoder(EncoderSettings(model=str(model), show_progress=False, device="cpu")), scratch / "cache"
    )
    pages = [Document(id=str(i), text=f"{text} {i}", category=f"c{i % 8}") for i, text in enumerate(mixed_texts(count, seed=3))]
    _ = encoder.space
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        KnowledgeBase.from_documents(pages, encoder)
        seconds.append(time.perf_counter() - started)
    return {"documents": count, "first": seconds[0], "second": seconds[1]}


def swell(folder: Path, vocabulary: int = 262_144) -> None:
    """Give an exported folder's tokenizer the true model's number of entries, half a million merges among them.

    The random model's own has 2,048, and reading the vocabulary is a good part of a start.
    """
    from gemma_rag.encoders.exported import DESCRIPTION, file_digest

    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    words, merges = content["model"]["vocab"], content["model"]["merges"]
    letters = [chr(0x4E00 + i) for i in range(512)]
    for letter in letters:
        words.setdefault(letter, len(words))
    as_list = bool(merges) and isinstance(merges[0], list)
    for first in letters:
        for second in letters:
            if len(words) >= vocabulary:
                break
            words.setdefault(first + second, len(words))
            merges.append([first, second] if as_list else f"{first} {second}")
    pairs = list(merges)
    for first, second in (pair if as_list else pair.split(" ") for pair in pairs[-250_000:]):
        longer = first + second + letters[0]
        if longer in words:
            merges.append([first + second, letters[0]] if as_list else f"{first + second} {letters[0]}")
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    about = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    about["files"][file.name] = [file.stat().st_size, file_digest(file)]
    (folder / DESCRIPTION).write_text(json.dumps(about), encoding="utf-8")


def start(folder: Path, scratch: Path, rounds: int = 5) -> dict[str, Any]:
    """Wall seconds of `gemma-rag ask` on the sample handbook, a new process each time."""
    sample = Path(__file__).parent.parent / "gemma_rag" / "sample"
    base = scratch / f"kb-{folder.name}"
    program = [sys.executable, "-m", "gemma_rag.cli"]
    subprocess.run(
        [*program, "index", str(sample / "handbook"), "--model", str(folder), "--out", str(base)],
        check=True,
        capture_output=True,
    )
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        done = subprocess.run(
            [*program, "ask", str(base), "How many days of leave do I have?"], capture_output=True, check=False
        )
        seconds.append(time.perf_counter() - started)
        assert done.returncode in (0, 3), done.stderr.decode()
    return {
        "best": min(seconds),
        "median": sorted(seconds)[rounds // 2],
        "tokenizer_mb": (folder / "tokenizer.json").stat().st_size / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=10_000, help="for our own code's share")
    parser.add_argument("--stream", type=int, default=1_000_000, help="short texts for the memory")
    parser.add_argument("--documents", type=int, default=256, help="for the cache")
    parser.add_argument("--keep", type=Path, help="the folder of engines.py --keep, to take the full-size model from")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        keep = options.keep or scratch
        full = keep / "full-embeddinggemma"
        if not full.exists():
            build_random_embeddinggemma(full, "full")
        tiny = build_random_embeddinggemma(scratch / "tiny-embeddinggemma")
        folders = {}
        for name, model, precision in (
            ("minilm-float32", "minilm", "float32"),
            ("minilm-int8", "minilm", "int8"),
            ("tiny", tiny, "float32"),
        ):
            folders[name] = scratch / name
            export_model(EncoderSettings(model=str(model)), folders[name], to="openvino", precision=precision)
        folders["full-int8"] = scratch / "full-int8"
        export_model(EncoderSettings(model=str(full)), folders["full-int8"], to="openvino", precision="int8")
        swell(folders["full-int8"])
        found: dict[str, Any] = {}
        found["start"] = {name: start(folders[name], scratch) for name in ("minilm-int8", "full-int8")}
        for name, row in found["start"].items():
            print(
                f"gemma-rag ask, a new process, {name}: {row['best']:.2f} s at best, {row['median']:.2f} s in the middle "
                f"(tokenizer of {row['tokenizer_mb']:.0f} MB)",
                flush=True,
            )
        found["share"] = own_share(folders["minilm-float32"], options.texts)
        whole, model, tokenizer, own = (found["share"][name] for name in ("whole", "model", "tokenizer", "own"))
        print(
            f"{options.texts} texts through MiniLM: {whole:.1f} s, of which the model {model:.1f} s, the tokenizer's library "
            f"{tokenizer:.2f} s, our own code {own:.2f} s ({100 * own / whole:.1f} %)",
            flush=True,
        )
        found["memory"] = memory(folders["tiny"], options.stream)
        marks = found["memory"]["resident_mb"]
        print(f"{options.stream} short texts streamed: resident MB {' '.join(map(str, marks))}", flush=True)
        found["cache"] = caching(full, options.documents, scratch)
        first, second = found["cache"]["first"], found["cache"]["second"]
        print(
            f"indexing {options.documents} documents, full size: {first:.1f} s; again from the cache {second:.3f} s "
            f"({first / second:.0f} times faster)",
            flush=True,
        )
    if options.out:
        options.out.write_text(
            json.dumps({**environment(), "cores": os.cpu_count(), **found}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
