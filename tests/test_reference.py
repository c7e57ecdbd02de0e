"""The reference has every public name, and every public name has a docstring; the page of the commands is what they are.

The sources are read, not imported. `make docs` checks what the built site really shows, by scripts/check_site.py.
"""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import gemma_rag

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def scripts() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts/public_names.py"))


@pytest.fixture(scope="module")
def public(scripts):
    return scripts["public_names"]()


def test_all_three_distributions_are_read(public):
    assert {name.partition(".")[0] for name in public} == {"gemma_rag", "langchain_gemma_rag", "llama_index_gemma_rag"}


def test_every_public_name_has_a_docstring(public):
    assert [name for name, found in public.items() if not found.has_docstring] == []


def test_every_public_name_is_in_the_reference(scripts, public):
    shown = scripts["shown"]()
    assert [name for name in public if name not in shown] == []


def test_what_the_reference_leaves_out_exists(scripts):
    existing = {module.path for package in scripts["load_packages"]() for module in scripts["modules"](package)}
    assert scripts["machinery"]() <= existing


def test_the_first_page_of_the_reference_names_the_front_door():
    text = (ROOT / "docs/reference/index.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\[(\w+)\]\(\S+#gemma_rag\.", text)) == sorted(gemma_rag.__all__)


def test_the_page_of_the_commands_is_current():
    made = runpy.run_path(str(ROOT / "scripts/cli_page.py"))["page"]()
    found = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    assert found == made, f"write it anew: {Path(sys.executable).name} scripts/cli_page.py"
