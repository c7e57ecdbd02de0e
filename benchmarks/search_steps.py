"""The measurements of `search.py`, each of which runs in a process of its own; prints JSON.

usage: python benchmarks/search_steps.py STEP FOLDER [DOCUMENTS [ORDER]]
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from mixture import Fit, Mixture
from search_peers import category, memory

from gemma_rag import Category, Document, KnowledgeBase, TwoStageRetriever
from gemma_rag.documents import Chunk
from gemma_rag.encoders import Input, Space
from gemma_rag.prompts import NO_PROMPTS
from gemma_rag.routing import Gate
from gemma_rag.search import Search
from gemma_rag.storage import EngineAddress, Entry, StoredCategory
from gemma_rag.thresholds import FixedThreshold
from gemma_rag.vectors import Floats

Ints = npt.NDArray[np.int64]

K = 10
QUESTIONS = 2000
"""That are measured."""

OTHERS = 500
"""To plan and to warm up with."""

BATCH = 1000
"""Questions that are asked together."""

OPENED = 50
"""Most categories that a question opens: 5 % of a thousand. The default mass alone would open a third of them."""

TARGET = 0.995
"""Overlap that the planner is asked for on some questions, so that others have 0.99 as well."""

COMMIT = 50_000
"""Documents in a commit, when a knowledge base is built."""

SHARES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_WORDS, _VOCABULARY = 12, 30_000
_ROWS = 10_000


class Given:
    """An encoder that knows its questions' vectors beforehand: what is measured is the search."""

    profile = replace(NO_PROMPTS, category_threshold=-1.0, document_threshold=-1.0)

    def __init__(self, questions: dict[str, Floats], dimensions: int) -> None:
        self._questions = questions
        self.space = Space(
            model="given",
            weights="given",
            prompts="none",
            dimensions=dimensions,
            max_tokens=256,
            overflow="truncate",
            runtime="given",
            precision="float32",
        )

    def encode(self, inputs: Sequence[Input]) -> Floats:
        return np.stack([self._questions[item.text] for item in inputs])

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [_WORDS] * len(texts)


class Folder:
    """What a folder holds: vectors, questions, and, once they are there, a knowledge base and the right answers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.vectors: Floats = np.load(path / "vectors.npy", mmap_mode="r")
        self.codes: Ints = np.load(path / "categories.npy")
        self.queries: Floats = np.load(path / "questions.npy")
        self.relevant: Ints = np.load(path / "relevant.npy")
        self.names: Floats = np.load(path / "names.npy")
        asked = words(len(self.vectors), self.relevant)
        self.texts = [f"question {i} {' '.join(row[: _WORDS // 2])}" for i, row in enumerate(asked)]
        self.encoder = Given(dict(zip(self.texts, self.queries, strict=True)), self.vectors.shape[1])

    @property
    def measured(self) -> list[str]:
        return self.texts[:QUESTIONS]

    @property
    def others(self) -> list[str]:
        return self.texts[QUESTIONS:]

    def open(self, name: str = "kb") -> KnowledgeBase:
        return KnowledgeBase.open(self.path / name, self.encoder)

    def entries(self, rows: Ints, prefix: str = "") -> list[Entry]:
        """Documents with their vectors, by their rows."""
        pages = words(len(self.vectors), rows)
        vectors = self.vectors[rows]
        entries = []
        for row, page, code, vector in zip(rows.tolist(), pages, self.codes[rows].tolist(), vectors, strict=True):
            text = " ".join(page)
            document = Document(id=f"{prefix}{row}", text=text, category=category(code))
            entries.append(Entry(document, [Chunk(start=0, end=len(text))], vector[None]))
        return entries

    def categories(self) -> list[StoredCategory]:
        return [StoredCategory(Category(name=category(code)), name[None]) for code, name in enumerate(self.names)]


def words(documents: int, rows: Ints) -> list[list[str]]:
    """The words of documents: their frequencies fall as in a language (Zipf)."""
    drawn = np.empty((len(rows), _WORDS), dtype=np.int64)
    blocks = rows // _ROWS
    for block in np.unique(blocks).tolist():
        mine = blocks == block
        drawn[mine] = np.random.default_rng([7, block]).zipf(1.2, (_ROWS, _WORDS))[rows[mine] % _ROWS] % _VOCABULARY
    return [[f"w{number}" for number in row] for row in drawn.tolist()]


def retriever(base: KnowledgeBase, **more: Any) -> TwoStageRetriever:
    """As it is measured: the default gate, and never more than 50 categories; by vectors alone, thresholds off."""
    return TwoStageRetriever(base, **{"k": K, "hybrid": False, "max_categories": OPENED, **more})


# -- making and building ------------------------------------------------------------------------------------------------


def make(path: Path, documents: int, order: str = "variance") -> dict[str, Any]:
    """Draw vectors and questions."""
    mixture = Mixture(Fit.load(), documents, order=order)  # type: ignore[arg-type]
    path.mkdir(parents=True, exist_ok=True)
    shape = (documents, mixture.dimensions)
    mixture.vectors(np.lib.format.open_memmap(path / "vectors.npy", "w+", np.float32, shape))
    questions, relevant = mixture.questions(QUESTIONS + OTHERS)
    arrays = {"categories": mixture.codes, "questions": questions, "relevant": relevant, "names": mixture.category_vectors()}
    for name, rows in arrays.items():
        np.save(path / f"{name}.npy", rows)
    sizes = np.percentile(mixture.sizes, (0, 50, 100)).tolist()
    return {"documents": documents, "dimensions": mixture.dimensions, "categories": len(mixture.sizes), "sizes": sizes}


def build(path: Path) -> dict[str, Any]:
    """Fill a knowledge base, the documents in random order, and compact it."""
    folder = Folder(path)
    seconds = {"documents": 0.0, "commit": 0.0}
    order = np.random.default_rng(0).permutation(len(folder.vectors))
    with KnowledgeBase.create(path / "kb", folder.encoder) as base:
        base.commit([], folder.categories())
        for first in range(0, len(order), COMMIT):
            started = time.perf_counter()
            entries = folder.entries(order[first : first + COMMIT])
            made = time.perf_counter()
            base.commit(entries)
            seconds["documents"] += made - started
            seconds["commit"] += time.perf_counter() - made
        started = time.perf_counter()
        base.compact()
        seconds["compact"] = time.perf_counter() - started
    seconds["build"] = seconds["commit"] + seconds["compact"]
    size = sum(file.stat().st_size for file in (path / "kb").iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**_rounded(seconds, 3), "folder_bytes": size, "peak_resident_bytes": peak}


def truth(path: Path) -> dict[str, Any]:
    """The right answers, by plain products with every vector: of everything, and of the categories that the gate opens."""
    folder = Folder(path)
    queries, codes, relevant = folder.queries[:QUESTIONS], folder.codes, folder.relevant[:QUESTIONS]
    with folder.open() as base:
        [(_, settings)] = retriever(base).plan(folder.measured)
        search = Search(base, settings, None, None)
        gates = search.gated(queries, queries, FixedThreshold(-1.0))
        number = np.array([int(name.split()[-1]) for name in search.view.categories])
        opened = np.zeros((QUESTIONS, len(folder.names)), dtype=bool)
        opened[:, number] = np.stack([gate.opened for gate in gates])
    best = np.full((QUESTIONS, K), -1, dtype=np.int64)
    inside = best.copy()
    ranks = np.empty(QUESTIONS, dtype=np.int64)
    for first in range(0, QUESTIONS, 50):
        block = slice(first, first + 50)
        scores = np.concatenate(
            [queries[block] @ folder.vectors[at : at + 50_000].T for at in range(0, len(folder.vectors), 50_000)], axis=1
        )
        for i, row in enumerate(scores, start=first):
            best[i] = _best(row, np.arange(len(row)))
            within = np.flatnonzero(opened[i, codes])
            found = _best(row, within)
            inside[i, : len(found)] = found
            ranks[i] = (row > row[relevant[i]]).sum()
    for name, rows in (("opened", opened), ("best", best), ("inside", inside)):
        np.save(path / f"{name}.npy", rows)
    share = (opened @ np.bincount(codes, minlength=opened.shape[1])) / len(codes)
    hidden = ~opened[np.arange(QUESTIONS), codes[relevant]]
    return {
        "flat_recall": {f"@{k}": round(float((ranks < k).mean()), 4) for k in (1, 5, 10)},
        "documents_opened": _quantiles(share, 4),
        "categories_opened": _quantiles(opened.sum(axis=1), 1),
        "routing_loss": round(float(hidden.mean()), 4),
    }


def _best(scores: Floats, among: Ints) -> Ints:
    few = among[np.argpartition(-scores[among], min(K, len(among) - 1))[:K]]
    return few[np.argsort(-scores[few], kind="stable")]


# -- searching ------------------------------------------------------------------------------------------------------------


def serve(path: Path) -> dict[str, Any]:
    """One question at a time, in memory: exactly, and by the planner's choice; a batch; more ways to ask."""
    folder = Folder(path)
    best, relevant = np.load(path / "best.npy"), folder.relevant[:QUESTIONS]
    out: dict[str, Any] = {}
    with folder.open() as base:
        plain = retriever(base)
        base.use_plan(None)
        for text in folder.others[:5]:
            plain.retrieve(text, mode="flat")  # reads every vector into memory
        exact, out["exact"] = _asked(plain, folder.measured)
        report = base.plan(target_overlap=TARGET, questions=folder.others[:200], retriever=plain)
        out["plan"] = {**report.to_json(), "trials": len(report.trials)}
        planned, out["planned"] = _asked(plain, folder.measured)
        out["planned"]["overlap@10"] = _overlap(planned, exact)
        for name, found in (("exact", exact), ("planned", planned)):
            out[name]["recall"] = _recall(found, relevant)
            out[name]["overlap@10 with flat"] = _overlap(found, [[str(row) for row in rows] for rows in best.tolist()])
        out["batch"] = _batch(plain, folder)
        _, out["hybrid"] = _asked(retriever(base, hybrid=True), folder.measured[:500])
        _, out["lexical"] = _asked(retriever(base, mode="lexical"), folder.measured[:200])
        _, out["uncapped"] = _asked(retriever(base, max_categories=None), folder.measured[:200])
        _, out["flat"] = _asked(retriever(base, mode="flat"), folder.measured[:20])
        base.use_plan(None)
        _, out["flat, exact"] = _asked(retriever(base, mode="flat"), folder.measured[:20])
        base.use_plan(report.plan)
    return out


def shares(path: Path) -> dict[str, Any]:
    """Latency against the number of categories that are opened, all of them alike."""
    folder = Folder(path)
    total = len(folder.vectors)
    out = []
    with folder.open() as base:
        plan = base.search_plan
        for chosen in (plan, None) if plan is not None else (None,):
            base.use_plan(chosen)
            for count in SHARES:
                each = retriever(base, gate=Gate(mass=1.0), max_categories=count)
                texts = folder.measured[: 100 if count <= 100 else 20]
                for text in folder.others[:3]:
                    each.retrieve(text)
                scored = [each.retrieve(text).documents_scored for text in texts[:20]]
                _, times = _asked(each, texts)
                out.append({"categories": count, "plan": chosen is not None, "share": float(np.mean(scored)) / total, **times})
        base.use_plan(plan)
    return {"points": out}


def _asked(each: TwoStageRetriever, texts: list[str]) -> tuple[list[list[str]], dict[str, Any]]:
    """The ids of the hits for each question, asked alone, and milliseconds."""
    seconds, found = [], []
    for text in texts:
        started = time.perf_counter()
        retrieval = each.retrieve(text)
        seconds.append(time.perf_counter() - started)
        found.append([hit.document.id for hit in retrieval.hits])
    return found, {"questions": len(texts), **_milliseconds(seconds)}


def _batch(each: TwoStageRetriever, folder: Folder) -> dict[str, float]:
    each.retrieve_many(folder.others)
    seconds = []
    for turn in range(6):
        texts = folder.measured[:BATCH] if turn % 2 else folder.measured[BATCH : 2 * BATCH]
        started = time.perf_counter()
        each.retrieve_many(texts)
        seconds.append(time.perf_counter() - started)
    [(_, settings)] = each.plan(folder.measured[:BATCH])
    stages = []
    for _ in range(3):  # both stages, without making results: no document is read
        search = Search(each.knowledge_base, settings, None, None)
        started = time.perf_counter()
        list(search.find(folder.measured[:BATCH], FixedThreshold(-1.0)))
        stages.append(time.perf_counter() - started)
    return {
        "questions": BATCH,
        "seconds": round(float(np.median(seconds)), 4),
        "worst": round(max(seconds), 4),
        "both stages": round(float(np.median(stages)), 4),
    }


def opening(path: Path, cold: str = "") -> dict[str, Any]:
    """Open a knowledge base and answer a first question.

    Args:
        path: Where it is.
        cold: Not empty: let the system forget the files first.
    """
    folder = Folder(path)
    if cold:
        _forget(path)
    started = time.perf_counter()
    with folder.open() as base:
        opened = time.perf_counter() - started
        retriever(base).retrieve(folder.measured[0])
        answered = time.perf_counter() - started
        started = time.perf_counter()
        retriever(base).retrieve(folder.measured[1])
        second = time.perf_counter() - started
    return _rounded({"open_s": opened, "first_answer_s": answered, "second_answer_s": second}, 4)


def serving_memory(path: Path, cold: str = "") -> dict[str, Any]:
    """Resident memory of a process that serves: after opening, after some questions, and with every vector read.

    Args:
        path: Where the knowledge base is.
        cold: Not empty: let the system forget the files first, so that it maps no more pages than are asked for.
    """
    folder = Folder(path)
    if cold:
        _forget(path)
    vectors = folder.vectors.nbytes
    folder.vectors = folder.vectors[:1].copy()
    before = memory()
    out: dict[str, Any] = {"vector_bytes": vectors, "before": before}
    with folder.open() as base:
        out["opened"] = memory()
        each = retriever(base)
        for i, text in enumerate(folder.measured[:1000], start=1):
            each.retrieve(text)
            if i in (1, 10, 100, 1000):
                out[f"after {i:,} questions"] = memory()
        plan = base.search_plan
        base.use_plan(None)
        each.retrieve(folder.measured[0], mode="flat")
        out["every vector read"] = memory()
        retriever(base, hybrid=True).retrieve(folder.measured[0])
        out["with words"] = memory()
        base.use_plan(plan)
    return out


def changes(path: Path) -> dict[str, Any]:
    """Add a thousand documents with their vectors, and delete them again, five times; the next question after each."""
    folder = Folder(path)
    out: dict[str, Any] = {"add_s": [], "question_after_add_ms": [], "delete_s": [], "question_after_delete_ms": []}
    with folder.open() as base:
        each = retriever(base)
        for text in folder.others[:20]:
            each.retrieve(text)
        for turn in range(5):
            rows = np.random.default_rng(turn).permutation(len(folder.vectors))[:1000]
            entries = folder.entries(rows, f"new {turn} ")
            ids = [entry.document.id for entry in entries]
            out["add_s"].append(_timed(lambda entries=entries: base.commit(entries)))  # type: ignore[misc]
            out["question_after_add_ms"].append(1e3 * _timed(lambda: each.retrieve(folder.measured[0])))
            out["delete_s"].append(_timed(lambda ids=ids: base.delete(ids)))  # type: ignore[misc]
            out["question_after_delete_ms"].append(1e3 * _timed(lambda: each.retrieve(folder.measured[0])))
        old = [str(row) for row in np.random.default_rng(9).permutation(len(folder.vectors))[:1000].tolist()]
        out["delete_old_s"] = round(_timed(lambda: base.delete(old)), 4)
        _, out["asked_after"] = _asked(each, folder.measured[:200])
    return {name: [round(x, 4) for x in value] if isinstance(value, list) else value for name, value in out.items()}


def engine(path: Path, name: str) -> dict[str, Any]:
    """A knowledge base of ours whose vectors another engine keeps: filled, and asked by the same gate."""
    folder = Folder(path)
    inside = np.load(path / "inside.npy")
    uri = path / ("engine.db" if name == "milvus" else "engine-chroma")
    address = EngineAddress(name=name, uri=str(uri), collection="bench")  # type: ignore[arg-type]
    started = time.perf_counter()
    with KnowledgeBase.create(path / f"kb-{name}", folder.encoder, engine=address) as base:
        base.commit([], folder.categories())
        for first in range(0, len(folder.vectors), COMMIT):
            base.commit(folder.entries(np.arange(first, min(first + COMMIT, len(folder.vectors)))))
        built = time.perf_counter() - started
        each = retriever(base)
        each.retrieve(folder.others[0])
        found, times = _asked(each, folder.measured[:100])
    right = [[str(row) for row in rows if row >= 0] for rows in inside[:100].tolist()]
    return {"build_s": round(built, 2), "within": {**times, "overlap@10": _overlap(found, right)}}


# -- small things -----------------------------------------------------------------------------------------------------------


def _forget(path: Path) -> None:
    """Have the system let go of what it keeps of the files of a knowledge base."""
    os.sync()
    for file in (path / "kb").iterdir():
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _timed(what: Callable[[], Any]) -> float:
    started = time.perf_counter()
    what()
    return time.perf_counter() - started


def _overlap(found: list[list[str]], right: list[list[str]]) -> float:
    pairs = zip(found, right, strict=True)
    return round(float(np.mean([len(set(ids).intersection(best)) / max(1, len(best)) for ids, best in pairs])), 4)


def _recall(found: list[list[str]], relevant: Ints) -> dict[str, float]:
    pairs = list(zip(found, map(str, relevant.tolist()), strict=True))
    return {f"@{k}": round(float(np.mean([right in ids[:k] for ids, right in pairs])), 4) for k in (1, 5, 10)}


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    return {f"p{p}_ms": round(float(np.percentile(seconds, p)) * 1e3, 3) for p in (50, 95, 99)}


def _quantiles(values: Any, digits: int) -> dict[str, float]:
    found = {f"p{p}": round(float(np.percentile(values, p)), digits) for p in (50, 95, 99)}
    return {"mean": round(float(np.mean(values)), digits), **found}


def _rounded(values: dict[str, float], digits: int) -> dict[str, float]:
    return {name: round(value, digits) for name, value in values.items()}


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    "make": lambda path, documents, order="variance": make(path, int(documents), order),
    "build": build,
    "truth": truth,
    "serve": serve,
    "shares": shares,
    "opening": opening,
    "memory": serving_memory,
    "changes": changes,
    "engine": engine,
}


def main() -> None:
    step, path, *more = sys.argv[1:]
    print(json.dumps(STEPS[step](Path(path), *more)))


if __name__ == "__main__":
    main()
