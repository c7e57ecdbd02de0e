"""A griffe extension: our docstrings as mkdocstrings shows them best, without writing them otherwise.

- A name in backticks becomes a link to where the reference describes it.
- ``Example:`` becomes the section ``Examples:``, whose doctests are shown as code. A doctest in no section is put into one.
- An enumeration lists its values, and an alias of literals is shown with them.
- A field of a pydantic model, ``Field(default=..., description=...)``, has its description as docstring.
- ``Args:`` of a class without ``__init__``, as pydantic's models are, become ``Attributes:``: its fields are its arguments.
"""

from __future__ import annotations

import ast
import re
import textwrap
from typing import Any

import griffe

# `Name`, `name`, `Name.member`, `gemma_rag.module.name`: in single backticks, and not part of a longer run of them
_NAME = re.compile(r"(?<!`)`([A-Za-z_][\w.]*)(\(\))?`(?!`)")
# Lines from the first ``>>>`` at the margin, so outside any section, to a blank line
_DOCTEST = re.compile(r"^>>>.*(?:\n.+)*", re.MULTILINE)
_OURS = ("gemma_rag", "langchain_gemma_rag", "llama_index_gemma_rag")


class Docstrings(griffe.Extension):
    """Changes the docstrings of each package, once all of it is read."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Called by griffe."""
        if pkg.path in _OURS:
            _visit(pkg)


def _visit(obj: griffe.Object) -> None:
    if isinstance(obj, griffe.Attribute) and isinstance(obj.value, griffe.ExprCall) and str(obj.value.function) == "Field":
        _field(obj, obj.value)
    if isinstance(obj, griffe.Attribute) and obj.docstring is None and str(obj.value).startswith("Literal["):
        obj.docstring = griffe.Docstring("One of these values.", parent=obj)
    elif obj.docstring is not None:
        text = _with_links(obj.docstring.value, obj)
        text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
        text = _DOCTEST.sub(lambda found: "Examples:\n" + textwrap.indent(found[0], "    "), text)
        if obj.is_class and "__init__" not in obj.members:
            text = re.sub(r"^Args:$", "Attributes:", text, flags=re.MULTILINE)
        if isinstance(obj, griffe.Class) and any(str(base).endswith("Enum") for base in obj.bases):
            values = [f"`{name}`" for name, member in obj.members.items() if member.is_attribute and name.isupper()]
            text += f"\n\nIts members: {', '.join(values)}."
        obj.docstring.value = text
    for member in obj.members.values():
        if isinstance(member, griffe.Object):
            _visit(member)


def _field(obj: griffe.Attribute, call: griffe.ExprCall) -> None:
    given = {each.name: each.value for each in call.arguments if isinstance(each, griffe.ExprKeyword)}
    if "description" in given and obj.docstring is None:
        text = ast.literal_eval(str(given["description"]).removeprefix("f"))
        obj.docstring = griffe.Docstring(re.sub(r"{(\w+)}", lambda name: _constant(obj, name[1]), text), parent=obj)
    obj.value = given.get("default", f"{given['default_factory']}()" if "default_factory" in given else None)


def _constant(scope: griffe.Object, name: str) -> str:
    """The text that a description names, as in ``f"the variable {API_KEY}"``."""
    member = scope.module.members[name]
    return str(ast.literal_eval(str(member.value))) if isinstance(member, griffe.Attribute) else name


def _with_links(text: str, scope: griffe.Object) -> str:
    lines = []
    code = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            code = not code
        plain = code or line.lstrip().startswith((">>>", "..."))
        lines.append(line if plain else _NAME.sub(lambda found: _link(found, scope), line))
    return "\n".join(lines)


def _link(found: re.Match[str], scope: griffe.Object) -> str:
    """An optional cross-reference: what the reference does not have stays plain code."""
    first, _, rest = found[1].partition(".")
    try:
        path = first if first in _OURS else scope.resolve(first)
    except griffe.NameResolutionError:
        return found[0]
    target = f"{path}.{rest}" if rest else path
    return f'<autoref optional identifier="{target}"><code>{found[1]}{found[2] or ""}</code></autoref>'
