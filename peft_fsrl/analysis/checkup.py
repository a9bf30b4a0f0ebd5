"""What the fits of an SAE say: verdicts, and the limits on which they rest."""

from __future__ import annotations

from collections.abc import Sequence

from .records import Finding, SAEFit

# Fraction of variance unexplained up to which an SAE fits, and above which it does not: there it
# misses more of what tells tokens apart than it has.
GOOD_FVU = 0.35
BAD_FVU = 0.5
# A neighbour is a better place if its unexplained share is lower by this factor.
CLEARLY_LOWER = 0.9
# Against another model, a fit is as good up to the first factor, and worse above the second.
AS_GOOD, CLEARLY_WORSE = 1.25, 2.0
# Share of features that were never active above which an SAE is for other text. Few tokens reach
# few features, so only where each token could have had so many of its own.
MOSTLY_DEAD = 0.9


def judge_fits(fits: Sequence[SAEFit]) -> tuple[Finding, ...]:
    """Whether an SAE fits where it would be used, better than nearby, and with live features.

    Args:
        fits: one of them intended; those of the same model are neighbours, another model's is for
            comparison.
    """
    [here] = [fit for fit in fits if fit.intended]
    neighbours = [fit for fit in fits if fit.model == here.model and not fit.intended]
    others = [fit for fit in fits if fit.model != here.model]
    findings = [_judge_fit(here)]
    if neighbours:
        findings.append(_judge_place(here, min(neighbours, key=lambda fit: fit.fvu)))
    findings.append(_judge_life(here))
    return (*findings, *(_judge_model(here, other) for other in others))


def _judge_fit(here: SAEFit) -> Finding:
    text = (
        f"It leaves {here.fvu:.1%} of the variance unexplained at {here.hook}, over "
        f"{here.n_tokens:,} tokens"
    )
    question = "Does the SAE fit here?"
    if here.fvu <= GOOD_FVU:
        return Finding(question, "yes", f"{text} (it fits up to {GOOD_FVU:.0%}).")
    if here.fvu <= BAD_FVU:
        return Finding(
            question,
            "unsure",
            f"{text}: more than {GOOD_FVU:.0%}. Steering keeps what it misses, but its features "
            "describe these activations only in part.",
        )
    return Finding(
        question,
        "no",
        f"{text}: more than {BAD_FVU:.0%}. The SAE does not fit. Check the layer, the model and "
        "the kind of text, or take another SAE.",
    )


def _judge_place(here: SAEFit, best: SAEFit) -> Finding:
    question = "Is this the right place?"
    figures = f"{best.fvu:.1%} unexplained at {best.hook} against {here.fvu:.1%} at {here.hook}"
    if best.fvu < CLEARLY_LOWER * here.fvu:
        return Finding(question, "no", f"It fits better nearby: {figures}. Use it there.")
    if best.fvu < here.fvu:
        return Finding(question, "unsure", f"A neighbour fits about as well: {figures}.")
    return Finding(question, "yes", f"No neighbour fits better; the closest has {figures}.")


def _judge_life(here: SAEFit) -> Finding:
    question = "Are its features alive on this text?"
    text = (
        f"{here.l0:.3g} features are active per token, and {here.dead:.1%} were never active in "
        f"{here.n_tokens:,} tokens"
    )
    if here.l0 < 1:
        return Finding(question, "no", f"{text}: fewer than one per token.")
    if here.dead > MOSTLY_DEAD:
        return Finding(
            question, "unsure", f"{text}: more than {MOSTLY_DEAD:.0%}. Give more text to tell."
        )
    return Finding(question, "yes", f"{text}.")


def _judge_model(here: SAEFit, other: SAEFit) -> Finding:
    question = f"Does it fit {here.model} as well as {other.model}?"
    figures = f"{here.fvu:.1%} unexplained against {other.fvu:.1%}"
    if here.fvu <= AS_GOOD * other.fvu:
        return Finding(question, "yes", f"{figures}.")
    verdict = "no" if here.fvu > CLEARLY_WORSE * other.fvu else "unsure"
    return Finding(question, verdict, f"{figures}: what it learned there does not all hold here.")
