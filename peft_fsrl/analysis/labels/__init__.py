"""What features mean: where labels come from, and how far to trust them."""

from ._reader import pieces
from .evidence import collect_evidence, collect_held_out, is_held_out
from .judge import Judge, JudgeError, Messages

__all__ = [
    "Judge",
    "JudgeError",
    "Messages",
    "collect_evidence",
    "collect_held_out",
    "is_held_out",
    "pieces",
]
