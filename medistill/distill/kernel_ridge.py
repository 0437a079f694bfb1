"""Ridge regression on network features with soft labels (the FRePo / KIP family), from noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medistill.core.compute import Compute, fresh
from medistill.core.guarantee import PrivacyPlan
from medistill.core.images import ImageSet
from medistill.core.protocols import Curator, Synthetic, Workbench
from medistill.core.task import Task, TaskKind
from medistill.distill.batches import groups
from medistill.distill.checkpoint import pack_optimizer, unpack_optimizer
from medistill.distill.decay import cosine
from medistill.distill.finite import check_finite
from medistill.distill.formation import check_formation, formed, initial_formation, labels_of_tiles
from medistill.distill.labels import label_scores
from medistill.distill.start import check_init, needs_images
from medistill.errors import ConfigError
from medistill.networks.convnet import ConvNet
from medistill.seeds import derive_seed
from medistill.training.augment import augment
from medistill.training.fit import cache_sized
from medistill.training.objectives import objective, probabilities
from medistill.training.views import tiles


@dataclass(frozen=True, kw_only=True)
class KernelRidge:
    r"""Learn images and soft labels from which ridge regression predicts real targets.

    With features :math:`\Phi_s` of the synthetic and :math:`\Phi_t` of real images under a network that is being
    trained on the synthetic set, and centred labels :math:`Y` (:math:`y - 1/k`, or :math:`y - 1/2` for several
    labels an image),

    .. math:: \hat Y_t = \Phi_t \Phi_s^\top (\Phi_s \Phi_s^\top + \lambda \tfrac{\mathrm{tr}}{m} I)^{-1} Y_s,
              \qquad \mathcal L = \lVert \hat Y_t - Y_t \rVert^2 + \gamma \,\mathcal L_\mathrm{match}

    is differentiated with respect to :math:`S` and :math:`Y_s`: the inner problem is solved in closed form. A
    pool of networks of different ages, each trained a few steps on the synthetic set between uses and renewed at
    ``max_age``, keeps the features from being those of one training stage (FRePo).

    Where it deviates from FRePo: starts from noise; real batches hold all classes equally; real features serve
    ``uses`` steps; the ridge is 1e-2 instead of 1e-6, and a matching term with weight ``match * (1 - 1/ipc)``,
    tiles counted, holds class means together (without both, a few images fit the networks of the pool and nothing
    else); labels are a softmax of learned scores; the result is the running average of the last steps.

    Args:
        iterations: Steps on the synthetic images.
        rate: Adam step size of the pixels, cosine-decayed to a twentieth.
        label_rate: Adam step size of the label scores.
        real_batch: Real images per look at the data.
        pool: Networks kept.
        uses: Steps between looks at the data of one network.
        advance: Training steps of a network between its uses.
        max_age: Training steps after which a network is renewed.
        network_rate: SGD learning rate of the networks (momentum 0.9).
        ridge: :math:`\lambda`.
        match: Weight of the matching term.
        confidence: Soft label of an image's own class to begin with.
        average: Decay of the running average.
        formation: Tiles along one side of an image, see :mod:`medistill.distill.formation`; 1 for none.
        init: ``"noise"`` or ``"real"``.
        width: Width of the networks.
        checkpoint_every: Steps between checkpoints.

    References:
        Zhou et al. 2022 (FRePo), arXiv:2206.00719. Nguyen et al. 2021 (KIP), arXiv:2011.00050.

    Privacy:
        Needs raw images; nothing is proved about the result.
    """

    iterations: int = 1500
    rate: float = 0.02
    label_rate: float = 0.02
    real_batch: int = 384
    pool: int = 8
    uses: int = 10
    advance: int = 10
    max_age: int = 150
    network_rate: float = 0.01
    ridge: float = 1e-2
    match: float = 1.0
    confidence: float = 0.9
    average: float = 0.99
    formation: int = 1
    init: str = "noise"
    width: int = 32
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        check_init(self.init)
        check_formation(self.formation)
        whole = (self.iterations, self.real_batch, self.pool, self.uses, self.max_age, self.checkpoint_every)
        if min(whole) < 1 or min(self.rate, self.label_rate, self.ridge) <= 0:
            raise ConfigError(
                "Expected iterations, real_batch, pool, uses, max_age and checkpoint_every >= 1 and rate, "
                "label_rate and ridge > 0."
            )
        if not 0.5 < self.confidence < 1:
            raise ConfigError(f"Expected confidence in (0.5, 1), got {self.confidence}.")

    def plan(self, task: Task, image_shape: tuple[int, ...], ipc: int) -> PrivacyPlan:
        """Refused: it needs the images themselves.

        Raises:
            PrivacyError: Always.
        """
        raise needs_images("kernel_ridge")

    def distill(
        self, curator: Curator, *, ipc: int, seed: int, start: Synthetic | None, bench: Workbench
    ) -> Synthetic:
        """Run the loop; resumes from the checkpoint with the same bits."""
        first = initial_formation(
            curator, formation=self.formation, init=self.init, ipc=ipc, seed=seed, start=start
        )
        run = _Run(self, curator.images(), first, ipc=ipc, seed=seed, compute=bench.compute)
        kept = bench.checkpoint.load()
        done = 0 if kept is None else run.restore(kept)
        steps = bench.steps(
            done,
            self.iterations,
            "ridge regression",
            every=self.checkpoint_every,
            state=run.state,
            current=run.result,
        )
        for step in steps:
            bench.progress.note(loss=run.step(step))
        return run.result()


class _Member:
    """A network of the pool: trained on the synthetic set as it stands, with real features it last saw."""

    def __init__(self, network: ConvNet, rate: float) -> None:
        self.network, self.age, self.used = network.requires_grad_(False), 0, 0
        self.optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
        self.real = self.target = torch.empty(0)


class _Run:
    """The state of one distillation and its step."""

    def __init__(
        self, settings: KernelRidge, real: ImageSet, first: Synthetic, *, ipc: int, seed: int, compute: Compute
    ) -> None:
        self._settings, self._real, self._seed = settings, real, seed
        self._ipc = ipc * settings.formation ** (first.images.ndim - 2)
        self._compute, self._hard_labels = compute, first.hard_labels
        k = self._classes = real.task.n_classes
        self._per_class = max(1, settings.real_batch // k)
        self._match = settings.match * (1 - 1 / self._ipc)
        self._multilabel = real.task.kind is TaskKind.MULTILABEL
        self._generator = torch.Generator().manual_seed(derive_seed(seed, "kernel_ridge"))
        labels = labels_of_tiles(first, settings.formation)
        scores = label_scores(labels, real.task.kind, confidence=settings.confidence)
        self.images = compute.put(first.images.clone()).requires_grad_()
        self.scores = compute.put(scores).requires_grad_()
        groups = [
            {"params": [self.images], "lr": settings.rate},
            {"params": [self.scores], "lr": settings.label_rate},
        ]
        self._adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
        self.average_images, self.average_scores = self.images.detach().clone(), self.scores.detach().clone()
        self._members: list[_Member | None] = [None] * settings.pool
        self._made = 0

    def _soft_labels(self, scores: Tensor) -> Tensor:
        return probabilities(self._real.task.kind, scores)

    def _centred(self, labels: Tensor) -> Tensor:
        return labels - (0.5 if self._multilabel else 1 / self._classes)

    def result(self) -> Synthetic:
        """The running averages."""
        images, labels = self.average_images.cpu().clone(), self._soft_labels(self.average_scores).cpu()
        return formed(images, labels, self._hard_labels, formation=self._settings.formation)

    # -- one step ----------------------------------------------------------------------------------------------

    def step(self, step: int) -> float:
        settings = self._settings
        decay = cosine(step / settings.iterations, floor=0.05)
        for group, rate in zip(self._adam.param_groups, (settings.rate, settings.label_rate), strict=True):
            group["lr"] = rate * decay
        member = self._member(step % settings.pool)
        member.used += 1
        loss = self._loss(member)
        check_finite([loss], distiller="kernel_ridge", step=step, remedy="Lower rate, or raise ridge.")
        self._adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._adam.step()
        with torch.no_grad():
            self.images.clamp_(0.0, 1.0)
            weight = 1 - min(settings.average, step / (step + 10))
            self.average_images.lerp_(self.images, weight)
            self.average_scores.lerp_(self.scores, weight)
        return loss.item()

    def _loss(self, member: _Member) -> Tensor:
        with self._compute.autocast():
            pictures = tiles(self.images, self._settings.formation)
            features = member.network.features(augment(pictures, self._generator)).float()
        labels = self._centred(self._soft_labels(self.scores))
        predicted = ridge_prediction(features, labels, member.real, ridge=self._settings.ridge)
        loss = (predicted - member.target).square().mean()
        if self._match:
            k, d = self._classes, features.shape[1]
            real = member.real[: k * self._per_class]  # without those that have no label
            gap = features.view(k, self._ipc, d).mean(1) - real.view(k, -1, d).mean(1)
            spread = (member.real - member.real.mean(0)).square().sum(1).mean()
            loss = loss + self._match * gap.square().sum(1).mean() / spread
        return loss

    def _member(self, slot: int) -> _Member:
        """The network of a slot, renewed or trained on when its real features have served."""
        settings = self._settings
        member = self._members[slot]
        if member is not None and member.used < settings.uses:
            return member
        if member is None or member.age >= settings.max_age:
            spread = settings.max_age * slot // settings.pool if member is None else 0
            member = self._members[slot] = self._new_member()
            self._train(member, spread)
        else:
            self._train(member, settings.advance)
        member.real, member.target = self._look(member.network)
        member.used = 0
        return member

    def _new_member(self) -> _Member:
        def factory(task: Task, shape: tuple[int, ...]) -> nn.Module:
            return ConvNet(task, shape, width=self._settings.width)

        shape = tuple(self._real.images.shape[1:])
        network = fresh(factory, self._real.task, shape, derive_seed(self._seed, "network", self._made))
        self._made += 1
        assert isinstance(network, ConvNet)
        self._compute.ready(network)
        return _Member(network, self._settings.network_rate)

    def _train(self, member: _Member, steps: int) -> None:
        images = tiles(self.images.detach(), self._settings.formation)
        labels = self._soft_labels(self.scores.detach())
        each = len(images) // len(self.images)
        member.network.requires_grad_(True)
        for step in range(steps):
            some = slice(step % each, None, each)  # one tile of every image, as a student sees them
            logits = member.network(augment(images[some], self._generator))
            loss = objective(self._real.task.kind, logits, labels[some])
            member.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            member.optimizer.step()
        member.network.requires_grad_(False)
        member.age += steps

    @torch.no_grad()
    def _look(self, network: ConvNet) -> tuple[Tensor, Tensor]:
        """Features and centred targets of a fresh, augmented batch: ``per_class`` images of every class in turn.

        Of a multilabel task as many without any label follow, where there are such.
        """
        rows = []
        for members in groups(self._real):
            if len(members) >= self._per_class:
                drawn = torch.randperm(len(members), generator=self._generator)[: self._per_class]
            else:
                drawn = torch.randint(len(members), (self._per_class,), generator=self._generator)
            rows.append(members[drawn])
        index = torch.cat(rows)
        parts = [self._compute.put(part) for part in cache_sized(self._real.images[index])]
        with self._compute.autocast():
            features = torch.cat([network.features(augment(part, self._generator)) for part in parts]).float()
        return features, self._compute.put(self._centred(self._real.targets[index]))

    # -- checkpoint --------------------------------------------------------------------------------------------

    def state(self, step: int) -> dict[str, Tensor]:
        kept = {
            "step": torch.tensor(step),
            "made": torch.tensor(self._made),
            "generator": self._generator.get_state(),
            "images": self.images,
            "scores": self.scores,
            "average_images": self.average_images,
            "average_scores": self.average_scores,
            **pack_optimizer(self._adam, "adam"),
        }
        for slot, member in enumerate(self._members):
            if member is not None:
                kept |= {f"member{slot}.network.{k}": v for k, v in member.network.state_dict().items()}
                kept |= pack_optimizer(member.optimizer, f"member{slot}.sgd")
                kept[f"member{slot}.real"], kept[f"member{slot}.target"] = member.real, member.target
                kept[f"member{slot}.counts"] = torch.tensor([member.age, member.used])
        return kept

    def restore(self, state: Mapping[str, Tensor]) -> int:
        with torch.no_grad():
            self.images.copy_(state["images"])
            self.scores.copy_(state["scores"])
        put = self._compute.put
        self.average_images, self.average_scores = put(state["average_images"]), put(state["average_scores"])
        unpack_optimizer(self._adam, state, "adam")
        for slot in range(len(self._members)):
            if f"member{slot}.real" in state:
                member = self._members[slot] = self._new_member()
                prefix = f"member{slot}.network."
                member.network.load_state_dict(
                    {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
                )
                unpack_optimizer(member.optimizer, state, f"member{slot}.sgd")
                member.real = put(state[f"member{slot}.real"])
                member.target = put(state[f"member{slot}.target"])
                member.age, member.used = (int(count) for count in state[f"member{slot}.counts"])
        self._made = int(state["made"])
        self._generator.set_state(state["generator"])
        return int(state["step"])


def ridge_prediction(features: Tensor, labels: Tensor, queries: Tensor, *, ridge: float) -> Tensor:
    """Predictions of ridge regression without intercept, in its dual form.

    Args:
        features: Shape ``(m, d)``.
        labels: Shape ``(m, k)``.
        queries: Shape ``(n, d)``.
        ridge: Penalty relative to the mean diagonal of the Gram matrix.

    Returns:
        Shape ``(n, k)``.
    """
    gram = features @ features.T
    penalty = ridge * gram.diagonal().mean().detach()
    weights = torch.linalg.solve(gram + penalty * torch.eye(len(gram)).to(gram), labels)
    predicted: Tensor = queries @ features.T @ weights
    return predicted
