"""Names resolve lazily, all of them, and a wrong one names the nearest."""

from __future__ import annotations

import inspect
from importlib.metadata import EntryPoint

import pytest

from medistill import registry
from medistill.errors import ConfigError
from medistill.registry import ATTACKS, DISTILLERS, NETWORKS, SOURCES, Registry, nearest

EVERY = (DISTILLERS, ATTACKS, NETWORKS, SOURCES)


@pytest.mark.parametrize(
    ("entry", "name"),
    [(entry, name) for entry in EVERY for name in entry.names()],
    ids=lambda value: str(value)[:25],
)
def test_every_name_loads_a_documented_class(entry: Registry, name: str) -> None:
    loaded = entry.load(name)
    assert inspect.isclass(loaded)
    assert loaded.__doc__


def test_names_are_sorted_and_distinct() -> None:
    for entry in EVERY:
        assert entry.names() == sorted(set(entry.names()))


@pytest.mark.parametrize(
    ("entry", "wrong", "right"),
    [
        (DISTILLERS, "kernel-ridge", "kernel_ridge"),
        (ATTACKS, "copyalarm", "copy_alarm"),
        (NETWORKS, "ConvNet", "convnet"),
        (SOURCES, "fodler", "folder"),
    ],
)
def test_a_wrong_name_names_the_nearest_and_the_known(entry: Registry, wrong: str, right: str) -> None:
    with pytest.raises(ConfigError) as caught:
        entry.load(wrong)
    message = str(caught.value)
    assert f"Unknown {entry.kind} {wrong!r}. Did you mean {right!r}?" in message
    assert all(name in message for name in entry.names())


def test_what_resembles_nothing_gets_no_suggestion() -> None:
    assert nearest("zzzz", ["kernel_ridge"]) == ""
    assert nearest("kernel_rigde", ["coreset", "kernel_ridge"]) == " Did you mean 'kernel_ridge'?"


def test_other_packages_add_names_and_never_replace_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def points(*, group: str) -> list[EntryPoint]:
        asked.append(group)
        return [
            EntryPoint(name="theirs", value="collections:OrderedDict", group=group),
            EntryPoint(name="coreset", value="collections:Counter", group=group),
        ]

    monkeypatch.setattr(registry, "entry_points", points)
    assert "theirs" in DISTILLERS.names()
    assert DISTILLERS.load("theirs").__name__ == "OrderedDict"
    assert DISTILLERS.load("coreset").__name__ == "Coreset"
    assert set(asked) == {"medistill.distillers"}
