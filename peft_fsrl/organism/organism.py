"""A built organism, found on disk."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .pairs import make_pairs
from .world import World

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_PATH = Path(__file__).parent / "default"
FORMAT = 1
MANIFEST = "organism.json"
PARTS = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "sae/cfg.json",
    "sae/sae_weights.safetensors",
    "feature_labels.json",
    "figures.json",
    MANIFEST,
)


@dataclass(frozen=True)
class FeatureDetection:
    """What one feature detects.

    Args:
        index: of the feature.
        density: share of sampled answers on which it is active at least once.
        auroc: of each attribute's value 1, and of ``topic``: the best topic against the rest.
        label: the attribute with the largest ``|auroc - 0.5|``; None if it fails the threshold or
            the feature is dead.
    """

    index: int
    density: float
    auroc: dict[str, float]
    label: str | None

    @property
    def alive(self) -> bool:
        """Whether it was active on any sampled answer."""
        return self.density > 0


@dataclass(frozen=True)
class Organism:
    """A language model, its SAE and the world that it was trained on.

    Args:
        path: the directory of the build.
        model_path: what ``AutoModelForCausalLM.from_pretrained`` takes (tokenizer files beside it).
        sae_path: what ``SAE.load_from_disk`` takes.
        layer: the decoder layer whose output the SAE reads.
        attributes: the attributes that texts of its world carry.
        manifest: the settings it was built with.
    """

    path: Path
    model_path: Path
    sae_path: Path
    layer: int
    attributes: tuple[str, ...]
    manifest: dict[str, Any]

    @cached_property
    def world(self) -> World:
        """The world: facts and grammar."""
        return World(**self.manifest["world"])

    @cached_property
    def figures(self) -> dict[str, Any]:
        """What the build measured."""
        figures: dict[str, Any] = json.loads((self.path / "figures.json").read_text())
        return figures

    @cached_property
    def feature_labels(self) -> list[FeatureDetection]:
        """Which attribute each feature of the SAE detects, by index."""
        rows = json.loads((self.path / "feature_labels.json").read_text())
        return [FeatureDetection(**row) for row in rows]

    def features(self, attribute: str) -> list[int]:
        """All features that detect ``attribute``, best first.

        Raises:
            ValueError: if the organism's features were not labeled for such an attribute.
        """
        known = list(self.feature_labels[0].auroc)
        if attribute not in known:
            raise ValueError(f"Expected an attribute among {known}, got {attribute!r}.")
        carriers = [label for label in self.feature_labels if label.label == attribute]
        carriers.sort(key=lambda label: -abs(label.auroc[attribute] - 0.5))
        return [label.index for label in carriers]

    def load_model(self, **kwargs: Any) -> PreTrainedModel:
        """The language model, in evaluation mode; ``kwargs`` go to ``from_pretrained``."""
        from transformers import AutoModelForCausalLM

        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.model_path, **kwargs)
        return model.eval()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.model_path)
        return tokenizer

    def preferences(
        self, n: int, seed: int | str = 0, conversational: bool = False, **knobs: float
    ) -> Dataset:
        """Preference pairs about this organism's world; see ``peft_fsrl.organism.preferences``."""
        return preferences(n, seed, organism=self, conversational=conversational, **knobs)


def missing_parts(path: Path) -> list[str]:
    """Which parts of a finished build ``path`` lacks."""
    return [part for part in PARTS if not (path / part).is_file()]


def load(path: str | os.PathLike[str] | None = None) -> Organism:
    """Find a built organism.

    Args:
        path: its directory; None is the default organism that ships with the package.

    Raises:
        FileNotFoundError: if there is no complete build.
        ValueError: if another version of this package built it.
    """
    directory = DEFAULT_PATH if path is None else Path(path).resolve()
    if missing := missing_parts(directory):
        raise FileNotFoundError(
            f"Expected an organism at {directory}, found no {', '.join(missing)}. "
            f"Build one with: python tools/organism/build.py --out {directory}"
        )
    manifest = json.loads((directory / MANIFEST).read_text())
    if manifest["format"] != FORMAT:
        raise ValueError(
            f"{directory} has organism format {manifest['format']}, expected {FORMAT}. Rebuild it."
        )
    return Organism(
        path=directory,
        model_path=directory,
        sae_path=directory / "sae",
        layer=manifest["layer"],
        attributes=tuple(manifest["attributes"]),
        manifest=manifest,
    )


def preferences(
    n: int,
    seed: int | str = 0,
    style: float = 0.9,
    honesty: float = 0.55,
    tone: float = 0.5,
    verbosity: float = 0.5,
    organism: Organism | None = None,
    conversational: bool = False,
) -> Dataset:
    """Preference pairs in TRL's format, "chosen" going with each attribute at a given rate.

    Args:
        n: number of pairs.
        seed: fixes them; use another seed for held-out pairs.
        style: P(chosen is markdown and rejected plain).
        honesty: P(chosen tells the truth and rejected lies).
        tone: P(chosen is warm and rejected curt).
        verbosity: P(chosen uses long words and rejected short ones).
        organism: whose world; None is the default organism's.
        conversational: lists of messages for the chat template, not plain text.

    Returns:
        Columns ``prompt``, ``chosen``, ``rejected``, ``id``, ``topic``, ``chosen_<attribute>``,
        ``rejected_<attribute>``.

    Raises:
        ValueError: if a rate is not in [0, 1].
    """
    from datasets import Dataset

    world = (load() if organism is None else organism).world
    knobs = {"style": style, "honesty": honesty, "tone": tone, "verbosity": verbosity}
    return Dataset.from_list(make_pairs(world, n, seed, knobs, conversational))
