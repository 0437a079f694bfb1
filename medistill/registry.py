"""Names of distillers, attacks, networks and sources, resolved lazily.

A registry maps a public name to ``"module:attribute"``; nothing is imported until the name is used, so listing
and ``--help`` stay fast. Other packages add entries through entry points of the group ``medistill.<kind>``.

Example:
    >>> DISTILLERS.names()[:2]
    ['coreset', 'dataset_distillation']
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from medistill.errors import ConfigError

__all__ = ["ATTACKS", "DISTILLERS", "NETWORKS", "SOURCES", "Registry", "nearest"]


def nearest(name: str, known: Iterable[str]) -> str:
    """Suffix for an error message: the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


@dataclass(frozen=True, kw_only=True)
class Registry:
    """Mapping from public names to ``"module:attribute"`` of one kind."""

    kind: str
    targets: dict[str, str]

    def _all(self) -> dict[str, str]:
        found = {point.name: point.value for point in entry_points(group=f"medistill.{self.kind}")}
        return {**found, **self.targets}

    def names(self) -> list[str]:
        """Known names, alphabetical."""
        return sorted(self._all())

    def load(self, name: str) -> Any:
        """Import what a name stands for.

        Raises:
            ConfigError: If the name is unknown; the message names the nearest one.
        """
        targets = self.targets if name in self.targets else self._all()  # a search among all packages is slow
        if name not in targets:
            known = ", ".join(sorted(targets))
            raise ConfigError(f"Unknown {self.kind} {name!r}.{nearest(name, targets)} Known: {known}.")
        module, _, attribute = targets[name].partition(":")
        return getattr(import_module(module), attribute)


DISTILLERS = Registry(
    kind="distillers",
    targets={
        "coreset": "medistill.distill.coreset:Coreset",
        "dataset_distillation": "medistill.distill.dataset_distillation:DatasetDistillation",
        "distribution_matching": "medistill.distill.distribution_matching:DistributionMatching",
        "gradient_matching": "medistill.distill.gradient_matching:GradientMatching",
        "kernel_ridge": "medistill.distill.kernel_ridge:KernelRidge",
        "soft_label": "medistill.distill.soft_label:SoftLabel",
        "sre2l": "medistill.distill.sre2l:SRe2L",
        "surrogate": "medistill.distill.surrogate:Surrogate",
        "trajectory_matching": "medistill.distill.trajectory_matching:TrajectoryMatching",
    },
)
NETWORKS = Registry(
    kind="networks",
    targets={
        "alexnet": "medistill.networks.alexnet:AlexNet",
        "convnet": "medistill.networks.convnet:ConvNet",
        "densenet121": "medistill.networks.adapters:DenseNet",
        "efficientnet": "medistill.networks.adapters:EfficientNet",
        "lenet": "medistill.networks.lenet:LeNet",
        "mlp": "medistill.networks.mlp:MLP",
        "mobilenet": "medistill.networks.adapters:MobileNet",
        "resnet": "medistill.networks.resnet:ResNet",
        "resnet18": "medistill.networks.resnet:ResNet18",
        "ridge_convnet": "medistill.networks.ridge_convnet:RidgeConvNet",
        "vit": "medistill.networks.vit:ViT",
    },
)
ATTACKS = Registry(
    kind="attacks",
    targets={
        "attribute_inference": "medistill.audit.attribute_inference:AttributeInference",
        "calibrated_neighbour": "medistill.audit.calibrated_neighbour:CalibratedNeighbour",
        "copy_alarm": "medistill.audit.copy_alarm:CopyAlarm",
        "label_leakage": "medistill.audit.label_leakage:LabelLeakage",
        "reidentification": "medistill.audit.reidentification:Reidentification",
        "shadow": "medistill.audit.shadow:Shadow",
        "tracing": "medistill.audit.tracing:Tracing",
    },
)
SOURCES = Registry(
    kind="sources",
    targets={
        "archive": "medistill.ingest.sources.archive:ArchiveSource",
        "dicomdir": "medistill.ingest.sources.dicomdir:DicomdirSource",
        "dicomweb": "medistill.ingest.sources.dicomweb:DicomWebSource",
        "dimse": "medistill.ingest.sources.dimse:DimseSource",
        "folder": "medistill.ingest.sources.folder:FolderSource",
        "image_folder": "medistill.ingest.sources.image_folder:ImageFolderSource",
        "nifti": "medistill.ingest.sources.nifti:NiftiSource",
        "npz": "medistill.ingest.sources.npz:NpzSource",
        "series": "medistill.ingest.sources.series:SeriesSource",
    },
)
