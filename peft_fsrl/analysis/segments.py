"""Steering and the SAE's own activity at the tokens that count, streamed in small pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..sae.frozen import FrozenSAE
from ..steering import SteeringEvent, fsrl_layers, observe
from ..training.likelihood import Batch
from ..training.running import evaluating
from ..tuner.layer import FSRLLayer
from .session import CHOSEN, SIDES, Session

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

SEGMENTS = ("prompt", "chosen", "rejected", "prompt_chosen", "prompt_rejected")
# Encoding needs a few times (tokens, d_sae) numbers at once: this many tokens, whatever the batch.
_CHUNK = 256


class TokenChunk(NamedTuple):
    """Some tokens that count, all of one text.

    Attributes:
        v: steering vectors, shape ``(tokens, n_features)``.
        acts: gives the SAE's own feature activations ``f``, shape ``(tokens, n_features)``.
        members: which of the segments each token belongs to, shape ``(segments, tokens)``.
        row: number of the row of the data set that the text comes from.
    """

    v: Float[Tensor, "tokens n_features"]
    acts: Callable[[], Float[Tensor, "tokens n_features"]]
    members: Bool[Tensor, "segments tokens"]
    row: int

    def active(self) -> Bool[Tensor, "tokens n_features"]:
        """Which features the SAE itself finds."""
        return self.acts() != 0


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


def active_adapter(layer: FSRLLayer) -> str:
    """The name of the one adapter that acts on a layer.

    Raises:
        ValueError: if none does.
    """
    found = [name for name in layer.active_adapters if name in layer.fsrl_sae]
    if not found or layer.disable_adapters:
        raise ValueError(
            f"None of the adapters {sorted(layer.fsrl_sae)} is active on {layer.layer_name!r}. "
            "Activate one with `set_adapter`, outside of `disable_adapter`."
        )
    return found[0]


def active_sae(model: nn.Module) -> FrozenSAE:
    """The SAE that the active adapter of the one steering layer writes through.

    Raises:
        ValueError: for several layers, or if no adapter of this layer is active.
    """
    layer = only_layer(model)
    return layer.fsrl_sae[active_adapter(layer)]


def stream_tokens(
    session: Session,
    segments: Sequence[str],
    consume: Callable[[TokenChunk], None],
    doing: str = "tokens",
) -> None:
    """Run the model over the data once and hand on the tokens of some segments, piece by piece.

    Special tokens and padding never count. The prompt's tokens, which stand before both answers,
    count once per row in ``"prompt"``.

    Args:
        session: its model has one FSRL layer.
        segments: names out of ``SEGMENTS``.
        consume: called with every piece; must not keep it.
        doing: shown beside the progress bar.

    Raises:
        ValueError: for no segment or an unknown one, more than one FSRL layer, no active adapter,
            or an empty data set.
    """
    unknown = set(segments) - set(SEGMENTS)
    if unknown or not segments or len(set(segments)) < len(segments):
        raise ValueError(f"Expected different segments among {SEGMENTS}, got {tuple(segments)}.")
    active_sae(session.model)
    sides = [side for side in SIDES if any(side in name for name in segments)] or [CHOSEN]
    n_rows = 0
    members = torch.zeros(0)

    def observer(event: SteeringEvent) -> None:
        for chunk in _chunks(event, members, n_rows, len(sides)):
            consume(chunk)

    with evaluating(session.model), observe(session.model, observer):
        for texts in session.batches(doing, sides):
            batch = session.pad(texts)
            members = _members(batch, session.counted(batch), segments, sides)
            session.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            n_rows += len(texts) // len(sides)


def _members(
    batch: Batch, counts: Tensor, segments: Sequence[str], sides: Sequence[str]
) -> Bool[Tensor, "segments batch seq"]:
    """Which tokens count for which segment."""
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
            acts = partial(_encode, sae, event.hidden_states[number], part)
            yield TokenChunk(v, acts, members[:, number, part], first_row + number % n)


def _encode(sae: FrozenSAE, x: Tensor, places: Tensor) -> Tensor:
    # An encoder that looks back needs the text from its start.
    return sae.encode(x[None])[0][places] if sae.contextual else sae.encode(x[places])
