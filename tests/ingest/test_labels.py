from __future__ import annotations

from pathlib import Path

import pytest

from medistill.core.task import Task, TaskKind
from medistill.errors import LabelError
from medistill.ingest.identity import Pseudonymiser
from medistill.ingest.labels import LabelRule, LabelTable, load_labels, make_task
from medistill.ingest.reading import table_key
from medistill.ingest.table import lines_text
from tests.ingest.conftest import KEY, write_csv

SECRET = Pseudonymiser(KEY)


def load(path: Path, **values: object) -> LabelTable:
    settings = {"kinds": ("sop", "file", "patient"), "label_column": "label", "labels_required": True}
    return load_labels(path, pseudonymiser=SECRET, **{**settings, **values})  # type: ignore[arg-type]


def token(kind: str, value: str, split: str = "") -> str:
    return SECRET.token("key", table_key(kind, value, split))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("heading", ["SOPInstanceUID", "sop_instance_uid", "sopinstanceuid"])
def test_separators_and_spelling(tmp_path: Path, delimiter: str, heading: str) -> None:
    path = write_csv(tmp_path / "t.csv", [[heading, "Label"], ["1.2", "a"], ["1.3", "b"]], delimiter)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    table = load(path)
    entry = table.match([token("sop", "1.3")])
    assert entry is not None
    assert (entry.label, entry.lines) == ("b", (3,))


def test_most_specific_column_wins(tmp_path: Path) -> None:
    rows = [
        ["PatientID", "file", "SOPInstanceUID", "label"],
        ["p", "x.dcm", "1.2", "a"],
        ["p", "y.dcm", "1.3", "b"],
    ]
    table = load(write_csv(tmp_path / "t.csv", rows))
    assert table.match([token("file", "x.dcm")]) is None
    entry = table.match([token("sop", "1.2"), token("patient", "p")])
    assert entry is not None
    assert entry.patient == SECRET.patient("", "P")


def test_index_counts_within_splits(tmp_path: Path) -> None:
    rows = [["split", "index", "label"], ["train", 0, "a"], ["test", 0, "b"]]
    table = load(write_csv(tmp_path / "t.csv", rows), kinds=("index",))
    found = [table.match([token("index", "0", split)]) for split in ("train", "test", "")]
    assert [entry and (entry.label, entry.given_test) for entry in found] == [("a", False), ("b", True), None]


def test_all_problems_at_once_by_line_and_without_values(tmp_path: Path) -> None:
    rows = [["PatientID", "diagnosis", "split"], ["Meier", "x", "training"], ["Huber", "y", "test"]]
    with pytest.raises(LabelError) as caught:
        load(write_csv(tmp_path / "t.csv", rows))
    message = str(caught.value)
    assert "no label column: expected 'label'" in message
    assert "line 2" in message
    assert not any(word in message for word in ("Meier", "Huber", "training", "diagnosis", str(tmp_path)))


def test_conflicts_name_every_line(tmp_path: Path) -> None:
    rows = [["PatientID", "label"], ["Meier", "x"], ["b", "x"], [" meier ", "y"], ["b", "x"]]
    with pytest.raises(LabelError, match=r"2 rows contradict .* lines 2, 4") as caught:
        load(write_csv(tmp_path / "t.csv", rows))
    assert "eier" not in str(caught.value)


def test_table_without_heading_shows_no_value(tmp_path: Path) -> None:
    with pytest.raises(LabelError) as caught:
        load(write_csv(tmp_path / "t.csv", [["Meier", "sick"], ["Huber", "well"]]))
    assert not any(word in str(caught.value) for word in ("Meier", "sick", "Huber"))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "no row"),
        ("file,label\n", "no row"),
        ("file,label\na\nb,c\n", "line 2"),
        ("file,FILE\na,b\n", "same name"),
    ],
)
def test_malformed_tables(tmp_path: Path, content: str, match: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content)
    with pytest.raises(LabelError, match=match):
        load(path)


def test_absent_table() -> None:
    with pytest.raises(LabelError, match="does not exist"):
        load(Path("nowhere.csv"))


def test_unmatched_rows_are_named(tmp_path: Path) -> None:
    rows = [["file", "label"], *([f"{number}.png", "a"] for number in range(12))]
    table = load(write_csv(tmp_path / "t.csv", rows))
    table.match([token("file", "0.png")])
    assert table.close() == (
        "11 of 12 label rows belong to no image that was kept (quarantined or missing): "
        "lines 3, 4, 5, 6, 7, 8, 9, 10, …(+3)"
    )


def test_nothing_matched_is_an_error(tmp_path: Path) -> None:
    table = load(write_csv(tmp_path / "t.csv", [["file", "label"], ["a", "x"]]))
    table.match([token("file", "b")])
    with pytest.raises(LabelError, match="None of 1 label rows"):
        table.close()


def test_one_row_for_two_files_is_an_error(tmp_path: Path) -> None:
    table = load(write_csv(tmp_path / "t.csv", [["file", "label"], ["a.png", "x"]]))
    for folder in ("one", "two"):
        table.match([token("file", f"{folder}/a.png"), token("file", "a.png")])
    with pytest.raises(LabelError, match="several images each: line 2"):
        table.close()


def test_lines_text() -> None:
    assert lines_text([3]) == "line 3"
    assert lines_text([9, 3, 9]) == "lines 3, 9"


def test_class_order() -> None:
    assert make_task(["b", "a"] * 3, None).class_names == ("a", "b")
    task = make_task(["b", "a"] * 3, ("b", "a"))
    assert (task.kind, task.class_names) == (TaskKind.BINARY, ("b", "a"))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [(["a"] * 4, None), (["a", "b", "c"], ("a", "b")), (["a", "a"], ("a", "b")), (list("abcdef"), None)],
)
def test_unusable_classes(labels: list[str], classes: tuple[str, ...] | None) -> None:
    with pytest.raises(LabelError):
        make_task(labels, classes)


def test_cells_with_several_classes(tmp_path: Path) -> None:
    rows = [
        ["file", "label"],
        ["a", "mass;effusion"],
        ["b", "None"],
        ["c", ""],
        ["d", "effusion | mass"],
        ["e", "x"],
    ]
    path = write_csv(tmp_path / "t.csv", [*rows, ["a", "effusion|mass"]])
    table = load(path, rule=LabelRule(multilabel=True, no_class="none"))
    found = [table.match([token("file", name)]) for name in "abcde"]
    assert [entry.label for entry in found if entry] == ["effusion;mass", ";", "", "effusion;mass", "x"]
    assert not table.names([token("file", "c")])
    empty = load(path, rule=LabelRule(multilabel=True, no_class=""))
    entry = empty.match([token("file", "c")])
    assert entry is not None
    assert entry.label == ";"
    with pytest.raises(LabelError, match="contradict"):
        load(path)  # one class each: the two cells of one file differ


def test_a_task_of_several_classes_per_image() -> None:
    labels = ["a;b", ";", "b", "a", "b;c", "c"] * 2
    assert make_task(labels, None, multilabel=True) == Task.multilabel(("a", "b", "c"))
    assert make_task(labels, ("c", "b", "a"), multilabel=True).class_names == ("c", "b", "a")
    with pytest.raises(LabelError, match="4 images have a label that is not among"):
        make_task(labels, ("a", "b"), multilabel=True)
    with pytest.raises(LabelError, match="at least 2"):
        make_task(["a", ";"], None, multilabel=True)
