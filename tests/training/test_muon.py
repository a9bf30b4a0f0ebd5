"""Muon on matrices, AdamW on the rest: each step by its own means, and what a checkpoint keeps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from helpers import fsrl_model, tiny_preferences, tiny_tokenizer
from peft_fsrl.training import MuonAdamW, SimPOConfig, SimPOTrainer, with_fsrl


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6))]


def give_gradients(given: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in given:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_a_matrix_takes_an_orthogonal_step_and_a_bias_takes_adams() -> None:
    matrix, bias = parameters()
    before = matrix.detach().clone()
    other = nn.Parameter(bias.detach().clone())
    both = MuonAdamW([matrix, bias], lr=0.01, betas=(0.9, 0.98), weight_decay=0.1)
    alone = torch.optim.AdamW([other], lr=0.01, betas=(0.9, 0.98), weight_decay=0.1)
    give_gradients([matrix, bias], 1)
    gradient, other.grad = matrix.grad.clone(), bias.grad.clone()
    both.step()
    alone.step()
    assert torch.equal(bias, other)
    assert torch.equal(matrix.grad, gradient)
    # Entries as large as AdamW's: 0.2 sqrt(6) times an orthogonal matrix, to the iteration's
    # accuracy; decay as AdamW's.
    moved = (before * (1 - 0.01 * 0.1) - matrix.detach()) / (0.01 * 0.2 * 6**0.5)
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    inner = left.T @ moved @ right.T
    assert torch.allclose(inner, torch.diag(inner.diagonal()), atol=0.05)
    assert 0.5 < inner.diagonal().min() <= inner.diagonal().max() < 1.5


def test_a_loaded_state_goes_on_as_if_nothing_had_been() -> None:
    given = parameters()
    optimizer = MuonAdamW(given, lr=0.01)
    give_gradients(given, 1)
    optimizer.step()
    others = copy.deepcopy(given)
    resumed = MuonAdamW(others, lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter_list, each in ((given, optimizer), (others, resumed)):
        give_gradients(parameter_list, 2)
        each.step()
    assert all(torch.equal(a, b) for a, b in zip(given, others, strict=True))
    assert "momentum_buffer" in resumed.state[others[0]]
    assert "exp_avg" in resumed.state[others[1]]


def test_it_trains_an_adapter_whose_thresholds_have_a_group_of_their_own(tmp_path: Any) -> None:
    model = fsrl_model(l1_coeff=0.1, threshold_lr_multiplier=3.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    args = SimPOConfig(
        str(tmp_path), max_steps=3, max_length=64, bf16=False, report_to="none", use_cpu=True
    )
    rows, tokenizer = tiny_preferences(4), tiny_tokenizer()
    trainer = with_fsrl(SimPOTrainer)(
        model=model, args=args, train_dataset=rows, processing_class=tokenizer
    )
    trainer.optimizer_cls_and_kwargs = (MuonAdamW, {"lr": 1e-2})
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, MuonAdamW)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.95}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 3
    assert all(not torch.equal(before[name], p) for name, p in trained.items())


def test_an_older_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ImportError, match=r"Expected torch 2\.9 or later"):
        MuonAdamW(parameters())
