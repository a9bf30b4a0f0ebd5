"""Coherence of what a model says, logged beside the loss of every evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import Trainer, TrainerCallback

from .analysis.coherence import compute_coherence


class CoherenceCallback(TrainerCallback):
    """Samples answers at every evaluation and logs ``eval_coherence/...`` right after its row.

    A lower preference loss alone can mean nonsense. What is logged is
    ``peft_fsrl.analysis.Coherence``, field by field: the perplexity of the answers under the base
    model, their repetition, distinct-1 and distinct-2, their mean length and the share that ended;
    and, constant over a run, ``perplexity_unsteered``: that of the base model's own answers.

    The figures go the way of every log, to ``state.log_history`` and the reporters, at the same
    step as ``eval_loss``; and into the metrics that ``evaluate`` returns, so that
    ``metric_for_best_model`` may name one. Training is not disturbed: the state of the random
    generators is put back. Each process computes all of it, so that no process waits for another
    where parameters are sharded.

    Args:
        trainer: the trainer that this callback is added to.
        prompts: texts, from held-out data; see ``peft_fsrl.data.prompt_texts``.
        max_new_tokens: length limit of an answer.
        seed: seed of the sampling, the same at every evaluation.

    Raises:
        ValueError: for no prompt.

    Example:
        ``trainer.add_callback(CoherenceCallback(trainer, prompts))``
    """

    def __init__(
        self, trainer: Trainer, prompts: Sequence[str], max_new_tokens: int = 48, seed: int = 0
    ) -> None:
        if not prompts:
            raise ValueError("Expected at least one held-out prompt, got none.")
        self._trainer = trainer
        self._prompts = list(prompts)
        self._max_new_tokens = max_new_tokens
        self._seed = seed
        self._unsteered: float | None = None

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Sample, measure, log."""
        settings: dict[str, Any] = {
            "max_new_tokens": self._max_new_tokens,
            "seed": self._seed,
            "batch_size": args.per_device_eval_batch_size,
        }
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        inputs = (model, self._prompts, self._trainer.processing_class)
        with self._trainer.compute_loss_context_manager():
            if self._unsteered is None:
                self._unsteered = compute_coherence(*inputs, steered=False, **settings).perplexity
            figures = asdict(compute_coherence(*inputs, **settings))
        del figures["n"]
        figures["perplexity_unsteered"] = self._unsteered
        named = {f"eval_coherence/{name}": value for name, value in figures.items()}
        if metrics is not None:
            metrics.update(named)
        # As a row of its own, because reporters have had the evaluation's already.
        self._trainer.log(dict(named))
