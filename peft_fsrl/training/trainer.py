"""The sparsity penalty in any TRL or transformers trainer.

``with_fsrl(CPOTrainer)`` is a subclass of a stock trainer that adds the penalty of the active FSRL
adapters to the training loss, logs what the steering costs, gives thresholds their own learning
rate, and never saves half of an adapter or one that has diverged. It copies nothing of the trainer.
Evaluation is left alone: ``eval_loss`` is the preference loss, comparable with any other method's.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..files import write_text_atomically
from ..steering import ForwardRecord, SteeringMonitor, adapter_configs, base_model, fsrl_layers
from ..tuner.config import COEFFICIENTS
from .card import CARD, keep_section, render_model_card
from .checkpoints import find_checkpoint, mark_complete, replacing_adapter, require_same_run
from .metrics import Means, NonfiniteReport, token_totals
from .penalty import SparsityPenalty, warm_up
from .prefix import without_prefix_graph
from .rollouts import vllm_from, vllm_settings
from .support import (
    WidePrecision,
    reentrant,
    require_real_tokens,
    require_support,
)
from .thresholds import bound_gains, group_thresholds, hold_target_l0

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


class _RunHooks(TrainerCallback):
    """Calls the trainer when training begins, and when it begins anew with smaller batches.

    Keeps gains within their bound after every step.
    """

    def __init__(self, begin: Any) -> None:
        self._begin = begin

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begin()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        bound_gains(kwargs["model"])


class FSRLTrainerMixin(Trainer):
    """Put before a trainer class: ``class MyTrainer(FSRLTrainerMixin, CPOTrainer)``.

    Logs, averaged over the real tokens since the last log and over processes: ``fsrl/l0`` (steered
    features per token), ``fsrl/l1``, ``fsrl/l2`` (norms of the steering vector), ``fsrl/nonfinite``
    (share of tokens with nan or inf, of which it also warns) and ``fsrl/penalty`` (the term that
    was added to the loss); where a schedule moves them also ``fsrl/l1_coeff``,
    ``fsrl/l2_coeff`` and ``fsrl/l0_coeff``. Evaluation returns and logs the first four after its
    own prefix:
    ``eval_fsrl/l0``, ``eval_<name>_fsrl/l0``, ``test_fsrl/l0``.

    Raises:
        ValueError: the model has no FSRL adapter, or the settings would make the penalty wrong.
        RuntimeError: at the first step, the trainer goes past ``compute_loss`` or past the model's
            own forward.
        FloatingPointError: at the step whose loss is nan or inf, before anything is changed by it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        precision = WidePrecision(kwargs.get("model", args[0] if args else None))
        with vllm_from(self, vllm_settings((*args, *kwargs.values()))):
            super().__init__(*args, **kwargs)
        assert isinstance(self.model, nn.Module)
        precision.restore(self.model)
        require_support(self)
        self.add_callback(_RunHooks(self._fsrl_begin))
        self._fsrl_metrics = {"train": Means(), "eval": Means()}
        self._fsrl_nonfinite = NonfiniteReport()
        self._fsrl_evaluated: list[ForwardRecord] | None = None
        self._fsrl_scales: dict[str, float] = {}
        self._fsrl_reached = False

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The trainer's own; resumes only what was written to its end, for the same adapter.

        Raises:
            ValueError: no complete checkpoint, or one of another adapter.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = find_checkpoint(
                str(self.args.output_dir), resume_from_checkpoint
            )
            assert isinstance(self.model, nn.Module)
            require_same_run(self.model, resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _fsrl_begin(self) -> None:
        # The model may be another one than before, and what was counted is of what failed.
        require_support(self)
        self._fsrl_metrics["train"].clear()
        self._fsrl_nonfinite = NonfiniteReport()
        self._fsrl_scales = {}

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The trainer's own, which must come by ``compute_loss`` and give a finite loss."""
        self._fsrl_reached = False
        loss = super().training_step(*args, **kwargs)
        if not self._fsrl_reached:
            raise RuntimeError(
                f"{self._fsrl_trainer_name} computes its loss without `compute_loss`, where the "
                "FSRL penalty is added. Train with one of CPOTrainer, DPOTrainer, KTOTrainer, "
                "ORPOTrainer, SFTTrainer, GRPOTrainer, RLOOTrainer or Trainer, or set l1_coeff=0 "
                "and use the trainer as it is."
            )
        # With a scaler, float16 skips the steps that overflow, and goes on.
        if self.accelerator.scaler is None and not torch.isfinite(loss):
            causes = self._fsrl_nonfinite.describe() or [
                "No token had nan or inf where an adapter steers, so it came into the loss "
                "afterwards: an answer without tokens divides by zero. Look for prompts as long as "
                "max_length with `prepare_preferences`."
            ]
            raise FloatingPointError(
                f"The loss of step {self.state.global_step + 1} is {loss.item()}: training would "
                "continue without learning. The adapter is as the last step left it. "
                f"{' '.join(causes)}"
            )
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The trainer's own loss plus the penalty of the forward passes that it made."""
        self._fsrl_reached = True
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
        cut = nullcontext() if reentrant(self.args) else without_prefix_graph(self.model)
        # The mean over the batches of a step, where there are several; only `train` sets how many.
        share = 2 / (getattr(self, "current_gradient_accumulation_steps", 1) + 1)
        target = hold_target_l0(self.model, monitor, self.accelerator, self.state, share)
        with cut, require_real_tokens(self.model), monitor, target:
            result = super().compute_loss(model, inputs, **call)
        if monitor.missed is not None:
            raise RuntimeError(
                f"{self._fsrl_trainer_name} steered at '{monitor.missed}' without a call of "
                f"{type(base_model(self.model)).__name__}, where the FSRL penalty is measured: it "
                "calls a module inside. Switch that off (a fused or chunked loss), or set "
                "l1_coeff, l2_coeff and l0_coeff to 0 and use the trainer as it is."
            )
        records = [record for record in records if record.training]
        if not records:
            return result
        penalty = self._fsrl_penalize(records)
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
        folder = Path(self.args.output_dir)
        name = model_name or self.hub_model_id or folder.resolve().name
        extra = [tags] if isinstance(tags, str) else list(tags or [])
        self._write_card(folder, name, dataset_name, extra, old=folder)

    def _save(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        folder = str(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return super()._save(folder, *args, **kwargs)
        with replacing_adapter(folder) as staging:
            super()._save(str(staging), *args, **kwargs)
            # PEFT has just written a blank form there.
            self._write_card(staging, Path(folder).resolve().name, None, [], old=Path(folder))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Older checkpoints go when this one is complete, which is after the last process's part.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            run = self._get_output_dir(trial=trial)
            mark_complete(Path(run, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"))
            best = self.state.best_model_checkpoint
            rotate_checkpoints(run, limit, best_model_checkpoint=best, use_mtime=True)

    def _write_card(
        self, folder: Path, name: str, dataset_name: str | None, tags: list[str], old: Path
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
            adapter_id=self.hub_model_id or str(old),
            training={"trainer": self._fsrl_trainer_name, **settings},
            figures={k: v for k, v in last.items() if k.startswith("eval_") and "_per_" not in k},
            dataset_name=dataset_name,
            tags=tags,
        )
        text = keep_section(str(card), old / CARD, folder)
        write_text_atomically(folder / CARD, text)

    @property
    def _fsrl_trainer_name(self) -> str:
        """Of the class that this one extends, however often it was extended since."""
        classes = type(self).__mro__
        return classes[classes.index(FSRLTrainerMixin) + 1].__name__

    def _fsrl_penalize(self, records: list[ForwardRecord]) -> Tensor:
        """The penalty of one batch, before any scaling; counts on the way."""
        assert isinstance(self.model, nn.Module)
        configs = adapter_configs(self.model)
        # Kept for the log, which is written when the step has already been counted.
        self._fsrl_scales = scales = {n: warm_up(c, self.state) for n, c in configs.items()}
        batch_sizes = torch.tensor([float(r.tokens[0].l1.shape[0]) for r in records])
        penalize = SparsityPenalty(self.model)
        terms = torch.stack([penalize(record, scales) for record in records])
        weights = (batch_sizes / batch_sizes.sum()).to(terms)
        penalty = (terms * weights).sum()
        mean = self.accelerator.reduce(penalty.detach(), reduction="mean")
        self._fsrl_metrics["train"].add("penalty", mean, 1.0)
        self._fsrl_metrics["train"].add_tokens(self._fsrl_count(records))
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
            if scale is None or not config.penalty_warmup_ratio:
                continue
            for kind in COEFFICIENTS:
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

    Example:
        ``with_fsrl(CPOTrainer)(model, args=args, peft_config=FSRLConfig(...), ...)``
    """
    if issubclass(trainer_class, FSRLTrainerMixin):
        return trainer_class
    return type(f"FSRL{trainer_class.__name__}", (FSRLTrainerMixin, trainer_class), {})
