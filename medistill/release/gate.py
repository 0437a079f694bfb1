"""The door between a distilled set and the outside."""

from __future__ import annotations

from medistill.core.reports import AttackOutcome, AuditReport, Verdict
from medistill.errors import GateError
from medistill.report.wording import VERDICTS, control_problems, listed, number

_SERIOUS = (Verdict.FAIL, Verdict.INVALID)
_REMEDIES = {
    Verdict.PASS: "Add PASS to the verdicts the policy accepts.",
    Verdict.FAIL: "Distil with (more) differential privacy, fewer images per class, or more patients.",
    Verdict.INVALID: "Repair the attack until its controls pass, then audit again; until then nothing follows.",
    Verdict.NOT_ESTIMABLE: "Hold out more patients for the audit, then distil and audit again.",
}
_FORCE = "To release nevertheless, give a reason; it is printed on the first page of the report."


def check_gate(audit: AuditReport | None, *, accept: frozenset[Verdict], forced_reason: str | None = None) -> None:
    """Let a release pass, or say why not.

    Args:
        audit: What the audit concluded; ``None`` where none was made.
        accept: Verdicts the policy lets pass; usually only ``PASS``.
        forced_reason: Why the data owner releases whatever the verdict; the release carries it as a warning.

    Raises:
        GateError: If the verdict is not accepted and no reason is given, with the attack that caused it and the
            remedy; or if the reason given is empty.

    Privacy:
        Reads an audit, which was computed on real patients; the message names attacks and rates, no patient.
    """
    if forced_reason is not None:
        if not forced_reason.strip():
            raise GateError("Expected a reason in words for releasing against the gate, got an empty one.")
        return
    if audit is None:
        raise GateError(f"The gate was not passed: the set was not audited. Run `medistill audit` first. {_FORCE}")
    causes = _causes(audit, accept)
    if audit.verdict in accept and not causes:
        return
    worst = audit.verdict if audit.verdict not in accept else causes[0].verdict
    lines = "".join(f"\n  - {cause}" for cause in (*map(_cause, causes), *audit.refusals))
    raise GateError(
        f"The gate was not passed: {worst.value} ({VERDICTS[worst]}); the policy accepts "
        f"{', '.join(sorted(verdict.value for verdict in accept)) or 'no verdict'}.{lines}\n"
        f"{_REMEDIES[worst]} {_FORCE}"
    )


def _causes(audit: AuditReport, accept: frozenset[Verdict]) -> tuple[AttackOutcome, ...]:
    """Attacks that stand in the way: those with the verdict, and serious ones a milder verdict would hide."""
    wanted = {audit.verdict, *_SERIOUS} - accept
    return tuple(outcome for outcome in audit.outcomes if outcome.verdict in wanted)


def _cause(outcome: AttackOutcome) -> str:
    auroc = f", AUROC {number(outcome.auroc.value)}" if outcome.auroc is not None else ""
    problems = control_problems(outcome) if outcome.verdict is Verdict.INVALID else ()
    return listed(f"{outcome.attack}: {outcome.verdict.value}{auroc}. {outcome.summary}", *problems)
