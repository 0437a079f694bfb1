# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Reading an audit
#
# An audit attacks a release before it leaves the house. This notebook reads the audits of four releases. For
# three of them we know the truth, because we made them guilty or made the audit blind. It takes about a minute.
#
# Keep two things apart:
#
# - An audit is a **measurement**. Certain attacks were tried on certain patients. The next attack may do better.
# - A **guarantee** is a proof, and it comes from differential privacy alone. An attack that fails proves
#   nothing, and a guarantee does not need it.

# %%
import hashlib
import tempfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from IPython.display import Image
from matplotlib.figure import Figure

from medistill import (
    AuditReport,
    MedistillError,
    OpenCurator,
    PhantomConfig,
    Verdict,
    contact_sheet,
    verify_release,
    write_phantom,
)
from medistill.audit import AuditPolicy, Exposed, audit, audit_images
from medistill.distill import distill
from medistill.ingest import IngestConfig, SplitFractions, ingest
from medistill.release import check_gate, write_release

temporary = tempfile.TemporaryDirectory(prefix="medistill-")
room = Path(temporary.name)


def shown(figure: Figure, alt: str) -> Image:
    """A plot as a picture."""
    page = BytesIO()
    figure.savefig(page, format="png", dpi=100)
    return Image(page.getvalue(), alt=alt)


# %% [markdown]
# ## Who is attacked
#
# The phantom draws 240 patients with one or two films each. A phantom hides nobody, so its key may stand here,
# and every run divides the patients alike.
#
# | part | role in the audit |
# |---|---|
# | train | *members*: the release was made from them. Half of them are attacked |
# | holdout | *non-members*: the release never saw them |
# | validation | the *reference*: what the attacker knows of other people |
#
# The attacker has the films of members and non-members, mixed, and gives every patient a score: high means "I
# think this one was in". Nobody tells the attacker who was.

# %%
write_phantom(room / "phantom", PhantomConfig(patients=240, size=48, images_per_patient=(1, 2), difficulty=0.2))
cohort = ingest(
    room / "phantom" / "dicom",
    room / "cohort",
    key=hashlib.sha256(b"phantom").digest(),
    labels=room / "phantom" / "labels.csv",
    config=IngestConfig(
        size=32,
        ocr="never",
        classes=("no_gastritis", "gastritis", "outside"),
        fractions=SplitFractions(train=0.35, validation=0.15, holdout=0.45, test=0.05),
    ),
    jobs=1,
)
train, reference, holdout = (cohort.split(name).images(32) for name in ("train", "validation", "holdout"))
print(f"{len(train.unique_patients)} train patients, {len(holdout.unique_patients)} holdout patients")

# %% [markdown]
# ## An honest release
#
# It is distilled from noise by matching averages over all patients. The profile `quick` makes few attacks; the
# default makes more and takes minutes.

# %%
settings = {"networks": 4, "iterations": 60, "rate": 0.05, "formation": 2, "width": 16}
matching = {"method": "distribution_matching", "settings": {"distribution_matching": settings}}
honest = distill(OpenCurator(train), ipc=3, **matching).distilled
print(honest.privacy.sentence)
policy = AuditPolicy(profile="quick")
everybody = {"train": train, "holdout": holdout, "reference": reference, "policy": policy}
report = audit(honest, **everybody)


def read(report: AuditReport) -> None:
    """What the report says, attack by attack."""
    for outcome in report.outcomes:
        print(f"{outcome.attack}: {outcome.verdict.value}\n  {outcome.question}\n  {outcome.summary}")
        for control in outcome.controls:
            print(f"    {'passed' if control.passed else 'FAILED'}  {control.name}: {control.observed}")
    print(f"whole audit: {report.verdict.value}")


read(report)

# %% [markdown]
# Read it from the inside out: **first the controls, then the verdict, then the number.**
#
# 1. *Controls.* Each attack was also run on releases whose answer is known. The positive ones leak for sure, and
#    the attack caught them: it is not blind. The negative one was distilled by the same recipe from patients who
#    are not attacked, and the attack kept quiet: it does not cry wolf.
# 2. *Verdict.* The worst attack decides for the whole audit.
# 3. *Number.* An AUROC of 0.5 is guessing and 1 is certainty. The interval counts, not the value.
#
# ## `NOT_ESTIMABLE`
#
# The verdict means: **we cannot tell.** It does not mean that all is well. An interval this wide has room for a
# release that gives people away.
#
# The *minimum detectable* AUROC says how strong a leak must be to be seen at all. It depends on the number of
# patients and not on the release, so it can be known before anything is distilled. Its distance from 0.5 shrinks
# with the root of the number of patients: four times as many see a leak half as large.


# %%
def spread(members: float, others: float) -> float:
    """Standard deviation of the AUROC of an attack that guesses."""
    return float(np.sqrt((members + others + 1) / (12 * members * others)))


neighbour = report.outcomes[0]
factor = (neighbour.minimum_detectable_auroc - 0.5) / spread(report.members, report.non_members)
patients = np.geomspace(20, 3000, 400)
seen = np.array([min(1, 0.5 + factor * spread(count, count)) for count in patients])
axes = (figure := Figure(figsize=(5.5, 3.6), layout="constrained")).add_subplot()
axes.semilogx(patients, seen)
axes.axhline(policy.auroc_high, color="grey", linestyle=":", label="what the policy lets pass")
axes.axhline(neighbour.minimum_detectable_auroc, color="tab:red", linewidth=1, label="this audit")
axes.set(xlabel="members, and as many non-members", ylabel="smallest AUROC that is seen")
axes.legend()
print(f"{report.members} members and {report.non_members} non-members attacked")
print(f"an AUROC of {neighbour.minimum_detectable_auroc:.2f} or more is seen")
print(f"to see the policy's {policy.auroc_high}: {patients[seen < policy.auroc_high][0]:.0f} on either side")
shown(figure, "Smallest AUROC that an audit sees, against the number of patients.")

# %% [markdown]
# ## A guilty release: real images
#
# `coreset` picks real images and calls them a release. It is in medistill as a baseline for studies. The audit
# must not let it pass.

# %%
copied = distill(OpenCurator(train), ipc=3, method="coreset").distilled
guilty = audit(copied, **everybody)
read(guilty)
assert guilty.verdict is Verdict.FAIL

# %% [markdown]
# The AUROC has hardly moved. Nine images expose at most nine patients among many, and averaged over everybody
# that is little. Where the first attack notices at all, it is by a second test, of the highest scores alone. The
# *copy alarm* looks at each released image by itself, and finds the patient.
#
# Above, what is released. Below, the nearest film of a train patient.

# %%
nearest = train.images[torch.cdist(copied.images.flatten(1), train.images.flatten(1)).argmin(1)]
Image(contact_sheet(torch.cat([copied.images, nearest]), columns=len(copied)))

# %% [markdown]
# The honest release, looked at in the same way. Its images are mosaics of four, and these are nine of the tiles.

# %%
tiles = Exposed.of(honest).images[::4]
nearest = train.images[torch.cdist(tiles.flatten(1), train.images.flatten(1)).argmin(1)]
Image(contact_sheet(torch.cat([tiles, nearest]), columns=len(tiles)))

# %% [markdown]
# ## Somebody else's release, and the ROC curve
#
# Images that another program made can be audited too. Here somebody hands out the films of every other train
# patient. How they were made is not known, so the negative control is made of real images of patients who are
# not attacked.

# %%
handed_out = train.of_patients(set(train.unique_patients[::2]))
half = audit_images(Exposed.of_images(handed_out), **everybody)
read(half)
assert half.verdict is Verdict.FAIL

# %% [markdown]
# An AUROC averages over all false alarms, also over those that no attacker would accept. So look at the left end
# of the ROC curve, on logarithmic axes: there only few strangers are accused.

# %%
axes = (figure := Figure(figsize=(5.5, 4.2), layout="constrained")).add_subplot()
for name, found in {"honest": report, "nine real images": guilty, "half of the patients": half}.items():
    alarms, members = np.array(found.outcomes[0].roc).T
    axes.loglog(alarms, members, label=f"{name}, AUROC {found.outcomes[0].auroc.value:.2f}")
axes.loglog([0.01, 1], [0.01, 1], ":", color="grey", label="guessing")
axes.set(xlabel="non-members accused", ylabel="members found", xlim=(0.01, 1.1), ylim=(0.01, 1.1))
axes.set_title("Measurement: calibrated_neighbour")
axes.legend()
shown(figure, "Members found against non-members accused, on logarithmic axes, for three releases.")

# %% [markdown]
# The curves end where ten non-members can no longer resolve a rate. Left of that nothing is known, and a rate
# there is reported as missing, never as zero:

# %%
for rate, found in half.outcomes[0].tpr_at_fpr.items():
    print(f"members found at a rate of {rate} false alarms: {found or 'cannot be resolved'}")

# %% [markdown]
# ## `INVALID`
#
# Now a mistake that happens. The holdout patients come from another ward, whose device makes darker films. The
# release is the honest one.

# %%
darker = replace(holdout, images=0.7 * holdout.images)
confused = audit(honest, **{**everybody, "holdout": darker})
read(confused)
print("the attack on the release alone: AUROC", confused.outcomes[0].auroc)
assert confused.verdict is Verdict.INVALID

# %% [markdown]
# Without a control, that AUROC would look like a leak. But the negative control failed: it was distilled from
# patients who are not attacked, and still the attack tells the two groups apart, just as well. It sees the ward,
# not the membership. So its result on the release means nothing, whatever the number is. `INVALID` is a
# statement about the audit, not about the release. Repair the audit and begin again.
#
# | verdict | what it says |
# |---|---|
# | `PASS` | these attacks, at this power, found no relevant leak. A measurement |
# | `FAIL` | a leak was found, or the policy asks for a guarantee that is not there |
# | `NOT_ESTIMABLE` | too few patients to tell |
# | `INVALID` | a control failed, so nothing follows |
#
# ## A policy may ask for a guarantee
#
# Then no measurement can stand in for it. This is decided before any attack is looked at.

# %%
print(*AuditPolicy(epsilon_max=3).refusals(honest.privacy, len(train.unique_patients)))

# %% [markdown]
# ## The gate
#
# Only `PASS` goes through. On the command line `medistill release` ends with exit code 3 otherwise.

# %%
for name, found in {"nine real images": guilty, "honest": report, "another ward": confused}.items():
    try:
        check_gate(found, accept=frozenset({Verdict.PASS}))
        raise AssertionError("the gate let something pass")
    except MedistillError as refusal:
        print(f"--- {name}\n{refusal}\n")

# %% [markdown]
# A data owner may release nevertheless: `medistill release RUN --force-with-reason "…"`. Forcing opens the gate,
# and nothing else. The verdict stays what it is, and the reason is printed on the first page of the report.

# %%
reason = "These films come from a phantom; there is no patient to protect."
check_gate(report, accept=frozenset({Verdict.PASS}), forced_reason=reason)
folder = write_release(
    room / "release",
    distilled=honest,
    audit=report,
    diagnosis=None,
    cohort=None,
    snapshots=None,
    commands=("notebooks/03_reading_an_audit.py",),
    forced_reason=reason,
    licence="CC0-1.0",
)
assert reason in (folder / "report.html").read_text(encoding="utf-8")
assert reason in (folder / "README.md").read_text(encoding="utf-8")
print("verdict in the release:", verify_release(folder).verdict.value)
print(next(line for line in (folder / "README.md").read_text(encoding="utf-8").splitlines() if reason in line))

# %% [markdown]
# What an audit did not try is as much a part of it as what it tried:

# %%
for threat in report.not_tested:
    print("not tested:", threat)

# %% [markdown]
# `medistill audit` also writes `audit.html`, the page for the data protection officer. It shows the closest
# pairs of released and real images. So it shows patients, and it stays inside.

# %%
temporary.cleanup()
