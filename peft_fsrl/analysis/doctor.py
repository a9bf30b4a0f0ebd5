"""Does an SAE fit a model and its data? Asked before any training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..sae.frozen import FrozenSAE
from ..sae.loading import HookPoint, parse_hook, take_sae
from ..training.likelihood import batched, pad
from ..training.running import evaluating
from ..training.tokens import tokenize
from ..tuner.outputs import hidden_states_of
from ..tuner.placement import check_hidden_size, decoder_layers, writer_path
from .checkup import judge_fits
from .records import Checkup, SAEFit
from .segments import special_ids

# Modules whose input is the residual stream between attention and MLP, where attention comes first.
_BEFORE_MLP = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")


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


def compute_checkup(
    model: nn.Module,
    sae: Any,
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    layer: int | None = None,
    compare_model: nn.Module | None = None,
    model_name: str = "model",
    compare_name: str = "compared model",
    sae_name: str | None = None,
    dataset_name: str = "data",
    batch_size: int = 8,
    max_length: int | None = None,
    description: str | None = None,
) -> Checkup:
    """``FVU = sum ||x - x^||^2 / sum ||x - mean(x)||^2``, l0 and dead features where it matters.

    ``x^`` is SAELens's own ``decode(encode(x))``. Measured where the SAE would be used and around
    it: one layer before (which is the same as this layer's ``resid_pre``) and after, and between
    attention and MLP where the architecture has such a place. Prompts and chosen answers are read;
    special tokens, BOS among them, have norms of their own kind and never count. Only sums are
    kept: memory does not grow with the data.

    Args:
        model: a base model, without an adapter; its mode is restored.
        sae: whatever ``FSRLConfig`` takes as its SAE.
        dataset: rows with the texts ``prompt`` and ``chosen``; read once, and may be a stream.
        tokenizer: of both models.
        layer: the decoder layer whose output would be steered; None for where the SAE was trained.
        compare_model: another model with the same architecture and tokenizer, such as the base
            model of an instruct model.
        model_name: shown in the record.
        compare_name: shown in the record.
        sae_name: shown in the record; None for what the SAE says of itself.
        dataset_name: shown in the record.
        batch_size: texts per forward pass.
        max_length: cuts the end of longer answers.
        description: shown beside the progress bar; None shows no bar.

    Raises:
        ValueError: for an SAE of another width, a layer that does not exist, no way to tell where
            the SAE belongs, two models of one name, or data without an ordinary token.
    """
    frozen = take_sae(sae)
    place, others = _places(model, frozen, layer)
    models = {model_name: model}
    check_hidden_size(frozen, model)
    if compare_model is not None:
        check_hidden_size(frozen, compare_model)
        if compare_name == model_name:
            raise ValueError(f"Expected two models to compare, got {model_name!r} twice.")
        models[compare_name] = compare_model
    totals = {
        (name, spot): _Totals()
        for name in models
        for spot in ([place, *others] if name == model_name else [place])
    }
    special = torch.tensor(special_ids(tokenizer))
    progress = tqdm(desc=description, unit="text", disable=description is None, leave=False)
    with evaluating(*models.values()), progress:
        for rows in batched(dataset, batch_size):
            texts = [tokenize(row["prompt"], row["chosen"], tokenizer, max_length) for row in rows]
            for name, each in models.items():
                spots = [spot for owner, spot in totals if owner == name]
                batch = pad(texts, next(each.parameters()).device)
                with _capturing(each, spots) as found:
                    each(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
                special = special.to(batch.input_ids.device)
                kept = batch.attention_mask.bool() & ~torch.isin(batch.input_ids, special)
                for spot in spots:
                    _add(totals[name, spot], found[spot], batch.attention_mask, kept, frozen)
            progress.update(len(rows))
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
def _capturing(model: nn.Module, places: list[Place]) -> Iterator[dict[Place, Tensor]]:
    """The activations at some places, once the model has run in the block."""
    found: dict[Place, Tensor] = {}

    def keep(place: Place) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given: Any = args[0] if args else next(iter(kwargs.values()), None)
            found[place] = given if place.takes_input else hidden_states_of(output)

        return hook

    with ExitStack() as stack:
        for place in places:
            module = model.get_submodule(place.path)
            handle = module.register_forward_hook(keep(place), with_kwargs=True)
            stack.callback(handle.remove)
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
