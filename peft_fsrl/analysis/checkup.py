"""Check before training whether an SAE fits a model and its data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..records import Record
from ..sae.frozen import FrozenSAE
from ..sae.loading import HookPoint, parse_hook, take_sae
from ..training.likelihood import pad
from ..training.running import evaluating, on_output
from ..tuner.placement import check_hidden_size, decoder_layers, writer_path
from .findings import Finding
from .session import CHOSEN, Session

# Modules whose input is the residual stream between attention and MLP, where attention comes first.
_BEFORE_MLP = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")
# Fraction of variance unexplained up to which an SAE fits, and above which it does not: there it
# misses more of what tells tokens apart than it has.
GOOD_FVU = 0.35
BAD_FVU = 0.5
# A neighbor is a better place if its unexplained share is lower by this factor.
CLEARLY_LOWER = 0.9
# Against another model, a fit is as good up to the first factor, and worse above the second.
AS_GOOD, CLEARLY_WORSE = 1.25, 2.0
# Share of features that were never active above which an SAE is for other text. Few tokens reach
# few features, so only where each token could have had so many of its own.
MOSTLY_DEAD = 0.9


class Place(NamedTuple):
    """A place in a model whose activations an SAE might read.

    Attributes:
        name: in TransformerLens's words.
        path: of a module.
        takes_input: read the module's input, not its output.
    """

    name: str
    path: str
    takes_input: bool = False


@dataclass(frozen=True)
class SAEFit(Record):
    """How well an SAE fits a model's activations at one place.

    Attributes:
        hook: the place.
        model: whose activations.
        intended: whether it is where the SAE would be used.
        n_tokens: real tokens measured, special ones left out.
        fvu: fraction of variance unexplained.
        l0: active features per token.
        dead: share of features that were never active.
    """

    hook: str
    model: str
    intended: bool
    n_tokens: int
    fvu: float
    l0: float
    dead: float


@dataclass(frozen=True)
class Checkup(Record):
    """Whether an SAE fits a model and its data, before training.

    Attributes:
        sae: reference of the SAE.
        dataset: whose texts.
        fits: one entry per place.
        findings: what they say.
    """

    sae: str
    dataset: str
    fits: tuple[SAEFit, ...]
    findings: tuple[Finding, ...]


def compute_checkup(
    session: Session,
    sae: Any,
    *,
    layer: int | None = None,
    compare_model: nn.Module | None = None,
    model_name: str = "model",
    compare_name: str = "compared model",
    sae_name: str | None = None,
    dataset_name: str = "data",
) -> Checkup:
    """``FVU = sum ||x - x^||^2 / sum ||x - mean(x)||^2``, l0 and dead features where it matters.

    ``x^`` is SAELens's own ``decode(encode(x))``. Measured where the SAE would be used and around
    it: one layer before (which is the same as this layer's ``resid_pre``) and after, and between
    attention and MLP where the architecture has such a place. Prompts and chosen answers are read;
    special tokens, BOS among them, have norms of their own kind and never count. Only sums are
    kept: memory does not grow with the data.

    Args:
        session: its model is a base model, without an adapter; rows need no ``rejected``.
        sae: whatever ``FSRLConfig`` takes as its SAE.
        layer: the decoder layer whose output would be steered; None for where the SAE was trained.
        compare_model: another model with the same architecture and tokenizer, such as the base
            model of an instruct model.
        model_name: shown in the record.
        compare_name: shown in the record.
        sae_name: shown in the record; None for what the SAE says of itself.
        dataset_name: shown in the record.

    Raises:
        ValueError: for an SAE of another width, a layer that does not exist, no way to tell where
            the SAE belongs, two models of one name, or data without an ordinary token.
    """
    model, frozen = session.model, take_sae(sae)
    place, others = _places(model, frozen, layer)
    models = {model_name: model}
    check_hidden_size(frozen, model)
    if compare_model is not None:
        check_hidden_size(frozen, compare_model)
        if compare_name == model_name:
            raise ValueError(f"Expected two models to compare, got {model_name!r} twice.")
        models[compare_name] = compare_model
    spots = {name: [place, *others] if name == model_name else [place] for name in models}
    totals = {(name, spot): _Totals() for name in models for spot in spots[name]}
    with evaluating(*models.values()):
        for texts in session.batches("reading", (CHOSEN,)):
            for name, each in models.items():
                batch = pad(texts, next(each.parameters()).device)
                with _capturing(each, spots[name]) as found:
                    each(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
                kept = session.counted(batch)
                for spot in spots[name]:
                    _add(totals[name, spot], found[spot], batch.attention_mask, kept, frozen)
    fits = tuple(
        _fit(spot, name, spot == place and name == model_name, total)
        for (name, spot), total in totals.items()
    )
    reference = sae_name or frozen.info.hook_name or frozen.info.fingerprint[:16]
    return Checkup(reference, dataset_name, fits, judge_fits(fits))


def _places(model: nn.Module, sae: FrozenSAE, layer: int | None) -> tuple[Place, list[Place]]:
    """Where the SAE would be used, and the places around it."""
    hook = parse_hook(sae.info.hook_name) if layer is None else HookPoint(layer, "resid_post")
    if hook is None:
        raise ValueError(
            f"Expected `layer`: the SAE's hook name {sae.info.hook_name!r} does not say at which "
            "module's output it was trained."
        )
    layers = decoder_layers(model)
    if hook.layer not in layers:
        raise ValueError(
            f"Layer {hook.layer} does not exist: {type(model).__name__} has {len(layers)} decoder "
            f"layers, 0 to {len(layers) - 1}."
        )

    def at(index: int, kind: str) -> Place | None:
        if index not in layers:
            return None
        name = f"blocks.{index}.hook_{kind}"
        if kind == "resid_post":
            return Place(name, layers[index])
        if kind == "resid_mid":
            path = _path_before_mlp(model, layers[index])
            return None if path is None else Place(name, path, takes_input=True)
        return Place(name, writer_path(model, layers[index], kind))

    around = [(hook.layer - 1, hook.place), (hook.layer, "resid_mid")]
    if hook.place != "resid_post":
        around.append((hook.layer, "resid_post"))
    around.append((hook.layer + 1, hook.place))
    place = at(*hook)
    assert place is not None
    return place, [spot for index, kind in around if (spot := at(index, kind)) is not None]


def _path_before_mlp(model: nn.Module, layer_path: str) -> str | None:
    if getattr(getattr(model, "config", None), "use_parallel_residual", False):
        return None
    layer = model.get_submodule(layer_path)
    names = [name for name in _BEFORE_MLP if isinstance(getattr(layer, name, None), nn.Module)]
    return f"{layer_path}.{names[0]}" if names else None


@contextmanager
def _capturing(model: nn.Module, places: Sequence[Place]) -> Iterator[dict[Place, Tensor]]:
    """The activations at some places, once the model has run in the block."""
    found: dict[Place, Tensor] = {}

    def keep(place: Place, given: Tensor, output: Tensor) -> None:
        found[place] = given if place.takes_input else output

    with ExitStack() as stack:
        for place in places:
            module = model.get_submodule(place.path)
            stack.enter_context(on_output(module, partial(keep, place)))
        yield found


class _Totals:
    """Sums over tokens, merged batch by batch in float64 (Chan, Golub and LeVeque, 1979)."""

    def __init__(self) -> None:
        self.n = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self.spread = 0.0
        self.error = 0.0
        self.n_active = 0
        self.alive: Tensor | None = None

    def add(self, x: Tensor, reconstruction: Tensor, feature_acts: Tensor) -> None:
        x = x.double()
        n = x.shape[0]
        mean = x.mean(dim=0)
        between = float(((mean - self.mean.to(mean)) ** 2).sum()) * n * self.n / (n + self.n)
        self.spread += float(((x - mean) ** 2).sum()) + between
        self.mean = self.mean.to(mean) + (mean - self.mean.to(mean)) * n / (n + self.n)
        self.n += n
        self.error += float(((x - reconstruction.double()) ** 2).sum())
        active = feature_acts != 0
        self.n_active += int(active.sum())
        alive = active.any(dim=0)
        self.alive = alive if self.alive is None else self.alive | alive


def _add(total: _Totals, hidden: Tensor, attention: Tensor, kept: Tensor, sae: FrozenSAE) -> None:
    sae = sae.to(hidden.device, sae.dtype)
    for row in range(hidden.shape[0]):
        length = int(attention[row].sum())
        chosen = kept[row, :length]
        if not chosen.any():
            continue
        # One text at a time, for the activations of many features are wide; and whole, for some
        # SAEs look at earlier tokens.
        x = hidden[row : row + 1, :length].to(sae.dtype)
        feature_acts, reconstruction = sae.reconstruct(x)
        total.add(x[0, chosen], reconstruction[0, chosen], feature_acts[0, chosen])


def _fit(place: Place, model_name: str, intended: bool, total: _Totals) -> SAEFit:
    if total.alive is None or not total.spread:
        raise ValueError(
            "Expected texts with at least two ordinary tokens, found none. Give data with the "
            "columns 'prompt' and 'chosen' that are not empty."
        )
    return SAEFit(
        hook=place.name,
        model=model_name,
        intended=intended,
        n_tokens=total.n,
        fvu=total.error / total.spread,
        l0=total.n_active / total.n,
        dead=float((~total.alive).double().mean()),
    )


def judge_fits(fits: Sequence[SAEFit]) -> tuple[Finding, ...]:
    """Whether an SAE fits where it would be used, better than nearby, and with live features.

    Args:
        fits: one of them intended; those of the same model are neighbors, another model's is for
            comparison.
    """
    [here] = [fit for fit in fits if fit.intended]
    neighbors = [fit for fit in fits if fit.model == here.model and not fit.intended]
    others = [fit for fit in fits if fit.model != here.model]
    findings = [_judge_fit(here)]
    if neighbors:
        findings.append(_judge_place(here, min(neighbors, key=lambda fit: fit.fvu)))
    findings.append(_judge_life(here))
    return (*findings, *(_judge_model(here, other) for other in others))


def _judge_fit(here: SAEFit) -> Finding:
    text = (
        f"It leaves {here.fvu:.1%} of the variance unexplained at {here.hook}, over "
        f"{here.n_tokens:,} tokens"
    )
    question = "Does the SAE fit here?"
    if here.fvu <= GOOD_FVU:
        return Finding(question, "yes", f"{text} (it fits up to {GOOD_FVU:.0%}).")
    if here.fvu <= BAD_FVU:
        return Finding(
            question,
            "unsure",
            f"{text}: more than {GOOD_FVU:.0%}. Steering keeps what it misses, but its features "
            "describe these activations only in part.",
        )
    return Finding(
        question,
        "no",
        f"{text}: more than {BAD_FVU:.0%}. The SAE does not fit. Check the layer, the model and "
        "the kind of text, or take another SAE.",
    )


def _judge_place(here: SAEFit, best: SAEFit) -> Finding:
    question = "Is this the right place?"
    figures = f"{best.fvu:.1%} unexplained at {best.hook} against {here.fvu:.1%} at {here.hook}"
    if best.fvu < CLEARLY_LOWER * here.fvu:
        return Finding(question, "no", f"It fits better nearby: {figures}. Use it there.")
    if best.fvu < here.fvu:
        return Finding(question, "unsure", f"A neighbor fits about as well: {figures}.")
    return Finding(question, "yes", f"No neighbor fits better; the closest has {figures}.")


def _judge_life(here: SAEFit) -> Finding:
    question = "Are its features alive on this text?"
    text = (
        f"{here.l0:.3g} features are active per token, and {here.dead:.1%} were never active in "
        f"{here.n_tokens:,} tokens"
    )
    if here.l0 < 1:
        return Finding(question, "no", f"{text}: fewer than one per token.")
    if here.dead > MOSTLY_DEAD:
        return Finding(
            question, "unsure", f"{text}: more than {MOSTLY_DEAD:.0%}. Give more text to tell."
        )
    return Finding(question, "yes", f"{text}.")


def _judge_model(here: SAEFit, other: SAEFit) -> Finding:
    question = f"Does it fit {here.model} as well as {other.model}?"
    figures = f"{here.fvu:.1%} unexplained against {other.fvu:.1%}"
    if here.fvu <= AS_GOOD * other.fvu:
        return Finding(question, "yes", f"{figures}.")
    verdict = "no" if here.fvu > CLEARLY_WORSE * other.fvu else "unsure"
    return Finding(question, verdict, f"{figures}: what it learned there does not all hold here.")
