"""The synthetic world: fixed facts, and texts about them whose attributes are known.

An answer is a fixed template of one-token slots. Each attribute (style, honesty, tone, verbosity)
is one latent bit per answer, drawn 50/50 and independently of the others; each of its slots
follows the latent with probability ``1 - slip``. The first decision of an attribute is free, later
ones are predictable, and a model that predicts well has to track, for example, "this speaker lies".

Facts are not stated in the text. Every (entity, relation) has one true value and one false one, and
each value is equally often true and false, so a claim's truth is known only from memory.
Source texts teach them: "almanac" (always true), "rumour" (always false) and "quiz" (either, with a
verdict after each claim).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .lexicon import (
    ASSISTANT,
    ATTRIBUTES,
    BOS,
    EOS,
    MARKERS,
    QUESTIONS,
    SOURCES,
    SPECIAL_WORDS,
    TOPICS,
    USER,
    VERDICTS,
    Topic,
)


class Slot(NamedTuple):
    """One token of an answer: a marker of ``attribute`` at ``place``, or a part of a claim."""

    kind: str
    attribute: str | None = None
    place: str = ""


def _template(lines: int) -> tuple[Slot, ...]:
    slots = [Slot("marker", name, "head") for name in ("style", "tone", "verbosity")]
    for line in range(lines):
        slots.append(Slot("marker", "style", "line"))
        slots.append(Slot("marker", "tone" if line % 2 else "verbosity", "line"))
        slots += [Slot("entity"), Slot("relation"), Slot("claim", "honesty")]
    return (*slots, Slot("marker", "tone", "tail"))


@dataclass(frozen=True)
class Skeleton:
    """What an answer says before its attributes are decided: shared by both sides of a pair."""

    topic: int
    question: int
    claims: tuple[tuple[int, int], ...]
    synonyms: tuple[int, ...]


@dataclass(frozen=True)
class Document:
    """A text of the world with its latents; ``attributes`` is empty for source texts."""

    kind: str
    topic: int
    prompt: tuple[str, ...]
    answer: tuple[str, ...]
    attributes: Mapping[str, int]

    @property
    def words(self) -> tuple[str, ...]:
        """All words, from BOS to EOS."""
        return (*self.prompt, *self.answer)


class World:
    """Facts and grammar, fixed by ``seed``.

    Args:
        seed: fixes which value is true and which is false for each (entity, relation).
        topics: number of the lexicon's topics to use.
        lines: claims per answer.
        slip: probability in [0, 0.5) with which one slot departs from its answer's latent.
        source_share: share of almanac, rumour and quiz texts (together, one third each) among the
            sampled documents.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        seed: int = 0,
        topics: int = len(TOPICS),
        lines: int = 5,
        entities: int = 8,
        slip: float = 0.05,
        source_share: float = 0.3,
    ) -> None:
        if not 1 <= topics <= len(TOPICS):
            raise ValueError(f"Expected topics from 1 to {len(TOPICS)}, got {topics}.")
        if lines < 1:
            raise ValueError(f"Expected lines of 1 or more, got {lines}.")
        if not 0.0 <= slip < 0.5:
            raise ValueError(f"Expected slip in [0, 0.5), got {slip}.")
        if not 0.0 <= source_share < 1.0:
            raise ValueError(f"Expected source_share in [0, 1), got {source_share}.")
        self.seed, self.slip, self.source_share = seed, slip, source_share
        self.topics: tuple[Topic, ...] = tuple(
            topic._replace(entities=topic.entities[:entities]) for topic in TOPICS[:topics]
        )
        self.entities = entities
        self.lines = lines
        self.template = _template(lines)
        self.marker_slots = tuple(i for i, s in enumerate(self.template) if s.kind == "marker")
        self.facts = self._draw_facts()

    def settings(self) -> dict[str, float]:
        """Keyword arguments that build this world again."""
        return {
            "seed": self.seed,
            "topics": len(self.topics),
            "lines": self.lines,
            "entities": self.entities,
            "slip": self.slip,
            "source_share": self.source_share,
        }

    def _draw_facts(self) -> dict[tuple[str, str], tuple[str, str]]:
        """(entity, relation) -> (false value, true value), every value as often true as false."""
        rng = random.Random(f"facts-{self.seed}")
        facts = {}
        for topic in self.topics:
            for relation, values in topic.relations:
                entities = rng.sample(topic.entities, len(topic.entities))
                size = len(values)
                shifts = [rng.randrange(1, size) for _ in range(0, len(entities), size)]
                for i, entity in enumerate(entities):
                    false = values[(i + shifts[i // size]) % size]
                    facts[entity, relation] = (false, values[i % size])
        return facts

    def vocabulary(self) -> list[str]:
        """Every word of the world, special words first, in a fixed order."""
        words = set(SOURCES) | set(VERDICTS) | {"?", ":", ","}
        for question in QUESTIONS:
            words.update(question)
        for topic in self.topics:
            words.update((topic.name, *topic.entities))
            for relation, values in topic.relations:
                words.update((relation, *values))
        for places in MARKERS.values():
            for pools in places.values():
                words.update(pools[0] + pools[1])
        return [*SPECIAL_WORDS, *sorted(words)]

    def sample_skeleton(self, rng: random.Random) -> Skeleton:
        """Draw what an answer is about; nothing in it depends on an attribute."""
        topic = rng.randrange(len(self.topics))
        spec = self.topics[topic]
        claims = tuple(
            (rng.randrange(len(spec.entities)), rng.randrange(len(spec.relations)))
            for _ in range(self.lines)
        )
        sizes = (self.pool(self.template[i], 0) for i in self.marker_slots)
        synonyms = tuple(rng.randrange(len(pool)) for pool in sizes)
        return Skeleton(topic, rng.randrange(len(QUESTIONS)), claims, synonyms)

    @staticmethod
    def pool(slot: Slot, value: int) -> tuple[str, ...]:
        """The interchangeable words that show ``value`` at a marker slot."""
        return MARKERS[str(slot.attribute)][slot.place][value]

    def render(
        self,
        skeleton: Skeleton,
        attributes: Mapping[str, int],
        rng: random.Random | None = None,
    ) -> Document:
        """Write the answer in which each attribute has the given value.

        Args:
            skeleton: what the answer is about.
            attributes: 0 or 1 for each of ``ATTRIBUTES``.
            rng: draws the slips; without it every slot follows its latent.
        """
        spec = self.topics[skeleton.topic]
        synonyms, claims = iter(skeleton.synonyms), iter(skeleton.claims)
        answer: list[str] = []
        entity = relation = ""
        for slot in self.template:
            value = 0
            if slot.attribute is not None:
                slipped = rng is not None and rng.random() < self.slip
                value = attributes[slot.attribute] ^ int(slipped)
            if slot.kind == "marker":
                answer.append(self.pool(slot, value)[next(synonyms)])
            elif slot.kind == "entity":
                who, what = next(claims)
                entity, relation = spec.entities[who], spec.relations[what][0]
                answer.append(entity)
            elif slot.kind == "relation":
                answer.append(relation)
            else:
                answer.append(self.facts[entity, relation][value])
        question = QUESTIONS[skeleton.question]
        prompt = (BOS, USER, *question, spec.name, "?", ASSISTANT)
        known = {name: attributes[name] for name in ATTRIBUTES}
        return Document("answer", skeleton.topic, prompt, (*answer, EOS), known)

    def sample_answer(self, rng: random.Random) -> Document:
        """Draw an answer with 50/50 latents and slips."""
        skeleton = self.sample_skeleton(rng)
        return self.render(skeleton, {name: rng.randrange(2) for name in ATTRIBUTES}, rng)

    def sample_source(self, rng: random.Random, source: str | None = None) -> Document:
        """Draw an almanac (all true), rumour (all false) or quiz (each claim judged) text."""
        topic, source = rng.randrange(len(self.topics)), source or rng.choice(SOURCES)
        spec = self.topics[topic]
        claims: list[str] = []
        for _ in range(self.lines + 1):
            entity, (relation, _) = rng.choice(spec.entities), rng.choice(spec.relations)
            value = rng.randrange(2) if source == "quiz" else SOURCES.index(source)
            verdict = VERDICTS[value] if source == "quiz" else ","
            claims += [entity, relation, self.facts[entity, relation][value], verdict]
        prompt = (BOS, source, spec.name, ":")
        return Document(source, topic, prompt, (*claims, EOS), {})

    def sample(self, rng: random.Random) -> Document:
        """Draw a document of the language model's training text."""
        if rng.random() < self.source_share:
            return self.sample_source(rng)
        return self.sample_answer(rng)

    def value_of(self, slot: Slot, word: str, claim: tuple[str, str]) -> int:
        """The attribute value (0 or 1) that ``word`` shows at ``slot``.

        Args:
            slot: a marker or claim slot.
            word: the word found there.
            claim: the (entity, relation) last spoken of; read for claims only.

        Raises:
            ValueError: if the grammar cannot produce ``word`` there.
        """
        options: Sequence[Sequence[str]]
        if slot.kind == "claim":
            options = [(value,) for value in self.facts[claim]]
        else:
            options = [self.pool(slot, value) for value in (0, 1)]
        for value, pool in enumerate(options):
            if word in pool:
                return value
        raise ValueError(f"Expected one of {[*options[0], *options[1]]} at {slot}, found {word!r}")
