from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from gemma_rag.errors import KnowledgeBaseError, MissingExtra
from gemma_rag.index.compressed import compress
from gemma_rag.index.embedded import EmbeddedIndex, Part, Plan, Scored
from gemma_rag.index.graph import Graph, build_graphs
from gemma_rag.vectors import Floats, unit

pytest.importorskip("faiss", reason="FAISS is not installed: pip install 'gemma-rag[faiss]'")


def part_of(chunks: int = 1, dead: float = 0.0) -> Part:
    # category 0 with 2,000 rows, category 1 with 200
    random = np.random.default_rng(5)
    documents = np.arange(2_200) // chunks
    codes = (documents >= 2_000 // chunks).astype(np.int64)
    vectors = unit(random.normal(size=(2_200, 32)) * 0.9 ** np.arange(32))
    alive = random.random(2_200)[documents] >= dead if dead else None
    return Part(vectors[:, :8], vectors[:, 8:], documents, codes, alive)


def questions(n: int = 20) -> Floats:
    return unit(np.random.default_rng(6).normal(size=(n, 32)) * 0.9 ** np.arange(32))


def searched(part: Part, plan: Plan | None, opened: list[bool]) -> list[Scored]:
    index = EmbeddedIndex([part], 2)
    return [index.search(query[None], np.array([opened]), 10, plan)[0] for query in questions()]


class Broken(Graph):
    """A graph that must not be asked."""

    def nearest(self, query: Floats, n: int) -> np.ndarray:
        raise AssertionError("asked")


PLAN = Plan(dimensions=32, oversampling=2)


@pytest.mark.parametrize(("chunks", "dead"), [(1, 0.0), (1, 0.3), (2, 0.0), (2, 0.3)])
def test_a_search_by_graphs_finds_nearly_what_the_exact_search_finds(chunks: int, dead: float) -> None:
    part = part_of(chunks, dead)
    with_graphs = part._replace(graphs=build_graphs(part, above=1_000))
    hits = 0
    for found, exact in zip(searched(with_graphs, PLAN, [True, True]), searched(part, None, [True, True]), strict=True):
        assert len(found.places) == 20
        of = dict(zip(exact.places.tolist(), exact.scores.tolist(), strict=True))
        assert found.scores == pytest.approx([of[place] for place in found.places.tolist()], abs=1e-6)
        assert found.compared == exact.compared
        hits += len(set(found.places.tolist()) & set(exact.places[np.argsort(-exact.scores)[:10]].tolist()))
    assert hits >= 190


def test_only_categories_of_more_rows_have_a_graph() -> None:
    graphs = build_graphs(part_of(), above=1_000)
    assert {first: len(graph) for first, graph in graphs.items()} == {0: 2_000}
    assert list(build_graphs(part_of(), above=100)) == [0, 2_000]
    assert build_graphs(part_of(), above=2_000) == {}


def test_a_graph_is_asked_and_its_category_is_not_scanned() -> None:
    part = part_of()
    broken = Broken(None)
    with pytest.raises(AssertionError, match="asked"):
        searched(part._replace(graphs={0: broken}), PLAN, [True, False])
    searched(part._replace(graphs={0: broken}), PLAN, [False, True])
    searched(part._replace(graphs={0: broken}), None, [True, True])


@pytest.mark.parametrize("dead", [0.6, 1.0])
def test_where_most_documents_are_gone_every_row_is_looked_at(dead: float) -> None:
    part = part_of(dead=dead)
    for found, exact in zip(
        searched(part._replace(graphs={0: Broken(None)}), PLAN, [True, False]), searched(part, PLAN, [True, False]), strict=True
    ):
        assert found.places.tolist() == exact.places.tolist()


def test_of_a_tail_in_fewer_bits_a_graph_is_built_too() -> None:
    part = part_of()
    tail, scales = compress(part.tail, "int8")
    small = part._replace(tail=tail, scales=scales)
    small = small._replace(graphs=build_graphs(small, above=1_000))
    for found, exact in zip(searched(small, PLAN, [True, False]), searched(part, None, [True, False]), strict=True):
        assert exact.scores.max() == pytest.approx(found.scores.max(), abs=5e-3)


def test_a_graph_is_read_as_it_was_saved(tmp_path: Path) -> None:
    graph = build_graphs(part_of(), above=1_000)[0]
    graph.save(tmp_path / "graph")
    read = Graph.read(tmp_path / "graph", 2_000, 32)
    for query in questions():
        assert read.nearest(query, 10).tolist() == graph.nearest(query, 10).tolist()


def test_a_graph_of_other_rows_is_refused(tmp_path: Path) -> None:
    build_graphs(part_of(), above=1_000)[0].save(tmp_path / "graph")
    for rows, dimensions in ((1_999, 32), (2_000, 31)):
        with pytest.raises(KnowledgeBaseError, match="is not of these"):
            Graph.read(tmp_path / "graph", rows, dimensions)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "foreign"])
def test_a_damaged_graph_is_an_error_that_says_what_to_do(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "graph"
    if damage == "cut":
        build_graphs(part_of(), above=1_000)[0].save(file)
        file.write_bytes(file.read_bytes()[:-1_000])
    elif damage != "missing":
        file.write_bytes(b"" if damage == "empty" else b"something else entirely")
    with pytest.raises(KnowledgeBaseError, match=r"Delete it: .* builds it anew"):
        Graph.read(file, 2_000, 32)


def test_without_faiss_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtra, match=r"gemma-rag\[faiss\]"):
        build_graphs(part_of(), above=1_000)
