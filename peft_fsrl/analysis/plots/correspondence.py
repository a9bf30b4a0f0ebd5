"""An adapter as LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._style import COLOURS, subplots, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ...equivalence import Correspondence


def plot_correspondence(record: Correspondence) -> Figure:
    """An adapter as LoRA: rank and radius per token, error against rank, share against features.

    Args:
        record: what was measured.

    Raises:
        ValueError: for a record without tokens or stand-ins.
    """
    if not record.token_ranks or not record.stand_ins:
        raise ValueError("Expected a record with tokens and with stand-ins.")
    figure, panels = subplots(2, 2, figsize=(8.4, 6.4))
    ranks, radii, errors, features = panels.flat
    n_tokens = len(record.token_ranks)
    counts = [record.token_ranks.count(rank) for rank in range(max(record.token_ranks) + 1)]
    ranks.bar(range(len(counts)), [count / n_tokens for count in counts], color=COLOURS[1])
    ranks.set(xlabel="rank of the LoRA at a token", ylabel="share of tokens")
    ranks.xaxis.get_major_locator().set_params(integer=True)
    finite = sorted(radius for radius in record.token_radii if radius < float("inf"))
    shares = [(place + 1) / n_tokens for place in range(len(finite))]
    radii.step(finite, shares, where="post", color=COLOURS[1])
    radii.set(xscale="log", ylim=(0, 1))
    radii.set(xlabel="radius / norm of the token", ylabel="share of tokens below")
    for colour, stand_in in zip(COLOURS, record.stand_ins, strict=False):
        divergence = [kl / record.base_kl for kl in stand_in.kl]
        missed = f"missed change, {stand_in.target}"
        errors.plot(stand_in.ranks, stand_in.errors, "o-", color=colour, label=missed)
        left = f"KL left, {stand_in.target}"
        errors.plot(stand_in.ranks, divergence, "s--", color=colour, alpha=0.6, label=left)
    errors.set(xscale="log", yscale="log", xlabel="rank of one LoRA for all tokens")
    errors.set_ylabel("share")
    errors.set_xticks(record.stand_ins[0].ranks, [str(r) for r in record.stand_ins[0].ranks])
    errors.minorticks_off()
    errors.legend(frameon=False, fontsize=7, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    for values, style, label in (
        (record.spanned, "o-", "in their span"),
        (record.explained, "s--", "explained by the refitted adapter"),
        (record.chance, ":", "in their span by chance"),
    ):
        features.plot(record.n_features, values, style, color=COLOURS[0], label=label)
    features.set(xscale="log", ylim=(0, 1.03), xlabel="features chosen blindly")
    features.set_ylabel("share of the squared change")
    features.set_xticks(record.n_features, [str(n) for n in record.n_features])
    features.minorticks_off()
    features.legend(frameon=False, fontsize=8, loc="lower right")
    tidy(panels.flat)
    figure.tight_layout()
    return figure
