"""Writes docs/reference/cli.md, the page of the command line, from the commands themselves.

``python scripts/cli_page.py`` writes it; tests/test_reference.py fails where it is not what this would write.
"""

from __future__ import annotations

import inspect
import sys
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer

from gemma_rag.cli import app

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "cli.md"
NAME = "gemma-rag"

_TOP = """\
# Command line

`gemma-rag COMMAND --help` says the same in the terminal. `python scripts/cli_page.py` writes this page from the commands.

| exit status | meaning |
|---|---|
| 0 | answered, or done |
| 3 | refused; for `verify`, not verified |
| 2 | bad usage or input |
| 1 | a fault |
| 130 | stopped |

Answers go to standard output, everything else to standard error. With `--json` standard output holds one JSON object and
nothing else.
"""


def page() -> str:
    """The page as it should be."""
    group: Any = typer.main.get_command(app)
    callbacks = {known.name or known.callback.__name__: known.callback for known in app.registered_commands if known.callback}
    parts = [_TOP, "\n".join(["## For all commands", "", *_table("option", group, {})])]
    parts += [_command(name, command, get_type_hints(callbacks[name])) for name, command in group.commands.items()]
    return "\n".join(parts)


def _command(name: str, command: Any, hints: dict[str, Any]) -> str:
    usage = [NAME, name, *(_metavar(p) for p in command.params if p.param_type_name == "argument")]
    usage += [f"{p.opts[0]} {_kind(hints[p.name])}" for p in command.params if p.param_type_name == "option" and p.required]
    lines = [
        f"## {NAME} {name}",
        "",
        inspect.cleandoc(command.help or ""),
        "",
        "```text",
        " ".join([*usage, "[OPTIONS]"]),
        "```",
    ]
    return "\n".join([*lines, "", *_table("argument", command, hints), *_table("option", command, hints)])


def _table(what: str, command: Any, hints: dict[str, Any]) -> list[str]:
    shown = [p for p in command.params if p.param_type_name == what and p.name != "help"]
    rows = [f"| {name} | {text} |" for name, text in (_row(p, hints.get(p.name, bool)) for p in shown)]
    return [f"| {what} | meaning |", "|---|---|", *rows, ""] if rows else []


def _row(parameter: Any, hint: Any) -> tuple[str, str]:
    if parameter.param_type_name == "argument":
        return f"`{_metavar(parameter)}`", _cell(parameter.help or "")
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    text = [parameter.help or ""]
    kind = _plain(hint)
    if isinstance(kind, type) and issubclass(kind, Enum):
        text.append("One of " + ", ".join(f"`{choice.value}`" for choice in kind) + ".")
    elif kind is not bool:
        names += f" {_kind(hint)}"
    default = parameter.default.value if isinstance(parameter.default, Enum) else parameter.default
    if parameter.required:
        text.append("Required.")
    elif parameter.secondary_opts and isinstance(default, bool):
        text.append(f"Default: `{(parameter.opts if default else parameter.secondary_opts)[0]}`.")
    elif kind is not bool and parameter.show_default and isinstance(default, (str, int, float)):
        text.append(f"Default: `{default}`.")
    return names, _cell(" ".join(text))


def _metavar(parameter: Any) -> str:
    metavar = parameter.metavar or parameter.name.upper()
    return metavar if parameter.required or metavar.startswith("[") else f"[{metavar}]"


def _plain(hint: Any) -> Any:
    """The type itself, of an option that may be None or be given several times."""
    while get_args(hint):
        hint = next(part for part in get_args(hint) if part is not type(None))
    return hint


def _kind(hint: Any) -> str:
    return {int: "NUMBER", float: "NUMBER", Path: "PATH"}.get(_plain(hint), "TEXT")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"wrote {PAGE.name}\n")
