"""The SAE of the organism: activations of one decoder layer, SAELens's own trainer, its figures."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from language_model import batches, layer_output
from peft_fsrl.organism.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


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
    """Endless batches `(batch_size, d_in)` of layer outputs at real tokens, BOS left out.

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
    """Trains a BatchTopK SAE and saves it at `path` for inference (a JumpReLU SAE).

    Args:
        model: The trained language model.
        world: Where its texts come from.
        settings: Size and training.
        seed: Fixes the texts; initialization follows the global torch seed.
        path: Directory that SAELens writes.
        model_name: Written into the SAE's metadata.
    """
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    metadata = SAEMetadata(
        model_name=model_name,
        hook_name=f"blocks.{settings.layer}.hook_resid_post",
        prepend_bos=True,
        dataset_path="peft_fsrl.organism.world",
    )
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            k=settings.k,
            d_in=int(model.config.hidden_size),
            d_sae=settings.d_sae,
            normalize_activations="expected_average_only_in",
            metadata=metadata,
        )
    )
    config = SAETrainerConfig(
        total_training_samples=settings.samples,
        train_batch_size_samples=settings.batch_size,
        lr=settings.lr,
        lr_end=settings.lr / 10,
        lr_warm_up_steps=50,
        lr_decay_steps=settings.samples // settings.batch_size // 3,
        dead_feature_window=200,
        feature_sampling_window=500,
        n_batches_for_norm_estimate=8,
        logger=LoggingConfig(log_to_wandb=False),
    )
    stream = activations(model, world, settings.layer, f"sae-train-{seed}", settings.batch_size)
    SAETrainer(cfg=config, sae=sae, data_provider=stream).fit()
    sae.save_inference_model(str(path))


@torch.no_grad()
def measure_dictionary(
    sae: Any, model: PreTrainedModel, world: World, layer: int, seed: int, tokens: int = 65_536
) -> dict[str, float]:
    """Held-out figures of an inference SAE.

    Args:
        sae: Anything with `encode` and `decode` over `(batch, d_in)`.
        model: The language model it was trained on.
        world: Where the texts come from.
        layer: The decoder layer it reads.
        seed: Fixes the held-out texts.
        tokens: How many tokens to measure on, at least.

    Returns:
        `explained_variance` (1 - squared error over variance about the mean), `l0` (mean number of
        active features per token), `dead_share` (features active on none of the tokens).
    """
    error = square = torch.zeros((), dtype=torch.float64)
    total = None
    fired = None
    seen = 0
    for batch in activations(model, world, layer, f"sae-heldout-{seed}", 2048):
        acts = sae.encode(batch)
        error = error + (batch - sae.decode(acts)).double().square().sum()
        square = square + batch.double().square().sum()
        count = (acts > 0).double().sum(0)
        total = batch.double().sum(0) if total is None else total + batch.double().sum(0)
        fired = count if fired is None else fired + count
        seen += len(batch)
        if seen >= tokens:
            break
    assert total is not None
    assert fired is not None
    variance = square - total.square().sum() / seen
    return {
        "explained_variance": float(1 - error / variance),
        "l0": float(fired.sum() / seen),
        "dead_share": float((fired == 0).double().mean()),
        "tokens": float(seen),
    }
