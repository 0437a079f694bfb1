"""What differential privacy costs, and what it buys: utility and attack success from small epsilon to none.

Example::

    python pipelines/epsilon_sweep.py configs/epsilon_sweep.yaml --out runs/epsilon-sweep

At every epsilon one method distils the train patients with several seeds and newly drawn noise. Utility is the
AUROC of students on test patients, attack the membership AUROC of `medistill audit` (0.5: members cannot be told
from holdout patients). Intervals are means over seeds of 95 % intervals over patients; least and most are single
seeds. At epsilon inf the same questions are answered exactly. Interrupted, the same command goes on.

For data its owner may look at (see NOTE). The ledger stays with the results, inside; a cohort's is not touched.
Exit codes: 0 done, 1 failed, 2 usage or input.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.figure import Figure

import medistill
from medistill import Budget, ConfigError, ImageSet, Ledger, OpenCurator, Progress
from medistill.audit import AuditPolicy, audit
from medistill.distill import distill_privately, foresee, run_recipe
from medistill.evaluate import EvaluationConfig, evaluate
from medistill.studies import cohort_of, keep_record, read_study

DEFAULTS: dict[str, Any] = {"epsilons": [0.5, 1, 3, 8, math.inf], "delta": 1e-5, "seeds": [0, 1, 2]}
DEFAULTS |= {"method": "auto", "ipc": 10, "students": 3, "settings": {}}
# What --quick changes: enough to see every step work, too little for figures that are of use.
SURROGATE = {"iterations": 2, "made_up": 4, "drawing": 2, "dimension": 24, "width": 8}
QUICK = {"epsilons": [8, math.inf], "seeds": [0, 1], "ipc": 1, "students": 1, "settings": {"surrogate": SURROGATE}}
LIFETIME = 50.0  # of the study's own ledger: as much as any ledger can allow
NOTE = "A study on data its owner may look at: its releases together spend far more than any of these epsilons."
CURVES = ("utility", "attack")
Cell, Parts = dict[str, Any], dict[str, ImageSet]


def one_cell(study: dict[str, Any], parts: Parts, epsilon: float, seed: int, out: Path, show: Progress) -> Cell:
    """Distil once, train students on the release, attack it; what is on file is not done again."""
    train, validation = parts["train"], parts["validation"]
    depends = {name: value for name, value in study.items() if name not in ("epsilons", "seeds")}
    work = json.dumps([medistill.__version__, depends, epsilon, seed], sort_keys=True)
    folder = out / "cells" / hashlib.sha256(work.encode()).hexdigest()[:16]
    if (done := folder.with_suffix(".json")).exists():
        return json.loads(done.read_text(encoding="utf-8"))["cell"]
    show.say(f"epsilon {epsilon:g}, seed {seed}")
    own = {"epsilon": min(epsilon, LIFETIME), "seed": seed}
    wanted = own | {name: study[name] for name in ("delta", "method", "ipc", "settings")}
    seen = foresee(train.task, tuple(train.images.shape[1:]), **wanted)
    how: dict[str, Any] = {"folder": folder / "checkpoints", "progress": show}
    if math.isinf(epsilon):
        made = run_recipe(seen.recipe, OpenCurator(train), **how).distilled
    else:
        how |= {"ledger": own_ledger(out, study), "sealed": folder / "sealed"}
        made = distill_privately(train, seen, **how).distilled
    judged = {"train": train, "validation": validation, "tests": {"test": parts["test"]}, "progress": show}
    students = EvaluationConfig(arms=("distilled",), seeds=study["students"])
    reached = evaluate(made, **judged, config=students, seed=seed).arms[0].metrics["auroc"]
    who = {"train": train, "holdout": parts["holdout"], "reference": validation}
    attacked = audit(made, **who, policy=AuditPolicy(profile="quick"), seed=seed, progress=show)
    membership = next(outcome for outcome in attacked.outcomes if outcome.auroc is not None)
    cell = {"epsilon": epsilon if math.isfinite(epsilon) else "inf", "method": made.recipe.method, "seed": seed}
    cell |= {"utility": asdict(reached), "attack": asdict(membership.auroc)}
    cell |= {"controls_passed": all(control.passed for control in membership.controls)}
    keep_record(done, {"cell": cell})
    return cell


def own_ledger(out: Path, study: dict[str, Any]) -> Ledger:
    """The study's own: nothing is spent of a cohort's lifetime budget, and nothing here may be released."""
    return Ledger(out / "ledger.jsonl", lifetime=Budget(epsilon=LIFETIME, delta=study["delta"]))


def summary(cells: list[Cell]) -> dict[str, Any]:
    """One row of the table: the seeds of one epsilon."""
    row = {"epsilon": cells[0]["epsilon"], "method": cells[0]["method"], "seeds": len(cells)}
    for what in CURVES:
        value, low, high = (np.array([cell[what][end] for cell in cells]) for end in ("value", "low", "high"))
        found = {"": value.mean(), "_low": low.mean(), "_high": high.mean()}
        found |= {"_least": value.min(), "_most": value.max()}
        row |= {f"{what}{end}": round(float(figure), 4) for end, figure in found.items()}
    return {**row, "controls_passed": sum(cell["controls_passed"] for cell in cells)}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Both curves over epsilon, with their intervals."""
    axes, places = (figure := Figure(layout="constrained")).add_subplot(), np.arange(len(rows))
    for what, shift in zip(CURVES, (-0.05, 0.05), strict=True):
        value, low, high = (np.array([row[f"{what}{end}"] for row in rows]) for end in ("", "_low", "_high"))
        bars = np.maximum(0, [value - low, high - value])
        axes.errorbar(places + shift, value, yerr=bars, fmt="o-", capsize=3, label=what)
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xticks=places, xticklabels=[str(row["epsilon"]) for row in rows], ylim=(0.3, 1.0))
    axes.set(xlabel="epsilon of each release, per patient", ylabel="AUROC, 95 % over patients")
    axes.set_title(NOTE, fontsize=7)
    axes.legend(loc="center right")
    figure.savefig(path, dpi=150)


def main(
    config: Annotated[Path, typer.Argument(help="YAML file, like configs/epsilon_sweep.yaml.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the results, not the one in the file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Try every step; the figures are of no use.")] = False,
) -> None:
    """Measure utility and attack success from small epsilon to none.

    Example: python pipelines/epsilon_sweep.py configs/epsilon_sweep.yaml --out runs/epsilon-sweep
    """
    show = medistill.TerminalProgress()
    try:
        folder, data, values = read_study(config, "data")
        if set(values) - set(DEFAULTS) or len(data) != 1:
            raise ConfigError(f"Expected output, one cohort under data, and none but {', '.join(DEFAULTS)}.")
        out, (name, section) = out or folder, *data.items()
        cohort, size = cohort_of(name, section, out / "data" / name, show)
        split = medistill.load_cohort(cohort).split
        parts = {part: split(part).images(size) for part in ("train", "validation", "holdout", "test")}
        seen = hashlib.sha256(repr([part.patients for part in parts.values()]).encode())
        for part in parts.values():
            seen.update(part.images.numpy().tobytes() + part.targets.numpy().tobytes())
        study = {**DEFAULTS, **values, **(QUICK if quick else {}), "data": seen.hexdigest()}
        epsilons = [float(epsilon) for epsilon in study["epsilons"]]
        rows = [summary([one_cell(study, parts, e, s, out, show) for s in study["seeds"]]) for e in epsilons]
        spent = own_ledger(out, study).spent()
    except medistill.MedistillError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    result = {"note": NOTE, "together": spent and spent.epsilon, "delta": study["delta"], "rows": rows}
    keep_record(out / "epsilon_sweep.json", result)
    lines = (",".join(map(str, line)) for line in (rows[0], *(row.values() for row in rows)))
    (out / "epsilon_sweep.csv").write_text("\n".join([*lines, ""]), encoding="utf-8")
    draw(rows, out / "epsilon_sweep.png")
    for row in rows:
        shown = [f"{w} {row[w]:.3f} ({row[f'{w}_low']:.3f} to {row[f'{w}_high']:.3f})" for w in CURVES]
        typer.echo(f"epsilon {row['epsilon']!s:>4}  {'  '.join(shown)}")
    typer.echo(NOTE)


if __name__ == "__main__":
    medistill.prepare_cpu()
    typer.run(main)
