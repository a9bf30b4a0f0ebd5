"""What can be seen of features without asking anybody: where they are active, what they promote."""

from __future__ import annotations

import hashlib
import heapq
import itertools
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..records import Context, FeatureEvidence, HeldOutContexts
from ._reader import Reader, pieces

HELD_OUT = 0.25


def collect_evidence(
    model: nn.Module,
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    features: Iterable[int] | None = None,
    *,
    n_contexts: int = 8,
    window: int = 16,
    n_tokens: int = 8,
    answer: str = "chosen",
    held_out: float = HELD_OUT,
    max_length: int | None = None,
    batch_size: int = 8,
    description: str | None = None,
) -> tuple[FeatureEvidence, ...]:
    """Top activating contexts, density and promoted tokens of some features, in one pass.

    Activations are those of the base model: nothing is steered. A text gives a feature at most one
    context, around its strongest token. Special tokens and padding never count. Memory grows with
    features times contexts, not with the data set.

    The promoted tokens of a feature are those with the largest entries of ``W_U @ direction``, the
    logit lens without the final norm; none where the SAE is not as wide as the unembedding.

    Args:
        model: a model with one FSRL layer.
        dataset: rows with the texts ``prompt`` (may be missing) and ``answer``; read once.
        tokenizer: the model's tokenizer.
        features: indices in the SAE; None for all that the adapter can steer.
        n_contexts: contexts to keep per feature.
        window: tokens per context.
        n_tokens: promoted, and suppressed, tokens per feature.
        answer: the column that follows the prompt.
        held_out: share of prompts left out, for ``collect_held_out``.
        max_length: cuts the end of an answer.
        batch_size: texts per forward pass.
        description: shown beside the progress bar; None shows no bar.

    Returns:
        One record per feature, in the order given.

    Raises:
        IndexError: for a feature that the SAE does not have.
        ValueError: for more than one FSRL layer, a feature that the adapter cannot steer, a number
            out of range, or no text.
    """
    _require_positive(n_contexts=n_contexts, window=window, n_tokens=n_tokens)
    reader = Reader(model, tokenizer, features, answer, max_length)
    strongest = _Kept(reader.n_features, n_contexts, window)
    active = torch.zeros(reader.n_features, dtype=torch.float64)
    n_counted = 0
    chosen = (row for row in dataset if not is_held_out(row, held_out, answer))
    for ids, acts in reader.read(chosen, batch_size, description):
        peaks, places = acts.abs().max(dim=0)
        strongest.offer(peaks, ids, acts, _starts(places, len(ids), window))
        active += (acts != 0).sum(dim=0)
        n_counted += reader.n_counted(ids)
    promoted, suppressed = reader.lens(n_tokens)
    density = (active / max(1, n_counted)).tolist()
    found = {
        feature: FeatureEvidence(
            feature, density[i], strongest.contexts(i, tokenizer), promoted[i], suppressed[i]
        )
        for i, feature in enumerate(reader.features)
    }
    return tuple(found[feature] for feature in reader.asked)


def collect_held_out(
    model: nn.Module,
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    features: Iterable[int] | None = None,
    *,
    n_contexts: int = 5,
    window: int = 16,
    answer: str = "chosen",
    held_out: float = HELD_OUT,
    max_length: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    description: str | None = None,
) -> tuple[HeldOutContexts, ...]:
    """Random contexts with and without each feature, from the texts that no evidence came from.

    Which texts these are follows from their prompts alone, so with the same ``held_out`` no prompt
    serves both, whatever the order of the rows.

    Args:
        model: see ``collect_evidence``, and so for all but these.
        dataset: see there.
        tokenizer: see there.
        features: see there.
        n_contexts: active ones per feature, and as many inactive ones; fewer where the texts have
            fewer.
        window: see there.
        answer: see there.
        held_out: share of prompts that is used here.
        max_length: see there.
        batch_size: see there.
        seed: of the choice.
        description: see there.

    Raises:
        IndexError: as ``collect_evidence`` does.
        ValueError: as it does.
    """
    _require_positive(n_contexts=n_contexts, window=window)
    reader = Reader(model, tokenizer, features, answer, max_length)
    active = _Kept(reader.n_features, n_contexts, window)
    inactive = _Kept(reader.n_features, n_contexts, window)
    random = torch.Generator().manual_seed(seed)
    chosen = (row for row in dataset if is_held_out(row, held_out, answer))
    for ids, acts in reader.read(chosen, batch_size, description):
        is_active = acts != 0
        is_silent = _silent_windows(is_active, window)
        for kept, choice in (active, is_active), (inactive, is_silent):
            places = _choose(choice, random)
            starts = places if choice is is_silent else _starts(places, len(ids), window)
            # Uniform draws are above zero here, so that zero means "not to be had".
            keys = 1 - torch.rand(reader.n_features, generator=random)
            kept.offer(keys * choice.any(dim=0), ids, acts, starts)
    found = {
        feature: HeldOutContexts(
            feature, active.contexts(i, tokenizer), inactive.contexts(i, tokenizer)
        )
        for i, feature in enumerate(reader.features)
    }
    return tuple(found[feature] for feature in reader.asked)


def is_held_out(row: Mapping[str, Any], share: float, answer: str = "chosen") -> bool:
    """Whether a row's prompt (its answer, if it has none) is among a share of all, by its hash."""
    text = row.get("prompt") or row[answer]
    digest = hashlib.sha256(str(text).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


class _Kept:
    """For each feature, the contexts with the largest keys so far."""

    def __init__(self, n_features: int, size: int, window: int) -> None:
        self._size = size
        self._window = window
        # Arrays: with tens of thousands of features, lists of numbers would take gigabytes.
        self._heaps: list[list[tuple[float, int, array[int], array[float]]]] = [
            [] for _ in range(n_features)
        ]
        self._smallest = torch.zeros(n_features)
        self._ticket = itertools.count(0, -1)

    def offer(self, keys: Tensor, ids: list[int], acts: Tensor, starts: Tensor) -> None:
        """A text's context from ``starts`` on, for each feature with a key that is large enough."""
        for feature in (keys > self._smallest).nonzero()[:, 0].tolist():
            inside = slice(int(starts[feature]), int(starts[feature]) + self._window)
            # Of equal keys the earlier stays, and contexts are never compared.
            entry = (
                float(keys[feature]),
                next(self._ticket),
                array("q", ids[inside]),
                array("f", acts[inside, feature].tolist()),
            )
            heap = self._heaps[feature]
            if len(heap) < self._size:
                heapq.heappush(heap, entry)
            else:
                heapq.heapreplace(heap, entry)
            if len(heap) == self._size:
                self._smallest[feature] = heap[0][0]

    def contexts(self, feature: int, tokenizer: Any) -> tuple[Context, ...]:
        """Largest key first."""
        entries = sorted(self._heaps[feature], reverse=True)
        return tuple(
            Context(tuple(pieces(ids.tolist(), tokenizer)), tuple(acts))
            for _, _, ids, acts in entries
        )


def _starts(places: Tensor, length: int, window: int) -> Tensor:
    # More before than after: a token's activation depends on what came before it.
    return (places - window * 3 // 4).clamp(min=0, max=max(0, length - window))


def _silent_windows(is_active: Tensor, window: int) -> Tensor:
    """Whether the window at each start has no active token: ``(starts, n_features)``."""
    window = min(window, len(is_active))
    before = nn.functional.pad(is_active.int().cumsum(dim=0), (0, 0, 1, 0))
    return before[window:] == before[:-window]


def _choose(choice: Tensor, random: torch.Generator) -> Tensor:
    """One of the true entries of each column, at random; the first entry of one without."""
    draws = 1 - torch.rand(choice.shape, generator=random)
    return (draws * choice).argmax(dim=0)


def _require_positive(**numbers: int) -> None:
    wrong = {name: number for name, number in numbers.items() if number < 1}
    if wrong:
        raise ValueError(f"Expected numbers of 1 or more, got {wrong}.")
