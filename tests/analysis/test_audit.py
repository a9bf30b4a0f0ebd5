"""An audit is its analyses, made once each; what it says; where its summary stands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer

import helpers
from audits import HOSTILE, make_audit
from peft_fsrl.analysis import (
    Audit,
    Coherence,
    PreferenceScores,
    Session,
    VariantCoherence,
    compute_usage,
    score_preferences,
)
from peft_fsrl.analysis.audit import AuditSettings, compute_audit, stages
from peft_fsrl.analysis.findings import (
    judge_ablations,
    judge_coherence,
    judge_gain,
    judge_labels,
    judge_mirror,
)
from peft_fsrl.analysis.labels import FeatureLabel, Labels
from peft_fsrl.analysis.rendering import add_audit, render_audit_html, render_card_section
from peft_fsrl.analysis.report import render_audit
from peft_fsrl.files import compute_sha256
from peft_fsrl.records import Interval
from peft_fsrl.steering import scale_steering

ROWS = list(helpers.tiny_preferences(6))
QUICK = AuditSettings(
    n_generations=2, n_coherence=2, max_new_tokens=4, n_random=1, n_single=2, n_cards=2, n_draws=20
)
LABELS = Labels(
    "people",
    ("style", "tone", "nothing"),
    helpers.D_SAE,
    None,
    (
        *(FeatureLabel(f, f"kind {f}", ("style",), 0.9) for f in range(6)),
        *(FeatureLabel(f, None, ("tone",), None) for f in range(6, 9)),
    ),
)
# What each stage calls, in the order of the stages.
CALLS = (
    "score_preferences",
    "compute_usages",
    "collect_evidence",
    "compare_coherence",
    "measure_categories",
    "compute_compositions",
    "measure_magnitudes",
    "measure_features",
    "compare_static_dynamic",
    "compare_generations",
)


@pytest.fixture
def model() -> PeftModel:
    model = helpers.fsrl_model()
    model.generation_config.eos_token_id = 2
    return model


def audit_of(model: PeftModel, out: Path | None = None, **options: Any) -> Audit:
    options = {"labels": LABELS, "settings": QUICK} | options
    rows = options.pop("rows", ROWS)
    tokenizer = options.pop("tokenizer", helpers.tiny_tokenizer())
    return compute_audit(Session(model, tokenizer, rows), out=out, **options)


def without_date(audit: Audit) -> Audit:
    return replace(audit, created="")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each analysis has run; an entry of None in ``fail`` lets it run."""
    counts: dict[str, int] = dict.fromkeys(CALLS, 0)
    for name in CALLS:
        original = getattr(stages, name)

        def count(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(stages, name, count)
    return counts


def test_an_audit_is_its_analyses(model: PeftModel) -> None:
    audit = audit_of(model, adapter="mine", dataset_name="pairs")
    tokenizer = helpers.tiny_tokenizer()
    assert audit.trained == score_preferences(Session(model, tokenizer, ROWS))
    with scale_steering(model, 0.0):
        assert audit.base == score_preferences(Session(model, tokenizer, ROWS))
    usage = compute_usage(
        Session(model, tokenizer, ROWS),
        labels={f: f"kind {f}" for f in range(6)} | dict.fromkeys((6, 7, 8), "tone"),
    )
    assert audit.usages[0] == usage
    assert [a.name for a in audit.ablations] == ["style", "tone"], "a category without features"
    assert [c.segment for c in audit.compositions] == [u.segment for u in audit.usages]
    assert audit.concentration is not None
    assert audit.concentration.n_steered == len(usage.features)
    assert [each.category for each in audit.magnitudes] == ["style", "tone", "other"]
    steered = sum(round(use.frequency * usage.n_tokens) for use in usage.features)
    assert sum(each.n for each in audit.magnitudes) == steered
    assert {v.name for v in audit.coherence} == {"base", "trained", "without style", "without tone"}
    steering = {use.feature: use.mean_steering for use in usage.features}
    shown = [card.use.feature for card in audit.promoted]
    assert shown == sorted(steering, key=lambda f: -steering[f])[:2]
    assert [card.use.feature for card in audit.suppressed] == sorted(steering, key=steering.get)[:2]
    assert all(card.evidence.feature == card.use.feature for card in audit.promoted)
    assert audit.info.adapter == "mine"
    assert audit.info.n_parameters == helpers.D_SAE * (helpers.D_IN + 2)
    assert audit.info.fingerprint == helpers.only_layer(model).fsrl_sae["default"].info.fingerprint
    assert audit.note("curves")
    assert Audit.from_json(audit.to_json()) == audit
    assert "<h1" in render_audit_html(audit)
    assert max(map(len, render_audit(audit).splitlines())) < 100


def test_what_is_finished_is_not_made_again(
    model: PeftModel, tmp_path: Path, counted: dict[str, int]
) -> None:
    first = audit_of(model, tmp_path)
    assert all(counted.values())
    before = dict(counted)
    assert without_date(audit_of(model, tmp_path)) == without_date(first)
    assert counted == before
    assert without_date(audit_of(model)) == without_date(first), "and without a folder all is"
    assert counted == {name: 2 * n for name, n in before.items()}


def test_a_killed_audit_goes_on_where_it_was(
    model: PeftModel, tmp_path: Path, counted: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed once at every stage, in one folder: in the end each has run once."""
    whole = audit_of(model)
    counted.update(dict.fromkeys(CALLS, 0))

    def die(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    for stage in CALLS:
        with monkeypatch.context() as patch:
            patch.setattr(stages, stage, die)
            with pytest.raises(KeyboardInterrupt):
                audit_of(model, tmp_path)
    assert without_date(audit_of(model, tmp_path)) == without_date(whole)
    expected = dict.fromkeys(CALLS, 1) | {"score_preferences": 2}
    assert counted == expected, "everything ran once, before the end or after it"


def test_the_base_is_the_base_beside_modules_to_save(model: PeftModel) -> None:
    tokenizer = helpers.tiny_tokenizer()
    expected = score_preferences(Session(helpers.tiny_model(), tokenizer, ROWS))
    whole = helpers.fsrl_model(modules_to_save=["lm_head"])
    whole.generation_config.eos_token_id = 2
    with torch.no_grad():
        weight = whole.get_base_model().lm_head.modules_to_save["default"].weight
        weight.copy_(40 * weight.flip(0))
    audit = audit_of(whole)
    assert audit.base == expected
    assert audit.trained != score_preferences(Session(model, tokenizer, ROWS))
    plain = audit_of(model)
    for mine, theirs in zip(audit.generations, plain.generations, strict=True):
        assert mine.text("base") == theirs.text("base")
        assert mine.text("trained") != theirs.text("trained")
    assert audit.coherence[0] == plain.coherence[0], "the base's own answers"
    [said] = [each.value for each in audit.info.settings if each.name == "modules_to_save"]
    assert said == f"lm_head ({helpers.VOCABULARY * helpers.D_IN:,} parameters)"
    assert said in " ".join(render_audit(audit).split())
    assert said in render_audit_html(audit)


def test_no_adapter_is_active(model: PeftModel) -> None:
    model.base_model.set_adapter([])
    with pytest.raises(ValueError, match=r"None of the adapters \['default'\] is active"):
        audit_of(model)


def test_changed_inputs_are_noticed(
    model: PeftModel, tmp_path: Path, counted: dict[str, int]
) -> None:
    audit_of(model, tmp_path)

    def made_again(**options: Any) -> set[str]:
        counted.update(dict.fromkeys(CALLS, 0))
        audit_of(model, tmp_path, **options)
        return {name for name, n in counted.items() if n}

    fewer = replace(LABELS, features=LABELS.features[:7])
    labeled = {"measure_categories", "compute_compositions", "compare_coherence"}
    labeled |= {"compare_generations", "measure_features", "measure_magnitudes"}
    assert made_again(labels=fewer) == labeled
    assert made_again(labels=fewer, settings=replace(QUICK, n_single=3)) == {"measure_features"}
    assert made_again(labels=fewer, rows=ROWS[:5]) == set(CALLS)
    tokenizer = helpers.tiny_tokenizer()
    tokenizer(["w3 w4"], truncation=True, max_length=1, padding=True)
    assert made_again(labels=fewer, rows=ROWS[:5], tokenizer=tokenizer) == set(), "used before"
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = words["model"]["vocab"]
    vocabulary["w3"], vocabulary["w4"] = vocabulary["w4"], vocabulary["w3"]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    other = type(tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(words)), **special)
    assert made_again(labels=fewer, rows=ROWS[:5], tokenizer=other) == set(CALLS)
    with torch.no_grad():
        helpers.only_layer(model).fsrl_adapter["default"].weight[0, 0] += 1
    assert made_again(labels=fewer, rows=ROWS[:5]) == set(CALLS)
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.up_proj.weight += 1e-3
    assert made_again(labels=fewer, rows=ROWS[:5]) == set(CALLS)
    assert made_again(labels=fewer, rows=ROWS[:5]) == set()
    base = model.get_base_model()
    with torch.no_grad():
        # One number of many, and what stands in no tensor.
        base.model.layers[0].mlp.up_proj.weight[0, 1] += 1e-3
    assert made_again(labels=fewer, rows=ROWS[:5]) == set(CALLS)
    for name, value in (("rms_norm_eps", 1e-3), ("rope_parameters", {"rope_theta": 5.0})):
        setattr(base.config, name, value)
        assert made_again(labels=fewer, rows=ROWS[:5]) == set(CALLS), name
    base.generation_config.temperature = 0.5
    assert made_again(labels=fewer, rows=ROWS[:5]) == set(CALLS)
    layer = helpers.only_layer(model)
    layer.fsrl_sae["default"] = layer.fsrl_sae["default"].to(torch.device("cpu"), torch.bfloat16)
    assert made_again(labels=fewer, rows=ROWS[:5]) == set(CALLS)


def test_the_content_hash_names_what_changed(
    model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = audit_of(model, tmp_path)

    def changed(model: PeftModel = model, **options: Any) -> list[str]:
        other = audit_of(model, tmp_path, **options)
        before = {each.name: each.value for each in first.inputs}
        found = [each.name for each in other.inputs if before[each.name] != each.value]
        assert (other.content == first.content) == (not found)
        return found

    assert changed() == []
    assert changed(labels=replace(LABELS, features=LABELS.features[:7])) == ["labels"]
    other = replace(LABELS, features=LABELS.features[:-1], source="others")
    assert changed(reference_labels=other) == ["reference labels"]
    assert changed(rows=ROWS[:5]) == ["dataset"]
    assert changed(settings=replace(QUICK, n_single=3)) == ["settings"]
    tokenizer = helpers.tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    assert changed(tokenizer=tokenizer) == ["tokenizer"]
    assert changed(helpers.fsrl_model(sae=helpers.tiny_sae(seed=1))) == ["adapter", "sae"]
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.up_proj.weight[0, 1] += 1e-3
        assert changed() == ["base"]
        helpers.only_layer(model).fsrl_adapter["default"].weight[0, 0] += 1
        assert changed() == ["adapter", "base"]
    monkeypatch.setattr("peft_fsrl.analysis.audit.audit.version_of", lambda package: "0")
    assert changed() == ["adapter", "base", "versions"]
    assert all(len(each.value) == 64 for each in first.inputs)


@pytest.mark.parametrize("damage", ["", "{", '{"key": 1}', '{"key": "same", "value": {}}'])
def test_a_damaged_part_is_made_again(
    model: PeftModel, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = audit_of(model, tmp_path)
    part = tmp_path / "parts" / "usages.json"
    key = json.loads(part.read_text())["key"]
    part.write_text(damage.replace("same", key))
    assert without_date(audit_of(model, tmp_path)) == without_date(first)
    assert json.loads(part.read_text())["key"] == key
    assert ("cannot be read" in caplog.text) == (damage != '{"key": 1}')


def test_an_adapter_that_steers_nothing(model: PeftModel) -> None:
    with torch.no_grad():
        helpers.only_layer(model).fsrl_adapter["default"].threshold.fill_(100.0)
    audit = audit_of(model)
    assert audit.findings[0].verdict == "unsure"
    assert audit.usages[0].features == ()
    for part in ("single", "static_dynamic", "promoted"):
        assert "steers" in audit.note(part)
    assert "<h1" in render_audit_html(audit)
    assert render_audit(audit)


def test_the_mirror_needs_enough_pairs(model: PeftModel, tmp_path: Path) -> None:
    few = audit_of(model)
    assert few.mirror is None
    assert "Fewer than 20 pairs" in few.note("mirror")
    assert few.findings[4].verdict == "unsure"
    rows = list(helpers.tiny_preferences(24))
    audit = audit_of(model, tmp_path, rows=rows)
    assert audit.mirror is not None
    assert audit.mirror.n_pairs == 24
    assert audit.mirror.n_steered == audit.n_steered[0]
    assert f"{audit.mirror.explained.value:.0%}" in audit.findings[4].answer
    assert (tmp_path / "parts" / "pairs-0000000.safetensors").is_file()
    assert Audit.from_json(audit.to_json()) == audit


@pytest.mark.parametrize(
    ("explained", "cosine", "by_chance", "verdict"),
    [
        (0.9, 0.5, 0.3, "yes"),
        (0.9, 0.5, 0.9, "unsure"),
        (0.9, 0.04, 0.3, "unsure"),
        (0.52, 0.5, 0.3, "unsure"),
        (0.4, 0.5, 0.3, "unsure"),
        (0.2, 0.5, 0.3, "no"),
        (0.9, -0.1, 0.3, "no"),
    ],
)
def test_verdict_on_the_mirror(
    explained: float, cosine: float, by_chance: float, verdict: str
) -> None:
    near = [Interval(value, value - 0.05, value + 0.05) for value in (explained, cosine)]
    mirror = replace(make_audit().mirror, explained=near[0], cosine=near[1], by_chance=by_chance)
    found = judge_mirror(mirror)
    assert found.verdict == verdict
    first = next(each for each in mirror.features if not each.explained)
    assert f"Largest unexplained: feature {first.feature} (style)," in found.answer


def test_without_labels(model: PeftModel) -> None:
    audit = audit_of(model, labels=None)
    assert audit.ablations == audit.compositions == ()
    assert "No labels" in audit.note("ablations")
    assert [finding.verdict for finding in audit.findings[2:]] == ["unsure"] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_sae": 99}, "99 features, but this one has 24"),
        ({"fingerprint": "0" * 64}, "SAE with fingerprint 000000000000"),
        (
            {"d_sae": None, "features": (FeatureLabel(24, None, ("style",), None),)},
            "label for feature 24, expected 0 to 23",
        ),
    ],
)
def test_labels_of_another_sae(model: PeftModel, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        audit_of(model, labels=replace(LABELS, **change))


def test_labels_no_better_than_a_known_judge(model: PeftModel, tmp_path: Path) -> None:
    perfect = audit_of(model, settings=replace(QUICK, label_mcc=1.0, n_draws=20))
    assert perfect.agreements == ()
    assert len(perfect.robustness) >= 2
    for figure in perfect.robustness:
        assert figure.propagated.low == figure.propagated.high == pytest.approx(figure.measured)
        assert figure.kept == 1
    assert "redrawn by the given error rates" in perfect.findings[3].answer
    useless = audit_of(model, settings=replace(QUICK, label_mcc=0.0, n_draws=20))
    spread = [figure.propagated.high - figure.propagated.low for figure in useless.robustness]
    assert max(spread) > 0.05
    with pytest.raises(ValueError, match=r"from 0 to 1, got 1\.5"):
        replace(QUICK, label_mcc=1.5)
    with pytest.raises(ValueError, match=r"from 0 to 1, got -1"):
        replace(QUICK, label_mcc={"style": 0.5, "tone": -1})


def test_one_category_may_be_judged_worse_than_another(model: PeftModel) -> None:
    settings = replace(QUICK, label_mcc={"style": 0.0, "tone": 1.0}, n_draws=20)
    found = {f.figure: f.propagated for f in audit_of(model, settings=settings).robustness}
    style, tone = (found[f"enrichment of {name}, chosen"] for name in ("style", "tone"))
    assert tone.low == tone.high
    assert style.low < style.high
    with pytest.raises(ValueError, match=r"categories among \['style',.*got one for \['tune'\]"):
        audit_of(model, settings=replace(QUICK, label_mcc={"tune": 0.5}))


def test_a_reference_says_how_far_to_trust(
    model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # People call the features 0 to 4 style where the labels have 0 to 5, and know no tone.
    reference = replace(
        LABELS,
        source="others",
        categories=("style",),
        features=tuple(FeatureLabel(f, None, ("style",) if f < 5 else (), None) for f in range(9)),
    )
    audit = audit_of(model, tmp_path, reference_labels=reference)
    [agreement] = audit.agreements
    assert (agreement.both, agreement.only_judged, agreement.only_reference) == (5, 1, 0)
    figures = [each.figure for each in audit.robustness]
    assert figures == ["enrichment of style, chosen", "rise of the loss without style"]
    [enrichment, rise] = audit.robustness
    [share] = [s for s in audit.compositions[0].shares if s.category == "style"]
    assert enrichment.measured == pytest.approx(share.enrichment.value)
    assert rise.measured == pytest.approx(audit.ablations[0].rise.value, abs=1e-5)
    assert enrichment.n_draws == QUICK.n_draws
    assert "MCC" in audit.findings[3].answer

    monkeypatch.setattr(stages, "propagate_ablation", None)
    again = audit_of(model, tmp_path, reference_labels=reference)
    assert without_date(again) == without_date(audit), "read back"
    strangers = replace(reference, categories=("color",), features=())
    with pytest.raises(ValueError, match="categories that both know"):
        audit_of(model, reference_labels=strangers)


def test_some_categories(model: PeftModel) -> None:
    audit = audit_of(model, settings=replace(QUICK, categories=("tone",)))
    assert [ablation.name for ablation in audit.ablations] == ["tone"]
    with pytest.raises(ValueError, match=r"the labels know, .*got \['color'\]"):
        audit_of(model, settings=replace(QUICK, categories=("color",)))


def test_labels_in_no_category(model: PeftModel) -> None:
    bare = replace(LABELS, features=tuple(replace(f, categories=()) for f in LABELS.features))
    audit = audit_of(model, labels=bare)
    for part in ("compositions", "ablations"):
        assert "put no feature into a category" in audit.note(part)
    assert audit.findings[2].answer == "No feature has a category."


def test_labels_are_no_witness_for_themselves(model: PeftModel) -> None:
    with pytest.raises(ValueError, match="the same labels again"):
        audit_of(model, reference_labels=replace(LABELS, source="a copy"))


def test_too_little_to_audit(model: PeftModel) -> None:
    with pytest.raises(ValueError, match="at least two held-out preference pairs, found 1"):
        audit_of(model, rows=ROWS[:1])


def coherence(perplexity: float, repetition: float) -> tuple[VariantCoherence, ...]:
    base = Coherence(8, 2.0, 0.1, 0.5, 0.5, 10.0, 1.0)
    trained = replace(base, perplexity=perplexity, repetition=repetition)
    return (VariantCoherence("base", base), VariantCoherence("trained", trained))


@pytest.mark.parametrize(
    ("perplexity", "repetition", "verdict"),
    [
        (3.0, 0.15, "yes"),
        (3.01, 0.1, "unsure"),
        (2.0, 0.16, "unsure"),
        (6.0, 0.3, "unsure"),
        (6.01, 0.1, "no"),
        (2.0, 0.31, "no"),
        (1.0, 0.0, "yes"),
        (float("nan"), 0.1, "no"),
    ],
)
def test_limits_of_coherence(perplexity: float, repetition: float, verdict: str) -> None:
    assert judge_coherence(coherence(perplexity, repetition)).verdict == verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.1, 1, "yes"), (-0.1, 1, "unsure"), (-1, -0.1, "no")]
)
def test_limits_of_a_gain(low: float, high: float, verdict: str) -> None:
    audit = make_audit()
    gain = Interval((low + high) / 2, low, high)
    assert judge_gain(audit.base, audit.trained, gain).verdict == verdict


def test_a_category_of_everything_has_nothing_to_be_compared_with() -> None:
    audit = make_audit()
    sure = Interval(3, 2.5, 3.5)
    ablation = replace(audit.ablations[0], rise=sure, excess_count=None, excess_mass=None)
    finding = judge_ablations(audit.base, audit.trained, [ablation])
    assert finding.verdict == "unsure"
    assert "no other features" in finding.answer


@pytest.mark.parametrize(("n", "verdict"), [(2, "unsure"), (5, "unsure"), (6, "yes")])
def test_a_handful_of_pairs_proves_nothing(n: int, verdict: str) -> None:
    # All of n pairs on one side, by chance alone: less often than one in twenty from six on.
    assert (2 / 2**n < 0.05) == (verdict == "yes")
    audit = make_audit()
    few = {
        name: getattr(audit.trained, name)[:n]
        for name in ("losses", "margins", "chosen_tokens", "rejected_tokens")
    }
    trained, sure = replace(audit.trained, **few), Interval(3, 2.5, 3.5)
    assert judge_gain(audit.base, trained, sure).verdict == verdict
    ablation = replace(audit.ablations[0], rise=sure, excess_count=sure, excess_mass=sure)
    assert judge_ablations(audit.base, trained, [ablation]).verdict == verdict


@pytest.mark.parametrize(
    ("rise", "excess", "verdict"),
    [
        # The gain of this audit is about 3.8: half of it is about 1.9.
        (Interval(3, 2.5, 3.5), Interval(2, 1.5, 2.5), "yes"),
        (Interval(3, 2.5, 3.5), Interval(0.1, -0.1, 0.3), "no"),
        (Interval(1, 0.8, 1.2), Interval(0.5, 0.4, 0.6), "unsure"),
        (Interval(0, -0.2, 0.2), Interval(0, -0.2, 0.2), "no"),
    ],
)
def test_limits_of_what_carries_the_gain(rise: Interval, excess: Interval, verdict: str) -> None:
    audit = make_audit()
    ablation = replace(audit.ablations[0], rise=rise, excess_mass=excess, excess_count=excess)
    finding = judge_ablations(audit.base, audit.trained, [ablation])
    assert finding.verdict == verdict
    assert "same steering mass" in finding.answer
    # Where random features cannot reach the mass, the comparison is with as many of them.
    short = replace(ablation, random_masses=(0.1,), excess_mass=Interval(9, 9, 9))
    finding = judge_ablations(audit.base, audit.trained, [short])
    assert finding.verdict == verdict
    assert "as many random features" in finding.answer
    assert judge_ablations(audit.trained, audit.base, [ablation]).verdict == "unsure"


def test_a_few_draws_are_not_enough_to_trust() -> None:
    audit = make_audit()
    for n, verdict in ((19, "unsure"), (20, "yes")):
        drawn = [replace(each, kept=1.0, n_draws=n) for each in audit.robustness]
        assert judge_labels(LABELS, audit.agreements, drawn).verdict == verdict


def test_losses_that_are_no_numbers(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(*args: Any, **options: Any) -> PreferenceScores:
        scores = score_preferences(*args, **options)
        return replace(scores, losses=(float("nan"), *scores.losses[1:]))

    monkeypatch.setattr(stages, "score_preferences", score)
    with pytest.raises(ValueError, match="found nan or inf on 1 of 6 pairs"):
        audit_of(model)


@pytest.mark.parametrize(("kept", "verdict"), [(0.95, "yes"), (0.94, "unsure"), (0.79, "no")])
def test_limits_of_trust(kept: float, verdict: str) -> None:
    audit = make_audit()
    robust = replace(audit.robustness[0], kept=kept)
    better = replace(robust, kept=1.0)
    assert judge_labels(LABELS, audit.agreements, [better, robust]).verdict == verdict
    assert judge_labels(LABELS, (), ()).verdict == "unsure"
    low = replace(audit.agreements[0], mcc=Interval(0.2, 0.1, 0.3))
    assert judge_labels(LABELS, [*audit.agreements, low], ()).verdict == "no"
    assert judge_labels(LABELS, audit.agreements, ()).verdict == "yes"


def save(model: PeftModel, folder: Path) -> str:
    model.save_pretrained(str(folder))
    return (folder / "README.md").read_text()


def test_the_summary_in_the_model_card(model: PeftModel, tmp_path: Path) -> None:
    before = save(model, tmp_path)
    first = make_audit()
    add_audit(tmp_path, first)
    once = (tmp_path / "README.md").read_text()
    assert once.startswith(before.rstrip())
    assert f"{first.trained.loss:.3f}" in once
    add_audit(tmp_path, first)
    assert (tmp_path / "README.md").read_text() == once
    add_audit(tmp_path, make_audit(n_pairs=123))
    again = (tmp_path / "README.md").read_text()
    assert again.count("fsrl-audit:start") == again.count("fsrl-audit:end") == 1
    assert "On 123 held-out" in again
    assert "On 400 held-out" not in again

    assert "On 123 held-out" in save(model, tmp_path), "PEFT keeps what it finds in a card"
    weights = compute_sha256(tmp_path / "adapter_model.safetensors")
    assert f"Of the weights with SHA-256 `{weights}`" in again


def test_only_an_adapters_folder_has_a_card(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected an adapter's folder"):
        add_audit(tmp_path, make_audit())


def test_the_card_cannot_be_broken_from_inside(model: PeftModel, tmp_path: Path) -> None:
    evil = f"{HOSTILE}\n| a | b |\n<!-- fsrl-audit:end -->\n# Title"
    section = render_card_section(make_audit(text=evil))
    assert "<!--" not in section
    assert "<script" not in section
    assert "\n#" not in section.replace("\n## ", "", 1) or section.count("\n#") == 0
    rows = [line for line in section.splitlines() if line.startswith("|")]
    widths = [line.replace("\\|", "").count("|") for line in rows]
    assert set(widths) <= {4, 5, 6}
    save(model, tmp_path)
    add_audit(tmp_path, make_audit(text=evil))
    add_audit(tmp_path, make_audit())
    text = (tmp_path / "README.md").read_text()
    assert "window.pwned" not in text


def test_the_trainers_card_keeps_it(tmp_path: Path, make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(tmp_path)
    trainer.save_model()
    add_audit(tmp_path, make_audit())
    trainer.save_model()
    assert "fsrl-audit:start" in (tmp_path / "README.md").read_text()
    trainer.create_model_card()
    assert "fsrl-audit:start" in (tmp_path / "README.md").read_text()
    with torch.no_grad():
        helpers.only_layer(trainer.model).fsrl_adapter["default"].weight += 1
    trainer.save_model()
    changed = (tmp_path / "README.md").read_text()
    assert "fsrl-audit" not in changed
    assert "held-out" not in changed


@pytest.fixture
def make_trainer() -> Callable[..., Any]:
    def make(folder: Path) -> Any:
        from transformers import Trainer, TrainingArguments

        from peft_fsrl import with_fsrl

        args = TrainingArguments(str(folder), report_to="none", use_cpu=True)
        model = helpers.fsrl_model(l1_coeff=0.0)
        return with_fsrl(Trainer)(model=model, args=args)

    return make
