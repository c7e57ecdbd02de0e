"""Checks the built site: ``python scripts/check_site.py [site]``, after mkdocs; exit status 1 and a line for each thing wrong.

Nothing is loaded from elsewhere, every link within the site has its page and its heading, no quotation stands in another (so a
doctest was taken for one), and every public name is in the inventory of the reference.
"""

from __future__ import annotations

import re
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

from public_names import ROOT, public_names

_LOADED = {"script": "src", "img": "src", "source": "src", "iframe": "src", "video": "src", "audio": "src", "object": "data"}
_LOADING_LINKS = {"stylesheet", "preload", "prefetch", "preconnect", "dns-prefetch", "icon", "manifest", "modulepreload"}
_REMOTE = re.compile(r"^(https?:)?//")


class Page(HTMLParser):
    """What a page loads, where its links lead, what can be linked to in it, and how deep its quotations are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = {""}
        self.open_quotes = self.deepest_quote = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called for each tag."""
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and _LOADING_LINKS & set(given.get("rel", "").split()):
            self.loads.append(given.get("href", ""))
        elif tag in _LOADED:
            self.loads.append(given.get(_LOADED[tag], ""))
        if tag == "blockquote":
            self.open_quotes += 1
            self.deepest_quote = max(self.deepest_quote, self.open_quotes)
        self.loads += re.findall(r"url\(['\"]?([^'\")]+)", given.get("style", ""))
        self.loads += [part.split()[0] for part in given.get("srcset", "").split(",") if part.strip()]

    def handle_endtag(self, tag: str) -> None:
        """Called for each end of a tag."""
        if tag == "blockquote":
            self.open_quotes -= 1


def inventory(site: Path) -> set[str]:
    """The names in ``objects.inv``."""
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split(" ", 1)[0] for line in zlib.decompress(packed).decode("utf-8").splitlines() if line}


def problems(site: Path) -> list[str]:
    """Everything that is wrong with a built site, a line each."""
    pages = {page.relative_to(site).as_posix(): Page(page.read_text(encoding="utf-8")) for page in site.rglob("*.html")}
    found = [f"{name}: loads {url}" for name, page in pages.items() for url in page.loads if _REMOTE.match(url)]
    found += [f"{name}: a quotation in a quotation" for name, page in pages.items() if page.deepest_quote > 1]
    for sheet in site.rglob("*.css"):
        urls = re.findall(r"url\(['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", sheet.read_text(encoding="utf-8"))
        found += [f"{sheet.relative_to(site)}: loads {url}" for pair in urls for url in pair if _REMOTE.match(url)]
    for name, page in pages.items():
        if name != "404.html":
            found += [f"{name}: {link} leads nowhere" for link in page.links if not _leads_somewhere(name, link, pages, site)]
    shown = inventory(site)
    return found + [f"{name}: a public name that the reference lacks" for name in public_names() if name not in shown]


def _leads_somewhere(page: str, link: str, pages: dict[str, Page], site: Path) -> bool:
    if urlsplit(link).scheme or link.startswith("//"):
        return True
    target = urlsplit(urljoin(f"/{page.removesuffix('index.html')}", link))
    path = unquote(target.path).lstrip("/")
    if path == "" or path.endswith("/"):
        path += "index.html"
    if path in pages:
        return unquote(target.fragment) in pages[path].anchors
    return (site / path).is_file()


if __name__ == "__main__":
    wrong = problems(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "site")
    sys.stdout.writelines(f"{line}\n" for line in wrong)
    sys.exit(1 if wrong else 0)
