"""A trainer's folders at every moment at which it can be killed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from helpers import (
    fsrl_model,
    only_layer,
    randomize_adapter,
    tiny_model,
    tiny_sae,
    token_ids,
)
from peft_fsrl import with_fsrl
from peft_fsrl.files import move_file
from peft_fsrl.training import checkpoints, complete_checkpoints, find_checkpoint, trainer
from peft_fsrl.training.checkpoints import replacing_adapter

WEIGHTS = "adapter_model.safetensors"


class Killed(BaseException):
    """Nothing that code may catch."""


class DiesAfter:
    """``move_file``, for so many files."""

    def __init__(self, moves: int) -> None:
        self.left = moves

    def __call__(self, source: Path, target: Path) -> None:
        if not self.left:
            raise Killed
        self.left -= 1
        move_file(source, target)


def trainer_of(model: PeftModel, folder: Path, **settings: Any) -> Any:
    args = TrainingArguments(
        str(folder),
        **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 2, **settings},
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(2, 7).tolist()]
    return with_fsrl(Trainer)(model=model, args=args, train_dataset=Dataset.from_list(rows))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("same_config", [True, False])
def test_a_killed_save_leaves_the_old_adapter_or_the_new_one(
    same_config: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never the weights of one that load under the config of the other."""
    first = fsrl_model(features=[0, 1, 2])
    second = fsrl_model(features=[0, 1, 2] if same_config else [3, 4, 5])
    with torch.no_grad():
        only_layer(second).fsrl_adapter["default"].weight += 1
    folders = [tmp_path / name for name in ("old", "new")]
    for model, folder in zip((first, second), folders, strict=True):
        trainer_of(model, folder).save_model()
    old, new = map(contents, folders)
    assert (old["adapter_config.json"] == new["adapter_config.json"]) == same_config
    assert old[WEIGHTS] != new[WEIGHTS]

    seen = []
    for moves in range(len(new) + 1):
        folder = tmp_path / str(moves)
        trainer_of(first, folder).save_model()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "move_file", DiesAfter(moves))
            try:
                trainer_of(second, folder).save_model()
            except Killed:
                assert moves < len(new)
        found = contents(folder)
        seen.append({old[WEIGHTS]: "old", new[WEIGHTS]: "new"}[found[WEIGHTS]])
        whole = old if seen[-1] == "old" else new
        if found["adapter_config.json"] == whole["adapter_config.json"]:
            PeftModel.from_pretrained(tiny_model(), folder)
        else:
            with pytest.raises(ValueError, match="steer other features"):
                PeftModel.from_pretrained(tiny_model(), folder)
    assert seen[-1] == "new"
    assert "new" not in seen[:-1], "the weights come last"


def test_older_checkpoints_stay_until_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}

    def mark_or_die(checkpoint: Path) -> None:
        if checkpoint.name == "checkpoint-2":
            raise Killed
        checkpoints.mark_complete(checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "mark_complete", mark_or_die)
        with pytest.raises(Killed):
            trainer_of(fsrl_model(), tmp_path, **every).train()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-1"]
    assert find_checkpoint(tmp_path, True) == str(tmp_path / "checkpoint-1")
    trainer_of(fsrl_model(), tmp_path, **every).train(resume_from_checkpoint=True)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert find_checkpoint(tmp_path, True) == str(tmp_path / "checkpoint-2")


def test_gains_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    settings = {"sae": tiny_sae("jumprelu"), "activation": "gain", "l1_coeff": 0.1}
    whole, other = fsrl_model(**settings), fsrl_model(**settings)
    start = only_layer(whole).fsrl_adapter["default"].gain.detach().clone()
    trainer_of(whole, tmp_path, save_strategy="steps", save_steps=1).train()
    # Its encoder and its gains come from the checkpoint.
    randomize_adapter(only_layer(other), seed=9)
    trainer_of(other, tmp_path / "other").train(str(tmp_path / "checkpoint-1"))
    expected = only_layer(whole).fsrl_adapter["default"].state_dict()
    found = only_layer(other).fsrl_adapter["default"].state_dict()
    assert not torch.equal(expected["gain"], start)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_live_sae_lies_beside_the_adapter_and_is_replaced_with_it(tmp_path: Path) -> None:
    for seed in (0, 1):
        model = fsrl_model(sae=tiny_sae(seed=seed))
        trainer_of(model, tmp_path).save_model()
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
        assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)
    assert set(load_file(tmp_path / WEIGHTS)) == {
        f"base_model.model.model.layers.1.fsrl_adapter.{name}"
        for name in ("weight", "bias", "threshold", "identity")
    }
    assert not list(tmp_path.glob("_unfinished_*"))


def test_two_savers_and_a_reader_in_one_folder(tmp_path: Path) -> None:
    """Nobody raises, and what is read is what one of the two has saved."""
    models = [fsrl_model(sae=tiny_sae()) for _ in range(2)]
    for seed, model in enumerate(models):
        randomize_adapter(only_layer(model), seed=seed)
    with replacing_adapter(tmp_path) as staging:
        models[0].save_pretrained(staging)
    saved = [dict(only_layer(model).fsrl_adapter["default"].state_dict()) for model in models]
    failures: list[BaseException] = []

    def save(model: PeftModel) -> None:
        try:
            for _ in range(15):
                with replacing_adapter(tmp_path) as staging:
                    model.save_pretrained(staging)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
        found = only_layer(loaded).fsrl_adapter["default"].state_dict()
        assert any(all(torch.equal(found[n], one[n]) for n in one) for one in saved)
    assert failures == []
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "sae",
    }
