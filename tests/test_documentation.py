"""What the documents show is true: their Python runs, and the cookbook too."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_readmes_python_prints_what_its_comments_say(capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    promised = re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == promised
    assert len(promised) == 2


@pytest.mark.parametrize("recipe", sorted((ROOT / "cookbook").glob("*.py")), ids=lambda file: file.name)
def test_the_recipe_runs(recipe, capsys):
    runpy.run_path(str(recipe), run_name="__main__")
    assert capsys.readouterr().out


def test_the_quickstart_answers_two_questions_and_refuses_the_third(capsys):
    runpy.run_path(str(ROOT / "cookbook/quickstart.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "27 days" in out
    assert "8 cents" in out
    assert "Who won the chess final?\n  I don't know." in out


@pytest.mark.parametrize("file", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md")), ids=lambda file: file.name)
def test_every_link_to_a_file_leads_somewhere(file):
    for target in re.findall(r"\]\(([^)#]+)", file.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (file.parent / target).exists(), target


@pytest.mark.parametrize("target", ["demo", "test", "check"])
def test_the_readme_and_the_makefile_name_the_same_commands(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    documents = (ROOT / "README.md").read_text("utf-8") + (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert f"make {target}" in documents
