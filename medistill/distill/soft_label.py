"""Soft-label distillation through unrolled training (Li et al. 2020, on gastric X-rays; Wang et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from medistill.core.compute import fresh
from medistill.core.distilled import Schedule
from medistill.core.guarantee import PrivacyPlan
from medistill.core.protocols import Curator, Synthetic, Workbench
from medistill.core.task import Task, TaskKind
from medistill.distill.batches import balanced_batch
from medistill.distill.finite import check_finite
from medistill.distill.labels import label_scores
from medistill.distill.start import check_init, initial, needs_images
from medistill.distill.unrolled import (
    Learned,
    Training,
    before_softplus,
    hypergradients,
    softplus,
)
from medistill.errors import ConfigError
from medistill.networks.convnet import ConvNet
from medistill.seeds import derive_seed
from medistill.training.augment import augment
from medistill.training.objectives import probabilities

_CONFIDENCE = 0.98  #: of a label of 1 to begin with
_REMEDY = "Lower inner_rate or rate_rate, or unroll fewer steps."


@dataclass(frozen=True, kw_only=True)
class SoftLabel:
    r"""Learn images, soft labels and the learning rate together.

    With synthetic images :math:`\tilde x`, soft labels :math:`\tilde y` and a learned step size
    :math:`\tilde\eta`, a network starts at random weights :math:`\theta_0` and takes ``unroll`` steps

    .. math:: \theta_{i+1} = \theta_i - \tilde\eta \nabla_\theta \ell(\tilde x, \tilde y; \theta_i),

    and :math:`(\tilde x, \tilde y, \tilde\eta)` descend the loss of real images at the last weights,
    :math:`\mathcal L = \ell(x, y; \theta_n)`, back-propagated through all steps. Labels start at 98 % one-hot
    and the images from noise.

    Where it deviates: labels are a softmax of learned scores (a sigmoid each for multilabel tasks), so that they
    stay probabilities; the step size is a softplus of a learned number (as in Wang et al.); real batches are
    balanced over classes, because clinical classes are not (images without any label of a multilabel task are one
    more class), and augmented; a ConvNet with instance normalisation
    instead of a deeper network; pixels are projected to ``[0, 1]`` after each step; hypergradients are clipped by
    norm; steps are differentiated one at a time, so that memory does not grow with their number.

    Args:
        iterations: Outer steps.
        unroll: Inner training steps.
        batch_per_class: Real images per class and outer step.
        image_rate: Adam step size of the images (betas 0.5, 0.999).
        label_rate: Adam step size of the label scores.
        rate_rate: Adam step size of the learned learning rate.
        inner_rate: Learning rate to begin with.
        decay_every: The step sizes are halved this often; ``0`` never.
        clip: Largest norm of a hypergradient.
        init: ``"noise"`` or ``"real"``.
        width: Width of the ConvNet.
        checkpoint_every: Outer steps between checkpoints.

    References:
        Li, Togo, Ogawa, Haseyama, ICIP 2020, arXiv:2104.02857, and Comput. Methods Programs Biomed. 227, 2022,
        doi:10.1016/j.cmpb.2022.107189. Wang et al. 2018, arXiv:1811.10959.

    Privacy:
        Needs raw images; nothing is proved about the result.
    """

    iterations: int = 300
    unroll: int = 15
    batch_per_class: int = 64
    image_rate: float = 0.01
    label_rate: float = 0.02
    rate_rate: float = 0.02
    inner_rate: float = 0.02
    decay_every: int = 120
    clip: float = 1.0
    init: str = "noise"
    width: int = 32
    checkpoint_every: int = 25

    def __post_init__(self) -> None:
        check_init(self.init)
        counts = (self.iterations, self.unroll, self.batch_per_class, self.width, self.checkpoint_every)
        rates = (self.image_rate, self.label_rate, self.rate_rate, self.inner_rate, self.clip)
        if min(counts) < 1 or self.decay_every < 0 or min(rates) <= 0:
            raise ConfigError(
                "Expected iterations, unroll, batch_per_class, width and checkpoint_every >= 1, decay_every >= 0, "
                "and step sizes, inner_rate and clip > 0."
            )

    def plan(self, task: Task, image_shape: tuple[int, ...], ipc: int) -> PrivacyPlan:
        """Refused: it needs the images themselves.

        Raises:
            PrivacyError: Always.
        """
        raise needs_images("soft_label")

    def distill(
        self, curator: Curator, *, ipc: int, seed: int, start: Synthetic | None, bench: Workbench
    ) -> Synthetic:
        """Run the outer loop; resumes from the checkpoint with the same bits."""
        real, first = curator.images(), initial(curator, init=self.init, ipc=ipc, seed=seed, start=start)
        generator = torch.Generator().manual_seed(derive_seed(seed, "soft_label"))
        kind, batches = curator.task.kind, [bench.compute.put(torch.arange(len(first.images)))] * self.unroll
        learned = self._learned(first, kind, bench)
        done = learned.restore(bench.checkpoint.load(), generator)
        for step in bench.steps(
            done,
            self.iterations,
            "soft labels",
            every=self.checkpoint_every,
            state=lambda step: learned.state(step, generator),
            current=lambda: self._result(learned, first, kind),
        ):
            network = fresh(
                lambda task, shape: ConvNet(task, shape, width=self.width),
                real.task,
                curator.image_shape,
                derive_seed(seed, "network", step),
            )
            images, targets = map(bench.compute.put, balanced_batch(real, self.batch_per_class, generator))
            labels = probabilities(kind, learned["scores"])
            rates = softplus(learned["raw_rate"]).expand(self.unroll)
            found = hypergradients(
                network.to(bench.compute.device),
                Training(images=learned["images"], soft_labels=labels, rates=rates, batches=batches),
                augment(images, generator),
                targets,
                kind=kind,
            )
            check_finite(found.parts, distiller="soft_label", step=step, remedy=_REMEDY)
            learned.descend((learned["images"], labels, rates), (found.images, found.soft_labels, found.rates))
            if self.decay_every and (step + 1) % self.decay_every == 0:
                learned.halve()
            bench.progress.note(loss=found.loss.item(), rate=rates[0].item())
        return self._result(learned, first, kind)

    def _learned(self, first: Synthetic, kind: TaskKind, bench: Workbench) -> Learned:
        start = {
            "images": first.images,
            "scores": label_scores(first.soft_labels, kind, confidence=_CONFIDENCE),
            "raw_rate": torch.tensor(before_softplus(self.inner_rate)),
        }
        return Learned(
            {name: bench.compute.put(tensor) for name, tensor in start.items()},
            step_sizes={"images": self.image_rate, "scores": self.label_rate, "raw_rate": self.rate_rate},
            clip=self.clip,
        )

    def _result(self, learned: Learned, first: Synthetic, kind: TaskKind) -> Synthetic:
        rate = softplus(learned["raw_rate"].detach()).item()
        schedule = Schedule(epochs=self.unroll, learning_rate=rate, momentum=0.0, decay="constant", augment=False)
        return Synthetic(
            images=learned["images"].detach().cpu().clone(),
            soft_labels=probabilities(kind, learned["scores"].detach()).cpu(),
            hard_labels=first.hard_labels,
            schedule=schedule,
        )
