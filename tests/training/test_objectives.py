"""The coefficient that reaches the penalty, measured in every trainer that the library names.

Two runs of one optimizer step differ in ``l1_coeff`` alone. What the parameters moved apart is
``learning_rate * l1_coeff * gradient of the penalty``, and that gradient is derived here by
steering a plain model naively, one unpadded sequence at a time, over the trainer's batches.
"""

from __future__ import annotations

import gc
import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from helpers import (
    D_IN,
    DESCENT,
    SIMPO,
    fsrl_model,
    naively_steered,
    only_layer,
    randomize_adapter,
    tiny_model,
    tiny_preferences,
    tiny_sae,
    tiny_tokenizer,
    token_ids,
)
from peft_fsrl import FSRLConfig, with_fsrl
from peft_fsrl.steering import SteeringMonitor
from peft_fsrl.training.support import require_support

# So small a step that no threshold crosses zero; in float64 it can be read off all the same.
LR, COEFFICIENT = 1e-5, 0.7
COMMON = {**DESCENT, "learning_rate": LR, "max_steps": 1}


def texts() -> Dataset:
    return Dataset.from_list(
        [{"text": row["prompt"] + row["chosen"]} for row in tiny_preferences(4)]
    )


def labeled() -> Dataset:
    """Completions that are liked or not, of unequal lengths; KTO's KL term needs pairs of them."""
    rows = tiny_preferences(8)
    return Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "completion": row["chosen" if i % 2 else "rejected"],
                "label": bool(i % 2),
            }
            for i, row in enumerate(rows)
        ]
    )


def prompts() -> Dataset:
    return tiny_preferences(4).remove_columns(["chosen", "rejected"])


def tokens() -> Dataset:
    rows = []
    for row in range(4):
        ids = token_ids(1, 4 + row, seed=row)[0].tolist()
        padding = [0] * (3 - row)
        rows.append(
            {
                "input_ids": ids + padding,
                "attention_mask": [1] * len(ids) + padding,
                "labels": ids + [-100] * len(padding),
            }
        )
    return Dataset.from_list(rows)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


SAMPLING = {"num_generations": 2, "max_completion_length": 6, "temperature": 1.5}
# Trainer, its arguments' class, its settings, its data.
OBJECTIVES: dict[str, tuple[type, type, dict[str, Any], Callable[[], Dataset]]] = {
    "SimPO": (CPOTrainer, CPOConfig, SIMPO, tiny_preferences),
    "CPO-SimPO": (CPOTrainer, CPOConfig, {**SIMPO, "cpo_alpha": 0.5}, tiny_preferences),
    "AlphaPO": (CPOTrainer, CPOConfig, {**SIMPO, "alpha": 0.25, "beta": 2.0}, tiny_preferences),
    "CPO": (CPOTrainer, CPOConfig, {"loss_type": "sigmoid"}, tiny_preferences),
    "CPO-hinge": (CPOTrainer, CPOConfig, {"loss_type": "hinge"}, tiny_preferences),
    "CPO-IPO": (CPOTrainer, CPOConfig, {"loss_type": "ipo"}, tiny_preferences),
    "DPO": (DPOTrainer, DPOConfig, {}, tiny_preferences),
    "DPO-IPO": (DPOTrainer, DPOConfig, {"loss_type": ["ipo"]}, tiny_preferences),
    "ORPO": (ORPOTrainer, ORPOConfig, {}, tiny_preferences),
    "KTO": (KTOTrainer, KTOConfig, {}, labeled),
    "SFT": (SFTTrainer, SFTConfig, {}, texts),
    "GRPO": (GRPOTrainer, GRPOConfig, {**SAMPLING, "beta": 0.1}, prompts),
    "GRPO-per-sequence": (GRPOTrainer, GRPOConfig, {**SAMPLING, "loss_type": "grpo"}, prompts),
    "RLOO": (RLOOTrainer, RLOOConfig, SAMPLING, prompts),
    "Trainer": (Trainer, TrainingArguments, {"remove_unused_columns": False}, tokens),
}


def build(
    objective: str,
    model: nn.Module,
    directory: Path,
    accumulation: int,
    wrap: Callable[[type], type] = with_fsrl,
    **settings: Any,
) -> Any:
    trainer_class, args_class, own, data = OBJECTIVES[objective]
    rows = data()
    args = args_class(
        str(directory),
        per_device_train_batch_size=len(rows) // accumulation,
        gradient_accumulation_steps=accumulation,
        **{**COMMON, **own, **settings},
    )
    extra: dict[str, Any] = {}
    if args_class is not TrainingArguments:
        extra["processing_class"] = tiny_tokenizer()
    if objective.startswith(("GRPO", "RLOO")):
        extra["reward_funcs"] = reward
    return wrap(trainer_class)(model, args=args, train_dataset=rows, eval_dataset=rows, **extra)


def double_model(**settings: Any) -> PeftModel:
    return fsrl_model(tiny_model().double(), sae=tiny_sae(dtype="float64"), **settings)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    adapter = only_layer(model).fsrl_adapter["default"]
    return {name: p.detach().clone() for name, p in adapter.named_parameters()}


@contextmanager
def training_batches(model: PeftModel) -> Iterator[list[list[list[int]]]]:
    """The token ids of each forward pass that is made with gradients, without padding."""
    batches = []

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        ids = args[0] if args else kwargs["input_ids"]
        mask = kwargs["attention_mask"].bool()
        batches.append([row[keep].tolist() for row, keep in zip(ids, mask, strict=True)])

    hook = model.get_base_model().register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield batches
    finally:
        hook.remove()


def penalty_gradient(model: PeftModel, batches: list[list[list[int]]]) -> dict[str, Tensor]:
    """Gradient of the mean over micro-batches, sequences and tokens of ``||v||_1``."""
    layer = only_layer(model)
    parameters = {name: p.requires_grad_() for name, p in snapshot(model).items()}
    base, sae = tiny_model().double().requires_grad_(False), tiny_sae(dtype="float64")
    total = torch.zeros((), dtype=torch.float64)
    for sequences in batches:
        for ids in sequences:
            with naively_steered(base, layer, sae, parameters) as steered:
                base(torch.tensor([ids]))
            [(_, v, _)] = steered
            norms = [v[0, t].abs().sum() for t in range(len(ids))]
            total = total + sum(norms) / len(ids) / len(sequences) / len(batches)
    found = torch.autograd.grad(total, list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def one_step(
    objective: str, directory: Path, accumulation: int, coefficient: float, **settings: Any
) -> tuple[dict[str, Tensor], list[list[list[int]]]]:
    """How far one step moved each parameter, and its batches."""
    model = double_model(l1_coeff=coefficient)
    trainer = build(objective, model, directory, accumulation, **settings)
    before = snapshot(model)
    torch.manual_seed(0)
    with training_batches(model) as batches:
        trainer.train()
    after = snapshot(model)
    moved = {name: (before[name] - after[name]) / LR for name in before}
    return moved, batches


# A trainer divides by the accumulation steps in its own way, for all of its losses.
LOSSES = {"CPO-SimPO", "AlphaPO", "CPO", "CPO-hinge", "CPO-IPO", "DPO-IPO", "GRPO-per-sequence"}
CASES = [(name, n) for name in OBJECTIVES for n in ((2,) if name in LOSSES else (1, 4))]


@pytest.mark.parametrize(("objective", "accumulation"), CASES)
def test_the_coefficient_arrives_exactly(objective: str, accumulation: int, tmp_path: Path) -> None:
    without, plain_batches = one_step(objective, tmp_path, accumulation, 0.0)
    moved, batches = one_step(objective, tmp_path, accumulation, COEFFICIENT)
    assert batches == plain_batches
    gradient = penalty_gradient(double_model(), batches)
    assert len(batches) == accumulation
    assert len({len(ids) for batch in batches for ids in batch}) > 1, "the test needs padding"
    apart = torch.cat([(moved[name] - without[name]).flatten() for name in moved])
    expected = torch.cat([gradient[name].flatten() for name in moved])
    assert max(g.abs().max() for g in without.values()) > 1e-4, "the objective must train too"
    measured = (apart @ expected / (expected @ expected)).item()
    assert measured == pytest.approx(COEFFICIENT, rel=1e-9)
    torch.testing.assert_close(apart, COEFFICIENT * expected, rtol=1e-6, atol=1e-8)


def log_probability(logits: Tensor, ids: list[int], first: int) -> Tensor:
    """Of the tokens from ``first`` on, given those before each."""
    return sum(logits[t - 1].log_softmax(-1)[ids[t]] for t in range(first, len(ids)))


def models_like(model: nn.Module) -> int:
    """How many models of this class are alive."""
    gc.collect()
    return sum(type(each) is type(model) for each in gc.get_objects())


@pytest.mark.parametrize("given", ["config", "adapter"])
def test_dpo_refers_to_the_start_without_a_second_model(given: str, tmp_path: Path) -> None:
    """A new adapter is compared with the base model, a given one with what it was."""
    base = tiny_model().double()
    kinds = models_like(base)
    config = FSRLConfig(layer=1, sae=tiny_sae(dtype="float64"), l1_coeff=0.7)
    args = DPOConfig(str(tmp_path), **{**COMMON, "per_device_train_batch_size": 4})
    data = {"args": args, "train_dataset": tiny_preferences(4)}
    data["processing_class"] = tiny_tokenizer()
    if given == "config":
        trainer = with_fsrl(DPOTrainer)(base, peft_config=config, **data)
    else:
        model = get_peft_model(base, config)
        randomize_adapter(only_layer(model), seed=7)
        trainer = with_fsrl(DPOTrainer)(model, **data)
    assert trainer.ref_model is None
    assert models_like(base) == kinds
    layer = only_layer(trainer.model)
    assert ("ref" in layer.fsrl_adapter) == (given == "adapter")
    randomize_adapter(layer, seed=1)

    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        actual = trainer.model.eval() and trainer.compute_loss(trainer.model, dict(batch))
    scores = []
    for name in ("default", "ref" if given == "adapter" else None):
        plain, sae = tiny_model().double(), tiny_sae(dtype="float64")
        each = []
        for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True):
            ids = ids[batch["attention_mask"][len(each)].bool()].tolist()
            with (
                naively_steered(plain, layer, sae, adapter_name=name)
                if name is not None
                else nullcontext()
            ):
                logits = plain(torch.tensor([ids])).logits[0]
            each.append(log_probability(logits, ids, int(mask.argmax())))
        scores.append(each)
    losses = []
    for row in range(4):
        chosen, rejected = (scores[0][i] - scores[1][i] for i in (row, 4 + row))
        losses.append(-torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)))
    expected = sum(losses) / 4
    assert abs(expected.item() - math.log(2)) > 1e-4, "the adapter must have moved"
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0.0)


def test_dpo_trains_only_what_it_was_given(tmp_path: Path) -> None:
    model = double_model()
    trainer = build("DPO", model, tmp_path, 1, learning_rate=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {name.split("fsrl_adapter.")[-1] for name in moved} == {
        "default.weight",
        "default.bias",
        "default.threshold",
    }


EVALUATED = ("SimPO", "CPO-SimPO", "DPO", "ORPO", "KTO", "SFT", "Trainer")


@pytest.mark.parametrize("objective", EVALUATED)
def test_evaluation_is_the_stock_trainers(objective: str, tmp_path: Path) -> None:
    losses = {}
    for wrap in (lambda stock: stock, with_fsrl):
        model = double_model(l1_coeff=5.0)
        trainer = build(objective, model, tmp_path, 1, wrap=wrap)
        metrics = trainer.evaluate()
        losses[wrap] = metrics["eval_loss"]
        steering = {name for name in metrics if "fsrl" in name}
        kinds = {"l0", "l1", "l2", "nonfinite"} if wrap is with_fsrl else set()
        assert steering == {f"eval_fsrl/{kind}" for kind in kinds}
    assert len(set(losses.values())) == 1
    assert math.isfinite(metrics["eval_loss"])


def test_sampling_is_not_counted_in_evaluation(tmp_path: Path) -> None:
    """GRPO samples completions with the steered model before it scores them."""
    trainer = build("GRPO", double_model(), tmp_path, 1)
    passes: list[tuple[Tensor, Tensor]] = []
    monitor = SteeringMonitor(
        trainer.model, lambda record: passes.append((record.mask, record.tokens[0].l0))
    )
    with monitor:
        metrics = trainer.evaluate()
    assert len(passes) > 3, "sampling makes passes too"
    scored = [(mask, l0) for mask, l0 in passes[-1:]]
    [(mask, l0)] = scored
    assert metrics["eval_fsrl/l0"] == pytest.approx(l0[mask > 0].mean().item(), rel=1e-6)


@pytest.mark.parametrize("objective", ["SimPO", "DPO", "Trainer"])
def test_a_penalty_that_nobody_adds_is_announced_once(objective: str, tmp_path: Path) -> None:
    model = double_model(l1_coeff=0.7)
    trainer = build(objective, model, tmp_path, 1, wrap=lambda stock: stock, max_steps=4)
    with pytest.warns(UserWarning, match=r"trains without one.*with_fsrl") as caught:
        trainer.train()
    assert len([w for w in caught if "with_fsrl" in str(w.message)]) == 1


@pytest.mark.parametrize("objective", ["SimPO", "Trainer"])
def test_nothing_is_announced_where_nothing_is_missing(objective: str, tmp_path: Path) -> None:
    without = build(
        objective, double_model(l1_coeff=0.0), tmp_path, 1, wrap=lambda stock: stock, max_steps=3
    )
    without.train()
    model = double_model(l1_coeff=0.7)
    served = build(objective, model, tmp_path, 2, max_steps=3)
    served.train()
    served.evaluate()
    for _ in range(3):
        model.eval()(token_ids(), labels=token_ids()).loss.backward()
        model.train()(token_ids())


class OwnStep(Trainer):
    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        loss = model(**inputs).loss
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_trainer_without_compute_loss_is_stopped_at_its_first_step(tmp_path: Path) -> None:
    model = double_model()
    before = snapshot(model)
    heir = type("Heir", (with_fsrl(OwnStep),), {})
    trainer = build("Trainer", model, tmp_path, 1, wrap=lambda _: heir)
    with pytest.raises(RuntimeError, match=r"^OwnStep computes its loss without `compute_loss`"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())


class Inside(Trainer):
    """Like a trainer with a fused loss, which calls the decoder and the head by itself."""

    def compute_loss(self, model: nn.Module, inputs: Any, **_: Any) -> Any:
        decoder = model.get_base_model().model
        return decoder(input_ids=inputs["input_ids"]).last_hidden_state.square().mean()


def test_a_trainer_that_goes_past_the_models_forward_is_stopped(tmp_path: Path) -> None:
    trainer = build("Trainer", double_model(), tmp_path, 1, wrap=lambda _: with_fsrl(Inside))
    with pytest.raises(RuntimeError, match=r"^Inside steered at 'model.layers.1' without a call"):
        trainer.train()


@pytest.mark.parametrize(
    "joined",
    [
        {"padding_free": True, "max_length": None},
        {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
    ],
)
def test_joined_sequences_are_refused_by_sequence(joined: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"joined into one row.*penalty_reduction='token'"):
        build("SFT", double_model(), tmp_path, 1, **joined)


def flattened(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What ``DataCollatorWithFlattening`` makes: one row, whose positions start again."""
    lengths = [sum(row["attention_mask"]) for row in rows]
    ids = [token for row, n in zip(rows, lengths, strict=True) for token in row["input_ids"][:n]]
    positions = [position for n in lengths for position in range(n)]
    joined = {"input_ids": ids, "labels": ids, "position_ids": positions}
    return {name: torch.tensor([values]) for name, values in joined.items()}


def with_masks_of_four_axes(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    columns = {n: torch.tensor([row[n] for row in rows]) for n in ("input_ids", "labels")}
    mask = torch.tensor([row["attention_mask"] for row in rows]).bool()
    return {**columns, "attention_mask": (mask[:, None, None] & mask[:, None, :, None])}


@pytest.mark.parametrize(
    ("collate", "message"),
    [
        (flattened, "joined into one row"),
        (with_masks_of_four_axes, r"shape \(batch, seq\), found shape \(4, 1, 7, 7\)"),
    ],
)
def test_tokens_that_are_not_known_to_be_real_stop_the_first_step(
    collate: Any, message: str, tmp_path: Path
) -> None:
    model = double_model(l1_coeff=0.7)
    before = snapshot(model)
    trainer = build("Trainer", model, tmp_path, 1)
    trainer.data_collator = collate
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())


def test_joined_rows_are_fine_for_a_mean_over_tokens(tmp_path: Path) -> None:
    model = double_model(l1_coeff=0.7, penalty_reduction="token")
    trainer = build("Trainer", model, tmp_path, 1)
    trainer.data_collator = flattened
    trainer.train()
    assert trainer.state.log_history[0]["fsrl/penalty"] > 0


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    model = fsrl_model(
        T5ForConditionalGeneration(
            T5Config(d_model=D_IN, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=40)
        ),
        target_modules=["decoder.block.1.layer.2"],
        task_type="SEQ_2_SEQ_LM",
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        build("Trainer", model, tmp_path, 1)


@pytest.mark.parametrize("objective", ["GRPO", "RLOO"])
def test_vllm_that_forgets_its_weights_is_refused(objective: str, tmp_path: Path) -> None:
    settings = {"use_vllm": True, "vllm_enable_sleep_mode": True}
    with pytest.raises(ValueError, match=r"has vllm_enable_sleep_mode=True.*to False"):
        build(objective, double_model(), tmp_path, 1, **settings)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is here")
@pytest.mark.parametrize("objective", ["GRPO", "RLOO"])
def test_vllm_that_is_not_there_is_said(objective: str, tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="vLLM is not available"):
        build(objective, double_model(), tmp_path, 1, use_vllm=True)


def test_several_gpus_in_one_process_are_refused(tmp_path: Path) -> None:
    trainer = build("Trainer", double_model(), tmp_path, 1)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match=r"2 GPUs in one process.*accelerate launch"):
        require_support(trainer)
