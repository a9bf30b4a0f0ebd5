"""An adapter as LoRA in one record: what its parts measure alone, and the picture of it."""

from __future__ import annotations

import math

import pytest

from equivalence_helpers import batches
from helpers import fsrl_model, tiny_sae
from peft_fsrl.analysis.plots import plot_correspondence
from peft_fsrl.equivalence import (
    Correspondence,
    explain,
    fit_single_lora,
    measure_correspondence,
    measure_fidelity,
    restricted_lora,
)
from peft_fsrl.equivalence.batches import scored_tokens


def test_a_record_of_all_parts() -> None:
    model, sae, data, test = fsrl_model(), tiny_sae(), batches(), batches(1, seed=30)
    record = measure_correspondence(
        model,
        sae,
        data,
        test,
        lambda: measure_fidelity(model, test).models["FSRL"].loss,
        other_text=batches(1, seed=60),
        targets=(None,),
        ranks=(2, 8),
        n_features=(1, 4),
        n_checks=5,
    )
    inputs = {name: test[0][name] for name in ("input_ids", "attention_mask")}
    certificates = restricted_lora(model, inputs, tokens=scored_tokens(test[0]))
    assert record.token_ranks == tuple(each.rank for each in certificates)
    assert record.token_boundaries == tuple(each.boundary for each in certificates)
    assert record.n_checked == record.n_holding >= 5
    fitted = fit_single_lora(model, data)
    [stand_in] = record.stand_ins
    assert (stand_in.target, stand_in.ranks) == ("model.layers.1.mlp.down_proj", (2, 8))
    figures = measure_fidelity(model, test, fitted.stand_ins([2, 8])).models
    assert stand_in.kl == (figures["LoRA of rank 2"].kl, figures["LoRA of rank 8"].kl)
    assert record.base_kl == figures["base"].kl
    assert record.steered_loss == figures["FSRL"].loss
    assert record.base_loss == pytest.approx(figures["base"].loss)
    assert stand_in.losses[1] == pytest.approx(figures["LoRA of rank 8"].loss)
    figures = measure_fidelity(model, batches(1, seed=60), fitted.stand_ins([2, 8])).models
    assert stand_in.kl_elsewhere == (figures["LoRA of rank 2"].kl, figures["LoRA of rank 8"].kl)
    assert record.base_kl_elsewhere == figures["base"].kl
    found = explain(model, model, sae, data, held_out=test, n_features=4)
    assert record.chance[1] == found.chance
    assert record.explained[1] == found.explained.value
    assert Correspondence.from_json(record.to_json()).stand_ins == record.stand_ins
    alone = measure_correspondence(
        model, sae, data, test, float, targets=(None,), ranks=(2,), n_features=(), n_checks=1
    )
    assert math.isnan(alone.base_kl_elsewhere)
    assert alone.stand_ins[0].kl == stand_in.kl[:1]
    assert alone.stand_ins[0].kl_elsewhere == ()
    assert len(plot_correspondence(record).axes) == 4
