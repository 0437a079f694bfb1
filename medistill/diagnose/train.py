"""Training a diagnostic model on somebody's release."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save

from medistill import __version__
from medistill.core.compute import Compute, fresh
from medistill.core.task import TaskKind
from medistill.errors import OutputError
from medistill.progress import Progress
from medistill.registry import NETWORKS
from medistill.release.verify import load_release
from medistill.seeds import derive_seed
from medistill.training.fit import fit, predict


def train_on_release(
    release: Path,
    out: Path,
    *,
    network: str = "convnet",
    seed: int = 0,
    compute: Compute | None = None,
    progress: Progress | None = None,
) -> Path:
    """Train a network from scratch on a release, by the schedule and soft labels it carries.

    Args:
        release: Release folder; its seal is verified first.
        out: New folder for ``model.safetensors`` and ``model.json``.
        network: Registered network name.
        seed: Public seed of the initial weights and augmentation.
        compute: Device and precision; the CPU by default.
        progress: Shows the epochs.

    Returns:
        The model folder.

    Raises:
        ReleaseError: If the release is damaged or was changed.
        OutputError: If the output folder is not empty.
        ConfigError: If the network is unknown.
    """
    factory = NETWORKS.load(network)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"The output folder {out.name} is not empty. Choose a new one or empty it.")
    distilled = load_release(release).distilled
    shape = tuple(distilled.images.shape[1:])
    model = fresh(factory, distilled.task, shape, derive_seed(seed, "model"))
    fit(
        model,
        distilled.images,
        distilled.soft_labels,
        kind=distilled.task.kind,
        schedule=distilled.schedule,
        seed=derive_seed(seed, "order"),
        views=distilled.views,
        compute=compute,
        progress=progress,
    )
    model.cpu()
    answers = predict(model, distilled.images, kind=distilled.task.kind)
    agreement = answers.argmax(1) == distilled.hard_labels
    if distilled.task.kind is TaskKind.MULTILABEL:  # an image may show several classes, or none
        agreement = (answers >= 0.5) == (distilled.soft_labels >= 0.5)
    description = {
        "schema_version": 1,
        "network": network,
        "image_shape": list(shape),
        "task": distilled.task.to_json(),
        "pixels": "float32 in [0, 1], 0 black",
        "schedule": asdict(distilled.schedule),
        "seed": seed,
        "recipe": distilled.recipe.fingerprint(),
        "agreement_with_release": float(agreement.float().mean()),
        "privacy": distilled.privacy.to_json(),
        "medistill": __version__,
        "notice": "Research only. Not a medical device.",
    }
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        weights = save({name: value.contiguous() for name, value in model.state_dict().items()})
        (partial / "model.safetensors").write_bytes(weights)
        (partial / "model.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out
