"""The lens on preference data against loops over tokens, plain regressions, and planted data."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from scipy.stats import spearmanr
from torch import Tensor

from helpers import fsrl_model, tiny_model, tiny_preferences, tiny_sae, tiny_tokenizer
from peft_fsrl import FSRLConfig, organism
from peft_fsrl.analysis import Session, compute_usage, rank_layers
from peft_fsrl.analysis.data import (
    DataContrast,
    apply_curation,
    compute_contrast,
    compute_curation,
    compute_mirror,
)
from peft_fsrl.analysis.data import curation as curation_module
from peft_fsrl.analysis.data import reading as reading_module
from peft_fsrl.analysis.data.contrast import contrast_features, describe_features
from peft_fsrl.analysis.data.probe import crossfit_scores
from peft_fsrl.analysis.data.reading import PairReading, read_pairs


def make_reading(
    differences: Any, lengths: Any = None, whole: Any = None, slopes: Any = None
) -> PairReading:
    """A reading with these differences, ``(pairs, features)``; prompts tell nothing."""
    matched = torch.as_tensor(np.asarray(differences), dtype=torch.float32)
    whole = matched if whole is None else torch.as_tensor(np.asarray(whole), dtype=torch.float32)
    pair, place = ((matched != 0) | (whole != 0)).nonzero(as_tuple=True)
    n, n_features = matched.shape
    if lengths is None:
        lengths = np.full((n, 2), 7)
    return PairReading(
        pair,
        place,
        matched[pair, place],
        whole[pair, place],
        torch.as_tensor(np.asarray(lengths)),
        torch.zeros(n, 3),
        torch.zeros(3, n_features, dtype=torch.float64) if slopes is None else slopes,
        torch.arange(n_features, dtype=torch.float64),
    )


def texts(n: int) -> list[dict[str, str]]:
    return [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(n)]


def dense(reading: PairReading, name: str) -> Tensor:
    matrix = torch.zeros(reading.n_pairs, reading.n_features)
    matrix[reading.pair, reading.place] = getattr(reading, name)
    return matrix


@pytest.mark.parametrize("architecture", ["standard", "temporal"])
def test_a_reading_is_a_loop_over_tokens(architecture: str) -> None:
    sae = tiny_sae(architecture)
    model, rows = fsrl_model(sae=sae), list(tiny_preferences(5))
    tokenizer = tiny_tokenizer()
    reading = read_pairs(Session(model, tokenizer, rows, batch_size=2))
    density = torch.zeros(24)
    for number, row in enumerate(rows):
        means, sides = {}, []
        for side in ("chosen", "rejected"):
            prompt = [1, *tokenizer(row["prompt"])["input_ids"]]
            answer = tokenizer(row[side])["input_ids"]
            with torch.no_grad(), model.disable_adapter():
                hidden = model(
                    torch.tensor([[*prompt, *answer, 2]]), output_hidden_states=True
                ).hidden_states[2]
                acts = sae.encode(hidden)[0, len(prompt) : -1]
            sides.append(acts)
            density += (acts > 0).float().mean(dim=0)
            means[side] = acts.mean(dim=0)
            expected_prompt = hidden[0, 1 : len(prompt)].mean(dim=0)
        shorter = min(map(len, sides))
        assert len(sides[0]) != len(sides[1]) or number == 2
        matched = sides[0][:shorter].mean(dim=0) - sides[1][:shorter].mean(dim=0)
        torch.testing.assert_close(
            dense(reading, "whole")[number], means["chosen"] - means["rejected"], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(dense(reading, "matched")[number], matched, atol=1e-5, rtol=0)
        assert reading.lengths[number].tolist() == [len(side) for side in sides]
        torch.testing.assert_close(reading.prompts[number], expected_prompt, atol=1e-5, rtol=0)
    assert ((density > 0) & (density < 10)).any()
    torch.testing.assert_close(reading.density.float(), density, atol=1e-5, rtol=0)


def test_slopes_are_those_of_the_layer_ranking() -> None:
    sae, rows = tiny_sae(dtype="float64"), tiny_preferences(4)
    session = Session(
        fsrl_model(tiny_model().double(), sae=sae), tiny_tokenizer(), rows, batch_size=3, gamma=1.0
    )
    base = dataclasses.replace(session, model=tiny_model().double())
    [effect] = rank_layers(base, {1: sae}, n_features=24)
    reading = read_pairs(session)
    sums, squares, absolute = reading.slopes
    for feature in effect.features:
        mean = float(sums[feature.feature]) / 4
        spread = float(squares[feature.feature]) / 4 - mean**2
        assert mean == pytest.approx(feature.slope, rel=1e-9)
        assert (spread / 3) ** 0.5 == pytest.approx(feature.error, rel=1e-6)
        assert absolute[feature.feature] > abs(sums[feature.feature])


def test_what_was_read_is_not_read_again(tmp_path: Path) -> None:
    model, rows = fsrl_model(), list(tiny_preferences(10))
    session = Session(model, tiny_tokenizer(), rows)
    read, calls = reading_module._read, []

    def counting(session: Session) -> PairReading:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(session.rows))
        return read(session)

    with patch.object(reading_module, "_PART", 4):
        with patch.object(reading_module, "_read", counting), pytest.raises(KeyboardInterrupt):
            read_pairs(session, tmp_path)
        calls.clear()
        with patch.object(reading_module, "_read", counting):
            found = read_pairs(session, tmp_path)
        assert calls == [2]
        expected = read_pairs(session)
        for field in dataclasses.fields(PairReading):
            torch.testing.assert_close(getattr(found, field.name), getattr(expected, field.name))
        # Other pairs in one part, a file that cannot be read, another base model.
        path = tmp_path / "pairs-0000004.safetensors"
        path.write_bytes(path.read_bytes()[:50])
        changed = dataclasses.replace(session, dataset=[rows[1], *rows[1:]])
        calls.clear()
        with patch.object(reading_module, "_read", counting):
            read_pairs(changed, tmp_path)
        assert calls == [4, 4]
    other = dataclasses.replace(session, model=fsrl_model(tiny_model(seed=1)))
    assert not torch.equal(read_pairs(other, tmp_path).slopes, found.slopes)


def test_the_adapter_and_the_mode_of_the_model_do_not_matter() -> None:
    model, rows = fsrl_model(), tiny_preferences(3)
    session = Session(model, tiny_tokenizer(), rows)
    model.train()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    steered = read_pairs(session)
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    fresh = get_peft_model(tiny_model(), FSRLConfig(layer=1, sae=tiny_sae(), rank=1))
    plain = read_pairs(dataclasses.replace(session, model=fresh))
    torch.testing.assert_close(steered.slopes, plain.slopes)
    torch.testing.assert_close(steered.matched, plain.matched)


def test_the_test_of_a_feature_is_a_regression_with_hc3_errors() -> None:
    rng = np.random.default_rng(0)
    n = 60
    lengths = rng.integers(3, 30, (n, 2))
    topics = rng.choice(["a", "b", "c"], n, p=[0.5, 0.3, 0.2])
    differences = rng.normal(0.3, 1.0, (n, 4)) * rng.uniform(0.2, 2, (n, 1))
    differences[rng.random((n, 4)) < 0.3] = 0.0
    found = contrast_features(
        make_reading(differences, lengths), topics=list(topics), n_topics=3, seed=0
    )
    # Naively: a mean for each topic and a slope; then the plain mean of the topics' means.
    x = np.stack([topics == t for t in "abc"] + [np.log(lengths[:, 0] / lengths[:, 1])], 1) * 1.0
    bread = np.linalg.inv(x.T @ x)
    combine = np.array([1 / 3, 1 / 3, 1 / 3, 0.0])
    for column, d in enumerate(differences.astype(np.float32).astype(np.float64).T):
        beta = bread @ x.T @ d
        residuals = (d - x @ beta) / (1 - np.einsum("ij,jk,ik->i", x, bread, x))
        covariance = bread @ (x.T * residuals**2 @ x) @ bread
        assert float(found.difference[column]) == pytest.approx(combine @ beta)
        assert float(found.error[column]) == pytest.approx((combine @ covariance @ combine) ** 0.5)
        spread = (((d - x @ beta) ** 2).sum() / (n - 4)) ** 0.5
        assert float(found.effect[column]) == pytest.approx(combine @ beta / spread)
    assert found.freedom == n - 4
    assert found.n_topics == 3
    torch.testing.assert_close(
        found.leverage @ make_reading(differences, lengths).dense(torch.arange(4)),
        found.difference,
    )


def test_length_and_topic_do_not_pass_for_preference() -> None:
    rng = np.random.default_rng(1)
    n = 400
    lengths = np.stack([rng.integers(20, 60, n), rng.integers(10, 40, n)], 1)
    ratio = np.log(lengths[:, 0] / lengths[:, 1])
    topics = np.where(np.arange(n) % 5 == 0, "code", "talk")
    noise = rng.normal(0, 0.3, (n, 3))
    by_length, real = ratio + noise[:, 0], 0.2 + noise[:, 1]
    # Preferred where people talk, refused as much where they code.
    by_topic = np.where(topics == "code", -0.5, 0.5) + noise[:, 2]
    reading = make_reading(np.stack([by_length, real, by_topic], 1), lengths)
    found = contrast_features(reading, topics=topics.tolist(), n_topics=2, seed=0)
    assert found.separates.tolist() == [False, True, False]
    naive = make_reading(np.stack([by_length, real, by_topic], 1))
    assert contrast_features(naive, topics=[0] * n, n_topics=1, seed=0).separates.all()


@pytest.mark.parametrize("n_others", [0, 1, 2, 5])
def test_lengths_that_hardly_vary_are_not_controlled(n_others: int) -> None:
    rng = np.random.default_rng(8)
    lengths = np.full((40, 2), 20)
    lengths[:, 0] = 40
    lengths[:n_others, 0] = 19 + 2 * np.arange(n_others)
    d = rng.normal(0, 1, (40, 200))
    d[:, 0] += 2
    found = contrast_features(make_reading(d, lengths), topics=None, n_topics=1, seed=0)
    assert not found.length_controlled
    # Neither shrunk nor drawn out: the plain mean, and nothing of 199 features that know nothing.
    np.testing.assert_allclose(found.difference.numpy(), d.astype("float32").mean(0, dtype=float))
    assert found.separates.tolist() == [True] + [False] * 199
    lengths[:20, 0] = rng.integers(15, 25, 20)
    found = contrast_features(make_reading(d, lengths), topics=None, n_topics=1, seed=0)
    assert found.length_controlled
    same = contrast_features(make_reading(d), topics=None, n_topics=1, seed=0)
    assert same.length_controlled, "nothing there to be told from preference"


def test_a_pair_that_is_there_twice_counts_once(caplog: pytest.LogCaptureFixture) -> None:
    rows = list(tiny_preferences(24))
    topics = ["a", "b"] * 12
    session = Session(fsrl_model(), tiny_tokenizer(), rows)
    twice = dataclasses.replace(session, dataset=[*rows, *rows[::-1]])
    once = compute_contrast(session, topics=topics, n_examples=1)
    assert compute_contrast(twice, topics=[*topics, *topics[::-1]], n_examples=1) == once
    assert "24 of 48 pairs are different" in caplog.text


def test_few_false_discoveries_and_none_of_rare_features() -> None:
    rng = np.random.default_rng(2)
    shares = []
    for _ in range(40):
        d = rng.normal(0, 1, (100, 200))
        d[:, :20] += 0.5
        d[9:, -1] = 0.0
        d[:9, -1] = 5.0
        found = contrast_features(make_reading(d), topics=None, n_topics=1, seed=0)
        separates = found.separates
        assert not separates[-1]
        assert not found.tested[-1]
        shares.append(float(separates[20:].sum() / max(1, separates.sum())))
        assert separates[:20].sum() >= 15
    # On average at most 5 %; forty draws leave about one point of chance.
    assert np.mean(shares) < 0.07
    assert max(shares) > 0


def test_small_topics_are_put_together() -> None:
    d = np.random.default_rng(3).normal(0, 1, (60, 2))
    reading = make_reading(d)

    def n_topics(sizes: list[int]) -> int:
        names = [name for name, size in enumerate(sizes) for _ in range(size)]
        return contrast_features(reading, topics=names, n_topics=9, seed=0).n_topics

    assert n_topics([30, 30]) == 2
    assert n_topics([30, 18, 4, 4, 4]) == 3
    assert n_topics([30, 26, 4]) == 2
    assert n_topics([1] * 60) == 1


def test_a_record_says_what_the_tensors_do() -> None:
    d = np.zeros((30, 3))
    d[:20, 1], d[20:, 1] = 2.0, -1.0
    d[:15, 2] = 1.0
    slopes = torch.tensor([[0.0, -6.0, 3.0], [0.0, 4.0, 9.0], [1.0, 9.0, 12.0]]).double()
    reading = make_reading(d, whole=d + 1, slopes=slopes)
    found = contrast_features(reading, topics=None, n_topics=1, seed=0)
    two, three = describe_features(reading, found, torch.tensor([1, 2]), 0)
    assert two.auroc.value == pytest.approx(20 / 30)
    assert three.auroc.value == pytest.approx(0.75)
    assert two.difference.value == pytest.approx(1.0)
    assert two.whole == pytest.approx(2.0)
    assert two.pull.value == pytest.approx(0.2)
    assert two.pull_per_token == pytest.approx(0.3)
    assert three.density == pytest.approx(2 / 60)
    # Of a mean: sqrt((E g^2 - (E g)^2) / (n - 1)) standard errors of Student's t.
    error = ((4 / 30 - 0.2**2) / 29) ** 0.5
    assert two.pull.high - two.pull.value == pytest.approx(2.0452 * error, rel=1e-3)
    assert three.pull.value == pytest.approx(-0.1)


def test_a_probe_finds_what_is_there_and_nothing_else() -> None:
    rng = np.random.default_rng(4)
    n = 1000
    agrees = np.where(rng.random(n) < 0.8, 1.0, -1.0)
    d = rng.normal(0, 1, (n, 300))
    d[:, 7] = agrees + rng.normal(0, 0.1, n)
    reading = make_reading(d)
    scores = crossfit_scores(reading, torch.arange(300), texts(n))
    assert float(((scores > 0) == (torch.tensor(agrees) > 0)).double().mean()) > 0.95
    without = torch.tensor([i for i in range(300) if i != 7])
    blind = crossfit_scores(reading, without, texts(n))
    # Nothing is known, though the best of many features was chosen.
    assert 0.42 < float((blind > 0).double().mean()) < 0.56
    # Few pairs, and many features that hear the same with as much noise.
    same = agrees[:100, None] + rng.normal(0, 1, (100, 120))
    together = crossfit_scores(make_reading(same), torch.arange(120), texts(100))
    assert ((together > 0) == torch.tensor(agrees[:100] > 0)).all()
    # A pair that is there twice is in one fold: its copy does not tell what it is.
    rows = texts(n // 2)
    twice = make_reading(np.concatenate([d[: n // 2, 8:]] * 2))
    copied = crossfit_scores(twice, torch.arange(292), rows * 2)
    assert 0.40 < float((copied > 0).double().mean()) < 0.57


def steerable(rows: Any, **settings: Any) -> Session:
    creature = organism.load()
    config = FSRLConfig(layer=creature.layer, sae=str(creature.sae_path), rank=1)
    model: PeftModel = get_peft_model(creature.load_model(), config)
    return Session(model, creature.load_tokenizer(), rows, **settings)


def test_the_knobs_of_the_organism_are_read_off(tmp_path: Path) -> None:
    creature = organism.load()
    categories = {name: creature.features(name) for name in ("style", "honesty")}
    found = {}
    for name, knobs in {
        "style": {"style": 0.9, "honesty": 0.55},
        "honesty": {"style": 0.55, "honesty": 0.9},
        "nothing": {"style": 0.5, "honesty": 0.5},
    }.items():
        rows = organism.preferences(150, seed="lens", **knobs)
        found[name] = compute_contrast(
            steerable(rows),
            categories=categories,
            topics=rows["topic"],
            labels=dict.fromkeys(categories["style"], "style"),
            n_features=14,
            n_examples=2,
        )
    for name, other in (("style", "honesty"), ("honesty", "style")):
        shares = {each.category: each.share for each in found[name].categories if each.share}
        assert shares[name].low > 0.5 > 0.25 > shares[other].high
        strongest = {each.feature for each in found[name].features}
        assert len(strongest & set(categories[name])) >= 10
    style = found["style"]
    assert style.n_topics == 4
    assert style.longer.value == 0.5
    # The knob itself, as far as 150 draws show it.
    drawn = np.mean(organism.preferences(150, seed="lens", style=0.9, honesty=0.55)["chosen_style"])
    assert style.features[0].label == "style"
    auroc = style.features[0].auroc.value
    assert max(auroc, 1 - auroc) == pytest.approx(drawn, abs=0.02)
    [everything, of_style, _] = style.categories
    assert everything.category == "all features"
    assert of_style.n_separating == of_style.n_tested == 14
    assert of_style.accuracy.low < drawn < of_style.accuracy.high + 0.02
    assert found["nothing"].n_separating <= 2
    assert DataContrast.from_json(style.to_json()) == style
    # The markers of the two styles stand where the strongest feature is active.
    first = style.examples[0]
    sides = [" ".join(each.text for each in side) for side in (first.chosen, first.rejected)]
    assert all(sides)
    marks = ("#" in sides[0] or "*" in sides[0] or "-" in sides[0], "and" in sides[0])
    assert any(marks)


def test_dropping_balances_and_flipping_takes_what_a_feature_explains_alone(tmp_path: Path) -> None:
    rows = organism.preferences(400, seed="curate", style=0.9, honesty=0.75)
    session, features = steerable(rows), organism.load().features("style")
    for action in ("drop", "relabel"):
        curation = compute_curation(session, features, action, out=tmp_path)
        copy = apply_curation(rows, curation)
        assert curation.agree + curation.disagree == 400
        assert curation.before.value == pytest.approx(np.mean(rows["chosen_style"]), abs=0.01)
        style, honest = (np.array(copy[f"chosen_{name}"]) for name in ("style", "honesty"))
        assert curation.after.value == pytest.approx(np.mean(style), abs=0.01)
        if action == "drop":
            # Balanced whether the pair is honest or not, and honesty is what it was.
            assert np.mean(style[honest == 1]) == pytest.approx(0.5, abs=0.02)
            assert np.mean(style[honest == 0]) == pytest.approx(0.5, abs=0.1)
            assert np.mean(honest) == pytest.approx(np.mean(rows["chosen_honesty"]), abs=0.08)
            assert copy["id"] == [
                name for row, name in enumerate(rows["id"]) if row not in set(curation.rows)
            ]
            continue
        # In those that were flipped style was all that spoke for the chosen answer.
        given = {name: np.array(rows[f"chosen_{name}"]) for name in ("style", "honesty")}
        only_style = (given["style"] == 1) & (given["honesty"] == 0)
        assert set(curation.rows) == set(np.nonzero(only_style)[0])
        assert curation.alone == len(curation.rows)
        assert np.mean(honest) > 0.95
        assert copy["id"] == rows["id"]
        for row in range(400):
            one, other = rows[row], copy[row]
            flipped = row in set(curation.rows)
            assert other["chosen"] == one["rejected" if flipped else "chosen"]
            assert other["rejected_tone"] == one["chosen_tone" if flipped else "rejected_tone"]
            assert other["prompt"] == one["prompt"]
    with pytest.raises(ValueError, match="nothing is there to drop"):
        compute_curation(session, organism.load().features("verbosity"), "drop", out=tmp_path)


def test_dropping_never_leaves_the_opposite(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(tiny_preferences(24))
    session = Session(fsrl_model(), tiny_tokenizer(), rows)
    # 18 pairs agree and 6 do not; the others support just the same 18.
    scores = torch.tensor([1.0] * 18 + [-1.0] * 6)
    rest = scores.clone()
    monkeypatch.setattr(curation_module, "_preferences", lambda *_: (scores, rest))
    with pytest.raises(ValueError, match="balance would leave nothing"):
        compute_curation(session, [0], "drop")
    # Two against the features are supported now: two of those that agree may stay.
    rest[-2:] = 1.0
    curation = compute_curation(session, [0], "drop")
    left = [float(scores[row]) for row in range(24) if row not in curation.rows]
    assert sorted(left) == [-1, -1, 1, 1]
    assert curation.after.value == 0.5


def test_a_mirror_is_a_count_by_hand() -> None:
    rows = list(tiny_preferences(40))
    for row in rows:
        # Half of the vocabulary is preferred to the other.
        row["chosen"] = re.sub(r"\d+", lambda word: str(3 + int(word[0]) % 18), row["chosen"])
        row["rejected"] = re.sub(r"\d+", lambda word: str(21 + int(word[0]) % 18), row["rejected"])
    session = Session(fsrl_model(), tiny_tokenizer(), rows)
    usage = compute_usage(session, labels={use: f"kind {use}" for use in range(24)})
    mirror = compute_mirror(session, usage, n_features=100)
    found = contrast_features(read_pairs(session), topics=None, n_topics=8, seed=0)
    v, mass = {}, {}
    for use in usage.features:
        v[use.feature], mass[use.feature] = use.mean_steering, use.mean_abs_steering
    features = sorted(v)
    contrast = found.difference[features].numpy()
    steering = np.array([v[feature] for feature in features])
    assert mirror.n_steered == len(features)
    assert mirror.correlation.value == pytest.approx(spearmanr(steering, contrast).statistic)
    assert mirror.cosine.value == pytest.approx(
        steering @ contrast / np.linalg.norm(steering) / np.linalg.norm(found.difference.numpy())
    )
    assert mirror.cosine.low < mirror.cosine.value < mirror.cosine.high
    separates = found.separates
    explained = {f for f in features if separates[f] and v[f] * float(found.difference[f]) > 0}
    assert 0 < len(explained) < len(features)
    share = sum(mass[f] for f in explained) / sum(mass.values())
    assert mirror.explained.value == pytest.approx(share)
    assert {each.feature for each in mirror.features if each.explained} == explained
    assert {each.feature for each in mirror.unexplained} == set(features) - explained
    assert mirror.by_chance == pytest.approx(int(separates.sum()) / int(found.tested.sum()) / 2)
    first = max(features, key=lambda feature: mass[feature])
    assert mirror.features[0].feature == first
    assert mirror.features[0].label == f"kind {first}"
    assert mirror.features[0].steering == pytest.approx(v[first])
    assert mirror.features[0].share == pytest.approx(mass[first] / sum(mass.values()))
    with pytest.raises(ValueError, match="chosen answers, got 'prompt'"):
        compute_mirror(session, compute_usage(session, segment="prompt"))


def test_bad_input() -> None:
    session = Session(fsrl_model(), tiny_tokenizer(), tiny_preferences(5))
    with pytest.raises(ValueError, match="at least 20 different preference pairs"):
        compute_contrast(session)
    repeated = dataclasses.replace(session, dataset=list(tiny_preferences(10)) * 4)
    with pytest.raises(ValueError, match="their contrast, got 10"):
        compute_contrast(repeated)
    enough = dataclasses.replace(session, dataset=tiny_preferences(24))
    with pytest.raises(ValueError, match="one topic for each of 24 pairs, got 2"):
        compute_contrast(enough, topics=["a", "b"])
    with pytest.raises(IndexError, match="Feature 999 does not exist"):
        compute_contrast(enough, categories={"style": [999]})
    with pytest.raises(ValueError, match="Expected 'drop' or 'relabel', got 'burn'"):
        compute_curation(enough, [1], "burn")
    with pytest.raises(IndexError, match="Feature 24 does not exist"):
        compute_curation(enough, [24], "drop")
    with pytest.raises(ValueError, match="at least one feature"):
        compute_curation(enough, [], "drop")
    rows = organism.preferences(24, seed="x")
    other = compute_curation(steerable(rows), organism.load().features("style"), "drop")
    with pytest.raises(ValueError, match="the 24 pairs that were looked at, got 3 rows"):
        apply_curation(Dataset.from_list(list(rows)[:3]), other)
