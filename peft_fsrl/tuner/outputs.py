"""Hidden states in what a transformers module returns: a tensor, a tuple, a ModelOutput."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def hidden_states_of(output: Any) -> Tensor:
    """The hidden states in a module's output, of any of the forms that transformers uses."""
    first = output if isinstance(output, Tensor) else output[0]
    assert isinstance(first, Tensor)
    return first


def replace_hidden_states(output: Any, hidden_states: Tensor) -> Any:
    """The same output with other hidden states in it."""
    if isinstance(output, Tensor):
        return hidden_states
    if type(output) is tuple:
        return (hidden_states, *output[1:])
    if hasattr(output, "_replace"):
        return output._replace(**{output._fields[0]: hidden_states})
    # A list, or a transformers ModelOutput, whose entries are set by name.
    output[next(iter(output)) if isinstance(output, Mapping) else 0] = hidden_states
    return output
