"""Which attribute each SAE feature detects: AUROC of single features over whole answers.

An attribute is a property of an answer, so the answer is the unit: a feature's score is its mean
activation over the answer's tokens. Tokens as units would count one answer thirty times as if they
were independent, and would blame a feature for being silent before its attribute could be known.
Only `(answers, d_sae)` is ever held, never `(tokens, d_sae)`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from language_model import encode_documents, layer_output
from peft_fsrl.organism.lexicon import ATTRIBUTES
from peft_fsrl.organism.organism import FeatureLabel
from peft_fsrl.organism.world import Document, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The share of (positive, negative) pairs of answers that a detecting feature orders correctly, less
# a half. Chance at 2,000 answers stays below 0.05 for the best of 512 features.
THRESHOLD = 0.15


def auroc(scores: Tensor, labels: Tensor) -> Tensor:
    """P(a positive scores above a negative), ties counting a half, for each column.

    Computed from mid-ranks (Mann-Whitney), exact.

    Args:
        scores: `(n, features)`.
        labels: `(n,)` bool.

    Returns:
        `(features,)` float64.

    Raises:
        ValueError: If all labels are equal.
    """
    positives, n = int(labels.sum()), len(labels)
    if positives in (0, n):
        raise ValueError(f"expected both labels among {n} answers, found {positives} positive")
    columns = []
    for column in scores.T:
        _values, group, counts = column.unique(return_inverse=True, return_counts=True)
        last = counts.cumsum(0).double()
        midrank = last - (counts.double() - 1) / 2
        columns.append(midrank[group][labels].sum())
    ranks = torch.stack(columns)
    return (ranks - positives * (positives + 1) / 2) / (positives * (n - positives))


@torch.no_grad()
def answer_scores(
    sae: Any, model: PreTrainedModel, world: World, layer: int, documents: Sequence[Document]
) -> Tensor:
    """Mean activation of each feature over each answer's tokens: `(answers, d_sae)`."""
    rows = []
    for start in range(0, len(documents), 32):
        part = documents[start : start + 32]
        ids, mask = encode_documents(world, part)
        inside = mask.clone()
        for row, document in enumerate(part):
            inside[row, : len(document.prompt)] = False
        acts = sae.encode(layer_output(model, layer, ids, mask))
        weights = inside.to(acts.dtype) / inside.sum(1, keepdim=True)
        rows.append(torch.einsum("bt,btf->bf", weights, acts))
    return torch.cat(rows)


def feature_labels(
    sae: Any,
    model: PreTrainedModel,
    world: World,
    layer: int,
    seed: int = 0,
    answers: int = 2000,
    threshold: float = THRESHOLD,
) -> list[FeatureLabel]:
    """Labels every feature of `sae` by the attribute that it detects on sampled answers.

    Args:
        sae: Anything with `encode: (..., d_in) -> (..., d_sae)`.
        model: The language model.
        world: Where the answers are drawn from.
        layer: The decoder layer that the SAE reads.
        seed: Fixes the answers.
        answers: How many.
        threshold: Smallest `|auroc - 0.5|` that counts as detection.
    """
    rng = random.Random(f"labels-{seed}")
    documents = [world.sample_answer(rng) for _ in range(answers)]
    scores = answer_scores(sae, model, world, layer, documents)
    density = (scores > 0).double().mean(0)
    found = {
        name: auroc(scores, torch.tensor([bool(d.attributes[name]) for d in documents]))
        for name in ATTRIBUTES
    }
    if len(world.topics) > 1:
        topics = torch.tensor([d.topic for d in documents])
        each = torch.stack([auroc(scores, topics == t) for t in range(len(world.topics))])
        best = (each - 0.5).abs().argmax(0)
        found["topic"] = each.gather(0, best[None])[0]
    labels = []
    for index in range(scores.shape[1]):
        figures = {name: float(values[index]) for name, values in found.items()}
        winner = max(figures, key=lambda name: abs(figures[name] - 0.5))
        detects = density[index] > 0 and abs(figures[winner] - 0.5) >= threshold
        labels.append(
            FeatureLabel(index, float(density[index]), figures, winner if detects else None)
        )
    return labels


def top_features(labels: Sequence[FeatureLabel], attribute: str, n: int) -> list[int]:
    """The `n` features that detect `attribute` best, best first.

    Raises:
        ValueError: If fewer than `n` features carry that label.
    """
    carriers = [label for label in labels if label.label == attribute]
    if len(carriers) < n:
        raise ValueError(
            f"expected {n} features that detect {attribute!r}, found {len(carriers)}; "
            "ask for fewer or lower the detection threshold"
        )
    carriers.sort(key=lambda label: -abs(label.auroc[attribute] - 0.5))
    return [label.index for label in carriers[:n]]
