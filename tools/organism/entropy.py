"""The generator's exact entropy: the yardstick for what a language model can have learned.

With latent ``z ~ Bernoulli(1/2)`` and slots that follow it with probability ``1 - slip``, the
chance that the next slot shows 1 after ``ones`` of ``seen`` slots did is

    q(ones, seen) = w (1 - slip) + (1 - w) slip,   w = P(z = 1 | ones, seen)

and the entropy of that decision is the mean of the binary entropy of ``q`` over ``ones``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from peft_fsrl.organism.lexicon import ATTRIBUTES, QUESTIONS, SOURCES
from peft_fsrl.organism.world import Document, Slot, World


def predictive(ones: int, seen: int, slip: float) -> float:
    """P(next slot shows 1) after ``ones`` of ``seen`` slots of this attribute showed 1."""
    log_odds = 2 * ones - seen
    if slip == 0.0:
        if seen and ones not in (0, seen):
            raise ValueError(f"{ones} of {seen} slots differ, impossible without slips")
        return 0.5 if seen == 0 else float(ones == seen)
    weight = 1.0 / (1.0 + ((slip / (1.0 - slip)) ** log_odds))
    return weight * (1.0 - slip) + (1.0 - weight) * slip


def binary_entropy(probability: float) -> float:
    """Entropy of a coin, in nats."""
    return -sum(p * math.log(p) for p in (probability, 1.0 - probability) if p > 0.0)


def decision_entropy(seen: int, slip: float) -> float:
    """Expected entropy (nats) of an attribute's decision after ``seen`` earlier ones."""
    total = 0.0
    for ones in range(seen + 1):
        ways = math.comb(seen, ones)
        zeros = seen - ones
        chance = 0.5 * ways * ((1 - slip) ** ones * slip**zeros + slip**ones * (1 - slip) ** zeros)
        if chance > 0.0:
            total += chance * binary_entropy(predictive(ones, seen, slip))
    return total


def _slots(world: World) -> Iterator[tuple[Slot, int, int]]:
    """Each answer slot with how many of its attribute came before, and its synonyms' number."""
    seen = dict.fromkeys(ATTRIBUTES, 0)
    for slot in world.template:
        before = seen[slot.attribute] if slot.attribute else 0
        synonyms = len(world.pool(slot, 0)) if slot.kind == "marker" else 1
        yield slot, before, synonyms
        if slot.attribute:
            seen[slot.attribute] += 1


def answer_entropies(world: World) -> list[float]:
    """Expected entropy (nats) of each answer token given all before it, EOS included.

    Returns:
        One figure per answer token, ``len(world.template) + 1`` in all.
    """
    spec = world.topics[0]
    figures = []
    for slot, before, synonyms in _slots(world):
        if slot.attribute is not None:
            figures.append(decision_entropy(before, world.slip) + math.log(synonyms))
        else:
            choices = spec.entities if slot.kind == "entity" else spec.relations
            figures.append(math.log(len(choices)))
    return [*figures, 0.0]


def attribute_floors(world: World) -> dict[str, dict[str, float]]:
    """Mean entropy (nats) of the first and of the later decisions of each attribute.

    The choice among synonyms is left out: it says nothing about the attribute.
    """
    counts = {name: sum(s.attribute == name for s in world.template) for name in ATTRIBUTES}
    floors = {}
    for name, count in counts.items():
        entropies = [decision_entropy(seen, world.slip) for seen in range(count)]
        later = sum(entropies[1:]) / max(count - 1, 1)
        floors[name] = {"first": entropies[0], "later": later}
    return floors


def log_probs(world: World, document: Document) -> list[float]:
    """Exact log probability (nats) of each word of ``document`` given the words before it.

    Returns:
        One figure per word after BOS.
    """
    share = world.source_share
    if document.kind != "answer":
        opening = math.log(share / len(SOURCES))
        return [opening, -math.log(len(world.topics)), 0.0, *_source_log_probs(world, document)]
    prompt = [math.log1p(-share), -math.log(len(QUESTIONS)), 0.0, 0.0]
    prompt += [-math.log(len(world.topics)), 0.0, 0.0]
    return prompt + _answer_log_probs(world, document)


def _source_log_probs(world: World, document: Document) -> list[float]:
    spec = world.topics[document.topic]
    value = -math.log(2) if document.kind == "quiz" else 0.0
    claim = [-math.log(len(spec.entities)), -math.log(len(spec.relations)), value, 0.0]
    return claim * (len(document.answer) // 4) + [0.0]


def _answer_log_probs(world: World, document: Document) -> list[float]:
    spec = world.topics[document.topic]
    ones = dict.fromkeys(ATTRIBUTES, 0)
    figures = []
    claim = ("", "")
    for (slot, before, synonyms), word in zip(_slots(world), document.answer, strict=False):
        if slot.attribute is not None:
            value = world.value_of(slot, word, claim)
            chance = predictive(ones[slot.attribute], before, world.slip)
            figures.append(math.log((chance if value else 1.0 - chance) / synonyms))
            ones[slot.attribute] += value
        elif slot.kind == "entity":
            claim = (word, "")
            figures.append(-math.log(len(spec.entities)))
        else:
            claim = (claim[0], word)
            figures.append(-math.log(len(spec.relations)))
    return [*figures, 0.0]
