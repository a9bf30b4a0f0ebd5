"""Which layer is worth steering? A first-order answer and a probe, before any training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..records import Interval, Record
from ..sae.frozen import FrozenSAE
from ..sae.loading import take_sae
from ..training.objectives import simpo_loss
from ..training.running import evaluating, on_output
from ..tuner.config import FSRLConfig
from ..tuner.placement import decoder_layers, resolve_targets
from . import statistics
from .preferences import preference_margins
from .session import Session

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class FeatureEffect(Record):
    """What a little constant steering of one feature does to the loss.

    Attributes:
        feature: index in the SAE.
        slope: derivative of the loss with respect to ``v`` of this feature at every token, at zero:
            negative where promoting it lowers the loss.
        error: standard error of the slope, over pairs.
    """

    feature: int
    slope: float
    error: float


@dataclass(frozen=True)
class LayerEffect(Record):
    """First-order effect of steering at one layer on the preference loss, before any training.

    Both figures say how fast the loss falls per unit of ``||v||_1`` at every token, so both can be
    compared with ``l1_coeff``: one that is larger leaves nothing to be gained to first order. An
    adapter can do more than the first, which steers every token alike, and less than the second,
    which steers each token of each answer as suits it best.

    Attributes:
        layer: the steered layer.
        constant: with the best single feature, the same at every token.
        per_token: with the best feature at each token.
        n_pairs: preference pairs measured.
        features: the features with the largest slopes, largest first.
    """

    layer: int
    constant: float
    per_token: float
    n_pairs: int
    features: tuple[FeatureEffect, ...]


def rank_layers(
    session: Session, saes: Mapping[int, Any], *, n_features: int = 10
) -> tuple[LayerEffect, ...]:
    """``dL/dv`` at ``v = 0`` for every feature of every layer, in one pass over some pairs.

    With ``x' = x + decode_linear(v)`` the gradient at a token is ``W_dec @ dL/dx`` (times the SAE's
    output scale, if it has one): one backward pass of the base model serves all layers, and of an
    SAE only the decoder is used. That the steered activations cannot be negative is left out: a
    positive slope, which asks for suppression, can be used only where the feature is active.

    Args:
        session: its model is the base model, without an adapter; some hundred pairs suffice.
        saes: for each layer, whatever ``FSRLConfig`` takes as its SAE. All are held in memory.
        n_features: how many features to name per layer.

    Returns:
        One record per layer, largest ``per_token`` first: adapters react to each token.

    Raises:
        ValueError: for no pair, no layer, a layer that does not exist, or an SAE of another width.
    """
    model = session.model
    config = FSRLConfig(layer=sorted(saes), sae=dict(saes))
    frozen = {key: take_sae(sae) for key, sae in config.resolve_saes().items()}
    targets = resolve_targets(config, frozen, model)
    effects = {path: _Effect(sae) for path, sae in targets.items()}
    with differentiable(model):
        for texts in session.batches("gradients"):
            with _outputs(model, effects) as outputs:
                margins = preference_margins(model, texts, session.beta)
            loss = simpo_loss(margins, session.gamma).sum()
            gradients = torch.autograd.grad(loss, [outputs[path] for path in effects])
            for (path, effect), gradient in zip(effects.items(), gradients, strict=True):
                effect.add(outputs[path].detach(), gradient)
    ranked = [
        effect.to_record(layer, len(session.rows), n_features)
        for layer, effect in zip(config.layers, effects.values(), strict=True)
    ]
    return tuple(sorted(ranked, key=lambda effect: -effect.per_token))


@dataclass(frozen=True)
class LayerProbe(Record):
    """How well chosen and rejected texts can be told apart at the output of a layer.

    Attributes:
        layer: the layer.
        accuracy: of a linear probe on held-out texts, bootstrapped over pairs; 0.5 is chance.
        n_train: pairs that it was fitted to.
        n_test: held-out pairs.
    """

    layer: int
    accuracy: Interval
    n_train: int
    n_test: int


def probe_layers(
    session: Session, layers: Sequence[int], *, pooling: str = "last", test_share: float = 0.2
) -> tuple[LayerProbe, ...]:
    """Fit a linear probe of chosen against rejected at each layer: the paper's choice of a layer.

    Both texts of a pair are fitted to, or both are held out: a probe that had seen the one could
    know the other by its prompt.

    Args:
        session: its model is taken as it is, usually the base model. The paper takes 1,000 pairs.
        layers: of decoder layers.
        pooling: ``"last"`` reads the last token of each text, as the paper does; ``"mean"`` the
            mean over the answer's tokens.
        test_share: share of the pairs that is held out.

    Returns:
        One record per layer, in their order.

    Raises:
        ValueError: for a layer that does not exist, another pooling, or a share that leaves no pair
            to fit to or fewer than two to test on.
        ImportError: without the ``audit`` extra.
    """
    statistics.require()
    paths = decoder_layers(session.model)
    unknown = sorted(set(layers) - set(paths))
    if unknown or not layers:
        raise ValueError(f"Expected layers among {sorted(paths)}, got {unknown or 'none'}.")
    if pooling not in ("last", "mean"):
        raise ValueError(f"Expected `pooling` to be 'last' or 'mean', got {pooling!r}.")
    n = len(session.rows)
    n_test = round(test_share * n)
    if not 2 <= n_test < n:
        raise ValueError(
            f"Expected test_share={test_share} of {n} pairs to hold out at least two and leave "
            f"one, it holds out {n_test}. Give more pairs."
        )
    read: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    with evaluating(session.model):
        for texts in session.batches("probe"):
            batch = session.pad(texts)
            with _outputs(session.model, [paths[layer] for layer in layers]) as outputs:
                session.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            weights = batch.answer_mask.double()
            if pooling == "last":
                last = batch.attention_mask.sum(dim=1, keepdim=True) - 1
                weights = torch.zeros_like(weights).scatter(1, last, 1.0)
            weights = weights / weights.sum(dim=1, keepdim=True)
            for layer, found in read.items():
                hidden = outputs[paths[layer]].double()
                pooled = torch.einsum("bs,bsd->bd", weights.to(hidden.device), hidden)
                # Chosen and rejected of a pair side by side.
                found.append(torch.stack(pooled.chunk(2), dim=1).cpu())
    order = torch.randperm(n, generator=torch.Generator().manual_seed(session.seed))
    test, train = order[:n_test], order[n_test:]
    probes = []
    for layer, found in read.items():
        pairs = torch.cat(found)
        correct = statistics.probe_correct(
            pairs[train].flatten(0, 1).numpy(),
            [True, False] * len(train),
            pairs[test].flatten(0, 1).numpy(),
            [True, False] * n_test,
        )
        shares = [(a + b) / 2 for a, b in zip(correct[::2], correct[1::2], strict=True)]
        accuracy = statistics.mean_interval(shares, seed=session.seed)
        probes.append(LayerProbe(layer, accuracy, len(train), n_test))
    return tuple(probes)


def steering_gradient(
    sae: FrozenSAE, x: Float[Tensor, "*batch d_in"], gradient: Float[Tensor, "*batch d_in"]
) -> Float[Tensor, "*batch n_features"]:
    """``dL/dv`` at ``v = 0`` from ``dL/dx'``: the adjoint of the SAE's linear decoder.

    Args:
        sae: whose features would be steered.
        x: the layer's output, shape ``(..., d_in)``.
        gradient: of the loss with respect to it, shape ``(..., d_in)``.

    Returns:
        Shape ``(..., n_features)``, dtype of the SAE.
    """
    with torch.enable_grad():
        v = torch.zeros(
            *x.shape[:-1], sae.n_features, dtype=sae.dtype, device=x.device, requires_grad=True
        )
        delta = sae.decode_update(v, x.detach())
    [slopes] = torch.autograd.grad(delta, v, gradient.to(delta.dtype))
    return slopes


class _Effect:
    def __init__(self, sae: FrozenSAE) -> None:
        self._sae = sae
        self._sum = torch.zeros(sae.n_features, dtype=torch.float64)
        self._squares = torch.zeros_like(self._sum)
        self._largest = 0.0

    def add(self, x: Tensor, gradient: Tensor) -> None:
        sae = self._sae = self._sae.to(x.device, self._sae.dtype)
        pairs = len(x) // 2
        # Pair by pair: d_sae numbers for every token of a whole batch may not fit.
        for pair in range(pairs):
            sides = [pair, pair + pairs]
            slopes = steering_gradient(sae, x[sides], gradient[sides])
            of_pair = slopes.double().sum((0, 1)).cpu()
            self._sum += of_pair
            self._squares += of_pair.square()
            self._largest += float(slopes.abs().amax(-1).double().sum())

    def to_record(self, layer: int, n_pairs: int, n_features: int) -> LayerEffect:
        slopes = self._sum / n_pairs
        variance = (self._squares / n_pairs - slopes.square()).clamp(min=0)
        errors = (variance / max(1, n_pairs - 1)).sqrt()
        index = self._sae.feature_index.tolist()
        order = slopes.abs().argsort(descending=True)[:n_features].tolist()
        features = tuple(FeatureEffect(index[i], float(slopes[i]), float(errors[i])) for i in order)
        return LayerEffect(
            layer, float(slopes.abs().max()), self._largest / n_pairs, n_pairs, features
        )


@contextmanager
def differentiable(model: Any) -> Iterator[None]:
    """Evaluation mode, gradients of activations alone; everything is put back on leaving."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output.requires_grad_(True)
    )
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        hook.remove()
        model.train(was_training)
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _outputs(model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """What the named modules put out in a forward pass: ``(batch, seq, d_in)`` each."""
    outputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for path in paths:
            keep = partial(lambda path, given, output: outputs.update({path: output}), path)
            stack.enter_context(on_output(model.get_submodule(path), keep))
        yield outputs
