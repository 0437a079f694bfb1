"""What networks said about the patients of a split, as figures with intervals over these patients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from medistill.core.images import ImageSet
from medistill.core.reports import ArmResult, Difference, Estimate, SubgroupResult
from medistill.core.task import TaskKind
from medistill.evaluate.arms import OPERATING_POINT, Trained
from medistill.evaluate.bootstrap import over_networks, percentile_estimate
from medistill.evaluate.calibration import confidences, reliability
from medistill.evaluate.metrics import Floats, class_aurocs, operating_points, task_metrics
from medistill.evaluate.paired import bootstrap_p_value, delong_p_value
from medistill.evaluate.patient_level import Patients, rules
from medistill.evaluate.subgroups import Subgroup

#: What arms are compared by, where something is to be said about two of them.
COMPARED = ("auroc", "balanced_accuracy")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One arm on one split.

    Args:
        result: Its figures.
        groups: Its figures on parts of the patients.
        draws: Metric to its value in every bootstrap draw, mean over networks, each ``(b,)``.
        positive: Per network, probability of the positive class, each ``(n,)``; nothing for other tasks.
    """

    result: ArmResult
    groups: tuple[SubgroupResult, ...]
    draws: Mapping[str, Floats]
    positive: tuple[Floats, ...]


@dataclass(frozen=True, kw_only=True)
class _Split:
    """Images or patients with weights: what metrics are computed on."""

    kind: TaskKind
    targets: Floats
    weights: Floats
    patients: int

    def measured(
        self, said: Sequence[Floats], cuts: Sequence[tuple[float, ...]]
    ) -> tuple[dict[str, Estimate], dict[str, float], dict[str, Floats]]:
        """Estimates, deviations over networks, and draws, of every metric."""
        plain = np.ones((1, len(self.targets)))
        networks = list(zip(said, cuts, strict=True))
        values = [task_metrics(self.kind, p, self.targets, plain, thresholds=c) for p, c in networks]
        draws = [task_metrics(self.kind, p, self.targets, self.weights, thresholds=c) for p, c in networks]
        estimates, deviations = over_networks(values, draws, n=self.patients)
        return estimates, deviations, {name: np.mean([d[name] for d in draws], axis=0) for name in draws[0]}


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Judges arms on one split.

    Args:
        split: Its name.
        test: Its images.
        validation: Images of other patients, on whom operating points are chosen.
        groups: Parts of its patients.
        weights: Multiplicity of every image in every bootstrap draw, shape ``(b, n)``.
    """

    split: str
    test: ImageSet
    validation: ImageSet
    groups: tuple[Subgroup, ...]
    weights: Floats

    def judge(self, network: str, arm: str, trained: Trained) -> Judged:
        """Figures of one arm."""
        said = [output[self.split] for output in trained.outputs]
        before = [output[OPERATING_POINT] for output in trained.outputs]
        known = self.validation.targets.double().numpy()
        cuts = [operating_points(self._kind, p, known) for p in before]
        estimates, deviations, draws = self._whole.measured(said, cuts)
        result = ArmResult(
            arm=arm,
            network=network,
            split=self.split,
            images=trained.images,
            seeds=len(said),
            metrics=estimates,
            seed_deviation=deviations,
            cpu_seconds=trained.cpu_seconds,
            class_auroc=self._class_auroc(said),
            reliability=self._reliability(said),
            by_patient=self._by_patient(said, before, cuts),
        )
        groups = tuple(self._group(group, network, arm, said, cuts) for group in self.groups)
        positive = tuple(p[:, 1] for p in said) if self._kind is TaskKind.BINARY else ()
        return Judged(result=result, groups=groups, draws=draws, positive=positive)

    def differences(self, judged: Sequence[Judged]) -> Iterator[Difference]:
        """Arms of the same network against each other on this split.

        Every arm against all real images; label recovery and improvement over random as defined by DD-Ranking
        (arXiv 2505.13300), there for accuracy.
        """
        mine = [one for one in judged if one.result.split == self.split]
        for network in dict.fromkeys(one.result.network for one in mine):
            arms = {one.result.arm: one for one in mine if one.result.network == network}
            pairs = [("against_real", name, "real", "auroc") for name in arms if name != "real"]
            pairs += [("label_recovery", "real", "distilled_hard", metric) for metric in COMPARED]
            pairs += [("improvement_over_random", "distilled", "random_soft", metric) for metric in COMPARED]
            for kind, first, second, metric in pairs:
                if first in arms and second in arms:
                    yield self._difference(kind, arms[first], arms[second], metric)

    @property
    def _kind(self) -> TaskKind:
        return self.test.task.kind

    @cached_property
    def _targets(self) -> Floats:
        targets: Floats = self.test.targets.double().numpy()
        return targets

    @cached_property
    def _whole(self) -> _Split:
        return _Split(
            kind=self._kind,
            targets=self._targets,
            weights=self.weights,
            patients=len(self.test.unique_patients),
        )

    def _difference(self, kind: str, first: Judged, second: Judged, metric: str) -> Difference:
        draws = first.draws[metric] - second.draws[metric]
        value = first.result.metrics[metric].value - second.result.metrics[metric].value
        delong = None
        if metric == "auroc" and first.positive:
            shown = self._targets[:, 1] > 0.5
            found = delong_p_value(first.positive, second.positive, shown, self.test.patients)
            delong = found if np.isfinite(found) else None
        return Difference(
            kind=kind,
            arm=first.result.arm,
            against=second.result.arm,
            network=first.result.network,
            split=self.split,
            metric=metric,
            value=percentile_estimate(value, draws, n=self._whole.patients, limits=(-1.0, 1.0)),
            p_value=bootstrap_p_value(draws),
            delong_p_value=delong,
        )

    def _class_auroc(self, said: Sequence[Floats]) -> Mapping[str, Estimate]:
        """Of every class against the rest; nothing for two classes, which have the same."""
        if self._kind is TaskKind.BINARY:
            return {}
        plain = np.ones((1, len(self.test)))
        value = np.mean([class_aurocs(p, self._targets, plain)[:, 0] for p in said], axis=0)
        draws = np.mean([class_aurocs(p, self._targets, self.weights) for p in said], axis=0)
        named = zip(self.test.task.class_names, value, draws, strict=True)
        return {name: percentile_estimate(float(v), d, n=self._whole.patients) for name, v, d in named}

    def _reliability(self, said: Sequence[Floats]) -> tuple[tuple[float, float, float], ...]:
        pairs = [confidences(self._kind, p, self._targets) for p in said]
        return reliability(np.concatenate([p for p, _ in pairs]), np.concatenate([y for _, y in pairs]))

    def _by_patient(
        self, said: Sequence[Floats], before: Sequence[Floats], cuts: Sequence[tuple[float, ...]]
    ) -> Mapping[str, Mapping[str, Estimate]]:
        """Metrics of decisions about patients; nothing where no patient has several images."""
        people = Patients.of(self._kind, self.test.patients, self._targets)
        if not people.several:
            return {}
        others = Patients.of(self._kind, self.validation.patients, self.validation.targets.double().numpy())
        first = np.unique(people.of_image, return_index=True)[1][-len(people.names) :]
        split = _Split(
            kind=self._kind,
            targets=people.targets,
            weights=self.weights[:, first],
            patients=len(people.names),
        )
        found = {}
        for rule in rules(self._kind):
            joined = [people.joined(rule, p, cut) for p, cut in zip(said, cuts, strict=True)]
            chosen = [
                operating_points(self._kind, others.joined(rule, p, cut), others.targets)
                for p, cut in zip(before, cuts, strict=True)
            ]
            found[rule] = split.measured(joined, chosen)[0]
        return found

    def _group(
        self, group: Subgroup, network: str, arm: str, said: Sequence[Floats], cuts: Sequence[tuple[float, ...]]
    ) -> SubgroupResult:
        metrics: Mapping[str, Estimate] = {}
        if group.shown:
            part = _Split(
                kind=self._kind,
                targets=self._targets[group.images],
                weights=self.weights[:, group.images],
                patients=group.patients,
            )
            metrics = part.measured([p[group.images] for p in said], cuts)[0]
        return SubgroupResult(
            arm=arm,
            network=network,
            split=self.split,
            attribute=group.attribute,
            group=group.group,
            patients=group.patients,
            metrics=metrics,
            warning=group.warning,
        )
