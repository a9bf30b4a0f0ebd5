"""Which attribute each SAE feature detects: AUROC of single features over whole answers.

An attribute is a property of an answer, so the answer is the unit: a feature's score is its mean
activation over the answer's tokens. Tokens as units would count one answer thirty times as if they
were independent, and would blame a feature for being silent before its attribute could be known.
Only ``(answers, d_sae)`` is ever held, never ``(tokens, d_sae)``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from language_model import encode_documents, layer_output
from peft_fsrl.organism.lexicon import ATTRIBUTES
from peft_fsrl.organism.organism import FeatureDetection
from peft_fsrl.organism.world import Document, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The share of (positive, negative) pairs of answers that a detecting feature orders correctly, less
# a half. Chance at 2,000 answers stays below 0.05 for the best of 512 features.
THRESHOLD = 0.15


@torch.no_grad()
def answer_scores(
    sae: Any, model: PreTrainedModel, world: World, layer: int, documents: Sequence[Document]
) -> Tensor:
    """Mean activation of each feature over each answer's tokens: ``(answers, d_sae)``."""
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


def detect_attributes(
    sae: Any, model: PreTrainedModel, world: World, layer: int, seed: int = 0, answers: int = 2000
) -> list[FeatureDetection]:
    """Which attribute each feature of ``sae`` detects, judged on sampled answers.

    Args:
        sae: anything with ``encode: (..., d_in) -> (..., d_sae)``.
        model: the language model.
        world: where the answers are drawn from.
        layer: the decoder layer that the SAE reads.
        seed: fixes the answers.
        answers: how many.
    """
    rng = random.Random(f"labels-{seed}")
    documents = [world.sample_answer(rng) for _ in range(answers)]
    scores = answer_scores(sae, model, world, layer, documents)
    truth = {name: [bool(d.attributes[name]) for d in documents] for name in ATTRIBUTES}
    topics = range(len(world.topics)) if len(world.topics) > 1 else ()
    found = []
    for index, column in enumerate(scores.T.double().numpy()):
        auroc = {name: float(roc_auc_score(labels, column)) for name, labels in truth.items()}
        if topics:
            each = [float(roc_auc_score([d.topic == t for d in documents], column)) for t in topics]
            auroc["topic"] = max(each, key=lambda area: abs(area - 0.5))
        density = float((column > 0).mean())
        winner = max(auroc, key=lambda name: abs(auroc[name] - 0.5))
        detects = density > 0 and abs(auroc[winner] - 0.5) >= THRESHOLD
        found.append(FeatureDetection(index, density, auroc, winner if detects else None))
    return found
