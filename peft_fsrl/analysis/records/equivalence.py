"""An adapter as LoRA."""

from __future__ import annotations

from dataclasses import dataclass

from ...records import Record


@dataclass(frozen=True)
class StandIn(Record):
    """How well single LoRAs of several ranks stand for an adapter.

    Attributes:
        target: what carries the LoRA.
        ranks: the ranks.
        errors: share of the squared change of the residual stream that each misses.
        kl: mean KL divergence from the steered model on held-out tokens, in nats.
        losses: SimPO loss on held-out pairs.
    """

    target: str
    ranks: tuple[int, ...]
    errors: tuple[float, ...]
    kl: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Correspondence(Record):
    """An adapter seen as LoRA: token by token, as one for all, and in few features.

    Attributes:
        token_ranks: rank of the LoRA that it is at each token.
        token_radii: how far each is exact, as a share of the token's own norm.
        base_kl: mean KL divergence of the base model from the steered one.
        base_loss: SimPO loss of the base model.
        steered_loss: SimPO loss of the steered model.
        stand_ins: single LoRAs, one entry per place.
        n_features: numbers of features with which the adapter was refitted blindly.
        spanned: share of the change in their span.
        explained: share that the refitted adapter explains.
    """

    token_ranks: tuple[int, ...]
    token_radii: tuple[float, ...]
    base_kl: float
    base_loss: float
    steered_loss: float
    stand_ins: tuple[StandIn, ...]
    n_features: tuple[int, ...]
    spanned: tuple[float, ...]
    explained: tuple[float, ...]
