"""Docstrings as Markdown: the references, formulas and literal blocks that they write in reStructuredText."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

_FORMULA = re.compile(
    r"^(?P<indent> *)\.\. math::(?P<text>.*(?:\n(?P=indent) +\S.*|\n *(?=\n(?P=indent) +\S))*)", re.MULTILINE
)
_INLINE = re.compile(r":math:`([^`]+)`")
_REFERENCE = re.compile(r":(?:attr|class|data|func|meth|mod):`([^`]+)`")
_CODE = re.compile(r"``([^`]+)``")
_SESSION = re.compile(r"^>>> .*(?:\n\S.*)*", re.MULTILINE)
_EXAMPLE = re.compile(r"^( *)Example:(?=\n +>>>)", re.MULTILINE)
_LITERAL = re.compile(r"::(?=\n\n +)")


class Docstrings(griffe.Extension):
    """Rewrites the docstrings of a package after all of it was read, so that references find their targets."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite every docstring; what a subpackage hands on is described once, where it is made."""
        for one in _below(pkg):
            if one.docstring is not None:
                one.docstring.value = markdown(one.docstring.value, one)
                if isinstance(one, griffe.Module) and one is not pkg and one.exports:
                    one.docstring.value += _exported(one)
                    one.exports = None


def _exported(module: griffe.Module) -> str:
    """The public names of a package, as links to where they are described."""
    made_here = all(
        name in module.members and not module.members[name].is_alias for name in map(str, module.exports)
    )
    links = ", ".join(_link(str(name), module) for name in module.exports)
    return "" if made_here else f"\n\n`from {module.path} import` {links}"


def _below(parent: griffe.Object) -> Iterator[griffe.Object]:
    yield parent
    for member in parent.members.values():
        if not member.is_alias:
            yield from _below(member)


def markdown(text: str, owner: griffe.Object) -> str:
    """A docstring as Markdown.

    Args:
        text: The docstring.
        owner: Whose it is; names in references are looked up from there.
    """
    text = _FORMULA.sub(lambda found: f"{found['indent']}\\[{' '.join(found['text'].split())}\\]", text)
    text = _INLINE.sub(lambda found: f"\\({' '.join(found[1].split())}\\)", text)
    text = _EXAMPLE.sub(r"\1Examples:", text)
    text = _REFERENCE.sub(lambda found: _link(" ".join(found[1].split()), owner), text)
    text = _LITERAL.sub(":", _CODE.sub(r"`\1`", text))
    return _SESSION.sub(lambda found: f"```pycon\n{found[0]}\n```", text)


def _link(name: str, owner: griffe.Object) -> str:
    """A link to what is named, where a page shows it; its name in any case."""
    shown = name.rpartition(".")[2] if name.startswith("~") else name
    found = _found(name.removeprefix("~"), owner)
    if found is None or not found.has_docstring or "._" in found.path:
        return f"`{shown}`"
    return f"[`{shown}`][{found.path}]"


def _found(name: str, owner: griffe.Object) -> griffe.Object | None:
    """What a name means where it stands; otherwise as a full name."""
    for path in (_resolved(name, owner), f"{owner.path}.{name}", name):
        try:
            found = owner.modules_collection[path]
            return found.final_target if found.is_alias else found
        except (KeyError, griffe.AliasResolutionError):
            continue
    return None


def _resolved(name: str, owner: griffe.Object) -> str:
    try:
        return owner.resolve(name)
    except griffe.NameResolutionError:
        return name
