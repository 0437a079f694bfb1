"""The ledger: only added to, every change noticed, nothing spent beyond the lifetime budget."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from medistill.core.guarantee import Budget, PrivacyPlan, Query, QueryKind
from medistill.errors import OutputError, PrivacyError
from medistill.privacy.accounting import analytic_epsilon
from medistill.privacy.calibration import calibrate
from medistill.privacy.ledger import LIFETIME, Ledger, Reservation

DELTA = 1e-5
PLAN = PrivacyPlan(queries=(Query(kind=QueryKind.SUM, purpose="moments", count=3),), assumptions=("public.",))


def reservation(epsilon: float = 1.0, number: int = 0, plan: PrivacyPlan = PLAN) -> Reservation:
    budget = Budget(epsilon=epsilon, delta=DELTA)
    found = calibrate(budget, plan)
    return Reservation(
        identity=f"{number:032x}",
        plan=plan,
        noise_multipliers=found.noise_multipliers,
        budget=budget,
        recipe="ab12",
        epsilon=found.bound.epsilon,
        accountants=found.bound.accountants,
    )


def filled(folder: Path) -> Path:
    path = folder / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.reserve(reservation())
    ledger.seal(reservation().identity, 0, "a" * 64)
    ledger.seal(reservation().identity, 1, "b" * 64)
    return path


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    (found,) = Ledger(filled(tmp_path)).reservations()
    assert dict(found.sealed) == {0: "a" * 64, 1: "b" * 64}
    assert (found.plan, found.budget, found.recipe) == (PLAN, Budget(epsilon=1.0, delta=DELTA), "ab12")
    assert found.noise_multipliers == reservation().noise_multipliers
    assert (tmp_path / "ledger.jsonl").stat().st_mode & 0o077 == 0


def test_all_releases_of_a_cohort_are_composed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.spent() is None
    for number, epsilon in enumerate((1.0, 2.0, 1.0)):
        ledger.reserve(reservation(epsilon, number))
    spent = ledger.spent()
    precision = sum(3 / reservation(epsilon).noise_multipliers[0] ** 2 for epsilon in (1.0, 2.0, 1.0))
    assert spent is not None
    assert spent.epsilon == pytest.approx(analytic_epsilon(precision**-0.5, LIFETIME.delta))
    assert 2.0 < spent.epsilon < 4.0


def test_the_lifetime_budget_is_kept(tmp_path: Path) -> None:
    lifetime = Budget(epsilon=2.0, delta=DELTA)
    ledger = Ledger(tmp_path / "ledger.jsonl", lifetime=lifetime)
    ledger.reserve(reservation(1.5, 1))
    before = (tmp_path / "ledger.jsonl").read_bytes()
    with pytest.raises(PrivacyError, match="lifetime budget"):
        ledger.reserve(reservation(1.5, 2))
    assert (tmp_path / "ledger.jsonl").read_bytes() == before
    ledger.reserve(reservation(1.0, 3))
    with pytest.raises(PrivacyError, match="cannot be changed later"):
        Ledger(tmp_path / "ledger.jsonl", lifetime=Budget(epsilon=20.0, delta=DELTA))


def test_the_whole_lifetime_budget_may_be_spent_at_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", lifetime=Budget(epsilon=2.0, delta=DELTA))
    ledger.reserve(reservation(2.0))
    with pytest.raises(PrivacyError, match="lifetime budget"):
        ledger.reserve(reservation(0.05, 1))


def test_every_edited_line_is_noticed(tmp_path: Path) -> None:
    path = filled(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    for number, line in enumerate(lines):
        entry = json.loads(line)
        for key in entry:
            changed = json.dumps({**entry, key: "x"}, sort_keys=True).encode() + b"\n"
            path.write_bytes(b"".join([*lines[:number], changed, *lines[number + 1 :]]))
            with pytest.raises(PrivacyError, match="changed"):
                Ledger(path)
        spaced = b"".join([*lines[:number], line.replace(b": ", b":  "), *lines[number + 1 :]])
        path.write_bytes(spaced)
        with pytest.raises(PrivacyError, match="changed"):
            Ledger(path)


def test_every_removed_swapped_or_added_line_is_noticed(tmp_path: Path) -> None:
    path = filled(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    wrong = [lines[:number] + lines[number + 1 :] for number in range(len(lines))]
    wrong += [[*lines[:1], *lines[2:4], lines[1]], [lines[1], lines[0], *lines[2:]], [*lines, lines[-1]], []]
    wrong += [lines[:number] for number in range(len(lines))]
    for content in wrong:
        path.write_bytes(b"".join(content))
        with pytest.raises(PrivacyError, match="changed"):
            Ledger(path)
    path.write_bytes(b"".join(lines))
    assert Ledger(path).reservations()


def test_a_change_under_an_open_ledger_is_noticed(tmp_path: Path) -> None:
    path = filled(tmp_path)
    ledger = Ledger(path)
    path.write_bytes(path.read_bytes().replace(b'"epsilon": 1.0', b'"epsilon": 0.1', 1))
    with pytest.raises(PrivacyError, match="changed"):
        ledger.reserve(reservation(1.0, 1))


def test_a_missing_head_or_file_is_noticed(tmp_path: Path) -> None:
    path = filled(tmp_path)
    head = path.with_suffix(".head")
    kept = head.read_bytes()
    head.unlink()
    with pytest.raises(PrivacyError, match="changed"):
        Ledger(path)
    head.write_bytes(b"nonsense")
    with pytest.raises(PrivacyError, match="changed"):
        Ledger(path)
    head.write_bytes(kept)
    path.unlink()
    with pytest.raises(PrivacyError, match="changed"):
        Ledger(path)


@pytest.mark.parametrize("torn", [b'{"entry": "sea', b"{", b"\x00\x00"])
def test_a_torn_last_line_never_happened(tmp_path: Path, torn: bytes) -> None:
    path = filled(tmp_path)
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(torn)
    ledger = Ledger(path)
    assert path.read_bytes() == whole
    ledger.seal(reservation().identity, 2, "c" * 64)
    assert dict(Ledger(path).reservations()[0].sealed)[2] == "c" * 64


def test_a_process_that_ended_between_line_and_head_leaves_a_whole_ledger(tmp_path: Path) -> None:
    path = filled(tmp_path)
    head = path.with_suffix(".head")
    before = head.read_bytes()
    Ledger(path).seal(reservation().identity, 2, "c" * 64)
    head.write_bytes(before)
    assert 2 in Ledger(path).reservations()[0].sealed
    assert head.read_bytes() != before


def test_half_a_known_line_is_a_change_and_not_a_torn_one(tmp_path: Path) -> None:
    path = filled(tmp_path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(PrivacyError, match="changed"):
        Ledger(path)


def test_an_answer_is_sealed_once_and_in_order(tmp_path: Path) -> None:
    ledger = Ledger(filled(tmp_path))
    for identity, position in ((reservation().identity, 1), (reservation().identity, 3), ("f" * 32, 0)):
        with pytest.raises(PrivacyError, match="not open"):
            ledger.seal(identity, position, "d" * 64)
    with pytest.raises(PrivacyError, match="SHA-256"):
        ledger.seal(reservation().identity, 2, "a patient")


def test_a_recipe_is_a_fingerprint_and_nothing_else() -> None:
    with pytest.raises(PrivacyError, match="hexadecimal"):
        Reservation(**{**vars(reservation()), "recipe": "/data/hospital"})


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="ledger"):
        Ledger(tmp_path / "file" / "ledger.jsonl").reserve(reservation())


def _reserve_many(path: Path, first: int) -> None:
    code = 0
    for number in range(first, first + 6):
        try:
            Ledger(path, lifetime=Budget(epsilon=3.0, delta=DELTA)).reserve(reservation(1.0, number))
        except PrivacyError as error:
            code = 0 if "lifetime" in str(error) else 1
    os._exit(code)


def test_several_processes_at_once_spend_the_lifetime_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_reserve_many, args=(path, 100 * number)) for number in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    ledger = Ledger(path)
    spent = ledger.spent()
    alone = len(ledger.reservations())
    precision = alone * 3 / reservation().noise_multipliers[0] ** 2
    assert spent is not None
    assert spent.epsilon == pytest.approx(analytic_epsilon(precision**-0.5, DELTA))
    more = (alone + 1) / alone * precision
    assert spent.epsilon <= 3.0 < analytic_epsilon(more**-0.5, DELTA)
