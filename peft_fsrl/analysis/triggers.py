"""Search for the tokens that make something of a model largest, led by gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..steering import SteeringEvent, base_model, observe

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Score = Callable[[Tensor, Tensor], Tensor]


def search_tokens(
    score: Score,
    starts: Int[Tensor, "n length"],
    table: Float[Tensor, "vocabulary d"],
    allowed: Bool[Tensor, "vocabulary"],
    *,
    steps: int,
    candidates: int,
    top: int = 64,
    batch_size: int = 256,
    seed: int = 0,
) -> tuple[Int[Tensor, "n length"], Float[Tensor, "n"]]:
    """Change one token at a time where the gradient says that it raises a score.

    A step differentiates every sequence's score with respect to its embeddings, draws for each some
    exchanges (a place, and one of the tokens that promise most there), scores them and keeps the
    best if it is better. Source: greedy coordinate gradient (Zou et al., arXiv 2307.15043), here
    for many targets at once, and never going down.

    Args:
        score: of embeddings ``(rows, length, d)`` and the number of the sequence that each row
            belongs to, ``(rows,)``; gives ``(rows,)``, differentiable, each from its row alone.
        starts: token ids.
        table: embedding of every token, as the model adds it to nothing else.
        allowed: tokens that may be put in.
        steps: exchanges that may be made in each sequence.
        candidates: exchanges scored per sequence and step.
        top: tokens per place among which to draw.
        batch_size: sequences scored at once.
        seed: of the drawing.

    Returns:
        The sequences and their scores.

    Raises:
        ValueError: if no token is allowed.
    """
    if not bool(allowed.any()):
        raise ValueError("Expected candidate tokens, found none.")
    random = torch.Generator().manual_seed(seed)
    n, length = starts.shape
    top = min(top, int(allowed.sum()))
    which = torch.arange(n, device=starts.device)
    ids = starts.clone()
    with torch.no_grad():
        values = score(table[ids], which)
    for _ in range(steps):
        promising = _promising(score, table, ids, which, allowed, top)
        places = torch.randint(length, (n, candidates), generator=random).to(ids.device)
        ranks = torch.randint(top, (n, candidates), generator=random).to(ids.device)
        tokens = promising[which[:, None], places, ranks]
        tried = (
            ids[:, None].expand(-1, candidates, -1).scatter(2, places[..., None], tokens[..., None])
        )
        with torch.no_grad():
            found = _in_parts(
                score, table, tried.flatten(0, 1), which.repeat_interleave(candidates), batch_size
            )
        best, at = found.view(n, candidates).max(dim=1)
        better = best > values
        ids = torch.where(better[:, None], tried[which, at], ids)
        values = torch.where(better, best, values)
    return ids, values


def _in_parts(score: Score, table: Tensor, ids: Tensor, which: Tensor, size: int) -> Tensor:
    parts = zip(ids.split(size), which.split(size), strict=True)
    return torch.cat([score(table[part], numbers) for part, numbers in parts])


def _promising(
    score: Score, table: Tensor, ids: Tensor, which: Tensor, allowed: Tensor, top: int
) -> Int[Tensor, "n length top"]:
    """The tokens that, to first order, raise each sequence's score most at each place."""
    with torch.enable_grad():
        embeddings = table[ids].requires_grad_(True)
        [gradient] = torch.autograd.grad(score(embeddings, which).sum(), embeddings)
    promise = gradient.to(table.dtype) @ table.T
    # A score that is not finite leads nowhere, and must not hide what is allowed.
    promise = promise.nan_to_num(0.0, 0.0, 0.0).masked_fill(~allowed, -torch.inf)
    return promise.topk(top, dim=-1).indices


def token_table(model: nn.Module) -> Float[Tensor, "vocabulary d"]:
    """The embedding of every token, scaled where the model's own module scales."""
    inner: Any = base_model(model)
    module = inner.get_input_embeddings()
    with torch.no_grad():
        table: Tensor = module(torch.arange(module.weight.shape[0], device=module.weight.device))
    return table


def read_states(
    model: nn.Module, layer_name: str, **inputs: Tensor
) -> Float[Tensor, "batch seq d_in"]:
    """What a steered module gives before it is steered; the layers after it do not run.

    Args:
        model: a model with an active FSRL adapter on that module.
        layer_name: its path.
        inputs: of the model's forward; the result is differentiable where they are.
    """

    def stop(event: SteeringEvent) -> None:
        if event.layer_name == layer_name:
            raise _Reached(event.hidden_states)

    with observe(model, stop):
        try:
            model(**inputs, use_cache=False)
        except _Reached as reached:
            return reached.states
    raise ValueError(
        f"No adapter is active on {layer_name!r}. Activate one, and leave `disable_adapter`."
    )


class _Reached(Exception):
    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states
