"""Labels of features as records: what they say, which SAE they are about, and their parts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...records import Record
from ...steering import fsrl_layers

# Longer texts of labels, and of what an endpoint says of itself, are cut.
MAX_LENGTH = 1000
# Control characters, lone surrogates, and marks that turn the direction of what follows.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def printable(text: str, limit: int = MAX_LENGTH) -> str:
    """A text on one line, safe on a terminal and in a page, of at most ``limit`` characters.

    Any white space becomes a space. Control characters, lone surrogates and bidirectional overrides
    become the replacement character. A text that is too long ends in an ellipsis.
    """
    # Cut before anything else: the rest takes time with the length.
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return _UNPRINTABLE.sub("\ufffd", " ".join(cut.split()))


@dataclass(frozen=True)
class FeatureLabel(Record):
    """What one source says about one feature; texts are made ``printable``.

    Attributes:
        feature: index in the SAE.
        description: in words, if the source has any.
        categories: that it belongs to, such as ``"style"``; empty for none.
        quality: between 0 and 1, how well the label holds up (held-out detection accuracy, or
            agreement between judgments); None if nobody checked.
    """

    feature: int
    description: str | None
    categories: tuple[str, ...]
    quality: float | None

    def __post_init__(self) -> None:
        _set_printable(self, "description", "categories")


@dataclass(frozen=True)
class Labels(Record):
    """Labels of features from one source; texts are made ``printable``.

    Attributes:
        source: where they come from, for people.
        categories: all that a feature could have been given, also if none was.
        d_sae: number of features of the SAE that they are about, if known.
        fingerprint: of that SAE, if known.
        features: one entry per labeled feature; features without an entry are unlabeled.
        undecided: unlabeled features that the source was asked about without a usable answer.
    """

    source: str
    categories: tuple[str, ...]
    d_sae: int | None
    fingerprint: str | None
    features: tuple[FeatureLabel, ...]
    undecided: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _set_printable(self, "source", "categories", "fingerprint")

    def members(self, category: str) -> list[int]:
        """The features of a category, ascending."""
        return sorted(label.feature for label in self.features if category in label.categories)

    def by_category(self, wanted: Iterable[str] | None = None) -> dict[str, list[int]]:
        """Features by category: those asked for, or all, that have any.

        Raises:
            ValueError: for a category that the labels do not know.
        """
        names = list(wanted or self.categories)
        unknown = sorted(set(names) - set(self.categories))
        if unknown:
            raise ValueError(
                f"Expected categories that the labels know, {list(self.categories)}; got {unknown}."
            )
        found = {name: self.members(name) for name in names}
        return {name: members for name, members in found.items() if members}


def _set_printable(record: Record, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        clean = tuple(map(printable, value)) if isinstance(value, tuple) else value
        object.__setattr__(record, name, printable(value) if isinstance(value, str) else clean)


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
        if name is None:
            features.append(FeatureLabel(label.index, None, (), None))
        else:
            auroc = label.auroc[name]
            text = f"{name}, AUROC {auroc:.3f}"
            features.append(FeatureLabel(label.index, text, (name,), max(auroc, 1 - auroc)))
    return Labels("organism", tuple(found[0].auroc), len(found), None, tuple(features))


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
