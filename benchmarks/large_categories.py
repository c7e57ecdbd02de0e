"""Categories of many rows: exact search, search by a plan, and by a plan with a graph, in three precisions of the tails.

One category, a question at a time, one thread; its graph is built with all cores. Vectors are those of `mixture.py`, of
768 components. Results: ``results/large-categories.json``.

Milliseconds are medians, of the clock and of the processor; on a machine that does other work the latter count.

usage: python benchmarks/large_categories.py [--scan-only] [SIZE ...]    default: 100000 300000 600000; the file keeps others
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy reads it when it is first imported

import argparse
import gc
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from mixture import Fit, Mixture

from gemma_rag.index.compressed import PRECISIONS, compress
from gemma_rag.index.embedded import EmbeddedIndex, Part, Plan, Scored
from gemma_rag.index.graph import Graph, build_graphs
from gemma_rag.vectors import Floats, unit

RESULTS = Path(__file__).parent / "results" / "large-categories.json"
HEAD = 128
K = 10
QUESTIONS = 50
OVERSAMPLING = (2, 4, 8, 16, 32)


def measure(size: int, with_graph: bool) -> dict[str, Any]:
    """All searches over one category of some size."""
    mixture = Mixture(Fit.load(), size + 99, sizes=np.array([size, *[1] * 99]))
    vectors = mixture.category(0)
    questions = unit(mixture.questions(QUESTIONS)[0])
    head, tail = np.ascontiguousarray(vectors[:, :HEAD]), np.ascontiguousarray(vectors[:, HEAD:])
    del vectors
    gc.collect()
    part = Part(head, tail, np.arange(size), np.zeros(size, dtype=np.int64))
    started, busy = time.perf_counter(), time.process_time()
    graph = build_graphs(part, 0)[0] if with_graph else None
    built = {"seconds": round(time.perf_counter() - started), "cpu_seconds": round(time.process_time() - busy)}
    built["megabytes"] = 0 if graph is None else bytes_of(graph)
    print(size, built, flush=True)
    truth, *_ = asked(EmbeddedIndex([part], 1), questions, None)
    rows = []
    for precision in PRECISIONS:
        stored, scales = compress(tail, precision)
        small = part._replace(tail=stored, scales=scales)
        scales_bytes = 0 if scales is None else scales.nbytes
        about = {"tails": precision, "megabytes": round((head.nbytes + stored.nbytes + scales_bytes) / 1e6)}
        for graphs in (None, *([] if graph is None else [{0: graph}])):
            index = EmbeddedIndex([small._replace(graphs=graphs)], 1)
            for plan in [*([None] if graphs is None else []), *(Plan(dimensions=HEAD, oversampling=n) for n in OVERSAMPLING)]:
                found, clock, cpu = asked(index, questions, plan)
                way = "exact" if plan is None else "plan" if graphs is None else "graph"
                row = {**about, "way": way, "oversampling": plan and plan.oversampling}
                times = {"p50_ms": round(clock, 3), "cpu_ms": round(cpu, 3)}
                rows.append({**row, **times, "overlap": round(overlap(found, truth), 4)})
                print(json.dumps(rows[-1]), flush=True)
    return {"rows": size, "graph": None if graph is None else built, "searches": rows}


def asked(index: EmbeddedIndex, questions: Floats, plan: Plan | None) -> tuple[list[Scored], float, float]:
    """What was found, and the medians of a question's milliseconds, of the clock and of the processor."""
    opened = np.ones((1, 1), dtype=bool)
    found, took = [], []
    for question in questions[:3]:
        index.search(question[None], opened, K, plan)
    for question in questions:
        started = time.perf_counter(), time.thread_time()
        found += index.search(question[None], opened, K, plan)
        took.append((time.perf_counter() - started[0], time.thread_time() - started[1]))
    clock, cpu = np.median(took, axis=0) * 1e3
    return found, float(clock), float(cpu)


def overlap(found: list[Scored], truth: list[Scored]) -> float:
    """Share of the exact search's best `K` over float32 that was found, mean over the questions."""
    shares = [len(set(best(some)) & set(best(all_of_them))) / K for some, all_of_them in zip(found, truth, strict=True)]
    return float(np.mean(shares))


def best(scored: Scored) -> list[int]:
    """The places of the best `K`."""
    return [int(place) for place in scored.places[np.argsort(-scored.scores, kind="stable")[:K]]]


def bytes_of(graph: Graph) -> int:
    """Megabytes of a graph's file, which is mapped into memory."""
    with tempfile.TemporaryDirectory() as folder:
        graph.save(Path(folder) / "graph")
        return round((Path(folder) / "graph").stat().st_size / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan-only", action="store_true")
    parser.add_argument("sizes", type=int, nargs="*", default=[100_000, 300_000, 600_000])
    chosen = parser.parse_args()
    for size in chosen.sizes:
        new = measure(size, not chosen.scan_only)
        before = json.loads(RESULTS.read_text())["categories"] if RESULTS.exists() else []
        before = sorted([*(item for item in before if item["rows"] != size), new], key=lambda item: item["rows"])
        about = {"processor": processor(), "cores": os.cpu_count(), "k": K}
        body = {**about, "questions": QUESTIONS, "dimensions": 768, "head": HEAD, "python": platform.python_version()}
        RESULTS.write_text(json.dumps({**body, "numpy": np.__version__, "categories": before}, indent=1) + "\n")


def processor() -> str:
    """What this machine calls its processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
