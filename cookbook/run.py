"""Run the notebooks of the cookbook, each in a fresh kernel and a folder of its own that is removed afterwards.

    python cookbook/run.py                       # all of them; fails where a cell fails, or a notebook takes too long
    python cookbook/run.py 03_matryoshka         # this one
    python cookbook/run.py --docs                # and write each, with its output, as a page of docs/cookbook/
    python cookbook/run.py --clean               # only take outputs, counts and editors' notes out of the files
    GEMMA_RAG_MODEL=embeddinggemma python cookbook/run.py

No model hub is asked, except where GEMMA_RAG_MODEL names a model other than the offline one. GEMMA_RAG_DATA, the folder of
the evaluation sets, is handed on to the notebooks.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGES = HERE.parent / "docs" / "cookbook"
LIMIT = 120.0
"""Seconds that a notebook may take."""

PROFILE = 'c.InlineBackend.figure_formats = {"svg"}\nc.IPKernelApp.log_level = 40\n'
"""What tells a kernel to draw pictures that stay sharp at any size, and to speak of errors only."""

KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, or clean, what the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Run the notebooks of the cookbook, offline."
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="notebooks, as 03_matryoshka; all of them by default",
    )
    parser.add_argument(
        "--docs", action="store_true", help="write each as a page of docs/cookbook/"
    )
    parser.add_argument(
        "--clean",
        action="store_true",
        help="take outputs out of the files, and run nothing",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(2, os.cpu_count() or 1),
        help="how many at a time",
    )
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help="seconds that each may take"
    )
    options = parser.parse_args(arguments)
    notebooks = chosen(options.names)
    if options.clean:
        for path in notebooks:
            path.write_text(cleaned(path.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    failed = asyncio.run(
        run_all(
            notebooks,
            max(1, options.jobs),
            options.limit,
            PAGES if options.docs else None,
        )
    )
    return 1 if failed else 0


def chosen(names: Sequence[str]) -> list[Path]:
    """The notebooks of those names, with or without a folder and an ending; all of them where there is no name."""
    known = {path.stem: path for path in sorted(HERE.glob("*.ipynb"))}
    if unknown := [name for name in names if Path(name).stem not in known]:
        sys.exit(
            f"the cookbook has no notebook {', '.join(unknown)}: there are {', '.join(known)}"
        )
    return [known[Path(name).stem] for name in names] or list(known.values())


def cleaned(text: str) -> str:
    """A notebook's file without what running and editing it left: outputs, counts, metadata."""
    notebook = json.loads(text)
    cells = []
    for place, cell in enumerate(notebook["cells"], 1):
        kept = {
            "cell_type": cell["cell_type"],
            "id": cell.get("id", f"cell-{place}"),
            "metadata": {},
        }
        if cell["cell_type"] == "code":
            kept = {
                "cell_type": "code",
                "execution_count": None,
                "id": kept["id"],
                "metadata": {},
                "outputs": [],
            }
        cells.append(
            {
                **kept,
                "source": "".join(cell["source"]).strip("\n").splitlines(keepends=True),
            }
        )
    clean = {"cells": cells, "metadata": KERNEL, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(clean, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def copy_data(name: str, folder: Path) -> None:
    """Copy the files of a notebook, which begin with its number, into a folder."""
    for file in HERE.glob(f"{name[:3]}*"):
        if file.suffix != ".ipynb":
            shutil.copy(file, folder)


# -- running ------------------------------------------------------------------------------------------------------------


async def run_all(
    notebooks: Sequence[Path], jobs: int, limit: float, pages: Path | None
) -> list[str]:
    """Run notebooks, some at a time, saying how each went; returns the names of those that failed."""
    free = asyncio.Semaphore(jobs)
    failed: list[str] = []

    async def one(path: Path) -> None:
        async with free:
            started = time.perf_counter()
            executed, error = await execute(
                path, limit, threads=max(1, (os.cpu_count() or 1) // jobs)
            )
            print(
                f"{'failed' if error else 'ran'}  {path.stem}  {time.perf_counter() - started:.1f} s",
                flush=True,
            )
            if error:
                failed.append(path.stem)
                print(error, file=sys.stderr, flush=True)
            elif pages is not None:
                write_page(executed, path.stem, pages)

    await asyncio.gather(*(one(path) for path in notebooks))
    return failed


async def execute(path: Path, limit: float, threads: int) -> tuple[Any, str]:
    """Run one notebook.

    Args:
        path: The notebook.
        limit: Seconds that it may take.
        threads: Cores that its libraries may use.

    Returns:
        The notebook with its outputs, and what went wrong: the cell and its error, or "".
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory(
        prefix=f"{path.stem}-", ignore_cleanup_errors=True
    ) as scratch:
        settings = {
            "GEMMA_RAG_MODEL": "minilm",
            "OMP_NUM_THREADS": str(threads),
            **os.environ,
            "IPYTHONDIR": scratch,
        }
        settings |= {
            "TOKENIZERS_PARALLELISM": "false",
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }
        settings |= {
            "PYTHONWARNINGS": "ignore:IProgress not found"
        }  # tqdm, which would like a widget
        if settings["GEMMA_RAG_MODEL"] == "minilm":
            settings |= {"HF_HUB_OFFLINE": "1"}
        work, profile = Path(scratch) / "work", Path(scratch) / "profile_default"
        work.mkdir()
        profile.mkdir()
        (profile / "ipython_kernel_config.py").write_text(PROFILE, encoding="utf-8")
        copy_data(path.stem, work)
        client = NotebookClient(
            notebook,
            timeout=None,
            kernel_name="python3",
            resources={"metadata": {"path": str(work)}},
        )
        started = time.perf_counter()
        try:
            await asyncio.wait_for(client.async_execute(env=settings), limit)
        except CellExecutionError as error:
            return notebook, str(error)
        except (
            asyncio.TimeoutError,
            DeadKernelError,
        ):  # what is stopped in a cell dies
            if time.perf_counter() - started < limit:
                return (
                    notebook,
                    f"{path.stem}: its kernel died, as when memory runs out",
                )
            advice = "make it smaller, or allow more with --limit"
            return notebook, f"{path.stem} takes longer than {limit:g} s: {advice}"
    return notebook, ""


# -- pages --------------------------------------------------------------------------------------------------------------


def write_page(notebook: Any, name: str, pages: Path) -> None:
    """Write an executed notebook as Markdown, its pictures in a folder beside it.

    Args:
        notebook: A notebook, as a mapping of the form of nbformat 4.
        name: The page's name, without an ending.
        pages: The folder of the pages.
    """
    pages.mkdir(parents=True, exist_ok=True)
    pictures = pages / f"{name}_files"
    shutil.rmtree(pictures, ignore_errors=True)
    copy_data(name, pages)
    blocks = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(on_the_site(source))
        elif cell["cell_type"] == "code":
            blocks += [_fenced(source, "python"), *_shown(cell, name, pictures)]
    model = os.environ.get("GEMMA_RAG_MODEL", "minilm")
    blocks.append(
        f"---\n\n*This page is the notebook `cookbook/{name}.ipynb`, as it ran with the model `{model}`.*"
    )
    (pages / f"{name}.md").write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def on_the_site(text: str) -> str:
    """A notebook's text with its links turned: to the other notebooks' pages, and to the documents in docs/."""
    text = re.sub(r"\]\((\d\d_\w+)\.ipynb([)#])", r"](\1.md\2", text)
    return text.replace("](../docs/", "](../")


def _shown(cell: Any, name: str, pictures: Path) -> Iterator[str]:
    """What a cell put out: text in a block, pictures in files, Markdown as it is."""
    printed = ""
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            printed += "".join(output["text"])
            continue
        if printed:
            yield _fenced(printed, "text")
            printed = ""
        data = output.get("data", {})
        kind = next((k for k in ("image/svg+xml", "image/png") if k in data), None)
        if kind:
            content = "".join(data[kind])
            pictures.mkdir(exist_ok=True)
            file = (
                pictures
                / f"{len(list(pictures.iterdir())) + 1}.{'svg' if 'svg' in kind else 'png'}"
            )
            file.write_bytes(
                content.encode() if "svg" in kind else base64.b64decode(content)
            )
            yield f"![{_description(cell)}]({pictures.name}/{file.name}){{ .plot }}"
        elif "text/markdown" in data:
            yield "".join(data["text/markdown"])
        elif "text/plain" in data:
            yield _fenced("".join(data["text/plain"]), "text")
    if printed:
        yield _fenced(printed, "text")


def _description(cell: Any) -> str:
    """What a picture shows, for those who cannot see it: the comment in the first line of its cell."""
    first = "".join(cell["source"]).lstrip().partition("\n")[0]
    return (
        re.sub(r"[\[\]]", "", first.lstrip("# "))
        if first.startswith("#")
        else "The plot that the code above draws"
    )


def _fenced(text: str, language: str) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).strip("\n")
    fence = "`" * max(
        3, 1 + max((len(run) for run in re.findall("`+", plain)), default=0)
    )
    return f"{fence}{language}\n{plain}\n{fence}"


if __name__ == "__main__":
    sys.exit(main())
