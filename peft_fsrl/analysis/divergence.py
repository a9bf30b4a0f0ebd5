"""How far a model has moved from its base."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..training.likelihood import compute_kl, next_log_probabilities, pad
from ..training.running import evaluating
from ..training.tokens import Tokenized
from .session import Session


def compute_divergence(session: Session, base: nn.Module) -> float:
    """Mean ``KL(model || base)`` of the next-token distributions, over the tokens of both answers.

    Args:
        session: its model is taken as it is now.
        base: another, with the same vocabulary; two separate models, because both are run as they
            are.

    Returns:
        Nats per token.

    Raises:
        ValueError: for an empty data set, or an answer without tokens.
    """
    total, n_tokens = 0.0, 0
    with evaluating(session.model, base):
        for texts in session.batches("divergence"):
            ours, theirs = (_log_probabilities(model, texts) for model in (session.model, base))
            divergence = compute_kl(ours, theirs.to(ours.device))
            total += float(divergence.double().sum())
            n_tokens += len(divergence)
    return total / n_tokens


def _log_probabilities(model: nn.Module, texts: Sequence[Tokenized]) -> Tensor:
    batch = pad(texts, next(model.parameters()).device)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return next_log_probabilities(model, inputs, batch.answer_mask.bool())
