"""How well labels hold up: on texts they were not made from, and from one judgement to the next."""

from __future__ import annotations

import dataclasses
import logging
import random
import re
from collections.abc import Iterable, Sequence

from ..records import Context, Detection, FeatureEvidence, HeldOutContexts, Labels
from ._prompts import chat, conclusion, read_prompt, render_context
from .judge import Judge

logger = logging.getLogger(__name__)

_ACTIVE = re.compile(r"\bactive\b\s*:\s*(.*)", flags=re.IGNORECASE)
_NUMBERS = re.compile(r"\W*\d+(\W+(and\W+)?\d+)*\W*")
_NONE = re.compile(r"\W*none\W*|\[\s*\]", flags=re.IGNORECASE)


def detection_quality(
    descriptions: Labels,
    held_out: Iterable[HeldOutContexts],
    judge: Judge,
    *,
    evidence: Iterable[FeatureEvidence] = (),
    seed: int = 0,
    description: str | None = None,
) -> tuple[Detection, ...]:
    """Can a judge tell from a description where a feature is active, and where it is not?

    The judge sees the description and, shuffled, as many contexts with the feature as without.
    Source: the detection score of Paulo et al., "Automatically Interpreting Millions of Features in
    Large Language Models" (arXiv 2410.13928), here balanced.

    Args:
        descriptions: labels with descriptions.
        held_out: from ``collect_held_out``, on texts of the domain that matters.
        judge: who is asked, once per feature; preferably not who wrote the descriptions.
        evidence: what the descriptions were made from: contexts of it are never used.
        seed: of the shuffling.
        description: shown beside the progress bar; None shows no bar.

    Returns:
        One record per feature that has a description and at least one context of each kind.

    Raises:
        ValueError: for no such feature.
        JudgeError: if the endpoint fails.
    """
    words = {label.feature: label.description for label in descriptions.features}
    used = {_text(context) for item in evidence for context in item.contexts}
    rng = random.Random(seed)
    quizzes = [
        quiz
        for contexts in held_out
        if (text := words.get(contexts.feature))
        and (quiz := _Quiz.of(contexts, text, used, rng)) is not None
    ]
    if not quizzes:
        raise ValueError(
            "Expected at least one feature with a description, a context in which it is active "
            "and one in which it is not; got none. Give `collect_held_out` more texts."
        )
    system = read_prompt("detect")
    answers = judge.ask([chat(system, quiz.text) for quiz in quizzes], description=description)
    found = [quiz.mark(answer) for quiz, answer in zip(quizzes, answers, strict=True)]
    unread = sum(detection.accuracy is None for detection in found)
    if unread:
        logger.warning(
            "%r: %d of %d answers about contexts cannot be read.", judge, unread, len(found)
        )
    return tuple(found)


def with_quality(labels: Labels, detections: Iterable[Detection]) -> Labels:
    """The labels with the accuracy of each feature's detection as their quality, where it is known.

    Labels of features that were not tested keep theirs.
    """
    known = {d.feature: d.accuracy for d in detections if d.accuracy is not None}
    return dataclasses.replace(
        labels,
        features=tuple(
            dataclasses.replace(label, quality=known.get(label.feature, label.quality))
            for label in labels.features
        ),
    )


def agreement_quality(labellings: Sequence[Labels]) -> Labels:
    """One labelling from several: the majority's categories, and how many agree as the quality.

    Args:
        labellings: of several judges, or several runs; their common categories count.

    Returns:
        Labels of the features that all have labelled. A feature is in a category if more than half
        say so; ``quality`` is the mean over categories of the share that agrees with the majority.
        Ties make a feature undecided.

    Raises:
        ValueError: for fewer than two, or none in common.
    """
    if len(labellings) < 2:
        raise ValueError(f"Expected at least two labellings, got {len(labellings)}.")
    names = [
        name
        for name in labellings[0].categories
        if all(name in labels.categories for labels in labellings)
    ]
    by_feature = [{label.feature: label for label in labels.features} for labels in labellings]
    common = [f for f in by_feature[0] if all(f in labels for labels in by_feature)]
    if not names or not common:
        raise ValueError("Expected labellings with categories and features in common.")
    features, undecided = [], []
    for feature in common:
        said = [labels[feature] for labels in by_feature]
        shares = {name: sum(name in s.categories for s in said) / len(said) for name in names}
        if 0.5 in shares.values():
            undecided.append(feature)
            continue
        quality = sum(max(share, 1 - share) for share in shares.values()) / len(shares)
        chosen = tuple(name for name, share in shares.items() if share > 0.5)
        features.append(dataclasses.replace(said[0], categories=chosen, quality=quality))
    source = "majority of " + ", ".join(labels.source for labels in labellings)
    return dataclasses.replace(
        labellings[0],
        source=source,
        categories=tuple(names),
        features=tuple(features),
        undecided=tuple(undecided),
    )


@dataclasses.dataclass(frozen=True)
class _Quiz:
    feature: int
    text: str
    is_active: tuple[bool, ...]

    @classmethod
    def of(
        cls, contexts: HeldOutContexts, description: str, used: set[str], rng: random.Random
    ) -> _Quiz | None:
        active = [c for c in contexts.active if _text(c) not in used]
        inactive = [c for c in contexts.inactive if _text(c) not in used]
        size = min(len(active), len(inactive))
        if not size:
            return None
        items = [(True, c) for c in active[:size]] + [(False, c) for c in inactive[:size]]
        rng.shuffle(items)
        lines = [
            f"{number}. {render_context(context, marked=False)}"
            for number, (_, context) in enumerate(items, start=1)
        ]
        text = "\n".join([f"Description: {description}", "", "Texts:", *lines])
        return cls(contexts.feature, text, tuple(truth for truth, _ in items))

    def mark(self, answer: str) -> Detection:
        n_active = sum(self.is_active)
        n_inactive = len(self.is_active) - n_active
        chosen = parse_active(answer, len(self.is_active))
        if chosen is None:
            return Detection(self.feature, n_active, n_inactive, 0, 0, None)
        truths = list(enumerate(self.is_active, start=1))
        found = sum(truth and number in chosen for number, truth in truths)
        rejected = sum(not truth and number not in chosen for number, truth in truths)
        accuracy = (found / n_active + rejected / n_inactive) / 2
        return Detection(self.feature, n_active, n_inactive, found, rejected, accuracy)


def parse_active(answer: str, n: int) -> set[int] | None:
    """The numbers after the last ``ACTIVE:``, each from 1 to ``n``; None if they cannot be read."""
    found = _ACTIVE.findall(conclusion(answer))
    if not found:
        return None
    said = found[-1]
    if _NONE.fullmatch(said):
        return set()
    if not _NUMBERS.fullmatch(said):
        return None
    chosen = {int(number) for number in re.findall(r"\d+", said)}
    return chosen if chosen <= set(range(1, n + 1)) else None


def _text(context: Context) -> str:
    return "".join(context.tokens)
