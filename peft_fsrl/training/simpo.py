"""SimPO (Meng et al., arXiv 2405.14734), with or without TRL's experimental trainers.

``SimPOConfig`` and ``SimPOTrainer`` are TRL's ``CPOConfig`` with the settings of SimPO and its
``CPOTrainer``, where TRL has them, and otherwise ``StableSimPOConfig`` and ``StableSimPOTrainer``,
which need nothing of TRL but its ``DPOTrainer``. On the same tokens both train alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from datasets import IterableDataset
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import data
from trl import DPOConfig, DPOTrainer

from .objectives import simpo_loss

try:
    from trl.experimental.cpo import CPOConfig, CPOTrainer
except ImportError:
    CPOConfig, CPOTrainer = None, None

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["SimPOConfig", "SimPOTrainer", "StableSimPOConfig", "StableSimPOTrainer"]

# The reference policy's adapter, which DPOTrainer copies and SimPO has no use for.
_REFERENCE = "ref"


def answer_log_probs(
    logits: Float[Tensor, "batch seq vocabulary"], labels: Int[Tensor, "batch seq"]
) -> tuple[Float[Tensor, "batch"], Int[Tensor, "batch"]]:
    """Sum of each answer's token log-probabilities, and its length.

    Args:
        logits: shape ``(batch, seq, vocabulary)``.
        labels: token ids, -100 where a token is not part of the answer, shape ``(batch, seq)``.
    """
    targets = labels[:, 1:]
    negative = F.cross_entropy(
        logits[:, :-1].transpose(1, 2), targets, ignore_index=-100, reduction="none"
    )
    return -negative.sum(dim=1), (targets != -100).sum(dim=1)


@dataclass
class StableSimPOConfig(DPOConfig):
    """``DPOConfig`` with SimPO's margin; what concerns a reference model has no effect.

    Args:
        loss_type: ``"simpo"``.
        beta: scale of the reward.
        simpo_gamma: target margin, in units of the reward; the papers speak of ``gamma / beta``.
        cpo_alpha: weight of the chosen answers' negative log-likelihood (CPO-SimPO).
    """

    # A list, as in DPOConfig, which makes one of a string.
    loss_type: list[str] = field(
        default_factory=lambda: ["simpo"], metadata={"help": "Must be 'simpo'."}
    )
    beta: float = field(default=10.0, metadata={"help": "Scale of the reward."})
    simpo_gamma: float = field(default=5.0, metadata={"help": "Target margin of the reward."})
    cpo_alpha: float = field(
        default=0.0, metadata={"help": "Weight of the chosen answers' likelihood."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type != ["simpo"]:
            raise ValueError(
                f"`loss_type` must be 'simpo', got {', '.join(self.loss_type)}. Other losses need "
                "TRL's CPOTrainer or DPOTrainer."
            )


class StableSimPOTrainer(DPOTrainer):
    """SimPO with the data, collator and logs of TRL's ``DPOTrainer``, and without a reference."""

    _name = "SimPO"
    _tag_names = ("trl", "simpo")

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        had_reference = _REFERENCE in getattr(model, "peft_config", {})
        super().__init__(model, *args, **kwargs)
        if not had_reference and _REFERENCE in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter(_REFERENCE)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """``simpo_loss`` of a batch whose first half is preferred to its second."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        passed = {key: value for key, value in inputs.items() if key != "completion_mask"}
        outputs = model(**passed, use_cache=False)
        totals, lengths = answer_log_probs(outputs.logits, labels.to(outputs.logits.device))
        chosen, rejected = (totals / lengths).chunk(2)
        margin = self.beta * (chosen - rejected)
        loss = simpo_loss(margin, self.args.simpo_gamma, self.args.label_smoothing).mean()
        if self.args.cpo_alpha:
            likelihood = totals.chunk(2)[0].sum() / lengths.chunk(2)[0].sum()
            loss = loss - self.args.cpo_alpha * likelihood
        self._store(chosen.detach(), rejected.detach())
        return (loss, outputs) if return_outputs else loss

    def _store(self, chosen: Tensor, rejected: Tensor) -> None:
        values = {
            "rewards/chosen": self.beta * chosen,
            "rewards/rejected": self.beta * rejected,
            "rewards/margins": self.beta * (chosen - rejected),
            "rewards/accuracies": (chosen > rejected).to(torch.float32),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in values.items():
            metrics[name].append(self.accelerator.gather_for_metrics(value).mean().item())


class _Stream(data.IterableDataset[Any]):
    """A stream for ``CPOTrainer``, which tells ``map`` a number of processes as for a table."""

    def __init__(self, rows: IterableDataset) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)

    def map(self, *args: Any, num_proc: int | None = None, **kwargs: Any) -> _Stream:
        return _Stream(self._rows.map(*args, **kwargs))

    def set_epoch(self, epoch: int) -> None:
        self._rows.set_epoch(epoch)


if CPOTrainer is None:
    SimPOConfig: Any = StableSimPOConfig
    SimPOTrainer: Any = StableSimPOTrainer
else:

    @dataclass
    class SimPOConfig(CPOConfig):  # type: ignore[no-redef]
        """``CPOConfig`` whose defaults are SimPO's, with the paper's scale and margin."""

        loss_type: str = field(default="simpo", metadata={"help": "Type of loss to use."})
        beta: float = field(default=10.0, metadata={"help": "Scale of the reward."})
        simpo_gamma: float = field(default=5.0, metadata={"help": "Target margin of the reward."})
        cpo_alpha: float = field(
            default=0.0, metadata={"help": "Weight of the chosen answers' likelihood."}
        )

    class SimPOTrainer(CPOTrainer):  # type: ignore[no-redef]
        """``CPOTrainer``, which takes streams too."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            for name in ("train_dataset", "eval_dataset"):
                if isinstance(kwargs.get(name), IterableDataset):
                    kwargs[name] = _Stream(kwargs[name])
            super().__init__(*args, **kwargs)
