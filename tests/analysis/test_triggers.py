"""The token search against brute force, and what it reads of a model."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import helpers
from peft_fsrl.analysis.triggers import read_states, search_tokens, token_table
from peft_fsrl.steering import base_model

TABLE = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
WANTED = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
ALLOWED = torch.arange(12) > 2


def near(embeddings: Tensor, which: Tensor) -> Tensor:
    """How near each sequence comes to what is wanted of it: no gradient shows the best at once."""
    return -(embeddings - WANTED[which]).square().sum(dim=(1, 2))


def test_the_search_finds_what_trying_all_finds() -> None:
    starts = torch.full((2, 3), 5)
    ids, values = search_tokens(near, starts, TABLE, ALLOWED, steps=30, candidates=27, top=9)
    every = torch.tensor(list(itertools.product(range(3, 12), repeat=3)))
    for row in range(2):
        scores = near(TABLE[every], torch.full((len(every),), row))
        assert values[row] == pytest.approx(float(scores.max()))
        assert ids[row].tolist() == every[scores.argmax()].tolist()
    assert (starts == 5).all(), "starts are the caller's"


def test_it_never_goes_down_and_takes_only_what_is_allowed() -> None:
    starts = torch.randint(12, (2, 3), generator=torch.Generator().manual_seed(2))
    best = near(TABLE[starts], torch.arange(2))
    for steps in range(4):
        ids, values = search_tokens(
            near, starts, TABLE, ALLOWED, steps=steps, candidates=2, top=4, batch_size=3
        )
        assert (values >= best).all()
        assert torch.equal(values, near(TABLE[ids], torch.arange(2)))
        assert ALLOWED[ids[ids != starts]].all()
        best = values
    with pytest.raises(ValueError, match="Expected candidate tokens"):
        search_tokens(near, starts, TABLE, ALLOWED & False, steps=1, candidates=1)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gptj"])
def test_states_are_those_before_steering_and_nothing_runs_above(family: str) -> None:
    plain = helpers.tiny_model(family)
    model = helpers.fsrl_model(helpers.tiny_model(family))
    layer = helpers.only_layer(model)
    ids = helpers.token_ids()
    expected = plain(ids, output_hidden_states=True).hidden_states[2]
    ran = []
    head = base_model(model).get_output_embeddings()
    handle = head.register_forward_hook(lambda *_: ran.append(1))
    torch.testing.assert_close(read_states(model, layer.layer_name, input_ids=ids), expected)
    embeddings = token_table(model)[ids].requires_grad_(True)
    states = read_states(model, layer.layer_name, inputs_embeds=embeddings)
    torch.testing.assert_close(states, expected)
    [gradient] = torch.autograd.grad(states[:, -1].sum(), embeddings)
    assert gradient.abs().sum() > 0
    assert not ran
    handle.remove()
    with model.disable_adapter(), pytest.raises(ValueError, match="No adapter is active"):
        read_states(model, layer.layer_name, input_ids=ids)
