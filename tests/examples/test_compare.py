"""``examples/compare.py``: its parts against plain loops, and a run of a few steps."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import helpers
from peft_fsrl.steering import edit_steering, observe

FEW = {
    "train-pairs": 32,
    "valid-pairs": 4,
    "test-pairs": 8,
    "static-pairs": 16,
    "steps": 2,
    "search-steps": 0,
    "batch-size": 4,
    "prompts": 3,
    "new-tokens": 5,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    """The script as a module."""
    return helpers.load_example("compare")


def options(out: Path, **more: object) -> list[str]:
    chosen = {**FEW, "out": out, **more}
    return [text for name, value in chosen.items() for text in (f"--{name}", str(value))]


def test_a_search_grows_where_its_choice_stands_at_the_edge(compare: ModuleType) -> None:
    def losses(optimum: float) -> Any:
        noise = torch.tensor([-1e-3, 1e-3, 2e-3, -2e-3])
        return lambda value: (math.log(value / optimum) ** 2 + noise * value).double()

    grown = compare.search((1.0, 2.0, 4.0), losses(20))
    assert sorted(grown) == pytest.approx([1, 2, 4, 4 * 10**0.5, 40])
    assert compare.choose(grown) == pytest.approx(4 * 10**0.5)
    assert compare.search((1.0, 2.0, 4.0), losses(2)).keys() == {1, 2, 4}
    down = compare.search((1.0, 2.0), losses(1e-6), growth=2)
    assert sorted(down) == pytest.approx([0.1, 10**-0.5, 1, 2])


def test_the_smallest_of_what_is_as_good_is_chosen(compare: ModuleType) -> None:
    best = torch.tensor([0.0, 1.0, 2.0, 3.0])
    noisy = best + torch.tensor([0.5, -0.3, 0.2, -0.2])
    # Behind by 0.05, with a standard error of 0.18.
    assert compare.choose({1.0: noisy, 2.0: best, 4.0: best + 1}) == 1.0
    # As far behind on average, by almost as much in each pair.
    worse = best + torch.tensor([0.05, 0.06, 0.04, 0.05])
    assert compare.choose({1.0: worse, 2.0: best}) == 2.0
    broken = torch.full((4,), math.nan)
    assert compare.choose({1.0: broken, 2.0: best, 4.0: broken}) == 2.0
    assert compare.choose({1.0: broken, 2.0: broken}) == 1.0


def test_lora_of_as_many_parameters(compare: ModuleType) -> None:
    model = helpers.tiny_model()
    # q, k and v, o, then gate and up, down; in + out of each, in three layers.
    per_rank = 3 * ((16 + 16) + 2 * (16 + 8) + (16 + 16) + 2 * (16 + 32) + (32 + 16))
    assert compare.lora_rank(model, 3 * per_rank) == 3
    assert compare.lora_rank(model, 5) == 1
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear"))
    assert compare.trained(adapted) == 3 * per_rank


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
def test_a_random_dictionary_keeps_shapes_and_norms(
    compare: ModuleType, architecture: str, tmp_path: Path
) -> None:
    sae = helpers.tiny_sae(architecture)
    sae.save_model(tmp_path)
    drawn = compare.random_dictionary(str(tmp_path), seed=3)
    assert type(drawn) is type(sae)
    assert torch.allclose(drawn.W_dec.norm(dim=1), sae.W_dec.norm(dim=1))
    assert torch.allclose(drawn.W_enc.norm(dim=0), sae.W_enc.norm(dim=0))
    assert torch.nn.functional.cosine_similarity(drawn.W_dec, sae.W_dec).abs().mean() < 0.5
    assert torch.equal(drawn.b_dec, sae.b_dec)
    assert torch.equal(compare.random_dictionary(str(tmp_path), seed=3).W_dec, drawn.W_dec)
    assert not torch.equal(compare.random_dictionary(str(tmp_path), seed=4).W_dec, drawn.W_dec)


class TinyBench:
    """What the static methods need of a bench."""

    def __init__(self) -> None:
        self.base, self.tokenizer = helpers.tiny_model(), helpers.tiny_tokenizer()
        self.train = helpers.tiny_preferences(6)
        self.args = type("args", (), {"static_pairs": 5, "eval_batch_size": 2})()


def sequences(row: dict[str, str], side: str) -> tuple[list[int], int]:
    prompt = [1, *(int(word[1:]) for word in row["prompt"].split())]
    return [*prompt, *(int(word[1:]) for word in row[side].split()), 2], len(prompt)


def test_the_difference_of_means_is_over_answer_tokens(compare: ModuleType) -> None:
    bench, model = TinyBench(), helpers.fsrl_model()
    with edit_steering(model, lambda v, _: torch.zeros_like(v)):
        found = compare.mean_difference(bench, lambda hidden: hidden**2, model)
    means = []
    for side in ("chosen", "rejected"):
        states = []
        for row in bench.train.select(range(5)):
            ids, n_prompt = sequences(row, side)
            with torch.no_grad():
                output = bench.base(torch.tensor([ids]), output_hidden_states=True)
            states.append(output.hidden_states[2][0, n_prompt:] ** 2)
        means.append(torch.cat(states).mean(dim=0))
    assert torch.allclose(found, means[0] - means[1], atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_a_vector_is_added_to_the_output_of_a_layer(compare: ModuleType, family: str) -> None:
    model, ids = helpers.tiny_model(family), helpers.token_ids()
    vector = torch.arange(helpers.D_IN, dtype=torch.float32)
    with torch.no_grad():
        before = model(ids, output_hidden_states=True).hidden_states[2]
        with compare.added(model, 1, vector):
            logits = model(ids).logits
        blocks = model.transformer.h if family == "gptj" else model.model.layers

        def replace(module: Any, args: Any, output: Any) -> Any:
            whole = before + vector
            return whole if isinstance(output, torch.Tensor) else (whole, *output[1:])

        handle = blocks[1].register_forward_hook(replace)
        expected = model(ids).logits
        handle.remove()
        assert torch.allclose(logits, expected, atol=1e-6)
        assert not torch.allclose(logits, model(ids).logits)


def test_rewards_of_both_objectives(compare: ModuleType) -> None:
    bench = TinyBench()
    bench.reward = lambda *given: compare.Bench.reward(bench, *given)
    steered = helpers.fsrl_model()

    def log_probabilities(model: Any, row: dict[str, str], side: str) -> torch.Tensor:
        ids, n_prompt = sequences(row, side)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return torch.stack([logits[t - 1, ids[t]] for t in range(n_prompt, len(ids))])

    simpo, dpo = [], []
    for row in bench.train:
        ours = [log_probabilities(steered, row, side) for side in ("chosen", "rejected")]
        theirs = [log_probabilities(bench.base, row, side) for side in ("chosen", "rejected")]
        simpo.append(10 * (ours[0].mean() - ours[1].mean()))
        gained = [float((a - b).sum()) for a, b in zip(ours, theirs, strict=True)]
        dpo.append(0.1 * (gained[0] - gained[1]))
    for objective, expected in (("simpo", simpo), ("dpo", dpo)):
        margins = compare.Bench.margins(bench, steered, bench.train, objective)
        assert margins.tolist() == pytest.approx([float(each) for each in expected], abs=1e-4)
        shift = 5.0 if objective == "simpo" else 0.0
        losses = [math.log1p(math.exp(shift - float(margin))) for margin in expected]
        loss = compare.Bench.losses(bench, margins, objective).mean().item()
        assert loss == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_reft_moves_within_its_subspace_alone(compare: ModuleType) -> None:
    torch.manual_seed(0)
    reft, x = compare.Reft(5, 2), torch.randn(3, 5)
    rows = reft.rotation.weight
    assert torch.allclose(rows @ rows.T, torch.eye(2), atol=1e-5)
    changed = reft(x)
    assert torch.allclose(changed @ rows.T, reft.source(x), atol=1e-5)
    # Whatever is orthogonal to both rows stays as it was.
    basis = torch.linalg.qr(torch.cat([rows.T, torch.randn(5, 3)], 1)).Q
    assert torch.allclose(changed @ basis[:, 2:], x @ basis[:, 2:], atol=1e-5)
    model = helpers.tiny_model()
    before = model(helpers.token_ids()).logits
    compare.install_reft(model, 1, 2)
    assert not torch.allclose(model(helpers.token_ids()).logits, before)
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"reft"}


class SteeringBench(TinyBench):
    """What training a vector needs of a bench, too."""

    def __init__(self, compare: ModuleType, folder: Path) -> None:
        super().__init__()
        helpers.tiny_sae("jumprelu").save_model(folder)
        self.sae, self.layer, self.seed = str(folder), 1, 0
        for name in ("batch_size", "accumulation"):
            setattr(self.args, name, 2)
        self.args.l1_coeff, self.args.l1_coeff_dpo, self.args.map_features = 0.3, 0.3, 7
        for name in ("reward", "losses"):
            setattr(self, name, getattr(compare.Bench, name).__get__(self))

    def load_base(self) -> Any:
        return helpers.tiny_model()


@pytest.mark.parametrize("in_features", [False, True])
def test_a_vector_serves_the_preference_in_both_directions(
    compare: ModuleType, tmp_path: Path, in_features: bool
) -> None:
    bench = SteeringBench(compare, tmp_path)
    steering, vector = compare.train_vector(bench, "simpo", in_features, 0.3, 30)
    margins = []
    for sign in (1, 0, -1):
        with steering.adding(sign * vector):
            found = compare.Bench.margins(bench, steering.model, bench.train, "simpo")
        margins.append(found.mean().item())
    assert margins[0] > margins[1] + 0.1 > margins[2] + 0.2
    assert bool((vector == 0).any()) == in_features
    assert all(not p.requires_grad for p in steering.model.parameters())


def test_conditional_differences_against_a_loop(compare: ModuleType, tmp_path: Path) -> None:
    bench = SteeringBench(compare, tmp_path)
    steering, acting, n = compare.conditional_differences(bench)
    assert n == 7 * 7
    sae, states = steering.sae, {"chosen": [], "rejected": []}
    for row in bench.train.select(range(5)):
        for side, found in states.items():
            ids, n_prompt = sequences(row, side)
            with torch.no_grad():
                hidden = bench.base(torch.tensor([ids]), output_hidden_states=True).hidden_states
            found.append(hidden[2][0, n_prompt:])
    f = {side: sae.encode(torch.cat(found)) for side, found in states.items()}
    kept = (f["chosen"].mean(0) - f["rejected"].mean(0)).abs().topk(7).indices.tolist()
    x = bench.base(helpers.token_ids(), output_hidden_states=True).hidden_states[2]
    expected = torch.zeros(*x.shape[:2], sae.n_features)
    for place in [(b, t) for b in range(x.shape[0]) for t in range(x.shape[1])]:
        active = [i for i in kept if sae.encode(x[place][None])[0, i] > 0]
        for j in active:
            total = 0.0
            for i in active:
                sides = [f[side][f[side][:, i] > 0, j] for side in ("chosen", "rejected")]
                if all(map(len, sides)):
                    total += float(sides[0].mean() - sides[1].mean())
            expected[(*place, j)] = 2.0 * total / len(active)
    seen = []
    with torch.no_grad(), acting(2.0), observe(steering.steered, seen.append):
        steering.steered(helpers.token_ids())
    assert expected.abs().sum() > 0
    assert torch.allclose(seen[0].steering_vector, expected, atol=1e-5)


def test_several_seeds_are_a_mean_and_a_deviation(compare: ModuleType) -> None:
    known = {"objective": "simpo", "method": "LoRA", "parameters": 7, "l0": None, "search": ""}
    figures = {"accuracy": 0.5, "margin": -1.0, "kl": 0.0, "perplexity": 2.0, "seconds": 1.0}
    figures |= {"repetition": 0.0, "length": 9.0}
    rows = [
        compare.Row(seed=seed, loss=1.0 + seed, setting=f"learning rate {seed}", **known, **figures)
        for seed in (0, 2)
    ]
    line = compare.render(rows).splitlines()[2]
    assert line.startswith("| LoRA | 7 | learning rate 0 / learning rate 2 | 2.000 ± 1.414 | ")
    assert " | -1.00 ± 0.00 |  | " in line
    assert " ± " not in compare.render(rows[:1])


def test_a_comparison_of_a_few_steps(
    compare: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(compare, "SCALES", (1.0,))
    monkeypatch.setattr(compare, "GROWTH", 0)
    names = ["base", "FSRL", "LoRA, one layer, FSRL's rank", "static SAE features"]
    compare.main([*options(tmp_path, objective="simpo"), "--methods", *names])
    table = list(csv.DictReader((tmp_path / "compare.csv").read_text().splitlines()))
    assert [row["method"] for row in table] == names
    base, fsrl, lora, static = table
    assert (float(base["kl"]), base["parameters"], base["l0"]) == (0, "0", "")
    assert int(fsrl["parameters"]) == 384 * 96 + 384 + 384
    assert int(lora["parameters"]) == round(float(fsrl["l0"])) * (256 + 96)
    assert min(float(row["kl"]) for row in (fsrl, lora, static)) > 0
    assert min(float(row["l0"]) for row in (fsrl, static)) > 100
    text = (tmp_path / "compare.md").read_text()
    assert text.strip() in capsys.readouterr().out
    for row in table:
        assert f"| {row['method']} | {int(row['parameters']):,} |" in text

    curves = [path.name for path in (tmp_path / "curves").iterdir()]
    assert sorted(curves) == ["simpo.FSRL.0", "simpo.LoRA__one_layer__FSRL_s_rank.0"]
    assert (tmp_path / "curves_simpo.png").stat().st_size > 1000

    others = ["base", "full fine-tuning"]
    compare.main([*options(tmp_path, objective="dpo"), "--methods", *others])
    base, full = json.loads((tmp_path / "compare.json").read_text())
    assert base["loss"] == pytest.approx(math.log(2))
    assert base["accuracy"] == 0.5
    assert full["parameters"] == 458_976
    assert full["kl"] > 0

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a finished row was made again")

    monkeypatch.setattr(compare.Bench, "measure", never)
    compare.main([*options(tmp_path, objective="simpo"), "--methods", *names])
    assert (tmp_path / "compare.md").read_text() == text
    with pytest.raises(SystemExit, match="rows of other settings"):
        compare.main(options(tmp_path, steps=3))


def test_bfloat16_measures_what_it_has_trained(compare: ModuleType, tmp_path: Path) -> None:
    """A cache of cast weights would outlive the steps, and measure the base model."""
    found = []
    for more in ([], ["--bf16"]):
        out = tmp_path / f"run{len(found)}"
        given = options(out, objective="simpo", steps=8)
        compare.main([*given, *more, "--methods", "base", "full fine-tuning"])
        found.append(json.loads((out / "compare.json").read_text()))
    (base, full), (base_16, full_16) = found
    assert base_16["loss"] == pytest.approx(base["loss"], rel=0.02)
    assert full_16["margin"] == pytest.approx(full["margin"], rel=0.1)
    assert full["kl"] > 10 * base_16["kl"]
    assert full_16["kl"] == pytest.approx(full["kl"], rel=0.3)
