"""Tiny models as vLLM can run them, and what transformers says they should say."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftModel
from torch import Tensor

from helpers import VOCABULARY, fsrl_model, tiny_model, tiny_sae, tiny_tokenizer
from peft_fsrl.steering import edit_steering

WIDTH, D_SAE = 64, 96
# Heads as wide as the narrowest that vLLM's attention on CPUs has.
_WIDE = {"hidden_size": WIDTH, "intermediate_size": 96, "num_attention_heads": 2}
_WIDE |= {"num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256}
_GPT = {"n_embd": WIDTH, "n_head": 2, "n_positions": 256}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": _WIDE,
    "qwen2": _WIDE,
    "qwen3": _WIDE,
    # Its soft cap is an approximation in vLLM's attention on CPUs, off by 1e-3 without an adapter.
    "gemma2": {
        **_WIDE,
        "sliding_window": 8,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": None,
    },
    "gemma3": {**_WIDE, "sliding_window": 8, "query_pre_attn_scalar": 32},
    "gpt2": _GPT,
}
HOOKS = {
    "resid_post": "blocks.1.hook_resid_post",
    "mlp_out": "blocks.1.hook_mlp_out",
    "attn_out": "blocks.1.hook_attn_out",
    "z": "blocks.1.attn.hook_z",
}
N_TOKENS = 10


def save_model(folder: Path, family: str = "llama", **settings: Any) -> Path:
    """A tiny model with sharp opinions, and its tokenizer."""
    model = tiny_model(family, **{**SETTINGS[family], **settings})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.12)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(folder: Path, model: Path, hook: str = "resid_post", **settings: Any) -> Path:
    """An adapter that steers visibly, and promotes and suppresses."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model)
    seed = settings.pop("seed", 0)
    sae = tiny_sae(
        "jumprelu",
        d_in=WIDTH,
        d_sae=D_SAE,
        seed=seed,
        metadata={"hook_name": HOOKS[hook]},
    )
    settings.setdefault("layer", 1)
    torch.manual_seed(seed)
    fsrl_model(base, sae=sae, **settings).save_pretrained(str(folder))
    return folder


def load_reference(model: Path, adapter: Path) -> PeftModel:
    """The steered model as transformers runs it."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter).eval()


def prompts(n: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    """Prompts of unequal lengths, some of which begin alike."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randint(3, VOCABULARY, (longest,), generator=generator).tolist()
    found = []
    for index in range(n):
        length = int(torch.randint(1, longest, (1,), generator=generator))
        own = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        found.append((shared[: 24 if index % 3 == 0 else 0] + own)[:longest])
    return found


@torch.no_grad()
def say(
    model: PeftModel,
    prompt: Sequence[int],
    *,
    strength: float = 1.0,
    ablated: Sequence[int] = (),
    phase: str = "all",
    n_tokens: int = N_TOKENS,
) -> tuple[list[int], Tensor]:
    """Greedy tokens, one whole forward pass for each, and their log-probabilities by position.

    Without a cache and without the package's own way of doing any of this: a loop, and masks.
    """
    tokens = list(prompt)

    def edit(v: Tensor, sae: Any) -> Tensor:
        v = v * strength
        v[..., list(ablated)] = 0
        positions = torch.arange(v.shape[1])
        kept = {
            "all": positions >= 0,
            "prompt": positions < len(prompt),
            "generation": positions >= len(prompt),
        }[phase]
        return v * kept[None, :, None]

    with ExitStack() as stack:
        if strength == 0:
            stack.enter_context(model.disable_adapter())
        else:
            stack.enter_context(edit_steering(model, edit))
        for _ in range(n_tokens):
            logits = model(input_ids=torch.tensor([tokens])).logits[0]
            tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :], logits.log_softmax(-1)[len(prompt) - 1 :]


@contextmanager
def engine(model: Path, adapter: str | Path | None, **options: Any) -> Iterator[Any]:
    """A vLLM engine in this process, with adapters if any are given."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "PEFT_FSRL_ADAPTER": "" if adapter is None else str(adapter),
        "PEFT_FSRL_LABELS": str(options.pop("labels", "")),
    }
    settings = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True}
    settings |= {"kv_cache_memory_bytes": 2**26, **options}
    with patch.dict(os.environ, env):
        llm = LLM(model=str(model), **settings)
        try:
            # An older install of the package in the way would leave the plugin out.
            assert bool(adapter) == ("peft_fsrl" in llm.llm_engine.vllm_config.additional_config)
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()


def ask(llm: Any, asked: Sequence[Sequence[int]], *extra: dict[str, Any], **options: Any) -> Any:
    """Greedy answers, all in one batch; with one ``extra_args`` for each, or one for all."""
    from vllm import SamplingParams

    settings = {"temperature": 0, "max_tokens": N_TOKENS, "logprobs": 3, "ignore_eos": True}
    args = extra if len(extra) > 1 else (extra or ({},)) * len(asked)
    params = [SamplingParams(**{**settings, **options}, extra_args=dict(each)) for each in args]
    return llm.generate([{"prompt_token_ids": list(p)} for p in asked], params, use_tqdm=False)


def difference(output: Any, logprobs: Tensor) -> float:
    """The largest between the log-probabilities of an answer of vLLM and others."""
    [answer] = output.outputs
    return max(
        abs(value.logprob - float(row[token]))
        for row, found in zip(logprobs, answer.logprobs, strict=True)
        for token, value in found.items()
    )


def assert_says(output: Any, expected: tuple[list[int], Tensor], tolerance: float = 1e-4) -> None:
    """An answer of vLLM has the tokens and the log-probabilities that are expected."""
    tokens, logprobs = expected
    assert list(output.outputs[0].token_ids) == tokens
    assert difference(output, logprobs) < tolerance


def train(name: str, folder: Path, out: Path, **settings: Any) -> tuple[Any, list[list[int]]]:
    """Two steps; the trainer, and what it was told to reward, in order."""
    # Not at the top: TRL warns there of every vLLM that it does not know.
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from peft_fsrl.training.trainer import with_fsrl

    trainer_class, config_class = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    rollouts: list[list[int]] = []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        rollouts.extend(list(ids) for ids in completion_ids)
        # Answers to one prompt are all alike where they are greedy, and no reason to learn.
        return [float(row % 2) for row in range(len(completion_ids))]

    args = config_class(
        str(out),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        learning_rate=0.5,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        beta=0.0,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        **settings,
    )
    words = [" ".join(f"w{token}" for token in prompt) for prompt in prompts(8, longest=12)]
    trainer = with_fsrl(trainer_class)(
        model=model,
        args=args,
        reward_funcs=reward,
        train_dataset=Dataset.from_dict({"prompt": words}),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    trainer.train()
    return trainer, rollouts
