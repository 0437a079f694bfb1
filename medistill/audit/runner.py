"""An audit: attacks on member against holdout patients, each beside its controls."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medistill.audit.attack import Exposed, Guilty, MembershipAttack, Prepared
from medistill.audit.control import Controls
from medistill.audit.copies import Copies, conclude_copies, measure_copies
from medistill.audit.guesses import Attributes, Known, attributes_of_patients
from medistill.audit.mechanism import audit_mechanism
from medistill.audit.membership import Measured, auroc_ceiling, conclude, measure
from medistill.audit.one_run import audit_one_run
from medistill.audit.policy import ATTRIBUTED, PROFILES, THREATS, UNCERTAIN, AuditPolicy
from medistill.audit.pool import Pool, draw_pool
from medistill.audit.replay import audit_replay
from medistill.audit.searches import search_further
from medistill.audit.statistics import holm
from medistill.core.compute import Compute
from medistill.core.distilled import DistilledSet
from medistill.core.guarantee import PrivacyStatement
from medistill.core.images import ImageSet
from medistill.core.reports import AttackOutcome, AuditReport, Verdict
from medistill.distill.private import plan_of
from medistill.distill.start import random_images
from medistill.errors import DataError
from medistill.progress import Progress
from medistill.registry import ATTACKS
from medistill.seeds import derive_seed

_ORDER = (Verdict.INVALID, Verdict.FAIL, Verdict.NOT_ESTIMABLE, Verdict.PASS)


@dataclass(frozen=True, kw_only=True)
class _Means:
    """What an audit computes with."""

    policy: AuditPolicy
    seed: int
    compute: Compute
    progress: Progress
    known: Known


def audit(
    distilled: DistilledSet,
    *,
    train: ImageSet,
    holdout: ImageSet,
    reference: ImageSet,
    others: Sequence[DistilledSet] = (),
    attributes: Attributes | None = None,
    policy: AuditPolicy | None = None,
    seed: int = 0,
    folder: Path | None = None,
    controls: Path | None = None,
    compute: Compute | None = None,
    progress: Progress | None = None,
) -> AuditReport:
    """Attack a release and the controls beside it.

    As many member patients are attacked as there are holdout patients. The negative control is distilled by the
    same recipe from the *other* training patients, so that for it nobody attacked is a member.

    Args:
        distilled: The release.
        train: Images it was distilled from.
        holdout: Images of patients that distillation never saw.
        reference: Images of further patients, to calibrate on.
        others: Further releases of the same patients, which the attacker holds as well.
        attributes: Of ``train``, ``holdout`` and ``reference``: sex, age band and site of each image, as
            :func:`medistill.audit.guesses.attributes_of` gives them; without them their inference is not tested.
        policy: Which attacks are made, and when the audit passes.
        seed: Public seed.
        folder: Where the negative control keeps its checkpoints.
        controls: Where finished negative controls are kept, to be taken again by an audit with the same recipe,
            patients and code; without it they are distilled anew. They stay inside.
        compute: Device and precision of the negative control and of the attacks' networks.
        progress: Shows how far it is.

    Returns:
        Outcomes per patient with controls. ``INVALID`` unless every control passed.

    Raises:
        DataError: If a part has fewer than ten patients, or another release has images of another shape.

    Privacy:
        Reads non-released data. The result is a measurement for the data owner, never a guarantee.
    """
    parts = {"train": train, "holdout": holdout, "reference": reference}
    means = _means(policy, seed, compute, progress, _known(parts, attributes))
    pool = draw_pool(train, holdout, reference, derive_seed(seed, "candidates"))
    together = (distilled, *others)
    _check_alike([Exposed.of(one) for one in together], pool)
    made = Controls(seed=seed, compute=means.compute, progress=means.progress, folder=folder, kept=controls)
    return _attacked(
        Exposed.together([Exposed.of(one) for one in together]),
        Exposed.together([Exposed.of(made.of(one, pool.rest)) for one in together]),
        control_name="distilled by the same recipe from other patients",
        pool=pool,
        means=means,
        claim=distilled.privacy,
        proved=_of_claim(distilled, pool, means),
        fingerprint=distilled.fingerprint(),
        untested=() if others else (THREATS["T8"],),
    )


def audit_images(
    release: Exposed,
    *,
    train: ImageSet,
    holdout: ImageSet,
    reference: ImageSet,
    attributes: Attributes | None = None,
    policy: AuditPolicy | None = None,
    seed: int = 0,
    compute: Compute | None = None,
    progress: Progress | None = None,
) -> AuditReport:
    """Attack images that somebody else made, by whatever means, from a cohort.

    How they were made is not known, so it cannot be repeated without the attacked patients. The negative control
    is as many real images of training patients who are not attacked.

    Args:
        release: The images with their labels.
        train: Images they were made from.
        holdout: Images of patients that had no part in it.
        reference: Images of further patients, to calibrate on.
        attributes: As in :func:`audit`.
        policy: Which attacks are made, and when the audit passes.
        seed: Public seed.
        compute: Device and precision of the attacks' networks.
        progress: Shows how far it is.

    Raises:
        DataError: If a part has fewer than ten patients, or the images are of another shape than the cohort's.

    Privacy:
        Reads non-released data. The result is a measurement for the data owner, never a guarantee.
    """
    parts = {"train": train, "holdout": holdout, "reference": reference}
    means = _means(policy, seed, compute, progress, _known(parts, attributes))
    pool = draw_pool(train, holdout, reference, derive_seed(seed, "candidates"))
    _check_alike([release], pool)
    smallest = int(pool.rest.targets.sum(0).min())
    ipc = max(1, min(smallest, len(release.images) // release.task.n_classes))
    real = random_images(pool.rest, ipc=ipc, seed=derive_seed(seed, "images of others"))
    return _attacked(
        release,
        Exposed.of_images(real),
        control_name="real images of patients who are not attacked",
        pool=pool,
        means=means,
        claim=None,
        proved=(),
        fingerprint=hashlib.sha256(release.images.numpy().tobytes()).hexdigest(),
        untested=(THREATS["T8"],),
    )


def _means(
    policy: AuditPolicy | None, seed: int, compute: Compute | None, progress: Progress | None, known: Known
) -> _Means:
    return _Means(
        policy=policy or AuditPolicy(),
        seed=seed,
        compute=compute or Compute(),
        progress=progress or Progress(),
        known=known,
    )


def _known(parts: Mapping[str, ImageSet], attributes: Attributes | None) -> Known:
    if attributes is not None and (unknown := attributes.keys() - parts.keys()):
        raise DataError(f"Expected attributes of {', '.join(parts)}, got {', '.join(sorted(unknown))}.")
    return attributes_of_patients([(parts[name], of) for name, of in (attributes or {}).items()])


def _check_alike(releases: Sequence[Exposed], pool: Pool) -> None:
    shapes = {tuple(one.images.shape[1:]) for one in releases} | {tuple(pool.train.images.shape[1:])}
    tasks = {one.task for one in releases} | {pool.train.task}
    if len(shapes) > 1 or len(tasks) > 1:
        raise DataError(
            f"Expected releases and cohort of one image shape and one task, found shapes {sorted(shapes)} and "
            f"{len(tasks)} task(s). Load the cohort at the size of the release; audit other releases on their own."
        )


def _attacked(
    release: Exposed,
    control: Exposed,
    *,
    control_name: str,
    pool: Pool,
    means: _Means,
    claim: PrivacyStatement | None,
    proved: tuple[AttackOutcome, ...],
    fingerprint: str,
    untested: tuple[str, ...],
) -> AuditReport:
    """All attacks of the profile; their p-values are corrected together before anything is concluded."""
    profile = PROFILES[means.policy.profile]
    made: dict[str, MembershipAttack] = {
        name: ATTACKS.load(name)(**settings, **({"known": means.known} if name in ATTRIBUTED else {}))
        for name, settings in profile.items()
    }
    measured: list[Measured] = []
    unable: dict[str, str] = {}
    for name, attack in means.progress.track(made.items(), "attacking"):
        try:
            prepared, guilty = _ready(name, attack, release, pool, means)
        except DataError as error:
            unable[name] = str(error)
            continue
        found = measure(
            name,
            attack,
            prepared,
            guilty,
            release=release,
            control=control,
            control_name=control_name,
            pool=pool,
            policy=means.policy,
            seed=means.seed,
        )
        if name in UNCERTAIN and not found.controls[0].passed:
            unable[name] = _powerless(found)
        else:
            measured.append(found)
    copies = measure_copies(release, control, control_name=control_name, pool=pool, seed=means.seed)
    outcomes = [*_concluded(measured, copies, pool, means, claim)]
    further, powerless = search_further(
        release,
        control,
        control_name=control_name,
        pool=pool,
        profile=means.policy.profile,
        seed=means.seed,
        compute=means.compute,
    )
    unable |= powerless
    outcomes += [*further, *proved]
    refusals = means.policy.refusals(claim, len(pool.train.unique_patients))
    verdicts = [outcome.verdict for outcome in outcomes if not _informs_only(outcome)]
    verdicts += [Verdict.FAIL] if refusals else []
    tested = {attack.threat for name, attack in made.items() if name not in unable} | {"T5"}
    beside = {"T8"} if proved else {"T7", "T8"}  # without a claim there are no noisy answers
    tested |= {"T7"} if proved else set()
    why = (f"{name.replace('_', ' ')}: {reason}" for name, reason in unable.items())
    return AuditReport(
        outcomes=tuple(outcomes),
        verdict=min(verdicts, key=_ORDER.index),
        threat_model=" ".join(THREATS[threat] for threat in sorted(tested)),
        members=len(pool.members),
        non_members=len(pool.holdout.unique_patients),
        not_tested=(*why, *untested, *(text for name, text in THREATS.items() if name not in tested | beside)),
        release=fingerprint,
        refusals=refusals,
    )


def _powerless(found: Measured) -> str:
    return (
        "these patients' images give it no power: it did not even find a release that is known to give patients "
        f"away ({found.controls[0].observed}; wanted: {found.controls[0].expected})"
    )


def _ready(
    name: str, attack: MembershipAttack, release: Exposed, pool: Pool, means: _Means
) -> tuple[Prepared, Guilty]:
    """The attack after its preparation, and its positive control."""
    seed = derive_seed(means.seed, f"attack {name}")
    prepared = attack.prepare(
        pool.candidates,
        pool.reference,
        ipc=release.ipc,
        seed=seed,
        compute=means.compute,
        progress=means.progress,
    )
    inside = pool.candidates.of_patients(pool.members)
    return prepared, attack.guilty(inside, pool.holdout, pool.reference, seed=seed)


def _of_claim(distilled: DistilledSet, pool: Pool, means: _Means) -> tuple[AttackOutcome, ...]:
    """Attacks on the noisy answers themselves, where an epsilon is claimed.

    The full profile also distils twice, to see that nothing but the answers is used.
    """
    if math.isinf(distilled.privacy.epsilon):
        return ()
    means.progress.say("audit: does the noise hide a patient as well as is claimed?")
    claim, shape = distilled.privacy, tuple(pool.train.images.shape[1:])
    plan, seed = plan_of(distilled.recipe, pool.train.task, shape), derive_seed(means.seed, "mechanism")
    found = [audit_mechanism(claim, plan, seed=seed, progress=means.progress)]
    found.append(audit_one_run(claim, plan, seed=seed))
    if means.policy.profile == "full":
        found.append(
            audit_replay(
                distilled.recipe,
                pool.rest,
                epsilon=claim.epsilon,
                delta=claim.delta,
                compute=means.compute,
                progress=means.progress,
            )
        )
    return tuple(found)


def _informs_only(outcome: AttackOutcome) -> bool:
    """Whether an outcome decides nothing: one run is a smoke test, which sees only gross faults."""
    return outcome.attack == "one_run" and outcome.verdict is Verdict.NOT_ESTIMABLE


def _concluded(
    measured: Sequence[Measured], copies: Copies, pool: Pool, means: _Means, claim: PrivacyStatement | None
) -> tuple[AttackOutcome, ...]:
    corrected = holm([*(one.p_value for one in measured), copies.p_value])
    ceiling = None if claim is None or math.isinf(claim.epsilon) else auroc_ceiling(claim.epsilon, claim.delta)
    found = [
        conclude(
            one,
            corrected=p_value,
            attacks=len(corrected),
            policy=means.policy,
            classes=pool.train.task.class_names,
            ceiling=ceiling,
        )
        for one, p_value in zip(measured, corrected, strict=False)
    ]
    return (*found, conclude_copies(copies, corrected=corrected[-1], alpha=means.policy.alpha))
