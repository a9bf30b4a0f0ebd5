"""What ``explain`` found, as a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from peft import PeftModel
from torch import nn

from .converse import LinearAdapter


class Share(NamedTuple):
    """A share of the squared change of the residual stream.

    Attributes:
        value: 1 where nothing is missed; below 0 where more is added than was there.
        standard_error: over sequences; nan for fewer than two.
    """

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.1%} ± {self.standard_error:.1%}"


class FeatureShare(NamedTuple):
    """What one feature carries.

    Attributes:
        feature: its index in the whole SAE.
        share: by how much the share of the change in the features' span falls without it.
        mean: mean of its steering over tokens, in units of the feature's activation.
        mean_abs: mean of the absolute value.
    """

    feature: int
    share: float
    mean: float
    mean_abs: float


@dataclass(frozen=True, eq=False)
class Explanation:
    """The change that a fine-tune makes at one place, in the features of an SAE.

    Shares are of ``E ||h_tuned - h_base||^2`` over the tokens of the held-out data.

    Attributes:
        place: path of the module at whose output the change was seen.
        n_tokens: tokens that were judged.
        change: ``E ||h_tuned - h_base||^2 / E ||h_base||^2``.
        in_dictionary: what lies in the span of all features. 1 where they span the whole residual
            stream, as most dictionaries do: it says something only below that.
        in_features: what lies in the span of the chosen features, whatever their steering.
        explained: what the fitted adapter does, which is to predict their steering from ``h_base``.
        features: the chosen features, those that carry most first.
        adapter: the fitted adapter.
    """

    place: str
    n_tokens: int
    change: float
    in_dictionary: Share
    in_features: Share
    explained: Share
    features: tuple[FeatureShare, ...]
    adapter: LinearAdapter
    _settings: Mapping[str, Any] = field(repr=False)

    def attach(self, model: nn.Module) -> PeftModel:
        """The base model with the fitted adapter in place of the fine-tune."""
        return self.adapter.attach(model, **self._settings)

    def __str__(self) -> str:
        rows = [
            f"Change at {self.place}: {self.change:.2%} of the residual stream's squared norm "
            f"({self.n_tokens} tokens)",
            f"  in the span of the dictionary        {self.in_dictionary}",
            f"  in the span of {len(self.features):4} features         {self.in_features}",
            f"  explained by the fitted adapter      {self.explained}",
            f"{'feature':>10}{'share':>9}{'mean v':>10}{'mean |v|':>10}",
        ]
        for each in self.features:
            numbers = f"{each.share:9.1%}{each.mean:+10.3f}{each.mean_abs:10.3f}"
            rows.append(f"{each.feature:10}{numbers}")
        return "\n".join(rows)
