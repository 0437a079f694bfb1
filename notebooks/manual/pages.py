"""Pages of the reference: files of the repository among them, and formulas that need no script."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

_FILE = re.compile(r"^<<< (\S+)$", re.MULTILINE)
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
# What the converter does not know, in words that it knows.
_SPELLED = {r"\lVert": "‖", r"\rVert": "‖", r"\arg": r"\operatorname{arg}"}


def on_page_markdown(markdown: str, *, config: Any, **kwargs: Any) -> str:
    """Put in the files that a page names; pictures that they take from notebooks/manual/ lie beside the page."""
    root = Path(config.config_file_path).parent.parent
    return _FILE.sub(lambda found: (root / found[1]).read_text(encoding="utf-8"), markdown).replace(
        "](notebooks/manual/", "]("
    )


def on_page_content(content: str, **kwargs: Any) -> str:
    """Write the formulas of a page as MathML, which browsers draw by themselves."""
    return _FORMULA.sub(lambda found: _mathml(html.unescape(found[3]), block=found[2] == "["), content)


def _mathml(formula: str, *, block: bool) -> str:
    for name, spelled in _SPELLED.items():
        formula = formula.replace(name, spelled)
    return convert(formula.strip(), display="block" if block else "inline")
