"""What the synthetic images are before the first step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from medistill.core.images import ImageSet
from medistill.core.protocols import Curator, Synthetic
from medistill.distill.batches import has_label
from medistill.errors import ConfigError, DataError, PrivacyError

INITS = ("noise", "real")

#: From the positions that may be picked now and those picked before to the next one.
Pick = Callable[[Tensor, list[int]], int]


def check_init(init: str) -> None:
    """Refuse an unknown start.

    Raises:
        ConfigError: If ``init`` is neither ``"noise"`` nor ``"real"``.
    """
    if init not in INITS:
        raise ConfigError(f"Expected init to be one of {', '.join(INITS)}, got {init!r}.")


def needs_images(method: str) -> PrivacyError:
    """The refusal of a method that cannot be private: it works on the images themselves."""
    return PrivacyError(
        f"{method} needs patients' images themselves, which differential privacy does not allow. Take surrogate, "
        "distribution_matching, gradient_matching or sre2l (norm: group), which ask for noisy sums over "
        "patients only."
    )


def initial(curator: Curator, *, init: str, ipc: int, seed: int, start: Synthetic | None) -> Synthetic:
    """Images, soft labels and hard labels to begin with.

    Soft labels are one-hot; those of real images of a multilabel task are the images' own.

    Args:
        curator: Gives the shape and task; asked for images only when ``init="real"``.
        init: ``"noise"`` (Gaussian around mid grey, no data touched) or ``"real"`` (random real images; leaks
            patients, and the release carries a warning).
        ipc: Images per class.
        seed: Public seed.
        start: Result of the distiller before this one; taken as it is when given.
    """
    if start is not None:
        return start
    task = curator.task
    hard = torch.arange(task.n_classes).repeat_interleave(ipc)
    if init == "real":
        chosen = random_images(curator.images(), ipc=ipc, seed=seed)
        return Synthetic(images=chosen.images, soft_labels=chosen.targets, hard_labels=hard)
    images = noise((len(hard), *curator.image_shape), seed=seed)
    soft = F.one_hot(hard, task.n_classes).to(images.dtype)
    return Synthetic(images=images, soft_labels=soft, hard_labels=hard)


def noise(shape: tuple[int, ...], *, seed: int) -> Tensor:
    """Gaussian noise around mid grey, standard deviation 0.2, cut to ``[0, 1]``."""
    generator = torch.Generator().manual_seed(seed)
    return (0.5 + 0.2 * torch.randn(shape, generator=generator)).clamp_(0.0, 1.0)


def random_images(images: ImageSet, *, ipc: int, seed: int) -> ImageSet:
    """Random images, ``ipc`` per class in class order, no patient twice in a class unless they run out.

    Args:
        images: What to choose from.
        ipc: Images per class.
        seed: Public seed.

    Raises:
        DataError: If a class has fewer than ``ipc`` images.
    """
    return images.select(random_places(images, ipc=ipc, seed=seed))


def random_places(images: ImageSet, *, ipc: int, seed: int) -> list[int]:
    """Positions of the images that :func:`random_images` chooses."""
    return choose_images(images, ipc=ipc, seed=seed, picker=lambda _: _first)


def choose_images(images: ImageSet, *, ipc: int, seed: int, picker: Callable[[Tensor], Pick]) -> list[int]:
    """Positions of ``ipc`` images per class, in class order, one after the other.

    No patient is chosen twice in a class unless they run out. An image with several labels is chosen for one of
    them only, as long as there are others; the rarest class chooses first.

    Args:
        images: What to choose from.
        ipc: Images per class.
        seed: Public seed of the order in which images are offered.
        picker: From the positions of a class's images, in that order, to the rule that picks among them.

    Raises:
        DataError: If a class has fewer than ``ipc`` images.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    numbers = {patient: number for number, patient in enumerate(images.unique_patients)}
    patients = torch.tensor([numbers[patient] for patient in images.patients])
    members = [order[has_label(images, label)[order]] for label in range(images.task.n_classes)]
    for name, found in zip(images.task.class_names, members, strict=True):
        if len(found) < ipc:
            raise DataError(f"Class {name!r} has {len(found)} images; ipc={ipc} needs at least {ipc}.")
    taken = torch.zeros(len(images), dtype=torch.bool)
    chosen: dict[int, list[int]] = {}
    for label in sorted(range(len(members)), key=lambda label: len(members[label])):
        offered = members[label]
        picked = _pick(taken[offered], patients[offered], ipc, picker(offered))
        chosen[label] = offered[picked].tolist()
        taken[chosen[label]] = True
    return [position for label in range(len(members)) for position in chosen[label]]


def _pick(taken: Tensor, patients: Tensor, ipc: int, pick: Pick) -> list[int]:
    """Positions among the images of a class; the later ranks only when the earlier ones are used up."""
    new, patient_again, image_again, used = range(4)
    rank = torch.where(taken, image_again, new)
    picked: list[int] = []
    for _ in range(ipc):
        at = pick((rank == rank.min()).nonzero().flatten(), picked)
        rank[(patients == patients[at]) & (rank == new)] = patient_again
        rank[at] = used
        picked.append(at)
    return picked


def _first(candidates: Tensor, _: list[int]) -> int:
    return int(candidates[0])
