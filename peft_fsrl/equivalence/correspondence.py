"""An adapter as LoRA, seen whole: token by token, as one for all, and in few features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..records import Record
from ..training.running import as_base
from .batches import Batches, scored_tokens
from .certificates import restricted_lora
from .explain import explain
from .export import fit_single_lora
from .fidelity import BASE, FSRL, measure_fidelity


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
    """Everything of this room for one adapter.

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
    found = [
        certificate
        for batch in held_out
        for certificate in restricted_lora(
            model,
            {name: value for name, value in batch.items() if name != "labels"},
            tokens=scored_tokens(batch),
        )
    ]
    checked = found[:: max(1, len(found) // n_checks)]
    read = [explain(model, model, sae, data, held_out=held_out, n_features=n) for n in n_features]
    stand_ins, bases = [], {}
    for target in targets:
        fitted = fit_single_lora(model, data, target=target)
        kl: dict[str, tuple[float, ...]] = {}
        for name, text in (("held_out", held_out), ("other_text", other_text)):
            found_kl = measure_fidelity(model, text, fitted.stand_ins(ranks)).models if text else {}
            kl[name] = tuple(each.kl for key, each in found_kl.items() if key not in (BASE, FSRL))
            bases[name] = found_kl[BASE].kl if found_kl else float("nan")
        losses = []
        for rank in ranks:
            with as_base(model), fitted.applied(rank):
                losses.append(loss())
        errors = tuple(fitted.error(rank) for rank in ranks)
        where = fitted.sites[0].path
        stand_ins.append(
            StandIn(where, tuple(ranks), errors, kl["held_out"], kl["other_text"], tuple(losses))
        )
    with as_base(model):
        base_loss = loss()
    return Correspondence(
        token_ranks=tuple(each.rank for each in found),
        token_clipped=tuple(len(each.clipped) for each in found),
        token_radii=tuple(each.radius / float(each.x.norm()) for each in found),
        token_boundaries=tuple(each.boundary for each in found),
        n_checked=len(checked),
        n_holding=sum(each.check().holds() for each in checked),
        base_kl=bases["held_out"],
        base_kl_elsewhere=bases["other_text"],
        base_loss=base_loss,
        steered_loss=loss(),
        stand_ins=tuple(stand_ins),
        n_features=tuple(n_features),
        spanned=tuple(each.in_features.value for each in read),
        chance=tuple(each.chance for each in read),
        explained=tuple(each.explained.value for each in read),
    )
