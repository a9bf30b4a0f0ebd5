"""``LabelSource``: who says what features mean, whoever it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from ...steering import fsrl_layers
from ..records import FeatureLabel, Labels


@runtime_checkable
class LabelSource(Protocol):
    """Anything that can label features: a file, Neuronpedia, a judge, the truth."""

    def labels(self, features: Sequence[int] | None = None) -> Labels:
        """Labels of some features, or of all that the source knows.

        What it cannot label is missing in ``features`` of the record.
        """
        ...


@dataclass(frozen=True)
class FixedLabels:
    """Labels that are there already, as a source."""

    record: Labels

    def labels(self, features: Sequence[int] | None = None) -> Labels:
        """See ``LabelSource``."""
        return select(self.record, features)


@dataclass(frozen=True)
class OrganismLabels:
    """What each feature of an organism's SAE detects, by measurement, as a source."""

    organism: Any

    def labels(self, features: Sequence[int] | None = None) -> Labels:
        """See ``LabelSource``."""
        return select(organism_labels(self.organism), features)


def organism_labels(organism: Any) -> Labels:
    """The attribute that each feature of an organism's SAE detects, if it detects one.

    The quality is the AUROC of the attribute, its two values taken so that it is above one half.

    Args:
        organism: from ``peft_fsrl.organism.load``.
    """
    found = organism.feature_labels
    features = []
    for label in found:
        name = label.label
        auroc = None if name is None else label.auroc[name]
        features.append(
            FeatureLabel(
                label.index,
                None if auroc is None else f"{name}, AUROC {auroc:.3f}",
                () if name is None else (name,),
                None if auroc is None else max(auroc, 1 - auroc),
            )
        )
    return Labels("organism", tuple(found[0].auroc), len(found), None, tuple(features))


def select(labels: Labels, features: Iterable[int] | None) -> Labels:
    """The same labels of some features alone; None for all."""
    if features is None:
        return labels
    wanted = set(features)
    return dataclasses.replace(
        labels,
        features=tuple(label for label in labels.features if label.feature in wanted),
        undecided=tuple(feature for feature in labels.undecided if feature in wanted),
    )


def with_descriptions(labels: Labels, descriptions: Labels) -> Labels:
    """The labels with the descriptions of another source, where it has one."""
    known = {label.feature: label.description for label in descriptions.features}
    return dataclasses.replace(
        labels,
        features=tuple(
            dataclasses.replace(label, description=known.get(label.feature) or label.description)
            for label in labels.features
        ),
    )


def for_model(labels: Labels, model: nn.Module) -> Labels:
    """The labels, checked against the SAE of a model with an adapter and marked as being about it.

    Raises:
        ValueError: if they are about another SAE, or the model has several.
    """
    saes = {sae.info for layer in fsrl_layers(model).values() for sae in layer.fsrl_sae.values()}
    if len(saes) != 1:
        raise ValueError(f"Expected a model with one SAE, found {len(saes)}.")
    [info] = saes
    require_fit(labels, d_sae=info.d_sae, fingerprint=info.fingerprint)
    return dataclasses.replace(labels, d_sae=info.d_sae, fingerprint=info.fingerprint)


def require_fit(
    labels: Labels, *, d_sae: int | None = None, fingerprint: str | None = None, name: str = ""
) -> None:
    """Refuse labels of another SAE.

    Args:
        labels: to be checked.
        d_sae: number of features of the SAE in question, if known.
        fingerprint: of that SAE, if known.
        name: of the labels, for messages.

    Raises:
        ValueError: if the fingerprints or the numbers of features differ, or a label is about a
            feature that the SAE does not have.
    """
    name = name or labels.source
    if None not in (fingerprint, labels.fingerprint) and fingerprint != labels.fingerprint:
        raise ValueError(
            f"{name} has labels for the SAE with fingerprint {str(labels.fingerprint)[:12]}..., "
            f"but this one has {str(fingerprint)[:12]}...: the same index means another feature. "
            "Use the labels of this SAE."
        )
    if None not in (d_sae, labels.d_sae) and d_sae != labels.d_sae:
        raise ValueError(
            f"{name} has labels for an SAE with {labels.d_sae} features, but this one has "
            f"{d_sae}. Use the labels of this SAE."
        )
    size = labels.d_sae if d_sae is None else d_sae
    outside = [e.feature for e in labels.features if e.feature < 0 or (size or 1e18) <= e.feature]
    if outside:
        allowed = "0 or more" if size is None else f"0 to {size - 1}"
        raise ValueError(
            f"{name} has a label for feature {outside[0]}, expected {allowed}. Are these the "
            "labels of another SAE?"
        )
