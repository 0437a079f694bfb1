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
# # What epsilon buys
#
# Epsilon is a number that a data owner chooses. It says how much a release may give away about any one patient.
# Small is safe and noisy. Large is clear and promises little.
#
# This notebook shows both sides: first what is **guaranteed**, then what it costs. It takes about a minute.
#
# - A **guarantee** is proved before a patient is touched. It holds against every attacker, also those who come
#   later.
# - A **measurement** is what we see when we try. Everything about diagnosis below is a measurement, and the
#   cohort is tiny, so the measurements are coarse.
#
# They stand in separate parts of the notebook, and no figure shows both.

# %%
import hashlib
import itertools
import math
import tempfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from IPython.display import Image
from matplotlib.figure import Figure
from scipy.stats import norm

from medistill import (
    Budget,
    Ledger,
    MedistillError,
    OpenCurator,
    PhantomConfig,
    Schedule,
    Task,
    contact_sheet,
    write_phantom,
)
from medistill.distill import distill_privately, foresee, run_recipe
from medistill.evaluate import EvaluationConfig, evaluate
from medistill.ingest import IngestConfig, SplitFractions, ingest

temporary = tempfile.TemporaryDirectory(prefix="medistill-")
room = Path(temporary.name)


def shown(figure: Figure, alt: str) -> Image:
    """A plot as a picture."""
    page = BytesIO()
    figure.savefig(page, format="png", dpi=100)
    return Image(page.getvalue(), alt=alt)


# %% [markdown]
# ## The plan comes first
#
# No image exists yet. Still we can say everything about the guarantee. We name the classes, the size of an
# image, the method and epsilon. The method declares what it will ask about the patients, and the noise follows
# from that.
#
# `distribution_matching` asks two questions. Both are sums over patients. The private default, `surrogate`, asks
# the same two and makes better images of the answers, but takes minutes.
#
# On the command line this is `medistill privacy plan CONFIG`.

# %%
task = Task.single_label(("no_gastritis", "gastritis", "outside"))
epsilons = (1, 3, 8)
plans = {
    epsilon: foresee(
        task,
        (1, 32, 32),
        epsilon=epsilon,
        delta=1e-5,
        method="distribution_matching",
        ipc=2,
        settings={"distribution_matching": {"iterations": 100}},
    )
    for epsilon in epsilons
}
for query in plans[3].plan.queries:
    print(f"asked {query.count} time: {query.purpose}")
print("\ntaken as public, among other things:")
for assumption in plans[3].assumptions[:3]:
    print(" -", assumption)

# %% [markdown]
# A method that needs the images themselves cannot be private. It is refused here, not after hours of work.

# %%
try:
    foresee(task, (1, 32, 32), epsilon=3, method="coreset")
except MedistillError as refusal:
    print(refusal)

# %% [markdown]
# ## The guarantee, in words
#
# Think of the worst attacker. They know every other patient of the cohort. They hold all films of one more
# patient. They know the program and have unlimited time. One thing they do not know: **was this patient in the
# cohort?** Before they see the release, a coin decides: they are right half of the time.
#
# Epsilon and delta bound how often they are right afterwards, whatever they do:
#
# $$\text{right} \le \frac{e^\epsilon + \delta}{e^\epsilon + 1}$$
#
# We can say more, because we know what the noise is. The two answers together are no clearer than a single
# number drawn from a bell curve, moved by $\mu$ where the patient is in, with $\mu^2 = \sum_i 1 / \sigma_i^2$
# over the noise multipliers $\sigma_i$. Against that, the best possible guess is right with probability
# $\Phi(\mu / 2)$.


# %%
def distance(noise_multipliers: tuple[float, ...]) -> float:
    """How far the two bell curves lie apart: the patient is in, or is not."""
    return math.sqrt(sum(sigma**-2 for sigma in noise_multipliers))


print(f"{'epsilon':>8}{'by epsilon alone':>19}{'by the noise':>15}{'members found at 1 % false alarms':>36}")
for epsilon, plan in plans.items():
    mu = distance(plan.calibrated.noise_multipliers)
    alone, best = (math.exp(epsilon) + 1e-5) / (math.exp(epsilon) + 1), norm.cdf(mu / 2)
    assert best <= alone  # both are proved, so they cannot contradict each other
    print(f"{epsilon:>8}{alone:>19.2%}{best:>15.1%}{norm.cdf(norm.ppf(0.01) + mu):>36.1%}")

# %% [markdown]
# The last column: the attacker accuses members, and may wrongly accuse one stranger in a hundred. How many of
# the members do they find at best? Here is the same for every number of false alarms. Both axes are logarithmic:
# to the left are the attackers who want to be sure.
#
# No attack is in this figure. The curves are ceilings.

# %%
alarms = np.geomspace(1e-4, 1, 200)
axes = (figure := Figure(figsize=(5.5, 4.2), layout="constrained")).add_subplot()
for epsilon, plan in plans.items():
    found = norm.cdf(norm.ppf(alarms) + distance(plan.calibrated.noise_multipliers))
    axes.loglog(alarms, found, label=f"epsilon {epsilon}")
axes.loglog(alarms, alarms, ":", color="grey", label="guessing")
axes.set(xlabel="strangers accused", ylabel="members found, at most", ylim=(1e-4, 1.1))
axes.set_title("Guarantee: no attacker is above these curves")
axes.legend()
shown(figure, "Largest share of members found against share of strangers accused, for epsilon 1, 3 and 8.")

# %% [markdown]
# What the guarantee does **not** say:
#
# - It is about single patients. What follows from all of them together, such as how gastritis looks, is meant to
#   be learned.
# - It says nothing about whether a diagnosis is right.
# - It holds if what is taken as public really is. If somebody tuned the settings on these patients, it is wrong.
# - Two releases of the same patients together promise less than either of them. The ledger below counts that.
#
# ## The price, before anything is paid
#
# The same noise is shared by all patients. So it hurts a small cohort much and a large one hardly at all. The
# table holds the length of the noise over the length of what is to be seen. Above 0.8 little can be learned;
# `inf` means that a class is not seen at all. This too needs no data.

# %%
cohorts = (60, 600, 6000)
print(f"{'epsilon':>8}" + "".join(f"{patients:>10} patients" for patients in cohorts))
for epsilon, plan in plans.items():
    noise = [plan.expect(patients).noise_to_signal for patients in cohorts]
    print(f"{epsilon:>8}" + "".join(f"{level:>19.3f}" for level in noise))

# %% [markdown]
# ## The patients
#
# Now the phantom draws films of 120 patients, as in the first notebook. About 65 are distilled from. The table
# above has told us what to expect.
#
# A phantom hides nobody, so its key may stand here, and every run divides the patients alike.

# %%
write_phantom(room / "phantom", PhantomConfig(patients=120, size=48, difficulty=0.1))
cohort = ingest(
    room / "phantom" / "dicom",
    room / "cohort",
    key=hashlib.sha256(b"phantom").digest(),
    labels=room / "phantom" / "labels.csv",
    config=IngestConfig(
        size=32,
        ocr="never",
        classes=task.class_names,
        fractions=SplitFractions(train=0.55, validation=0.1, holdout=0.1, test=0.25),
    ),
    jobs=1,
)
train, validation, test = (cohort.split(name).images(32) for name in ("train", "validation", "test"))
print(f"{len(train.unique_patients)} patients to distil from, {len(test.unique_patients)} to test on")

# %% [markdown]
# ## Spending
#
# Each cohort has one *ledger*. It is opened with a budget for the cohort's lifetime. A release is written down
# in full before its first answer, and it counts even if nothing comes of it.
#
# The noise is drawn anew by the operating system each time and depends on no seed. Your numbers will differ from
# anybody else's. With so few patients a release can also fail: then a class is not seen through the noise.

# %%
ledger = Ledger(room / "cohort" / "ledger.jsonl", lifetime=Budget(epsilon=10, delta=1e-5))
releases = {}
for epsilon, plan in plans.items():
    try:
        releases[f"epsilon {epsilon}"] = distill_privately(train, plan, ledger=ledger).distilled
    except MedistillError as refusal:
        print(f"epsilon {epsilon}: {refusal}")
    print(f"after epsilon {epsilon}, together: {ledger.spent().epsilon:.2f} of {ledger.lifetime.epsilon:g}")
assert len(ledger.reservations()) == len(epsilons)

# %% [markdown]
# Together they cost less than the sum of their epsilons. Noises do not line up.
#
# Now a colleague wants another release at epsilon 8. The ledger refuses. Nothing was drawn, so nothing was lost.

# %%
before = ledger.spent().epsilon
try:
    distill_privately(train, plans[8], ledger=ledger)
    raise AssertionError("the ledger let a release pass that the lifetime budget does not allow")
except MedistillError as refusal:
    print(refusal)
assert ledger.spent().epsilon == before
left = ledger.left()
print("\nleft for one more release:", "nothing" if left is None else f"epsilon {left:.2f}")

# %% [markdown]
# The ledger is an ordinary file whose lines depend on each other. A line that is edited or taken out is noticed,
# and from then on nothing more may be asked. Whoever deletes the whole file deceives themselves: keep a copy of
# its head elsewhere.
#
# ## Measured: what is it worth?
#
# For comparison, the same method without privacy. It may then look at the films as often as it likes, and it
# matches random networks on them in place of the two noisy sums. It guarantees nothing, and says so.

# %%
releases["no privacy"] = run_recipe(plans[8].recipe, OpenCurator(train)).distilled
for name, release in releases.items():
    print(f"{name}: {release.privacy.sentence}")

# %% [markdown]
# One row per release, two images per class. None of them looks like a film, the last row least of all, and that
# is the one without any guarantee. Looks tell nothing about privacy.

# %%
captions = [name for name, release in releases.items() for _ in range(len(release))]
Image(contact_sheet(torch.cat([release.images for release in releases.values()]), columns=6, captions=captions))

# %% [markdown]
# One network is trained on each release, shortly, and one on all real images. All are tested on the same patients,
# from whom nothing was chosen. The brackets come from drawing these patients anew, and there are about thirty of
# them. One noise was drawn for each epsilon; another draw would move the numbers again, and the brackets do not
# know that.
#
# These numbers are computed on patients. No epsilon covers them.

# %%
measured = {}
for name, release in releases.items():
    arms = ("distilled",) if name != "no privacy" else ("distilled", "real")
    config = EvaluationConfig(arms=arms, seeds=1, draws=300)
    short = replace(release, schedule=Schedule(epochs=80, learning_rate=0.01))
    report = evaluate(short, train=train, validation=validation, tests={"test": test}, config=config)
    measured |= {name if arm.arm == "distilled" else "real images": arm.metrics["auroc"] for arm in report.arms}
for name, auroc in measured.items():
    print(f"{name:<12} AUROC {auroc}")

# %%
axes = (figure := Figure(figsize=(5.5, 3.4), layout="constrained")).add_subplot()
places = range(len(measured))
values = np.array([auroc.value for auroc in measured.values()])
ends = np.array([(auroc.low, auroc.high) for auroc in measured.values()]).T
axes.errorbar(places, values, yerr=np.abs(ends - values), fmt="o", capsize=4)
axes.axhline(0.5, color="grey", linestyle=":")
axes.set(xticks=places, xticklabels=list(measured), ylabel="AUROC on test patients", ylim=(0.2, 1))
axes.set_title("Measurement: one noise each, few patients")
shown(figure, "AUROC on test patients with intervals, for every release and for real images.")

# %% [markdown]
# Do not rank what overlaps.

# %%
pairs = list(itertools.combinations(measured.items(), 2))
apart = [(a, b) for (a, first), (b, second) in pairs if first.high < second.low or second.high < first.low]
print(f"{len(pairs) - len(apart)} of {len(pairs)} pairs have brackets that overlap, so nothing ranks them.")
for one, other in apart:
    print(f"apart: {one} and {other}")

# %% [markdown]
# Sixty patients are too few for a private release that is of use. The table of noise said so beforehand, without
# any patient. With thousands of patients the noise is hardly felt:

# %%
print(foresee(task, (1, 28, 28), epsilon=3).utility)

# %% [markdown]
# ## What to take home
#
# - Choose epsilon by what it guarantees, before you look at what it costs. At 1 the worst attacker hardly beats
#   the coin. At 8 the formula alone promises next to nothing, and what remains is owed to the noise.
# - If the images are of no use at that epsilon, find more patients. Trying again spends the budget a second
#   time.
# - A release without epsilon can still be measured. That is what an audit does, and the next notebook reads one.
#   It never becomes a guarantee.
#
# `medistill distill COHORT --epsilon 3` does all this with the ledger beside the cohort; `medistill privacy
# ledger COHORT` shows what was spent. The proofs and their limits are in `medistill/privacy/README.md`.

# %%
temporary.cleanup()
