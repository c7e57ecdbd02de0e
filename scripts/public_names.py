"""The public names of the three distributions, found in their sources, and which of them the reference shows.

Public is what stands in a module's ``__all__``, or where there is none the classes and functions that are defined there under a
name without an underscore; modules that docs/reference/index.md lists as machinery are left out, and of the two adapters
everything that the package itself does not hand out. tests/test_reference.py holds that each public name has a docstring and a
place in the reference, and check_site.py that the built site shows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference"
SOURCES = {
    "gemma_rag": ROOT,
    "langchain_gemma_rag": ROOT / "integrations" / "langchain",
    "llama_index_gemma_rag": ROOT / "integrations" / "llama_index",
}


def load_packages() -> list[griffe.Module]:
    """The three packages, read and not imported."""
    loader = griffe.GriffeLoader(search_paths=list(SOURCES.values()), allow_inspection=False)
    packages = [loader.load(name) for name, folder in SOURCES.items() if (folder / name).is_dir()]
    loader.resolve_aliases(implicit=False, external=False)
    return [package for package in packages if isinstance(package, griffe.Module)]


def machinery() -> set[str]:
    """The modules and packages that the reference leaves out, by the list in its first page."""
    text = (REFERENCE / "index.md").read_text(encoding="utf-8")
    _, _, rest = text.partition("## What is not in it")
    return set(re.findall(r"`(\w+(?:\.\w+)+)`", rest.partition("\n## ")[0]))


def directives() -> dict[str, bool]:
    """What the pages of the reference name after ``:::``, and whether its members come with it."""
    texts = [page.read_text(encoding="utf-8") for page in REFERENCE.glob("*.md")]
    found = [part for text in texts for part in re.findall(r"^::: ([\w.]+)\n((?: +.*\n)*)", text, re.MULTILINE)]
    return {name: "members: false" not in options for name, options in found}


def shown() -> set[str]:
    """The paths of all that the directives bring into the reference."""
    packages = {package.path: package for package in load_packages()}
    found: set[str] = set()
    for name, has_members in directives().items():
        first, _, rest = name.partition(".")
        obj: griffe.Object | griffe.Alias = packages[first][rest] if rest else packages[first]
        target = obj.final_target if isinstance(obj, griffe.Alias) else obj
        found.add(target.path)
        if has_members and isinstance(target, griffe.Module):
            found |= {part.path for member in public_members(target) for part in with_methods(member)}
        elif has_members:
            found |= {part.path for part in with_methods(target)}
    return found


def modules(package: griffe.Module) -> Iterator[griffe.Module]:
    """A package and all modules in it."""
    yield package
    for member in package.members.values():
        if isinstance(member, griffe.Module):
            yield from modules(member)


def is_machinery(path: str, left_out: set[str]) -> bool:
    """Whether a module is one that the reference leaves out, or lies in such a package, or has a private name."""
    parts = path.split(".")
    return any(part.startswith("_") for part in parts) or any(
        ".".join(parts[:length]) in left_out for length in range(1, len(parts) + 1)
    )


def public_members(module: griffe.Module) -> Iterator[griffe.Object]:
    """The classes and functions that a module makes public, and whatever else its ``__all__`` names, where they are defined."""
    for name, member in module.members.items():
        listed = module.exports is not None and name in module.exports
        if not listed and (module.exports is not None or name.startswith("_") or member.is_alias or member.is_attribute):
            continue
        target = member.final_target if isinstance(member, griffe.Alias) else member
        if not isinstance(target, griffe.Module):
            yield target


def with_methods(obj: griffe.Object) -> Iterator[griffe.Object]:
    """An object, and where it is a class its public methods and properties."""
    yield obj
    if isinstance(obj, griffe.Class):
        for name, member in obj.members.items():
            if isinstance(member, griffe.Class):
                if not name.startswith("_"):
                    yield from with_methods(member)
            elif isinstance(member, griffe.Object) and not name.startswith("_") and _is_method(member):
                yield member


def _is_method(member: griffe.Object) -> bool:
    return member.is_function or "property" in member.labels


def public_names() -> dict[str, griffe.Object]:
    """Every public name by its path where it is defined: modules, their members, and the methods of classes."""
    left_out = machinery()
    found: dict[str, griffe.Object] = {}
    for package in load_packages():
        for module in modules(package) if package.path == "gemma_rag" else [package]:
            if is_machinery(module.path, left_out):
                continue
            found[module.path] = module
            for member in public_members(module):
                found.update({obj.path: obj for obj in with_methods(member)})
    return found
