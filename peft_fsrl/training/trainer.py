"""The sparsity penalty in any TRL or transformers trainer.

``with_fsrl(CPOTrainer)`` is a subclass of a stock trainer that adds the penalty of the active FSRL
adapters to the training loss, logs what the steering costs, and gives thresholds their own learning
rate. It copies nothing of the trainer. Evaluation is left alone: ``eval_loss`` is the preference
loss, comparable with any other method's.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..steering import ForwardRecord, SteeringMonitor, adapter_configs, base_model, fsrl_layers
from .card import render_model_card
from .card_section import keep_section
from .metrics import Means, token_totals
from .nonfinite import NonfiniteReport
from .penalty import SparsityPenalty
from .prefix import without_prefix_graph
from .resume import find_checkpoint
from .schedule import PenaltySchedule
from .support import require_compute_loss, require_support
from .thresholds import group_thresholds

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


class FSRLTrainerMixin(Trainer):
    """Put before a trainer class: ``class MyTrainer(FSRLTrainerMixin, CPOTrainer)``.

    Logs, averaged over the real tokens since the last log and over processes: ``fsrl/l0`` (steered
    features per token), ``fsrl/l1``, ``fsrl/l2`` (norms of the steering vector), ``fsrl/nonfinite``
    (share of tokens with nan or inf, of which it also warns) and ``fsrl/penalty`` (the term that
    was added to the loss); where a schedule moves them also ``fsrl/l1_coeff`` and
    ``fsrl/l0_coeff``. Evaluation returns and logs the first four after its own prefix:
    ``eval_fsrl/l0``, ``eval_<name>_fsrl/l0``, ``test_fsrl/l0``.

    Raises:
        ValueError: the model has no FSRL adapter, or the settings would make the penalty wrong.
        RuntimeError: at the first step, the trainer goes past the model's own forward.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        require_support(self)
        assert isinstance(self.model, nn.Module)
        self.fsrl_penalty = SparsityPenalty(self.model)
        self.add_callback(PenaltySchedule())
        self._fsrl_metrics = {"train": Means(), "eval": Means()}
        self._fsrl_nonfinite = NonfiniteReport()
        self._fsrl_evaluated: list[ForwardRecord] | None = None
        self._fsrl_scales: dict[str, float] = {}

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The trainer's own, but ``True`` passes over a checkpoint that was not finished."""
        if resume_from_checkpoint:
            resume_from_checkpoint = find_checkpoint(
                str(self.args.output_dir), resume_from_checkpoint
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The trainer's own loss plus the penalty of the forward passes that it made."""
        call = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        if self._fsrl_evaluated is not None:
            # What came before in this evaluation step, such as sampling, is not what is evaluated.
            self._fsrl_evaluated.clear()
            return super().compute_loss(model, inputs, **call)
        assert isinstance(self.model, nn.Module)
        records: list[ForwardRecord] = []
        # Attached for this call only: other forward passes (generation, a later trainer of the same
        # model) are none of this trainer's business.
        monitor = SteeringMonitor(self.model, records.append)
        with without_prefix_graph(self.model), monitor:
            result = super().compute_loss(model, inputs, **call)
        if monitor.missed is not None:
            raise RuntimeError(
                f"{type(self).__mro__[2].__name__} steered at '{monitor.missed}' without a call of "
                f"{type(base_model(self.model)).__name__}, where the FSRL penalty is measured: it "
                "calls a module inside. Switch off what does so (a fused or chunked loss), or set "
                "l1_coeff=0 and l0_coeff=0 and use the trainer as it is."
            )
        records = [record for record in records if record.training]
        if not records:
            return result
        penalty = self._fsrl_penalise(records)
        if self._loss_is_scaled(num_items_in_batch):
            penalty = penalty / self.current_gradient_accumulation_steps
        if return_outputs:
            loss, outputs = result
            return loss + penalty.to(loss.device), outputs
        return result + penalty.to(result.device)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own evaluation of a batch, whose steering is measured."""
        assert isinstance(self.model, nn.Module)
        records: list[ForwardRecord] = []
        self._fsrl_evaluated = records
        try:
            with SteeringMonitor(self.model, records.append):
                result = super().prediction_step(*args, **kwargs)
        finally:
            self._fsrl_evaluated = None
        self._fsrl_metrics["eval"].add_tokens(self._fsrl_count(records))
        return result

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The trainer's own evaluation, with what steering costs on the same data."""
        self._fsrl_metrics["eval"].pop("")
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        means = self._fsrl_metrics["eval"].pop(f"{metric_key_prefix}_fsrl/")
        if output.metrics is not None:
            output.metrics.update(means)
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the steering metrics before the trainer hands its logs to the reporters."""
        self._fsrl_nonfinite.warn()
        if "loss" in logs:
            logs.update(self._fsrl_metrics["train"].pop("fsrl/"))
            logs.update(self._fsrl_coefficients())
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's optimizer, with the thresholds in a group of their own."""
        own = self.optimizer is None
        made_here = getattr(self, "_created_lr_scheduler", False)
        scheduled = not own and self.lr_scheduler is not None and not made_here
        optimizer = super().create_optimizer(*args, **kwargs)
        assert isinstance(self.model, nn.Module)
        group_thresholds(optimizer, self.model, own=own, scheduled=scheduled)
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
        if not self.args.should_save:
            return
        # PEFT has just written a blank form there.
        directory = str(output_dir or self.args.output_dir)
        self._write_card(directory, os.path.basename(os.path.abspath(directory)), None, [])

    def _save_rng_state(self, *args: Any, **kwargs: Any) -> None:
        super()._save_rng_state(*args, **kwargs)
        # What follows, the trainer's state, says that the checkpoint is complete.
        self.accelerator.wait_for_everyone()

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
        card.content = keep_section(card.content, directory)
        card.save(os.path.join(directory, "README.md"))

    @property
    def _fsrl_schedule(self) -> PenaltySchedule:
        # Looked up, because the trainer can replace its callbacks when it resumes.
        callbacks = self.callback_handler.callbacks
        return next(each for each in callbacks if isinstance(each, PenaltySchedule))

    def _fsrl_penalise(self, records: list[ForwardRecord]) -> Tensor:
        """The penalty of one batch, before any scaling; counts and schedules it on the way."""
        assert isinstance(self.model, nn.Module)
        schedule, configs = self._fsrl_schedule, adapter_configs(self.model)
        # Kept for the log, which is written when the schedule has already moved on.
        self._fsrl_scales = scales = {
            name: schedule.scale(name, config, self.state) for name, config in configs.items()
        }
        batch_sizes = torch.tensor([float(r.tokens[0].l1.shape[0]) for r in records])
        terms = torch.stack([self.fsrl_penalty(record, scales) for record in records])
        weights = (batch_sizes / batch_sizes.sum()).to(terms)
        penalty = (terms * weights).sum()
        mean = self.accelerator.reduce(penalty.detach(), reduction="mean")
        self._fsrl_metrics["train"].add("penalty", mean, 1.0)
        totals = self._fsrl_count(records)
        self._fsrl_metrics["train"].add_tokens(totals)
        for name, row in totals.items():
            schedule.observe(name, row[0], row[-1])
        return penalty

    def _fsrl_count(self, records: list[ForwardRecord]) -> dict[str, Tensor]:
        """Totals over tokens by active adapter, summed over processes."""
        for record in records:
            self._fsrl_nonfinite.add(record)
        assert isinstance(self.model, nn.Module)
        layers = fsrl_layers(self.model).values()
        active = {name for layer in layers for name in layer.active_adapters}
        totals = token_totals(records, active)
        return {
            name: self.accelerator.reduce(totals[name], reduction="sum") for name in sorted(totals)
        }

    def _fsrl_coefficients(self) -> dict[str, float]:
        """The coefficients in force, where they are not the config's own."""
        assert isinstance(self.model, nn.Module)
        found = {}
        for name, config in adapter_configs(self.model).items():
            scale = self._fsrl_scales.get(name)
            if scale is None or (config.target_l0 is None and not config.penalty_warmup_ratio):
                continue
            for kind in ("l1_coeff", "l0_coeff"):
                if getattr(config, kind):
                    found[f"fsrl/{kind}"] = scale * getattr(config, kind)
        return found

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

    Raises:
        TypeError: for a trainer that makes its loss without ``compute_loss``.

    Example:
        ``with_fsrl(CPOTrainer)(model, args=args, peft_config=FSRLConfig(...), ...)``
    """
    if issubclass(trainer_class, FSRLTrainerMixin):
        return trainer_class
    require_compute_loss(trainer_class)
    return type(f"FSRL{trainer_class.__name__}", (FSRLTrainerMixin, trainer_class), {})
