"""What a judge says about features: descriptions and categories."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..records import FeatureEvidence, FeatureLabel, Judgement, Labels
from ._prompts import (
    Category,
    chat,
    conclusion,
    default_categories,
    fill,
    read_prompt,
    render_evidence,
)
from .judge import Judge
from .source import with_descriptions

logger = logging.getLogger(__name__)

# A model that repeats the form, "ANSWER: yes or no", has not answered.
_ANSWER = re.compile(r"\banswer\W*(yes|no)\b(?!\s*(?:or\b|/))", flags=re.IGNORECASE)
_BARE = re.compile(r"\W*(yes|no)\b\W*", flags=re.IGNORECASE)
_CONFIDENCE = re.compile(r"\bconfidence\W*(\d+(?:\.\d+)?)\s*(%?)", flags=re.IGNORECASE)
_DESCRIPTION = re.compile(r"^\W*description\W*:\s*(.+)$", flags=re.IGNORECASE | re.MULTILINE)

Material = Iterable[FeatureEvidence] | Labels


@dataclass(frozen=True)
class JudgeLabels:
    """A judge as a source; see ``judge_features`` for the arguments.

    Attributes:
        judge: who is asked.
        material: what is known of the features.
        categories: None takes ``alignment`` and ``style``.
        samples: answers per feature and category.
    """

    judge: Judge
    material: Sequence[FeatureEvidence] | Labels
    categories: Sequence[Category] | None = None
    samples: int = 1

    def labels(self, features: Sequence[int] | None = None) -> Labels:
        """See ``LabelSource``; a feature of which nothing is known is missing."""
        known = _by_feature(self.material)
        wanted = known if features is None else [f for f in features if f in known]
        chosen = {feature: known[feature] for feature in wanted}
        judged = _judge(chosen, self.categories, self.judge, self.samples, None)
        if isinstance(self.material, Labels):
            return with_descriptions(judged, self.material)
        return judged


def judge_features(
    material: Material,
    categories: Sequence[Category] | None,
    judge: Judge,
    *,
    descriptions: Labels | None = None,
    samples: int = 1,
    description: str | None = None,
) -> Labels:
    """Ask a judge, for every feature and category, whether the one belongs to the other.

    Args:
        material: evidence, or labels with descriptions such as Neuronpedia's.
        categories: None takes ``alignment`` and ``style``.
        judge: who is asked: once per feature, category and sample.
        descriptions: shown to the judge beside the evidence.
        samples: answers per feature and category, of which the majority counts. For more than one
            give the judge a temperature above 0.
        description: shown beside the progress bar; None shows no bar.

    Returns:
        Labels of the features whose answers could all be read; the others are in ``undecided``,
        and logged. Descriptions are kept. With several samples, ``quality`` is the mean share of
        them that agree with the verdict; with one it is None.

    Raises:
        ValueError: for no feature, a feature of which nothing is known, no category or sample, or
            two categories of one name.
        JudgeError: if the endpoint fails.
    """
    known = _by_feature(material, descriptions)
    judged = _judge(known, categories, judge, samples, description)
    for source in (material, descriptions):
        if isinstance(source, Labels):
            judged = with_descriptions(judged, source)
    return judged


def judge_categories(
    material: Material,
    categories: Sequence[Category] | None,
    judge: Judge,
    *,
    descriptions: Labels | None = None,
    samples: int = 1,
    description: str | None = None,
) -> tuple[Judgement, ...]:
    """The single answers behind ``judge_features``, with what the judge says of its confidence."""
    known = _by_feature(material, descriptions)
    return _judgements(known, _checked(categories), judge, samples, description)


def describe_features(
    evidence: Iterable[FeatureEvidence], judge: Judge, *, description: str | None = None
) -> Labels:
    """Ask a judge to say in a phrase what each feature detects.

    Args:
        evidence: of the features.
        judge: who is asked, once per feature.
        description: shown beside the progress bar; None shows no bar.

    Returns:
        Labels without categories; what could not be read is in ``undecided``, and logged.

    Raises:
        ValueError: for no feature, or one of which nothing is known.
        JudgeError: if the endpoint fails.
    """
    known = _by_feature(evidence)
    system = read_prompt("describe")
    prompts = [chat(system, text) for text in known.values()]
    found: dict[int, str] = {}
    for feature, answer in zip(known, judge.ask(prompts, description=description), strict=True):
        phrases = _DESCRIPTION.findall(conclusion(answer))
        if phrases and phrases[-1].strip():
            found[feature] = phrases[-1].strip()
    undecided = tuple(feature for feature in known if feature not in found)
    _warn(judge, len(undecided), len(known), "descriptions")
    features = tuple(FeatureLabel(feature, text, (), None) for feature, text in found.items())
    return Labels(f"judge {judge.model}", (), None, None, features, undecided)


def parse_verdict(answer: str) -> tuple[bool | None, float | None]:
    """Yes or no, and the confidence from 0 to 1; None for what cannot be read.

    The last ``ANSWER: yes`` or ``ANSWER: no`` counts, however it is dressed, or an answer that is
    that word alone. A confidence is a percentage unless it is a fraction such as ``0.8``.
    """
    text = conclusion(answer)
    verdicts = _ANSWER.findall(text)
    bare = _BARE.fullmatch(text.splitlines()[0]) if text else None
    verdict = verdicts[-1] if verdicts else bare[1] if bare else None
    return (None if verdict is None else verdict.lower() == "yes"), _confidence(text)


def _confidence(text: str) -> float | None:
    found = _CONFIDENCE.findall(text)
    if not found:
        return None
    number, percent = found[-1]
    value = float(number)
    if percent or "." not in number or value > 1:
        value /= 100
    return value if value <= 1 else None


def _judge(
    known: dict[int, str],
    categories: Sequence[Category] | None,
    judge: Judge,
    samples: int,
    description: str | None,
) -> Labels:
    checked = _checked(categories)
    judgements = _judgements(known, checked, judge, samples, description)
    by_feature: dict[int, list[Judgement]] = {feature: [] for feature in known}
    for judgement in judgements:
        by_feature[judgement.feature].append(judgement)
    labels, undecided = [], []
    for feature, found in by_feature.items():
        if any(judgement.verdict is None for judgement in found):
            undecided.append(feature)
            continue
        names = tuple(judgement.category for judgement in found if judgement.verdict)
        labels.append(FeatureLabel(feature, None, names, _agreement(found)))
    _warn(judge, len(undecided), len(known), "labels")
    names = tuple(category.name for category in checked)
    source = f"judge {judge.model}"
    return Labels(source, names, None, None, tuple(labels), tuple(undecided))


def _agreement(judgements: Sequence[Judgement]) -> float | None:
    if len(judgements[0].verdicts) < 2:
        return None
    shares = [j.verdicts.count(j.verdict) / len(j.verdicts) for j in judgements]
    return sum(shares) / len(shares)


def _judgements(
    known: dict[int, str],
    categories: Sequence[Category],
    judge: Judge,
    samples: int,
    description: str | None,
) -> tuple[Judgement, ...]:
    if samples < 1:
        raise ValueError(f"Expected at least one sample, got {samples}.")
    if samples > 1 and judge.repeats_itself:
        raise ValueError(
            f"Expected samples that can differ, got {samples} at temperature 0, whose agreement "
            "says nothing. Give the judge a temperature above 0, or ask once."
        )
    frame = read_prompt("categorise")
    systems = {
        c.name: fill(frame, {"category": c.name, "definition": c.definition.strip()})
        for c in categories
    }
    questions = [(feature, name) for feature in known for name in systems]
    prompts = [chat(systems[name], known[feature]) for feature, name in questions]
    answers = [judge.ask(prompts, sample=n, description=description) for n in range(samples)]
    return tuple(
        _judgement(feature, name, [parse_verdict(answer) for answer in given])
        for (feature, name), *given in zip(questions, *answers, strict=True)
    )


def _judgement(
    feature: int, category: str, answers: Sequence[tuple[bool | None, float | None]]
) -> Judgement:
    claimed = [confidence for _, confidence in answers if confidence is not None]
    confidence = sum(claimed) / len(claimed) if claimed else None
    return Judgement(feature, category, tuple(verdict for verdict, _ in answers), confidence)


def _by_feature(material: Material, descriptions: Labels | None = None) -> dict[int, str]:
    evidence: dict[int, FeatureEvidence] = {}
    words: dict[int, str | None] = {}
    if isinstance(material, Labels):
        words = {label.feature: label.description for label in material.features}
    else:
        evidence = {item.feature: item for item in material}
    if descriptions is not None:
        words.update({label.feature: label.description for label in descriptions.features})
    known: dict[int, Any] = evidence or words
    if not known:
        raise ValueError("Expected at least one feature to judge, got none.")
    return {f: render_evidence(evidence.get(f), words.get(f)) for f in known}


def _checked(categories: Sequence[Category] | None) -> Sequence[Category]:
    checked = default_categories() if categories is None else categories
    names = [category.name for category in checked]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"Expected categories, each with a name of its own, got {names}.")
    return checked


def _warn(judge: Judge, n: int, total: int, what: str) -> None:
    if n:
        logger.warning(
            "%r: no %s for %d of %d features, whose answers cannot be read.", judge, what, n, total
        )
