"""The commands `copy`, `plan` and `compact`: what they change, what they print, and how they fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gemma_rag import KnowledgeBase, cli, cli_engines
from gemma_rag.cli_options import EngineName, address_from
from gemma_rag.copying import Content
from gemma_rag.documents import Document
from gemma_rag.errors import InputError
from gemma_rag.index.embedded import Plan
from gemma_rag.storage import EngineAddress

COLOURS = ["red", "green", "blue", "white"]
THINGS = {"apple": "fruit", "pear": "fruit", "plum": "fruit", "car": "traffic", "bus": "traffic", "tram": "traffic"}
PAGES = [Document(id=f"{c}-{t}", text=f"The {c} {t}.", title=f"{c} {t}", category=THINGS[t]) for c in COLOURS for t in THINGS]


@pytest.fixture
def gemma_rag(capsys):
    """Run a command; returns exit status, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.run([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def filled(minilm, tmp_path_factory) -> Path:
    """A knowledge base that the command line can open without being told its encoder."""
    folder = tmp_path_factory.mktemp("filled") / "kb"
    with KnowledgeBase.from_documents(PAGES, minilm) as base:
        base.save(folder)
    return folder


@pytest.fixture
def folder(filled, tmp_path) -> Path:
    shutil.copytree(filled, tmp_path / "kb")
    return tmp_path / "kb"


# -- copy -----------------------------------------------------------------------------------------------------------


def test_copy_says_what_it_did_and_that_it_compared(gemma_rag, folder, tmp_path) -> None:
    status, out, _ = gemma_rag("copy", folder, "--out", tmp_path / "copy")
    assert status == 0
    assert f"{tmp_path / 'copy'}: 24 documents in 2 categories, 24 chunks (24 copied;" in out
    assert "counts and checksum" in out
    with KnowledgeBase.open(folder) as source, KnowledgeBase.open(tmp_path / "copy") as copy:
        assert Content.of(copy.store) == Content.of(source.store)


def test_copy_prints_json(gemma_rag, folder, tmp_path) -> None:
    status, out, _ = gemma_rag("copy", folder, "--out", tmp_path / "copy", "--json")
    about = json.loads(out)
    assert (status, about["documents"], about["copied"], about["engine"]["name"]) == (0, 24, 24, "faiss")
    assert len(about["content_sha256"]) == 64


def test_copy_to_chroma_and_back(gemma_rag, folder, tmp_path) -> None:
    pytest.importorskip("chromadb", reason="chromadb is not installed: copying to it is not tested")
    uri = tmp_path / "chroma"
    status, out, _ = gemma_rag("copy", folder, "--engine", "chroma", "--uri", uri, "--collection", "pages", "--batch", 10)
    assert status == 0
    there = tmp_path / "kb-chroma"
    assert f"{there} on chroma at {uri}, collection pages: 24 documents" in out
    assert gemma_rag("copy", there, "--out", tmp_path / "back")[0] == 0
    with KnowledgeBase.open(folder) as source, KnowledgeBase.open(tmp_path / "back") as back:
        assert Content.of(back.store) == Content.of(source.store)
    status, out, _ = gemma_rag("ask", there, "Where is the red apple?", "--dense")
    assert (status, "red apple" in out) == (0, True)


def test_copy_onto_something_else_is_refused(gemma_rag, folder, tmp_path) -> None:
    status, _, err = gemma_rag("copy", folder, "--out", folder)
    assert (status, "is what is to be copied" in err) == (2, True)


def test_copy_needs_a_uri_for_a_database(gemma_rag, folder) -> None:
    status, _, err = gemma_rag("copy", folder, "--engine", "milvus")
    assert status == 2
    assert "engine milvus needs a uri" in err


def test_a_password_in_the_uri_is_refused_and_not_repeated(gemma_rag, folder) -> None:
    status, out, err = gemma_rag("copy", folder, "--engine", "chroma", "--uri", "http://me:secret@host:8000")
    assert status == 2
    assert "GEMMA_RAG_CHROMA_TOKEN" in err
    assert "secret" not in out + err


def test_a_path_is_remembered_absolutely(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert address_from(EngineName.CHROMA, "data", None).uri == str(tmp_path / "data")
    assert address_from(EngineName.MILVUS, "http://host:1", "x") == EngineAddress(
        name="milvus", uri="http://host:1", collection="x"
    )


def test_the_folder_keeps_everything_of_faiss() -> None:
    with pytest.raises(InputError, match="leave uri and collection out"):
        address_from(EngineName.FAISS, "http://host:1", None)


def test_the_bar_is_for_people_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with cli_engines._bar(True) as quiet, cli_engines._bar(False) as piped:
        assert quiet is piped is None
    monkeypatch.setenv("FORCE_COLOR", "1")
    with cli_engines._bar(False) as tell:
        assert tell is not None
        tell(1, 2)


# -- plan -----------------------------------------------------------------------------------------------------------


def test_plan_shows_every_trial_and_says_why(gemma_rag, folder) -> None:
    status, out, _ = gemma_rag("plan", folder)
    assert status == 0
    assert "components" in out
    assert "exact" in out
    assert len(out.splitlines()) > 4


def test_plan_prints_json_and_keeps_the_plan(gemma_rag, folder) -> None:
    status, out, _ = gemma_rag("plan", folder, "--target-overlap", 0.9, "--json")
    about = json.loads(out)
    assert (status, about["target_overlap"], about["questions"]) == (0, 0.9, 24)
    with KnowledgeBase.open(folder) as base:
        assert base.search_plan == (None if about["plan"] is None else Plan(**about["plan"]))


def test_plan_can_be_tried_without_being_kept_and_forgotten(gemma_rag, folder) -> None:
    with KnowledgeBase.open(folder) as base:
        base.use_plan(kept := Plan(dimensions=64, oversampling=4))
    assert "Nothing was changed" in gemma_rag("plan", folder, "--dry-run")[1]
    with KnowledgeBase.open(folder) as base:
        assert base.search_plan == kept
    assert "searched exactly" in gemma_rag("plan", folder, "--exact")[1]
    with KnowledgeBase.open(folder) as base:
        assert base.search_plan is None


def test_plan_measures_with_the_questions_given(gemma_rag, folder, tmp_path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "Where is the red bus?", "relevant": []}\n\n"Who has a pear?"\n', encoding="utf-8")
    assert json.loads(gemma_rag("plan", folder, "--questions", questions, "--json")[1])["questions"] == 2


@pytest.mark.parametrize("line", ["{}", "[1]", '{"question": " "}', "not json", '{"question": 1}'])
def test_a_line_without_a_question_is_named(gemma_rag, folder, tmp_path, line) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text(f'{{"question": "Where?"}}\n{line}\n', encoding="utf-8")
    status, _, err = gemma_rag("plan", folder, "--questions", questions)
    assert status == 2
    assert "questions.jsonl:2: each line is an object with a question" in err


def test_questions_that_are_not_there_are_named(gemma_rag, folder, tmp_path) -> None:
    status, _, err = gemma_rag("plan", folder, "--questions", tmp_path / "nowhere.jsonl")
    assert (status, "nowhere.jsonl cannot be read" in err) == (2, True)
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "has no question" in gemma_rag("plan", folder, "--questions", tmp_path / "empty.jsonl")[2]


def test_forgetting_a_plan_measures_nothing(gemma_rag, folder) -> None:
    assert gemma_rag("plan", folder, "--exact", "--dry-run")[0] == 2


# -- compact --------------------------------------------------------------------------------------------------------


def test_compact_puts_segments_together(gemma_rag, folder, minilm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma_rag.storage.merging._SMALL", 0)
    with KnowledgeBase.open(folder, minilm) as base:
        base.add([PAGES[0].model_copy(update={"id": "new", "text": "A new page."})])
        base.delete(["red-bus"])
        segments = len(base.manifest.segments)
    about = json.loads(gemma_rag("compact", folder, "--json")[1])
    assert (about["documents"], about["segments"]) == (24, {"before": segments, "after": 1})
    status, out, _ = gemma_rag("compact", folder)
    assert (status, "24 documents; segments 1 -> 1" in out) == (0, True)


def test_compacting_what_is_no_knowledge_base_fails(gemma_rag, tmp_path) -> None:
    status, _, err = gemma_rag("compact", tmp_path / "nowhere")
    assert status == 1
    assert "there is no knowledge base" in err
