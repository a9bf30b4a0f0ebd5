"""Steering and the SAE's own activity at the tokens that count, streamed in small pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..sae.frozen import FrozenSAE
from ..steering import SteeringEvent, fsrl_layers, observe
from ..training.likelihood import Batch, batched, pad
from ..training.running import evaluating
from ..training.tokens import special_ids, tokenize
from ..tuner.layer import FSRLLayer

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

SEGMENTS = ("prompt", "chosen", "rejected", "prompt_chosen", "prompt_rejected")
# Encoding needs a few times (tokens, d_sae) numbers at once: this many tokens, whatever the batch.
_CHUNK = 256


class TokenChunk(NamedTuple):
    """Some tokens that count, all of one text.

    Attributes:
        v: steering vectors, shape ``(tokens, n_features)``.
        active: gives which features the SAE itself finds, shape ``(tokens, n_features)``.
        members: which of the segments each token belongs to, shape ``(segments, tokens)``.
        row: number of the row of the data set that the text comes from.
    """

    v: Float[Tensor, "tokens n_features"]
    active: Callable[[], Bool[Tensor, "tokens n_features"]]
    members: Bool[Tensor, "segments tokens"]
    row: int


def only_layer(model: nn.Module) -> FSRLLayer:
    """The one steering layer of a model.

    Raises:
        ValueError: if it has none, or several: their features would be counted together.
    """
    layers = fsrl_layers(model)
    if len(layers) != 1:
        raise ValueError(f"Expected one FSRL layer, found {sorted(layers)}.")
    [layer] = layers.values()
    return layer


def active_sae(model: nn.Module) -> FrozenSAE:
    """The SAE that the active adapter of the one steering layer writes through.

    Raises:
        ValueError: for several layers, or if no adapter of this layer is active.
    """
    layer = only_layer(model)
    found = [layer.fsrl_sae[name] for name in layer.active_adapters if name in layer.fsrl_sae]
    if not found:
        raise ValueError(
            f"None of the adapters {sorted(layer.fsrl_sae)} is active on {layer.layer_name!r}. "
            "Activate one with `set_adapter`."
        )
    return found[0]


def stream_tokens(
    model: nn.Module,
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    segments: Sequence[str],
    consume: Callable[[TokenChunk], None],
    *,
    batch_size: int,
    description: str | None,
) -> int:
    """Run a model over a data set once and hand on the tokens of some segments, piece by piece.

    Special tokens and padding never count. The prompt's tokens, which stand before both answers,
    count once per row in ``"prompt"``.

    Args:
        model: a model with one FSRL layer.
        dataset: rows with the text ``prompt`` and the answers that the segments name.
        tokenizer: the model's tokenizer.
        segments: names out of ``SEGMENTS``.
        consume: called with every piece; must not keep it.
        batch_size: rows per forward pass.
        description: shown beside the progress bar; None shows no bar.

    Returns:
        The number of rows.

    Raises:
        ValueError: for no segment or an unknown one, more than one FSRL layer, an empty data set,
            or if no adapter acts.
    """
    unknown = set(segments) - set(SEGMENTS)
    if unknown or not segments or len(set(segments)) < len(segments):
        raise ValueError(f"Expected different segments among {SEGMENTS}, got {tuple(segments)}.")
    only_layer(model)
    sides = [side for side in ("chosen", "rejected") if any(side in name for name in segments)]
    sides = sides or ["chosen"]
    special = torch.tensor(special_ids(tokenizer))
    device = next(model.parameters()).device
    n_rows, acted = 0, 0
    batch, members = pad([], device), torch.zeros(0)

    def observer(event: SteeringEvent) -> None:
        nonlocal acted
        acted += 1
        for chunk in _chunks(event, members, n_rows, len(sides)):
            consume(chunk)

    progress = tqdm(desc=description, unit="row", disable=description is None, leave=False)
    with evaluating(model), observe(model, observer), progress:
        for rows in batched(dataset, batch_size):
            texts = [tokenize(r["prompt"], r[side], tokenizer) for side in sides for r in rows]
            batch = pad(texts, device)
            members = _members(batch, segments, sides, special.to(device))
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            n_rows += len(rows)
            progress.update(len(rows))
    if not acted:
        raise ValueError("Expected at least one text on which an adapter acts, found none.")
    return n_rows


def _members(
    batch: Batch, segments: Sequence[str], sides: Sequence[str], special: Tensor
) -> Tensor:
    """Which tokens count for which segment: ``(segments, batch, seq)``."""
    counts = batch.attention_mask.bool() & ~torch.isin(batch.input_ids, special)
    answer = batch.answer_mask.bool()
    masks = []
    n = len(answer) // len(sides)
    for segment in segments:
        if segment == "prompt":
            side, part = sides[0], ~answer
        else:
            side = segment.removeprefix("prompt_")
            part = answer if segment == side else torch.ones_like(answer)
        of_side = torch.zeros_like(answer)
        start = sides.index(side) * n
        of_side[start : start + n] = True
        masks.append(counts & part & of_side)
    return torch.stack(masks)


def _chunks(
    event: SteeringEvent, members: Tensor, first_row: int, n_sides: int
) -> Iterable[TokenChunk]:
    """The tokens of a forward pass that count, a few at a time."""
    sae = event.sae
    wanted = members.any(dim=0)
    n = len(wanted) // n_sides
    for number, sequence in enumerate(wanted):
        places = sequence.nonzero().flatten()
        for part in places.split(_CHUNK) if len(places) else ():
            v = event.steering_vector[number, part]
            active = partial(_active, sae, event.hidden_states[number], part)
            yield TokenChunk(v, active, members[:, number, part], first_row + number % n)


def _active(sae: FrozenSAE, x: Tensor, places: Tensor) -> Tensor:
    # An encoder that looks back needs the text from its start.
    f = sae.encode(x[None])[0][places] if sae.contextual else sae.encode(x[places])
    return f != 0
