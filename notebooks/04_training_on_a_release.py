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
# # Training on somebody's release
#
# A hospital has published a folder. You have films of your own and no other data. This notebook is your side:
# check the folder, train on it, use the model, know its limits, hand it on. It takes about a minute.
#
# Keep two things apart:
#
# - The folder states what is **guaranteed** about the patients behind it. You need not test that, and you could
#   not.
# - How well your model does is a **measurement**, on your films. The hospital cannot make it for you.
#
# What comes out is for research only. It is not a medical device.

# %%
import csv
import hashlib
import json
import shutil
import tempfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import onnxruntime
import pydicom
import torch
from IPython.display import Image
from matplotlib.figure import Figure
from pydicom.data import get_testdata_file
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader

from medistill import (
    MedistillError,
    OpenCurator,
    PhantomConfig,
    Schedule,
    cohort_summary,
    contact_sheet,
    load_model,
    load_release,
    predict_files,
    train_on_release,
    verify_release,
    write_phantom,
)
from medistill.cli import app
from medistill.distill import distill
from medistill.ingest import IngestConfig, SplitFractions, ingest
from medistill.release import load_signing_key, write_key_pair, write_release

temporary = tempfile.TemporaryDirectory(prefix="medistill-")
room = Path(temporary.name)


def shown(figure: Figure, alt: str) -> Image:
    """A plot as a picture."""
    page = BytesIO()
    figure.savefig(page, format="png", dpi=100)
    return Image(page.getvalue(), alt=alt)


# %% [markdown]
# ## Behind the curtain
#
# This one cell is the hospital. It makes a release of phantom patients and signs it. You do not see it in real
# life; the first notebook explains it. It is quick and skips the audit, and the release will say so.

# %%
write_phantom(room / "hospital" / "phantom", PhantomConfig(patients=80, size=48, difficulty=0.1))
cohort = ingest(
    room / "hospital" / "phantom" / "dicom",
    room / "hospital" / "cohort",
    key=hashlib.sha256(b"phantom").digest(),
    labels=room / "hospital" / "phantom" / "labels.csv",
    config=IngestConfig(
        size=32,
        ocr="never",
        classes=("no_gastritis", "gastritis", "outside"),
        fractions=SplitFractions(train=0.7, validation=0.1, holdout=0.1, test=0.1),
    ),
    jobs=1,
)
made = distill(
    OpenCurator(cohort.split("train").images(32)),
    method="distribution_matching",
    ipc=3,
    settings={
        "distribution_matching": {"networks": 4, "iterations": 80, "rate": 0.05, "formation": 2, "width": 16}
    },
)
fingerprint = write_key_pair(room / "hospital" / "ward")
release = write_release(
    room / "release",
    distilled=replace(made.distilled, schedule=Schedule(epochs=60, learning_rate=0.01)),
    audit=None,
    diagnosis=None,
    cohort=cohort_summary(cohort),
    snapshots=None,
    commands=("notebooks/04_training_on_a_release.py",),
    forced_reason="These films come from a phantom; there is no patient to protect.",
    licence="CC0-1.0",
    signing_key=load_signing_key(room / "hospital" / "ward.key"),
)
shutil.copy(room / "hospital" / "ward.pub", room / "from-their-web-page.pub")
shutil.rmtree(room / "hospital")
print(sorted(path.name for path in room.iterdir()))

# %% [markdown]
# From here on there is the folder, and the public key that you took from the hospital's web page. **Not from the
# folder:** whoever forges a folder forges the key in it as well.
#
# ## Check before use
#
# Nothing in the folder is ever run or unpickled. `verify_release` compares every byte with the seal, and the
# seal with the signature.

# %%
key = room / "from-their-web-page.pub"
verified = verify_release(release, key=key)
assert verified.signed_by == fingerprint
print(f"{verified.files} files, {verified.bytes} bytes, unchanged; signed by the key you gave")
print(verified.privacy)
print("audit verdict:", verified.verdict)

# %% [markdown]
# Change one byte of one file, and it is refused.

# %%
forged = shutil.copytree(release, room / "forged")
pixels = bytearray((forged / "images.safetensors").read_bytes())
pixels[-1] ^= 1
(forged / "images.safetensors").write_bytes(pixels)
try:
    verify_release(forged, key=key)
    raise AssertionError("a changed byte was not noticed")
except MedistillError as refusal:
    print(refusal)

# %% [markdown]
# A release that somebody else signed is refused as well. Here the key on the web page is another one.

# %%
write_key_pair(room / "somebody-else")
try:
    verify_release(release, key=room / "somebody-else.pub")
    raise AssertionError("another signature was not noticed")
except MedistillError as refusal:
    print(refusal)

# %% [markdown]
# A seal shows that the folder is whole and whose it is. It does not show that what it says is true. So read what
# it says, the warnings first.

# %%
card = json.loads((release / "card.json").read_text(encoding="utf-8"))
for warning in card["warnings"]:
    print("-", warning)

# %% [markdown]
# ## Look at it
#
# A release is a PyTorch dataset of images and soft labels. Any training loop can use it. Each of these images is
# a mosaic of four, and each tile counts as an image.

# %%
received = load_release(release, key=key)
names = received.distilled.task.class_names
images, soft_labels = next(iter(DataLoader(received, batch_size=len(received))))
print(f"{len(received.distilled)} images hold {len(images)} tiles of shape {tuple(images.shape[1:])}")
print("train by:", received.distilled.schedule)
captions = [names[label] for label in received.distilled.hard_labels.tolist()]
Image(contact_sheet(received.distilled.images, columns=6, captions=captions))

# %% [markdown]
# ## Train
#
# One call trains by the schedule that the release carries. Three networks begin with different weights and
# answer together: an *ensemble*. This takes seconds, because there is so little to look at.

# %%
model = load_model(train_on_release(release, room / "model", students=3))
print(f"{len(model.ensemble.members)} networks of the kind {model.network}, on {len(images)} tiles")
print("files are read as the hospital read them:", model.preprocessing.stated)

# %% [markdown]
# ## Predict
#
# Your own films: another phantom, from another seed, 36 patients whom the hospital has never seen. Files are
# read as the hospital's were: same window, same polarity, same size. Patients are numbered; no name is kept.

# %%
write_phantom(room / "mine", PhantomConfig(patients=36, seed=7, size=48, difficulty=0.1))
pictures: dict[int, torch.Tensor] = {}
found = predict_files(model, [room / "mine" / "dicom"], pictures=pictures)
print(f"{len(found.read)} films of {len(found.patients)} patients, refused: {found.refused}")
for one in found.patients[:4]:
    shares = "  ".join(f"{name} {share:.2f}" for name, share in zip(names, one.probabilities, strict=True))
    print(f"patient {one.patient}, {one.images} films: {one.decision:<14}{shares}")

# %% [markdown]
# For these films you know the truth. So you can measure, and the interval comes from drawing patients.

# %%
with (room / "mine" / "labels.csv").open(encoding="utf-8", newline="") as table:
    truth = {row["file"]: names.index(row["label"]) for row in csv.DictReader(table)}
labels = np.array([truth[film.name] for film in found.read])
patients = np.array([film.patient for film in found.read])
films = torch.stack([pictures[place] for place in sorted(pictures)])


def auroc(answers: np.ndarray, rows: np.ndarray | slice = slice(None)) -> float:
    """Mean AUROC of the classes."""
    return round(roc_auc_score(labels[rows], answers[rows], multi_class="ovr"), 3)


with torch.no_grad():
    for number, member in enumerate(model.ensemble.members, start=1):
        print(f"network {number}: AUROC {auroc(member(films).double().softmax(1).numpy())}")
answers = np.array([film.probabilities for film in found.read])
draws, generator = [], np.random.default_rng(0)
for _ in range(100):
    drawn = generator.choice(patients.max(), patients.max()) + 1
    draws.append(auroc(answers, np.concatenate([np.flatnonzero(patients == patient) for patient in drawn])))
low, high = np.quantile(draws, (0.025, 0.975))
print(f"together:  AUROC {auroc(answers)}, 95 % over patients from {low:.3f} to {high:.3f}")

# %% [markdown]
# The interval is wide next to how little the members differ. Nothing here shows that the ensemble is better than
# they are. What it does is to make the answer depend less on the luck of one start.
#
# ## Calibration
#
# If a model says 0.8 a hundred times, it should be right about eighty times. The model's temperature was found
# on released images that the networks had not seen, or by the hospital on real patients, if the release says so.

# %%
print("temperature", round(model.calibration.temperature, 3), "from:", model.calibration.source)
certainty, right = answers.max(1), answers.argmax(1) == labels
bins = np.digitize(certainty, (0.5, 0.65, 0.8))
axes = (figure := Figure(figsize=(4.6, 4.2), layout="constrained")).add_subplot()
for place in np.unique(bins):
    inside = bins == place
    count, share = inside.sum(), right[inside].mean()
    axes.errorbar(certainty[inside].mean(), share, yerr=1.96 * np.sqrt(share * (1 - share) / count), fmt="o")
    axes.annotate(f"{count} films", (certainty[inside].mean(), share), xytext=(6, 6), textcoords="offset points")
axes.plot([0.3, 1], [0.3, 1], ":", color="grey")
axes.set(xlabel="how certain the model is", ylabel="how often it is right", xlim=(0.3, 1), ylim=(0, 1.05))
print(f"certain on average: {certainty.mean():.2f}, right: {right.mean():.2f}, of {len(right)} films")
shown(figure, "Share of right decisions against certainty, with the number of films at each point.")

# %% [markdown]
# No real patient is behind a temperature found on released images, and one above 1, which would lower all
# certainty, is never taken from them. So a model that is too certain stays so, until somebody draws this plot on
# films of their own. The bars are too short, by the way: films of one patient are not independent.
#
# ## Films of another kind
#
# A model answers whatever it is shown. So each prediction has a flag: is this image unlike those of the release?
# We try films with a wrong polarity in the header, films turned by a quarter, a CT slice, and a text file.

# %%
odd = room / "odd"
odd.mkdir()
plain = [
    film.name
    for film in found.read
    if not pydicom.dcmread(room / "mine" / "dicom" / film.name).file_meta.TransferSyntaxUID.is_compressed
][:10]
for number, name in enumerate(plain):
    film = pydicom.dcmread(room / "mine" / "dicom" / name)
    film.PixelData = np.ascontiguousarray(np.rot90(film.pixel_array)).tobytes()
    film.save_as(odd / f"turned-{number}.dcm")
    film = pydicom.dcmread(room / "mine" / "dicom" / name)
    film.PhotometricInterpretation = "MONOCHROME" + {"1": "2", "2": "1"}[film.PhotometricInterpretation[-1]]
    film.save_as(odd / f"polarity-{number}.dcm")
shutil.copy(get_testdata_file("CT_small.dcm"), odd / "ct-0.dcm")
(odd / "notes-0.txt").write_text("not a film")
strange = predict_files(model, [odd])
flagged = {
    kind: [one.out_of_distribution for one in strange.read if one.name.startswith(kind)]
    for kind in ("turned", "polarity", "ct")
}
flagged["your own films"] = [one.out_of_distribution for one in found.read]
for kind, flags in flagged.items():
    print(f"{kind}: {sum(flags)} of {len(flags)} flagged")
assert np.mean(flagged["turned"]) > np.mean(flagged["your own films"]) < np.mean(flagged["polarity"])
print("not read:", strange.refused)

# %% [markdown]
# Some of your good films are flagged too: released images are few and vary less than patients do. And a rare
# disease that looks ordinary is not flagged. The flag says "look again", not "this is wrong".
#
# ## Where it looks
#
# From here on we use the command line, as you would on a server. `--explain` covers a part of the film with grey
# and watches the answer: red speaks for the decision, blue against it.


# %%
def medistill(*words: str | Path) -> None:
    """The command line, without starting another program for it."""
    app(["--quiet", *map(str, words)], standalone_mode=False)


mine = [room / "mine" / "dicom" / name for name in plain[:2]]
medistill("predict", room / "model", *mine, "--by", "patient", "--explain", room / "pictures")
pictures_of_it = sorted((room / "pictures").iterdir())
Image(pictures_of_it[0].read_bytes(), alt="A film, and the same film under the map of what the model uses.")

# %% [markdown]
# It shows what this model uses. That need not be what a physician would use, and a pretty map does not make the
# answer right.
#
# ## Hand it on
#
# ONNX is one file that runs without medistill and without PyTorch. Writing it needs the extra `export`; it is
# checked before it appears. The flag for films of another kind does not travel with it. (`--format monai-bundle`
# writes a folder that MONAI's tools run.)

# %%
medistill("export", room / "model", "--format", "onnx", "--out", room / "model.onnx")
options = onnxruntime.SessionOptions()
options.log_severity_level, options.intra_op_num_threads = 3, 1
session = onnxruntime.InferenceSession(room / "model.onnx", options, providers=["CPUExecutionProvider"])
exported = session.run(["probabilities"], {"images": films.numpy()})[0]
print(f"largest difference on your films: {np.abs(exported - answers).max():.1e}")
assert np.abs(exported - answers).max() < 1e-4
print("what it says of itself:", session.get_modelmeta().custom_metadata_map["notice"])

# %% [markdown]
# What the model carries on from the release: what was guaranteed about the patients, and where it came from.
# Whatever you do with a release costs its patients nothing more; where nothing was guaranteed, nothing is now.

# %%
origin = json.loads(session.get_modelmeta().custom_metadata_map["origin"])
print("release:", origin["release"][:16], "…")
print("privacy:", origin["privacy"]["reason"])

# %%
temporary.cleanup()
