import re
from dataclasses import replace

import pytest
from example_release import TWO, audit_report, distilled_set

from medistill.core.reports import Verdict
from medistill.errors import GateError
from medistill.release.gate import check_gate
from medistill.report.wording import listed, warnings_of

STRICT = frozenset({Verdict.PASS})


def report(verdict):
    return audit_report(distilled_set(TWO, ipc=1), verdict)


def test_pass():
    check_gate(report(Verdict.PASS), accept=STRICT)


def test_accepted_verdict():
    check_gate(report(Verdict.NOT_ESTIMABLE), accept=STRICT | {Verdict.NOT_ESTIMABLE})


@pytest.mark.parametrize(
    ("verdict", "remedy"),
    [
        (Verdict.FAIL, "differential privacy"),
        (Verdict.INVALID, "Control failed: release of all real images"),
        (Verdict.NOT_ESTIMABLE, "Hold out more patients"),
    ],
)
def test_refusal_names_verdict_attack_and_remedy(verdict, remedy):
    with pytest.raises(GateError) as caught:
        check_gate(report(verdict), accept=STRICT)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert verdict.value in message
    assert "tracing" in message
    assert "copy_search" not in message
    assert remedy in message
    assert "the policy accepts PASS" in message


def test_sentences_and_clauses_are_joined_as_such():
    """An attack's summary is a sentence, a failed control a clause, a limit of the policy a sentence."""
    refusals = ("Epsilon 5 is above the policy's 3.", "Delta 0.01 is above the policy's 1e-05.")
    for verdict in (Verdict.FAIL, Verdict.INVALID, Verdict.NOT_ESTIMABLE):
        audit = replace(report(verdict), refusals=refusals)
        with pytest.raises(GateError) as caught:
            check_gate(audit, accept=STRICT)
        (warning,) = (one for one in warnings_of(distilled_set(TWO), audit, None) if "Audit" in one.title)
        for text in (str(caught.value), warning.text):
            assert not re.search(r"[.!?;]\s*;", text)
            assert all(refusal in text for refusal in refusals)
    assert listed("a fell", "b rose.", "c stood") == "a fell; b rose. C stood"


def test_no_audit():
    with pytest.raises(GateError, match="not audited"):
        check_gate(None, accept=frozenset(Verdict))


def test_milder_verdict_does_not_hide_an_attack_that_failed():
    hidden = replace(report(Verdict.FAIL), verdict=Verdict.PASS)
    with pytest.raises(GateError, match="tracing: FAIL"):
        check_gate(hidden, accept=STRICT)


def test_attack_without_controls_is_named():
    audit = report(Verdict.INVALID)
    bare = tuple(replace(outcome, controls=()) for outcome in audit.outcomes)
    with pytest.raises(GateError, match="No control was run"):
        check_gate(replace(audit, outcomes=bare), accept=STRICT)


def test_verdict_without_a_guilty_attack_still_stops():
    with pytest.raises(GateError, match="INVALID"):
        check_gate(replace(report(Verdict.INVALID), outcomes=()), accept=STRICT)


def test_policy_that_accepts_nothing():
    with pytest.raises(GateError, match="no verdict"):
        check_gate(report(Verdict.PASS), accept=frozenset())


@pytest.mark.parametrize("verdict", [None, *Verdict])
def test_reason_in_words_opens_the_gate(verdict):
    check_gate(None if verdict is None else report(verdict), accept=STRICT, forced_reason="Phantoms only.")


@pytest.mark.parametrize("reason", ["", " \n"])
def test_empty_reason_opens_nothing(reason):
    with pytest.raises(GateError, match="reason in words"):
        check_gate(report(Verdict.PASS), accept=STRICT, forced_reason=reason)
