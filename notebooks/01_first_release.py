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
# # A first release
#
# A hospital has images that may not be shared. medistill turns them into a few synthetic images with soft labels.
# Those few images are the *release*. Somebody else can train a diagnostic model on them.
#
# This notebook goes the whole way once: **ingest → distill → audit → evaluate → release**.
# No patient is needed. A program draws the images, and everything happens in a temporary folder.
# It takes about a minute.
#
# Two words stay apart from beginning to end:
#
# - A **guarantee** is proved. It holds against every attacker. Differential privacy gives one, and this version of
#   medistill does not add any noise, so nothing here is guaranteed.
# - A **measurement** was observed. An attack was tried, and it found something or it did not. The next attack may
#   do better.
#
# The unit is the **patient**. A patient with four films counts once, and all four films stay together.

# %%
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pydicom
import torch
from IPython.display import Image

from medistill import (
    MedistillError,
    OpenCurator,
    PhantomConfig,
    Schedule,
    Verdict,
    cohort_summary,
    contact_sheet,
    load_release,
    train_on_release,
    verify_release,
    write_phantom,
)
from medistill.audit import AuditPolicy, audit
from medistill.distill import distill
from medistill.evaluate import EvaluationConfig, evaluate
from medistill.ingest import IngestConfig, SplitFractions, ingest, load_or_create_key
from medistill.release import check_gate, write_release

temporary = tempfile.TemporaryDirectory(prefix="medistill-")
room = Path(temporary.name)

# %% [markdown]
# ## The images
#
# The phantom imitates X-ray films of the stomach. It has three classes: gastritis, no gastritis, and films that
# show something else. With your own data you skip this cell. You need a folder of DICOM files and a CSV of
# labels.

# %%
phantom = write_phantom(room / "phantom", PhantomConfig(patients=60, size=64, difficulty=0.2))
print(f"{phantom.images} images of {phantom.patients} patients")
print((room / "phantom" / "labels.csv").read_text()[:240])

# %% [markdown]
# A DICOM header names the patient. The names below are made up, but they are where real names would be.

# %%
files = sorted(path for path in (room / "phantom" / "dicom").rglob("*") if path.is_file())
header = pydicom.dcmread(files[0], stop_before_pixels=True)
for keyword in ("PatientName", "PatientID", "PatientBirthDate", "StudyDate", "Modality"):
    print(f"{keyword:<17} {header.get(keyword)}")

# %% [markdown]
# Here are twelve films as they are stored. Some are inverted: DICOM knows both polarities. Brightness differs too.
# Ingestion sees to both.
#
# Some films carry their patient's name in the pixels. Where the header says so, ingestion turns the film away
# unseen; it searches all others for lines of text. With the extra `ocr` it can read what it suspects, here it goes
# by shape alone.


# %%
def stored_pixels(path: Path) -> torch.Tensor:
    """Pixels of a file, scaled for looking at."""
    pixels = torch.from_numpy(pydicom.dcmread(path).pixel_array.astype("float32"))
    return ((pixels - pixels.min()) / (pixels.max() - pixels.min()))[None]


Image(contact_sheet(torch.stack([stored_pixels(path) for path in files[:12]]), columns=6))

# %% [markdown]
# ## Ingest
#
# Ingestion reads every file and replaces every identifier under a secret key. What comes out is
# *pseudonymised*: who holds the key can find the patient again. So the key stays in the hospital, outside the
# cohort.
#
# A file that cannot be used goes to quarantine with a reason. None is dropped silently.

# %%
cohort = ingest(
    room / "phantom" / "dicom",
    room / "cohort",
    key=load_or_create_key(room / "hospital.key"),
    labels=room / "phantom" / "labels.csv",
    config=IngestConfig(
        size=64,
        ocr="never",
        classes=("no_gastritis", "gastritis", "outside"),
        fractions=SplitFractions(train=0.4, validation=0.2, holdout=0.2, test=0.2),
    ),
    private_notes=room / "quarantine.private.csv",
    jobs=1,
)
print(cohort.profile["counts"])
print(cohort.instances[0])

# %% [markdown]
# Every patient is in exactly one split.
#
# | split | what it is for |
# |---|---|
# | train | distilled from |
# | validation | choosing how a model is trained, and calibrating the attacks |
# | holdout | never distilled from: the audit compares its patients with train patients |
# | test | measuring diagnosis |

# %%
for name, row in cohort.counts().items():
    print(f"{name:<11}", "  ".join(f"{what} {count}" for what, count in row.items()))

# %% [markdown]
# We read the images at 32 × 32 pixels, to be quick. The polarity is now the same everywhere.

# %%
train, validation, holdout, test = (
    cohort.split(name).images(32) for name in ("train", "validation", "holdout", "test")
)
names = cohort.task.class_names
Image(contact_sheet(train.images[:12], columns=6, captions=[names[c] for c in train.classes[:12].tolist()]))

# %% [markdown]
# ## Distil
#
# The *curator* holds the train patients and answers questions about them. The open curator answers exactly. It
# guarantees nothing, and it says so.
#
# Distillation starts from noise and changes the pixels until the images teach a network what the real ones teach.
# The numbers below are far smaller than the defaults. They keep this notebook short, and the images suffer for it.
#
# A release says how a network is to be trained on it: its *schedule*. Here we name a short one. Given
# `validation=validation`, `distill` tries five on the validation patients and takes the best, which takes longer
# than the images do.

# %%
made = distill(
    OpenCurator(train),
    ipc=2,
    settings={
        "distribution_matching": {"networks": 4, "iterations": 120, "width": 16},
        "kernel_ridge": {"iterations": 20, "real_batch": 32, "pool": 3, "width": 16},
    },
)
release = replace(made.distilled, schedule=Schedule(epochs=60, learning_rate=0.01))
print(f"{len(release)} images made from {len(train)} images of {len(train.unique_patients)} patients")
print(release.privacy.sentence)

# %% [markdown]
# That last sentence is the guarantee, or rather its absence. It travels with the release and cannot be left out.
#
# Now look at the images: first the noise they began as, then what came of it. Do you recognise a film from above?
# You should not. But not recognising one proves nothing. That is why there is an audit.

# %%
Image(contact_sheet(made.snapshots["start"], columns=6))

# %%
Image(contact_sheet(release.images, columns=6, captions=[names[c] for c in release.hard_labels.tolist()]))

# %% [markdown]
# Each image has a *soft label*: a share for every class. It says how much the image teaches about each of them.

# %%
print(f"{'made for':<14}" + "".join(f"{name:>14}" for name in names))
for made_for, shares in zip(release.hard_labels.tolist(), release.soft_labels.tolist(), strict=True):
    print(f"{names[made_for]:<14}" + "".join(f"{share:>14.2f}" for share in shares))

# %% [markdown]
# ## Audit
#
# Now we attack our own release. Can somebody who has a patient's images tell whether that patient was among
# those it was distilled from? Is a released image a copy of a patient's image?
#
# An attack that finds nothing may be a bad attack. So every attack stands beside two controls:
#
# - **positive**: a release that leaks for sure. The attack must find the leak.
# - **negative**: a release made from other patients. The attack must find nothing.
#
# If a control fails, the verdict is `INVALID`, and nothing follows about the release.
#
# The profile `quick` makes few attacks, so that this notebook takes a minute. Without it there are more: through
# the soft labels, through the means of the classes, and by distilling many releases like this one.

# %%
policy = AuditPolicy(profile="quick")
report = audit(release, train=train, holdout=holdout, reference=validation, policy=policy)
for outcome in report.outcomes:
    print(f"{outcome.attack}: {outcome.verdict.value}\n  {outcome.question}\n  {outcome.summary}")
    for control in outcome.controls:
        print(f"  {'passed' if control.passed else 'FAILED'}: {control.name}; {control.observed}")

# %% [markdown]
# An AUROC of 0.5 is guessing, 1.0 is certainty. The brackets are the interval.
#
# With so few patients the interval is wide. Only a very large leak would have been seen. So the best possible
# verdict is `NOT_ESTIMABLE`: *we cannot tell*. That differs from `PASS`, which needs at least 200 attacked
# patients. And even `PASS` is a measurement: this attack, at this power, found no relevant leak.
#
# What was not tried is written down too:

# %%
print(f"verdict: {report.verdict.value}")
for threat in report.not_tested:
    print("  not tested:", threat)

# %% [markdown]
# ## Evaluate
#
# What is the release worth? We train networks on all real images (`real`), on as many real images as the
# release has (`random`), on the release (`distilled`), and on the release with plain labels (`distilled_hard`).
# All are tested on patients that nobody has looked at. The intervals come from drawing patients, not images.

# %%
diagnosis = evaluate(
    release,
    train=train,
    validation=validation,
    tests={"test": test},
    config=EvaluationConfig(arms=("real", "random", "distilled", "distilled_hard"), seeds=2, real_epochs=12),
    seed=0,
)
for arm in diagnosis.arms:
    print(f"{arm.arm:<15} {arm.images:>3} images  AUROC {arm.metrics['auroc']}")

# %% [markdown]
# A dozen test patients give wide intervals. Do not rank the arms by the first number when the brackets overlap.
#
# ## Release
#
# The gate lets a release out only if its audit passed. Ours did not.

# %%
try:
    check_gate(report, accept=frozenset({Verdict.PASS}))
except MedistillError as refusal:
    print(refusal)

# %% [markdown]
# For patients, the answer is to hold out more of them and to begin again. A phantom hides nobody, so we give a
# reason and go on. The reason is printed on the first page of the report, for everyone to read.

# %%
reason = "These images come from a phantom; there is no patient to protect."
check_gate(report, accept=frozenset({Verdict.PASS}), forced_reason=reason)
folder = write_release(
    room / "release",
    distilled=release,
    audit=report,
    diagnosis=diagnosis,
    cohort=cohort_summary(cohort),
    snapshots=made.snapshots,
    commands=("notebooks/01_first_release.py",),
    forced_reason=reason,
    licence="CC0-1.0",
)
for path in sorted(path for path in folder.rglob("*") if path.is_file()):
    print(f"{path.stat().st_size:>8} bytes  {path.relative_to(folder)}")

# %% [markdown]
# `report.html` is the page for your data protection officer. Only this folder leaves the hospital. The cohort,
# the key and the list of quarantined files stay.
#
# ## The receiver
#
# From here on we are somebody else. We have the folder and nothing besides. First check that it is whole and
# unchanged.

# %%
verified = verify_release(folder)
print(f"{verified.files} files unchanged, audit verdict: {verified.verdict}")
print(verified.privacy)

# %% [markdown]
# A release is a PyTorch dataset of images and soft labels.

# %%
received = load_release(folder)
image, soft_label = received[0]
print(len(received), tuple(image.shape), soft_label.tolist())
print(received.distilled.schedule)

# %% [markdown]
# The schedule says how to train on it. One call does that and saves the weights.

# %%
model = train_on_release(folder, room / "model")
print(sorted(path.name for path in model.iterdir()))
print(json.loads((model / "model.json").read_text())["notice"])

# %% [markdown]
# Clear up: the temporary folder goes, with the phantom and the key.
#
# Next: `medistill demo` does the same on 400 phantom patients. `pipelines/hospital_release.py` is the same for
# your own DICOM files, as a script you can change.

# %%
temporary.cleanup()
