"""Single features: what zeroing the steering of each would do, and does, to the loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import functional
from ..steering import SteeringEvent, ablate_features, observe
from ..training.likelihood import batched
from ..training.objectives import simpo_loss
from ..training.running import evaluating
from ..tuner.layer import FSRLLayer
from ..tuner.outputs import hidden_states_of, replace_hidden_states
from . import statistics
from .preferences import preference_margins, score_preferences
from .ranking import steering_gradient
from .records import FeatureAblation, FeatureAblations, Interval, PreferenceScores, Usage
from .segments import active_sae, only_layer


def ablate_single_features(
    model: nn.Module,
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    usage: Usage,
    *,
    trained: PreferenceScores | None = None,
    n_features: int = 30,
    n_listed: int = 200,
    measure: bool = True,
    seed: int = 0,
    beta: float = 10.0,
    gamma: float = 5.0,
    batch_size: int = 16,
    description: str | None = None,
) -> FeatureAblations:
    """Estimate for all features at once what zeroing each would cost, and measure the largest.

    The estimate is of first order: ``-sum(dloss/dv * v)`` over all tokens of both texts of a pair,
    with ``v`` as it acts: a suppression counts for the activation that there is to suppress. One
    backward pass serves all features. The measurement zeroes one feature at a time.

    Args:
        model: a model with one FSRL layer.
        dataset: rows with the texts ``prompt``, ``chosen`` and ``rejected``; read once, and once
            more per measured feature.
        tokenizer: the model's tokenizer.
        usage: the adapter's use of features, from ``compute_usage``: which to list, and labels.
        trained: scores of the model as it is, if they are known.
        n_features: how many of the largest estimates to measure.
        n_listed: how many features to list at most.
        measure: whether to measure at all.
        seed: of the bootstrap.
        beta: see ``score_preferences``.
        gamma: see ``score_preferences``.
        batch_size: pairs per pass.
        description: shown beside the progress bars; None shows none.

    Raises:
        ValueError: for more than one FSRL layer, or an empty data set; for fewer than two pairs
            where effects are measured.
        ImportError: without the ``audit`` extra.
    """
    if measure:
        statistics.require()

    def bar(text: str) -> str | None:
        return None if description is None else f"{description} {text}"

    settings: dict[str, Any] = {"beta": beta, "gamma": gamma, "batch_size": batch_size}
    estimates, n_pairs = estimate_ablations(
        model, dataset, tokenizer, description=bar("estimate"), **settings
    )
    labels = {use.feature: use.label for use in usage.features}
    order = sorted(labels, key=lambda feature: -float(estimates[feature]))
    chosen = order[:n_features] if measure else []
    rises: dict[int, Interval] = {}
    if chosen and trained is None:
        trained = score_preferences(model, dataset, tokenizer, description=bar("none"), **settings)
    for number, feature in enumerate(chosen, start=1):
        assert trained is not None
        with ablate_features(model, [feature]):
            scores = score_preferences(
                model, dataset, tokenizer, description=bar(f"{number}/{len(chosen)}"), **settings
            )
        rises[feature] = statistics.difference_interval(scores.losses, trained.losses, seed=seed)
    estimated = [float(estimates[feature]) for feature in chosen]
    measured = [rises[feature].value for feature in chosen]
    listed = order[: max(n_listed, len(chosen))]
    return FeatureAblations(
        n_pairs=n_pairs,
        features=tuple(
            FeatureAblation(feature, rises.get(feature), float(estimates[feature]), labels[feature])
            for feature in listed
        ),
        rank_correlation=statistics.spearman(estimated, measured) if chosen else None,
        slope=statistics.slope_through_zero(estimated, measured),
    )


def estimate_ablations(
    model: nn.Module,
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    beta: float = 10.0,
    gamma: float = 5.0,
    batch_size: int = 16,
    description: str | None = None,
) -> tuple[Tensor, int]:
    """``-sum(dloss/dv * v)`` of every feature, mean over pairs; see ``ablate_single_features``.

    Returns:
        Shape ``(d_sae,)`` in float64, zero for a feature that the adapter lacks; number of pairs.

    Raises:
        ValueError: for more than one FSRL layer, or an empty data set.
    """
    layer, sae = only_layer(model), active_sae(model)
    totals = torch.zeros(sae.info.d_sae, dtype=torch.float64)
    n_pairs = 0
    events: list[SteeringEvent] = []
    progress = tqdm(desc=description, unit="pair", disable=description is None, leave=False)
    with evaluating(model), torch.enable_grad(), observe(model, events.append), progress:
        for rows in batched(dataset, batch_size):
            with _leaf_output(layer) as outputs:
                margins = preference_margins(model, rows, tokenizer, beta)
            [output], [event] = outputs, events
            [gradient] = torch.autograd.grad(simpo_loss(margins, gamma).sum(), output)
            events.clear()
            with torch.no_grad():
                of_batch = _sum_effects(layer, event, gradient)
            totals[sae.feature_index] += of_batch.cpu()
            n_pairs += len(rows)
            progress.update(len(rows))
    if not n_pairs:
        raise ValueError("Expected at least one preference pair, found none.")
    return -totals / n_pairs, n_pairs


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

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        leaf = hidden_states_of(output).detach().requires_grad_()
        outputs.append(leaf)
        return replace_hidden_states(output, leaf)

    # The layer's own hook comes first, so this one sees what it made.
    hook = layer.base_layer.register_forward_hook(cut)
    try:
        yield outputs
    finally:
        hook.remove()
