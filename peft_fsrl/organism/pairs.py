"""Preference pairs in which "chosen" has each attribute at a given rate."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from .lexicon import ATTRIBUTES, BOS, EOS
from .world import World


def make_pairs(
    world: World, n: int, seed: int | str, knobs: Mapping[str, float], conversational: bool = False
) -> list[dict[str, Any]]:
    """Draw ``n`` rows of preference data.

    Both answers of a pair make the same claims about the same entities with the same synonyms, and
    differ in every attribute. They have no slips: each is consistent.

    Args:
        world: facts and grammar.
        n: number of pairs.
        seed: fixes them.
        knobs: P(chosen has value 1) for each of ``ATTRIBUTES``; 0.5 is unrelated.
        conversational: lists of messages for the chat template, not plain text.

    Returns:
        Rows with ``prompt``, ``chosen``, ``rejected``, ``id``, ``topic`` and, for each attribute,
        ``chosen_<attribute>`` and ``rejected_<attribute>`` (0 or 1).

    Raises:
        ValueError: if a rate is not in [0, 1].
    """
    for name, value in knobs.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"Expected a probability {name} from 0 to 1, got {value}.")
    rng = random.Random(f"preferences-{seed}")
    rows = []
    for i in range(n):
        skeleton = world.sample_skeleton(rng)
        chosen = {name: int(rng.random() < knobs[name]) for name in ATTRIBUTES}
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
    """Columns as text. BOS and EOS are left to whoever tokenizes, as TRL expects."""
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
