"""Newer architectures: the formula, a round trip through a folder, and generation with a cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from helpers import NEWER, fsrl_model, naively_steered, only_layer, tiny_model, tiny_sae, token_ids


@torch.no_grad()
@pytest.mark.parametrize("family", NEWER)
def test_attaches_and_steers(family: str, tmp_path: Path) -> None:
    sae, ids, plain = tiny_sae(), token_ids(), tiny_model(family)
    model = fsrl_model(tiny_model(family), sae=sae)
    layer, found = only_layer(model), model(input_ids=ids).logits
    assert layer.layer_name.endswith("layers.1")
    assert "vision" not in layer.layer_name
    assert (found - plain(input_ids=ids).logits).abs().max() > 0.1
    with naively_steered(plain, layer, sae):
        torch.testing.assert_close(found, plain(input_ids=ids).logits, rtol=1e-5, atol=1e-5)

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    assert torch.equal(again(input_ids=ids).logits, found)

    said = model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert said.shape[1] == ids.shape[1] + 4
    # What a cache made step by step has to agree with: one pass over all.
    scores = model(input_ids=said).logits[:, ids.shape[1] - 1 : -1]
    scores[..., 2] = -torch.inf  # the end, which `min_new_tokens` rules out
    assert torch.equal(scores.argmax(-1), said[:, ids.shape[1] :])
