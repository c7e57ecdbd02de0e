"""Compacting with a choice: tails in fewer bits, and graphs over large categories."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from gemma_rag.cli import app
from gemma_rag.documents import Category, Chunk, Document
from gemma_rag.encoders import Space
from gemma_rag.errors import InputError, KnowledgeBaseError, MissingExtra
from gemma_rag.index import graph
from gemma_rag.index.embedded import Plan
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.storage import Entry, Store, StoredCategory, merging
from gemma_rag.vectors import Floats, unit
from gemma_rag.view import View

D = 160
SPACE = Space(
    model="m", weights="w", prompts="p", dimensions=D, max_tokens=64, overflow="truncate", runtime="test", precision="float32"
)
OFF = {"float32": 1e-6, "float16": 5e-5, "int8": 2e-3}
"""How far a cosine may be off."""

PLAN = Plan(dimensions=128, oversampling=3)


def vector_of(number: int) -> Floats:
    """A vector, and the same for every number of the same tens but for a little."""
    tens, own = (np.random.default_rng([seed, at]).normal(size=D) for seed, at in ((1, number // 10), (2, number)))
    return unit((tens + 0.3 * own)[None] * 0.99 ** np.arange(D))[0]


def entries(*numbers: int) -> list[Entry]:
    """Documents: three of four in the category large."""
    return [
        Entry(
            Document(id=str(i), text=f"the text of {i}", category="small" if i % 4 == 3 else "large"),
            [Chunk(start=0, end=5)],
            vector_of(i)[None],
        )
        for i in numbers
    ]


def put(store: Store, *numbers: int) -> None:
    described = [StoredCategory(Category(name=name), vector_of(0)[None]) for name in ("large", "small")]
    store.commit(entries(*numbers), (), described if not store.stored_categories() else [])


@pytest.fixture
def folder(tmp_path):
    """A folder of 200 documents in several segments, ten of which are dead."""
    with closing(Store.create(SPACE, {}, {})) as empty, closing(empty.save(tmp_path / "kb")) as store:
        fill(store)
        yield store


def fill(store: Store) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "_SMALL", 0)
        put(store, *range(100, 210))
        put(store, *range(60, 100))
        put(store, *range(60))
        store.commit((), [str(i) for i in range(200, 210)])


@pytest.fixture(params=["memory", "folder"])
def store(request, folder):
    with closing(Store.create(SPACE, {}, {})) as memory:
        if request.param == "memory":
            fill(memory)
        yield folder if request.param == "folder" else memory


def tails(store: Store) -> set[str]:
    return {str(data.tail.dtype) for _, data in store.snapshot().segments}


def largest_error(store: Store, numbers: range = range(200)) -> float:
    """How far the cosines of vectors that are read again are off, their norms having been compared."""
    found = np.concatenate([store.get(str(i)).vectors for i in numbers])
    assert np.linalg.norm(found, axis=1) == pytest.approx(1.0, abs=1e-6)
    queries = np.stack([vector_of(i) for i in range(0, 200, 7)])
    return float(np.abs(queries @ (found - np.stack([vector_of(i) for i in numbers])).T).max())


def best(store: Store, plan: Plan | None, of: int = 33) -> list[list[int]]:
    """The ids of the best three documents of some questions about everything."""
    view = View(store.snapshot(), store)
    found = []
    for i in range(0, 200, 200 // of):
        scored = view.index.search(vector_of(i)[None], np.ones((1, 2), dtype=bool), 3, plan)[0]
        order = np.argsort(-scored.scores)[:3]
        found.append([int(view.ids[place]) for place in scored.places[order].tolist()])
    return found


def graph_files(store: Store) -> set[str]:
    return {file.name for file in store.path.glob("graph-*")}


# -- tails ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", OFF)
def test_vectors_come_back_nearly_as_they_were(store, precision):
    store.compact(precision)
    assert (store.manifest.tails, tails(store)) == (precision, {precision})
    assert largest_error(store) <= OFF[precision]


@pytest.mark.parametrize("precision", OFF)
def test_scores_are_nearly_those_of_the_whole_vectors(store, precision):
    store.compact(precision)
    view = View(store.snapshot(), store)
    for plan in (None, PLAN):
        scored = view.index.search(vector_of(5)[None], np.ones((1, 2), dtype=bool), 3, plan)[0]
        truth = np.stack([vector_of(int(i)) for i in view.ids[scored.places]]) @ vector_of(5)
        assert scored.scores == pytest.approx(truth, abs=OFF[precision])


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_what_comes_after_is_written_so_too(folder, precision, monkeypatch):
    folder.compact(precision)
    monkeypatch.setattr(merging, "_SMALL", 0)
    put(folder, *range(300, 303))
    put(folder, *range(303, 400))
    with closing(Store.open(folder.path)) as other:
        put(other, *range(400, 410))
        other.compact()
        assert (other.manifest.tails, tails(other)) == (precision, {precision})
        assert largest_error(other, range(300, 410)) <= OFF[precision]


def test_merging_again_and_again_rounds_once(folder):
    folder.compact("int8")
    before = {i: folder.get(str(i)).vectors for i in range(200)}
    for i in range(5):
        folder.commit((), [str(199 - i)])
        folder.compact()
    for i in range(195):
        assert folder.get(str(i)).vectors == pytest.approx(before[i], abs=1e-7)


def test_without_a_choice_every_bit_is_kept(store):
    store.compact()
    assert largest_error(store) == 0.0


def test_the_file_gets_smaller(folder):
    sizes = []
    for precision in OFF:
        folder.compact(precision)
        (segment,) = folder.manifest.segments
        sizes.append((folder.path / segment.file).stat().st_size)
    assert sizes[0] - sizes[1] >= 200 * 32 * 2 - 128
    assert sizes[1] - sizes[2] >= 200 * (32 - 4) - 128


def test_there_is_no_way_back(store):
    store.compact("float16")
    generation = store.manifest.generation
    with pytest.raises(InputError, match="float32 cannot bring back what was rounded"):
        store.compact("float32")
    assert (store.manifest.generation, tails(store)) == (generation, {"float16"})
    store.compact("int8")
    assert (tails(store), largest_error(store) <= OFF["int8"]) == ({"int8"}, True)


def test_another_precision_is_refused(store):
    with pytest.raises(InputError, match="float32, float16, int8; 'float8' came"):
        store.compact("float8")


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_a_copy_has_the_same_tails(store, precision, tmp_path):
    store.compact(precision)
    with closing(store.save(tmp_path / "copy")) as copy:
        assert (copy.manifest.tails, tails(copy)) == (precision, {precision})
        assert [item.vectors.tobytes() for item in copy.entries()] == [item.vectors.tobytes() for item in store.entries()]


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_vectors_of_few_components_have_nothing_to_round(precision):
    with closing(Store.create(SPACE.model_copy(update={"dimensions": 4}), {}, {})) as store:
        item = entries(0)[0]._replace(vectors=unit(np.ones((1, 4))))
        store.commit([item], (), [StoredCategory(Category(name="large"), unit(np.ones((1, 4))))])
        store.compact(precision)
        assert store.get("0").vectors.tobytes() == item.vectors.tobytes()


def test_an_empty_store_remembers_the_choice():
    with closing(Store.create(SPACE, {}, {})) as store:
        store.compact("int8", 100)
        put(store, 0)
        assert (tails(store), store.manifest.graphs_above) == ({"int8"}, 100)


# -- graphs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def faiss():
    return pytest.importorskip("faiss", reason="FAISS is not installed: pip install 'gemma-rag[faiss]'")


@pytest.mark.usefixtures("faiss")
@pytest.mark.parametrize("precision", OFF)
def test_a_search_by_a_plan_asks_the_graph_and_finds_what_the_exact_search_finds(store, precision, monkeypatch):
    store.compact(precision, 100)
    asked = []
    nearest = graph.Graph.nearest
    monkeypatch.setattr(graph.Graph, "nearest", lambda self, query, n: asked.append(n) or nearest(self, query, n))
    exact = best(store, None)
    assert not asked
    assert best(store, PLAN) == exact
    assert len(asked) == len(exact)


@pytest.mark.usefixtures("faiss")
def test_graphs_are_of_large_categories_named_in_the_manifest_and_swept(folder):
    folder.compact(graphs_above=100)
    (segment,) = folder.manifest.segments
    assert [(item.first, item.rows) for item in segment.graphs] == [(0, 150)]
    assert graph_files(folder) == {item.file for item in segment.graphs}
    folder.compact(graphs_above=20)
    assert [(item.first, item.rows) for item in folder.manifest.segments[0].graphs] == [(0, 150), (150, 50)]
    assert segment.graphs[0] in folder.manifest.segments[0].graphs  # what was built before is kept
    folder.compact(graphs_above=0)
    assert (folder.manifest.segments[0].graphs, graph_files(folder)) == ([], set())
    folder.compact()
    assert graph_files(folder) == set()


@pytest.mark.usefixtures("faiss")
def test_a_later_compaction_builds_graphs_again(folder):
    folder.compact(graphs_above=100)
    folder.commit((), ["0", "1"])
    before = graph_files(folder)
    put(folder, *range(300, 340))
    folder.compact()
    assert folder.manifest.segments[0].graphs[0].rows == 148 + 30
    assert graph_files(folder).isdisjoint(before)
    assert best(folder, PLAN) == best(folder, None)


@pytest.mark.usefixtures("faiss")
def test_a_commit_that_leaves_the_segment_alone_leaves_its_graph_in_use(folder, monkeypatch):
    folder.compact(graphs_above=100)
    monkeypatch.setattr(merging, "_SMALL", 0)
    before = graph_files(folder)
    put(folder, *range(300, 304))
    folder.commit((), [str(i) for i in range(0, 40, 3)])
    assert graph_files(folder) == before
    assert best(folder, PLAN) == best(folder, None)


@pytest.mark.usefixtures("faiss")
def test_a_view_takes_over_nothing_of_graphs_that_were_let_go_of(folder):
    folder.compact()
    view = View(folder.snapshot(), folder)
    folder.compact(graphs_above=100)
    view = View(folder.snapshot(), folder, view)
    assert view._members[folder.manifest.segments[0].file].data.graphs
    folder.compact(graphs_above=0)
    assert not View(folder.snapshot(), folder, view)._members[folder.manifest.segments[0].file].data.graphs


@pytest.mark.usefixtures("faiss")
def test_a_copy_has_graphs_too(store, tmp_path):
    store.compact(graphs_above=100)
    with closing(store.save(tmp_path / "copy")) as copy:
        assert len(graph_files(copy)) == 1
        assert best(copy, PLAN) == best(copy, None)


def test_a_number_below_zero_is_refused(store):
    with pytest.raises(InputError, match="-1 came"):
        store.compact(graphs_above=-1)


@pytest.mark.usefixtures("faiss")
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_graph_is_noticed_when_the_folder_is_opened(folder, damage):
    folder.compact(graphs_above=100)
    file = folder.path / folder.manifest.segments[0].graphs[0].file
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data[:-1] if damage == "cut" else data)
    with pytest.raises(KnowledgeBaseError, match=rf"{file.name} is damaged.* `gemma-rag compact` builds it anew"):
        Store.open(folder.path)
    if damage == "cut":
        with pytest.raises(KnowledgeBaseError, match=rf"{file.name} is damaged"):
            Store.open(folder.path, verify=False)
    file.unlink()
    with closing(Store.open(folder.path)) as store:
        store.compact()
        assert len(graph_files(store)) == 1
        assert best(store, PLAN) == best(store, None)


@pytest.mark.usefixtures("faiss")
def test_without_its_file_every_row_is_looked_at_and_it_is_said_once(folder):
    folder.compact(graphs_above=100)
    (folder.path / folder.manifest.segments[0].graphs[0].file).unlink()
    with closing(Store.open(folder.path)) as store:
        assert best(store, None)
        with pytest.warns(UserWarning, match="is missing: `gemma-rag compact`") as said:
            assert best(store, PLAN) == best(store, None)
        assert len(said) == 1


@pytest.mark.usefixtures("faiss")
def test_without_faiss_every_row_is_looked_at_and_it_is_said_once(folder, monkeypatch):
    folder.compact(graphs_above=100)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with closing(Store.open(folder.path)) as store:
        exact = best(store, None)
        with pytest.warns(UserWarning, match=r"gemma-rag\[faiss\]") as said:
            assert best(store, PLAN) == exact
        assert len(said) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            put(store, *range(300, 305))  # writing needs no FAISS either
            store.commit((), ["300"])


def test_without_faiss_no_graph_can_be_built_and_nothing_is_changed(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    before = folder.manifest
    with pytest.raises(MissingExtra, match=r"gemma-rag\[faiss\]"):
        folder.compact("int8", 100)
    assert (folder.manifest, largest_error(folder)) == (before, 0.0)
    folder.compact("int8", 1_000)  # no category is so large
    assert tails(folder) == {"int8"}


# -- failures on the way --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("faiss")
@pytest.mark.parametrize("place", [(merging, "build_graphs"), (graph.Graph, "save"), (Store, "_merger")], ids=str)
def test_when_it_fails_the_old_is_there_and_the_same_call_works(folder, monkeypatch, place):
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    exact = best(folder, None)
    with monkeypatch.context() as patch:
        patch.setattr(*place, fail)
        with pytest.raises(KnowledgeBaseError, match="no space left"):
            folder.compact("float16", 100)
    assert best(folder, None) == exact
    with closing(Store.open(folder.path)) as other:
        assert (other.manifest.tails, largest_error(other)) == ("float32", 0.0)
    folder.compact("float16", 100)
    with closing(Store.open(folder.path)) as other:
        assert best(other, PLAN) == best(other, None) == exact


@pytest.mark.usefixtures("faiss")
def test_what_a_kill_leaves_is_swept(folder):
    folder.compact(graphs_above=100)
    kept = graph_files(folder)
    (folder.path / "graph-99-0.faiss").write_bytes(b"half a gra")
    with closing(Store.open(folder.path)) as store:
        put(store, 300)
        store.commit((), ["300"])
    assert graph_files(folder) <= kept


def compact_it(path: Path) -> None:
    """The child: it deletes a document and compacts, with graphs over other categories each time."""
    with closing(Store.open(path)) as store:
        print("ready", flush=True)
        for i in range(20):
            store.commit((), [str(i)])
            store.compact("float16", (100, 20, 0)[i % 3])
            print(i, flush=True)


def start(path: Path) -> subprocess.Popen[str]:
    script = "import sys; from pathlib import Path; from test_compact import compact_it; compact_it(Path(sys.argv[1]))"
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    child = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True, env=here)
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.slow
@pytest.mark.usefixtures("faiss")
def test_whenever_compacting_is_killed_there_is_the_old_or_the_new(folder, tmp_path):
    with start(Path(shutil.copytree(folder.path, tmp_path / "unkilled"))) as child:
        ready = time.perf_counter()
        child.communicate()
    assert child.returncode == 0
    took = time.perf_counter() - ready
    moments = random.Random(25)
    seen = set()
    for i in range(8):
        path = Path(shutil.copytree(folder.path, tmp_path / str(i)))
        with start(path) as child:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(moments.uniform(0, took))
            child.kill()
            said = len(child.stdout.read().split())
        with closing(Store.open(path)) as store:  # compares every checksum
            gone = 200 - store.manifest.documents
            assert gone in (said, said + 1)
            assert largest_error(store, range(gone, 200)) <= OFF["float16"]
            assert best(store, PLAN) == best(store, None)
            put(store, *range(300, 303))
            named = {item.file for segment in store.manifest.segments for item in segment.graphs}
            assert graph_files(store) == named
            assert {file.name for file in path.glob("segment-*")} == {item.file for item in store.manifest.segments}
        seen.add(gone)
    assert len(seen) > 1  # the kills came at different moments


# -- above the store ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("faiss")
def test_the_command_and_the_knowledge_base_have_the_same_options(folder):
    path = str(folder.path)
    result = CliRunner().invoke(app, ["compact", path, "--tails", "float16", "--graphs-above", "100"])
    assert result.exit_code == 0, result.output
    with KnowledgeBase.open(Path(path)) as base:
        assert (base.manifest.tails, base.manifest.graphs_above, len(base.manifest.segments[0].graphs)) == ("float16", 100, 1)
        base.compact(tails="int8", graphs_above=0)
        assert (base.manifest.tails, base.manifest.graphs_above, base.manifest.segments[0].graphs) == ("int8", None, [])
