"""Whether tensors stand for themselves, or for others that a program is being made for."""

from __future__ import annotations

import torch


def is_traced() -> bool:
    """Under a compiler, a tracer, or a transform of ``torch.func``."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    )
