"""What may be kept of a DICOM file: one closed table of attributes per kind of image, each with a value check.

The shipped profile is ``default.yaml`` beside this module. A profile of your own starts from it or from nothing::

    extends: default
    iods: [CT, MR]                      # fewer kinds of image
    options: {keep_times: false}
    drop: [Manufacturer]                # everywhere, at any depth
    add: {CT: {PatientWeight: number 0.3 400}}

No rule can keep free text, whatever a profile says: texts come from closed lists (:mod:`.vocabulary`, or ``terms``
of the profile itself) or are replaced.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydicom import uid as uids
from pydicom.datadict import dictionary_VM, dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.tag import BaseTag

from medistill.errors import ConfigError

#: Instead of a value: the item of the sequence is left out.
ITEM = "item"
_NUMERIC = ("DS", "IS", "US", "SS", "UL", "SL", "FL", "FD", "US or SS", "UV", "SV")
_TERMS = ("CS", "SH", "LO")
#: Which value representations a kind of rule may be given to.
KINDS: Mapping[str, tuple[str, ...]] = {
    "pseudonym": ("PN", "LO"),
    "empty": (),
    "uid": ("UI",),
    "class": ("UI",),
    "date": ("DA",),
    "time": ("TM",),
    "datetime": ("DT",),
    "age": ("AS",),
    "tag": ("AT",),
    "code": ("SQ",),
    "words": ("LO", "SH"),
    "orientation": ("CS",),
    "number": _NUMERIC,
    "integer": _NUMERIC,
    "terms": _TERMS,
    "fixed": ("CS", "SH", "LO"),
    "curve": ("US or OW", "OW"),
    "palette": ("OW",),
    "descriptor": ("US or SS", "US"),
    "body_part": ("CS",),
    "image_type": ("CS",),
    "manufacturer": ("LO",),
    "model": ("LO",),
    "kernel": ("SH",),
    "window_names": ("LO",),
    "padding": ("US or SS",),
    "pixel": (),
    "items": ("SQ",),
}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What happens to one attribute.

    Args:
        kind: One of :data:`KINDS`.
        vr: Value representation of the attribute (PS3.6).
        low: Smallest allowed number.
        high: Largest allowed number.
        digits: Significant digits kept of a number.
        most: Largest number of values (PS3.6); 0 for any.
        terms: Allowed values in lower case.
        instead: What replaces a value that fails its check: ``None`` drops the attribute, ``""`` empties it,
            :data:`ITEM` leaves the item of the sequence out.
        items: Rules of a sequence's items by tag.
    """

    kind: str
    vr: str
    low: float = -math.inf
    high: float = math.inf
    digits: int = 7
    most: int = 0
    terms: frozenset[str] = frozenset()
    instead: str | None = None
    items: Mapping[BaseTag, Rule] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Iod:
    """One kind of image.

    Args:
        name: Short name, for example ``"CT"``.
        rules: Rules by tag.
        screen: Whether such images commonly carry burned-in text; they are refused unless searched for it.
    """

    name: str
    rules: Mapping[BaseTag, Rule] = field(repr=False)
    screen: bool = False


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which options of PS3.15 Annex E are used.

    Args:
        age_limit: Ages above become ``090Y``.
        keep_sex: Keep PatientSex (Retain Patient Characteristics).
        keep_age: Keep PatientAge in years.
        keep_dates: Shift dates instead of emptying them (Retain Longitudinal Temporal Information, modified).
        keep_times: Keep times relative to the start of the study.
        keep_words: Keep known words of descriptions (Clean Descriptors).
    """

    age_limit: int = 89
    keep_sex: bool = True
    keep_age: bool = True
    keep_dates: bool = True
    keep_times: bool = True
    keep_words: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.age_limit <= 89:
            raise ConfigError(f"Expected age_limit from 0 to 89, found {self.age_limit}.")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """An allowlist.

    Args:
        name: Name of the profile.
        options: Options of PS3.15 Annex E.
        iods: Kinds of image by SOP class UID; any other class is turned away.
        fingerprint: Hash of the resolved profile.
    """

    name: str
    options: Options
    iods: Mapping[str, Iod] = field(repr=False)
    fingerprint: str = ""

    def retained(self) -> dict[str, tuple[str, ...]]:
        """Keywords that can survive with a value of the source, per kind of image: the utility tags."""
        replaced = {"pseudonym", "empty", "fixed"}
        table: dict[str, set[str]] = {}
        for iod in self.iods.values():
            table.setdefault(iod.name, set()).update(
                keyword_for_tag(tag) for tag, rule in _walk(iod.rules) if rule.kind not in replaced
            )
        return {name: tuple(sorted(keywords)) for name, keywords in table.items()}


def load_profile(path: Path | None = None) -> Profile:
    """Read a profile.

    Args:
        path: YAML file; ``None`` takes the shipped profile.

    Raises:
        ConfigError: With every problem of the file at once.
    """
    if path is None:
        return default_profile()
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        raise ConfigError("The profile cannot be read. Expected a YAML file.") from None
    except yaml.YAMLError:
        raise ConfigError("The profile is no valid YAML.") from None
    if not isinstance(content, dict):
        raise ConfigError("Expected the profile to be a mapping.")
    return _resolve(content)


@cache
def default_profile() -> Profile:
    """The shipped profile."""
    return _Parser(_default_content()).profile()


def _default_content() -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = files(__package__).joinpath("default.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.load(text, Loader=loader)  # noqa: S506 - a safe loader, in C where there is one
    return content


def _resolve(content: dict[str, Any]) -> Profile:
    """Profile of a mapping that is complete, or extends the shipped one."""
    if content.get("extends") is None:
        return _Parser(content).profile()
    if content["extends"] != "default":
        raise ConfigError('Expected extends: "default".')
    base = _default_content()
    unknown = set(content) - {"extends", "name", "version", "iods", "options", "drop", "add"}
    problems = [f"{key}: unknown key" for key in sorted(map(str, unknown))]
    wanted = content.get("iods", list(base["iods"]))
    if not isinstance(wanted, list) or set(wanted) - set(base["iods"]):
        problems.append(f"iods: expected some of {', '.join(base['iods'])}")
    options, drop, added = content.get("options", {}), content.get("drop", []), content.get("add", {})
    if not isinstance(options, dict) or not isinstance(drop, list) or not isinstance(added, dict):
        problems.append("expected options and add to be mappings and drop to be a list")
    elif set(added) - set(base["iods"]):
        problems.append(f"add: expected some of {', '.join(base['iods'])}")
    elif missing := [str(name) for name in drop if tag_for_keyword(str(name)) is None]:
        problems.append(f"drop: unknown attributes {', '.join(missing)}")
    if problems:
        raise ConfigError("The profile is not valid:\n" + "\n".join(f"- {problem}" for problem in problems))
    base["name"] = content.get("name", "extended")
    base["options"] = base["options"] | options
    for name, rules in added.items():
        base["modules"][f"added to {name}"] = rules
        base["iods"][name]["use"] = [*base["iods"][name]["use"], f"added to {name}"]
    base["iods"] = {name: base["iods"][name] for name in wanted}
    return _Parser(base, frozenset(map(str, drop))).profile()


class _Parser:
    """Turns a mapping into a profile and collects all problems."""

    def __init__(self, content: dict[str, Any], drop: frozenset[str] = frozenset()) -> None:
        self._content, self._drop = content, drop
        self._problems: list[str] = []

    def profile(self) -> Profile:
        content = self._content
        for key in sorted(set(content) - {"name", "version", "options", "modules", "iods"}, key=str):
            self._problems.append(f"{key}: unknown key")
        options = self._options(content.get("options") or {})
        iods: dict[str, Iod] = {}
        for name, entry in self._mapping("iods", content.get("iods")).items():
            iods.update(self._iod(name, self._mapping(f"iods.{name}", entry)))
        if not iods and not self._problems:
            self._problems.append("iods: expected at least one kind of image")
        if self._problems:
            listing = "\n".join(f"- {problem}" for problem in self._problems)
            raise ConfigError(f"The profile is not valid:\n{listing}")
        canonical = yaml.safe_dump([content, sorted(self._drop)], sort_keys=True).encode()
        return Profile(
            name=str(content.get("name", "own")),
            options=options,
            iods=MappingProxyType(iods),
            fingerprint=hashlib.sha256(canonical).hexdigest()[:16],
        )

    def _mapping(self, place: str, value: Any) -> dict[str, Any]:
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return value
        self._problems.append(f"{place}: expected a mapping")
        return {}

    def _options(self, given: Any) -> Options:
        values = self._mapping("options", given)
        known = {item.name: type(item.default) for item in fields(Options)}
        for name, value in values.items():
            if name not in known:
                self._problems.append(f"options.{name}: unknown key")
            elif type(value) is not known[name]:
                self._problems.append(f"options.{name}: expected {known[name].__name__}")
        return Options() if self._problems else Options(**values)

    def _iod(self, name: str, entry: dict[str, Any]) -> dict[str, Iod]:
        for key in sorted(set(entry) - {"classes", "use", "screen"}):
            self._problems.append(f"iods.{name}.{key}: unknown key")
        rules = self._rules(f"iods.{name}", {"use": entry.get("use", [])})
        iod = Iod(name=name, rules=rules, screen=entry.get("screen", False) is True)
        classes = {}
        for keyword in entry.get("classes", []):
            uid = getattr(uids, str(keyword), None)
            if uid is None:
                self._problems.append(f"iods.{name}.classes: unknown SOP class {keyword}")
            else:
                classes[str(uid)] = iod
        return classes

    def _rules(self, place: str, entries: dict[str, Any]) -> Mapping[BaseTag, Rule]:
        rules: dict[BaseTag, Rule] = {}
        for name in entries.get("use", []):
            module = self._content.get("modules", {}).get(name)
            if module is None:
                self._problems.append(f"{place}: unknown module {name}")
            else:
                rules.update(self._rules(f"modules.{name}", self._mapping(f"modules.{name}", module)))
        for keyword, text in entries.items():
            if keyword == "use" or keyword in self._drop:
                continue
            tag = tag_for_keyword(keyword)
            if tag is None:
                self._problems.append(f"{place}.{keyword}: unknown attribute")
            else:
                rule = self._rule(f"{place}.{keyword}", text, dictionary_VR(tag))
                rules[BaseTag(tag)] = replace(rule, most=_most(dictionary_VM(tag)))
        return MappingProxyType(rules)

    def _rule(self, place: str, text: Any, vr: str) -> Rule:
        if isinstance(text, dict) and "terms" in text:
            terms = frozenset(str(term).casefold() for term in text["terms"])
            rule = Rule(kind="terms", vr=vr, terms=terms, instead=text.get("else"))
        elif isinstance(text, dict):
            kind = "code" if text.get("code") is True else "items"
            items = {key: value for key, value in text.items() if key != "code"}
            rule = Rule(kind=kind, vr=vr, items=self._rules(place, items))
        else:
            rule = self._one_line(place, str(text), vr)
        if KINDS.get(rule.kind) and vr not in KINDS[rule.kind]:
            self._problems.append(f"{place}: {rule.kind} cannot be used for a value of type {vr}")
        return rule

    def _one_line(self, place: str, text: str, vr: str) -> Rule:
        text, _, instead_text = text.partition(" else ")
        kind, _, rest = text.partition(" ")
        instead = None if not instead_text else "" if instead_text == "empty" else instead_text
        if kind not in KINDS or kind == "items":
            self._problems.append(f"{place}: unknown rule {kind}")
        if kind in ("number", "integer"):
            limits = re.fullmatch(r"(-?[\d.]+) (-?[\d.]+)(?: (\d\d?))?", rest)
            if limits is None:
                self._problems.append(f"{place}: expected two limits")
                return Rule(kind=kind, vr=vr)
            low, high, digits = float(limits[1]), float(limits[2]), int(limits[3] or 7)
            return Rule(kind=kind, vr=vr, low=low, high=high, digits=digits, instead=instead)
        if kind == "fixed":
            return Rule(kind=kind, vr=vr, instead=rest)
        parts = rest.split("|") if "|" in rest else rest.split()
        return Rule(kind=kind, vr=vr, terms=frozenset(part.strip().casefold() for part in parts), instead=instead)


def _most(multiplicity: str) -> int:
    """Largest number of values of a value multiplicity such as ``1``, ``2-3`` or ``1-n``."""
    last = multiplicity.rpartition(" ")[2].rpartition("-")[2]
    return int(last) if last.isdigit() else 0


def _walk(rules: Mapping[BaseTag, Rule]) -> Iterator[tuple[BaseTag, Rule]]:
    for tag, rule in rules.items():
        yield tag, rule
        yield from _walk(rule.items)
