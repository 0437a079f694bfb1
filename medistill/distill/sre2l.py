"""Squeeze, recover, relabel (SRe2L, Yin et al. 2023) with the crop curriculum of CDA (Yin & Shen 2023)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor, nn

from medistill.core.compute import Compute
from medistill.core.distilled import ViewLabels
from medistill.core.protocols import Checkpoint, Curator, Synthetic, Workbench
from medistill.core.task import TaskKind
from medistill.distill.checkpoint import pack_optimizer, unpack_optimizer
from medistill.distill.decay import cosine
from medistill.distill.finite import check_finite
from medistill.distill.norm_statistics import statistics_distance, with_matched_norms
from medistill.distill.squeeze import Squeeze, squeeze, squeezed_state
from medistill.distill.start import check_init, initial
from medistill.errors import ConfigError
from medistill.parallel import parallel_map, worth_processes
from medistill.registry import NETWORKS
from medistill.seeds import derive_seed
from medistill.training.objectives import objective, probabilities
from medistill.training.views import crop, mirrored, random_boxes

#: Pixels are in [0, 1]; networks divide by this, so a step in their inputs is so much smaller in pixels.
PIXEL_DEVIATION = 0.25
#: A look at images that are not finished labels so many views.
_VIEWS_OF_A_LOOK = 10


@dataclass(frozen=True, kw_only=True)
class SRe2L:
    r"""Invert a teacher: images with which it is sure of their class and its BatchNorm layers see what they saw.

    *Squeeze*: a teacher :math:`\theta` with BatchNorm is trained on the real images; its layers :math:`l` keep
    running means :math:`m_l` and variances :math:`v_l`. *Recover*: from noise, and without the data,

    .. math:: \min_x \ell(\theta(A(x)), y) + r \sum_l w_l \left( \lVert \sigma_l^2(A(x)) - v_l \rVert_2
              + \lVert \mu_l(A(x)) - m_l \rVert_2 \right)

    with :math:`\mu_l, \sigma_l^2` of the batch, :math:`w_1 = 10` and 1 elsewhere, and :math:`A` a random crop and
    roll. *Relabel*: random crops of every image get the teacher's prediction at a temperature; a student trains
    on another of these views in every epoch.

    Where it deviates: batches hold all classes and as many images as fit (the original's batches of one image per
    class collapse with two classes: two images have no variance to match), and a few images are seen in several
    crops at once; the statistics are those of the last epoch's batches, which hold equally many images of every
    class as the recovered batches do; no mirroring, because the side of an organ is a finding; no CutMix; the last
    images are taken, not those of the lowest loss; pixels are projected to ``[0, 1]`` after each step; and the
    teacher is one that a CPU can afford (published: ``width=64, depth=18``, ``iterations=4000``, ``crop=0.08``,
    ``views=300``, ``temperature=20``). Step sizes are as published, in units of the network's input, of which
    one is 0.25 of a pixel's range.

    Args:
        teacher: Registered network that takes ``width``, ``depth`` and ``norm="batch"``: ``"resnet"`` or
            ``"convnet"``; ``"auto"`` is the ConvNet for sides below 64 px and the ResNet from there on.
        width: Width of the teacher; ``0`` is the network's own choice.
        depth: Depth of the teacher; ``0`` is the network's own choice.
        epochs: Epochs of the teacher.
        teacher_rate: Adam step size of the teacher, cosine-decayed.
        teacher_batch: Real images per step.
        iterations: Steps on every batch of images.
        rate: Adam step size (betas 0.5, 0.9) of the images, cosine-decayed.
        bn_weight: :math:`r`; published .01 for 1,000 classes and 1 for 200.
        first_weight: :math:`w_1`.
        crop: Smallest share of the area of a random crop, in all three stages.
        curriculum: Share of the iterations over which the smallest crop shrinks from the whole image to ``crop``
            along half a cosine (CDA: 1); ``0`` is SRe2L.
        roll: Largest cyclic shift as a share of the side; ``0`` never rolls.
        mirror: Mirror left and right at random while squeezing and recovering.
        batch: Images optimised together, and in memory, at most; at least one of every class.
        least: Crops in a batch at least; where it has fewer images, several of each.
        views: Views of every image that are labelled.
        temperature: Temperature of the labels.
        init: ``"noise"`` or ``"real"``.
        checkpoint_every: Steps between checkpoints where all images are in one batch; otherwise one a batch.

    References:
        Yin, Xing, Shen, NeurIPS 2023, arXiv:2306.13092. Yin & Shen 2023, arXiv:2311.18838.

    Privacy:
        Squeezing needs raw images and proves nothing about the teacher; all that follows sees the teacher only.
    """

    teacher: str = "auto"
    width: int = 0
    depth: int = 0
    epochs: int = 6
    teacher_rate: float = 0.002
    teacher_batch: int = 64
    iterations: int = 1000
    rate: float = 0.25
    bn_weight: float = 0.01
    first_weight: float = 10.0
    crop: float = 0.25
    curriculum: float = 1.0
    roll: float = 0.14
    mirror: bool = False
    batch: int = 64
    least: int = 16
    views: int = 100
    temperature: float = 2.0
    init: str = "noise"
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        check_init(self.init)
        if self.teacher != "auto":
            NETWORKS.load(self.teacher)
        counts = (self.epochs, self.teacher_batch, self.iterations, self.batch, self.least, self.views)
        if min(*counts, self.checkpoint_every) < 1 or min(self.width, self.depth) < 0:
            raise ConfigError(
                "Expected epochs, teacher_batch, iterations, batch, least, views and checkpoint_every >= 1, and "
                "width and depth >= 0."
            )
        if min(self.teacher_rate, self.rate, self.temperature) <= 0 or min(self.bn_weight, self.first_weight) < 0:
            raise ConfigError(
                "Expected teacher_rate, rate and temperature > 0, and bn_weight and first_weight >= 0."
            )
        if not 0 < self.crop <= 1 or not 0 <= self.curriculum <= 1 or not 0 <= self.roll <= 1:
            raise ConfigError("Expected crop in (0, 1], and curriculum and roll in [0, 1].")

    def distill(
        self, curator: Curator, *, ipc: int, seed: int, start: Synthetic | None, bench: Workbench
    ) -> Synthetic:
        """Squeeze with the curator; recover and relabel without. Resumes with the same bits."""
        first = initial(curator, init=self.init, ipc=ipc, seed=seed, start=start)
        kind, seed = curator.task.kind, derive_seed(seed, "sre2l")
        teacher = squeeze(curator, settings=self.squeeze(), seed=seed, bench=bench)
        bench = replace(bench, checkpoint=_Beside(bench.checkpoint, squeezed_state(teacher, self.epochs)))
        images = recover(teacher, first, kind=kind, settings=self, seed=seed, bench=bench)
        return labelled(teacher, images, first.hard_labels, kind=kind, settings=self, seed=seed, bench=bench)

    def squeeze(self) -> Squeeze:
        """The settings of the teacher."""
        return Squeeze(
            network=self.teacher,
            width=self.width,
            depth=self.depth,
            epochs=self.epochs,
            rate=self.teacher_rate,
            batch=self.teacher_batch,
            crop=self.crop,
            mirror=self.mirror,
        )


class _Beside:
    """A checkpoint that keeps what is finished beside what changes."""

    def __init__(self, checkpoint: Checkpoint, finished: Mapping[str, Tensor]) -> None:
        self._checkpoint, self._finished = checkpoint, dict(finished)

    def load(self) -> dict[str, Tensor] | None:
        """What was kept, with what is finished."""
        return self._checkpoint.load()

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Keep both."""
        self._checkpoint.save({**self._finished, **state})


# -- recover ---------------------------------------------------------------------------------------------------


def recover(
    teacher: nn.Module, start: Synthetic, *, kind: TaskKind, settings: SRe2L, seed: int, bench: Workbench
) -> Tensor:
    """Invert the teacher; post-processing of it, since nothing else comes from the data.

    Batches do not depend on each other and are recovered in several processes; memory does not grow with their
    number beyond the images themselves.

    Args:
        teacher: From :func:`squeeze`.
        start: Images to begin with, and the class each is to become; equally many of every class.
        kind: Kind of the task.
        settings: Steps, weights and crops.
        seed: Public seed.
        bench: Device, workers, progress, checkpoint and watch.

    Returns:
        Images in ``[0, 1]`` on the CPU.
    """
    matched = with_matched_norms(teacher).cpu()
    parts = batches(start.hard_labels, settings.batch)
    jobs = [
        RecoverJob(
            network=matched,
            images=start.images[part],
            targets=start.soft_labels[part],
            kind=kind,
            settings=settings,
            seed=derive_seed(seed, "recover", number),
            compute=bench.compute.of_worker(number),
        )
        for number, part in enumerate(parts)
    ]
    if len(jobs) > 1:
        return _recover_in_parallel(jobs, parts, start.images.clone(), bench)
    run = _Recovery(replace(jobs[0], compute=bench.compute))

    def current() -> Synthetic:
        few = replace(settings, views=min(settings.views, _VIEWS_OF_A_LOOK))
        return labelled(teacher, run.result(), start.hard_labels, kind=kind, settings=few, seed=seed, bench=bench)

    for step in bench.steps(
        run.restore(bench.checkpoint.load() or {}),
        settings.iterations,
        "recovering",
        every=settings.checkpoint_every,
        state=run.state,
        current=current,
    ):
        bench.progress.note(loss=run.step(step))
    return run.result()


def batches(hard_labels: Tensor, most: int) -> list[Tensor]:
    """Positions of the images of each batch: all classes in every batch, and batches of nearly the same size.

    Args:
        hard_labels: Class of every image; equally many of every class.
        most: Images in a batch at most, but at least one of every class.
    """
    classes = sorted(set(hard_labels.tolist()))
    members = torch.stack([(hard_labels == label).nonzero().flatten() for label in classes])  # (k, ipc)
    count = math.ceil(members.shape[1] / max(1, most // len(classes)))
    return [part.flatten() for part in members.tensor_split(count, dim=1)]


def _recover_in_parallel(
    jobs: Sequence[RecoverJob], parts: Sequence[Tensor], images: Tensor, bench: Workbench
) -> Tensor:
    kept = bench.checkpoint.load() or {}
    done = int(kept.get("recovered", 0))
    if done:
        images = kept["images"]
    pixels = sum(job.images.numel() * job.settings.iterations for job in jobs[done:])
    found = parallel_map(
        recover_batch,
        jobs[done:],
        jobs=bench.compute.workers() or worth_processes(pixels),
        engine=bench.compute.engine,
    )
    shown = bench.progress.track(found, "recovering", total=len(jobs), completed=done)
    for number, (part, recovered) in enumerate(zip(parts[done:], shown, strict=True), start=done + 1):
        images[part] = recovered
        bench.checkpoint.save({"recovered": torch.tensor(number), "images": images})
    return images


@dataclass(frozen=True, kw_only=True)
class RecoverJob:
    """One batch to recover, complete enough to be sent to another process.

    Args:
        network: From :func:`medistill.distill.norm_statistics.with_matched_norms`.
        images: Start.
        targets: What the teacher is to say of them.
        kind: Kind of the task.
        settings: Steps, weights and crops.
        seed: Public seed.
        compute: Device and precision.
    """

    network: nn.Module
    images: Tensor
    targets: Tensor
    kind: TaskKind
    settings: SRe2L
    seed: int
    compute: Compute


def recover_batch(job: RecoverJob) -> Tensor:
    """Recover one batch from its start to its end."""
    run = _Recovery(job)
    for step in range(job.settings.iterations):
        run.step(step)
    return run.result()


class _Recovery:
    """A batch of images, and its step."""

    def __init__(self, job: RecoverJob) -> None:
        self._job, settings = job, job.settings
        self._generator = torch.Generator().manual_seed(job.seed)
        self._network = copy.deepcopy(job.network)
        if job.images.ndim == 4:
            self._network.to(memory_format=torch.channels_last)
        job.compute.ready(self._network)
        self._images = job.compute.put(job.images.clone()).requires_grad_()
        self._repeats = math.ceil(settings.least / len(job.images))
        self._targets = job.compute.put(job.targets).repeat(self._repeats, 1)
        self._adam = torch.optim.Adam([self._images], lr=settings.rate * PIXEL_DEVIATION, betas=(0.5, 0.9))

    def step(self, step: int) -> float:
        settings = self._job.settings
        done = step / settings.iterations
        self._adam.param_groups[0]["lr"] = settings.rate * PIXEL_DEVIATION * cosine(done, floor=0.0)
        with self._job.compute.autocast():
            logits = self._network(self._changed(smallest_crop(done, settings)))
            loss = objective(self._job.kind, logits.float(), self._targets)
        loss = loss + settings.bn_weight * statistics_distance(self._network, first_weight=settings.first_weight)
        check_finite((loss,), distiller="sre2l", step=step, remedy="Lower rate, bn_weight or first_weight.")
        self._adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._adam.step()
        with torch.no_grad():
            self._images.clamp_(0.0, 1.0)
        return loss.item()

    def _changed(self, smallest: float) -> Tensor:
        settings, generator = self._job.settings, self._generator
        images = self._images.repeat(self._repeats, *(1,) * (self._images.ndim - 1))
        boxes = random_boxes(len(images), images.ndim - 2, generator, smallest=smallest)
        changed = crop(images, boxes)
        if settings.mirror:
            changed = mirrored(changed, generator)
        return _rolled(changed, settings.roll, generator)

    def result(self) -> Tensor:
        return self._images.detach().cpu().clone()

    def state(self, steps: int) -> dict[str, Tensor]:
        counted = {"steps": torch.tensor(steps), "generator": self._generator.get_state()}
        return {**counted, "images": self._images, **pack_optimizer(self._adam, "adam")}

    def restore(self, kept: Mapping[str, Tensor]) -> int:
        if "steps" not in kept:
            return 0
        with torch.no_grad():
            self._images.copy_(kept["images"])
        self._generator.set_state(kept["generator"])
        unpack_optimizer(self._adam, kept, "adam")
        return int(kept["steps"])


def smallest_crop(done: float, settings: SRe2L) -> float:
    """Smallest share of the area of a crop after a share of the iterations."""
    if done >= settings.curriculum:
        return settings.crop
    return settings.crop + (1 - settings.crop) * cosine(done / settings.curriculum, floor=0.0)


def _rolled(images: Tensor, share: float, generator: Generator) -> Tensor:
    if not share:
        return images
    axes = tuple(range(2, images.ndim))
    drawn = (torch.rand(len(axes), generator=generator) * 2 - 1) * share
    shifts = [round(part * images.shape[axis]) for part, axis in zip(drawn.tolist(), axes, strict=True)]
    return images.roll(shifts, axes)


# -- relabel ---------------------------------------------------------------------------------------------------


def labelled(
    teacher: nn.Module,
    images: Tensor,
    hard_labels: Tensor,
    *,
    kind: TaskKind,
    settings: SRe2L,
    seed: int,
    bench: Workbench,
) -> Synthetic:
    """The images with views labelled by the teacher; an image's own soft label is the mean over its views."""
    views = relabel(teacher, images, kind=kind, settings=settings, seed=seed, compute=bench.compute)
    return Synthetic(images=images, soft_labels=views.soft_labels.mean(0), hard_labels=hard_labels, views=views)


@torch.no_grad()
def relabel(
    teacher: nn.Module, images: Tensor, *, kind: TaskKind, settings: SRe2L, seed: int, compute: Compute
) -> ViewLabels:
    """Random crops of every image with the teacher's prediction at a temperature.

    Args:
        teacher: From :func:`squeeze`.
        images: Shape ``(m, c, h, w)`` or ``(m, c, d, h, w)``.
        kind: Kind of the task.
        settings: Views, crops and temperature.
        seed: Public seed.
        compute: Device.

    Returns:
        Boxes and soft labels on the CPU.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "relabel"))
    boxes, labels = [], []
    for _ in range(settings.views):
        boxes.append(random_boxes(len(images), images.ndim - 2, generator, smallest=settings.crop))
        parts = zip(torch.split(images, settings.batch), torch.split(boxes[-1], settings.batch), strict=True)
        logits = torch.cat([teacher(crop(compute.put(part), box)).cpu() for part, box in parts])
        labels.append(probabilities(kind, logits / settings.temperature))
    return ViewLabels(boxes=torch.stack(boxes), soft_labels=torch.stack(labels), temperature=settings.temperature)
