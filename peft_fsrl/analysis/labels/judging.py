"""What a judge says about features: descriptions, categories, and how well they hold up."""

from __future__ import annotations

import dataclasses
import logging
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...records import Record
from .evidence import Context, FeatureEvidence, HeldOutContexts
from .judge import Judge
from .source import FeatureLabel, Labels, with_descriptions

logger = logging.getLogger(__name__)

# A token is marked from this share of its context's strongest activation.
_MARKED = 0.5
# Some chat templates write the opening mark into the prompt: the answer has the closing one alone.
_REASONING = re.compile(
    r"<think>.*?(?:</think>|\Z)|\A(?:(?!<think>).)*?</think>", flags=re.DOTALL | re.IGNORECASE
)
# A model that repeats the form, "ANSWER: yes or no", has not answered.
_ANSWER = re.compile(r"\banswer\W*(yes|no)\b(?!\s*(?:or\b|/))", flags=re.IGNORECASE)
_BARE = re.compile(r"\W*(yes|no)\b\W*", flags=re.IGNORECASE)
_CONFIDENCE = re.compile(r"\bconfidence\W*(\d+(?:\.\d+)?)\s*(%?)", flags=re.IGNORECASE)
# Within a line: over many empty ones, ``\W*`` would take time with their square.
_DESCRIPTION = re.compile(
    r"^[^\w\n]*description[^\w\n]*:[^\S\n]*(.+)$", flags=re.IGNORECASE | re.MULTILINE
)
_ACTIVE = re.compile(r"\bactive\b\s*:\s*(.*)", flags=re.IGNORECASE)
_NUMBERS = re.compile(r"\W*\d{1,9}(\W+(and\W+)?\d{1,9})*\W*")
_NONE = re.compile(r"\W*none\W*|\[\s*\]", flags=re.IGNORECASE)

Material = Iterable[FeatureEvidence] | Labels


@dataclass(frozen=True)
class Category:
    """Something that a feature can be about.

    Attributes:
        name: of the category, as it appears in labels.
        definition: for the judge, in Markdown: what belongs, what does not, borderline cases.
    """

    name: str
    definition: str

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.definition.strip():
            raise ValueError(f"Expected a category with a name and a definition, got {self}.")

    @classmethod
    def from_file(cls, path: str | Path, name: str | None = None) -> Category:
        """A definition from a file, whose name is the category's unless there is another."""
        path = Path(path).expanduser()
        return cls(path.stem if name is None else name, path.read_text("utf-8"))


def default_categories() -> tuple[Category, Category]:
    """The package's own: ``alignment`` and ``style``."""
    return (
        Category("alignment", _read_prompt("alignment")),
        Category("style", _read_prompt("style")),
    )


@dataclass(frozen=True)
class Judgment(Record):
    """What a judge answered about one feature and one category.

    Attributes:
        feature: index in the SAE.
        category: the category.
        verdicts: one per sample; None for an answer that nobody could read.
        confidence: that the judge claims, from 0 to 1, mean over the samples that name one.
    """

    feature: int
    category: str
    verdicts: tuple[bool | None, ...]
    confidence: float | None

    @property
    def verdict(self) -> bool | None:
        """What most readable samples say; None for a tie or no readable one."""
        yes, no = self.verdicts.count(True), self.verdicts.count(False)
        return None if yes == no else yes > no


def collect_judgments(
    material: Material,
    categories: Sequence[Category] | None,
    judge: Judge,
    *,
    descriptions: Labels | None = None,
    samples: int = 1,
) -> tuple[Judgment, ...]:
    """The single answers behind ``judge_features``, with what the judge says of its confidence."""
    if samples < 1:
        raise ValueError(f"Expected at least one sample, got {samples}.")
    if samples > 1 and judge.repeats_itself:
        raise ValueError(
            f"Expected samples that can differ, got {samples} at temperature 0, whose agreement "
            "says nothing. Give the judge a temperature above 0, or ask once."
        )
    categories = default_categories() if categories is None else categories
    names = [category.name for category in categories]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"Expected categories, each with a name of its own, got {names}.")
    known = _render_material(material, descriptions)
    frame = _read_prompt("categorize")
    systems = {
        c.name: _fill(frame, {"category": c.name, "definition": c.definition.strip()})
        for c in categories
    }
    questions = [(feature, name) for feature in known for name in systems]
    prompts = [_chat(systems[name], known[feature]) for feature, name in questions]
    answers = [judge.ask(prompts, sample=n) for n in range(samples)]
    judgments = []
    for (feature, name), *given in zip(questions, *answers, strict=True):
        verdicts, confidences = zip(*map(parse_verdict, given), strict=True)
        claimed = [confidence for confidence in confidences if confidence is not None]
        confidence = sum(claimed) / len(claimed) if claimed else None
        judgments.append(Judgment(feature, name, verdicts, confidence))
    return tuple(judgments)


def judge_features(
    material: Material,
    categories: Sequence[Category] | None,
    judge: Judge,
    *,
    descriptions: Labels | None = None,
    samples: int = 1,
) -> Labels:
    """Ask a judge, for every feature and category, whether the one belongs to the other.

    Args:
        material: evidence, or labels with descriptions such as Neuronpedia's.
        categories: None takes ``alignment`` and ``style``.
        judge: who is asked: once per feature, category and sample.
        descriptions: shown to the judge beside the evidence.
        samples: answers per feature and category, of which the majority counts. For more than one
            give the judge a temperature above 0.

    Returns:
        Labels of the features whose answers could all be read; the others are in ``undecided``,
        and logged. Descriptions are kept. With several samples, ``quality`` is the mean share of
        them that agree with the verdict; with one it is None.

    Raises:
        ValueError: for no feature, a feature of which nothing is known, no category or sample, or
            two categories of one name.
        JudgeError: if the endpoint fails.
    """
    material = material if isinstance(material, Labels) else tuple(material)
    categories = default_categories() if categories is None else categories
    by_feature: dict[int, list[Judgment]] = {}
    for judgment in collect_judgments(
        material, categories, judge, descriptions=descriptions, samples=samples
    ):
        by_feature.setdefault(judgment.feature, []).append(judgment)
    labels, undecided = [], []
    for feature, found in by_feature.items():
        if any(judgment.verdict is None for judgment in found):
            undecided.append(feature)
            continue
        names = tuple(judgment.category for judgment in found if judgment.verdict)
        agreement = sum(j.verdicts.count(j.verdict) for j in found) / (samples * len(found))
        quality = agreement if samples > 1 else None
        labels.append(FeatureLabel(feature, None, names, quality))
    _warn(judge, len(undecided), len(by_feature), "labels")
    names = tuple(category.name for category in categories)
    judged = Labels(f"judge {judge.model}", names, None, None, tuple(labels), tuple(undecided))
    for source in (material, descriptions):
        if isinstance(source, Labels):
            judged = with_descriptions(judged, source)
    return judged


def describe_features(evidence: Iterable[FeatureEvidence], judge: Judge) -> Labels:
    """Ask a judge to say in a phrase what each feature detects.

    Args:
        evidence: of the features.
        judge: who is asked, once per feature.

    Returns:
        Labels without categories; what could not be read is in ``undecided``, and logged.

    Raises:
        ValueError: for no feature, or one of which nothing is known.
        JudgeError: if the endpoint fails.
    """
    known = _render_material(evidence, None)
    system = _read_prompt("describe")
    answers = judge.ask([_chat(system, text) for text in known.values()])
    found: dict[int, str] = {}
    for feature, answer in zip(known, answers, strict=True):
        phrases = _DESCRIPTION.findall(conclusion(answer))
        if phrases and phrases[-1].strip():
            found[feature] = phrases[-1].strip()
    undecided = tuple(feature for feature in known if feature not in found)
    _warn(judge, len(undecided), len(known), "descriptions")
    features = tuple(FeatureLabel(feature, text, (), None) for feature, text in found.items())
    return Labels(f"judge {judge.model}", (), None, None, features, undecided)


@dataclass(frozen=True)
class Detection(Record):
    """How well a description tells contexts with a feature from contexts without.

    Attributes:
        feature: index in the SAE.
        n_active: contexts shown in which it is active.
        n_inactive: contexts shown in which it is not.
        found: active ones that were called so.
        rejected: inactive ones that were called so.
        accuracy: balanced, ``(found / n_active + rejected / n_inactive) / 2``; chance is 0.5. None
            without a usable answer.
    """

    feature: int
    n_active: int
    n_inactive: int
    found: int
    rejected: int
    accuracy: float | None


def measure_detection(
    descriptions: Labels,
    held_out: Iterable[HeldOutContexts],
    judge: Judge,
    *,
    evidence: Iterable[FeatureEvidence] = (),
    seed: int = 0,
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

    Returns:
        One record per feature that has a description and at least one context of each kind.

    Raises:
        ValueError: for no such feature.
        JudgeError: if the endpoint fails.
    """
    words = {label.feature: label.description for label in descriptions.features}
    used = {context.text for item in evidence for context in item.contexts}
    rng = random.Random(seed)
    questions, truths = [], []
    for contexts in held_out:
        active = [c for c in contexts.active if c.text not in used]
        inactive = [c for c in contexts.inactive if c.text not in used]
        size = min(len(active), len(inactive))
        if not size or not words.get(contexts.feature):
            continue
        items = [(True, c) for c in active[:size]] + [(False, c) for c in inactive[:size]]
        rng.shuffle(items)
        lines = [f"{n}. {render_context(c, marked=False)}" for n, (_, c) in enumerate(items, 1)]
        head = f"Description: {words[contexts.feature]}"
        questions.append("\n".join([head, "", "Texts:", *lines]))
        truths.append((contexts.feature, [is_active for is_active, _ in items]))
    if not questions:
        raise ValueError(
            "Expected at least one feature with a description, a context in which it is active "
            "and one in which it is not; got none. Give `collect_held_out` more texts."
        )
    system = _read_prompt("detect")
    answers = judge.ask([_chat(system, question) for question in questions])
    found = tuple(_detection(*truth, answer) for truth, answer in zip(truths, answers, strict=True))
    unread = sum(detection.accuracy is None for detection in found)
    if unread:
        logger.warning(
            "%r: %d of %d answers about contexts cannot be parsed.", judge, unread, len(found)
        )
    return found


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


def conclusion(answer: str) -> str:
    """An answer without a reasoning model's thoughts, emphasis and code quotes."""
    return re.sub(r"[*`]+", "", _REASONING.sub("", answer)).strip()


def render_evidence(evidence: FeatureEvidence | None, description: str | None) -> str:
    """What is known of a feature, for a judge.

    Raises:
        ValueError: if that is nothing.
    """
    parts = [] if not description else [f"Description: {description}"]
    if evidence is not None and evidence.contexts:
        contexts = [f"{n}. {render_context(c)}" for n, c in enumerate(evidence.contexts, start=1)]
        share = f"active on {evidence.density:.3%} of all tokens"
        parts.append("\n".join([f"Contexts, strongest first ({share}):", *contexts]))
    if evidence is not None and evidence.promoted:
        for what, tokens in ("promotes", evidence.promoted), ("suppresses", evidence.suppressed):
            quoted = ", ".join(repr(token.strip() or token) for token in tokens)
            parts.append(f"Tokens that it {what}: {quoted}")
    if not parts:
        raise ValueError(
            "Expected a feature with a description, contexts or tokens to judge by, got nothing."
        )
    return "\n\n".join(parts)


def render_context(context: Context, *, marked: bool = True) -> str:
    """A context on one line, its strongest tokens between ``<<`` and ``>>``."""
    peak = max(map(abs, context.activations), default=0.0)
    text = ""
    for token, activation in zip(context.tokens, context.activations, strict=True):
        if marked and peak and abs(activation) >= _MARKED * peak:
            bare = token.lstrip(" ")
            text += f"{token[: len(token) - len(bare)]}<<{bare or token}>>"
        else:
            text += token
    return text.replace("\n", "\\n")


def _render_material(material: Material, descriptions: Labels | None) -> dict[int, str]:
    evidence: dict[int, FeatureEvidence] = {}
    words: dict[int, str | None] = {}
    if isinstance(material, Labels):
        words = {label.feature: label.description for label in material.features}
    else:
        evidence = {item.feature: item for item in material}
    if descriptions is not None:
        words.update({label.feature: label.description for label in descriptions.features})
    known: Mapping[int, Any] = evidence or words
    if not known:
        raise ValueError("Expected at least one feature to judge, got none.")
    return {f: render_evidence(evidence.get(f), words.get(f)) for f in known}


def _confidence(text: str) -> float | None:
    found = _CONFIDENCE.findall(text)
    if not found:
        return None
    number, percent = found[-1]
    value = float(number)
    if percent or "." not in number or value > 1:
        value /= 100
    return value if value <= 1 else None


def _detection(feature: int, is_active: Sequence[bool], answer: str) -> Detection:
    n_active = sum(is_active)
    n_inactive = len(is_active) - n_active
    chosen = parse_active(answer, len(is_active))
    if chosen is None:
        return Detection(feature, n_active, n_inactive, 0, 0, None)
    found = sum(truth and number in chosen for number, truth in enumerate(is_active, start=1))
    rejected = n_inactive - (len(chosen) - found)
    accuracy = (found / n_active + rejected / n_inactive) / 2
    return Detection(feature, n_active, n_inactive, found, rejected, accuracy)


def _chat(system: str, user: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _fill(prompt: str, values: Mapping[str, str]) -> str:
    """A prompt with ``{{name}}`` replaced; what is put in is not looked at again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], prompt)


@cache
def _read_prompt(name: str) -> str:
    return (files(__package__) / "prompts" / f"{name}.md").read_text("utf-8").strip()


def _warn(judge: Judge, n: int, total: int, what: str) -> None:
    if n:
        logger.warning(
            "%r: no %s for %d of %d features, because the answers cannot be parsed.",
            judge,
            what,
            n,
            total,
        )
