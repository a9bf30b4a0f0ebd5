"""Use and composition of features against loops over single tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import AddedToken

import helpers
from peft_fsrl.analysis import (
    FeatureUse,
    Interval,
    Session,
    Usage,
    composition_of,
    compute_compositions,
    compute_rank_frequency,
    compute_usage,
    compute_usages,
    count_features,
    measure_firing,
    render_firing,
    segments,
    session,
    statistics,
)
from peft_fsrl.analysis.segments import SEGMENTS
from peft_fsrl.steering import observe, scale_steering
from peft_fsrl.training.tokens import special_ids, tokenize

Rows = list[dict[str, str]]


@pytest.fixture
def rows() -> Rows:
    """Pairs of unlike lengths; ``w3`` and ``w4`` mark turns, once ``chat_tokenizer`` says so."""
    return [
        {"prompt": "w3 w9 w4", "chosen": " w5 w6 w7", "rejected": " w8"},
        {"prompt": "w9", "chosen": " w10", "rejected": " w11 w12 w3 w14"},
        {"prompt": "w15 w16 w17", "chosen": " w18 w18", "rejected": " w19 w20"},
    ]


def chat_tokenizer() -> Any:
    tokenizer = helpers.tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("w3", special=True), AddedToken("w4", special=True)])
    assert len(tokenizer) == helpers.VOCABULARY
    # As Llama 3's header tokens: flagged, and yet not in the list.
    assert 3 not in tokenizer.all_special_ids
    return tokenizer


def by_token(
    model: PeftModel, sae: Any, rows: Rows, tokenizer: Any, segment: str
) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Steering vector and activations of every token that counts, by row, one text at a time."""
    side = "rejected" if "rejected" in segment else "chosen"
    found = []
    for row in rows:
        ids, n_prompt = tokenize(row["prompt"], row[side], tokenizer)
        events: list[Any] = []
        with torch.no_grad(), observe(model, events.append):
            model(input_ids=torch.tensor([ids]))
            f = sae.encode(events[0].hidden_states)[0]
        v = events[0].steering_vector[0]
        places = {
            "prompt": range(n_prompt),
            "chosen": range(n_prompt, len(ids)),
            "rejected": range(n_prompt, len(ids)),
        }.get(segment, range(len(ids)))
        text = tokenizer.convert_ids_to_tokens(ids)
        marks = {"<s>", "</s>", "<pad>", "w3", "w4"}
        found.append([(v[i], f[i]) for i in places if text[i] not in marks])
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("architecture", ["standard", "topk", "temporal"])
def test_segments_equal_a_loop_over_tokens(rows: Rows, architecture: str, batch_size: int) -> None:
    tokenizer = chat_tokenizer()
    sae = helpers.tiny_sae(architecture)
    model = helpers.fsrl_model(sae=sae)
    usages = compute_usages(
        Session(model, tokenizer, rows, batch_size=batch_size),
        segments=SEGMENTS,
        labels={3: "style"},
    )
    assert [usage.segment for usage in usages] == list(SEGMENTS)
    for usage in usages:
        texts = by_token(model, sae, rows, tokenizer, usage.segment)
        tokens = [token for text in texts for token in text]
        n = usage.n_tokens
        assert n == len(tokens)
        assert usage.l0 == pytest.approx(sum(int((v != 0).sum()) for v, _ in tokens) / n)
        assert usage.l1 == pytest.approx(sum(float(v.abs().sum()) for v, _ in tokens) / n, rel=1e-5)
        for use in usage.features:
            values = [float(v[use.feature]) for v, _ in tokens]
            active = [float(f[use.feature]) for _, f in tokens]
            assert use.frequency == pytest.approx(sum(value != 0 for value in values) / n)
            assert use.promoted == pytest.approx(sum(value > 0 for value in values) / n)
            assert use.active == pytest.approx(sum(value != 0 for value in active) / n)
            assert use.mean_steering == pytest.approx(sum(values) / n, abs=1e-6)
            assert 0 <= use.promoted <= use.frequency <= 1
            assert 0 <= use.active <= 1
            assert use.label == ("style" if use.feature == 3 else None)
        assert {use.feature for use in usage.features} == {
            i for v, _ in tokens for i in v.nonzero().flatten().tolist()
        }
    n = {usage.segment: usage.n_tokens for usage in usages}
    # Without marks: prompts of 1, 1 and 3 words, answers of 3, 1, 2 and of 1, 3, 2.
    assert n == {
        "prompt": 5,
        "chosen": 6,
        "rejected": 6,
        "prompt_chosen": 11,
        "prompt_rejected": 11,
    }


def test_padding_never_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the id that pads is an ordinary token's."""
    monkeypatch.setattr(session, "special_ids", lambda tokenizer: [1, 2])
    model, tokenizer = helpers.fsrl_model(), helpers.tiny_tokenizer()
    texts = [
        {"prompt": "w9", "chosen": " w10"},
        {"prompt": "w9", "chosen": " w10 w11 w12 w13 w14 w15"},
    ]
    usages = [
        compute_usage(Session(model, tokenizer, texts, batch_size=size), segment="prompt_chosen")
        for size in (1, 2)
    ]
    assert [usage.n_tokens for usage in usages] == [9, 9]
    assert usages[0].l0 == pytest.approx(usages[1].l0)


def test_encoding_goes_in_pieces(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = helpers.fsrl_model(activation="relu"), helpers.tiny_tokenizer()
    sae = type(helpers.only_layer(model).fsrl_sae["default"])
    sizes: list[int] = []
    encode = sae.encode

    def measured(self: Any, x: torch.Tensor) -> torch.Tensor:
        sizes.append(x.shape[:-1].numel())
        return encode(self, x)

    monkeypatch.setattr(sae, "encode", measured)
    whole = compute_usages(Session(model, tokenizer, rows), segments=SEGMENTS)
    assert max(sizes) > 2
    sizes.clear()
    monkeypatch.setattr(segments, "_CHUNK", 2)
    pieces = compute_usages(Session(model, tokenizer, rows), segments=SEGMENTS)
    assert max(sizes) == 2
    for one, other in zip(whole, pieces, strict=True):
        assert one.l1 == pytest.approx(other.l1)
        assert [(u.feature, u.frequency, u.active) for u in one.features] == [
            (u.feature, u.frequency, u.active) for u in other.features
        ]


def test_one_segment_needs_only_its_column(rows: Rows) -> None:
    model, tokenizer = helpers.fsrl_model(), helpers.tiny_tokenizer()
    expected = compute_usages(Session(model, tokenizer, rows), segments=("prompt", "rejected"))[1]
    half = [{"prompt": row["prompt"], "rejected": row["rejected"]} for row in rows]
    usage = compute_usage(Session(model, tokenizer, half), segment="rejected")
    assert usage.n_tokens == expected.n_tokens
    assert [use.feature for use in usage.features] == [use.feature for use in expected.features]


def test_features_keep_their_names_where_an_adapter_has_only_some(rows: Rows) -> None:
    features = [2, 5, 11, 23]
    model, tokenizer = helpers.fsrl_model(features=features), helpers.tiny_tokenizer()
    usage = compute_usage(Session(model, tokenizer, rows))
    assert {use.feature for use in usage.features} <= set(features)
    assert usage.features
    counts = count_features(Session(model, tokenizer, rows), segments=("chosen",))["chosen"]
    assert set(counts.steered.nonzero().flatten().tolist()) == {
        use.feature for use in usage.features
    }
    assert len(counts.active) == helpers.D_SAE


def test_special_tokens_are_found_where_they_are_flagged() -> None:
    assert special_ids(helpers.tiny_tokenizer()) == [0, 1, 2]
    assert special_ids(chat_tokenizer()) == [0, 1, 2, 3, 4]


def test_what_cannot_be_counted_is_refused(rows: Rows) -> None:
    model, tokenizer = helpers.fsrl_model(), helpers.tiny_tokenizer()
    with pytest.raises(ValueError, match="different segments among"):
        compute_usage(Session(model, tokenizer, rows), segment="answer")
    with pytest.raises(ValueError, match="different segments among"):
        compute_usages(Session(model, tokenizer, rows), segments=("chosen", "chosen"))
    for count in (compute_usages, count_features):
        with pytest.raises(ValueError, match="at least one preference pair"):
            count(Session(model, tokenizer, []))
    silent = [{"prompt": "w5", "chosen": "", "rejected": " w6"}]
    with pytest.raises(ValueError, match="'chosen' has no token that counts"):
        compute_usage(Session(model, tokenizer, silent))
    with pytest.raises(ValueError, match="'chosen' has no token that counts"):
        compute_compositions(
            Session(model, tokenizer, silent * 2), {"a": [1]}, segments=("chosen",)
        )
    several = helpers.fsrl_model(
        layer=[0, 1], sae={i: helpers.tiny_sae(metadata={}) for i in (0, 1)}
    )
    with pytest.raises(ValueError, match="one FSRL layer"):
        compute_usage(Session(several, tokenizer, rows))
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match=r"is active on .* outside of `disable_adapter`"),
    ):
        compute_usage(Session(model, tokenizer, rows))


def usage_of(frequencies: Sequence[float]) -> Usage:
    features = tuple(
        FeatureUse(i, value, 0.0, 0.0, 0.0, 0.0) for i, value in enumerate(frequencies)
    )
    return Usage("prompt", 10, 1.0, 1.0, features)


def test_an_exponential_is_found_again() -> None:
    record = compute_rank_frequency(usage_of([0.8 * math.exp(-0.03 * r) for r in range(90, 0, -1)]))
    assert record.segment == "prompt"
    assert record.n_features == 90
    assert record.ranks == tuple(range(1, 91))
    assert record.frequencies[0] == max(record.frequencies)
    assert (record.amplitude, record.rate, record.r_squared) == pytest.approx((0.8, 0.03, 1.0))
    thin = compute_rank_frequency(
        usage_of([0.8 * math.exp(-0.01 * r) for r in range(1, 901)]), n_ranks=10
    )
    assert thin.n_features == 900
    assert thin.rate == pytest.approx(0.01)
    assert len(thin.ranks) <= 10
    assert thin.ranks[0] == 1
    assert thin.ranks[-1] == 900
    ratios = [b / a for a, b in pairwise(thin.ranks)]
    assert max(ratios) < 2.6
    assert all(
        frequency == pytest.approx(0.8 * math.exp(-0.01 * rank))
        for rank, frequency in zip(thin.ranks, thin.frequencies, strict=True)
    )
    with pytest.raises(ValueError, match="at least two features"):
        compute_rank_frequency(usage_of([0.5]))


def test_composition_equals_a_count_by_hand(rows: Rows) -> None:
    tokenizer, sae = chat_tokenizer(), helpers.tiny_sae()
    model = helpers.fsrl_model(sae=sae)
    # Feature 4 is in both.
    categories = {"style": [4, 2, 7, 12, 13, 14], "honesty": [4, 9, 15, 16, 17]}
    names = ("prompt", "prompt_chosen", "rejected")
    records = compute_compositions(
        Session(model, tokenizer, rows, batch_size=2, seed=5), categories, segments=names
    )
    counts = count_features(Session(model, tokenizer, rows, batch_size=2), segments=names)
    members = {
        **categories,
        "other": sorted(set(range(helpers.D_SAE)) - {2, 4, 7, 9, *range(12, 18)}),
    }
    for record in records:
        texts = by_token(model, sae, rows, tokenizer, record.segment)
        assert record.n_tokens == sum(map(len, texts)) == counts[record.segment].n_tokens
        assert record.n_examples == len(rows) == counts[record.segment].n_examples

        def count(which: int, features: Sequence[int], texts: Any = texts) -> list[int]:
            return [
                sum(float(token[which][i]) != 0 for token in text for i in features)
                for text in texts
            ]

        everything = range(helpers.D_SAE)
        steered_all, active_all = count(0, everything), count(1, everything)
        assert [share.category for share in record.shares] == ["style", "honesty", "other"]
        points = composition_of(counts[record.segment], categories)
        for share in record.shares:
            features = members[share.category]
            steered, active = count(0, features), count(1, features)
            assert share.n_features == len(features)
            assert (share.steered, share.n_steered) == (sum(steered), sum(steered_all))
            assert (share.active, share.n_active) == (sum(active), sum(active_all))
            # Resampled are texts, not tokens.
            expected = statistics.ratio_interval(steered, steered_all, seed=5)
            assert share.steered_share == expected
            assert share.active_share == statistics.ratio_interval(active, active_all, seed=5)
            ratio = expected.value / share.active_share.value
            assert share.enrichment.value == pytest.approx(ratio)
            assert share.enrichment.low <= ratio <= share.enrichment.high
            assert tuple(points[share.category]) == pytest.approx(
                (expected.value, share.active_share.value, ratio)
            )


@pytest.mark.parametrize("non_negative", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "abstopk"])
def test_firing_before_and_after_equals_a_count_by_hand(
    rows: Rows, architecture: str, non_negative: bool
) -> None:
    tokenizer, sae = chat_tokenizer(), helpers.tiny_sae(architecture)
    model = helpers.fsrl_model(sae=sae, non_negative=non_negative)
    categories = {"style": [4, 2, 7, 12, 13, 14], "honesty": [4, 9, 15, 16, 17]}
    found = measure_firing(
        Session(model, tokenizer, rows, batch_size=2, seed=5), categories, segment="prompt_chosen"
    )
    others = sorted(set(range(helpers.D_SAE)) - {f for fs in categories.values() for f in fs})
    members = {**categories, "other": others}
    texts = by_token(model, sae, rows, tokenizer, "prompt_chosen")
    n_tokens = [len(text) for text in texts]

    def fires(f: float, v: float, steered: bool) -> bool:
        if not steered:
            return f != 0
        # Below zero nothing can be pushed, unless a feature may have either sign.
        return f + v > 0 if non_negative and architecture == "standard" else f + v != 0

    def count(features: Sequence[int], steered: bool) -> list[int]:
        return [
            sum(fires(float(f[i]), float(v[i]), steered) for v, f in text for i in features)
            for text in texts
        ]

    assert [each.category for each in found] == list(members)
    everything = range(helpers.D_SAE)
    for each in found:
        features = members[each.category]
        before, after = count(features, False), count(features, True)
        assert each.n_features == len(features)
        assert each.base == statistics.ratio_interval(before, n_tokens, seed=5)
        assert each.trained == statistics.ratio_interval(after, n_tokens, seed=5)
        changes = [b - a for a, b in zip(before, after, strict=True)]
        assert each.change == statistics.ratio_interval(changes, n_tokens, seed=5)
        share = sum(after) / sum(count(everything, True))
        assert each.trained_share == pytest.approx(share)
    assert any(each.base != each.trained for each in found)
    assert "trained" in render_firing(found)


def test_composition_where_nothing_is_steered_or_active(rows: Rows) -> None:
    model, tokenizer = helpers.fsrl_model(), helpers.tiny_tokenizer()
    with scale_steering(model, 0.0):
        [record] = compute_compositions(
            Session(model, tokenizer, rows), {"a": [1]}, segments=("chosen",)
        )
    for share in record.shares:
        assert (share.steered, share.n_steered) == (0, 0)
        assert share.steered_share == Interval(0.0, 0.0, 1.0)
        assert share.enrichment.value == share.enrichment.low == 0.0
        if share.active:
            assert share.enrichment.high == pytest.approx(1 / share.active_share.value)
    counts = count_features(Session(model, tokenizer, rows), segments=("chosen",))["chosen"]
    silenced = replace(counts, active=counts.active.index_fill(0, torch.tensor([1]), 0))
    share = composition_of(silenced, {"a": [1]})["a"]
    assert share.active_share == 0.0
    half = 0.5 / int(silenced.active.sum())
    assert share.enrichment == pytest.approx(share.steered_share / half)
    assert share.steered_share > 0


def test_composition_refuses_what_it_cannot_place(rows: Rows) -> None:
    model, tokenizer = helpers.fsrl_model(), helpers.tiny_tokenizer()
    with pytest.raises(ValueError, match="'other' is kept"):
        compute_compositions(Session(model, tokenizer, rows), {"other": [1]})
    with pytest.raises(IndexError, match="24"):
        compute_compositions(Session(model, tokenizer, rows), {"a": [24]})
    counts = count_features(Session(model, tokenizer, rows))
    with pytest.raises(IndexError, match="has 0 to 23"):
        composition_of(counts["prompt"], {"a": [24]})
    with pytest.raises(ValueError, match="'other' is kept"):
        composition_of(counts["prompt"], {"other": [1]})
    with pytest.raises(ValueError, match="at least two examples"):
        compute_compositions(Session(model, tokenizer, rows[:1]), {"a": [1]})
