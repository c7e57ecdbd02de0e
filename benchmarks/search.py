"""Search at a million documents: latency, overlap, memory, changes, growth, and other stores on the same vectors.

The vectors are drawn from a mixture that was fitted on real ones (`mixture.py`): 1,000 categories of uneven size, 768
components. Every measurement runs in a process of its own (`search_steps.py`, `search_peers.py`), one after the other, so
that a machine with nothing else to do is all that it needs; about 12 GB of disk and 12 GB of memory for a million.

usage: python benchmarks/search.py [--documents N] [--peers-at N] [--folder FOLDER] [--out FILE.json] [--skip PART ...]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from environment import environment
from search_peers import PEERS

HERE = Path(__file__).parent
LONGEST = 3600.0
"""Seconds for one measurement."""

PARTS = ("growth", "shares", "memory", "opening", "flat", "peers", "engines", "order", "changes")
ENGINES = {"milvus": "gemma-rag, engine milvus (Lite)", "chroma": "gemma-rag, engine chroma (embedded)"}

Json = dict[str, Any]


class Target(NamedTuple):
    """A line of the table: what was to be reached, and what was."""

    what: str
    reach: str
    measured: str
    reached: bool


def step(*words: str | int | Path) -> Json:
    """One measurement, in a process of its own; what failed is in the result, and the others go on."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=LONGEST,
        check=False,
        cwd=HERE,
    )
    seconds = time.perf_counter() - started
    name = " ".join(Path(str(word)).name for word in words)
    print(f"  {name:60} {seconds:8.1f} s{'' if done.returncode == 0 else '  FAILED'}", file=sys.stderr, flush=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return {"error": f"exit status {done.returncode}: {last[:300]}"}
    result: Json = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def measured(folder: Path, documents: int, peers_at: int, parts: list[str]) -> Json:
    """Everything, as plain JSON."""
    steps, peers = HERE / "search_steps.py", HERE / "search_peers.py"
    out: Json = {"documents": documents, "peers at": peers_at, "sizes": {}}
    sizes = sorted({size for size in (10_000, 100_000, peers_at, documents) if size <= documents} | {peers_at})
    if "growth" not in parts:
        sizes = sorted({peers_at, documents})
    for size in sizes:
        here = folder / str(size)
        each = {"make": step(steps, "make", here, size)}
        for name in ("build", "truth", "serve"):
            each[name] = step(steps, name, here)
        out["sizes"][str(size)] = each
        if size not in (peers_at, documents):
            shutil.rmtree(here)
    large, small = folder / str(documents), folder / str(peers_at)
    if "opening" in parts:
        out["opening"] = {"warm": step(steps, "opening", large), "cold": step(steps, "opening", large, "cold")}
    if "memory" in parts:
        out["memory"] = {"cold": step(steps, "memory", large, "cold"), "warm": step(steps, "memory", large)}
    if "shares" in parts:
        out["shares"] = step(steps, "shares", large)
    if "flat" in parts:
        out["FAISS flat"] = step(peers, "FAISS IndexFlatIP", large)
    if "peers" in parts:
        out["peers"] = {name: step(peers, name, small) for name in PEERS}
    if "engines" in parts:
        out["engines"] = {name: step(steps, "engine", small, name) for name in ENGINES}
    if "order" in parts:
        turned = folder / "random order"
        out["random order"] = {"make": step(steps, "make", turned, peers_at, "random")}
        for name in ("build", "truth", "serve"):
            out["random order"][name] = step(steps, name, turned)
        shutil.rmtree(turned, ignore_errors=True)
    if "changes" in parts:
        out["changes"] = step(steps, "changes", large)
    out["exponents"] = exponents(out["sizes"])
    return out


def exponents(sizes: dict[str, Json]) -> dict[str, float]:
    """The powers of the number of documents with which costs grow: the slopes of lines through their logarithms."""
    looked_at = {
        "question, planned": lambda each: each["serve"]["planned"]["p50_ms"],
        "question, exact": lambda each: each["serve"]["exact"]["p50_ms"],
        "flat search": lambda each: each["serve"]["flat, exact"]["p50_ms"],
        "build": lambda each: each["build"]["build"],
    }
    whole = {int(size): each for size, each in sizes.items() if not any("error" in part for part in each.values())}
    if len(whole) < 2:
        return {}
    logs = np.log(list(whole))
    return {
        name: round(float(np.polyfit(logs, np.log([of(each) for each in whole.values()]), 1)[0]), 3)
        for name, of in looked_at.items()
    }


# -- the table ------------------------------------------------------------------------------------------------------------


def targets(result: Json) -> list[Target]:
    """What the issue asks for, and what was measured; a measurement that failed leaves its lines out."""
    large, small = (result["sizes"][str(result[name])] for name in ("documents", "peers at"))
    lines: list[Target] = []
    if "error" not in large["serve"] and "error" not in large["truth"]:
        lines += _of_questions(large)
    if (flat := result.get("FAISS flat", {})).get("everything") and "error" not in large["serve"]:
        times = flat["everything"]["p50_ms"] / large["serve"]["planned"]["p50_ms"]
        lines.append(_line("against FAISS flat over all, p50", ">= 40 times faster", f"{times:.1f} times", times >= 40))
    if "error" not in small["serve"]:
        ours = small["serve"]["planned"]["p50_ms"]
        for name, peer in result.get("peers", {}).items():
            for way in ("within", "everything"):
                if way in peer:
                    theirs = peer[way]["p50_ms"]
                    what = f"{name}, {'the same categories' if way == 'within' else 'everything'}, p50"
                    lines.append(_line(what, f"> {ours:.2f} ms (ours)", f"{theirs:.2f} ms", theirs > ours))
    for name, memory in result.get("memory", {}).items():
        if "error" not in memory:
            whole, mapped = (_share(memory, moment) for moment in ("every vector read", "after 1,000 questions"))
            lines.append(_line(f"memory, every vector read, files {name}", "<= 1.1 x vectors", f"{whole:.3f} x", whole <= 1.1))
            lines.append(_line(f"memory, after 1,000 questions, files {name}", "< 1 x vectors", f"{mapped:.3f} x", mapped < 1))
    for name, opening in result.get("opening", {}).items():
        if "error" not in opening:
            opened, first = opening["open_s"], opening["first_answer_s"]
            lines.append(_line(f"open, files {name}", "<= 1 s", f"{opened:.2f} s", opened <= 1))
            lines.append(_line(f"first answer, files {name}", "<= 2 s", f"{first:.2f} s", first <= 2))
    if (changes := result.get("changes", {})).get("add_s"):
        for name, key in (("add", "add_s"), ("delete", "delete_s")):
            worst = max(changes[key])
            lines.append(_line(f"{name} 1,000 documents, worst of 5", "<= 1 s", f"{worst:.2f} s", worst <= 1))
    return lines


def _of_questions(large: Json) -> list[Target]:
    planned, exact, flat = large["serve"]["planned"], large["serve"]["exact"], large["truth"]["flat_recall"]
    lost = max(flat[k] - planned["recall"][k] for k in flat)
    batch = large["serve"]["batch"]
    second, stages = batch["questions"] / batch["seconds"], batch["questions"] / batch["both stages"]
    return [
        _line("one question, p50", "<= 4 ms", f"{planned['p50_ms']:.2f} ms", planned["p50_ms"] <= 4),
        _line("one question, p99", "<= 10 ms", f"{planned['p99_ms']:.2f} ms", planned["p99_ms"] <= 10),
        _line("the same without a plan, p50 / p99", "", f"{exact['p50_ms']:.2f} / {exact['p99_ms']:.2f} ms", reached=True),
        _line("overlap@10 with exact, same gate", ">= 0.99", f"{planned['overlap@10']:.4f}", planned["overlap@10"] >= 0.99),
        _line("recall lost against flat, worst of @1, @5, @10", "<= 0.01", f"{lost:.4f}", lost <= 0.01),
        _line("a batch of 1,000 questions, both stages", ">= 2000 /s", f"{stages:.0f} /s", stages >= 2000),
        _line("the same with documents read and results made", ">= 2000 /s", f"{second:.0f} /s", second >= 2000),
    ]


def _share(memory: Json, moment: str) -> float:
    """Resident memory of the whole process, as a multiple of the vectors' bytes."""
    total: float = sum(memory[moment].values()) / memory["vector_bytes"]
    return total


def _line(what: str, reach: str, measured: str, reached: bool) -> Target:
    return Target(what, reach, measured, reached)


def table(result: Json) -> str:
    """The targets and what grows how, to be read."""
    rows = [
        ("", "reach", "measured", ""),
        *((*line[:3], "reached" if line.reached else "NOT REACHED") for line in targets(result)),
    ]
    for name, engine in result.get("engines", {}).items():
        if "within" in engine:
            rows.append((f"{ENGINES[name]}, p50", "", f"{engine['within']['p50_ms']:.2f} ms", ""))
    rows += [(f"growth of {name}", "", f"n ^ {value:.2f}", "") for name, value in result["exponents"].items()]
    failed = [(f"{name}: {part['error']}", "", "", "FAILED") for name, part in _parts(result) if "error" in part]
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{a:{width}}  {b:20}  {c:18}  {d}".rstrip() for a, b, c, d in [*rows, *failed])


def _parts(result: Json, prefix: str = "") -> list[tuple[str, Json]]:
    found = [(f"{prefix}{name}", value) for name, value in result.items() if isinstance(value, dict)]
    return [pair for name, value in found for pair in [(name, value), *_parts(value, f"{name}, ")]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--peers-at", type=int, default=100_000, help="documents that the peers get")
    parser.add_argument("--folder", type=Path, help="where vectors and knowledge bases go; a temporary folder")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    parser.add_argument("--skip", nargs="+", default=[], choices=PARTS, help="what to leave out")
    parser.add_argument("--show", type=Path, help="print the table of a result that was written before, and stop")
    options = parser.parse_args()
    if options.show:
        print(table(json.loads(options.show.read_text(encoding="utf-8"))))
        return
    parts = [part for part in PARTS if part not in options.skip]
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        result = {**environment(), **measured(folder, options.documents, min(options.peers_at, options.documents), parts)}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
