"""What the documents show is true: their Python runs and prints what its comments say, and their links lead somewhere.

The commands and the data that they show are checked in test_documentation_commands.py.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import io
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest

from gemma_rag import GemmaRagError

from .blocks import PAGES, ROOT, Block, blocks_of, name_of, python_blocks

WITH_PYTHON = [page for page in PAGES if python_blocks(page)]
_LANGUAGES = {"python", "sh", "console", "text", "json", "jsonl", "yaml", "toml", "csv", "markdown", "html", "diff"}


# -- Python -------------------------------------------------------------------------------------------------------------


def _promise(block: Block, statement: ast.stmt) -> str | None:
    """The comment behind a ``print(...)``."""
    if not (isinstance(statement, ast.Expr) and ast.unparse(statement).startswith("print(")):
        return None
    for token in tokenize.generate_tokens(io.StringIO(block.code).readline):
        if token.type == tokenize.COMMENT and token.start[0] == statement.end_lineno:
            return token.string.removeprefix("#")
    return None


def _matches(promised: str, found: str) -> bool:
    """Whether a text is what was promised, where ``...`` and ``[...]`` stand for anything; white space counts as one space."""
    words = " ".join(promised.split())
    pattern = re.escape(words).replace(re.escape("[...]"), ".*").replace(re.escape("..."), ".*")
    return re.fullmatch(pattern, " ".join(found.split()), re.DOTALL) is not None


def _run(block: Block, namespace: dict[str, Any]) -> str:
    """Run a block, statement by statement, and return what it printed; each promise in it is compared."""
    printed = []
    for statement in ast.parse(block.code).body:
        promised = _promise(block, statement)
        ast.increment_lineno(statement, block.line - 1)  # so that a traceback shows the line of the page
        code = compile(
            ast.Module([statement], []), str(block.page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True
        )
        with contextlib.redirect_stdout(io.StringIO()) as out:
            result = eval(code, namespace)
            if inspect.iscoroutine(result):
                asyncio.run(result)
        printed.append(out.getvalue())
        if promised is not None:
            assert _matches(promised, printed[-1]), f"{name_of(block.page)}:{statement.end_lineno}: prints {printed[-1]!r}"
    return "".join(printed)


def _fails(block: Block, namespace: dict[str, Any]) -> str:
    """Run a block that is to raise an error of ours, and return that error as Python's last line would show it."""
    with pytest.raises((GemmaRagError, pydantic.ValidationError)) as caught:
        _run(block, namespace)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where a page's code runs: an empty folder, an empty cache of the hub, which is switched off, and no proxy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    modules = dict(sys.modules)
    yield
    for name in [name for name, module in sys.modules.items() if module is None]:  # a page says: as if it were not installed
        del sys.modules[name]
    sys.modules.update(modules)


@pytest.mark.allow_hosts(["127.0.0.1"])  # where nothing answers: the page of the errors shows what is said then
@pytest.mark.usefixtures("desk")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_the_python_of_the_page_runs_and_prints_what_it_says(page):
    namespace: dict[str, Any] = {"__name__": "__main__"}
    blocks = blocks_of(page)
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        if block.language != "python" or block.note.startswith("type-checked:"):
            continue
        printed = _fails(block, namespace) if block.note == "raises" else _run(block, namespace)
        if block.note in ("raises", "prints"):
            assert after is not None, f"{block}: nothing follows it"
            assert _matches(after.code, printed), f"{after}: should be\n{printed}"


# Without the checks for None and for unions: LlamaIndex's types allow more than what comes in these examples.
_MYPY = """\
[mypy]
plugins = pydantic.mypy
allow_redefinition = true
check_untyped_defs = true
disable_error_code = top-level-await, union-attr
strict_optional = false
follow_imports = silent
ignore_missing_imports = true
[mypy-torch.*,transformers.*,sentence_transformers.*,scipy.*,sklearn.*,matplotlib.*,mteb.*,onnx.*,onnxruntime.*,openvino.*,nncf.*]
follow_imports = skip
[pydantic-mypy]
init_typed = true
init_forbid_extra = true
"""


def _parts(page: Path) -> list[list[Block]]:
    """The Python that is to fit the types; a new part begins where a name is imported from elsewhere than before."""
    parts: list[list[Block]] = [[]]
    known: dict[str, str | None] = {}
    for block in python_blocks(page):
        if block.note == "raises":  # wrong on purpose
            continue
        imports = [node for node in ast.walk(ast.parse(block.code)) if isinstance(node, ast.ImportFrom)]
        names = {alias.asname or alias.name: node.module for node in imports for alias in node.names}
        if any(known.get(name, module) != module for name, module in names.items()):
            parts.append([])
            known = {}
        known |= names
        parts[-1].append(block)
    return parts


@pytest.mark.slow  # mypy reads the frameworks too: half a minute where it has nothing cached
def test_the_python_of_the_pages_fits_the_types(tmp_path):
    sources = []
    for page in WITH_PYTHON:
        for part, blocks in enumerate(_parts(page)):
            lines: list[str] = []
            for block in blocks:
                lines += [""] * (block.line - 1 - len(lines)) + block.code.splitlines()  # the lines are those of the page
            sources.append(tmp_path / f"{re.sub(r'[^0-9a-z]+', '_', name_of(page).lower())}_{part}.py")
            sources[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "mypy.ini").write_text(_MYPY, encoding="utf-8")
    options = ["--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", str(ROOT / ".mypy_cache/documentation")]
    ran = subprocess.run([sys.executable, "-m", "mypy", *options, *map(str, sources)], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr  # 2: mypy itself failed
    assert [line for line in ran.stdout.splitlines() if ": error:" in line] == []


def test_the_readme_promises_an_answer_and_a_refusal():
    code = "".join(block.code for block in python_blocks(ROOT / "README.md"))
    assert len(re.findall(r"^print\(.*\)  # .", code, re.MULTILINE)) >= 2


def test_the_notes_before_python_are_those_that_are_known():
    """A note that is misspelt would let a block go unchecked."""
    notes = {block.note for page in PAGES for block in python_blocks(page)}
    assert [note for note in notes if not re.fullmatch(r"|raises|prints|type-checked: \S.*", note)] == []


# -- pages --------------------------------------------------------------------------------------------------------------


def _without_code(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_to_a_file_leads_somewhere(page):
    text = _without_code(page)
    targets = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r"\b(?:src|srcset|href)=\"([^\"#\s]+)", text)
    for target in targets:
        if not re.match(r"https?:|mailto:", target):
            assert _source((page.parent / target).resolve()).exists(), target


def _source(file: Path) -> Path:
    """A file, or the one that it is made of: `make docs` makes the pages of the cookbook."""
    if file.parent != ROOT / "docs/cookbook":
        return file
    return ROOT / "cookbook" / ("README.md" if file.name == "index.md" else f"{file.stem}.ipynb")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_its_language(page):
    assert [str(block) for block in blocks_of(page) if block.language not in _LANGUAGES] == []
