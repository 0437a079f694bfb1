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

import medistill
from medistill import DistilledSet, ImageSet, MedistillError, OpenCurator, Schedule, TerminalProgress, load_cohort
from medistill.distill import distill
from medistill.registry import NETWORKS
from medistill.studies import keep_record, rank_agreement, train_and_keep
from medistill.training import Student

REAL = Schedule(epochs=4, learning_rate=1e-3, optimizer="adam", batch_size=64)
QUICK = {"distribution_matching": {"networks": 1, "iterations": 5}}
COLUMNS = ("validation", "test", "cpu_seconds")  # AUROC on the first two
Parts = dict[str, ImageSet]


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
    seen = hashlib.sha256()
    for tensor in (tensor for part in parts.values() for tensor in (part.images, part.targets)):
        seen.update(tensor.numpy().tobytes())
    made = f"{medistill.__version__} {seen.hexdigest()}"
    data = {"real": (train.images, train.targets, None, replace(REAL, epochs=1) if quick else REAL, made)}
    for name, one in sets.items():
        data[name] = (one.images, one.soft_labels, one.views, one.schedule, f"{made} {one.fingerprint()}")
    jobs = product(data.items(), architectures(quick).items(), range(seeds))
    for (name, (images, labels, views, schedule, made)), (network, factory), seed in jobs:
        work[json.dumps([name, network, seed, asdict(schedule), made])] = Student(
            network=factory, task=train.task, images=images.numpy(), soft_labels=labels.numpy(), views=views,
            schedule=schedule, weights_seed=seed, order_seed=seed, apply_to=judged,
        )  # fmt: skip
    return work


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
        work, judged = trainings(parts, sets, seeds, quick), {judge: parts[judge] for judge in COLUMNS[:2]}
        scores = train_and_keep(out / "trainings.jsonl", judged, work, show)
    except MedistillError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    result = {"compared": {n: rank_agreement(scores, n) for n in scores}, "columns": COLUMNS, "scores": scores}
    keep_record(out / "result.json", result)
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
    medistill.prepare_cpu()
    typer.run(main)
