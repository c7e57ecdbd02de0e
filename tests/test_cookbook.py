"""The notebooks are clean and read well, and what runs them says so when one fails. `make notebooks` runs them."""

from __future__ import annotations

import base64
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COOKBOOK = Path(__file__).parent.parent / "cookbook"
NOTEBOOKS = sorted(COOKBOOK.glob("*.ipynb"))
TOOLS = runpy.run_path(str(COOKBOOK / "run.py"))

each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def _cells(notebook: Path, kind: str) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


# -- the notebooks ------------------------------------------------------------------------------------------------------


def test_the_notebooks_are_numbered_one_by_one():
    assert [int(path.stem[:2]) for path in NOTEBOOKS] == list(range(1, 9))


def test_the_readme_lists_every_notebook_under_its_title_in_order():
    rows = re.findall(r"^\| \[(.*?)\]\((.*?)\)", (COOKBOOK / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [file for _, file in rows] == [path.name for path in NOTEBOOKS]
    for title, file in rows:
        assert _cells(COOKBOOK / file, "markdown")[0].startswith(f"# {title}")


@each_notebook
def test_a_notebook_is_clean(notebook):
    text = notebook.read_text(encoding="utf-8")
    assert text == TOOLS["cleaned"](text), f"run: python cookbook/run.py --clean {notebook.stem}"


@each_notebook
def test_no_two_cells_have_the_same_id(notebook):
    ids = [cell["id"] for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]]
    assert len(set(ids)) == len(ids)


@each_notebook
def test_a_notebook_begins_with_its_number_and_says_what_it_is_about(notebook):
    title, _, text = _cells(notebook, "markdown")[0].partition("\n")
    assert title.startswith(f"# {int(notebook.stem[:2])}. ")
    assert len(text.strip()) > 50


@each_notebook
def test_the_first_code_cell_chooses_the_model(notebook):
    assert 'MODEL = os.environ.get("GEMMA_RAG_MODEL", "minilm")' in _cells(notebook, "code")[0]


@each_notebook
def test_a_notebook_has_text_for_its_code(notebook):
    assert len(_cells(notebook, "markdown")) >= len(_cells(notebook, "code")) / 2


@each_notebook
def test_a_cell_that_draws_begins_with_a_description_of_the_picture(notebook):
    drawing = [source for source in _cells(notebook, "code") if "plt.show()" in source or "plt.subplots(" in source]
    assert [source.partition("\n")[0] for source in drawing if not source.startswith("# ")] == []


@each_notebook
def test_the_links_of_a_notebook_lead_somewhere(notebook):
    for target in re.findall(r"\]\(([^)#\s]+)", "\n".join(_cells(notebook, "markdown"))):
        assert target.startswith("http") or (COOKBOOK / target).exists(), target


# -- cleaning -----------------------------------------------------------------------------------------------------------


def _notebook(*cells: dict[str, Any]) -> dict[str, Any]:
    return {"cells": list(cells), "metadata": {"editor": "some"}, "nbformat": 4, "nbformat_minor": 5}


def _code(source: str, *outputs: dict[str, Any]) -> dict[str, Any]:
    return {
        "cell_type": "code",
        "execution_count": 7,
        "id": "a",
        "metadata": {"collapsed": True},
        "outputs": list(outputs),
        "source": source,
    }


def test_cleaning_takes_outputs_counts_and_metadata_away():
    ran = _notebook(_code("1 + 1\n", {"output_type": "stream", "name": "stdout", "text": "2"}))
    clean = json.loads(TOOLS["cleaned"](json.dumps(ran)))
    assert clean["cells"] == [
        {"cell_type": "code", "execution_count": None, "id": "a", "metadata": {}, "outputs": [], "source": ["1 + 1"]}
    ]
    assert set(clean["metadata"]) == {"kernelspec", "language_info"}


# -- pages --------------------------------------------------------------------------------------------------------------


def _page(tmp_path: Path, *cells: dict[str, Any]) -> str:
    TOOLS["write_page"](_notebook(*cells), "01_page", tmp_path)
    return (tmp_path / "01_page.md").read_text(encoding="utf-8")


def test_what_a_cell_prints_stands_below_it_without_colours(tmp_path):
    output = {"output_type": "stream", "name": "stdout", "text": ["\x1b[1mtwo\x1b[0m\n", "lines\n"]}
    assert "```python\nprint()\n```\n\n```text\ntwo\nlines\n```" in _page(tmp_path, _code("print()", output))


def test_a_picture_is_a_file_with_the_description_of_its_cell(tmp_path):
    picture = {
        "output_type": "display_data",
        "data": {"image/png": base64.b64encode(b"png").decode(), "text/plain": "<Figure>"},
    }
    page = _page(tmp_path, _code("# Scores [of all]\nplot()", picture))
    assert "![Scores of all](01_page_files/1.png){ .plot }" in page
    assert (tmp_path / "01_page_files" / "1.png").read_bytes() == b"png"
    assert "<Figure>" not in page


def test_a_value_with_fences_of_its_own_stays_in_one_block(tmp_path):
    value = {"output_type": "execute_result", "data": {"text/plain": "```\nx\n```"}}
    assert "````text\n```\nx\n```\n````" in _page(tmp_path, _code("x", value))


def test_links_lead_to_the_pages_of_the_site():
    text = "[a](02_task_prompts.ipynb) [b](02_task_prompts.ipynb#top) [c](../docs/verify.md) [d](https://example.org/x.ipynb)"
    assert TOOLS["on_the_site"](text) == "[a](02_task_prompts.md) [b](02_task_prompts.md#top) [c](../verify.md) " + (
        "[d](https://example.org/x.ipynb)"
    )


# -- running ------------------------------------------------------------------------------------------------------------


def _run(folder: Path, *arguments: str, **sources: str) -> subprocess.CompletedProcess[str]:
    """Run a cookbook of notebooks of one cell each."""
    cookbook = folder / "cookbook"
    cookbook.mkdir()
    shutil.copy(COOKBOOK / "run.py", cookbook)
    for name, source in sources.items():
        text = TOOLS["cleaned"](json.dumps(_notebook(_code(source))))
        (cookbook / f"{name}.ipynb").write_text(text, encoding="utf-8")
    (cookbook / "01_data.csv").write_text("seven\n", encoding="utf-8")
    return subprocess.run([sys.executable, str(cookbook / "run.py"), *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_notebook_runs_beside_its_data_and_becomes_a_page(tmp_path):
    found = _run(tmp_path, "--docs", **{"01_good": "print(open('01_data.csv').read())"})
    assert found.returncode == 0, found.stderr
    assert "ran  01_good" in found.stdout
    assert "```text\nseven\n```" in (tmp_path / "docs" / "cookbook" / "01_good.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_cell_that_fails_fails_the_run_with_its_error(tmp_path):
    found = _run(tmp_path, **{"01_bad": "1 / 0"})
    assert found.returncode == 1
    assert "failed  01_bad" in found.stdout
    assert "ZeroDivisionError" in found.stderr


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["0.3", "2"], ids=["while it starts", "in a cell"])
def test_a_notebook_that_takes_too_long_fails_the_run(tmp_path, limit):
    found = _run(tmp_path, "--limit", limit, **{"01_slow": "while True: pass"})
    assert found.returncode == 1
    assert f"01_slow takes longer than {limit} s" in found.stderr


@pytest.mark.slow
def test_a_kernel_that_dies_fails_the_run(tmp_path):
    found = _run(tmp_path, **{"01_dead": "import os\nos._exit(1)"})
    assert found.returncode == 1
    assert "01_dead: its kernel died" in found.stderr


def test_an_unknown_notebook_is_refused_with_the_names_that_there_are():
    with pytest.raises(SystemExit, match=r"no notebook 99_none: there are 01_quickstart, 02_"):
        TOOLS["chosen"](["01_quickstart.ipynb", "99_none"])
