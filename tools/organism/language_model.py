"""The small language model: its texts as batches, its training, its loss against the floor."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from entropy import log_probs
from peft_fsrl.organism.lexicon import ATTRIBUTES, BOS, EOS, PAD, VERDICTS
from peft_fsrl.organism.world import Document, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LanguageModelSettings:
    """Sizes and training of the language model."""

    hidden_size: int = 96
    intermediate_size: int = 256
    layers: int = 4
    heads: int = 4
    steps: int = 1500
    batch_size: int = 64
    muon_lr: float = 0.02
    adam_lr: float = 2e-3
    fact_weight: float = 5.0
    topic_weight: float = 0.1
    quiz_steps: int = 150


def build_model(world: World, settings: LanguageModelSettings) -> PreTrainedModel:
    """A freshly initialized Llama with the world's vocabulary (global torch seed)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    index = {word: i for i, word in enumerate(world.vocabulary())}
    config = LlamaConfig(
        vocab_size=len(index),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=index[BOS],
        eos_token_id=index[EOS],
        pad_token_id=index[PAD],
        use_cache=False,
    )
    model: PreTrainedModel = LlamaForCausalLM(config)
    return model


def encode_documents(world: World, documents: Sequence[Document]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, padded on the right.

    Returns:
        ``input_ids (batch, seq)`` int64 and ``mask (batch, seq)`` bool, True on real tokens.
    """
    index = {word: i for i, word in enumerate(world.vocabulary())}
    length = max(len(document.words) for document in documents)
    ids = torch.full((len(documents), length), index[PAD])
    mask = torch.zeros(len(documents), length, dtype=torch.bool)
    for row, document in enumerate(documents):
        ids[row, : len(document.words)] = torch.tensor([index[w] for w in document.words])
        mask[row, : len(document.words)] = True
    return ids, mask


def batches(
    world: World, seed: str, batch_size: int, quiz_only: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless training batches of the world's texts, fixed by ``seed``."""
    rng = random.Random(seed)

    def draw() -> Document:
        return world.sample_source(rng, "quiz") if quiz_only else world.sample(rng)

    while True:
        yield encode_documents(world, [draw() for _ in range(batch_size)])


def token_losses(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy (nats) of each next token, 0 on padding: ``(batch, seq - 1)``."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    losses = cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return losses.view_as(ids[:, 1:]) * mask[:, 1:]


def token_weights(world: World, settings: LanguageModelSettings) -> Tensor:
    """Loss weight of each vocabulary word as a target: ``(vocab,)``."""
    weights = dict.fromkeys(world.vocabulary(), 1.0)
    for topic in world.topics:
        for word in (*topic.entities, *(relation for relation, _ in topic.relations)):
            weights[word] = settings.topic_weight
        for _, values in topic.relations:
            weights.update(dict.fromkeys(values, settings.fact_weight))
    weights.update(dict.fromkeys(VERDICTS, settings.fact_weight))
    return torch.tensor(list(weights.values()))


def train_language_model(
    model: PreTrainedModel, world: World, settings: LanguageModelSettings, seed: int
) -> None:
    """Train ``model`` in place: Muon on the matrices, AdamW on embeddings and norms."""
    from tqdm.auto import tqdm

    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    chosen = {id(p) for p in inner}
    outer = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(inner, lr=settings.muon_lr, weight_decay=0.0),
        torch.optim.AdamW(outer, lr=settings.adam_lr, weight_decay=0.0),
    ]
    warmup = max(settings.steps // 50, 1)

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / settings.steps))

    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, scale) for o in optimizers]
    model.train()
    stream = batches(world, f"lm-train-{seed}", settings.batch_size)
    quiz = batches(world, f"lm-quiz-{seed}", settings.batch_size, quiz_only=True)
    weights = token_weights(world, settings)
    progress = tqdm(range(settings.steps), desc="language model", mininterval=1.0)
    for step in progress:
        ids, mask = next(quiz if step < settings.quiz_steps else stream)
        weight = weights[ids[:, 1:]] * mask[:, 1:]
        loss = (token_losses(model, ids, mask) * weight).sum() / weight.sum()
        loss.backward()
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


@torch.no_grad()
def rescale_residual(model: PreTrainedModel, ids: Tensor, mask: Tensor, layer: int) -> float:
    """Scales the residual stream so that the output of ``layer`` has mean norm ``sqrt(d_in)``.

    Muon leaves a stream of norm in the hundreds. Every reader of it normalizes, so scaling all its
    writers by one factor changes no prediction (up to the norms' epsilon), and gives features of
    ordinary size for which ordinary learning rates and initial scales are right.

    Returns:
        The factor.
    """
    hidden = layer_output(model, layer, ids, mask)[:, 1:][mask[:, 1:]]
    factor = hidden.shape[-1] ** 0.5 / float(hidden.norm(dim=-1).mean())
    for name, parameter in model.named_parameters():
        if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
            parameter.mul_(factor)
        elif name == "model.norm.weight":
            # The output matrix is the embedding: what it lost, the norm before it makes good.
            parameter.div_(factor)
    return factor


@torch.no_grad()
def layer_output(model: PreTrainedModel, layer: int, ids: Tensor, mask: Tensor) -> Tensor:
    """The output of decoder layer ``layer``, shape ``(batch, seq, d_in)``.

    A hook and not ``output_hidden_states``: the layers above need not run at all, and the last
    entry of that tuple has passed the final norm.
    """
    captured: list[Tensor] = []

    class _Done(Exception):
        pass

    def hook(module: Any, args: Any, output: Any) -> None:
        captured.append(output[0] if isinstance(output, tuple) else output)
        raise _Done

    handle = model.get_submodule(f"model.layers.{layer}").register_forward_hook(hook)
    try:
        model(input_ids=ids, attention_mask=mask)
    except _Done:
        pass
    finally:
        handle.remove()
    return captured[0]


@torch.no_grad()
def measure_language_model(
    model: PreTrainedModel, world: World, seed: int, documents: int = 512
) -> dict[str, dict[str, float]]:
    """Held-out loss against the generator's exact loss on the same texts, in nats.

    Both are means over tokens of ``-log p``. For an attribute they run over its decisions only
    (the choice among synonyms included on both sides); ``first`` is the free first decision,
    ``later`` the ones that earlier decisions predict.

    Returns:
        ``{"all" | "answer" | "<attribute>/first" | "<attribute>/later": {"loss", "floor"}}``.
    """
    rng = random.Random(f"lm-heldout-{seed}")
    texts = [world.sample(rng) for _ in range(documents)]
    sums: dict[str, list[float]] = {}

    def add(name: str, loss: float, floor: float) -> None:
        entry = sums.setdefault(name, [0.0, 0.0, 0.0])
        for i, figure in enumerate((loss, floor, 1.0)):
            entry[i] += figure

    for start in range(0, documents, 64):
        part = texts[start : start + 64]
        losses = token_losses(model, *encode_documents(world, part)).tolist()
        for document, row in zip(part, losses, strict=True):
            names = _token_names(world, document)
            for loss, floor, tags in zip(row, log_probs(world, document), names, strict=False):
                for tag in tags:
                    add(tag, loss, -floor)
    return {name: {"loss": s[0] / s[2], "floor": s[1] / s[2]} for name, s in sorted(sums.items())}


def _token_names(world: World, document: Document) -> list[tuple[str, ...]]:
    """Under which names each word after BOS is counted."""
    if document.kind != "answer":
        claim = [("all",), ("all",), ("all", f"{document.kind}/value"), ("all",)]
        if document.kind == "quiz":
            claim[3] = ("all", "quiz/verdict")
        lead = [("all",)] * (len(document.prompt) - 1)
        return [*lead, *(claim * (len(document.answer) // 4)), ("all",)]
    names: list[tuple[str, ...]] = [("all",)] * (len(document.prompt) - 1)
    seen = dict.fromkeys(ATTRIBUTES, 0)
    for slot in world.template:
        if slot.attribute is None:
            names.append(("all", "answer"))
            continue
        when = "later" if seen[slot.attribute] else "first"
        names.append(("all", "answer", f"{slot.attribute}/{when}"))
        seen[slot.attribute] += 1
    return [*names, ("all", "answer")]
