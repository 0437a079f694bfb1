"""What is to be diagnosed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from medistill.errors import DataError

#: Joins the classes of one image in a multilabel task; alone it stands for none of the classes.
JOINT = ";"
_JOINTS = (JOINT, "|")


class TaskKind(StrEnum):
    """How classes relate: one of two, one of several, or any subset."""

    BINARY = "binary"
    MULTICLASS = "multiclass"
    MULTILABEL = "multilabel"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A diagnostic task.

    Args:
        kind: Binary, multiclass or multilabel.
        class_names: Names of the classes; for a binary task ``(negative, positive)``.

    Raises:
        DataError: If names repeat or their number does not fit the kind.
    """

    kind: TaskKind
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        count = len(self.class_names)
        if len(set(self.class_names)) != count:
            raise DataError("Expected distinct class names.")
        if self.kind is TaskKind.BINARY and count != 2:
            raise DataError(f"Expected 2 classes (negative, positive) for a binary task, got {count}.")
        if self.kind is TaskKind.MULTICLASS and count < 3:
            raise DataError(f"Expected at least 3 classes for a multiclass task, got {count}.")
        if self.kind is TaskKind.MULTILABEL:
            self._check_multilabel()

    def _check_multilabel(self) -> None:
        if self.n_classes < 2:
            raise DataError(f"Expected at least 2 classes for a multilabel task, got {self.n_classes}.")
        if any(not name or name != name.strip() or any(j in name for j in _JOINTS) for name in self.class_names):
            raise DataError(f"Expected class names of a multilabel task without {' and '.join(_JOINTS)}.")

    @classmethod
    def single_label(cls, class_names: tuple[str, ...]) -> Task:
        """Binary for two classes, multiclass for more."""
        kind = TaskKind.BINARY if len(class_names) == 2 else TaskKind.MULTICLASS
        return cls(kind=kind, class_names=class_names)

    @classmethod
    def multilabel(cls, class_names: tuple[str, ...]) -> Task:
        """Any subset of the classes may hold for an image."""
        return cls(kind=TaskKind.MULTILABEL, class_names=class_names)

    def names_in(self, label: str) -> tuple[str, ...]:
        """Names in the label of an image: one, or for a multilabel task those that are joined in it."""
        return joined_names(label) if self.kind is TaskKind.MULTILABEL else (label,)

    @property
    def n_classes(self) -> int:
        """Number of classes; the width ``k`` of targets and network outputs."""
        return len(self.class_names)

    def to_json(self) -> dict[str, object]:
        """Plain values for a JSON file."""
        return {"kind": self.kind.value, "class_names": list(self.class_names)}

    @classmethod
    def from_json(cls, values: dict[str, object]) -> Task:
        """Inverse of :meth:`to_json`."""
        names = values["class_names"]
        assert isinstance(names, list)
        return cls(kind=TaskKind(str(values["kind"])), class_names=tuple(str(name) for name in names))


def joined_names(label: str) -> tuple[str, ...]:
    """The different names joined in a label by ``;`` or ``|``, in alphabetical order; none in ``";"``."""
    for joint in _JOINTS:
        label = label.replace(joint, JOINT)
    return tuple(sorted({name.strip() for name in label.split(JOINT)} - {""}))


def joint_label(names: Iterable[str]) -> str:
    """Inverse of :func:`joined_names`.

    Example:
        >>> joint_label(["effusion", "mass"]), joint_label([])
        ('effusion;mass', ';')
    """
    return JOINT.join(sorted(names)) or JOINT
