"""What features mean: where labels come from, and how far to trust them."""

from .judge import Judge, JudgeError, Messages

__all__ = ["Judge", "JudgeError", "Messages"]
