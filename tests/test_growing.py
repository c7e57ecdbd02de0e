"""Knowledge bases that grow and shrink: what a change costs, what readers see beside a writer, what compacting leaves."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_rag.documents import Document
from gemma_rag.encoders import Input, Space
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.prompts import NO_PROMPTS
from gemma_rag.retriever import TwoStageRetriever
from gemma_rag.routing import Gate
from gemma_rag.storage import merging
from gemma_rag.vectors import unit


class WordEncoder:
    """A vector counts some words of its text; made of numpy alone, so that a process that uses it starts quickly."""

    profile = NO_PROMPTS

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self.space = Space(
            model="words", weights="", prompts="", dimensions=len(words) + 1, max_tokens=99, overflow="error", runtime="",
            precision="float32",
        )  # fmt: skip

    def encode(self, inputs: Sequence[Input]) -> np.ndarray:
        return unit(np.array([[*(item.text.split().count(word) for word in self.words), 0.01] for item in inputs]))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]


WORDS = ["red", "green", "blue", "apple", "pear", "plum", "car", "bus", "tram"]
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from("abcdefgh"), TEXTS, st.sampled_from(["x", "y", "z"])),
        st.tuples(st.just("delete"), st.sampled_from("abcdefgh")),
        st.tuples(st.just("compact")),
    ),
    min_size=1,
    max_size=12,
)
FORTY = [Document(id=str(i), text="red", category="c") for i in range(40)]
QUESTIONS = ["red apple", "green pear", "blue tram car"]


def found(base: KnowledgeBase, **options) -> list[list[tuple[str, float, float | None]]]:
    """What questions find: id, score and lexical score of each hit."""
    options = {"k": 8, "category_threshold": -1.0, "document_threshold": -1.0} | options
    results = TwoStageRetriever(base, **options).retrieve_many(QUESTIONS)
    return [
        sorted((hit.document.id, round(hit.score, 5), round(hit.lexical_score or 0.0, 5)) for hit in result.hits)
        for result in results
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(changes=CHANGES)
def test_a_base_that_grew_and_shrank_finds_what_one_built_at_once_finds(changes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "_SMALL", 0)  # many segments, and dead rows in them
        model: dict[str, Document] = {}
        with KnowledgeBase.from_documents([], WordEncoder(WORDS)) as base:
            for change in changes:
                if change[0] == "add":
                    _, name, text, category = change
                    base.add([document := Document(id=name, text=text, category=category)])
                    model.pop(name, None)
                    model[name] = document
                elif change[0] == "delete" and change[1] in model:
                    base.delete([change[1]])
                    del model[change[1]]
                elif change[0] == "compact":
                    base.compact()
            with KnowledgeBase.from_documents(model.values(), WordEncoder(WORDS)) as fresh:
                for mode in ("flat", "lexical"):
                    assert found(base, mode=mode) == found(fresh, mode=mode)
                everything = Gate(mass=1.0)
                assert found(base, gate=everything) == found(fresh, gate=everything)
                assert base.categories == fresh.categories


def test_a_view_takes_over_what_has_not_changed(monkeypatch):
    monkeypatch.setattr(merging, "_SMALL", 0)
    with KnowledgeBase.from_documents(
        [Document(id=str(i), text="red", category="c") for i in range(40)], WordEncoder(WORDS)
    ) as base:
        (before,) = base.view().snapshot.segments
        base.add([Document(id="new", text="blue", category="c")])
        base.delete(["3"])
        assert base.view().snapshot.segments[0][1] is before[1]
        assert len(base.view().snapshot.segments) == 2


def test_the_share_of_dead_rows_is_said_and_is_nothing_after_compacting(monkeypatch):
    monkeypatch.setattr(merging, "_SMALL", 0)
    with KnowledgeBase.from_documents(
        [Document(id=str(i), text="red", category="c") for i in range(40)], WordEncoder(WORDS)
    ) as base:
        base.delete([str(i) for i in range(10)])
        assert (base.view().stale, base.view().documents_total) == (0.25, 30)
        base.compact()
        assert (base.view().stale, base.view().documents_total) == (0.0, 30)


# -- searching while another process writes -------------------------------------------------------------------------


def write_versions(path: Path, commits: int) -> None:
    """The child: each commit brings two documents of one version, deletes an old one, and now and then compacts."""
    with KnowledgeBase.open(path, WordEncoder(["red", "left", "right", "old"])) as base:
        for version in range(1, commits):
            pair = [
                Document(id=side, text=f"red {side}", category=side, metadata={"version": version})
                for side in ("left", "right")
            ]
            base.add([*pair, Document(id=f"old {version}", text="red old", category="old", metadata={"version": version})])
            base.delete([f"old {version - 1}"])
            if version % 10 == 0:
                base.compact()
            print(version, flush=True)


@pytest.mark.slow
def test_searches_beside_a_writer_see_one_generation_each(tmp_path):
    encoder = WordEncoder(["red", "left", "right", "old"])
    first = [
        Document(id=name, text=f"red {name}", category=name.split()[0], metadata={"version": 0})
        for name in ("left", "right", "old 0")
    ]
    with KnowledgeBase.from_documents(first, encoder) as base:
        base.save(tmp_path / "kb")
    script = "\n".join(
        [
            "import sys; from pathlib import Path; from gemma_rag.documents import Document",
            "import numpy as np; from collections.abc import Sequence; from gemma_rag.encoders import Input, Space",
            "from gemma_rag.knowledge_base import KnowledgeBase; from gemma_rag.prompts import NO_PROMPTS",
            "from gemma_rag.vectors import unit",
            inspect.getsource(WordEncoder),
            inspect.getsource(write_versions),
            "write_versions(Path(sys.argv[1]), 60)",
        ]
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "kb")], stdout=subprocess.PIPE, text=True)
    seen, asked = set(), 0
    with writer, KnowledgeBase.open(tmp_path / "kb", encoder) as reader:
        retriever = TwoStageRetriever(reader, k=4, category_threshold=-1.0, document_threshold=-1.0)
        while writer.poll() is None:
            if asked % 3 == 0:
                reader.refresh()
            result = retriever.retrieve("red")
            asked += 1
            versions = {hit.document.id: hit.document.metadata["version"] for hit in result.hits}
            assert versions["left"] == versions["right"], versions
            old = [version for name, version in versions.items() if name.startswith("old")]
            # between the two commits of a version its predecessor is there too
            assert {*old} in ({versions["left"]}, {versions["left"] - 1}, {versions["left"], versions["left"] - 1}), versions
            seen.add(versions["left"])
        assert writer.returncode == 0
        reader.refresh()
        assert [hit.document.metadata["version"] for hit in retriever.retrieve("red left").hits[:1]] == [59]
    assert len(seen) > 5
    assert np.diff(sorted(seen)).min() > 0
