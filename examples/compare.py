r"""FSRL against what else could be trained: same data, same steps, same figures, one table.

    python examples/compare.py

compares, on the model organism: FSRL; FSRL with a random dictionary in place of the SAE; LoRA with
as many parameters; LoRA at FSRL's layer alone, of the rank that FSRL has there; full fine-tuning;
and, without training, one steering vector for all tokens (the difference of the mean activations of
chosen and rejected answers) and the same among the SAE's features. With SimPO and with DPO. Another
model, and data in any of TRL's preference formats:

    python examples/compare.py --model google/gemma-2-2b-it --layer 12 \
        --sae gemma-scope-2b-pt-res/layer_12/width_65k/average_l0_72 --dataset ... --dtype bfloat16

Every trained method has its own learning rate. Of a grid, tried by the objective on validation
pairs after short runs, it is the smallest within a standard error of the best; where that stands
at the edge, the grid grows. The scale of the two vectors is chosen in the same way on training
pairs. Rows are written as they come: started again, the comparison goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import DPOConfig, DPOTrainer

from peft_fsrl import FSRLConfig, load_sae, organism, with_fsrl
from peft_fsrl.analysis import Session, compute_divergence, compute_usage
from peft_fsrl.files import write_text_atomically
from peft_fsrl.records import Record
from peft_fsrl.steering import edit_steering, observe
from peft_fsrl.training.coherence import measure_answers
from peft_fsrl.training.data import pair_texts, prepare_preferences
from peft_fsrl.training.likelihood import mean_log_probability, pad
from peft_fsrl.training.objectives import simpo_loss
from peft_fsrl.training.sampling import sample_answers
from peft_fsrl.training.simpo import SimPOConfig, SimPOTrainer
from peft_fsrl.tuner.placement import decoder_layers

BETA = {"simpo": 10.0, "dpo": 0.1}
GAMMA = 5.0
# A step of the grid, and how often it may grow.
FACTOR, GROWTH = 10**0.5, 3
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


@dataclass(frozen=True)
class Row(Record):
    """One method under one objective; figures of held-out pairs and of answers sampled.

    Attributes:
        objective: ``"simpo"`` or ``"dpo"``.
        method: its name.
        parameters: that were trained, or estimated.
        setting: its learning rate or scale, and how the method was set up.
        loss: the objective, without any penalty.
        accuracy: share of pairs ranked right by the objective's reward; ties count half.
        margin: mean margin of that reward.
        l0: features steered per answer token.
        kl: ``KL(model || base)`` per answer token, in nats.
        perplexity: of its own answers under the base model.
        repetition: see ``Coherence``.
        length: tokens per answer.
        seconds: of training or estimating, without any search.
        search: what was tried: learning rate or scale, and the objective then.
    """

    objective: str
    method: str
    parameters: int
    setting: str
    loss: float
    accuracy: float
    margin: float
    l0: float | None
    kl: float
    perplexity: float
    repetition: float
    length: float
    seconds: float
    search: str


class Bench:
    """Model, data and figures that all methods share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        name = args.model
        if name == "organism":
            creature = organism.load()
            name, self.sae = str(creature.model_path), args.sae or str(creature.sae_path)
            self.layer = creature.layer if args.layer is None else args.layer
        else:
            self.sae, self.layer = args.sae, args.layer
        self._name = name
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.base = self.load_base()
        self.train, self.valid, self.test = self._load_data()

    def load_base(self) -> Any:
        """A fresh base model."""
        model = AutoModelForCausalLM.from_pretrained(self._name, dtype=self.args.dtype)
        return model.to(self.args.device).eval()

    def _load_data(self) -> tuple[Dataset, list[Any], list[Any]]:
        args = self.args
        if args.dataset == "organism":
            splits = [
                organism.preferences(n, seed=f"{name}-{args.seed}")
                for name, n in (
                    ("train", args.train_pairs),
                    ("valid", args.valid_pairs),
                    ("test", args.test_pairs),
                )
            ]
        else:
            train = load_dataset(args.dataset, split=args.train_split).shuffle(args.seed)
            n = args.valid_pairs
            test = load_dataset(args.dataset, split=args.test_split)
            splits = [
                train.select(range(n, min(n + args.train_pairs, len(train)))),
                train.select(range(n)),
                test.select(range(min(args.test_pairs, len(test)))),
            ]
        rows = []
        for split in splits:
            prepared = prepare_preferences(
                split, self.tokenizer, max_length=args.max_length, unusable="drop"
            )
            rows.append(pair_texts(prepared.dataset, self.tokenizer))
        return Dataset.from_list(rows[0]), rows[1], rows[2]

    def margins(self, model: nn.Module, rows: Sequence[Any], objective: str) -> Tensor:
        """Margin of the objective's reward for each pair, shape ``(pairs,)``."""
        found = []
        session = Session(model, self.tokenizer, rows, batch_size=self.args.eval_batch_size)
        with torch.no_grad():
            for texts in session.batches("margins"):
                padded = pad(texts, self.base.device)
                rewards = mean_log_probability(model.eval(), padded)
                if objective == "dpo":
                    rewards = rewards - mean_log_probability(self.base, padded)
                    rewards = rewards * padded.answer_mask.sum(dim=1)
                chosen, rejected = (BETA[objective] * rewards).float().cpu().chunk(2)
                found.append(chosen - rejected)
        return torch.cat(found)

    def losses(self, margins: Tensor, objective: str) -> Tensor:
        """The objective of each pair, shape ``(pairs,)``."""
        # DPO is SimPO's loss without a target margin, on another reward.
        return simpo_loss(margins, GAMMA if objective == "simpo" else 0.0)

    def measure(self, model: nn.Module, objective: str, **known: Any) -> Row:
        """All figures of a model as it is now."""
        args, margins = self.args, self.margins(model, self.test, objective)
        prompts = [row["prompt"] for row in self.test[: args.prompts]]
        answers = sample_answers(
            model, prompts, self.tokenizer, max_new_tokens=args.new_tokens, seed=args.seed
        )
        coherence = measure_answers(self.base, answers)
        return Row(
            objective=objective,
            loss=self.losses(margins, objective).mean().item(),
            accuracy=((margins > 0).float() + (margins == 0).float() / 2).mean().item(),
            margin=margins.mean().item(),
            kl=compute_divergence(Session(model, self.tokenizer, self.test), self.base),
            perplexity=coherence.perplexity,
            repetition=coherence.repetition,
            length=coherence.mean_length,
            **known,
        )

    def fit(self, peft_config: Any, objective: str, rate: float, steps: int) -> nn.Module:
        """Train a fresh base model, whole where there is no adapter."""
        args = self.args
        n_pairs = steps * args.batch_size * args.accumulation
        settings = {
            "output_dir": str(args.out / "trainer"),
            "beta": BETA[objective],
            "max_length": args.max_length,
            "learning_rate": rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": min(10, steps // 10),
            "max_steps": steps,
            "per_device_train_batch_size": args.batch_size,
            "gradient_accumulation_steps": args.accumulation,
            "gradient_checkpointing": False,
            "bf16": False,
            "seed": args.seed,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_strategy": "no",
            "remove_unused_columns": False,
            "use_cpu": args.device == "cpu",
        }
        if objective == "simpo":
            kind, config = SimPOTrainer, SimPOConfig(**settings, simpo_gamma=GAMMA)
        else:
            kind, config = DPOTrainer, DPOConfig(**settings)
        if isinstance(peft_config, FSRLConfig):
            kind = with_fsrl(kind)
        more = {"ref_model": self.load_base()} if objective == "dpo" and peft_config is None else {}
        trainer = kind(
            model=self.load_base(),
            args=config,
            train_dataset=self.train.select(range(min(n_pairs, len(self.train)))),
            processing_class=self.tokenizer,
            peft_config=peft_config,
            **more,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer.model


def search(
    grid: Sequence[float], try_one: Callable[[float], Tensor], growth: int = GROWTH
) -> dict[float, Tensor]:
    """Losses of each pair by learning rate or scale; grows while what is chosen is at an edge."""
    tried: dict[float, Tensor] = {}
    waiting = list(grid)
    while waiting:
        for value in waiting:
            tried[value] = try_one(value).double()
        chosen, waiting = choose(tried), []
        if growth and chosen in (min(tried), max(tried)):
            growth -= 1
            waiting = [chosen * FACTOR if chosen == max(tried) else chosen / FACTOR]
    return tried


def choose(tried: Mapping[float, Tensor]) -> float:
    """The smallest value that is no more than a standard error behind the best.

    The standard error is that of the difference to the best on the same pairs. Among values that
    cannot be told apart, the smallest moves the model least.
    """
    means = {value: losses.mean().item() for value, losses in tried.items()}
    finite = [value for value, mean in means.items() if math.isfinite(mean)]
    best = min(finite or tried, key=lambda value: means[value])

    def is_as_good(value: float) -> bool:
        behind = tried[value] - tried[best]
        return bool(behind.mean() <= behind.std() / math.sqrt(len(behind)))

    return min(value for value in tried if value == best or is_as_good(value))


def describe(tried: Mapping[float, Tensor]) -> str:
    """What a search has tried, for the table's CSV."""
    return ", ".join(f"{value:.3g}: {tried[value].mean():.4f}" for value in sorted(tried))


def lora_rank(model: nn.Module, n_parameters: int) -> int:
    """The rank at which LoRA on every linear layer of the decoder trains about as much."""
    linear = [
        module
        for path in decoder_layers(model).values()
        for module in model.get_submodule(path).modules()
        if isinstance(module, nn.Linear)
    ]
    per_rank = sum(module.in_features + module.out_features for module in linear)
    return max(1, round(n_parameters / per_rank))


def random_dictionary(reference: Any, seed: int) -> Any:
    """A SAELens SAE of the same class, shapes and norms whose features have random directions."""
    sae = copy.deepcopy(load_sae(reference).module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        drawn = torch.randn(sae.W_dec.shape, generator=generator).to(sae.W_dec)
        directions = F.normalize(drawn, dim=1)
        sae.W_dec.copy_(directions * sae.W_dec.norm(dim=1, keepdim=True))
        # What a feature reads and what it writes point the same way, as in a trained one.
        sae.W_enc.copy_(directions.T * sae.W_enc.norm(dim=0, keepdim=True))
    return sae


def trained(model: nn.Module) -> int:
    """Number of parameters that train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def trained_method(
    bench: Bench, name: str, config: Any, objective: str, grid: Sequence[float], note: str
) -> Row:
    """Search a learning rate with short runs, train with it, measure."""
    args = bench.args

    def try_one(rate: float) -> Tensor:
        model = bench.fit(copy.deepcopy(config), objective, rate, args.search_steps)
        return bench.losses(bench.margins(model, bench.valid, objective), objective)

    # Without a search, the first rate of the grid.
    tried = search(grid, try_one) if args.search_steps else {}
    rate = choose(tried) if tried else grid[0]
    started = time.monotonic()
    model = bench.fit(copy.deepcopy(config), objective, rate, args.steps)
    seconds = time.monotonic() - started
    l0 = None
    if isinstance(config, FSRLConfig):
        l0 = compute_usage(Session(model, bench.tokenizer, bench.test)).l0
    return bench.measure(
        model,
        objective,
        method=name,
        parameters=trained(model) or sum(p.numel() for p in model.parameters()),
        setting=f"learning rate {rate:.2g}" + (f", {note}" if note else ""),
        l0=l0,
        seconds=seconds,
        search=describe(tried),
    )


def mean_difference(bench: Bench, read: Callable[[Tensor], Tensor], steered: Any) -> Tensor:
    """Mean over the tokens of chosen answers less that of rejected ones, of what ``read`` gives.

    Args:
        bench: with the training pairs.
        read: maps hidden states ``(tokens, d_in)`` to ``(tokens, width)``.
        steered: the base model with an FSRL adapter, whose observers see the layer's own output.
    """
    sums, counts = [0.0, 0.0], [0, 0]
    seen: list[Tensor] = []
    rows = bench.train.select(range(min(bench.args.static_pairs, len(bench.train))))
    session = Session(steered, bench.tokenizer, rows, batch_size=bench.args.eval_batch_size)
    with torch.no_grad(), observe(steered, lambda event: seen.append(event.hidden_states)):
        for texts in session.batches("differences"):
            padded = pad(texts, bench.base.device)
            steered(input_ids=padded.input_ids, attention_mask=padded.attention_mask)
            halves = zip(seen.pop().chunk(2), padded.answer_mask.bool().chunk(2), strict=True)
            for side, (hidden, mask) in enumerate(halves):
                sums[side] = sums[side] + read(hidden[mask]).double().sum(dim=0)
                counts[side] += int(mask.sum())
    return (sums[0] / counts[0] - sums[1] / counts[1]).to(bench.base.dtype)


@contextmanager
def added(model: nn.Module, layer: int, vector: Tensor) -> Iterator[None]:
    """Add one vector, shape ``(d_in,)``, to the output of a layer at every token."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return output + vector if isinstance(output, Tensor) else (output[0] + vector, *output[1:])

    handle = model.get_submodule(decoder_layers(model)[layer]).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def static_method(bench: Bench, name: str, objective: str) -> Row:
    """One steering vector for all tokens, scaled by what is best on training pairs."""
    started = time.monotonic()
    config = FSRLConfig(layer=bench.layer, sae=bench.sae, task_type="CAUSAL_LM")
    steered = get_peft_model(bench.load_base(), config).eval()
    sae = load_sae(bench.sae).to(bench.base.device, bench.base.dtype)
    in_features = name == "static SAE features"
    read = sae.encode if in_features else (lambda hidden: hidden)
    with edit_steering(steered, lambda v, _: torch.zeros_like(v)):
        vector = mean_difference(bench, read, steered)
    plain = bench.load_base()
    model = steered if in_features else plain

    def acting(scale: float) -> Any:
        if in_features:
            return edit_steering(steered, lambda v, _: (scale * vector).expand_as(v))
        return added(plain, bench.layer, scale * vector)

    rows = bench.train.select(range(min(bench.args.static_pairs, len(bench.train))))

    def try_one(scale: float) -> Tensor:
        with acting(scale):
            return bench.losses(bench.margins(model, rows, objective), objective)

    tried = search(SCALES, try_one)
    scale = choose(tried)
    seconds = time.monotonic() - started
    with acting(scale):
        session = Session(steered, bench.tokenizer, bench.test)
        l0 = compute_usage(session).l0 if in_features else None
        return bench.measure(
            model,
            objective,
            method=name,
            parameters=vector.numel(),
            setting=f"scale {scale:.2g}",
            l0=l0,
            seconds=seconds,
            search=describe(tried),
        )


def base_method(bench: Bench, objective: str) -> Row:
    """The base model, for comparison."""
    model = bench.load_base()
    known = {"method": "base", "parameters": 0, "setting": "", "l0": None, "seconds": 0.0}
    return bench.measure(model, objective, **known, search="")


def methods(
    bench: Bench, objective: str, rows: Mapping[str, Row]
) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Every method by name, in the order of the table; ``rows`` has those that are finished."""
    args = bench.args
    shared = {
        "layer": bench.layer,
        "l1_coeff": args.l1_coeff if objective == "simpo" else args.l1_coeff_dpo,
        "task_type": "CAUSAL_LM",
    }

    def train(name: str, config: Any, grid: Sequence[float], note: str = "") -> Row:
        return trained_method(bench, name, config, objective, grid, note)

    def lora(name: str, rank: int, grid: Sequence[float], **where: Any) -> Row:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM", **where)
        return train(name, config, grid, f"rank {rank}")

    penalty = f"l1 {shared['l1_coeff']:g}"
    yield "base", lambda: base_method(bench, objective)
    yield (
        "FSRL",
        lambda: train("FSRL", FSRLConfig(sae=bench.sae, **shared), (1.6e-3, 5e-3, 1.6e-2), penalty),
    )
    yield (
        "FSRL, random dictionary",
        lambda: train(
            "FSRL, random dictionary",
            FSRLConfig(sae=random_dictionary(bench.sae, args.seed), **shared),
            (1.6e-3, 5e-3, 1.6e-2),
            penalty,
        ),
    )
    yield (
        "LoRA, as many parameters",
        lambda: lora(
            "LoRA, as many parameters",
            lora_rank(bench.base, rows["FSRL"].parameters),
            (1e-3, 3.2e-3, 1e-2),
            target_modules="all-linear",
        ),
    )
    yield (
        "LoRA, one layer, FSRL's rank",
        lambda: lora(
            "LoRA, one layer, FSRL's rank",
            max(1, round(rows["FSRL"].l0 or 0)),
            (3.2e-3, 1e-2, 3.2e-2),
            target_modules=[args.lora_target],
            layers_to_transform=[bench.layer],
        ),
    )
    yield "full fine-tuning", lambda: train("full fine-tuning", None, (1e-4, 3.2e-4, 1e-3))
    for name in ("static steering vector", "static SAE features"):
        yield name, lambda name=name: static_method(bench, name, objective)


def render(rows: Sequence[Row]) -> str:
    """The rows of one objective as a Markdown table."""
    lines = [
        "| | parameters | setting | loss | accuracy | margin | l0 | KL to base | perplexity | "
        "repetition | length | seconds |",
        "| --- |" + " --- |" * 11,
    ]
    for row in rows:
        l0 = "" if row.l0 is None else f"{row.l0:.1f}"
        lines.append(
            f"| {row.method} | {row.parameters:,} | {row.setting} | {row.loss:.3f} | "
            f"{row.accuracy:.1%} | {row.margin:+.2f} | {l0} | {row.kl:.4f} | "
            f"{row.perplexity:.2f} | {row.repetition:.1%} | {row.length:.1f} | {row.seconds:.0f} |"
        )
    return "\n".join(lines)


def write_table(out: Path, rows: Sequence[Row]) -> str:
    """All rows as `compare.csv`, `compare.json` and, returned too, `compare.md`."""
    names = [each.name for each in fields(Row)]
    with (out / "compare.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    write_text_atomically(out / "compare.json", json.dumps([asdict(row) for row in rows], indent=2))
    objectives = dict.fromkeys(row.objective for row in rows)
    text = "\n\n".join(
        f"### {objective.upper() if objective == 'dpo' else 'SimPO'}\n\n"
        + render([row for row in rows if row.objective == objective])
        for objective in objectives
    )
    write_text_atomically(out / "compare.md", text + "\n")
    return text


def check_settings(args: argparse.Namespace) -> None:
    """Refuse a folder with rows of other settings."""
    chosen = {k: str(v) for k, v in vars(args).items() if k not in ("out", "methods", "objective")}
    path = args.out / "settings.json"
    if path.exists() and json.loads(path.read_text()) != chosen:
        raise SystemExit(f"{args.out} holds rows of other settings: choose another --out.")
    write_text_atomically(path, json.dumps(chosen, indent=2))


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare what is not compared yet, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--objective", choices=("simpo", "dpo", "both"), default="both")
    add("--methods", nargs="*", help="only these, by name; those that need FSRL's row need FSRL")
    add("--out", type=Path, default=Path("runs/compare"))
    add("--model", default="organism")
    add("--sae", help="default: the organism's")
    add("--layer", type=int, help="default: the organism's")
    add("--dataset", default="organism")
    add("--train-split", default="train")
    add("--test-split", default="test")
    add("--train-pairs", type=int, default=4000)
    add("--valid-pairs", type=int, default=200)
    add("--test-pairs", type=int, default=400)
    add("--static-pairs", type=int, default=256, help="training pairs behind the steering vectors")
    add("--steps", type=int, default=200)
    add("--search-steps", type=int, default=40, help="steps of each run of a search; 0 for none")
    add("--batch-size", type=int, default=16)
    add("--accumulation", type=int, default=1)
    add("--eval-batch-size", type=int, default=32)
    add("--max-length", type=int, default=128)
    add("--l1-coeff", type=float, default=0.1, help="FSRL's penalty under SimPO")
    add("--l1-coeff-dpo", type=float, default=0.01, help="FSRL's penalty under DPO")
    add("--lora-target", default="down_proj", help="what writes to the residual stream at a layer")
    add("--prompts", type=int, default=64, help="answered by every model, for the last figures")
    add("--new-tokens", type=int, default=48)
    add("--dtype", default="float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    check_settings(args)
    disable_progress_bars()
    bench = Bench(args)
    table: list[Row] = []
    for objective in ("simpo", "dpo") if args.objective == "both" else (args.objective,):
        rows: dict[str, Row] = {}
        for name, make in methods(bench, objective, rows):
            if args.methods and name not in args.methods:
                continue
            slug = "".join(c if c.isalnum() else "_" for c in name)
            path = args.out / "rows" / f"{objective}.{slug}.json"
            if not path.exists():
                torch.manual_seed(args.seed)
                row = make()
                write_text_atomically(path, row.to_json())
            rows[name] = Row.from_json(path.read_text())
            print(f"{objective:5} {name:30} loss {rows[name].loss:.3f} KL {rows[name].kl:.4f}")
        table += rows.values()
        text = write_table(args.out, table)
    print(f"\n{text}\n\nWritten to {args.out}: compare.md, compare.csv and compare.json.")


if __name__ == "__main__":
    main()
