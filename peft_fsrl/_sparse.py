"""Reading only the weights that steering needs, where few features act on few tokens.

One token at a time, the time goes into reading weights. Once the steering vector is known, the
decoder matters only in the rows of its non-zero entries, and a feature-wise encoder only in the
columns of its negative ones. ``benchmarks/generation.py`` measures where reading them one by one
stops to pay; the constants below are what it found, on the side of the plain matrix product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._tracing import is_traced

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

# With this many tokens a matrix product does, for each row that it reads, as much arithmetic as it
# takes to read one row more.
_TOKENS_PER_ROW = 16
# Of more tokens, so many features act on one or another that all weights are read anyway.
_MOST_TOKENS = 64
# Reading a smaller matrix whole takes less time than deciding what to read.
_SMALLEST = 2**20
# Gathering columns writes as much as it reads, and what was written is read again.
_PASSES = 3
# Columns are gathered in pieces whose memory is used again, and not asked anew from the system.
_PIECE = 2**22


def can_select(*tensors: Tensor | None) -> bool:
    """Whether which weights are read may depend on values: eagerly, where no graph is built.

    Args:
        tensors: everything that enters the computation.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    # Not where nothing happens to require a gradient: freezing an adapter, as loading one does,
    # would change how its output is rounded.
    if is_traced() or torch.is_grad_enabled():
        return False
    # Fake tensors and distributed ones have no values to look at.
    if any(type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta for tensor in given):
        return False
    return not (given[0].is_cuda and torch.cuda.is_current_stream_capturing())


def is_short(x: Float[Tensor, "*batch d_in"]) -> bool:
    """Whether there are so few tokens that reading only some weights is worth a look."""
    return x.numel() <= _MOST_TOKENS * x.shape[-1]


def sparse_product(
    update: Float[Tensor, "*batch d_sae"], W_dec: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, "*batch d_in"]:
    """``update @ W_dec``, from the rows where ``update`` is not zero if these are few.

    Args:
        update: shape ``(..., d_sae)``, without a graph.
        W_dec: shape ``(d_sae, d_in)``, in the dtype of ``update``.

    Returns:
        Shape ``(..., d_in)``, equal to the product up to rounding.
    """
    if W_dec.numel() < _SMALLEST:
        return update @ W_dec
    flat = update.reshape(-1, W_dec.shape[0])
    tokens, features = flat.nonzero(as_tuple=True)
    if len(features) > W_dec.shape[0] * max(1.0, len(flat) / _TOKENS_PER_ROW):
        return update @ W_dec
    first = torch.searchsorted(tokens, torch.arange(len(flat), device=flat.device))
    delta = F.embedding_bag(
        features, W_dec, first, mode="sum", per_sample_weights=flat[tokens, features]
    )
    return delta.reshape(*update.shape[:-1], W_dec.shape[1])


def columns_to_read(
    needed: Bool[Tensor, "*batch d_sae"], W_enc: Float[Tensor, "d_in d_sae"]
) -> tuple[Int[Tensor, "part"], ...] | None:
    """The columns of an encoder that any token needs, in pieces; None where all are read faster.

    Args:
        needed: which features' activations matter, shape ``(..., d_sae)``.
        W_enc: encoder weight, shape ``(d_in, d_sae)``, whose columns are contiguous.
    """
    d_in, n_features = W_enc.shape
    if W_enc.numel() < _SMALLEST:
        return None
    columns = needed.reshape(-1, n_features).any(dim=0).nonzero().squeeze(1)
    if len(columns) * _PASSES > n_features:
        return None
    return columns.split(max(1, _PIECE // (d_in * W_enc.element_size()))) if len(columns) else ()
