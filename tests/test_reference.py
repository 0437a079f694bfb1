"""The reference is built from the docstrings: every name is on a page, and no page asks anybody for anything."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import griffe
import pytest

import medistill

ROOT = Path(__file__).resolve().parent.parent
# Whatever a browser fetches by itself: not where a link leads to.
FETCHED = re.compile(
    r"<(?:script|link|img|iframe|embed|source|object|video|audio|track|input|image|use)\b[^>]*?"
    r"\s(?:src|href|srcset|data|poster|xlink:href)=[\"']?\s*((?:[a-z]+:)?//[^\"'\s>]+)",
    re.IGNORECASE,
)
# The same in style sheets, and the typesetting of others.
STYLED = re.compile(r"(?:url\(\s*[\"']?|@import\s+[\"'])((?:https?:)?//[^\"')\s]+)", re.IGNORECASE)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "site"
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "-f",
        "configs/mkdocs.yml",
        "--site-dir",
        str(folder),
    ]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, str]:
    found = {path.relative_to(site).as_posix(): path.read_text("utf-8") for path in site.rglob("*.html")}
    assert len(found) > 15
    return found


def _anchors(page: str) -> set[str]:
    return set(re.findall(r'\bid="([^"]+)"', page))


def _documented(parent: griffe.Object) -> list[str]:
    """Paths of everything public that has a docstring, read without importing it."""
    found = []
    for member in parent.members.values():
        if not member.is_alias and not member.name.startswith("_"):
            found += [member.path] if member.has_docstring else []
            found += _documented(member)
    return found


def test_every_public_name_has_an_anchor(pages: dict[str, str]) -> None:
    anchors = _anchors(pages["reference/medistill.html"])
    assert [name for name in medistill.__all__ if f"medistill.{name}" not in anchors] == []


def test_everything_documented_is_on_a_page(pages: dict[str, str]) -> None:
    anchors = set().union(*map(_anchors, pages.values()))
    documented = _documented(griffe.load("medistill", search_paths=[ROOT]))
    assert len(documented) > 1000
    assert [path for path in documented if path not in anchors] == []


def test_no_page_asks_for_anything_outside(site: Path, pages: dict[str, str]) -> None:
    styles = {path.name: path.read_text("utf-8") for path in site.rglob("*.css")}
    assert styles
    fetched = [(name, found) for name, page in pages.items() for found in FETCHED.findall(page)]
    fetched += [(name, found) for name, text in {**pages, **styles}.items() for found in STYLED.findall(text)]
    assert fetched == []
    # The theme fetches a script where a page draws a diagram, and asks a forge for stars where one is named.
    assert [name for name, page in pages.items() if 'class="mermaid"' in page or "md-source" in page] == []


@pytest.mark.parametrize(
    "markup",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="preconnect" href="//fonts.example" crossorigin>',
        "<img alt='' src='http://example.org/x.png'>",
    ],
)
def test_the_search_for_requests_finds_some(markup: str) -> None:
    assert FETCHED.search(markup)
    assert not FETCHED.search('<a href="https://example.org">')
    assert STYLED.search("@font-face{src:url(https://fonts.example/x.woff2)}")
    assert not STYLED.search("url(\"data:image/svg+xml;charset=utf-8,<svg xmlns='http://www.w3.org/2000/svg'/>\")")


def test_formulas_and_references_are_written_out(pages: dict[str, str]) -> None:
    written = "".join(page for name, page in pages.items() if name.startswith("reference/"))
    formulas = re.findall(r"<math\b.*?</math>", written, re.DOTALL)
    assert len(formulas) > 100
    said = [html.unescape(re.sub(r"<[^>]+>", "", formula)) for formula in formulas]
    assert [formula for formula in said if "\\" in formula] == []
    assert "arithmatex" not in written
    assert re.findall(r":(?:attr|class|data|func|meth|mod|math):|\.\. math|<blockquote>", written) == []


def test_the_first_pages_are_the_files_of_the_repository(pages: dict[str, str]) -> None:
    heads = {"index": "A hospital holds", "privacy": "The only door", "changelog": "All notable changes"}
    assert [name for name, words in heads.items() if words not in pages[f"{name}.html"]] == []
