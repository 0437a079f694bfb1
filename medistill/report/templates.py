"""Pages from the templates and style sheets beside this file."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup


@cache
def template(name: str) -> Template:
    """A template that escapes every value and refuses undefined ones."""
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_text(name))


@cache
def style(*names: str) -> Markup:
    """Style sheets, one after the other, for a page that loads nothing."""
    return markup("\n".join(map(_text, names)))


def markup(text: str) -> Markup:
    """Text of our own making that a template must not escape."""
    from markupsafe import Markup  # noqa: PLC0415

    return Markup(text)  # noqa: S704 - our own files, and charts that escape every name


def _text(name: str) -> str:
    return files("medistill.report").joinpath(name).read_text("utf-8")
