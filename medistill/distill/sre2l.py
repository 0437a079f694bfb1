"""Squeeze, recover, relabel (SRe2L, Yin et al. 2023) with the crop curriculum of CDA (Yin & Shen 2023)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from medistill.core.compute import Compute
from medistill.core.distilled import ViewLabels
from medistill.core.guarantee import PrivacyPlan, Query, QueryKind
from medistill.core.protocols import Checkpoint, Curator, Synthetic, Workbench
from medistill.core.task import Task, TaskKind
from medistill.distill.checkpoint import pack_optimizer, unpack_optimizer
from medistill.distill.decay import cosine
from medistill.distill.finite import check_finite
from medistill.distill.labels import MOST_LABELS
from medistill.distill.norm_statistics import statistics_distance, with_matched_norms
from medistill.distill.squeeze import Squeeze, squeeze, squeezed_state
from medistill.distill.start import check_init, initial
from medistill.errors import ConfigError, PrivacyError
from medistill.networks.layers import Classifier
from medistill.parallel import parallel_map, worth_processes
from medistill.registry import NETWORKS
from medistill.seeds import derive_seed
from medistill.training.objectives import objective, probabilities
from medistill.training.views import crop, mirrored, random_boxes

#: Pixels are in [0, 1]; networks divide by this, so a step in their inputs is so much smaller in pixels.
PIXEL_DEVIATION = 0.25
#: A look at images that are not finished labels so many views.
_VIEWS_OF_A_LOOK = 10
_NORMS = ("batch", "group", "instance")
_MEANS_NOISE = 3.0  # of the one sum, relative to every step's
_ASSUMPTIONS = (
    "The teacher's architecture and first weights, and the crops of every step, follow from public settings and a "
    "public seed.",
    "Clip norm, sampling rate and number of steps were fixed without looking at these patients.",
)


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

    Without BatchNorm (``norm="group"`` or ``"instance"``) there are no running statistics to match. Instead, the
    curator is asked for the class means :math:`\mu_c` of the teacher's features :math:`f`, each made a unit
    vector, and the second term is

    .. math:: r' \sum_c \Big\lVert \tfrac{1}{|S_c|} \sum_{x \in S_c} f(A(x)) - \mu_c \Big\rVert^2

    This is what a private curator allows: statistics of BatchNorm cannot be made private, a teacher can be trained
    on noisy gradients (:func:`medistill.distill.squeeze.squeeze_privately`) and the class means are one noisy sum.
    The counts in it also take from the teacher its leaning towards classes with more patients, which is the
    logarithm of the class's share.

    Args:
        teacher: Registered network that takes ``width``, ``depth`` and ``norm="batch"``: ``"resnet"`` or
            ``"convnet"``; ``"auto"`` is the ConvNet for sides below 64 px and the ResNet from there on.
        width: Width of the teacher; ``0`` is the network's own choice.
        depth: Depth of the teacher; ``0`` is the network's own choice.
        norm: Normalisation of the teacher: ``"batch"``, or ``"group"`` or ``"instance"``, with which it can be
            private; ``"auto"`` is then the ConvNet.
        epochs: Epochs of the teacher.
        teacher_rate: Adam step size of the teacher, cosine-decayed.
        teacher_batch: Real images per step.
        iterations: Steps on every batch of images.
        rate: Adam step size (betas 0.5, 0.9) of the images, cosine-decayed.
        bn_weight: :math:`r`; published .01 for 1,000 classes and 1 for 200.
        first_weight: :math:`w_1`.
        mean_weight: :math:`r'`, without BatchNorm.
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
        private_steps: Noisy gradients on which a private teacher is trained, in the place of epochs and batches.
        sampling_rate: Probability with which each patient takes part in one of them.
        clip_norm: Longest gradient of a patient.
        checkpoint_every: Steps between checkpoints where all images are in one batch; otherwise one a batch.

    References:
        Yin, Xing, Shen, NeurIPS 2023, arXiv:2306.13092. Yin & Shen 2023, arXiv:2311.18838.

    Privacy:
        With an open curator, squeezing needs raw images and proves nothing about the teacher. A private curator is
        asked for ``private_steps`` noisy gradients and one noisy sum. All that follows sees the teacher and the
        class means only.
    """

    teacher: str = "auto"
    width: int = 0
    depth: int = 0
    norm: str = "batch"
    epochs: int = 6
    teacher_rate: float = 0.002
    teacher_batch: int = 64
    iterations: int = 1000
    rate: float = 0.25
    bn_weight: float = 0.01
    first_weight: float = 10.0
    mean_weight: float = 1.0
    crop: float = 0.25
    curriculum: float = 1.0
    roll: float = 0.14
    mirror: bool = False
    batch: int = 64
    least: int = 16
    views: int = 100
    temperature: float = 2.0
    init: str = "noise"
    private_steps: int = 200
    sampling_rate: float = 0.05
    clip_norm: float = 0.5
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        check_init(self.init)
        self._check_private()
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

    def _check_private(self) -> None:
        if self.norm not in _NORMS:
            raise ConfigError(f"Expected norm to be one of {', '.join(_NORMS)}, got {self.norm!r}.")
        if self.private_steps < 1 or not 0 < self.sampling_rate <= 1 or not 0 < self.clip_norm < math.inf:
            raise ConfigError("Expected private_steps >= 1, sampling_rate in (0, 1] and a finite clip_norm > 0.")
        if not 0 <= self.mean_weight < math.inf:
            raise ConfigError("Expected a finite mean_weight >= 0.")

    def plan(self, task: Task, image_shape: tuple[int, ...], ipc: int) -> PrivacyPlan:
        """The steps of the teacher, and one sum.

        Raises:
            PrivacyError: If the teacher has BatchNorm, or the start is real.
        """
        if self.norm == "batch":
            raise PrivacyError(
                "sre2l under differential privacy: BatchNorm ties the images of a batch together and its "
                "statistics are not private. Set sre2l's norm to 'group' or 'instance'."
            )
        if self.init == "real":
            raise PrivacyError(
                "sre2l under differential privacy: a real start needs the images; take init 'noise'."
            )
        return PrivacyPlan(
            queries=(
                Query(
                    kind=QueryKind.GRADIENT,
                    purpose="steps of the teacher",
                    count=self.private_steps,
                    sampling_rate=self.sampling_rate,
                ),
                Query(kind=QueryKind.SUM, purpose="class means of features", relative_noise=_MEANS_NOISE),
            ),
            assumptions=_ASSUMPTIONS,
        )

    def distill(
        self, curator: Curator, *, ipc: int, seed: int, start: Synthetic | None, bench: Workbench
    ) -> Synthetic:
        """Squeeze with the curator; recover and relabel without. Resumes with the same bits."""
        if private := curator.noise(0) > 0:
            self.plan(curator.task, curator.image_shape, ipc)  # refuses what cannot be private
        first = initial(curator, init=self.init, ipc=ipc, seed=seed, start=start)
        kind, seed = curator.task.kind, derive_seed(seed, "sre2l")
        teacher = squeeze(curator, settings=self.squeeze(), seed=seed, bench=bench)
        finished = squeezed_state(teacher, self.private_steps if private else self.epochs)
        means = None
        if self.norm != "batch":
            kept = bench.checkpoint.load() or {}
            if "means" in kept:
                moments = kept["means"]
                curator.resume(self.private_steps + 1 if private else 0)
            else:
                moments = self._moments(curator, teacher, bench.compute)
            finished["means"], means = moments, moments[:, :-1]
            if private and kind is not TaskKind.MULTILABEL:
                teacher = without_leaning(teacher, moments[:, -1])
        bench = replace(bench, checkpoint=_Beside(bench.checkpoint, finished))
        images = recover(teacher, first, kind=kind, settings=self, seed=seed, bench=bench, means=means)
        return labelled(teacher, images, first.hard_labels, kind=kind, settings=self, seed=seed, bench=bench)

    def _moments(self, curator: Curator, teacher: nn.Module, compute: Compute) -> Tensor:
        """Class means of features, and patients of the classes beside them; no count is below its noise."""
        labels = MOST_LABELS if curator.task.kind is TaskKind.MULTILABEL else 1
        clip_norm = math.sqrt(2 * labels)
        noise = curator.noise(self.private_steps) * clip_norm
        sums = feature_sums(curator, teacher, clip_norm=clip_norm, compute=compute)
        counts = sums[:, -1:].clamp_min(max(1e-6, noise))
        means = sums[:, :-1] / counts
        return torch.cat([means / means.norm(dim=1, keepdim=True).clamp_min(1.0), counts], dim=1)

    def squeeze(self) -> Squeeze:
        """The settings of the teacher."""
        return Squeeze(
            network=self.teacher,
            width=self.width,
            depth=self.depth,
            norm=self.norm,
            epochs=self.epochs,
            rate=self.teacher_rate,
            batch=self.teacher_batch,
            crop=self.crop,
            mirror=self.mirror,
            private_steps=self.private_steps,
            sampling_rate=self.sampling_rate,
            clip_norm=self.clip_norm,
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


# -- what else is asked of the data ------------------------------------------------------------------------------


def feature_sums(curator: Curator, teacher: nn.Module, *, clip_norm: float, compute: Compute) -> Tensor:
    """Unit-length features summed over every class's patients, and patients of the class; shape ``(k, d + 1)``.

    Args:
        curator: Who answers: one sum.
        teacher: From :func:`squeeze`.
        clip_norm: Longest row of a patient; that of an image is the root of twice its labels.
        compute: Device.
    """

    def embed(images: Tensor, targets: Tensor) -> Tensor:
        features = unit_features(teacher, compute.put(images))
        row = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
        return (compute.put(targets)[:, :, None] * row[:, None, :]).flatten(1)

    return curator.sum(embed, clip_norm=clip_norm).cpu().view(curator.task.n_classes, -1)


def unit_features(teacher: nn.Module, images: Tensor) -> Tensor:
    """What comes into the teacher's last layer, as unit vectors."""
    assert isinstance(teacher, Classifier)
    return F.normalize(teacher.features(images).float(), dim=1)


def without_leaning(teacher: nn.Module, counts: Tensor) -> nn.Module:
    """A copy that answers as if it had been trained on equally many patients of every class.

    Args:
        teacher: Trained on patients as they come.
        counts: Patients of every class.
    """
    balanced = copy.deepcopy(teacher)
    assert isinstance(balanced, Classifier)
    with torch.no_grad():
        balanced.head.bias.sub_((counts / counts.sum()).log().to(balanced.head.bias))
    return balanced


# -- recover ---------------------------------------------------------------------------------------------------


def recover(
    teacher: nn.Module,
    start: Synthetic,
    *,
    kind: TaskKind,
    settings: SRe2L,
    seed: int,
    bench: Workbench,
    means: Tensor | None = None,
) -> Tensor:
    """Invert the teacher; post-processing of it and of the class means, since nothing else comes from the data.

    Batches do not depend on each other and are recovered in several processes; memory does not grow with their
    number beyond the images themselves.

    Args:
        teacher: From :func:`squeeze`.
        start: Images to begin with, and the class each is to become; equally many of every class.
        kind: Kind of the task.
        settings: Steps, weights and crops.
        seed: Public seed.
        bench: Device, workers, progress, checkpoint and watch.
        means: Class means of features to match, shape ``(k, d)``, where the teacher has no BatchNorm.

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
            means=means,
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
        means: Class means of features, where the network has no BatchNorm.
    """

    network: nn.Module
    images: Tensor
    targets: Tensor
    kind: TaskKind
    settings: SRe2L
    seed: int
    compute: Compute
    means: Tensor | None = None


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
        loss = self._loss(self._changed(smallest_crop(done, settings)))
        check_finite((loss,), distiller="sre2l", step=step, remedy="Lower rate, bn_weight or first_weight.")
        self._adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._adam.step()
        with torch.no_grad():
            self._images.clamp_(0.0, 1.0)
        return loss.item()

    def _loss(self, images: Tensor) -> Tensor:
        settings, kind, means = self._job.settings, self._job.kind, self._job.means
        if means is None:
            with self._job.compute.autocast():
                loss = objective(kind, self._network(images).float(), self._targets)
            distance = statistics_distance(self._network, first_weight=settings.first_weight)
            return loss + settings.bn_weight * distance
        network = self._network
        assert isinstance(network, Classifier)
        with self._job.compute.autocast():
            features = network.features(images)
            loss = objective(kind, network.head(features).float(), self._targets)
        return loss + settings.mean_weight * means_distance(features.float(), self._targets, means)

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


def means_distance(features: Tensor, targets: Tensor, means: Tensor) -> Tensor:
    """Squared distance of class means of features made unit vectors, summed over the classes of a batch.

    Args:
        features: Shape ``(n, d)``.
        targets: How much of each image is of each class, shape ``(n, k)``.
        means: Wanted, shape ``(k, d)``.
    """
    totals = targets.sum(0)[:, None]
    found = targets.T @ F.normalize(features, dim=1) / totals.clamp_min(1e-6)
    return ((found - means.to(found)) * (totals > 0)).square().sum()


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
