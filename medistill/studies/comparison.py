"""Distillers side by side: data x images per class x method x seed, under one protocol and one budget.

Every cell runs in a process of its own, so that its CPU time and its memory are those of this work alone, and
leaves one JSON file. A finished cell is not run again; an interrupted one starts again from its beginning, so that
its cost is that of one whole run.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from medistill.core.reports import Estimate
from medistill.distill.schedule import CANDIDATES
from medistill.evaluate.bootstrap import percentile_estimate
from medistill.evaluate.metrics import METRICS
from medistill.progress import Progress
from medistill.report.comparison import Row, Sheet, best_first, render_comparison
from medistill.report.contact_sheet import contact_sheet
from medistill.studies.cell import COMMON_SCHEDULE
from medistill.studies.contest import Cell, ComparisonConfig, Contestant, estimate_seconds, plan_cells, probe_name
from medistill.studies.processes import Runner
from medistill.studies.records import keep, keep_record

__all__ = [
    "Comparison",
    "ComparisonConfig",
    "Contestant",
    "compare",
    "estimate_seconds",
    "make_rows",
    "plan_cells",
]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Rows of the table, best first within data and images per class, and where the page is."""

    rows: tuple[Row, ...]
    page: Path


def compare(
    config: ComparisonConfig,
    data: Mapping[str, tuple[Path, int]],
    out: Path,
    *,
    jobs: int = 1,
    retry: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Run the cells that are missing, then write ``comparison.csv``, ``.json`` and ``.html``.

    Args:
        config: What is compared.
        data: Name to the folder of a cohort and the side length of its images.
        out: Folder of the results; a later call goes on there.
        jobs: Cells at a time.
        retry: Run cells again that failed before.
        progress: Shows the cells.

    Returns:
        The table; a cell that failed is a row that says so.

    Privacy:
        Reads non-released data; the folder holds images of methods that start from real patients' images.
    """
    progress, cells = progress or Progress(), plan_cells(config, data)
    runner = Runner(out=out, jobs=jobs, retry=retry, progress=progress)
    missing = [cell for cell in cells if not runner.is_finished("cells", cell.name(config))]
    probes = {
        probe_name(probe): {**probe, "cohort": str(cell.cohort)}
        for cell in missing
        for probe in cell.probes(config).values()
    }
    runner.run("probes", probes, "timing iterations")
    requests = {}
    for cell in missing:
        timed = {name: runner.answer("probes", probe_name(probe)) for name, probe in cell.probes(config).items()}
        errors = [answer["error"] for answer in timed.values() if answer["status"] != "done"]
        if errors:
            runner.fail("cells", cell.name(config), errors[0])
            continue
        costs = {name: answer["cost"] for name, answer in timed.items()}
        requests[cell.name(config)] = {**cell.request(config), "cohort": str(cell.cohort), "costs": costs}
    runner.run("cells", requests, "comparing", total=len(cells))
    return _write(config, cells, out)


# -- the table -------------------------------------------------------------------------------------------------


def make_rows(config: ComparisonConfig, cells: Sequence[Cell], out: Path) -> tuple[Row, ...]:
    """Rows of the table from the kept answers, best first within data and images per class.

    Args:
        config: What is compared.
        cells: Cells of the comparison.
        out: Folder of the results.
    """
    groups: dict[tuple[str, int, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.data, cell.ipc, cell.contestant.name), []).append(cell)
    rows = [_row(config, group, network, out) for group in groups.values() for network in config.networks]
    order = {name: place for place, name in enumerate(dict.fromkeys(cell.data for cell in cells))}
    return tuple(sorted(rows, key=lambda row: (order[row.data], row.ipc, *best_first(row))))


def _row(config: ComparisonConfig, group: Sequence[Cell], network: str, out: Path) -> Row:
    first = group[0]
    files = [out / "cells" / f"{cell.name(config)}.json" for cell in group]
    answers = {file: json.loads(file.read_text(encoding="utf-8")) for file in files}
    done = {file: answer for file, answer in answers.items() if answer["status"] == "done"}
    errors = [answer["error"] for answer in answers.values() if answer["status"] != "done"]
    arms, deviations = _arms(done, network)
    found = list(done.values())
    steps = found[0]["recipe"]["steps"] if found and found[0]["recipe"] else ()
    near = [answer["nearest"] for answer in found if "nearest" in answer]
    schedule = found[0]["networks"][network]["schedule"] if found else {}
    return Row(
        data=first.data,
        ipc=first.ipc,
        method=first.contestant.name,
        network=network,
        seeds=len(found),
        failed=len(errors),
        error=errors[0] if errors else "",
        arms=arms,
        deviations=deviations,
        cpu_seconds=_mean([answer["distill_cpu_seconds"] for answer in found]),
        cell_cpu_seconds=_mean([answer["cpu_seconds"] for answer in found]),
        peak_rss_mb=max((answer["distill_peak_rss_mb"] for answer in found), default=0),
        start_rss_mb=min((answer["start_rss_mb"] for answer in found), default=0),
        budget_seconds=None if first.contestant.baseline else config.budget_seconds,
        iterations={s["distiller"]: s["settings"]["iterations"] for s in steps if "iterations" in s["settings"]},
        schedule=f"{schedule['optimizer']}, {schedule['epochs']} epochs" if schedule else "",
        nearest={key: _mean([one[key] for one in near]) for key in near[0]} if near else {},
        from_real=any(answer["from_real"] for answer in found),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _arms(
    done: Mapping[Path, Mapping[str, Any]], network: str
) -> tuple[dict[str, dict[str, Estimate]], dict[str, dict[str, float]]]:
    """Mean over seeds with the interval of the mean, and the standard deviation over seeds."""
    arms: dict[str, dict[str, Estimate]] = {}
    deviations: dict[str, dict[str, float]] = {}
    if not done:
        return arms, deviations
    answers = list(done.values())
    tensors = [load_file(file.with_suffix(".safetensors")) for file in done]
    for arm in answers[0]["networks"][network]["arms"]:
        found = [a["networks"][network]["arms"][arm]["metrics"] for a in answers]
        values = np.array([[one[metric] for metric in METRICS] for one in found], dtype=np.float64)
        draws = np.mean([one[f"draws/{network}/{arm}"].numpy() for one in tensors], axis=0)
        means = np.mean(values, axis=0)
        arms[arm] = {
            metric: percentile_estimate(float(means[i]), draws[i], n=int(answers[0]["patients"]))
            for i, metric in enumerate(METRICS)
        }
        if len(values) > 1:
            deviations[arm] = dict(zip(METRICS, np.std(values, axis=0, ddof=1).tolist(), strict=True))
    return arms, deviations


def _write(config: ComparisonConfig, cells: Sequence[Cell], out: Path) -> Comparison:
    rows, sheets = make_rows(config, cells, out), _sheets(config, cells, out)
    page = out / "comparison.html"
    text = io.StringIO(newline="")
    flat = [_flat(row) for row in rows]
    table = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for line in flat for key in line)))
    table.writeheader()
    table.writerows(flat)
    keep(out / "comparison.csv", text.getvalue().encode())
    keep_record(out / "comparison.json", {"config": asdict(config), "rows": [asdict(row) for row in rows]})
    keep(page, render_comparison(rows, sheets, facts=_facts(config)).encode())
    return Comparison(rows=rows, page=page)


def _flat(row: Row) -> dict[str, Any]:
    """One line of the CSV."""
    line: dict[str, Any] = {
        "data": row.data,
        "ipc": row.ipc or "all",
        "method": row.method,
        "network": row.network,
        "status": "FAILED" if not row.seeds else "done",
        "seeds": row.seeds,
        "failed": row.failed,
        "cpu_seconds": round(row.cpu_seconds, 2) if row.seeds else "",
        "budget_seconds": row.budget_seconds or "",
        "peak_rss_mb": row.peak_rss_mb,
        "start_rss_mb": row.start_rss_mb,
        "cell_cpu_seconds": round(row.cell_cpu_seconds, 2) if row.seeds else "",
        "iterations": "+".join(str(count) for count in row.iterations.values()),
        "schedule": row.schedule,
        "error": row.error,
    }
    line |= {f"nearest_{key}": round(value, 4) for key, value in row.nearest.items()}
    for arm, metrics in row.arms.items():
        for metric, found in metrics.items():
            name = f"{metric}_{arm.replace('/', '_')}"
            line |= {name: round(found.value, 4), f"{name}_low": round(found.low, 4)}
            sd = row.deviations.get(arm, {}).get(metric)
            line |= {f"{name}_high": round(found.high, 4), f"{name}_sd": "" if sd is None else round(sd, 4)}
    return line


def _sheets(config: ComparisonConfig, cells: Sequence[Cell], out: Path) -> list[Sheet]:
    """Images of the first seed of every method."""
    sheets = []
    for cell in cells:
        file = out / "cells" / f"{cell.name(config)}.safetensors"
        if cell.seed != config.seeds[0] or not cell.ipc or not file.exists():
            continue
        answer = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        shown = config.show_real or not answer["from_real"]
        png = contact_sheet(_images(file), columns=min(cell.ipc, 10)) if shown else None
        sheets.append(Sheet(data=cell.data, ipc=cell.ipc, method=cell.contestant.name, png=png))
    return sheets


def _images(file: Path) -> Tensor:
    with safe_open(file, framework="pt") as kept:
        images: Tensor = kept.get_tensor("images")
    return images


def _facts(config: ComparisonConfig) -> dict[str, str]:
    seeds, common = len(config.seeds), COMMON_SCHEDULE
    facts = {
        "AUROC": f"Mean over {seeds} distillation{'s' if seeds > 1 else ''} with {config.students} students each, "
        "trained from scratch and tested on the test patients, on whom nothing was chosen; 95 % interval by "
        "bootstrap over those patients. It does not hold the spread over distillations: the standard deviation "
        "over seeds does.",
        "Schedules": f"Chosen: of {len(CANDIDATES)} and the method's own, the best on validation patients. "
        "Common: the same for every method "
        f"({common.epochs} epochs, learning rate {common.learning_rate:g}). Hard labels: the same images and the "
        "chosen schedule without soft labels. All real images have one schedule of their own.",
        "Cost": "CPU seconds and peak memory of the distillation, each in a process of its own, one thread; in "
        "brackets what it holds more than before it reads an image.",
        "Nearest images": "Mean correlation of the released images with the nearest training image and with the "
        "nearest image of held-out patients, in pools of equal size. A gap well above 0 means that patients show "
        "through; 0 does not prove that they do not.",
    }
    if config.budget_seconds:
        facts["Equal time"] = (
            f"Every distillation was given {config.budget_seconds:g} CPU seconds: two short runs give the cost of "
            "an iteration and what is spent before the first one, and so the number of iterations."
        )
    return facts
