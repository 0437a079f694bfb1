"""When an audit passes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from medistill.core.guarantee import PrivacyStatement
from medistill.errors import ConfigError

#: Attackers, by the name of their row in the threat model.
THREATS = {
    "T2": "Who holds all images of a patient, and asks whether the patient was in the cohort (T1, T2).",
    "T3": "Who holds another image of a patient, and looks for the patient in the release (T3).",
    "T4": "Who holds an image of a patient, and infers sex, age band or site (T4).",
    "T5": "Who holds the release alone, and looks for copies or mixtures of patients' images (T5).",
    "T6": "Who uses what the soft labels teach, and asks whether a patient was in the cohort (T6).",
    "T7": "Who adds patients to the cohort and sees the noisy answers (T7).",
    "T8": "Who holds several releases of one hospital (T8).",
}
#: Attacks whose power is a matter of the data: where the positive control fails, the threat counts as not tested.
UNCERTAIN = frozenset({"attribute_inference", "reidentification"})
#: Profiles that also search the pictures of a class together.
RECONSTRUCTING = frozenset({"default", "full"})
#: Attacks that are given what is known of patients beside their images.
ATTRIBUTED = frozenset({"attribute_inference"})
_DEFAULT: dict[str, dict[str, Any]] = {
    "calibrated_neighbour": {},
    "tracing": {},
    "label_leakage": {},
    "shadow": {},
    "attribute_inference": {},
}
#: Attacks on membership of each profile with their settings; copies and mixtures are always searched for.
PROFILES: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {"calibrated_neighbour": {}},
    "default": _DEFAULT,
    "full": {**_DEFAULT, "shadow": {"shadows": 128}, "reidentification": {}},
}


@dataclass(frozen=True, kw_only=True)
class AuditPolicy:
    """When an audit passes; a data protection officer edits it.

    Args:
        profile: Which attacks are made: ``quick``, ``default`` or ``full``.
        auroc_high: The interval of a membership AUROC must end below this, and begin above one minus this.
        tpr_high: The interval of every true-positive rate at a false-positive rate of 0.01 or less must end below
            this, where it can be resolved.
        attribute_excess: Right guesses of a patient's attribute that the release adds for members, beyond what it
            adds for others, as a share: its interval must begin below this.
        fprs: False-positive rates at which the true-positive rate is reported.
        alpha: A membership result with a smaller p-value, after Holm's correction over all attacks, is found.
        fewest_patients: Patients attacked in all, below which the audit cannot pass.
        class_patients: Members of a class, below which the class is not looked at alone.
        epsilon_max: Largest epsilon a release may claim, and none may be without one; ``None`` for no limit.
        delta_max: Largest delta a release may claim; ``None`` for the smaller of 1e-5 and a tenth of one over the
            patients.

    Raises:
        ConfigError: If a limit is one that no release could miss, or none could keep.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by the configuration loader

    profile: str = "default"
    auroc_high: float = 0.60
    tpr_high: float = 0.05
    attribute_excess: float = 0.05
    fprs: tuple[float, ...] = (0.01, 0.1)
    alpha: float = 0.01
    fewest_patients: int = 200
    class_patients: int = 20
    epsilon_max: float | None = None
    delta_max: float | None = None

    def __post_init__(self) -> None:
        problems = [
            message
            for holds, message in (
                (self.profile in PROFILES, f"profile one of {', '.join(PROFILES)}, got {self.profile!r}"),
                (0.5 < self.auroc_high < 1, f"0.5 < auroc_high < 1, got {self.auroc_high}"),
                (0 < self.tpr_high < 1, f"0 < tpr_high < 1, got {self.tpr_high}"),
                (0 < self.attribute_excess < 1, f"0 < attribute_excess < 1, got {self.attribute_excess}"),
                (all(0 < fpr < 1 for fpr in self.fprs), "every one of fprs between 0 and 1"),
                (0 < self.alpha < 1, f"0 < alpha < 1, got {self.alpha}"),
                (self.fewest_patients >= 1, f"fewest_patients >= 1, got {self.fewest_patients}"),
                (self.class_patients >= 2, f"class_patients >= 2, got {self.class_patients}"),
                (self.epsilon_max is None or self.epsilon_max > 0, f"epsilon_max > 0, got {self.epsilon_max}"),
                (self.delta_max is None or 0 < self.delta_max < 1, f"0 < delta_max < 1, got {self.delta_max}"),
            )
            if not holds
        ]
        if problems:
            raise ConfigError(f"Expected {'; '.join(problems)}.")

    def refusals(self, claim: PrivacyStatement | None, patients: int) -> tuple[str, ...]:
        """Why a release fails whatever the attacks found.

        Args:
            claim: What is proved about it; ``None`` where nothing is known.
            patients: Patients it was distilled from.
        """
        proved = claim is not None and math.isfinite(claim.epsilon)
        if not proved or claim is None:
            if self.epsilon_max is None:
                return ()
            return (f"The policy asks for a proved epsilon of at most {self.epsilon_max:g}; none is proved.",)
        found = []
        if self.epsilon_max is not None and claim.epsilon > self.epsilon_max:
            found.append(f"Epsilon {claim.epsilon:.3g} is above the policy's {self.epsilon_max:g}.")
        limit = min(1e-5, 1 / (10 * patients)) if self.delta_max is None else self.delta_max
        if self.epsilon_max is not None and claim.delta > limit * (1 + 1e-9):
            found.append(f"Delta {claim.delta:.2g} is above the policy's {limit:.2g}.")
        return tuple(found)
