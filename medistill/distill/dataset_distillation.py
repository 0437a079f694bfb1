"""Dataset distillation (Wang et al. 2018): images and learning rates through back-propagated training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from medistill.core.compute import fresh
from medistill.core.distilled import Recipe, Schedule
from medistill.core.guarantee import PrivacyPlan
from medistill.core.protocols import Curator, Synthetic, Workbench
from medistill.core.task import Task
from medistill.distill.batches import balanced_batch
from medistill.distill.finite import check_finite
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

NAME = "dataset_distillation"
_NETWORKS = ("random", "fixed")
_REMEDY = "Lower inner_rate or rate_rate, take fewer steps or epochs, or go back through fewer of them (window)."


@dataclass(frozen=True, kw_only=True)
class DatasetDistillation:
    r"""Learn images with fixed labels, and the learning rate of every training step.

    A network starts at weights :math:`\theta_0` and passes ``epochs`` times through ``steps`` batches of the
    synthetic images, each step with a learning rate of its own,

    .. math:: \theta_{i+1} = \theta_i
              - \tilde\eta_i \nabla_{\theta_i} \ell(\tilde x_{i \bmod s}, \tilde y_{i \bmod s}; \theta_i),

    and the images and rates descend the loss of real images at the last weights,

    .. math:: \min_{\tilde x, \tilde\eta} \; \mathbb E_{\theta_0} \, \ell(x, y; \theta_n),
              \qquad n = \text{steps} \cdot \text{epochs},

    back-propagated through the steps. Rates are the softplus of learned numbers and not tied across epochs. The
    images are dealt out over the steps; with fewer images per class than steps, steps share them.

    With ``initial="fixed"`` all steps go from one set of weights, and only a network that starts from the same
    weights learns much from the images. Their seed travels in the recipe of a release: the receiver calls
    :func:`starting_network` with it.

    A release carries one learning rate: the schedule that comes with the images trains on all of them at once,
    ``n`` steps at the mean of the learned rates.

    Where it deviates: fewer iterations and a smaller real batch, for a CPU (published: 400 epochs of batches of
    1,024, halving every 40; that is ``iterations=24000, decay_every=2400, batch_per_class=102`` on ten classes of
    6,000); real batches are balanced over classes, because clinical classes are not (images without any label of a
    multilabel task are one more class); a ConvNet with instance
    normalisation instead of LeNet or AlexNet; pixels are projected to ``[0, 1]`` after each step; hypergradients
    are clipped by norm; steps are differentiated one at a time, so that memory does not grow with their number.

    Args:
        iterations: Outer steps.
        steps: Training steps in an epoch, each with its own images where there are enough.
        epochs: Passes over the steps.
        window: Random truncated window (Feng et al. 2023): each outer step trains for a random number of steps
            between ``window`` and all, and goes back through the last ``window``. ``0`` goes through all, as
            published.
        initial: ``"random"`` weights at each outer step, or one ``"fixed"`` set.
        batch_per_class: Real images per class and outer step.
        image_rate: Adam step size of the images (betas 0.5, 0.999).
        rate_rate: Adam step size of the numbers behind the learning rates.
        inner_rate: Learning rate of every step to begin with.
        decay_every: The step sizes are halved this often; ``0`` never.
        clip: Largest norm of a hypergradient.
        init: ``"noise"`` or ``"real"``.
        width: Width of the ConvNet.
        checkpoint_every: Outer steps between checkpoints.

    References:
        Wang, Zhu, Torralba, Efros 2018, arXiv:1811.10959. Window: Feng, Vedantam, Kempe, ICLR 2024,
        arXiv:2311.07025.

    Privacy:
        Needs raw images; nothing is proved about the result.
    """

    iterations: int = 200
    steps: int = 10
    epochs: int = 3
    window: int = 0
    initial: str = "random"
    batch_per_class: int = 64
    image_rate: float = 0.01
    rate_rate: float = 0.01
    inner_rate: float = 0.02
    decay_every: int = 80
    clip: float = 1.0
    init: str = "noise"
    width: int = 32
    checkpoint_every: int = 25

    def __post_init__(self) -> None:
        check_init(self.init)
        counts = (
            self.iterations,
            self.steps,
            self.epochs,
            self.batch_per_class,
            self.width,
            self.checkpoint_every,
        )
        if min(counts) < 1:
            raise ConfigError(
                "Expected iterations, steps, epochs, batch_per_class, width and checkpoint_every >= 1."
            )
        if self.initial not in _NETWORKS:
            raise ConfigError(f"Expected initial to be 'random' or 'fixed', got {self.initial!r}.")
        if not 0 <= self.window <= self.steps * self.epochs:
            raise ConfigError(f"Expected window from 0 to steps x epochs, got {self.window}.")
        if min(self.inner_rate, self.image_rate, self.rate_rate, self.clip) <= 0:
            raise ConfigError("Expected inner_rate, image_rate, rate_rate and clip > 0.")

    def plan(self, task: Task, image_shape: tuple[int, ...], ipc: int) -> PrivacyPlan:
        """Refused: it needs the images themselves.

        Raises:
            PrivacyError: Always.
        """
        raise needs_images("dataset_distillation")

    def distill(
        self, curator: Curator, *, ipc: int, seed: int, start: Synthetic | None, bench: Workbench
    ) -> Synthetic:
        """Run the outer loop; resumes from the checkpoint with the same bits."""
        real, first = curator.images(), initial(curator, init=self.init, ipc=ipc, seed=seed, start=start)
        generator = torch.Generator().manual_seed(derive_seed(seed, NAME))
        raw = torch.full((self.steps * self.epochs,), before_softplus(self.inner_rate))
        learned = Learned(
            {"images": bench.compute.put(first.images), "raw_rates": bench.compute.put(raw)},
            step_sizes={"images": self.image_rate, "raw_rates": self.rate_rate},
            clip=self.clip,
        )
        labels = bench.compute.put(first.soft_labels)
        batches = [bench.compute.put(rows) for rows in dealt(first.hard_labels, steps=self.steps)] * self.epochs
        done = learned.restore(bench.checkpoint.load(), generator)

        def current() -> Synthetic:
            return self._result(learned, first)

        for step in bench.steps(
            done,
            self.iterations,
            "dataset distillation",
            every=self.checkpoint_every,
            state=lambda step: learned.state(step, generator),
            current=current,
        ):
            network = self._network(curator.task, curator.image_shape, seed, step)
            images, targets = map(bench.compute.put, balanced_batch(real, self.batch_per_class, generator))
            rates = softplus(learned["raw_rates"])
            trained = self._length(generator)
            found = hypergradients(
                network.to(bench.compute.device),
                Training(images=learned["images"], soft_labels=labels, rates=rates[:trained], batches=batches),
                images,
                targets,
                kind=real.task.kind,
                window=min(self.window, trained),
            )
            check_finite(found.parts, distiller=NAME, step=step, remedy=_REMEDY)
            learned.descend((learned["images"], rates[:trained]), (found.images, found.rates))
            if self.decay_every and (step + 1) % self.decay_every == 0:
                learned.halve()
            bench.progress.note(loss=found.loss.item(), rate=rates.mean().item())
        return current()

    def _network(self, task: Task, image_shape: tuple[int, ...], seed: int, step: int) -> nn.Module:
        number = step if self.initial == "random" else 0
        return fresh(
            lambda task, shape: ConvNet(task, shape, width=self.width),
            task,
            image_shape,
            derive_seed(seed, "network", number),
        )

    def _length(self, generator: Generator) -> int:
        """Training steps of this outer step."""
        most = self.steps * self.epochs
        if not self.window:
            return most
        return int(torch.randint(self.window, most + 1, (), generator=generator))

    def _result(self, learned: Learned, first: Synthetic) -> Synthetic:
        rate = softplus(learned["raw_rates"].detach()).mean().item()
        schedule = Schedule(
            epochs=self.steps * self.epochs, learning_rate=rate, momentum=0.0, decay="constant", augment=False
        )
        return Synthetic(
            images=learned["images"].detach().cpu().clone(),
            soft_labels=first.soft_labels,
            hard_labels=first.hard_labels,
            schedule=schedule,
        )


def dealt(hard_labels: Tensor, *, steps: int) -> list[Tensor]:
    """Rows that each step of an epoch trains on: every class in every batch, images dealt out in turn.

    Args:
        hard_labels: Class of each image, shape ``(m,)``; equally many of every class.
        steps: Steps of an epoch.

    Returns:
        ``steps`` row numbers. With ``ipc >= steps`` no image is in two batches; with less, batches come again.
    """
    rows = torch.stack([(hard_labels == label).nonzero().flatten() for label in sorted(set(hard_labels.tolist()))])
    hands = min(steps, rows.shape[1])
    return [rows[:, step % hands :: hands].flatten() for step in range(steps)]


def starting_network(recipe: Recipe, task: Task, image_shape: tuple[int, ...]) -> nn.Module:
    """The network that images distilled with ``initial="fixed"`` belong to, at its initial weights.

    Args:
        recipe: Recipe of the release; carries the seed.
        task: Task of the release.
        image_shape: Shape of one released image.

    Raises:
        ConfigError: If the recipe has no distiller of this kind with ``initial="fixed"``.
    """
    for position, step in enumerate(recipe.steps):
        if step.distiller == NAME and step.settings["initial"] == "fixed":
            distiller = DatasetDistillation(**step.settings)
            return distiller._network(task, image_shape, derive_seed(recipe.seed, "distill", position), 0)
    raise ConfigError(
        f"Expected a recipe with {NAME} and initial='fixed', found {recipe.method}. "
        "Its images train any network: start from weights of your own."
    )
