"""Single features: what zeroing the steering of each would do, and does, to the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..records import Interval, Record
from ..steering import SteeringEvent, ablate_features, observe
from ..training.objectives import simpo_loss
from ..training.running import evaluating, on_output
from ..tuner.layer import FSRLLayer
from . import statistics
from .preferences import PreferenceScores, preference_margins, score_preferences
from .ranking import steering_gradient
from .segments import active_sae, only_layer
from .session import Session
from .usage import Usage


@dataclass(frozen=True)
class FeatureAblation(Record):
    """What zeroing the steering of one feature does to the SimPO loss.

    Attributes:
        feature: index in the SAE.
        rise: of the mean loss, measured; None where only the estimate was made.
        first_order: estimate of the rise, ``-sum(dloss/dv * v)``, mean over pairs.
        label: what the feature detects, if known.
    """

    feature: int
    rise: Interval | None
    first_order: float
    label: str | None = None


@dataclass(frozen=True)
class FeatureAblations(Record):
    """Single features zeroed one at a time, largest first-order estimate first.

    Attributes:
        n_pairs: preference pairs.
        features: one entry per feature.
        rank_correlation: Spearman's, between estimate and measured rise; None below three.
        slope: of the measured rises on the estimates, by least squares through zero; None if none.
    """

    n_pairs: int
    features: tuple[FeatureAblation, ...]
    rank_correlation: float | None
    slope: float | None


def measure_features(
    session: Session,
    usage: Usage,
    *,
    trained: PreferenceScores | None = None,
    n_features: int = 30,
    n_listed: int = 200,
) -> FeatureAblations:
    """Estimate for all features at once what zeroing each would cost, and measure the largest.

    The estimate is of first order: ``-sum(dloss/dv * v)`` over all tokens of both texts of a pair,
    with ``v`` as it acts: a suppression counts for the activation that there is to suppress. One
    backward pass serves all features. The measurement zeroes one feature at a time.

    Args:
        session: its model has one FSRL layer.
        usage: the adapter's use of features, from ``compute_usage``: which to list, and labels.
        trained: scores of the model as it is, if they are known.
        n_features: how many of the largest estimates to measure; 0 only estimates.
        n_listed: how many features to list at most.

    Raises:
        ValueError: for more than one FSRL layer, or an empty data set; for fewer than two pairs
            where effects are measured.
        ImportError: without the ``audit`` extra, where effects are measured.
    """
    if n_features:
        statistics.require()
    estimates = estimate_features(session)
    labels = {use.feature: use.label for use in usage.features}
    order = sorted(labels, key=lambda feature: -float(estimates[feature]))
    chosen = order[:n_features]
    rises: dict[int, Interval] = {}
    if chosen and trained is None:
        trained = score_preferences(session)
    for number, feature in enumerate(chosen, start=1):
        assert trained is not None
        with ablate_features(session.model, [feature]):
            scores = score_preferences(session, f"without feature {number}/{len(chosen)}")
        rises[feature] = statistics.difference_interval(
            scores.losses, trained.losses, seed=session.seed
        )
    estimated = [float(estimates[feature]) for feature in chosen]
    measured = [rises[feature].value for feature in chosen]
    return FeatureAblations(
        n_pairs=len(session.rows),
        features=tuple(
            FeatureAblation(feature, rises.get(feature), float(estimates[feature]), labels[feature])
            for feature in order[: max(n_listed, len(chosen))]
        ),
        rank_correlation=statistics.spearman(estimated, measured) if chosen else None,
        slope=statistics.slope_through_zero(estimated, measured),
    )


def estimate_features(session: Session) -> Tensor:
    """``-sum(dloss/dv * v)`` of every feature, mean over pairs; see ``measure_features``.

    Returns:
        Shape ``(d_sae,)`` in float64, zero for a feature that the adapter lacks.

    Raises:
        ValueError: for more than one FSRL layer, no active adapter, or an empty data set.
    """
    model = session.model
    layer, sae = only_layer(model), active_sae(model)
    totals = torch.zeros(sae.info.d_sae, dtype=torch.float64)
    events: list[SteeringEvent] = []
    with evaluating(model), torch.enable_grad(), observe(model, events.append):
        for texts in session.batches("estimate"):
            with _leaf_output(layer) as outputs:
                margins = preference_margins(model, texts, session.beta)
            [output], [event] = outputs, events
            [gradient] = torch.autograd.grad(simpo_loss(margins, session.gamma).sum(), output)
            events.clear()
            with torch.no_grad():
                of_batch = _sum_effects(layer, event, gradient)
            totals[sae.feature_index] += of_batch.cpu()
    return -totals / len(session.rows)


def _sum_effects(layer: FSRLLayer, event: SteeringEvent, gradient: Tensor) -> Tensor:
    """``sum(dloss/dv * v)`` per feature, one text after another: ``(n_features,)``."""
    sae = event.sae
    adapter: Any = layer.fsrl_adapter[event.adapter_name]
    total = torch.zeros(sae.n_features, dtype=torch.float64, device=gradient.device)
    for v, x, slope in zip(event.steering_vector, event.hidden_states, gradient, strict=True):
        if adapter.non_negative and not sae.signed:
            v = functional.clamped_update(v, sae.encode(x[None])[0])
        total += (steering_gradient(sae, x, slope).double() * v.double()).sum(dim=0)
    return total


@contextmanager
def _leaf_output(layer: FSRLLayer) -> Iterator[list[Tensor]]:
    """Collects the steered output of a forward pass, cut off from what made it."""
    outputs: list[Tensor] = []

    def cut(given: Tensor, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    with on_output(layer.base_layer, cut):
        yield outputs
