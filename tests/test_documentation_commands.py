"""The commands and the data in the documents are such that exist: options, targets, files, extras, well-formed JSON."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from packaging.requirements import Requirement

from gemma_rag.cli import app

from .blocks import PAGES, ROOT, Block, blocks_of, name_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_OTHERS = {
    "cat",
    "cd",
    "chroma",
    "curl",
    "docker",
    "export",
    "git",
    "hf",
    "infinity_emb",
    "llama-server",
    "milvus-lite",
    "ollama",
    "ray",
    "sh",
    "vllm",
}
"""Programs that are not ours: what they are told cannot be checked here."""
_THEIR_SCRIPTS = {"convert_hf_to_gguf.py"}
"""Scripts of other projects: llama.cpp's."""


def _commands(block: Block) -> list[list[str]]:
    """The commands of a shell block, each as its words."""
    lines = block.code.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    found: list[list[str]] = []
    for line in lines:
        words: list[str] = []
        reader = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        reader.whitespace_split = True
        for word in reader:
            if set(word) <= set("&|;"):
                found.append(words)
                words = []
            else:
                words.append(word)
        found.append(words)
    return [_bare(words) for words in found if words]


def _bare(words: list[str]) -> list[str]:
    """Without variables before it, redirections behind it, and the folder of the virtual environment."""
    while words and re.match(r"^[A-Z_]+=", words[0]):
        words = words[1:]
    kept: list[str] = []
    skip = False
    for word in words:
        if set(word) <= set("<>"):
            skip = True
        elif not skip:
            kept.append(word)
        else:
            skip = False
    return [re.sub(r"^.*/bin/", "", kept[0]), *kept[1:]] if kept else []


SHELL = [
    (block, words)
    for page in PAGES
    for block in blocks_of(page)
    if block.language in ("sh", "console")
    for words in _commands(block)
    if words
]


def _lines_of(*programs: str) -> Any:
    cases = [(block, words) for block, words in SHELL if words[0] in programs]
    return pytest.mark.parametrize(("block", "words"), cases, ids=[f"{block}-{' '.join(words)}" for block, words in cases])


@_lines_of("gemma-rag")
def test_the_command_line_takes_what_the_page_gives_it(block, words):
    group: Any = typer.main.get_command(app)
    if words[1:] in (["--help"], ["--version"], ["COMMAND", "--help"]):
        return
    with group.make_context("gemma-rag", [word for word in words[1:] if word != "--debug"]) as context:
        name, command, rest = group.resolve_command(context, [*getattr(context, "_protected_args", []), *context.args])
        if "--help" not in rest:
            command.make_context(name, rest, parent=context).close()


@_lines_of("make")
def test_the_target_is_in_the_makefile(block, words):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [word for word in words[1:] if "=" not in word]
    assert targets
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE)


@_lines_of("python", "python3", "bash", "pytest", "ruff", "mypy", "mkdocs")
def test_the_files_of_the_command_exist(block, words):
    modules = {words[at + 1] for at, word in enumerate(words[:-1]) if word == "-m" and words[0].startswith("python")}
    assert modules <= {"pytest", "pip", "venv", "pydoc", "http.server", "llama_cpp.server", "jupyter", "mypy"}
    if modules & {"venv", "pip", "llama_cpp.server"}:
        return
    for word in words[1:]:
        if re.fullmatch(r"[\w./-]+\.(py|sh|ipynb|txt)|\.ci/run|tests/\S*", word) and word not in _THEIR_SCRIPTS:
            assert (ROOT / word.partition("::")[0]).exists(), word


@_lines_of("pip", "python", "python3")
def test_what_is_installed_is_a_distribution_of_ours_with_these_extras_or_of_others(block, words):
    if "install" not in words or (words[0] != "pip" and words[1:3] != ["-m", "pip"]):
        return
    rest = iter(words[words.index("install") + 1 :])
    for word in rest:
        if word in ("-c", "--constraint", "-r"):
            assert (ROOT / next(rest)).is_file()
        elif word in ("-e", "--editable"):
            _check_folder(next(rest))
        elif word.startswith(("./", "integrations/")):
            _check_folder(word)
        elif not word.startswith("-"):
            wanted = Requirement(word)
            if wanted.name in DISTRIBUTIONS:
                assert wanted.extras <= DISTRIBUTIONS[wanted.name]


def _check_folder(word: str) -> None:
    found = re.fullmatch(r"([\w./-]+)(?:\[([\w,-]+)\])?", word)
    assert found, word
    name = tomllib.loads((ROOT / found[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
    assert set((found[2] or "").split(",")) - {""} <= DISTRIBUTIONS[name]


def _extras(project: Path) -> tuple[str, set[str]]:
    about = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    return about["name"], set(about.get("optional-dependencies", {}))


DISTRIBUTIONS = dict(_extras(file) for file in [ROOT / "pyproject.toml", *ROOT.glob("integrations/*/pyproject.toml")])


def test_every_program_is_one_that_is_checked_or_known_not_to_be_ours():
    checked = {"gemma-rag", "make", "python", "python3", "bash", "pip", "pytest", "ruff", "mypy", "mkdocs"}
    assert {f"{words[0]} in {block}" for block, words in SHELL if words[0] not in checked | _OTHERS} == set()


def _data_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks_of(page) if block.language in ("json", "jsonl", "yaml", "toml")]


@pytest.mark.parametrize("block", _data_blocks(), ids=str)
def test_the_data_can_be_read(block):
    if block.language == "json":
        json.loads(block.code)
    elif block.language == "jsonl":
        for line in block.code.splitlines():
            json.loads(line)
    elif block.language == "yaml":
        yaml.safe_load(block.code)
    else:
        tomllib.loads(block.code)


@pytest.mark.parametrize("target", ["demo", "test", "check"])
def test_the_readme_and_the_makefile_name_the_same_commands(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    documents = (ROOT / "README.md").read_text("utf-8") + (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert f"make {target}" in documents


def test_the_pages_have_names_that_differ():
    assert len({name_of(page) for page in PAGES}) == len(PAGES)
