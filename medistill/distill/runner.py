"""Running a recipe: its distillers in order, each from the result of the one before."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from medistill import __version__
from medistill.core.compute import Compute
from medistill.core.distilled import DistilledSet, Recipe, Step
from medistill.core.images import ImageSet
from medistill.core.protocols import (
    Checkpoint,
    Curator,
    Distiller,
    NetworkFactory,
    NoCheckpoint,
    Synthetic,
    Workbench,
)
from medistill.core.task import Task
from medistill.distill.checkpoint import FileCheckpoint, pack_synthetic, unpack_synthetic
from medistill.distill.schedule import DEFAULT_SCHEDULE, choose_schedule
from medistill.distill.start import initial
from medistill.distill.watch import Observer, ValidationWatch
from medistill.errors import ConfigError, PrivacyError
from medistill.networks.convnet import ConvNet
from medistill.privacy.curator import PrivateCurator
from medistill.progress import Progress
from medistill.registry import DISTILLERS, nearest
from medistill.seeds import derive_seed

#: Times that every distiller's images are looked at.
LOOKS = 5
_MOST_FOR_RIDGE = 1000
#: Up to so many images ridge regression learns fewer steps: more fit the networks at hand and no others.
_FEW, _STEPS_FOR_FEW, _STEPS = 10, 400, 600
#: Shortest side of an image whose tiles still show something.
_SMALLEST_MOSAIC = 24
#: What ``auto`` chooses from under differential privacy.
PRIVATE_METHODS = ("surrogate", "distribution_matching")


@dataclass(frozen=True, kw_only=True)
class Method:
    """What ``--method`` resolved to, and why.

    Args:
        distillers: Registered names in order.
        why: One sentence.
        settings: Of each distiller, where they differ from its published defaults.
    """

    distillers: tuple[str, ...]
    why: str
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A distilled set and its images after each distiller of the recipe."""

    distilled: DistilledSet
    snapshots: Mapping[str, Tensor]


def resolve_method(
    method: str, task: Task, ipc: int, *, image_shape: tuple[int, ...] | None = None, private: bool = False
) -> Method:
    """Distillers behind a method name: ``auto``, one name, or several joined by ``+``.

    Args:
        method: ``"auto"`` chooses by the size of the release, the size of its images and by privacy.
        task: Gives the number of classes.
        ipc: Images per class.
        image_shape: Shape of one image; without it images are taken to be large enough for mosaics.
        private: Whether the curator answers with sums over patients only.

    Raises:
        ConfigError: If a name is unknown.
    """
    if method == "auto":
        formation = 1 if image_shape and min(image_shape[1:]) < _SMALLEST_MOSAIC else 2
        return _automatic(ipc * task.n_classes, formation, private=private)
    names = tuple(name.strip() for name in method.split("+"))
    for name in names:
        DISTILLERS.load(name)
    return Method(distillers=names, why="chosen by the user.")


def _automatic(images: int, formation: int, *, private: bool) -> Method:
    if private:
        return _automatic_private(images, formation)
    formed = {"formation": formation}
    if images > _MOST_FOR_RIDGE:
        why = f"ridge regression solves for all images at once, which takes long for {images} of them."
        return Method(distillers=("distribution_matching",), why=why, settings={"distribution_matching": formed})
    tiles = "" if formation == 1 else ", each image a mosaic of tiles with soft labels of their own"
    why = (
        "of the methods measured at small budgets none did better than distribution matching from noise, refined "
        f"by ridge regression with soft labels{tiles}; {images} images are few enough for it."
    )
    settings = {
        "distribution_matching": {**formed, "iterations": 400},
        "kernel_ridge": {**formed, "iterations": _STEPS_FOR_FEW if images <= _FEW else _STEPS},
    }
    return Method(distillers=("distribution_matching", "kernel_ridge"), why=why, settings=settings)


def _automatic_private(images: int, formation: int) -> Method:
    surrogate, matching = PRIVATE_METHODS
    if images > _MOST_FOR_RIDGE:
        why = (
            "it asks for two noisy sums over patients and nothing else; ridge regression on a made-up cohort, "
            f"which is better for small releases, takes long for {images} images."
        )
        return Method(distillers=(matching,), why=why)
    why = (
        "of the methods that only ask for noisy sums over patients it gave the best students: a cohort is made up "
        f"from two sums and distilled like a real one; {images} images are few enough for that."
    )
    return Method(distillers=(surrogate,), why=why, settings={surrogate: {"formation": formation}})


def make_distiller(name: str, settings: Mapping[str, Any]) -> Distiller:
    """A distiller with some settings changed from their defaults.

    Raises:
        ConfigError: If the distiller or a setting is unknown, or a value is out of range.
    """
    factory = DISTILLERS.load(name)
    known = list(inspect.signature(factory).parameters)
    unknown = [key for key in settings if key not in known]
    if unknown:
        problems = "; ".join(f"distill.settings.{name}.{key}: unknown.{nearest(key, known)}" for key in unknown)
        raise ConfigError(f"{problems} Known settings of {name}: {', '.join(known)}.")
    distiller: Distiller = factory(**settings)
    return distiller


def distill(
    curator: Curator,
    *,
    method: str = "auto",
    ipc: int = 10,
    seed: int = 0,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    validation: ImageSet | None = None,
    network: NetworkFactory = ConvNet,
    folder: Path | None = None,
    compute: Compute | None = None,
    looks: int = LOOKS,
    patience: int = 0,
    observer: Observer | None = None,
    progress: Progress | None = None,
) -> Distillation:
    """Distil a curator's data by a recipe.

    Args:
        curator: Who answers questions about the data.
        method: ``"auto"``, the name of a distiller, or several joined by ``+``.
        ipc: Images per class.
        seed: Public seed; the same seed gives the same bits on the same CPU and number of threads.
        settings: Per distiller, settings that differ from the defaults.
        validation: Validation patients on whom the student's schedule is chosen; without them the method's own or
            the default schedule is taken.
        network: Architecture of the students that choose the schedule; the ConvNet by default.
        folder: Where checkpoints are kept; an interrupted run goes on from there with the same bits.
        compute: Device, precision and workers; the CPU by default.
        looks: Times that every distiller's images are looked at: a student is trained on them for a short while
            and its AUROC on the validation patients shown.
        patience: Looks without a better AUROC after which a distiller is stopped and its best images taken; ``0``
            lets it finish.
        observer: Told of every look.
        progress: Shows how far it is.

    Returns:
        The distilled set and how its images formed.

    Raises:
        ConfigError: If a name or setting is unknown.

    Privacy:
        The statement on the result is the curator's.

    Example:
        >>> distill(OpenCurator(train), method="kernel_ridge", ipc=1).distilled  # doctest: +SKIP
    """
    recipe = make_recipe(
        curator.task,
        method=method,
        ipc=ipc,
        seed=seed,
        settings=settings,
        image_shape=curator.image_shape,
        private=isinstance(curator, PrivateCurator),
    )
    return run_recipe(
        recipe,
        curator,
        validation=validation,
        network=network,
        folder=folder,
        compute=compute,
        looks=looks,
        patience=patience,
        observer=observer,
        progress=progress,
    )


def make_recipe(
    task: Task,
    *,
    method: str = "auto",
    ipc: int = 10,
    seed: int = 0,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    image_shape: tuple[int, ...] | None = None,
    private: bool = False,
) -> Recipe:
    """The complete recipe behind a method name, with every setting spelled out; see :func:`resolve_method`.

    Raises:
        ConfigError: If a name or setting is unknown.
    """
    chosen = resolve_method(method, task, ipc, image_shape=image_shape, private=private)
    settings = settings or {}
    _check_sections(settings, chosen.distillers)
    steps = []
    for name in chosen.distillers:
        distiller = make_distiller(name, {**chosen.settings.get(name, {}), **settings.get(name, {})})
        steps.append(Step(distiller=name, settings=asdict(cast("Any", distiller))))
    return Recipe(steps=tuple(steps), ipc=ipc, seed=seed, version=__version__)


def run_recipe(
    recipe: Recipe,
    curator: Curator,
    *,
    validation: ImageSet | None = None,
    network: NetworkFactory = ConvNet,
    folder: Path | None = None,
    compute: Compute | None = None,
    looks: int = LOOKS,
    patience: int = 0,
    observer: Observer | None = None,
    progress: Progress | None = None,
) -> Distillation:
    """Run a complete recipe; see :func:`distill` for the arguments.

    Raises:
        PrivacyError: If something is to be chosen on validation patients while a private curator answers.
    """
    if isinstance(curator, PrivateCurator) and (validation is not None or patience):
        raise PrivacyError(
            "Under differential privacy nothing is chosen on validation patients, whom no budget covers: the "
            "student's schedule is the method's own, and no distiller is stopped early. Leave out patience."
        )
    progress, compute = progress or Progress(), compute or Compute()
    result: Synthetic | None = None
    snapshots = _noise_start(recipe, curator)
    kept = _Kept.of(folder, recipe, curator, validation)
    for position, step in enumerate(recipe.steps):
        watch = ValidationWatch(
            distiller=step.distiller,
            validation=validation,
            network=network,
            seed=derive_seed(recipe.seed, "look"),
            looks=looks,
            patience=patience,
            compute=compute,
            kept=kept.checkpoint(f"{position}-looks"),
            progress=progress,
            observer=observer,
        )
        checkpoint = kept.checkpoint(str(position))
        bench = Workbench(compute=compute, progress=progress, checkpoint=checkpoint, watch=watch)
        distiller = make_distiller(step.distiller, step.settings)
        result = _run_step(distiller, curator, recipe=recipe, position=position, start=result, bench=bench)
        result = watch.best(result)
        snapshots[step.distiller] = result.images
    assert result is not None
    schedule = result.schedule or DEFAULT_SCHEDULE
    if validation is not None:
        seed = derive_seed(recipe.seed, "schedule")
        ranked = choose_schedule(
            result, validation, network=network, seed=seed, compute=compute, progress=progress
        )
        schedule = ranked[0].schedule
    distilled = DistilledSet(
        images=result.images,
        soft_labels=result.soft_labels,
        hard_labels=result.hard_labels,
        ipc=recipe.ipc,
        task=curator.task,
        recipe=recipe,
        schedule=schedule,
        privacy=curator.statement(),
        views=result.views,
    )
    return Distillation(distilled=distilled, snapshots=snapshots)


def _check_sections(settings: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for section in settings:
        if section not in names:
            raise ConfigError(
                f"distill.settings.{section}: not a distiller of this method.{nearest(section, names)} "
                f"The method runs: {', '.join(names)}."
            )


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """Checkpoints whose names carry the recipe and the data, so that other work is never taken up."""

    folder: Path | None
    digest: str

    @classmethod
    def of(cls, folder: Path | None, recipe: Recipe, curator: Curator, validation: ImageSet | None) -> _Kept:
        digest = hashlib.sha256(recipe.fingerprint().encode())
        if isinstance(curator, PrivateCurator):  # what follows from other noisy answers is other work
            digest.update(curator.identity.encode())
        elif folder is not None:
            _add_images(digest, curator.images(), validation)
        return cls(folder=folder, digest=digest.hexdigest()[:12])

    def checkpoint(self, name: str) -> Checkpoint:
        return FileCheckpoint(self.folder / f"{self.digest}-{name}.safetensors") if self.folder else NoCheckpoint()


def _add_images(digest: Any, *parts: ImageSet | None) -> None:
    for part in parts:
        if part is not None:
            digest.update(part.images.contiguous().numpy().data)
            digest.update(part.targets.numpy().tobytes())
            digest.update("\n".join(part.patients).encode())


def _noise_start(recipe: Recipe, curator: Curator) -> dict[str, Tensor]:
    """The images before the first step, where they are noise and so may be shown."""
    if recipe.steps[0].settings.get("init") != "noise":
        return {}
    seed = derive_seed(recipe.seed, "distill", 0)
    return {"start": initial(curator, init="noise", ipc=recipe.ipc, seed=seed, start=None).images}


def _run_step(
    distiller: Distiller,
    curator: Curator,
    *,
    recipe: Recipe,
    position: int,
    start: Synthetic | None,
    bench: Workbench,
) -> Synthetic:
    state = bench.checkpoint.load()
    if state is not None and "finished" in state:
        return unpack_synthetic(state)
    seed = derive_seed(recipe.seed, "distill", position)
    result = distiller.distill(curator, ipc=recipe.ipc, seed=seed, start=start, bench=bench)
    bench.checkpoint.save({"finished": torch.tensor(1), **pack_synthetic(result)})
    return result
