"""Profiles of an audit: every attack in them is registered, asks its question, and is made beside its controls."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from medistill.audit import AuditPolicy, audit
from medistill.audit.attack import MembershipAttack
from medistill.audit.label_leakage import LabelLeakage
from medistill.audit.policy import PROFILES, THREATS, UNCERTAIN
from medistill.audit.shadow import Shadow
from medistill.audit.shadow_distillation import ShadowDistillation
from medistill.audit.students import RandomNetworks
from medistill.audit.tracing import Tracing
from medistill.core.guarantee import Budget
from medistill.core.reports import AuditReport, Verdict
from medistill.distill import distill
from medistill.distill.surrogate import Surrogate
from medistill.errors import ConfigError, GateError
from medistill.privacy import OpenCurator, PrivateCurator
from medistill.privacy.ledger import Ledger
from medistill.registry import ATTACKS, Registry
from medistill.release.gate import check_gate
from medistill.report.wording import warnings_of
from tests.conftest import REPOSITORY, blobs

TRAIN, HOLDOUT, REFERENCE = blobs(160, seed=1), blobs(80, seed=2, first=1000), blobs(80, seed=3, first=2000)
PARTS = {"train": TRAIN, "holdout": HOLDOUT, "reference": REFERENCE}
#: Sex of every patient by a coin.
ATTRIBUTES = {
    name: {"sex": ["FM"[zlib.crc32(patient.encode()) % 2] for patient in images.patients]}
    for name, images in PARTS.items()
}
SEARCHES = ("copy_alarm", "edited_copies", "reconstruction")
NETWORKS = RandomNetworks(networks=1, width=8, side=16)
SMALL: dict[str, MembershipAttack] = {
    "tracing": Tracing(networks=NETWORKS, public=32),
    "label_leakage": LabelLeakage(networks=NETWORKS, references=2),
    "shadow": Shadow(shadows=8, observers=1, side=16, distillation=ShadowDistillation(networks=4, iterations=30)),
}
SURROGATE = {"iterations": 4, "made_up": 6, "drawing": 2, "dimension": 24, "width": 8}
QUICK = {
    "distribution_matching": {"networks": 2, "iterations": 25, "width": 8},
    "kernel_ridge": {"iterations": 12, "pool": 2, "width": 8, "real_batch": 40, "advance": 2},
}


@pytest.fixture(autouse=True)
def _small_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Registry.load

    def small(self: Registry, name: str) -> object:
        return (lambda **_: SMALL[name]) if name in SMALL else load(self, name)

    monkeypatch.setattr(Registry, "load", small)


def examined(profile: str = "default", **changes: object) -> AuditReport:
    release = distill(OpenCurator(TRAIN), ipc=2, seed=6, settings=QUICK).distilled
    policy = AuditPolicy(profile=profile, fewest_patients=100, **changes)  # type: ignore[arg-type]
    return audit(release, **PARTS, attributes=ATTRIBUTES, policy=policy)


@pytest.mark.parametrize("name", sorted({name for names in PROFILES.values() for name in names}))
def test_an_attack_says_what_it_asks_and_what_it_must_catch(name: str) -> None:
    attack: MembershipAttack = ATTACKS.load(name)(**PROFILES["full"][name])
    assert attack.threat in THREATS
    assert attack.question.endswith("?")
    assert attack.guilty_of
    assert 0.5 < attack.wanted < 1


def test_the_default_profile_makes_every_attack_beside_its_controls() -> None:
    report = examined()
    assert [outcome.attack for outcome in report.outcomes] == [*PROFILES["default"], *SEARCHES]
    for outcome in report.outcomes:
        assert {control.name.split(":")[0] for control in outcome.controls} == {"positive", "negative"}
    assert {text for text in THREATS.values() if text in report.not_tested} == {
        THREATS["T3"], THREATS["T8"],
    }  # fmt: skip


def test_an_attack_the_data_give_no_power_to_is_named_as_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "reidentification" in UNCERTAIN
    few = {"by": "pixels", "fewest": 500}
    monkeypatch.setitem(PROFILES, "quick", {"calibrated_neighbour": {}, "reidentification": few})
    report = examined("quick")
    assert [outcome.attack for outcome in report.outcomes] == [
        "calibrated_neighbour",
        "copy_alarm",
        "edited_copies",
    ]
    (why,) = (text for text in report.not_tested if text.startswith("reidentification"))
    assert "500" in why
    assert THREATS["T3"] in report.not_tested


def test_a_claimed_epsilon_is_attacked_and_held_against_the_policy(tmp_path: Path) -> None:
    budget, distiller = Budget(epsilon=40.0, delta=1e-5), Surrogate(**SURROGATE)  # type: ignore[arg-type]
    curator = PrivateCurator(
        TRAIN,
        budget=budget,
        plan=distiller.plan(TRAIN.task, (1, 16, 16), 2),
        ledger=Ledger(tmp_path / "ledger.jsonl", lifetime=budget),
    )
    release = distill(curator, method="surrogate", ipc=2, seed=1, settings={"surrogate": SURROGATE}).distilled
    report = audit(release, **PARTS, policy=AuditPolicy(profile="quick", fewest_patients=100, epsilon_max=3.0))
    names = [outcome.attack for outcome in report.outcomes]
    assert names == ["calibrated_neighbour", "copy_alarm", "edited_copies", "mechanism", "one_run"]
    assert report.verdict in (Verdict.FAIL, Verdict.INVALID)
    assert report.refusals == (f"Epsilon {release.privacy.epsilon:.3g} is above the policy's 3.",)
    assert THREATS["T7"] not in report.not_tested


@pytest.mark.parametrize(("patients", "limit"), [(500, "1e-05"), (1_000_000, "1e-07")])
def test_the_delta_of_a_policy_shrinks_with_the_patients(patients: int, limit: str) -> None:
    release = distill(OpenCurator(TRAIN), method="coreset", ipc=1).distilled
    claim = replace(release.privacy, epsilon=1.0, delta=1e-4, reason="", accountants=("PLD",), event="one sum")
    (found,) = AuditPolicy(epsilon_max=3.0).refusals(claim, patients)
    assert found == f"Delta 0.0001 is above the policy's {limit}."


def test_the_gate_and_the_report_say_what_the_policy_refused() -> None:
    report = examined("quick", epsilon_max=3.0)
    assert report.verdict is Verdict.FAIL
    with pytest.raises(GateError, match="none is proved"):
        check_gate(report, accept=frozenset({Verdict.PASS}))
    release = distill(OpenCurator(TRAIN), method="coreset", ipc=1).distilled
    assert any("none is proved" in warning.text for warning in warnings_of(release, report, None))


def test_the_shipped_policy_is_read() -> None:
    from medistill.cli.distill import _policy

    found = _policy(REPOSITORY / "configs" / "policy.yaml", None)
    assert found == AuditPolicy(epsilon_max=3.0)
    assert _policy(None, "full") == AuditPolicy(profile="full")


@pytest.mark.parametrize(
    "wrong", [{"profile": "thorough"}, {"epsilon_max": 0.0}, {"delta_max": 1.0}, {"class_patients": 1}]
)
def test_a_policy_without_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        AuditPolicy(**wrong)  # type: ignore[arg-type]
