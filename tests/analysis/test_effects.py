"""Ablation, single features and limited steering against the scores of edited models."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from statistics import fmean
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import helpers
from peft_fsrl.analysis import (
    FeatureAblations,
    PreferenceScores,
    Session,
    StaticDynamic,
    compare_static_dynamic,
    compute_gain,
    compute_usage,
    measure_categories,
    measure_features,
    score_by_length,
    score_preferences,
    statistics,
)
from peft_fsrl.analysis.ablation import draw_by_mass
from peft_fsrl.analysis.buckets import length_groups
from peft_fsrl.analysis.single import estimate_features
from peft_fsrl.steering import (
    ablate_features,
    edit_steering,
    observe,
    only_features,
    scale_steering,
    top_k_steering,
)
from peft_fsrl.training.tokens import tokenize

Rows = list[dict[str, str]]


@pytest.fixture
def model() -> PeftModel:
    return helpers.fsrl_model()


@pytest.fixture
def rows() -> Rows:
    """Eight pairs of unlike lengths."""
    return helpers.tiny_preferences(8).to_list()


def scores_of(lengths: Sequence[tuple[int, int]], margins: Sequence[float]) -> PreferenceScores:
    chosen, rejected = zip(*lengths, strict=True)
    return PreferenceScores(tuple(-m for m in margins), tuple(margins), chosen, rejected)


def test_scores_know_how_long_the_answers_are(model: PeftModel, rows: Rows) -> None:
    tokenizer = helpers.tiny_tokenizer()
    scores = score_preferences(Session(model, tokenizer, rows, batch_size=3))
    for side, lengths in (("chosen", scores.chosen_tokens), ("rejected", scores.rejected_tokens)):
        # One token per word, and EOS, which the loss counts.
        assert lengths == tuple(len(row[side].split()) + 1 for row in rows)


def test_ablation_scores_the_ablated_model(model: PeftModel, rows: Rows) -> None:
    tokenizer = helpers.tiny_tokenizer()
    usage = compute_usage(Session(model, tokenizer, rows))
    categories = {"style": [2, 5, 7], "honesty": [1, 4]}
    ablations = measure_categories(
        Session(model, tokenizer, rows, seed=1), categories, usage, n_random=3
    )
    assert [ablation.name for ablation in ablations] == ["style", "honesty"]
    assert [ablation.features for ablation in ablations] == [(2, 5, 7), (1, 4)]
    for ablation in ablations:
        with ablate_features(model, ablation.features):
            expected = score_preferences(Session(model, tokenizer, rows))
        assert ablation.scores == expected
        losses = [score.loss for score in ablation.same_count]
        assert ablation.control_loss == pytest.approx(sum(losses) / 3)
    assert ablations[0].scores != score_preferences(Session(model, tokenizer, rows))
    [first, _] = measure_categories(
        Session(model, tokenizer, rows), categories, usage, n_features=2
    )
    assert first.features == (2, 5)


def test_the_control_zeroes_steered_features_of_no_category(
    model: PeftModel, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_fsrl.analysis import ablation

    zeroed = []

    def record(model: PeftModel, features: Sequence[int]) -> AbstractContextManager[None]:
        zeroed.append(tuple(features))
        return ablate_features(model, features)

    tokenizer = helpers.tiny_tokenizer()
    usage = compute_usage(Session(model, tokenizer, rows))
    monkeypatch.setattr(ablation, "ablate_features", record)
    categories = {"style": [2, 5, 7], "honesty": [1, 4]}
    trained = score_preferences(Session(model, tokenizer, rows))
    measure_categories(
        Session(model, tokenizer, rows), categories, usage, n_random=4, trained=trained
    )
    steered = {use.feature for use in usage.features}
    style, honesty = zeroed.index((2, 5, 7)), zeroed.index((1, 4))
    controls = [*zeroed[style + 1 : style + 5], *zeroed[honesty + 1 : honesty + 5]]
    assert [len(set(draw)) for draw in controls] == [3] * 4 + [2] * 4
    assert set().union(*controls) <= steered - {1, 2, 4, 5, 7}
    assert len(set(controls)) > 2
    others = [draw for draw in zeroed if draw not in {(2, 5, 7), (1, 4)}]
    assert set().union(*others) <= steered - {1, 2, 4, 5, 7}


def test_ablation_refuses_sizes_it_cannot_match(model: PeftModel, rows: Rows) -> None:
    tokenizer = helpers.tiny_tokenizer()
    usage = compute_usage(Session(model, tokenizer, rows))
    with pytest.raises(ValueError, match="at least one category"):
        measure_categories(Session(model, tokenizer, rows), {}, usage)
    with pytest.raises(ValueError, match=r"each with 2 features.*'honesty': 1"):
        measure_categories(
            Session(model, tokenizer, rows), {"style": [1, 2], "honesty": [3]}, usage, n_features=2
        )


def test_effects_of_a_category_are_paired_differences(model: PeftModel, rows: Rows) -> None:
    tokenizer = helpers.tiny_tokenizer()
    usage = compute_usage(Session(model, tokenizer, rows))
    trained = score_preferences(Session(model, tokenizer, rows))
    [ablation] = measure_categories(
        Session(model, tokenizer, rows, seed=4),
        {"style": [2, 5, 7, 11]},
        usage,
        trained=trained,
        n_random=3,
    )

    def mean_difference(mine: Sequence[float], others: Sequence[float]) -> float:
        return fmean(a - b for a, b in zip(mine, others, strict=True))

    scores = ablation.scores
    assert ablation.rise.value == pytest.approx(mean_difference(scores.losses, trained.losses))
    assert ablation.rise == statistics.difference_interval(scores.losses, trained.losses, seed=4)
    assert ablation.rise.low < ablation.rise.value < ablation.rise.high
    assert ablation.accuracy_rise.value == pytest.approx(scores.accuracy - trained.accuracy)
    assert ablation.margin_rise.value == pytest.approx(scores.margin - trained.margin)
    for excess, draws in (
        (ablation.excess_count, ablation.same_count),
        (ablation.excess_mass, ablation.same_mass),
    ):
        assert len(draws) == 3
        assert excess is not None
        assert excess.value == pytest.approx(scores.loss - fmean(draw.loss for draw in draws))
    masses = {use.feature: use.mean_abs_steering for use in usage.features}
    assert ablation.mass == pytest.approx(sum(masses.get(i, 0) for i in (2, 5, 7, 11)) / usage.l1)
    assert sum(stratum.n for stratum in ablation.strata) == len(rows)
    assert len(ablation.strata) == 3
    weighted = sum(stratum.n * stratum.rise.value for stratum in ablation.strata) / len(rows)
    assert weighted == pytest.approx(ablation.rise.value)
    lengths = [(s.shortest, s.longest) for s in ablation.strata]
    assert lengths == sorted(lengths)
    assert all(a[1] < b[0] for a, b in pairwise(lengths))
    [alone] = measure_categories(
        Session(model, tokenizer, rows), {"style": [2]}, usage, trained=trained, n_random=0
    )
    assert alone.excess_count is None
    assert alone.excess_mass is None
    with pytest.raises(ValueError, match="has no control"):
        _ = alone.control_loss


def test_controls_of_equal_mass(
    model: PeftModel, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_fsrl.analysis import ablation as module

    zeroed: list[tuple[int, ...]] = []

    def record(model: PeftModel, features: Sequence[int]) -> AbstractContextManager[None]:
        zeroed.append(tuple(features))
        return ablate_features(model, features)

    monkeypatch.setattr(module, "ablate_features", record)
    tokenizer = helpers.tiny_tokenizer()
    usage = compute_usage(Session(model, tokenizer, rows))
    masses = {use.feature: use.mean_abs_steering / usage.l1 for use in usage.features}
    trained = score_preferences(Session(model, tokenizer, rows))
    small, large = list(masses)[:2], list(masses)[2:-2]
    assert sum(masses[i] for i in large) > 0.5
    options: dict[str, Any] = {"trained": trained, "n_random": 3}
    [first] = measure_categories(Session(model, tokenizer, rows), {"a": small}, usage, **options)
    draws = zeroed[-3:]
    assert len(set(draws)) == 3
    assert not set(small) & set().union(*draws)
    for draw, reached in zip(draws, first.random_masses, strict=True):
        assert reached == pytest.approx(sum(masses[i] for i in draw))
        assert reached == pytest.approx(first.mass, rel=0.1)
    # What is left cannot weigh as much: all of it is zeroed, once, and it says how much that is.
    [second] = measure_categories(Session(model, tokenizer, rows), {"b": large}, usage, **options)
    rest = set(masses) - set(large)
    assert set(zeroed[-1]) == rest
    assert second.random_masses == pytest.approx((sum(masses[i] for i in rest),))
    assert second.random_masses[0] < 0.5 * second.mass
    with ablate_features(model, rest):
        assert second.same_mass == (score_preferences(Session(model, tokenizer, rows)),)
    # A category that is never steered weighs nothing, and so does its control.
    never = sorted(set(range(helpers.D_SAE)) - set(masses))
    silent = (
        measure_categories(Session(model, tokenizer, rows), {"c": never}, usage, **options)
        if never
        else ()
    )
    for ablation in silent:
        assert ablation.mass == 0.0
        assert set(ablation.same_mass) == {trained}


def test_draws_come_near_the_mass_and_differ() -> None:
    rng = random.Random(0)
    pool = {i: rng.lognormvariate(0, 1.5) for i in range(200)}
    target = 0.3 * sum(pool.values())
    draws = draw_by_mass(pool, target, 20, rng)
    assert len({tuple(sorted(draw)) for draw in draws}) == 20
    for draw in draws:
        assert len(set(draw)) == len(draw)
        assert sum(pool[i] for i in draw) == pytest.approx(target, rel=1e-3)
    # Every feature has its chance, the heavy ones too.
    assert set().union(*draw_by_mass(pool, target, 60, rng)) == set(pool)
    assert draw_by_mass(pool, 1e9, 5, rng) == [list(pool)]
    assert draw_by_mass({}, 1.0, 5, rng) == []
    assert draw_by_mass(pool, 0.0, 2, rng) == [[], []]


def test_ablation_needs_the_use_on_chosen_answers(model: PeftModel, rows: Rows) -> None:
    tokenizer = helpers.tiny_tokenizer()
    usage = compute_usage(Session(model, tokenizer, rows), segment="prompt")
    with pytest.raises(ValueError, match="got 'prompt'"):
        measure_categories(Session(model, tokenizer, rows), {"a": [1]}, usage)
    with pytest.raises(ValueError, match="got 'prompt'"):
        compare_static_dynamic(Session(model, tokenizer, rows), usage)


@contextmanager
def scaled_update(model: PeftModel, sae: Any, scale: Tensor) -> Iterator[None]:
    """``x' = x + (relu(f + v) - f) * scale @ W_dec``, in place of what the layer made."""
    events: list[Any] = []

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        event = events.pop()
        f = sae.encode(event.hidden_states)
        update = torch.relu(f + event.steering_vector) - f
        return event.hidden_states + (update * scale) @ sae.W_dec

    handle = helpers.only_layer(model).base_layer.register_forward_hook(hook)
    try:
        with observe(model, events.append):
            yield
    finally:
        handle.remove()


def test_estimates_are_the_slopes_of_the_loss(rows: Rows) -> None:
    tokenizer, sae = helpers.tiny_tokenizer(), helpers.tiny_sae()
    for parameter in sae.parameters():
        parameter.requires_grad_(False)
    # Llama's norms compute in float32 whatever happens; GPT-2's do not.
    model = helpers.fsrl_model(helpers.tiny_model("gpt2"), sae=sae).double()
    double = helpers.tiny_sae(dtype="float64")
    with torch.no_grad():
        for mine, theirs in zip(double.parameters(), sae.parameters(), strict=True):
            mine.copy_(theirs)
    estimates = estimate_features(
        Session(model, tokenizer, rows, beta=3.0, gamma=1.0, batch_size=3)
    )

    def loss(scale: Tensor) -> float:
        with scaled_update(model, double, scale):
            return score_preferences(Session(model, tokenizer, rows, beta=3.0, gamma=1.0)).loss

    ones = torch.ones(helpers.D_SAE, dtype=torch.float64)
    step = 1e-4
    for feature in range(helpers.D_SAE):
        shift = torch.zeros_like(ones)
        shift[feature] = step
        # Zeroing takes the feature's share from 1 to 0.
        slope = (loss(ones - shift) - loss(ones + shift)) / (2 * step)
        assert float(estimates[feature]) == pytest.approx(slope, rel=1e-4, abs=1e-9)
    assert float(estimates.abs().max()) > 1e-3


def test_estimates_without_the_clamp_are_gradient_times_v(rows: Rows) -> None:
    tokenizer = helpers.tiny_tokenizer()
    model = helpers.fsrl_model(helpers.tiny_model("gpt2"), non_negative=False).double()
    estimates = estimate_features(Session(model, tokenizer, rows))

    def loss(feature: int, factor: float) -> float:
        def scale(v: Tensor, sae: Any) -> Tensor:
            return torch.cat(
                [v[..., :feature], factor * v[..., feature, None], v[..., feature + 1 :]], -1
            )

        with edit_steering(model, scale):
            return score_preferences(Session(model, tokenizer, rows)).loss

    for feature in (0, 7, 19):
        slope = (loss(feature, 1 - 1e-4) - loss(feature, 1 + 1e-4)) / 2e-4
        assert float(estimates[feature]) == pytest.approx(slope, rel=1e-4, abs=1e-9)


def test_single_features_are_measured_where_the_estimate_is_largest(
    model: PeftModel, rows: Rows
) -> None:
    tokenizer = helpers.tiny_tokenizer()
    usage = compute_usage(Session(model, tokenizer, rows), labels={3: "style"})
    trained = score_preferences(Session(model, tokenizer, rows))
    record = measure_features(
        Session(model, tokenizer, rows, batch_size=3), usage, n_features=5, n_listed=8
    )
    assert FeatureAblations.from_json(record.to_json()) == record
    assert record.n_pairs == len(rows)
    estimates = estimate_features(Session(model, tokenizer, rows))
    used = sorted((use.feature for use in usage.features), key=lambda i: -float(estimates[i]))
    assert [each.feature for each in record.features] == used[:8]
    for each in record.features[:5]:
        assert each.first_order == pytest.approx(float(estimates[each.feature]), abs=1e-6)
        with ablate_features(model, [each.feature]):
            scores = score_preferences(Session(model, tokenizer, rows))
        assert each.rise is not None
        assert each.rise.value == pytest.approx(scores.loss - trained.loss, abs=1e-6)
        assert each.rise.low <= each.rise.value <= each.rise.high
        assert each.label == ("style" if each.feature == 3 else None)
    assert all(each.rise is None for each in record.features[5:])
    pairs = [(each.first_order, each.rise.value) for each in record.features[:5] if each.rise]
    assert record.rank_correlation == statistics.spearman(*zip(*pairs, strict=True))
    assert record.slope == pytest.approx(
        sum(x * y for x, y in pairs) / sum(x * x for x, _ in pairs)
    )
    estimated = measure_features(Session(model, tokenizer, rows), usage, n_features=0, n_listed=8)
    assert [each.feature for each in estimated.features] == used[:8]
    assert (estimated.rank_correlation, estimated.slope) == (None, None)
    with pytest.raises(ValueError, match="at least one preference pair"):
        measure_features(Session(model, tokenizer, []), usage)


def test_estimating_leaves_the_model_as_it_was(model: PeftModel, rows: Rows) -> None:
    model.train()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    estimate_features(Session(model, helpers.tiny_tokenizer(), rows))
    assert model.training
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    layer = helpers.only_layer(model)
    assert (layer.observers, layer.edits) == ([], [])
    assert len(layer.base_layer._forward_hooks) == 1


def features_per_token(model: PeftModel, rows: Rows, tokenizer: Any) -> float:
    """Steered features at the words of the chosen answers, as the model is edited now."""
    counts: list[int] = []
    for row in rows:
        ids, n_prompt = tokenize(row["prompt"], row["chosen"], tokenizer)
        events: list[Any] = []
        with torch.no_grad(), observe(model, events.append):
            model(input_ids=torch.tensor([ids]))
        counts += (events[0].steering_vector[0, n_prompt:-1] != 0).sum(-1).tolist()
    return fmean(counts)


def test_limited_steering(model: PeftModel, rows: Rows) -> None:
    tokenizer = helpers.tiny_tokenizer()
    usage = compute_usage(Session(model, tokenizer, rows))
    shares = (0.01, 0.04, 0.2, 0.9)
    record = compare_static_dynamic(
        Session(model, tokenizer, rows, batch_size=3), usage, shares=shares
    )
    assert StaticDynamic.from_json(record.to_json()) == record
    with scale_steering(model, 0.0):
        assert record.base_loss == pytest.approx(
            score_preferences(Session(model, tokenizer, rows)).loss
        )
    assert record.d_sae == helpers.D_SAE
    assert [level.n_features for level in record.dynamic] == [1, 1, 5, 22]
    by_mass = [use.feature for use in usage.features]
    limits: dict[str, Callable[[int], AbstractContextManager[None]]] = {
        "dynamic": lambda n: top_k_steering(model, n),
        "static": lambda n: only_features(model, by_mass[:n]),
    }
    for kind, limit in limits.items():
        levels = getattr(record, kind)
        assert [level.share for level in levels] == list(shares)
        for level in levels:
            with limit(level.n_features):
                scores = score_preferences(Session(model, tokenizer, rows))
                assert level.l0 == pytest.approx(features_per_token(model, rows, tokenizer))
            assert level.loss.value == pytest.approx(scores.loss, abs=1e-5)
            assert level.loss.low <= level.loss.value <= level.loss.high
            assert level.accuracy.value == scores.accuracy
            assert level.margin.value == pytest.approx(scores.margin, abs=1e-5)
    assert record.learned.l0 == pytest.approx(features_per_token(model, rows, tokenizer))
    assert record.learned.n_features == len(usage.features)
    trained = score_preferences(Session(model, tokenizer, rows))
    assert record.learned.loss.value == pytest.approx(trained.loss, abs=1e-5)
    for wrong in ((), (0.0,), (1.5,)):
        with pytest.raises(ValueError, match="shares above 0"):
            compare_static_dynamic(Session(model, tokenizer, rows), usage, shares=wrong)


def test_no_pass_over_the_data_for_a_limit_that_limits_nothing(
    rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = helpers.fsrl_model(features=[1, 4, 7]).eval()
    session = Session(model, helpers.tiny_tokenizer(), rows)
    usage = compute_usage(session)
    passes = []

    def score(session: Session, name: str = "") -> PreferenceScores:
        passes.append(name)
        return score_preferences(session, name)

    monkeypatch.setattr("peft_fsrl.analysis.static_dynamic.score_preferences", score)
    # Of 24 features, 1, 3 and 12.
    record = compare_static_dynamic(session, usage, shares=(0.01, 0.1, 0.5))
    assert passes == ["trained model", "base model", "1 per token", "1 fixed"]
    assert [level.loss for level in record.dynamic[1:]] == [record.learned.loss] * 2


def test_pairs_of_similar_length() -> None:
    lengths = [(9, 9), (1, 3), (2, 2), (4, 6), (5, 5), (20, 2), (3, 1), (30, 30)]
    scores = scores_of(lengths, [1.0, -1.0, 2.0, 0.5, -0.5, 3.0, 1.0, 4.0])
    # Mean lengths 9 2 2 5 5 11 2 30: those of one length stay together, and 9 alone is no group.
    assert [sorted(group) for group in length_groups(scores, 4)] == [[1, 2, 6], [0, 3, 4], [5, 7]]
    assert [sorted(group) for group in length_groups(scores, 1)] == [list(range(8))]
    assert sorted(pair for group in length_groups(scores, 50) for pair in group) == list(range(8))
    assert min(map(len, length_groups(scores, 50))) >= 2
    base = scores_of(lengths, [0.0] * 8)
    first, second, last = score_by_length(base, scores, n_buckets=4)
    assert (first.shortest, first.longest, first.n) == (2.0, 2.0, 3)
    assert (last.shortest, last.longest, last.n) == (11.0, 30.0, 2)
    assert first.accuracy.value == pytest.approx(2 / 3)
    assert first.base_accuracy.value == 0.0
    assert first.base_accuracy.high > 0.3
    assert first.margin.value == pytest.approx(2 / 3)
    assert second.margin.value == pytest.approx(1 / 3)
    assert last.margin == statistics.mean_interval([3.0, 4.0])
    gain = compute_gain(base, scores)
    assert gain.value == pytest.approx(fmean(scores.margins))
    for call in (score_by_length, compute_gain):
        with pytest.raises(ValueError, match="scores of the same pairs"):
            call(base, scores_of([(1, 1)] * 8, [0.0] * 8))
    with pytest.raises(ValueError, match="two pairs at least"):
        length_groups(scores_of([(1, 1)], [0.0]), 2)
