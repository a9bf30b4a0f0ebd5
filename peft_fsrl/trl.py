"""The sparsity penalty in any TRL or transformers trainer.

``with_fsrl(CPOTrainer)`` is a subclass of a stock trainer that adds the penalty of the active FSRL
adapters to the training loss, logs what the steering costs, and gives thresholds their own learning
rate. It copies nothing of the trainer. Evaluation is left alone: ``eval_loss`` is the preference
loss, comparable with any other method's.
"""

from __future__ import annotations

import os
from collections import defaultdict
from functools import cache
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer
from transformers.modeling_layers import GradientCheckpointingLayer

from .card import render_model_card
from .functional import masked_mean
from .nonfinite import NonfiniteReport
from .steering import ForwardRecord, SteeringMonitor, adapter_configs, base_model, fsrl_layers

TrainerT = TypeVar("TrainerT", bound=Trainer)

_CARD_SETTINGS = (
    "loss_type",
    "beta",
    "simpo_gamma",
    "cpo_alpha",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "max_length",
    "seed",
)
# Older transformers wrap a layer's call in a checkpoint, newer ones its forward, without its hooks.
CHECKPOINTS_HOOKS = "__call__" in vars(GradientCheckpointingLayer)
_THRESHOLD_SUFFIXES = (".threshold", ".log_threshold")


class SparsityPenalty:
    """``l1_coeff * mean_t ||v_t||_1 + l0_coeff * mean_t #open gates``, over real tokens.

    Args:
        model: a model with FSRL adapters; their configs are read once, here.

    Attributes:
        l1_coeff: per adapter, weight of the L1 term.
        l0_coeff: per adapter, weight of the L0 term.
    """

    def __init__(self, model: nn.Module) -> None:
        configs = adapter_configs(model)
        self.l1_coeff: dict[str, float] = {n: float(c.l1_coeff) for n, c in configs.items()}
        self.l0_coeff: dict[str, float] = {n: float(c.l0_coeff) for n, c in configs.items()}
        self._reduction: dict[str, str] = {n: c.penalty_reduction for n, c in configs.items()}

    def __call__(self, record: ForwardRecord) -> Tensor:
        """The penalty of one forward pass, a scalar with that pass's graph."""
        terms = []
        for tokens in record.tokens:
            name = tokens.adapter_name
            mask = None if record.mask is None else record.mask.to(tokens.l1.device)
            term = self.l1_coeff[name] * masked_mean(tokens.l1, mask, self._reduction[name])
            if tokens.gate is not None and self.l0_coeff[name]:
                gates = masked_mean(tokens.gate, mask, self._reduction[name])
                term = term + self.l0_coeff[name] * gates
            terms.append(term)
        device = terms[0].device
        return torch.stack([term.to(device) for term in terms]).sum()


class FSRLTrainerMixin(Trainer):
    """Put before a trainer class: ``class MyTrainer(FSRLTrainerMixin, CPOTrainer)``.

    Logs, averaged over the real tokens since the last log: ``fsrl/l0`` (steered features per
    token), ``fsrl/l1``, ``fsrl/l2`` (norms of the steering vector), ``fsrl/nonfinite`` (share of
    tokens with nan or inf, of which it also warns) and ``fsrl/penalty`` (the term that was added to
    the loss); during evaluation all but the last with the prefix ``eval_``.

    Raises:
        ValueError: if the model has no FSRL adapter.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.gradient_checkpointing and CHECKPOINTS_HOOKS:
            raise ValueError(
                f"transformers {transformers.__version__} recomputes a layer's hooks with the "
                "layer, and the penalty would not survive that. Set gradient_checkpointing=False, "
                "or install transformers 5.23 or newer (Python 3.11)."
            )
        assert isinstance(self.model, nn.Module)
        fsrl_layers(self.model)
        self.fsrl_penalty = SparsityPenalty(self.model)
        self._fsrl_metrics = {"train": _Means(), "eval": _Means()}
        self._fsrl_nonfinite = NonfiniteReport()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The trainer's own loss plus the penalty of the forward passes that it made."""
        assert isinstance(self.model, nn.Module)
        records: list[ForwardRecord] = []
        # Attached for this call only: other forward passes (generation, a later trainer of the same
        # model) are none of this trainer's business.
        with SteeringMonitor(self.model, records.append):
            result = super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        records = [record for record in records if record.training]
        if not records:
            return result
        for record in records:
            self._fsrl_measure(record, "train")
        batch_sizes = torch.tensor([float(r.tokens[0].l1.shape[0]) for r in records])
        terms = torch.stack([self.fsrl_penalty(record) for record in records])
        weights = (batch_sizes / batch_sizes.sum()).to(terms)
        penalty = (terms * weights).sum()
        self._fsrl_metrics["train"].add("penalty", penalty.detach(), 1.0)
        if self._loss_is_scaled(num_items_in_batch):
            penalty = penalty / self.current_gradient_accumulation_steps
        if return_outputs:
            loss, outputs = result
            return loss + penalty.to(loss.device), outputs
        return result + penalty.to(result.device)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own evaluation of a batch, whose steering is measured."""
        assert isinstance(self.model, nn.Module)
        with SteeringMonitor(self.model, lambda record: self._fsrl_measure(record, "eval")):
            return super().prediction_step(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the steering metrics before the trainer hands its logs to the reporters."""
        self._fsrl_nonfinite.warn()
        is_train = "loss" in logs
        means = self._fsrl_metrics["train" if is_train else "eval"]
        prefix = "fsrl/" if is_train else "eval_fsrl/"
        logs.update({prefix + name: value for name, value in means.pop().items()})
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's optimizer, with the thresholds in a group of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        assert isinstance(self.model, nn.Module)
        for adapter_name, config in adapter_configs(self.model).items():
            thresholds = [
                parameter
                for name, parameter in self.model.named_parameters()
                if name.endswith(tuple(f".{adapter_name}{s}" for s in _THRESHOLD_SUFFIXES))
                and parameter.requires_grad
            ]
            _split_group(optimizer, thresholds, self.args.learning_rate, config)
            if config.activation == "soft_threshold":
                _keep_non_negative(optimizer, thresholds)
        return optimizer

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **_: Any,
    ) -> None:
        """Write ``README.md`` with the SAE, the settings and the last evaluation's figures."""
        if not self.is_world_process_zero():
            return
        directory = str(self.args.output_dir)
        name = model_name or self.hub_model_id or os.path.basename(os.path.abspath(directory))
        extra = [tags] if isinstance(tags, str) else list(tags or [])
        self._write_card(directory, name, dataset_name, extra)

    def _save(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        super()._save(output_dir, *args, **kwargs)
        # PEFT has just written a blank form there.
        directory = str(output_dir or self.args.output_dir)
        self._write_card(directory, os.path.basename(os.path.abspath(directory)), None, [])

    def _write_card(
        self, directory: str, name: str, dataset_name: str | None, tags: list[str]
    ) -> None:
        assert isinstance(self.model, nn.Module)
        inner = base_model(self.model)
        evaluations = [row for row in self.state.log_history if "eval_loss" in row]
        last = evaluations[-1] if evaluations else {}
        settings = {key: getattr(self.args, key, None) for key in _CARD_SETTINGS}
        card = render_model_card(
            next(iter(adapter_configs(self.model).values())),
            base_model=getattr(inner, "name_or_path", None) or None,
            model_name=name.split("/")[-1],
            adapter_id=self.hub_model_id or directory,
            training={"trainer": type(self).__mro__[2].__name__, **settings},
            figures={k: v for k, v in last.items() if k.startswith("eval_") and "_per_" not in k},
            dataset_name=dataset_name,
            tags=tags,
        )
        os.makedirs(directory, exist_ok=True)
        card.save(os.path.join(directory, "README.md"))

    def _fsrl_measure(self, record: ForwardRecord, mode: str) -> None:
        self._fsrl_nonfinite.add(record)
        for tokens in record.tokens:
            real = torch.ones_like(tokens.l1) if record.mask is None else record.mask > 0
            real = real.to(tokens.l1.device, torch.bool)
            for name in ("l0", "l1", "l2", "nonfinite"):
                chosen = getattr(tokens, name).detach()[real]
                self._fsrl_metrics[mode].add(name, chosen.sum(), float(chosen.numel()))

    def _loss_is_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the trainer has already divided its loss by the accumulation steps."""
        declared = getattr(self, "loss_is_scaled_for_ga", None)
        if declared is not None:
            return bool(declared)
        accepts = bool(self.model_accepts_loss_kwargs) and num_items_in_batch is not None
        return accepts or self.compute_loss_func is not None


@cache
def with_fsrl(trainer_class: type[TrainerT]) -> type[TrainerT]:
    """A subclass of ``trainer_class`` whose training loss carries the FSRL penalty.

    Args:
        trainer_class: ``transformers.Trainer`` or a trainer of TRL.

    Example:
        ``with_fsrl(CPOTrainer)(model, args=args, peft_config=FSRLConfig(...), ...)``
    """
    if issubclass(trainer_class, FSRLTrainerMixin):
        return trainer_class
    return type(f"FSRL{trainer_class.__name__}", (FSRLTrainerMixin, trainer_class), {})


class _Means:
    """Running weighted means by name."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor | float] = defaultdict(float)
        self._weights: dict[str, float] = defaultdict(float)

    def add(self, name: str, total: Tensor, weight: float) -> None:
        self._totals[name] = self._totals[name] + total
        self._weights[name] += weight

    def pop(self) -> dict[str, float]:
        means = {
            name: float(total) / self._weights[name]
            for name, total in self._totals.items()
            if self._weights[name]
        }
        self._totals.clear()
        self._weights.clear()
        return means


def _keep_non_negative(optimizer: Any, thresholds: list[nn.Parameter]) -> None:
    """Project thresholds to zero or more after every step, where negative ones act as zero."""

    def project(*_: Any) -> None:
        with torch.no_grad():
            for threshold in thresholds:
                threshold.clamp_(min=0)

    if thresholds and hasattr(optimizer, "register_step_post_hook"):
        optimizer.register_step_post_hook(project)


def _split_group(optimizer: Any, parameters: list[nn.Parameter], lr: float, config: Any) -> None:
    wanted = {id(parameter) for parameter in parameters}
    if not wanted:
        return
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in wanted]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    # Decay would pull thresholds to zero, away from sparsity.
    optimizer.add_param_group(
        {"params": parameters, "lr": lr * config.threshold_lr_multiplier, "weight_decay": 0.0}
    )
