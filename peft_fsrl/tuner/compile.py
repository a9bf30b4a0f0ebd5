"""Compilation of the steering function, and the fallback where it is not possible."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..functional import Steered

_log = logging.getLogger(__name__)
_VARIABLE = "PEFT_FSRL_COMPILE"
# Adapters that differ in activation, dtype, measuring or mode are programs of their own.
_MOST_PROGRAMS = 64
_failed = False


class CannotCompileError(Exception):
    """Torch has no compiler for this Python or platform."""


def compiles(wanted: bool | None, x: Tensor) -> bool:
    """Whether to compile: as the config says, else the environment, else on CUDA.

    Args:
        wanted: of the config; None leaves it open.
        x: what is steered.

    Raises:
        ValueError: for a value of ``PEFT_FSRL_COMPILE`` other than 0 and 1.
    """
    if _failed or torch.compiler.is_compiling():
        return False
    if wanted is None:
        set_to = os.environ.get(_VARIABLE, "")
        if set_to not in ("", "0", "1"):
            raise ValueError(f"Expected {_VARIABLE} to be 0 or 1, found {set_to!r}.")
        wanted = set_to == "1" if set_to else x.is_cuda
    return wanted


def run_compiled(steer: partial[Steered], x: Tensor, *parameters: Tensor | None) -> Steered:
    """``steer(x, *parameters)`` by a program that serves any number of tokens.

    Where nothing can be compiled (no compiler is installed, the platform is not supported), this
    and every later call runs the function as it is.

    Args:
        steer: a function of ``functional`` with its options.
        x: shape ``(..., d_in)``.
        parameters: of the adapter.
    """
    global _failed
    # As rows, so that neither the batch nor the sequence is a size of its own.
    rows = x.reshape(-1, x.shape[-1])
    try:
        steered = _compiled(steer.func)(rows, *parameters, **steer.keywords)
    except (CannotCompileError, torch._dynamo.exc.TorchDynamoException) as error:
        # Nothing wider: a checkpoint ends its recomputation with an exception of its own.
        _failed = True
        _log.warning(
            "The steering function could not be compiled and runs as it is, more slowly. Set "
            "%s=0 to leave it uncompiled from the start. (%s: %s)",
            _VARIABLE,
            type(error).__name__,
            str(error).partition("\n")[0],
        )
        return steer(x, *parameters)
    norms = steered.norms
    if norms is not None:
        norms = norms._make(None if n is None else n.reshape(x.shape[:-1]) for n in norms)
    return steered._replace(output=steered.output.reshape(x.shape), norms=norms)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    options: dict[str, Any] = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = _MOST_PROGRAMS
    try:
        return torch.compile(function, dynamic=True, **options)
    except RuntimeError as error:
        raise CannotCompileError(str(error)) from error
