r"""Mechanism audit: does the noise hide a patient as well as is claimed?

The attacker of threat T7 chooses two cohorts that differ by one patient, sees the noisy answers of one of them,
and has to say which it was. Answers are drawn many times by the very functions of the private curator, with noise
from the operating system. From how often the attacker is right follows what epsilon is at least:

.. math:: \varepsilon \ge \log \frac{\mathrm{TPR}_{low} - \delta}{\mathrm{FPR}_{high}}

with both rates at the ends of their Clopper-Pearson intervals. Where nobody is left out by sampling, the claim is
that of a Gaussian, and the stronger form for Gaussians is used as well:

.. math:: \mu_{low} = \Phi^{-1}(1 - \mathrm{FPR}_{high}) - \Phi^{-1}(\mathrm{FNR}_{high}), \qquad
    \delta(\varepsilon) = \Phi(-\varepsilon/\mu + \mu/2) - e^\varepsilon \Phi(-\varepsilon/\mu - \mu/2)

The attacker uses two scores: a weighted sum of the answers in the patient's direction, and the likelihood ratio of
all answers under Gaussians (mixtures, where patients are sampled) fitted to both cohorts, which also sees noise
that depends on the patients. Cohorts, parameters of scores and thresholds are chosen on one half of the runs, and
rates are counted on the other half: once for each score, so each is given half of the error probability.

References:
    Jagielski, Ullman & Oprea 2020, arXiv:2006.07709; Nasr et al. 2023, arXiv:2302.07956 (the Gaussian form);
    Balle & Wang 2018, arXiv:1805.06530; Clopper & Pearson 1934.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from medistill.audit.distinguisher import (
    RUNS,
    affordable,
    detectable_epsilon,
    each_score,
    lower_bound,
    p_value,
    unsampled,
)
from medistill.audit.worst_case import CLIP_NORM, TARGET, Mechanism, ask, long_rows, neighbours, throw_away_curator
from medistill.core.guarantee import EPSILON_RANGE, Budget, PrivacyPlan, PrivacyStatement, Query, QueryKind
from medistill.core.images import ImageSet
from medistill.core.reports import AttackOutcome, ControlOutcome, Verdict
from medistill.errors import PrivacyError
from medistill.privacy.accounting import analytic_noise, check_delta
from medistill.privacy.calibration import calibrate
from medistill.privacy.contributions import images_of
from medistill.privacy.curator import contributions
from medistill.privacy.noise import SYSTEM, Entropy
from medistill.progress import Progress
from medistill.seeds import derive_seed

_STATED = re.compile(r"noise multiplier ([0-9.e+-]+)")


def audit_mechanism(
    statement: PrivacyStatement,
    plan: PrivacyPlan,
    *,
    seed: int,
    runs: int = RUNS,
    progress: Progress | None = None,
    confidence: float = 0.95,
    _entropy: Entropy = SYSTEM,
) -> AttackOutcome:
    """Attack the noisy answers behind a claim, beside mechanisms that are known to break and to keep it.

    Args:
        statement: What is claimed. The noise it states is the noise audited; where it states none, that of the
            plan calibrated to the claim.
        plan: What was asked.
        seed: Public seed of the textbook control; the noise audited is the operating system's.
        runs: For each of two cohorts; fewer for plans of many queries.
        progress: Shows how far it is.
        confidence: With which the lower bound holds.

    Returns:
        ``FAIL`` where epsilon is shown to be above the claim, ``INVALID`` where a control failed.

    Raises:
        PrivacyError: If nothing is claimed.

    Privacy:
        Reads nothing of any patient: the cohorts are made up. A claim that is not contradicted is not proved.
    """
    if not math.isfinite(statement.epsilon):
        raise PrivacyError("No epsilon is claimed, so there is no claim of a mechanism to audit.")
    check_delta(statement.delta)
    claim, delta = statement.epsilon, statement.delta
    audited = Mechanism(plan=plan, noise_multipliers=stated_noise(statement, plan), entropy=_entropy)
    found = lower_bound(audited, delta=delta, runs=runs, confidence=confidence, progress=progress)
    controls = _controls(audited, claim, delta, seed=seed, runs=affordable(plan, runs) // 2, confidence=confidence)
    gaussian, trials = unsampled(plan), found.events[0].trials
    detectable = detectable_epsilon(
        claim, delta=delta, trials=trials, confidence=each_score(confidence), gaussian=gaussian
    )
    verdict = Verdict.FAIL if found.epsilon > claim else Verdict.PASS
    if not all(control.passed for control in controls):
        verdict = Verdict.INVALID
    return AttackOutcome(
        attack="mechanism",
        question="Do the noisy answers give away whether a patient is in the cohort, more than epsilon allows?",
        auroc=None,
        tpr_at_fpr={},
        p_value=p_value(found.events, claim, delta, gaussian=gaussian),
        minimum_detectable_auroc=None,
        findings={
            "claimed_epsilon": claim,
            "epsilon_lower_bound": found.epsilon,
            "direct_lower_bound": found.direct,
            **({"gaussian_lower_bound": found.gaussian} if gaussian else {}),
            "detectable_epsilon": detectable,
            "noise_multiplier": min(audited.noise_multipliers),
            "runs": float(affordable(plan, runs)),
        },
        controls=controls,
        verdict=verdict,
        summary=_summary(verdict, claim, found.epsilon, detectable),
    )


def stated_noise(statement: PrivacyStatement, plan: PrivacyPlan) -> tuple[float, ...]:
    """The noise multipliers that a statement gives, or else those that its claim and plan lead to."""
    found = [_STATED.search(event) for event in statement.event[: len(plan.queries)]]  # what follows is a score
    if len(found) == len(plan.queries) and all(found):
        return tuple(float(match.group(1)) for match in found if match)
    epsilon = min(max(statement.epsilon, EPSILON_RANGE[0]), EPSILON_RANGE[1])
    return calibrate(Budget(epsilon=epsilon, delta=statement.delta), plan).noise_multipliers


def _summary(verdict: Verdict, claim: float, found: float, detectable: float) -> str:
    if verdict is Verdict.INVALID:
        return "A control failed, so this result says nothing about the mechanism."
    if verdict is Verdict.FAIL:
        return f"The claim of epsilon {claim:.3g} is wrong: the mechanism loses at least {found:.3g}."
    return (
        f"The claim of epsilon {claim:.3g} is not contradicted: the attack shows a loss of at least {found:.3g}, "
        f"and a Gaussian mechanism that loses {detectable:.3g} would have been noticed."
    )


# -- controls --------------------------------------------------------------------------------------------------


def _controls(
    audited: Mechanism, claim: float, delta: float, *, seed: int, runs: int, confidence: float
) -> tuple[ControlOutcome, ...]:
    textbook = _Textbook(
        plan=PrivacyPlan(queries=(Query(kind=QueryKind.SUM, purpose="textbook"),)),
        noise_multipliers=(analytic_noise(claim, delta),),
        generator=torch.Generator().manual_seed(derive_seed(seed, "textbook")),
    )
    kept = lower_bound(textbook, delta=delta, runs=runs, confidence=confidence).epsilon
    innocent = ControlOutcome(
        name="negative: a Gaussian with textbook noise for the claim",
        expected=f"a lower bound of at most {claim:.3g}",
        observed=f"{kept:.3g}",
        passed=kept <= claim,
    )
    faults = {
        "positive: the same mechanism, but a patient's five images are clipped one by one": ClipsEachImage,
        "positive: the same mechanism, but answers are divided by the count of patients": DividesByPrivateCount,
    }
    guilty = []
    for name, fault in faults.items():
        broken = fault(plan=audited.plan, noise_multipliers=audited.noise_multipliers, entropy=audited.entropy)
        shown = lower_bound(broken, delta=delta, runs=runs, confidence=confidence).epsilon
        expected, observed = f"a lower bound above {claim:.3g}", f"{shown:.3g}"
        guilty.append(ControlOutcome(name=name, expected=expected, observed=observed, passed=shown > claim))
    return (*guilty, innocent, same_code(audited))


def same_code(mechanism: Mechanism) -> ControlOutcome:
    """Whether the audited answers are the private curator's, no more of them than declared, and not known before.

    The curator itself is asked one query of every entry of the plan, and the audited mechanism is given the random
    bytes that the curator drew.
    """
    first, same = 0, True
    for query, noise in zip(mechanism.plan.queries, mechanism.noise_multipliers, strict=True):
        for cohort in (cohort for pair in neighbours() for cohort in pair):
            drawn: list[bytes] = []
            with throw_away_curator(cohort, mechanism, entropy=_noted(drawn)) as curator:
                curator.resume(first)
                answer = ask(curator, query)
            again = replace(mechanism, entropy=_given(b"".join(drawn)))
            expected = again.answer(cohort, replace(query, count=1), noise, 1).flatten()
            same = same and torch.equal(answer, expected.to(answer))
        first += query.count
    more, known = _answers_more(mechanism), torch.equal(*(_last_answer(mechanism) for _ in range(2)))
    observed = ["the same" if same else "others"]
    observed += ["one more than declared"] if more else []
    observed += ["the same noise twice"] if known else []
    return ControlOutcome(
        name="same code: the curator itself, with the same random bytes",
        expected="the same answers to the last bit, none beyond the plan, and other noise each time",
        observed=", ".join(observed),
        passed=same and not more and not known,
    )


def _last_answer(mechanism: Mechanism) -> Tensor:
    with throw_away_curator(neighbours()[0][1], mechanism) as curator:
        curator.resume(mechanism.plan.total - 1)
        return ask(curator, mechanism.plan.queries[-1])


def _answers_more(mechanism: Mechanism) -> bool:
    with throw_away_curator(neighbours()[0][1], mechanism) as curator:
        curator.resume(mechanism.plan.total - 1)
        ask(curator, mechanism.plan.queries[-1])
        try:
            ask(curator, mechanism.plan.queries[-1])
        except PrivacyError:
            return False
    return True


def _noted(drawn: list[bytes]) -> Entropy:
    def entropy(count: int) -> bytes:
        drawn.append(os.urandom(count))
        return drawn[-1]

    return entropy


def _given(content: bytes) -> Entropy:
    position = 0

    def entropy(count: int) -> bytes:
        nonlocal position
        position += count
        return content[position - count : position].ljust(count, b"\xff")

    return entropy


# -- known cases -----------------------------------------------------------------------------------------------


class ClipsEachImage(Mechanism):
    """Known fault: every image is clipped, though the claim is about patients."""

    def added(self, cohort: ImageSet) -> Tensor:
        """Clipped images, summed over each patient's."""
        whole = contributions(long_rows(cohort.images, cohort.targets), CLIP_NORM)
        return torch.stack([whole[own].sum(0) for own in images_of(cohort.patients)])


class DividesByPrivateCount(Mechanism):
    """Known fault: the answer, noise and all, is divided by the true number of patients."""

    def answer(self, cohort: ImageSet, query: Query, noise: float, runs: int) -> Tensor:
        """The answer over the number of patients."""
        return super().answer(cohort, query, noise, runs) / len(images_of(cohort.patients))


@dataclass(frozen=True, kw_only=True)
class _Textbook(Mechanism):
    """One Gaussian with textbook noise, none of the curator's code: keeps its claim."""

    generator: torch.Generator

    def answers(self, cohort: ImageSet, runs: int) -> tuple[Tensor, ...]:
        noise = torch.randn((runs, 1, 2), generator=self.generator, dtype=torch.float64)
        moved = torch.tensor([float(TARGET in cohort.patients), 0.0], dtype=torch.float64)
        return (moved + self.noise_multipliers[0] * noise,)
