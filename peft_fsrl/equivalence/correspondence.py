"""An adapter as LoRA, seen whole: token by token, as one for all, and in few features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..records import Record
from ..training.running import as_base
from .batches import Batches, check_batches, scored_tokens
from .certificates import restricted_lora
from .explain import explain
from .export import SingleLoRA, fit_single_lora
from .fidelity import BASE, measure_fidelity


@dataclass(frozen=True)
class StandIn(Record):
    """How well single LoRAs of several ranks stand for an adapter.

    Attributes:
        target: what carries the LoRA.
        ranks: the ranks.
        errors: share of the squared change of the residual stream that each misses.
        kl: mean KL divergence from the steered model on held-out tokens, in nats.
        kl_elsewhere: the same on other text; empty without any.
        losses: the loss with each.
    """

    target: str
    ranks: tuple[int, ...]
    errors: tuple[float, ...]
    kl: tuple[float, ...]
    kl_elsewhere: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Correspondence(Record):
    """An adapter seen as LoRA.

    Attributes:
        token_ranks: rank of the LoRA that it is at each scored token.
        token_clipped: how many features are clipped there.
        token_radii: how far each is exact, as a share of the token's own norm.
        token_boundaries: what lies there; see ``pieces.Piece``.
        n_checked: certificates that were checked again.
        n_holding: those of them that hold.
        base_kl: mean KL divergence of the base model from the steered one.
        base_kl_elsewhere: the same on other text; nan without any.
        base_loss: the base model's loss.
        steered_loss: the steered model's.
        stand_ins: single LoRAs, one entry per place.
        n_features: numbers of features with which the adapter was refitted blindly.
        spanned: share of the change in their span.
        chance: what would be in it by chance; see ``Explanation``.
        explained: share that the refitted adapter explains.
    """

    token_ranks: tuple[int, ...]
    token_clipped: tuple[int, ...]
    token_radii: tuple[float, ...]
    token_boundaries: tuple[str, ...]
    n_checked: int
    n_holding: int
    base_kl: float
    base_kl_elsewhere: float
    base_loss: float
    steered_loss: float
    stand_ins: tuple[StandIn, ...]
    n_features: tuple[int, ...]
    spanned: tuple[float, ...]
    chance: tuple[float, ...]
    explained: tuple[float, ...]


def measure_correspondence(
    model: nn.Module,
    sae: Any,
    data: Batches,
    held_out: Batches,
    loss: Callable[[], float],
    *,
    other_text: Batches | None = None,
    targets: Sequence[str | None] = (None, "projection"),
    ranks: Sequence[int] = (1, 2, 4, 8, 16, 32),
    n_features: Sequence[int] = (1, 2, 4, 8, 16),
    n_checks: int = 100,
) -> Correspondence:
    """Certify one adapter, export it and read it back, and measure all of that.

    Args:
        model: a ``PeftModel`` with an FSRL adapter.
        sae: the whole SAE in whose features the adapter is read back.
        data: batches to fit on, as for ``fit_single_lora``.
        held_out: batches to measure on; those of their tokens that have a label are certified.
        loss: the loss of ``model`` as it is when called, such as its SimPO loss.
        other_text: see ``to_lora``.
        targets: places of single LoRAs; see ``fit_single_lora``.
        ranks: their ranks.
        n_features: numbers of features for ``explain``.
        n_checks: about how many certificates to check again.
    """
    held_out = list(check_batches(held_out))
    checked: list[bool] = []
    rows: list[tuple[int, int, float, str]] = []
    step = max(1, sum(int(scored_tokens(batch).sum()) for batch in held_out) // n_checks)
    for batch in held_out:
        given = {name: value for name, value in batch.items() if name != "labels"}
        # One batch at a time: the certificates of each hold a float64 copy of the adapter.
        for each in restricted_lora(model, given, tokens=scored_tokens(batch)):
            if len(rows) % step == 0:
                checked.append(each.check().holds())
            radius = each.radius / float(each.x.norm())
            rows.append((each.rank, len(each.clipped), radius, each.boundary))
    token_ranks, token_clipped, token_radii, token_boundaries = zip(*rows, strict=True)
    read = [explain(model, model, sae, data, held_out=held_out, n_features=n) for n in n_features]
    texts = [held_out] if other_text is None else [held_out, other_text]
    base_kl = [measure_fidelity(model, text).models[BASE].kl for text in texts]
    with as_base(model):
        base_loss = loss()
    return Correspondence(
        token_ranks=token_ranks,
        token_clipped=token_clipped,
        token_radii=token_radii,
        token_boundaries=token_boundaries,
        n_checked=len(checked),
        n_holding=sum(checked),
        base_kl=base_kl[0],
        base_kl_elsewhere=float("nan") if other_text is None else base_kl[1],
        base_loss=base_loss,
        steered_loss=loss(),
        stand_ins=tuple(
            _measure_stand_in(model, fit_single_lora(model, data, target=t), ranks, texts, loss)
            for t in targets
        ),
        n_features=tuple(n_features),
        spanned=tuple(each.in_features.value for each in read),
        chance=tuple(each.chance for each in read),
        explained=tuple(each.explained.value for each in read),
    )


def _measure_stand_in(
    model: nn.Module,
    fitted: SingleLoRA,
    ranks: Sequence[int],
    texts: Sequence[Batches],
    loss: Callable[[], float],
) -> StandIn:
    stand_ins = fitted.stand_ins(ranks)
    found = [measure_fidelity(model, text, stand_ins).models for text in texts]
    kl = [tuple(models[name].kl for name in stand_ins) for models in found]
    losses = []
    for rank in ranks:
        with as_base(model), fitted.applied(rank):
            losses.append(loss())
    return StandIn(
        target=", ".join(site.path for site in fitted.sites),
        ranks=tuple(ranks),
        errors=tuple(fitted.error(rank) for rank in ranks),
        kl=kl[0],
        kl_elsewhere=kl[1] if len(kl) > 1 else (),
        losses=tuple(losses),
    )
