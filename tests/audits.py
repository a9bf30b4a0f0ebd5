"""Audits made up of whole cloth, for what renders them."""

from __future__ import annotations

import math
import random

from peft_fsrl.analysis import (
    Ablation,
    AdapterInfo,
    Audit,
    CategoryMass,
    CategoryShare,
    Coherence,
    Composition,
    Concentration,
    Continuation,
    Curve,
    FeatureAblation,
    FeatureAblations,
    FeatureCard,
    FeatureUse,
    Finding,
    Generation,
    LengthBucket,
    Magnitudes,
    PreferenceScores,
    RankFrequency,
    Setting,
    StaticDynamic,
    SteeredFeature,
    SteeredToken,
    SteeringLevel,
    StratumEffect,
    TopFeatures,
    TrainingCurves,
    Usage,
    VariantCoherence,
)
from peft_fsrl.analysis.data import Mirror, MirroredFeature
from peft_fsrl.analysis.labels import Agreement, Context, FeatureEvidence, FeatureLabel, Robustness
from peft_fsrl.records import Interval

HOSTILE = (
    "<script>window.pwned = 1</script><img src=x onerror='window.pwned=1'>\"'`</script>"
    "<!-- \u202e שלום \x00 \N{GRINNING FACE} {{ 7*7 }} ]]> & \ud800"
)


def make_audit(
    *,
    d_sae: int = 384,
    n_pairs: int = 400,
    n_features: int = 40,
    n_generations: int = 3,
    text: str | None = None,
    seed: int = 0,
) -> Audit:
    """An audit with every part; ``text`` stands wherever somebody else's words would."""
    rng = random.Random(seed)
    words = ["the", "river", "**answer**", "is", "blue", "and", "\n", "- item", "truly", "cold"]

    def say(default: str) -> str:
        return default if text is None else text

    def near(value: float, width: float = 0.1) -> Interval:
        return Interval(value, value - width, value + width)

    def scores(margin: float) -> PreferenceScores:
        margins = [rng.gauss(margin, 2.0) for _ in range(n_pairs)]
        return PreferenceScores(
            tuple(max(5.0 - m, 0.01) for m in margins),
            tuple(margins),
            tuple(rng.randint(5, 40) for _ in margins),
            tuple(rng.randint(5, 40) for _ in margins),
        )

    chosen = rng.sample(range(d_sae), n_features)
    uses = tuple(
        FeatureUse(
            feature,
            0.6 / (1 + rank),
            (1 if rank % 3 else -1) * 0.4 / (1 + rank),
            0.4 / (1 + rank),
            0.6 / (1 + rank) if rank % 3 else 0.0,
            0.1,
            say(("style", "honesty", "topic")[rank % 3]),
        )
        for rank, feature in enumerate(chosen)
    )
    ranks = tuple(sorted({round(d_sae ** (i / 60)) for i in range(61)}))
    category = say("style")

    def level(share: float, loss: float) -> SteeringLevel:
        return SteeringLevel(
            share, round(share * d_sae), share * d_sae, near(loss), near(0.8, 0.03), near(3.0)
        )

    def card(use: FeatureUse) -> FeatureCard:
        tokens = tuple(say(rng.choice(words)) for _ in range(16))
        activations = tuple(max(rng.gauss(0, 1), 0.0) for _ in tokens)
        context = Context(tokens, activations)
        return FeatureCard(
            use,
            FeatureLabel(use.feature, say("bold words and lists"), (category,), 0.91),
            FeatureEvidence(
                use.feature, 0.03, (context,) * 3, (say("**"), "-"), (say("plain"), "so")
            ),
            f"https://www.neuronpedia.org/gemma-2-2b/12-res/{use.feature}",
        )

    def answer(name: str, steered: bool) -> Continuation:
        tokens = tuple(
            SteeredToken(
                say(f"{' ' if place else ''}{rng.choice(words)}"),
                tuple(
                    SteeredFeature(f, rng.gauss(0, 1))
                    for f in rng.sample(chosen, 3 if place % 4 else 0)
                )
                if steered
                else (),
                3 if place % 4 and steered else 0,
            )
            for place in range(48)
        )
        return Continuation(name, "".join(t.text for t in tokens), tokens, len(tokens))

    ablations = tuple(
        Ablation(
            name,
            tuple(range(0, d_sae, 3)),
            mass,
            scores(0.0),
            (scores(4.0),) * 2,
            (scores(3.5),) * 2,
            (mass, mass),
            near(rise),
            near(-0.3, 0.02),
            near(-4.0),
            near(rise - 0.3, 0.2),
            near(rise - 0.6, 0.2),
            tuple(StratumEffect(5.0 * i, 5.0 * i + 5, 100, near(rise)) for i in range(3)),
        )
        for name, mass, rise in ((category, 0.81, 3.6), ("honesty", 0.04, 0.12))
    )
    shares = tuple(
        CategoryShare(
            name, n, 900, 2000, 300, 4000, near(0.45, 0.03), near(0.075, 0.01), near(e, 0.4)
        )
        for name, n, e in ((category, 14, 6.0), ("honesty", 56, 0.8), ("other", d_sae - 70, 0.7))
    )
    coherence = [("base", 9.1, 0.02), ("trained", 10.2, 0.03), (f"without {category}", 9.3, 0.02)]
    return Audit(
        info=AdapterInfo(
            say("runs/organism"),
            say("a small model"),
            say("gemma-scope/layer_12"),
            "gemma-2-2b/12-res",
            "blocks.2.hook_resid_post",
            "ab" * 32,
            "cd" * 32,
            96,
            d_sae,
            37_632,
            (Setting("layer", "2"), Setting("l1_coeff", "0.1"), Setting("activation", say("x"))),
        ),
        dataset=say("held-out pairs"),
        n_pairs=n_pairs,
        created="2026-01-02T03:04:05+00:00",
        versions=("peft-fsrl 0.1.0", "torch 2.13.0"),
        inputs=(Setting("adapter", "1" * 64), Setting("base", "2" * 64)),
        content="3" * 64,
        findings=(
            Finding("Does it beat the base model?", "yes", say("Loss 4.99 to 1.35.")),
            Finding("Is it coherent?", "unsure", say("Perplexity 10.2 against 9.1.")),
            Finding("Does a category carry it?", "yes", say("style: +3.62 [3.5, 3.7].")),
            Finding("Can that be trusted?", "no", say("MCC 0.2.")),
            Finding("Does it mirror its data?", "unsure", say("90% of the steering.")),
        ),
        base=scores(0.0),
        trained=scores(4.5),
        gain=near(3.6),
        buckets=tuple(
            LengthBucket(
                5.0 * i,
                5.0 * i + 5,
                100,
                near(0.5, 0.05),
                near(0.9, 0.03),
                near(0.0, 0.2),
                near(5.0, 0.3),
            )
            for i in range(4)
        ),
        coherence=tuple(
            VariantCoherence(name, Coherence(32, p, r, 0.2, 0.6, 24.0, 0.9))
            for name, p, r in coherence
        ),
        usages=tuple(Usage(s, 9000, 1.1, 0.65, uses) for s in ("chosen", "prompt", "rejected")),
        n_steered=(n_features,) * 3,
        rank_frequencies=tuple(
            RankFrequency(s, ranks, tuple(0.6 * r**-0.8 for r in ranks), d_sae, 0.6, 0.03, 0.97)
            for s in ("chosen", "prompt")
        ),
        concentration=Concentration(
            "chosen",
            d_sae,
            n_features,
            0.97,
            0.71,
            tuple(
                TopFeatures(
                    share,
                    math.ceil(share * d_sae),
                    share**0.1,
                    tuple(
                        CategoryMass(name, math.ceil(share * n), share**0.1 / 2)
                        for name, n in ((category, 14), ("honesty", 56))
                    ),
                )
                for share in (0.01, 0.1, 1.0)
            ),
        ),
        compositions=tuple(Composition(s, 9000, 400, shares) for s in ("chosen", "prompt")),
        magnitudes=tuple(
            Magnitudes(name, n, 0.6, 0.4, (0.01, 0.1, 0.3, 0.6, 1.2) if n else ())
            for name, n in ((category, 1300), ("honesty", 0), ("other", 70))
        ),
        ablations=ablations,
        single=FeatureAblations(
            n_pairs,
            tuple(
                FeatureAblation(
                    use.feature, near(0.3 / (1 + i), 0.02), 0.28 / (1 + i), say("style")
                )
                for i, use in enumerate(uses[:12])
            ),
            0.93,
            1.1,
        ),
        static_dynamic=StaticDynamic(
            d_sae,
            4.99,
            level(0.003, 1.35),
            tuple(level(0.001 * 2**i, 3.0 - 0.2 * i) for i in range(8)),
            tuple(level(0.001 * 2**i, 4.0 - 0.2 * i) for i in range(8)),
        ),
        mirror=Mirror(
            n_pairs,
            n_features,
            near(0.5),
            near(0.4),
            0.1,
            near(0.9, 0.02),
            0.2,
            tuple(
                MirroredFeature(
                    use.feature,
                    use.mean_steering,
                    0.4 / (1 + rank),
                    0.2,
                    1e-9,
                    0.01,
                    rank % 3 == 0,
                    say("style"),
                )
                for rank, use in enumerate(uses)
            ),
        ),
        generations=tuple(
            Generation(
                say("What color is the river?"),
                (
                    answer("base", False),
                    answer("trained", True),
                    answer(f"without {category}", True),
                ),
            )
            for _ in range(n_generations)
        ),
        promoted=tuple(card(use) for use in uses if use.mean_steering > 0)[:10],
        suppressed=tuple(card(use) for use in uses if use.mean_steering < 0)[:10],
        label_source=say("the organism's ground truth"),
        agreements=(
            Agreement(category, say("judge"), say("people"), 40, 5, 8, 331, near(0.75), near(0.74)),
        ),
        robustness=(Robustness(f"enrichment of {category}", 6.0, near(5.1, 0.8), 1.0, 0.99, 200),),
        curves=TrainingCurves(
            (
                Curve("loss", (25, 50, 75), (4.0, 2.0, 1.5)),
                Curve("eval_loss", (25, 75), (3.9, 1.4)),
                Curve("fsrl/l0", (25, 50, 75), (30.0, 4.0, 1.1)),
            )
        ),
        notes=(),
    )
