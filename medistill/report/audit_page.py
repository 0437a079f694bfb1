"""The audit as a page for the data protection officer; it shows patients' images and stays inside.

Self-contained like the report of a release: no script, no network, no second file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from medistill.core.guarantee import PrivacyStatement
from medistill.core.reports import AttackOutcome, AuditReport
from medistill.report import wording
from medistill.report.chart import colour
from medistill.report.png import picture_source
from medistill.report.roc import roc_chart
from medistill.report.templates import markup, style, template


@dataclass(frozen=True, kw_only=True)
class ClosePair:
    """A released picture beside the real images that it is most like.

    Args:
        released: Shape ``(c, h, w)`` or ``(c, d, h, w)``.
        member: The nearest image of a training patient.
        other: The nearest image of a patient that distillation never saw.
        with_member: Correlation with the first.
        with_other: Correlation with the second.
    """

    released: Tensor
    member: Tensor
    other: Tensor
    with_member: float
    with_other: float


def render_audit(
    audit: AuditReport,
    *,
    statement: PrivacyStatement | None,
    pairs: Sequence[ClosePair] = (),
    name: str = "Audit",
    version: str = "",
) -> str:
    """Render the page.

    Args:
        audit: What the audit concluded.
        statement: What is proved about the release; ``None`` where nothing is known.
        pairs: Released pictures beside the real images nearest to them.
        name: Title of the page.
        version: Version of the software.

    Returns:
        HTML; the same arguments give the same text.

    Privacy:
        Shows patients' images where pairs are given: for the data owner only, never part of a release.
    """
    with_curves = [outcome for outcome in audit.outcomes if outcome.roc]
    return template("audit.html.j2").render(
        name=wording.one_line(name),
        style=style("page.css", "chart.css"),
        verdict=audit.verdict.value.replace("_", " "),
        kind=wording.mark(audit.verdict),
        wording=wording.VERDICTS[audit.verdict],
        refusals=audit.refusals,
        proved=None if statement is None or math.isinf(statement.epsilon) else statement,
        meaning="" if statement is None else wording.guarantee_meaning(statement),
        members=audit.members,
        non_members=audit.non_members,
        threat_model=audit.threat_model,
        attacks=[_attack(outcome) for outcome in audit.outcomes],
        curves=markup(roc_chart({wording.words(one.attack): one.roc for one in with_curves})),
        legend=[(colour(number), wording.words(one.attack)) for number, one in enumerate(with_curves)],
        pairs=[_pair(number, pair) for number, pair in enumerate(pairs, start=1)],
        not_tested=audit.not_tested,
        release=audit.release,
        version=version,
    )


def _attack(outcome: AttackOutcome) -> dict[str, Any]:
    limit = outcome.minimum_detectable_auroc
    return {
        "name": wording.words(outcome.attack),
        "question": outcome.question,
        "summary": outcome.summary,
        "verdict": outcome.verdict.value.replace("_", " "),
        "kind": wording.mark(outcome.verdict),
        "auroc": wording.interval(outcome.auroc) if outcome.auroc else "–",
        "limit": wording.number(limit) if limit is not None and math.isfinite(limit) else "–",
        "p_value": wording.p_value(outcome.p_value),
        "rates": [
            (fpr, "not estimable" if rate is None else wording.interval(rate))
            for fpr, rate in outcome.tpr_at_fpr.items()
        ],
        "findings": [(wording.words(key), f"{value:g}") for key, value in outcome.findings.items()],
        "controls": outcome.controls,
    }


def _pair(number: int, pair: ClosePair) -> dict[str, Any]:
    return {
        "number": number,
        "released": picture_source(pair.released),
        "member": picture_source(pair.member),
        "other": picture_source(pair.other),
        "with_member": f"{pair.with_member:.2f}",
        "with_other": f"{pair.with_other:.2f}",
    }
