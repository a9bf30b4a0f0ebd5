"""The offline model organism: a small world with known attributes, its language model and SAE.

from peft_fsrl import organism

built = organism.load()
model, tokenizer = built.load_model(), built.load_tokenizer()
pairs = organism.preferences(2000, seed=1, style=0.9, honesty=0.55)
"""

from .lexicon import ATTRIBUTE_VALUES, ATTRIBUTES
from .organism import FeatureDetection, Organism, load, preferences
from .world import World

__all__ = [
    "ATTRIBUTES",
    "ATTRIBUTE_VALUES",
    "FeatureDetection",
    "Organism",
    "World",
    "load",
    "preferences",
]
