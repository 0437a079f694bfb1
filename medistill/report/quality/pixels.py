"""Grey levels of a sample of the images, in memory that does not grow with the cohort."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from medistill.core.cohort import Cohort, Instance, PixelStore
from medistill.core.task import Task, TaskKind
from medistill.report.quality.records import BINS, Intensity, Levels, Lookalikes, Shortcut, Unusual

MOST_SAMPLED = 2000  #: images whose pixels are looked at
LOOKALIKE = 0.995  #: correlation above which two pictures are called alike
_LEVELS = 65536
_MOMENTS = (np.arange(_LEVELS) / (_LEVELS - 1)) ** np.array([[1], [2]])
_READ_BYTES = 8 * 2**20
_UNUSUAL_EACH = 4
_MOST_PAIRS = 6
_PAIR_BLOCK = 256
_SMALL = 32


def sampled_instances(cohort: Cohort, *, seed: int, most: int = MOST_SAMPLED) -> list[Instance]:
    """At most ``most`` images, drawn without replacement and as evenly over the classes as they allow.

    Returns:
        Instances in the order of their ``row``; the same seed gives the same ones.
    """
    by_class = strata(cohort)
    generator = np.random.default_rng(seed)
    chosen: list[Instance] = []
    left = most
    for place, group in enumerate(sorted(by_class, key=len)):
        share = min(len(group), left // (len(by_class) - place))
        chosen += [group[i] for i in generator.choice(len(group), share, replace=False)]
        left -= share
    return sorted(chosen, key=lambda instance: instance.row)


def strata(cohort: Cohort) -> list[list[Instance]]:
    """Every image once, by class; one of several classes with the rarest of them, those of none by themselves."""
    names = cohort.task.class_names
    shown = [cohort.task.names_in(instance.label) for instance in cohort.instances]
    counts = Counter(name for own in shown for name in own)
    groups: dict[str, list[Instance]] = {name: [] for name in names}
    for instance, own in zip(cohort.instances, shown, strict=True):
        rarest = min(own, key=lambda name: (counts[name], names.index(name)), default="")
        groups.setdefault(rarest, []).append(instance)
    return list(groups.values())


def blocks(store: PixelStore, rows: Sequence[int]) -> Iterator[tuple[slice, NDArray[np.uint16]]]:
    """Pixels of the rows, a few megabytes at a time: where they stand in ``rows``, and ``(n, c, ...)``."""
    start, size = 0, 1
    while start < len(rows):
        block = store.read(rows[start : start + size])
        yield slice(start, start + len(block)), block
        start += len(block)
        size = max(1, _READ_BYTES // max(1, block[0].nbytes))


def measure_intensity(cohort: Cohort, *, seed: int = 0, most: int = MOST_SAMPLED) -> Intensity:
    """Grey levels of at most ``most`` images, in memory that does not grow with the cohort.

    Returns:
        Histograms and percentiles over images; exact where the cohort has no more images than ``most``.
    """
    sample = sampled_instances(cohort, seed=seed, most=most)
    names = cohort.task.class_names
    shown = [cohort.task.names_in(instance.label) for instance in sample]
    classes = np.array([[name in own for name in names] for own in shown])
    each = _weights(cohort, sample)
    histograms, whole = np.zeros((len(names), BINS)), np.zeros(BINS)
    figures = np.zeros((len(sample), 4))  # per image: mean, standard deviation, share of black, share of white
    constant = np.zeros(len(sample), dtype=bool)
    small = np.zeros((len(sample), _SMALL * _SMALL), dtype=np.float32)
    for where, block in blocks(cohort.store, [instance.row for instance in sample]):
        for place, image in enumerate(block, start=where.start):
            counts = np.bincount(image.ravel(), minlength=_LEVELS)
            histogram = counts.reshape(BINS, -1).sum(1) / image.size
            histograms[classes[place]] += histogram
            whole += each[place] * histogram
            figures[place] = _figures(counts / image.size)
            constant[place] = counts.max() == image.size
        shrunk = torch.nn.functional.adaptive_avg_pool2d(scaled(block), _SMALL)
        small[where] = shrunk.mean(1).reshape(len(block), -1).numpy()
    levels = tuple(_levels(n, classes[:, c], histograms[c], figures) for c, n in enumerate(names))
    patients = [instance.patient for instance in sample]
    faults = _faults(figures, constant)
    return Intensity(
        sampled=len(sample),
        images=len(cohort),
        overall=_overall(whole, figures, each),
        classes=levels,
        shortcuts=tuple(_shortcuts(cohort.task, classes, patients, figures)),
        constant=faults.count("one grey level"),
        empty=faults.count("almost empty"),
        overexposed=faults.count("over-exposed"),
        unusual=tuple(_unusual([instance.row for instance in sample], figures, faults)),
        lookalikes=_lookalikes(sample, small, faults),
    )


def _figures(shares: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """Mean, standard deviation, share of black and share of white from the share of each stored level."""
    mean, square = (float(moment) for moment in _MOMENTS @ shares)
    return mean, max(0.0, square - mean * mean) ** 0.5, float(shares[0]), float(shares[-1])


def scaled(block: NDArray[np.uint16]) -> Tensor:
    """Stored pixels as ``(n, c, h, w)`` in ``[0, 1]``; of volumes the middle slice."""
    flat = block[:, :, block.shape[2] // 2] if block.ndim == 5 else block
    return torch.from_numpy(flat.astype(np.float32)) / 65535.0


def _lookalikes(sample: Sequence[Instance], small: NDArray[np.float32], faults: Sequence[str]) -> Lookalikes:
    """Pairs under two patients; images without a picture look like nothing."""
    usable = [i for i, fault in enumerate(faults) if not fault]
    shown = [sample[i] for i in usable]
    centred = small[usable] - small[usable].mean(1, keepdims=True)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)
    patients, splits = _codes([i.patient for i in shown]), _codes([i.split for i in shown])
    keys = _codes([i.pixel_key or str(i.row) for i in shown])  # the same key is a duplicate, and counted as such
    pairs, across, best = 0, 0, list[tuple[float, int, int]]()
    for start in range(0, len(shown), _PAIR_BLOCK):
        mine = slice(start, start + _PAIR_BLOCK)
        alike = centred[mine] @ centred[start:].T
        close = np.triu(alike > LOOKALIKE, 1)
        close &= (patients[mine, None] != patients[start:]) & (keys[mine, None] != keys[start:])
        pairs += int(close.sum())
        across += int((close & (splits[mine, None] != splits[start:])).sum())
        at = np.flatnonzero(close)
        at = at[np.argsort(-alike.ravel()[at], kind="stable")][:_MOST_PAIRS]
        best += [(alike.flat[i], start + i // alike.shape[1], start + i % alike.shape[1]) for i in at]
    best = sorted(best, key=lambda pair: (-pair[0], pair[1], pair[2]))[:_MOST_PAIRS]
    return Lookalikes(
        across_patients=pairs,
        across_splits=across,
        pairs=tuple((shown[i].row, shown[j].row, round(min(1.0, float(value)), 4)) for value, i, j in best),
    )


def _codes(values: Sequence[str]) -> NDArray[np.int64]:
    """Equal values as equal numbers."""
    return np.unique(np.array(values, dtype=np.str_), return_inverse=True)[1]


def _percentiles(
    values: NDArray[np.float64], weights: NDArray[np.float64] | None = None
) -> tuple[float, float, float]:
    """5th, 50th and 95th percentile, interpolated; with equal weights those of :func:`numpy.percentile`."""
    if len(values) < 2:
        only = float(values[0]) if len(values) else 0.0
        return only, only, only
    order = np.argsort(values, kind="stable")
    heavy = np.ones(len(values)) if weights is None else weights[order]
    middles = np.cumsum(heavy) - heavy / 2
    places = (middles - middles[0]) / (middles[-1] - middles[0])
    low, middle, high = np.interp((0.05, 0.5, 0.95), places, values[order])
    return float(low), float(middle), float(high)


def _levels(
    name: str, mine: NDArray[np.bool_], histogram: NDArray[np.float64], figures: NDArray[np.float64]
) -> Levels:
    own, count = figures[mine], int(mine.sum())
    means = own.mean(0) if count else np.zeros(4)
    return Levels(
        name=name,
        images=count,
        histogram=tuple((histogram / max(1, count)).tolist()),
        black=float(means[2]),
        white=float(means[3]),
        brightness=_percentiles(own[:, 0]),
        contrast=_percentiles(own[:, 1]),
    )


def _weights(cohort: Cohort, sample: Sequence[Instance]) -> NDArray[np.float64]:
    """How many images of the cohort each sampled one stands for: the sample is more even than the cohort."""
    drawn = {instance.row for instance in sample}
    weight: dict[int, float] = {}
    for group in strata(cohort):
        rows = [instance.row for instance in group if instance.row in drawn]
        weight |= dict.fromkeys(rows, len(group) / max(1, len(rows)))
    return np.array([weight[instance.row] for instance in sample])


def _overall(histogram: NDArray[np.float64], figures: NDArray[np.float64], each: NDArray[np.float64]) -> Levels:
    """All sampled images with their weights."""
    total = max(1.0, each.sum())
    return Levels(
        name="",
        images=len(each),
        histogram=tuple((histogram / total).tolist()),
        black=float(each @ figures[:, 2] / total),
        white=float(each @ figures[:, 3] / total),
        brightness=_percentiles(figures[:, 0], each),
        contrast=_percentiles(figures[:, 1], each),
    )


def _shortcuts(
    task: Task, classes: NDArray[np.bool_], patients: Sequence[str], figures: NDArray[np.float64]
) -> Iterator[Shortcut]:
    """AUROC of a class against the rest from one number per patient; for two classes once, as it is the same."""
    for measure, column in (("brightness", 0), ("contrast", 1)):
        for c, name in enumerate(task.class_names):
            if task.kind is TaskKind.BINARY and c == 0:
                continue
            inside, outside = (_patient_means(figures[:, column], patients, classes[:, c], own) for own in (1, 0))
            n, m = len(inside), len(outside)
            if min(n, m) < 2:
                continue
            ranks = rankdata(np.concatenate([inside, outside]))
            area = (ranks[:n].sum() - n * (n + 1) / 2) / (n * m)
            chance = 0.5 + 3 * ((n + m + 1) / (12 * n * m)) ** 0.5
            yield Shortcut(
                measure=measure,
                name=name,
                auroc=float(max(area, 1 - area)),
                chance=float(min(1.0, chance)),
            )


def _patient_means(
    values: NDArray[np.float64], patients: Sequence[str], mine: NDArray[np.bool_], own: int
) -> list[float]:
    of_patient: dict[str, list[float]] = defaultdict(list)
    for value, patient, inside in zip(values, patients, mine, strict=True):
        if bool(inside) == bool(own):
            of_patient[patient].append(float(value))
    return [float(np.mean(found)) for found in of_patient.values()]


def _faults(figures: NDArray[np.float64], constant: NDArray[np.bool_]) -> list[str]:
    """What is wrong with each image, if anything."""
    mean_and_more = zip(figures, constant, strict=True)
    return [
        "one grey level"
        if flat
        else "almost empty"
        if black > 0.98 or deviation < 0.01
        else "over-exposed"
        if white > 0.5
        else ""
        for (_, deviation, black, white), flat in mean_and_more
    ]


def _unusual(rows: Sequence[int], figures: NDArray[np.float64], faults: Sequence[str]) -> Iterator[Unusual]:
    """Faulty images first, then the darkest, brightest and flattest of the rest; each image once."""
    taken: set[int] = set()
    faulty = [i for i, fault in enumerate(faults) if fault][: 2 * _UNUSUAL_EACH]
    for i in faulty:
        taken.add(i)
        yield Unusual(row=rows[i], what=faults[i])
    for what, values in (("dark", figures[:, 0]), ("bright", -figures[:, 0]), ("flat", figures[:, 1])):
        others = [int(i) for i in np.argsort(values, kind="stable") if int(i) not in taken and not faults[i]]
        for i in others[:_UNUSUAL_EACH]:
            taken.add(i)
            yield Unusual(row=rows[i], what=what)
