"""Which architecture is best for these patients? Asked of a distilled set, beside the answer of all real images.

Example::

    python pipelines/architecture_ranking.py --cohort COHORT --size 28 --out runs/ranking

Every architecture is trained on all real images of the train split for a few epochs (the reference), a distilled
set, as many random real images and, with ``--coreset``, chosen ones; validation patients judge it. ``regret`` is
what the chosen one, trained on all real images, lacks of the best AUROC on test patients. CPU seconds are those of
the trainings; distillation, done once, is not counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.figure import Figure
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from medistill import DistilledSet, ImageSet, MedistillError, OpenCurator, Schedule, TerminalProgress, load_cohort
from medistill.distill import distill
from medistill.registry import NETWORKS
from medistill.training import Student, train_students

REAL = Schedule(epochs=4, learning_rate=1e-3, optimizer="adam", batch_size=64)
QUICK = {"distribution_matching": {"networks": 2, "iterations": 20}}
COLUMNS = ("validation", "test", "cpu_seconds")  # AUROC on the first two
Parts, Scores = dict[str, ImageSet], dict[str, dict[str, list[list[float]]]]  # set, architecture, seed, column


def architectures(quick: bool) -> dict[str, Callable[..., Any]]:
    """ConvNets of several widths, depths and norms, and other registered networks."""
    convnet, grid = NETWORKS.load("convnet"), product((8, 16, 32), (1, 2, 3), ("instance", "none"))
    grid = product((4, 16), (1, 2), ("instance",)) if quick else grid
    family = {f"convnet {w}x{d} {n}": partial(convnet, width=w, depth=d, norm=n) for w, d, n in grid}
    others = ("mlp",) if quick else ("alexnet", "lenet", "mlp", "resnet", "vit")
    return {**family, **{name: NETWORKS.load(name) for name in others}}


def small_sets(run: Callable[..., Any], method: str, coreset: str, quick: bool) -> dict[str, DistilledSet]:
    """The distilled set, and real images in the same number to be trained on by the same schedule."""
    sets = {"distilled": run(method=method, settings=QUICK if quick else None).distilled}
    for rule in dict.fromkeys(("random", coreset or "random")):
        sets[rule] = run(method="coreset", settings={"coreset": {"selection": rule}}, validation=None).distilled
    schedule = replace(sets["distilled"].schedule, **({"epochs": 15} if quick else {}))
    return {name: replace(one, schedule=schedule) for name, one in sets.items()}


def trainings(parts: Parts, sets: dict[str, DistilledSet], seeds: int, quick: bool) -> dict[str, Student]:
    """Every architecture on every set, by a key of all that its result depends on."""
    train, work = parts["train"], {}
    judged = {judge: parts[judge].images.numpy() for judge in COLUMNS[:2]}
    seen = hashlib.sha256(b"".join(x.numpy().tobytes() for p in parts.values() for x in (p.images, p.targets)))
    data = {"real": (train.images, train.targets, replace(REAL, epochs=1) if quick else REAL, seen.hexdigest())}
    for name, one in sets.items():
        data[name] = (one.images, one.soft_labels, one.schedule, seen.hexdigest() + one.fingerprint())
    jobs = product(data.items(), architectures(quick).items(), range(seeds))
    for (name, (images, labels, schedule, made)), (network, factory), seed in jobs:
        work[json.dumps([name, network, seed, asdict(schedule), made])] = Student(
            network=factory, task=train.task, images=images.numpy(), soft_labels=labels.numpy(),
            schedule=schedule, weights_seed=seed, order_seed=seed, apply_to=judged,
        )  # fmt: skip
    return work


def train_all(file: Path, parts: Parts, work: dict[str, Student], show: TerminalProgress) -> Scores:
    """AUROC and CPU seconds of every training, seed by seed; what is on file is not repeated."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    rows = dict(json.loads(line) for line in lines if line.endswith("]\n"))  # the last one may be torn
    left = {key: student for key, student in work.items() if key not in rows}
    file.write_text("".join(json.dumps(item) + "\n" for item in rows.items()), encoding="utf-8")
    trained, total, done = train_students(list(left.values())), len(work), len(work) - len(left)
    for key, one in zip(left, show.track(trained, "training", total=total, completed=done), strict=True):
        aurocs = [roc_auc_score(parts[judge].targets, one.probabilities[judge]) for judge in COLUMNS[:2]]
        rows[key] = [*aurocs, one.cpu_seconds]
        with file.open("a", encoding="utf-8") as log:
            log.write(json.dumps([key, rows[key]]) + "\n")
    scores: Scores = {}
    for key in work:
        name, network, *_ = json.loads(key)
        scores.setdefault(name, {}).setdefault(network, []).append(rows[key])
    return scores


@np.errstate(invalid="ignore")  # a draw within which nothing differs has no correlation
def compare(scores: Scores, name: str) -> dict[str, Any]:
    """How a set ranks the architectures beside the reference (95 % bootstrap over them), and at what cost."""
    own, _, seconds = np.mean(list(scores[name].values()), axis=1).T
    reference, tested, slow = np.mean(list(scores["real"].values()), axis=1).T
    drawn = np.random.default_rng(0).integers(len(own), size=(2000, len(own)))
    both = [values[np.vstack([range(len(own)), drawn])] for values in (own, reference)]
    ranks = (rankdata(values, axis=1) - (len(own) + 1) / 2 for values in both)
    signs = (np.sign(values[:, None] - values[..., None]).reshape(len(values), -1) for values in both)
    found, best = {}, own.argmax()
    for label, (x, y) in (("spearman", ranks), ("kendall", signs)):  # both are cosines
        cosines = (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))
        found[label] = [cosines[0], *np.nanpercentile(cosines[1:], [2.5, 97.5])]
    found |= {"regret": tested.max() - tested[best], "cpu_seconds": seconds.sum()}
    return {**found, "times_faster": slow.sum() / seconds.sum(), "chosen": list(scores[name])[best]}


def main(
    cohort: Annotated[Path, typer.Option(help="Cohort folder, made by `medistill ingest`.")],
    out: Annotated[Path, typer.Option(help="Folder of the result, stays inside; an interrupted command goes on.")],
    size: Annotated[int, typer.Option(min=16, help="Side length of the images in pixels.")] = 28,
    ipc: Annotated[int, typer.Option(min=1, help="Images per class.")] = 10,
    method: Annotated[str, typer.Option(help="How to distil; `medistill list distillers`.")] = "auto",
    coreset: Annotated[str, typer.Option(help="Chosen real images as well: herding or k_center.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of every architecture on every set.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Try every step; the figures are of no use.")] = False,
) -> None:
    """Rank architectures on a distilled set and compare with the ranking on all real images."""
    show = TerminalProgress()
    try:
        parts = {name: load_cohort(cohort).split(name).images(size) for name in ("train", *COLUMNS[:2])}
        run = partial(distill, OpenCurator(parts["train"]), ipc=ipc, folder=out / "checkpoints", progress=show)
        run = partial(run, validation=None if quick else parts["validation"])
        sets = small_sets(run, "distribution_matching" if quick else method, coreset, quick)
        scores = train_all(out / "trainings.jsonl", parts, trainings(parts, sets, seeds, quick), show)
    except MedistillError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    result = {"compared": {n: compare(scores, n) for n in scores}, "columns": COLUMNS, "scores": scores}
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    axes = (figure := Figure(layout="constrained")).add_subplot()
    means = {name: np.mean(list(runs.values()), axis=1)[:, 0] for name, runs in scores.items()}
    axes.plot(means.pop("real"), np.transpose(list(means.values())), "o", label=list(means))
    axes.set(xlabel="validation AUROC, trained on all real images", ylabel="trained on few images")
    axes.legend()
    figure.savefig(out / "ranking.png")

    typer.echo("set        Spearman (low to high)    Kendall (low to high)      regret    CPU s  faster  chosen")
    line = "{:10} {:6.3f} ({:6.3f} to {:6.3f}) {:6.3f} ({:6.3f} to {:6.3f}) {:7.4f} {:8.1f} {:6.1f}x  {}"
    for name, row in result["compared"].items():
        typer.echo(line.format(name, *row.pop("spearman"), *row.pop("kendall"), *row.values()))


if __name__ == "__main__":
    typer.run(main)
