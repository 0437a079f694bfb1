"""What the synthetic images are before the first step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from medistill.core.images import ImageSet
from medistill.core.protocols import Curator, Synthetic
from medistill.errors import ConfigError, DataError

INITS = ("noise", "real")


def check_init(init: str) -> None:
    """Refuse an unknown start.

    Raises:
        ConfigError: If ``init`` is neither ``"noise"`` nor ``"real"``.
    """
    if init not in INITS:
        raise ConfigError(f"Expected init to be one of {', '.join(INITS)}, got {init!r}.")


def initial(curator: Curator, *, init: str, ipc: int, seed: int, start: Synthetic | None) -> Synthetic:
    """Images, one-hot soft labels and hard labels to begin with.

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
        images = random_images(curator.images(), ipc=ipc, seed=seed).images.clone()
    else:
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
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator).tolist()
    classes = images.classes.tolist()
    chosen: list[int] = []
    for label, name in enumerate(images.task.class_names):
        members = [i for i in order if classes[i] == label]
        if len(members) < ipc:
            raise DataError(f"Class {name!r} has {len(members)} images; ipc={ipc} needs at least {ipc}.")
        first_of_patient = {images.patients[i]: i for i in reversed(members)}
        first = [i for i in members if first_of_patient[images.patients[i]] == i]
        repeated = sorted(set(members) - set(first), key=members.index)
        chosen += (first + repeated)[:ipc]
    return images.select(chosen)
