"""Trajectory matching (MTT, Cazenavette et al. 2022; TESLA, Cui et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from medistill.core.compute import Compute
from medistill.core.guarantee import PrivacyPlan
from medistill.core.images import ImageSet
from medistill.core.protocols import Curator, Synthetic, Workbench
from medistill.core.task import Task, TaskKind
from medistill.distill.batches import groups
from medistill.distill.checkpoint import pack_optimizer, unpack_optimizer
from medistill.distill.decay import cosine
from medistill.distill.experts import architecture, teacher_labels, train_experts, unflattened
from medistill.distill.finite import check_finite
from medistill.distill.labels import label_scores
from medistill.distill.start import check_init, initial, needs_images
from medistill.distill.unrolled import Parameters, descended
from medistill.errors import ConfigError
from medistill.networks.convnet import ConvNet
from medistill.seeds import derive_seed
from medistill.training.augment import augment
from medistill.training.objectives import probabilities

MEMORIES = ("recomputed", "constant", "unrolled")
_REMEDY = "Lower student_rate, rate_rate, student_steps or expert_rate."

#: One step of a student: from its parameters, and whether what follows is to be differentiated, to the next ones.
StudentStep = Callable[[Parameters, bool], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class TrajectoryMatching:
    r"""Match stretches of the way that networks trained on real images take through parameter space.

    Experts are trained on the real images; their parameters :math:`\theta^*_t` are kept after every epoch. A
    student starts at :math:`\hat\theta_0 = \theta^*_t` of a random expert and epoch :math:`t` and takes :math:`N`
    steps on the augmented synthetic set with soft labels :math:`\tilde y` and a learned rate :math:`\eta`; then

    .. math:: \hat\theta_{i+1} = \hat\theta_i - \eta\, g_i, \quad
              g_i = \nabla_\theta \ell(\tilde x, \tilde y; \hat\theta_i), \qquad
              \mathcal L = \frac{\lVert \hat\theta_N - \theta^*_{t+M} \rVert^2}
                               {\lVert \theta^*_t - \theta^*_{t+M} \rVert^2}

    is differentiated with respect to images, soft labels and rate. ``memory`` says how:

    - ``"unrolled"`` is MTT: back-propagation through all steps, whose graphs are all held.
    - ``"recomputed"`` gives the same gradients with the graph of one step at a time: the student runs once and
      its parameters are kept; then every step is taken again, the last one first, and the adjoint goes back:
      :math:`\lambda_i = (\partial\hat\theta_{i+1} / \partial\hat\theta_i)^\top \lambda_{i+1}`.
    - ``"constant"`` is TESLA: with :math:`G = \sum_i g_i` the loss is, up to its denominator,
      :math:`2\eta(\theta^*_{t+M} - \theta^*_t)^\top G + \eta^2 \lVert G \rVert^2 + \mathrm{const}`, and each
      :math:`g_i` is differentiated on its own. That is the exact gradient of a loss in which the
      :math:`\hat\theta_i` inside :math:`g_i` are constants: what an image changes in the parameters of *later*
      steps (of second order) is left out, so :math:`\lambda_i = \lambda_N`. It equals MTT's gradient for a single
      step, and for images that only the last step uses; otherwise they differ the more, the larger :math:`\eta`.
      The value of the loss is always MTT's.

    Where it deviates: experts are few and short (published: 100 of 50 epochs, batches of 256) and only their first
    epochs are matched; augmentation keeps labels (no mirroring); no ZCA whitening; Adam with cosine decay instead
    of SGD with step sizes of 100 to 10,000 for pixels, and on the logarithm of the rate, so that no step size
    depends on the size of images or networks; pixels are projected to ``[0, 1]``; the last images are the result
    (MTT's code keeps those with the best *test* accuracy); labels are learned scores in every mode, which begin as
    the experts' opinion of the images where these show something (TESLA) and near one-hot where they are noise.

    Args:
        iterations: Steps on the synthetic images.
        experts: Networks trained on real images, in parallel.
        epochs: Passes of an expert over the real images.
        expert_rate: Learning rate of the experts (SGD without momentum).
        expert_batch: Real images per step of an expert.
        expert_span: :math:`M`, epochs that a student has to make up for.
        max_start_epoch: :math:`t` is drawn below it.
        student_steps: :math:`N`.
        student_batch: Synthetic images per step of a student; ``0`` takes all.
        student_rate: :math:`\eta` to begin with.
        image_rate: Adam step size of the pixels, cosine-decayed to a twentieth, as the next two.
        label_rate: Adam step size of the label scores.
        rate_rate: Adam step size of :math:`\log\eta`.
        memory: ``"recomputed"``, ``"constant"`` or ``"unrolled"``.
        soft_labels: Whether labels are learned; one-hot otherwise.
        confidence: Soft labels begin no closer to 0 and 1 than this lets them.
        init: ``"noise"`` or ``"real"``.
        width: Width of the networks.
        checkpoint_every: Steps between checkpoints; every expert is kept when it is trained.

    References:
        Cazenavette et al., CVPR 2022, arXiv:2203.11932. Cui et al., ICML 2023, arXiv:2211.10586.

    Privacy:
        Needs raw images; nothing is proved about the result.
    """

    iterations: int = 120
    experts: int = 8
    epochs: int = 3
    expert_rate: float = 0.01
    expert_batch: int = 64
    expert_span: int = 2
    max_start_epoch: int = 2
    student_steps: int = 10
    student_batch: int = 0
    student_rate: float = 0.03
    image_rate: float = 0.1
    label_rate: float = 0.02
    rate_rate: float = 0.05
    memory: str = "recomputed"
    soft_labels: bool = True
    confidence: float = 0.9
    init: str = "noise"
    width: int = 32
    checkpoint_every: int = 20

    def __post_init__(self) -> None:
        check_init(self.init)
        if self.memory not in MEMORIES:
            raise ConfigError(f"Expected memory to be one of {', '.join(MEMORIES)}, got {self.memory!r}.")
        whole = (self.iterations, self.experts, self.epochs, self.expert_batch, self.expert_span)
        more = (self.max_start_epoch, self.student_steps, self.width, self.checkpoint_every)
        rates = (self.expert_rate, self.student_rate, self.image_rate, self.label_rate, self.rate_rate)
        if min(*whole, *more) < 1 or self.student_batch < 0 or min(rates) <= 0:
            raise ConfigError("Expected counts >= 1, student_batch >= 0 and rates > 0.")
        if self.max_start_epoch - 1 + self.expert_span > self.epochs:
            raise ConfigError(
                f"Expected max_start_epoch - 1 + expert_span <= epochs, got {self.max_start_epoch} - 1 + "
                f"{self.expert_span} > {self.epochs}. Train experts for more epochs or match earlier ones."
            )
        if not 0.5 < self.confidence < 1:
            raise ConfigError(f"Expected confidence in (0.5, 1), got {self.confidence}.")

    def plan(self, task: Task, image_shape: tuple[int, ...], ipc: int) -> PrivacyPlan:
        """Refused: it needs the images themselves.

        Raises:
            PrivacyError: Always.
        """
        raise needs_images("trajectory_matching")

    def distill(
        self, curator: Curator, *, ipc: int, seed: int, start: Synthetic | None, bench: Workbench
    ) -> Synthetic:
        """Train the experts, then match stretches of their trajectories; resumes with the same bits."""
        real, kept = curator.images(), bench.checkpoint.load() or {}
        groups(real)  # refuses a class without images
        experts = self._experts(real, seed, kept, bench)
        network = architecture(real.task, curator.image_shape, width=self.width, seed=seed)
        network.to(bench.compute.device)
        first = initial(curator, init=self.init, ipc=ipc, seed=seed, start=start)
        if self.soft_labels and (start is not None or self.init == "real"):
            first = replace(first, soft_labels=teacher_labels(network, experts, first.images, real.task.kind))
        run = _Run(self, network, experts, first, kind=real.task.kind, seed=seed, compute=bench.compute)
        done = run.restore(kept) if "step" in kept else 0
        for step in bench.steps(
            done, self.iterations, "trajectories", every=self.checkpoint_every, state=run.state, current=run.result
        ):
            loss = run.step(step)
            bench.progress.note(loss=loss, rate=run.log_rate.exp().item())
        return run.result()

    def _experts(self, real: ImageSet, seed: int, kept: Mapping[str, Tensor], bench: Workbench) -> list[Tensor]:
        """Trajectories of all experts; each is kept as soon as it is there."""
        experts = [kept[_name(number)] for number in range(self.experts) if _name(number) in kept]
        done = len(experts)
        trained = train_experts(
            real,
            range(done, self.experts),
            epochs=self.epochs,
            rate=self.expert_rate,
            batch=self.expert_batch,
            width=self.width,
            seed=seed,
            compute=bench.compute,
        )
        for rows in bench.progress.track(trained, "experts", total=self.experts, completed=done):
            experts.append(rows)
            bench.checkpoint.save({_name(number): each for number, each in enumerate(experts)})
        return experts


class _Run:
    """What is learned, with its optimiser, and one step."""

    def __init__(
        self,
        settings: TrajectoryMatching,
        network: ConvNet,
        experts: Sequence[Tensor],
        first: Synthetic,
        *,
        kind: TaskKind,
        seed: int,
        compute: Compute,
    ) -> None:
        self._settings, self._network, self._experts, self._first = settings, network, experts, first
        self._kind, self._compute = kind, compute
        self._generator = torch.Generator().manual_seed(derive_seed(seed, "trajectory_matching"))
        self.images = compute.put(first.images.clone()).requires_grad_()
        scores = label_scores(first.soft_labels, kind, confidence=settings.confidence)
        self.scores = compute.put(scores).requires_grad_()
        self.log_rate = compute.put(torch.tensor(math.log(settings.student_rate))).requires_grad_()
        self._rates = {self.images: settings.image_rate, self.log_rate: settings.rate_rate}
        if settings.soft_labels:
            self._rates[self.scores] = settings.label_rate
        groups = [{"params": [tensor], "lr": rate} for tensor, rate in self._rates.items()]
        self._adam = torch.optim.Adam(groups, betas=(0.9, 0.99))

    def soft_labels(self) -> Tensor:
        if self._settings.soft_labels:
            return probabilities(self._kind, self.scores)
        return self._compute.put(self._first.soft_labels)

    def result(self) -> Synthetic:
        return Synthetic(
            images=self.images.detach().cpu().clone(),
            soft_labels=self.soft_labels().detach().cpu().clone(),
            hard_labels=self._first.hard_labels,
        )

    def step(self, step: int) -> float:
        """Match one stretch of one expert; its loss."""
        settings, learned = self._settings, tuple(self._rates)
        rows = self._experts[self._drawn(len(self._experts))]
        begin = self._drawn(settings.max_start_epoch)
        ends = (self._compute.put(rows[epoch]) for epoch in (begin, begin + settings.expert_span))
        start, target = (unflattened(self._network, row) for row in ends)
        loss, gradients = hypergradients(self._student_steps(), start, target, learned, memory=settings.memory)
        parts = (torch.tensor(loss), *gradients)
        check_finite(parts, distiller="trajectory_matching", step=step, remedy=_REMEDY)
        decay = cosine(step / settings.iterations, floor=0.05)
        for group, rate in zip(self._adam.param_groups, self._rates.values(), strict=True):
            group["lr"] = rate * decay
        for tensor, gradient in zip(learned, gradients, strict=True):
            tensor.grad = gradient
        self._adam.step()
        with torch.no_grad():
            self.images.clamp_(0.0, 1.0)
        return loss

    def _drawn(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self._generator))

    def _student_steps(self) -> list[StudentStep]:
        """Steps on parts of the synthetic set, every image once before any comes again."""
        count, m = self._settings.student_steps, len(self.images)
        batch = self._settings.student_batch or m
        rounds = range(math.ceil(count * batch / m))
        parts = [part for _ in rounds for part in torch.split(torch.randperm(m, generator=self._generator), batch)]
        seeds = torch.randint(2**62, (count,), generator=self._generator).tolist()
        return [self._student_step(part, seed) for part, seed in zip(parts[:count], seeds, strict=True)]

    def _student_step(self, part: Tensor, seed: int) -> StudentStep:
        def step(parameters: Parameters, differentiable: bool) -> dict[str, Tensor]:
            images = augment(self.images[part], torch.Generator().manual_seed(seed))
            labels, rate = self.soft_labels()[part], self.log_rate.exp()
            return descended(
                self._network, parameters, images, labels, rate, self._kind, differentiable=differentiable
            )

        return step

    # -- checkpoint --------------------------------------------------------------------------------------------

    def state(self, step: int) -> dict[str, Tensor]:
        return {
            "step": torch.tensor(step),
            "generator": self._generator.get_state(),
            "images": self.images,
            "scores": self.scores,
            "log_rate": self.log_rate,
            **{_name(number): rows for number, rows in enumerate(self._experts)},
            **pack_optimizer(self._adam, "adam"),
        }

    def restore(self, state: Mapping[str, Tensor]) -> int:
        with torch.no_grad():
            for name in ("images", "scores", "log_rate"):
                getattr(self, name).copy_(state[name])
        unpack_optimizer(self._adam, state, "adam")
        self._generator.set_state(state["generator"])
        return int(state["step"])


def matching_loss(found: Parameters, start: Parameters, target: Parameters) -> Tensor:
    r"""Squared distance to the target, relative to that of the start: :math:`\mathcal L` above."""
    return _distance(found, target) / _distance(start, target)


def _distance(one: Parameters, other: Parameters) -> Tensor:
    return torch.stack([(one[name] - other[name]).square().sum() for name in other]).sum()


def hypergradients(
    steps: Sequence[StudentStep],
    start: Parameters,
    target: Parameters,
    learned: Sequence[Tensor],
    *,
    memory: str,
) -> tuple[float, tuple[Tensor, ...]]:
    """The matching loss after some student steps, and its gradients.

    Args:
        steps: What the student does, one after the other.
        start: Parameters of the expert where the student starts.
        target: Parameters of the expert some epochs later.
        learned: Leaves to differentiate with respect to; every step must use each.
        memory: See :class:`TrajectoryMatching`.
    """
    if memory == "unrolled":
        found: Parameters = _leaves(start)
        for step in steps:
            found = step(found, True)
        loss = matching_loss(found, start, target)
        return loss.item(), torch.autograd.grad(loss, learned)
    visited = [start]
    for step in steps:
        visited.append({name: value.detach() for name, value in step(_leaves(visited[-1]), False).items()})
    last = _leaves(visited.pop())
    loss = matching_loss(last, start, target)
    adjoint = torch.autograd.grad(loss, list(last.values()))
    totals = [torch.zeros_like(tensor) for tensor in learned]
    for step, parameters in zip(reversed(steps), reversed(visited), strict=True):
        leaves = _leaves(parameters)
        inputs = [*learned, *leaves.values()] if memory == "recomputed" else learned
        parts = torch.autograd.grad(list(step(leaves, True).values()), inputs, grad_outputs=adjoint)
        totals = [total + part for total, part in zip(totals, parts, strict=False)]
        adjoint = parts[len(learned) :] or adjoint
    return loss.item(), tuple(totals)


def _leaves(parameters: Parameters) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_() for name, value in parameters.items()}


def _name(number: int) -> str:
    return f"expert.{number}"
