"""Divergence from the base model, against a loop over tokens in float64."""

from __future__ import annotations

import pytest
import torch

import helpers
from peft_fsrl.analysis import Session, compute_divergence


def test_divergence_equals_a_loop_over_answer_tokens() -> None:
    model, base, tokenizer = helpers.fsrl_model(), helpers.tiny_model(), helpers.tiny_tokenizer()
    rows = helpers.tiny_preferences(5)
    found = compute_divergence(Session(model.train(), tokenizer, rows, batch_size=2), base)
    assert model.training
    assert torch.is_grad_enabled()
    terms = []
    model.eval()
    for row in rows:
        prompt = [1, *tokenizer(row["prompt"])["input_ids"]]
        for side in ("chosen", "rejected"):
            ids = torch.tensor([[*prompt, *tokenizer(row[side])["input_ids"], 2]])
            with torch.no_grad():
                p = model(ids).logits[0].double().softmax(-1)
                q = base(ids).logits[0].double().softmax(-1)
            for t in range(len(prompt) - 1, ids.shape[1] - 1):
                terms.append(float((p[t] * (p[t] / q[t]).log()).sum()))
    assert found == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    assert found > 0.001
    with pytest.raises(ValueError, match="at least one preference pair"):
        compute_divergence(Session(model, tokenizer, []), base)


def test_a_model_does_not_diverge_from_itself() -> None:
    base, rows = helpers.tiny_model(), helpers.tiny_preferences(3)
    assert (
        compute_divergence(Session(base, helpers.tiny_tokenizer(), rows), helpers.tiny_model()) == 0
    )
