r"""FSRL against what else could be trained: same data, same steps, same figures, one table.

    python examples/compare.py

compares, on the model organism: FSRL; FSRL with a random dictionary in place of the SAE; LoRA with
as many parameters; LoRA at FSRL's layer alone, of the rank that FSRL has there; ReFT there; full
fine-tuning; one vector for all tokens and one of SAE features, trained to serve the preference with
one sign and its reverse with the other (BiPO, YaPO); and, without training, such vectors as the
difference of the mean activations of chosen and rejected answers, and that difference given each of
a token's active features, added to what is active there (after DSPA). With SimPO and with DPO.
Another model, and data in any of TRL's preference formats:

    python examples/compare.py --model google/gemma-2-2b-it --layer 12 \
        --sae gemma-scope-2b-pt-res/layer_12/width_65k/average_l0_72 --dataset ... --dtype bfloat16

Every trained method has its own learning rate, and the same budget to find it. Of a grid of three,
tried by the objective on validation pairs after short runs, it is the smallest within a standard
error of the best; where that stands at the edge, the grid grows. What is not trained has a scale,
which is chosen in the same way on training pairs. With `--seeds 0 1 2` all of it is done for each,
and the table has means and standard deviations. Held-out losses on the way are kept in `curves`,
and drawn with the `plots` extra. Rows are written as they come: started again, the comparison goes
on where it was stopped.
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
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import DPOConfig, DPOTrainer

from peft_fsrl import FSRLConfig, load_sae, organism, with_fsrl
from peft_fsrl.analysis import Session, compute_divergence, compute_usage, load_training_curves
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
        seed: of data, order, start and sampling.
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
    seed: int
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

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed = args, seed
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
                organism.preferences(n, seed=f"{name}-{self.seed}")
                for name, n in (
                    ("train", args.train_pairs),
                    ("valid", args.valid_pairs),
                    ("test", args.test_pairs),
                )
            ]
        else:
            train = load_dataset(args.dataset, split=args.train_split).shuffle(self.seed)
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
        session = Session(model, self.tokenizer, rows, batch_size=self.args.eval_batch_size)
        with torch.no_grad():
            found = [self.reward(model, t, objective) for t in session.batches("margins")]
        return torch.cat(found).float().cpu()

    def reward(self, model: nn.Module, texts: Sequence[Any], objective: str) -> Tensor:
        """The same of one batch of chosen, then rejected texts; with its graph, if it has one."""
        padded = pad(texts, self.base.device)
        rewards = mean_log_probability(model.eval(), padded)
        if objective == "dpo":
            with torch.no_grad():
                reference = mean_log_probability(self.base, padded)
            rewards = (rewards - reference) * padded.answer_mask.sum(dim=1)
        chosen, rejected = (BETA[objective] * rewards).chunk(2)
        return chosen - rejected

    def losses(self, margins: Tensor, objective: str) -> Tensor:
        """The objective of each pair, shape ``(pairs,)``."""
        # DPO is SimPO's loss without a target margin, on another reward.
        return simpo_loss(margins, GAMMA if objective == "simpo" else 0.0)

    def measure(self, model: nn.Module, objective: str, **known: Any) -> Row:
        """All figures of a model as it is now."""
        args, margins = self.args, self.margins(model, self.test, objective)
        prompts = [row["prompt"] for row in self.test[: args.prompts]]
        answers = sample_answers(
            model, prompts, self.tokenizer, max_new_tokens=args.new_tokens, seed=self.seed
        )
        coherence = measure_answers(self.base, answers)
        return Row(
            objective=objective,
            seed=self.seed,
            loss=self.losses(margins, objective).mean().item(),
            accuracy=((margins > 0).float() + (margins == 0).float() / 2).mean().item(),
            margin=margins.mean().item(),
            kl=compute_divergence(Session(model, self.tokenizer, self.test), self.base),
            perplexity=coherence.perplexity,
            repetition=coherence.repetition,
            length=coherence.mean_length,
            **known,
        )

    def fit(
        self, method: Any, objective: str, rate: float, steps: int, curve: str | None = None
    ) -> nn.Module:
        """Train a fresh base model.

        Args:
            method: the config of an adapter; a function that puts something else that trains into
                a model; or None, for the whole model.
            objective: see ``Row``.
            rate: the learning rate.
            steps: optimizer steps.
            curve: where to keep the losses of training and, ten times, of validation pairs.
        """
        args, model = self.args, self.load_base()
        config = method if isinstance(method, PeftConfig) else None
        if config is None and method is not None:
            method(model)
        n_pairs = steps * args.batch_size * args.accumulation
        settings = {
            "output_dir": str(args.out / (curve or "trainer")),
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
            "seed": self.seed,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_strategy": "steps" if curve else "no",
            "logging_steps": max(1, steps // 10),
            "eval_strategy": "steps" if curve else "no",
            "eval_steps": max(1, steps // 10),
            "per_device_eval_batch_size": args.eval_batch_size,
            "remove_unused_columns": False,
            "use_cpu": args.device == "cpu",
        }
        if objective == "simpo":
            kind, arguments = SimPOTrainer, SimPOConfig(**settings, simpo_gamma=GAMMA)
        else:
            kind, arguments = DPOTrainer, DPOConfig(**settings)
        if isinstance(config, FSRLConfig):
            kind = with_fsrl(kind)
        more = {"ref_model": self.load_base()} if objective == "dpo" and config is None else {}
        if curve:
            more["eval_dataset"] = Dataset.from_list(self.valid)
        trainer = kind(
            model=model,
            args=arguments,
            train_dataset=self.train.select(range(min(n_pairs, len(self.train)))),
            processing_class=self.tokenizer,
            peft_config=config,
            **more,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if curve:
            trainer.save_state()
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


def slug(*words: object) -> str:
    """A file's name."""
    return ".".join("".join(c if c.isalnum() else "_" for c in str(word)) for word in words)


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
    curve = f"curves/{slug(objective, name, bench.seed)}"
    model = bench.fit(copy.deepcopy(config), objective, rate, args.steps, curve)
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


def side_sums(
    bench: Bench, reduce: Callable[[Tensor], Tensor], steered: Any
) -> tuple[Tensor, Tensor]:
    """Sums of ``reduce`` over the tokens of chosen answers, and over those of rejected ones.

    Args:
        bench: with the training pairs.
        reduce: maps hidden states ``(tokens, d_in)`` to what is summed.
        steered: the base model with an FSRL adapter, whose observers see the layer's own output.
    """
    sums: list[Any] = [0.0, 0.0]
    seen: list[Tensor] = []
    rows = bench.train.select(range(min(bench.args.static_pairs, len(bench.train))))
    session = Session(steered, bench.tokenizer, rows, batch_size=bench.args.eval_batch_size)
    with torch.no_grad(), observe(steered, lambda event: seen.append(event.hidden_states)):
        for texts in session.batches("differences"):
            padded = pad(texts, bench.base.device)
            steered(input_ids=padded.input_ids, attention_mask=padded.attention_mask)
            halves = zip(seen.pop().chunk(2), padded.answer_mask.bool().chunk(2), strict=True)
            for side, (hidden, mask) in enumerate(halves):
                sums[side] = sums[side] + reduce(hidden[mask])
    return sums[0], sums[1]


def mean_difference(bench: Bench, read: Callable[[Tensor], Tensor], steered: Any) -> Tensor:
    """Mean over the tokens of chosen answers less that of rejected ones, of what ``read`` gives.

    Args:
        bench: see ``side_sums``.
        read: maps hidden states ``(tokens, d_in)`` to ``(tokens, width)``.
        steered: see ``side_sums``.
    """

    def reduce(hidden: Tensor) -> Tensor:
        total = read(hidden).double().sum(dim=0)
        return torch.cat([total, total.new_tensor([len(hidden)])])

    chosen, rejected = (total[:-1] / total[-1] for total in side_sums(bench, reduce, steered))
    return (chosen - rejected).to(bench.base.dtype)


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


class Reft(nn.Module):
    """LoReFT (arXiv 2404.03592): ``x + (W x + b - R x) R``, the rows of ``R`` orthonormal.

    Args:
        width: of ``x``.
        rank: number of rows.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.rotation = nn.utils.parametrizations.orthogonal(nn.Linear(width, rank, bias=False))
        self.source = nn.Linear(width, rank)

    def forward(self, x: Tensor) -> Tensor:
        """``x``, moved in the subspace of the rows of ``R`` alone; shape ``(..., width)``."""
        return x + (self.source(x) - self.rotation(x)) @ self.rotation.weight


def install_reft(model: nn.Module, layer: int, rank: int) -> None:
    """Freeze a model, and let ReFT act on the output of one of its layers at every token."""
    model.requires_grad_(False)
    model.reft = Reft(model.config.hidden_size, rank).to(model.device, model.dtype)

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return model.reft(output)
        return (model.reft(output[0]), *output[1:])

    model.get_submodule(decoder_layers(model)[layer]).register_forward_hook(hook)


class Steering:
    """The base model with something that is added at its layer, which a number scales.

    Args:
        bench: with model, layer and SAE.
        in_features: what is added stands among the SAE's features, where none may fall below zero;
            otherwise in the residual stream.
        settings: of the adapter, whose steering vector an edit replaces.
    """

    def __init__(self, bench: Bench, in_features: bool, **settings: Any) -> None:
        shared = {"layer": bench.layer, "sae": bench.sae, "task_type": "CAUSAL_LM"}
        config = FSRLConfig(**shared, **settings)
        self.bench, self.in_features = bench, in_features
        self.steered = get_peft_model(bench.load_base(), config).eval().requires_grad_(False)
        self.plain = bench.load_base().requires_grad_(False)
        self.model = self.steered if in_features else self.plain
        self.sae = load_sae(bench.sae).to(bench.base.device, bench.base.dtype)
        self.width = self.sae.n_features if in_features else self.sae.info.d_in

    def read(self, hidden: Tensor) -> Tensor:
        """What a vector is compared with: hidden states ``(..., d_in)``, or their features."""
        return self.sae.encode(hidden) if self.in_features else hidden

    def adding(self, vector: Tensor) -> Any:
        """Add one vector, shape ``(width,)``, at every token."""
        if self.in_features:
            return edit_steering(self.steered, lambda v, _: vector.expand_as(v))
        return added(self.plain, self.bench.layer, vector)

    def measure(self, name: str, objective: str, acting: Any, parameters: int, **known: Any) -> Row:
        """All figures with what is added."""
        with acting:
            session = Session(self.steered, self.bench.tokenizer, self.bench.test)
            l0 = compute_usage(session).l0 if self.in_features else None
            return self.bench.measure(
                self.model, objective, method=name, parameters=parameters, l0=l0, **known
            )


def scaled_method(
    bench: Bench, name: str, objective: str, make: Callable[[], tuple[Steering, Any, int]]
) -> Row:
    """What is estimated and not trained, scaled by what is best on training pairs.

    Args:
        bench: with the training pairs.
        name: the method.
        objective: see ``Row``.
        make: gives the model, a function from a scale to a context, and how much was estimated.
    """
    started = time.monotonic()
    steering, acting, parameters = make()
    rows = bench.train.select(range(min(bench.args.static_pairs, len(bench.train))))

    def try_one(scale: float) -> Tensor:
        with acting(scale):
            return bench.losses(bench.margins(steering.model, rows, objective), objective)

    tried = search(SCALES, try_one)
    scale = choose(tried)
    known = {"seconds": time.monotonic() - started, "search": describe(tried)}
    setting = f"scale {scale:.2g}"
    return steering.measure(name, objective, acting(scale), parameters, setting=setting, **known)


def static_vector(bench: Bench, in_features: bool) -> tuple[Steering, Any, int]:
    """The difference of means, added at every token."""
    steering = Steering(bench, in_features)
    with edit_steering(steering.steered, lambda v, _: torch.zeros_like(v)):
        vector = mean_difference(bench, steering.read, steering.steered)
    return steering, lambda scale: steering.adding(scale * vector), vector.numel()


def conditional_differences(bench: Bench) -> tuple[Steering, Any, int]:
    """The difference of means given what is active, added to what is active.

    Row ``i`` of the map is the mean of all features over the tokens of chosen answers at which
    feature ``i`` is active, less that over rejected ones. A token has the mean of the rows of its
    active features, at these features alone. DSPA (arXiv 2603.21461) conditions on the features of
    the prompt instead, which are gone when one token is generated at a time.
    """
    steering = Steering(bench, in_features=True, activation="relu", init_weights="encoder")
    sae, model = steering.sae, steering.steered
    with edit_steering(model, lambda v, _: torch.zeros_like(v)):
        size = mean_difference(bench, steering.read, model).abs()
        kept = size.topk(min(bench.args.map_features, len(size))).indices

        def pairs(hidden: Tensor) -> Tensor:
            f = sae.encode(hidden)[:, kept].double()
            active = (f > 0).double()
            return torch.cat([active.T @ f, active.sum(dim=0)[:, None]], dim=1)

        sums = side_sums(bench, pairs, model)
    chosen, rejected = (total[:, :-1] / total[:, -1:].clamp(min=1) for total in sums)
    known = (sums[0][:, -1:] > 0) & (sums[1][:, -1:] > 0)
    table = ((chosen - rejected) * known).to(bench.base.dtype)

    def edit(scale: float, v: Tensor, _: Any) -> Tensor:
        # From the encoder's own rows, v is positive where a feature is active.
        active = (v[..., kept] > 0).to(table.dtype)
        mean = active @ table / active.sum(dim=-1, keepdim=True).clamp(min=1)
        return torch.zeros_like(v).index_copy(-1, kept, (scale * mean * active).to(v.dtype))

    return steering, lambda scale: edit_steering(model, partial(edit, scale)), table.numel()


def train_vector(
    bench: Bench, objective: str, in_features: bool, rate: float, steps: int
) -> tuple[Steering, Tensor]:
    """A vector that serves the preference added, and its reverse subtracted, for all tokens.

    In the residual stream as in BiPO (arXiv 2406.00045), among the SAE's features as in YaPO
    (2601.08441), where a proximal step of FSRL's penalty keeps it sparse.

    Returns:
        The model, and the vector, shape ``(width,)``.
    """
    args, steering = bench.args, Steering(bench, in_features)
    generator = torch.Generator().manual_seed(bench.seed)
    # At zero, a silent feature has no slope.
    start = 2e-3 * torch.rand(steering.width, generator=generator) - 1e-3
    vector = nn.Parameter(start.to(bench.base.device, bench.base.dtype))
    optimizer = torch.optim.AdamW([vector], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    penalty = l1_coefficient(args, objective) if in_features else 0.0
    size = args.batch_size * args.accumulation
    order = torch.randperm(len(bench.train), generator=generator)
    rows = bench.train.select(order.repeat(-(-steps * size // len(order)))[: steps * size])
    session = Session(steering.model, bench.tokenizer, rows, batch_size=size)
    for texts in session.batches("vector"):
        sign = 1 if torch.rand(1, generator=generator) < 0.5 else -1
        with steering.adding(sign * vector):
            margins = sign * bench.reward(steering.model, texts, objective)
        optimizer.zero_grad()
        bench.losses(margins, objective).mean().backward()
        optimizer.step()
        with torch.no_grad():
            step = penalty * optimizer.param_groups[0]["lr"]
            vector.copy_(vector.sign() * F.relu(vector.abs() - step))
        schedule.step()
    return steering, vector.detach()


def vector_method(
    bench: Bench, name: str, objective: str, in_features: bool, grid: Sequence[float]
) -> Row:
    """Search a learning rate for ``train_vector``, train with it, measure."""
    args = bench.args

    def try_one(rate: float) -> Tensor:
        steering, vector = train_vector(bench, objective, in_features, rate, args.search_steps)
        with steering.adding(vector):
            return bench.losses(bench.margins(steering.model, bench.valid, objective), objective)

    tried = search(grid, try_one) if args.search_steps else {}
    rate = choose(tried) if tried else grid[0]
    started = time.monotonic()
    steering, vector = train_vector(bench, objective, in_features, rate, args.steps)
    known = {"seconds": time.monotonic() - started, "search": describe(tried)}
    setting = f"learning rate {rate:.2g}"
    if in_features:
        setting += f", l1 {l1_coefficient(args, objective):g}"
    acting = steering.adding(vector)
    return steering.measure(name, objective, acting, vector.numel(), setting=setting, **known)


def l1_coefficient(args: argparse.Namespace, objective: str) -> float:
    """The weight of the penalty under an objective."""
    return args.l1_coeff if objective == "simpo" else args.l1_coeff_dpo


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
        "l1_coeff": l1_coefficient(args, objective),
        "activation": args.activation,
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
        lambda: train("FSRL", FSRLConfig(sae=bench.sae, **shared), args.fsrl_rates, penalty),
    )
    yield (
        "FSRL, random dictionary",
        lambda: train(
            "FSRL, random dictionary",
            FSRLConfig(sae=random_dictionary(bench.sae, bench.seed), **shared),
            args.fsrl_rates,
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
    reft = partial(install_reft, layer=bench.layer, rank=args.reft_rank)
    yield "ReFT", lambda: train("ReFT", reft, (1e-3, 3.2e-3, 1e-2), f"rank {args.reft_rank}")
    yield "full fine-tuning", lambda: train("full fine-tuning", None, (1e-4, 3.2e-4, 1e-3))
    for name, in_features in (("trained vector (BiPO)", False), ("trained features (YaPO)", True)):
        yield (
            name,
            lambda name=name, in_features=in_features: vector_method(
                bench, name, objective, in_features, (3.2e-2, 1e-1, 3.2e-1)
            ),
        )
    for name, make in (
        ("static steering vector", lambda: static_vector(bench, False)),
        ("static SAE features", lambda: static_vector(bench, True)),
        ("conditional differences (after DSPA)", lambda: conditional_differences(bench)),
    ):
        yield name, lambda name=name, make=make: scaled_method(bench, name, objective, make)


def render(rows: Sequence[Row]) -> str:
    """The rows of one objective as a Markdown table; of several seeds, mean and deviation."""
    lines = [
        "| | parameters | setting | loss | accuracy | margin | l0 | KL to base | perplexity | "
        "repetition | length | seconds |",
        "| --- |" + " --- |" * 11,
    ]
    for method in dict.fromkeys(row.method for row in rows):
        mine = [row for row in rows if row.method == method]

        def cell(name: str, form: str, mine: Sequence[Row] = mine) -> str:
            values = [getattr(row, name) for row in mine if getattr(row, name) is not None]
            if not values:
                return ""
            spread = f" ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
            return f"{fmean(values):{form}}{spread}"

        settings = " / ".join(dict.fromkeys(row.setting for row in mine))
        forms = {"loss": ".3f", "accuracy": ".1%", "margin": "+.2f", "l0": ".1f", "kl": ".4f"}
        forms |= {"perplexity": ".2f", "repetition": ".1%", "length": ".1f", "seconds": ".0f"}
        cells = [f"{mine[0].parameters:,}", settings, *(cell(*each) for each in forms.items())]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_curves(out: Path, objective: str, rows: Sequence[Row]) -> None:
    """The preference loss on validation pairs over the steps of training, a line per method."""
    from peft_fsrl.analysis.plots import plot_losses

    runs = {}
    for row in rows:
        folder = out / "curves" / slug(objective, row.method, row.seed)
        if folder.exists():
            runs.setdefault(row.method, []).append(load_training_curves(folder))
    if runs:
        plot_losses(runs).savefig(out / f"curves_{objective}.png", dpi=160)


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
    others = ("out", "methods", "objective", "seeds")
    chosen = {k: str(v) for k, v in vars(args).items() if k not in others}
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
    add("--activation", default="soft_threshold", help="FSRL's")
    rates = [1.6e-3, 5e-3, 1.6e-2]
    add("--fsrl-rates", type=float, nargs="+", default=rates, help="FSRL's first grid")
    add("--dtype", default="float32")
    add("--bf16", action="store_true", help="compute in bfloat16, whatever the weights are")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--reft-rank", type=int, default=4)
    add("--map-features", type=int, default=1024, help="features of the conditional differences")
    add("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args(arguments)
    check_settings(args)
    disable_progress_bars()
    table: list[Row] = []
    for objective in ("simpo", "dpo") if args.objective == "both" else (args.objective,):
        of_objective: list[Row] = []
        for seed in args.seeds:
            bench, rows = Bench(args, seed), {}
            for name, make in methods(bench, objective, rows):
                if args.methods and name not in args.methods:
                    continue
                path = args.out / "rows" / f"{slug(objective, name, seed)}.json"
                if not path.exists():
                    torch.manual_seed(seed)
                    # A cache would keep what a step has changed: all steps are within this block.
                    with torch.autocast(
                        bench.base.device.type,
                        torch.bfloat16,
                        enabled=args.bf16,
                        cache_enabled=False,
                    ):
                        row = make()
                    write_text_atomically(path, row.to_json())
                row = rows[name] = Row.from_json(path.read_text())
                print(f"{objective:5} {seed} {name:36} loss {row.loss:.3f} KL {row.kl:.4f}")
            of_objective += rows.values()
        table += of_objective
        text = write_table(args.out, table)
        draw_curves(args.out, objective, of_objective)
    print(f"\n{text}\n\nWritten to {args.out}: compare.md, compare.csv and compare.json.")


if __name__ == "__main__":
    main()
