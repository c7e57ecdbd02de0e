"""Writes the pages of docs/cookbook/ that are not there: ``python scripts/cookbook_pages.py``, before mkdocs.

The first page is cookbook/README.md. A notebook that was run (``python cookbook/run.py --docs``) and not changed since has its
page already; of any other its text and code are shown, without output, under a note that says so.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "cookbook"
PAGES = ROOT / "docs" / "cookbook"
NOT_RUN = '\n\n!!! note "Not run"\n\n    This page was made without running the notebook: it shows no output.\n'


def main() -> None:
    """Write what is missing or older than its notebook."""
    tools = runpy.run_path(str(NOTEBOOKS / "run.py"))
    PAGES.mkdir(exist_ok=True)
    first = tools["on_the_site"]((NOTEBOOKS / "README.md").read_text(encoding="utf-8"))
    first = re.sub(r"\[([^\]]+)\]\([\w.]+\.(?:py|csv)\)", r"`cookbook/\1`", first)  # files that the site does not have
    (PAGES / "index.md").write_text(first, encoding="utf-8")
    for file in sorted(NOTEBOOKS.glob("*.ipynb")):
        page = PAGES / f"{file.stem}.md"
        if page.is_file() and page.stat().st_mtime >= file.stat().st_mtime:
            continue
        notebook = json.loads(file.read_text(encoding="utf-8"))
        notebook["cells"] = [{**cell, "outputs": []} for cell in notebook["cells"]]
        tools["write_page"](notebook, file.stem, PAGES)
        title, _, rest = page.read_text(encoding="utf-8").partition("\n")
        page.write_text(title + NOT_RUN + rest.partition("\n---\n\n*This page is")[0], encoding="utf-8")
        sys.stdout.write(f"{file.stem}: not run, shown without output\n")


if __name__ == "__main__":
    main()
