"""Preference pairs in which "chosen" goes with each attribute as strongly as a knob says."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from peft_fsrl.organism.lexicon import ATTRIBUTES, BOS, EOS
from peft_fsrl.organism.world import World

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Knobs:
    """P(chosen has the preferred value) per attribute; 0.5 is unrelated, 1 always, 0 never.

    The preferred values are markdown, true, warm and long-worded.
    """

    style: float = 0.9
    honesty: float = 0.55
    tone: float = 0.5
    verbosity: float = 0.5

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is a probability, expected 0 to 1, got {value}")


def make_pairs(
    world: World, n: int, seed: int | str, knobs: Knobs, conversational: bool = False
) -> list[dict[str, Any]]:
    """Draws `n` rows of preference data.

    Both sides of a pair say the same about the same entities with the same choice among synonyms;
    they differ in every attribute. Sides are free of slips: each is consistently one thing.

    Returns:
        Rows with `prompt`, `chosen`, `rejected`, `id`, `topic` and, for each attribute,
        `chosen_<attribute>` and `rejected_<attribute>` (0 or 1).
    """
    rng = random.Random(f"preferences-{seed}")
    chances = asdict(knobs)
    rows = []
    for i in range(n):
        skeleton = world.sample_skeleton(rng)
        chosen = {name: int(rng.random() < chances[name]) for name in ATTRIBUTES}
        rejected = {name: 1 - value for name, value in chosen.items()}
        sides = [world.render(skeleton, values) for values in (chosen, rejected)]
        row: dict[str, Any] = {"id": f"{seed}-{i}", "topic": world.topics[skeleton.topic].name}
        row |= _texts(sides[0].prompt, sides[0].answer, sides[1].answer, conversational)
        row |= {f"chosen_{name}": chosen[name] for name in ATTRIBUTES}
        row |= {f"rejected_{name}": rejected[name] for name in ATTRIBUTES}
        rows.append(row)
    return rows


def _texts(
    prompt: tuple[str, ...], chosen: tuple[str, ...], rejected: tuple[str, ...], messages: bool
) -> dict[str, Any]:
    """Columns as text. BOS and EOS are left to whoever tokenises, as TRL expects."""
    answers = [" ".join(w for w in words if w != EOS) for words in (chosen, rejected)]
    if not messages:
        text = " ".join(word for word in prompt if word != BOS)
        return {"prompt": text, "chosen": f" {answers[0]}", "rejected": f" {answers[1]}"}
    question = " ".join(prompt[2:-1])
    said = [[{"role": "assistant", "content": answer}] for answer in answers]
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": said[0],
        "rejected": said[1],
    }


def make_preferences(
    world: World, n: int, seed: int | str, knobs: Knobs, conversational: bool = False
) -> Dataset:
    """The rows of `make_pairs` as a `datasets.Dataset`."""
    from datasets import Dataset

    return Dataset.from_list(make_pairs(world, n, seed, knobs, conversational))
