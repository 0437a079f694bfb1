"""How well a small set ranks architectures, beside the ranking on all real images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from medistill.core.images import ImageSet
from medistill.evaluate.metrics import class_aurocs
from medistill.progress import Progress
from medistill.studies.records import keep
from medistill.training.students import Floats, Student, train_students

#: Set, architecture, one row per seed: validation AUROC, test AUROC, CPU seconds.
Scores = dict[str, dict[str, list[list[float]]]]
_DRAWS = 2000


def train_and_keep(
    file: Path, judged_on: Mapping[str, ImageSet], work: Mapping[str, Student], progress: Progress
) -> Scores:
    """Train every student and keep a line for each; what is on file is not trained again.

    Args:
        file: JSON lines ``[key, row]``; a line that was torn by an interruption is dropped.
        judged_on: Images that students are applied to, by name; of each the AUROC becomes a column.
        work: Students by a key of all that their result depends on, a JSON list that begins with the names of the
            set and the architecture.
        progress: Shows the trainings.

    Returns:
        AUROCs, the mean over classes that some images show and some do not, and CPU seconds.
    """
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    rows: dict[str, list[float]] = dict(json.loads(line) for line in lines if line.endswith("]\n"))
    keep(file, "".join(json.dumps(item) + "\n" for item in rows.items()).encode())
    left = {key: student for key, student in work.items() if key not in rows}
    trained, done = train_students(list(left.values())), len(work) - len(left)
    for key, one in zip(left, progress.track(trained, "training", total=len(work), completed=done), strict=True):
        rows[key] = [*(_macro(part, one.probabilities[name]) for name, part in judged_on.items()), one.cpu_seconds]
        with file.open("a", encoding="utf-8") as log:
            log.write(json.dumps([key, rows[key]]) + "\n")
    scores: Scores = {}
    for key in work:
        name, network, *_ = json.loads(key)
        scores.setdefault(name, {}).setdefault(network, []).append(rows[key])
    return scores


def _macro(part: ImageSet, probabilities: Floats) -> float:
    each = class_aurocs(probabilities.astype(np.float64), part.targets.double().numpy(), np.ones((1, len(part))))
    return float(each[np.isfinite(each)].mean())


@np.errstate(invalid="ignore")  # a draw within which nothing differs has no correlation
def rank_agreement(scores: Scores, name: str) -> dict[str, Any]:
    """How a set ranks the architectures beside the reference ``real``, and at what cost.

    Returns:
        ``spearman`` and ``kendall`` (tau-a) of the validation AUROCs, each with its 95 % bootstrap interval over
        architectures; ``regret``, what the architecture that the set chooses lacks of the best test AUROC, both
        trained on all real images; ``cpu_seconds``; ``times_faster``; ``chosen``.
    """
    own, _, seconds = np.mean(list(scores[name].values()), axis=1).T
    reference, tested, slow = np.mean(list(scores["real"].values()), axis=1).T
    drawn = np.random.default_rng(0).integers(len(own), size=(_DRAWS, len(own)))
    both = [values[np.vstack([range(len(own)), drawn])] for values in (own, reference)]
    ranks = (rankdata(values, axis=1) - (len(own) + 1) / 2 for values in both)
    signs = (np.sign(values[:, None] - values[..., None]).reshape(len(values), -1) for values in both)
    found: dict[str, Any] = {}
    for label, (x, y) in (("spearman", ranks), ("kendall", signs)):  # both are cosines
        cosines = (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))
        found[label] = [cosines[0], *np.nanpercentile(cosines[1:], [2.5, 97.5])]
    best = int(own.argmax())
    found |= {"regret": tested.max() - tested[best], "cpu_seconds": seconds.sum()}
    return {**found, "times_faster": slow.sum() / seconds.sum(), "chosen": list(scores[name])[best]}
