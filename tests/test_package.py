"""What the package promises as a whole: its names, its weight, its version."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gemma_rag

ROOT = Path(__file__).parent.parent


def test_the_front_door_is_this_list():
    assert gemma_rag.__all__ == [
        "Category",
        "Document",
        "DynamicThreshold",
        "GemmaEmbeddings",
        "GemmaRagError",
        "GroundedAnswerer",
        "KnowledgeBase",
        "Task",
        "TwoStageRetriever",
        "load_documents",
    ]


@pytest.mark.parametrize("name", gemma_rag.__all__)
def test_every_name_of_the_front_door_is_there_and_documented(name):
    assert getattr(gemma_rag, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Embeddings'"):
        gemma_rag.Embeddings  # noqa: B018


def loaded_by(statement: str) -> set[str]:
    """The modules that a statement loads in a fresh interpreter."""
    script = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split())


HEAVY = {"torch", "transformers", "sentence_transformers", "langchain_core", "langchain", "llama_index", "numpy", "pydantic"}


def test_importing_the_package_loads_neither_torch_nor_a_framework():
    assert loaded_by("import gemma_rag") & HEAVY == set()


def test_importing_everything_but_the_embeddings_loads_neither_torch_nor_a_framework():
    names = [name for name in gemma_rag.__all__ if name != "GemmaEmbeddings"]
    assert loaded_by(f"from gemma_rag import {', '.join(names)}") & (HEAVY - {"numpy", "pydantic"}) == set()


def test_the_command_line_loads_neither_torch_nor_a_framework():
    assert loaded_by("import gemma_rag.cli") & (HEAVY - {"numpy", "pydantic"}) == set()


def test_importing_the_embeddings_loads_no_torch():
    assert loaded_by("from gemma_rag import GemmaEmbeddings") & {"torch", "transformers", "sentence_transformers"} == set()


LAYERS = [
    {"errors", "prompts", "documents", "vectors", "thresholds", "fusion", "results", "cleaning", "store_scores"},
    {"encoders", "index", "storage", "lexical", "routing", "chunking", "loading", "passages", "rerank", "labelled", "grounding"}
    | {"reading", "summaries", "intervals", "metrics", "curves", "calibration", "probability", "learned"},
    {"embedding", "view", "knowledge_base", "search", "judging", "retriever", "external", "answer"}
    | {"remote_search", "remote_view", "ingestion", "bulk", "workers", "distributed", "copying", "planning"}
    | {"observing", "fitting", "calibrating", "estimating", "evaluation"}
    | {"verify", "verify_diagnosis", "verify_reference", "verify_texts"},
    {"embeddings", "llms", "mteb_adapter", "plots", "page", "report", "calibration_page", "terminal", "demo", "testing"}
    | {"cli", "cli_export", "cli_engines", "cli_index", "cli_learning", "cli_models", "cli_options"},
]


def modules() -> list[tuple[str, Path]]:
    package = Path(gemma_rag.__file__).parent
    files = [file for file in package.rglob("*.py") if "sample" not in file.parts and file != package / "__init__.py"]
    return [(file.relative_to(package).parts[0].removesuffix(".py"), file) for file in files]


def test_every_module_stands_in_one_layer():
    assert sorted(name for names in LAYERS for name in names) == sorted({module for module, _ in modules()})


@pytest.mark.parametrize(("module", "file"), modules(), ids=lambda value: getattr(value, "name", value))
def test_imports_point_down_the_layers_only(module, file):
    layer = next(i for i, names in enumerate(LAYERS) if module in names)
    used = set(re.findall(r"from gemma_rag(?:\.| import )([a-z]\w+)", file.read_text(encoding="utf-8"))) - {module}
    assert {name for name in used if name not in set().union(*LAYERS[: layer + 1])} == set()


@pytest.mark.parametrize(("module", "file"), modules(), ids=lambda value: getattr(value, "name", value))
def test_only_the_embeddings_and_the_edge_know_a_framework(module, file):
    text = file.read_text(encoding="utf-8")
    assert module in {"embeddings", "llms"} or not re.search(r"^\s*(from|import) (langchain|llama_index)", text, re.MULTILINE)


def test_the_changelog_speaks_of_this_version():
    assert f"## {gemma_rag.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_constraints_pin_torch_in_their_first_line():
    assert (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[0] == "torch==2.13.0"


def test_every_extra_that_an_error_names_exists():
    declared = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE))
    named = {
        extra
        for _, file in modules()
        for extra in re.findall(r"MissingExtra\([^)]*\"(\w+)\"\)|gemma-rag\[(\w+)\]", file.read_text(encoding="utf-8"))
        for extra in extra
        if extra and extra != "extra"
    }
    assert named
    assert named <= declared


def test_nothing_is_ever_unpickled_or_evaluated():
    for _, file in modules():
        assert not re.search(
            r"\bpickle\b(?!d)|\beval\(|\bexec\(|shell=True|allow_pickle=True", file.read_text(encoding="utf-8")
        ), file


def test_the_package_is_typed():
    assert (Path(importlib.import_module("gemma_rag").__file__).parent / "py.typed").is_file()
