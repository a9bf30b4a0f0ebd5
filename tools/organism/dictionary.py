"""The SAE of the organism: activations of one decoder layer, SAELens's own trainer, its figures."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from language_model import batches, layer_output
from peft_fsrl.organism.world import World

if TYPE_CHECKING:
    from sae_lens.training.sae_trainer import SAETrainer
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# From which SAELens estimates the scale of the activations, before the first step.
NORM_BATCHES = 8


@dataclass(frozen=True)
class DictionarySettings:
    """Size and training of the SAE."""

    layer: int = 2
    d_sae: int = 384
    k: float = 12.0
    samples: int = 2_000_000
    batch_size: int = 2048
    lr: float = 2e-3


def activations(
    model: PreTrainedModel, world: World, layer: int, seed: str, batch_size: int
) -> Iterator[Tensor]:
    """Endless batches ``(batch_size, d_in)`` of layer outputs at real tokens, BOS left out.

    The norm at BOS is an outlier that would dominate the reconstruction loss. Tokens of some 100
    texts are mixed within one batch.
    """
    kept: list[Tensor] = []
    count = 0
    for ids, mask in batches(world, seed, 128):
        hidden = layer_output(model, layer, ids, mask)
        kept.append(hidden[:, 1:][mask[:, 1:]])
        count += len(kept[-1])
        if count >= 4 * batch_size:
            pool = torch.cat(kept)
            pool = pool[torch.randperm(len(pool))]
            whole = len(pool) // batch_size
            yield from pool[: whole * batch_size].split(batch_size)
            kept = [pool[whole * batch_size :]]
            count = len(kept[0])


def train_dictionary(
    model: PreTrainedModel,
    world: World,
    settings: DictionarySettings,
    seed: int,
    path: Path,
    model_name: str,
) -> None:
    """Train a BatchTopK SAE and saves it at ``path`` for inference (a JumpReLU SAE).

    Args:
        model: the trained language model.
        world: where its texts come from.
        settings: size and training.
        seed: fixes the texts; initialization follows the global torch seed.
        path: directory that SAELens writes.
        model_name: written into the SAE's metadata.
    """
    metadata = {
        "model_name": model_name,
        "hook_name": f"blocks.{settings.layer}.hook_resid_post",
        "prepend_bos": True,
        "dataset_path": "peft_fsrl.organism.world",
    }
    trainer = build_trainer(int(model.config.hidden_size), settings, metadata)
    trainer.data_provider = activations(
        model, world, settings.layer, f"sae-train-{seed}", settings.batch_size
    )
    trainer.fit().save_inference_model(str(path))


def build_trainer(
    d_in: int, settings: DictionarySettings, metadata: dict[str, Any], **options: Any
) -> SAETrainer[Any, Any]:
    """SAELens's trainer of a BatchTopK SAE, whose ``data_provider`` the caller sets.

    Args:
        d_in: width of the activations.
        settings: size and training.
        metadata: written into the SAE's config.
        options: of ``SAETrainerConfig``, besides those that follow from ``settings``.
    """
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    steps = settings.samples // settings.batch_size
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            k=settings.k,
            # The threshold moves from zero by this share of the rest at each step. At SAELens's
            # 0.01, a run of 60 steps would end half way, with far more than k features active.
            topk_threshold_lr=max(0.01, 5 / steps),
            d_in=d_in,
            d_sae=settings.d_sae,
            normalize_activations="expected_average_only_in",
            metadata=SAEMetadata(**metadata),
        )
    )
    config = SAETrainerConfig(
        total_training_samples=settings.samples,
        train_batch_size_samples=settings.batch_size,
        lr=settings.lr,
        lr_end=settings.lr / 10,
        lr_warm_up_steps=min(50, steps // 4),
        lr_decay_steps=steps // 3,
        dead_feature_window=200,
        feature_sampling_window=500,
        n_batches_for_norm_estimate=NORM_BATCHES,
        logger=LoggingConfig(log_to_wandb=False),
        **options,
    )
    return SAETrainer(cfg=config, sae=sae, data_provider=iter(()))


@torch.no_grad()
def measure_dictionary(sae: Any, batches: Iterable[Tensor]) -> dict[str, float]:
    """Held-out figures of an inference SAE.

    Args:
        sae: anything with ``encode`` and ``decode`` over ``(batch, d_in)``.
        batches: activations it was not trained on, ``(batch, d_in)`` each.

    Returns:
        ``explained_variance`` (1 - squared error over variance about the mean), ``l0`` (mean number
        of active features per token), ``dead_share`` (features never active), ``tokens``.
    """
    error = square = torch.zeros((), dtype=torch.float64)
    total = None
    fired = None
    seen = 0
    for batch in batches:
        acts = sae.encode(batch)
        error = error + (batch - sae.decode(acts)).double().square().sum()
        square = square + batch.double().square().sum()
        count = (acts > 0).double().sum(0)
        total = batch.double().sum(0) if total is None else total + batch.double().sum(0)
        fired = count if fired is None else fired + count
        seen += len(batch)
    assert total is not None
    assert fired is not None
    variance = square - total.square().sum() / seen
    return {
        "explained_variance": float(1 - error / variance),
        "l0": float(fired.sum() / seen),
        "dead_share": float((fired == 0).double().mean()),
        "tokens": float(seen),
    }
