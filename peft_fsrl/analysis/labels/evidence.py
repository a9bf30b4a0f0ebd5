"""Evidence about features, without a judge: where they are active, and what they promote."""

from __future__ import annotations

import hashlib
import heapq
import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...records import Record, RecordT
from ...sae.frozen import FrozenSAE
from ...steering import base_model
from ...training.likelihood import batched
from ...training.running import evaluating
from ...training.tokens import special_ids
from ..generations import token_texts
from ..segments import active_sae, only_layer
from ..session import Session
from ..triggers import read_states

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

HELD_OUT = 0.25
# Features multiplied with the whole vocabulary at once.
_CHUNK = 64


@dataclass(frozen=True)
class Context(Record):
    """A stretch of text on which a feature is active.

    Attributes:
        tokens: texts of its tokens.
        activations: of the feature at each.
    """

    tokens: tuple[str, ...]
    activations: tuple[float, ...]

    @property
    def text(self) -> str:
        """The tokens together."""
        return "".join(self.tokens)


@dataclass(frozen=True)
class FeatureEvidence(Record):
    """Evidence about one feature.

    Attributes:
        feature: index in the SAE.
        density: share of tokens on which it is active.
        contexts: where it is most active, strongest first.
        promoted: tokens whose logits its decoder direction raises most.
        suppressed: tokens whose logits it lowers most.
    """

    feature: int
    density: float
    contexts: tuple[Context, ...]
    promoted: tuple[str, ...]
    suppressed: tuple[str, ...]


def collect_evidence(
    session: Session,
    features: Iterable[int] | None = None,
    *,
    n_contexts: int = 8,
    window: int = 16,
    n_tokens: int = 8,
    answer: str = "chosen",
    held_out: float = HELD_OUT,
    in_answers: bool = False,
) -> tuple[FeatureEvidence, ...]:
    """Top activating contexts, density and promoted tokens of some features, in one pass.

    Activations are those of the base model: nothing is steered. A text gives a feature at most one
    context, around its strongest token. Special tokens and padding never count.

    Which tokens a feature promotes says ``find_promoted``.

    Args:
        session: a model with one FSRL layer, and texts.
        features: indices in the SAE; None for all that the adapter can steer.
        n_contexts: contexts to keep per feature.
        window: tokens per context.
        n_tokens: promoted, and suppressed, tokens per feature.
        answer: the column that follows the prompt.
        held_out: share of prompts left out, for ``collect_held_out``.
        in_answers: only tokens of answers count.

    Returns:
        One record per feature, in the order given.

    Raises:
        IndexError: for a feature that the SAE does not have.
        ValueError: for more than one FSRL layer, a feature that the adapter cannot steer, a number
            out of range, or no text.
    """
    _require_positive(n_contexts=n_contexts, window=window, n_tokens=n_tokens)
    reader = _Reader(session, features)
    strongest = _Kept(reader.n_features, n_contexts, window)
    active = torch.zeros(reader.n_features, dtype=torch.float64)
    n_counted = 0
    for ids, counted, acts in reader.read(
        answer, lambda row: not is_held_out(row, held_out, answer), in_answers
    ):
        peaks, places = acts.abs().max(dim=0)
        strongest.offer(peaks, ids, acts, _starts(places, len(ids), window))
        active += (acts != 0).sum(dim=0)
        n_counted += int(counted.sum())
    promoted, suppressed = find_promoted(session, reader.sae, n_tokens)
    density = (active / max(1, n_counted)).tolist()
    contexts = strongest.contexts(session.tokenizer)
    return reader.in_order(
        FeatureEvidence(*each)
        for each in zip(reader.features, density, contexts, promoted, suppressed, strict=True)
    )


@dataclass(frozen=True)
class HeldOutContexts(Record):
    """Contexts of one feature from texts that no label was made from.

    Attributes:
        feature: index in the SAE.
        active: random contexts in which it is active.
        inactive: random contexts in which it is not.
    """

    feature: int
    active: tuple[Context, ...]
    inactive: tuple[Context, ...]


def collect_held_out(
    session: Session,
    features: Iterable[int] | None = None,
    *,
    n_contexts: int = 5,
    window: int = 16,
    answer: str = "chosen",
    held_out: float = HELD_OUT,
) -> tuple[HeldOutContexts, ...]:
    """Random contexts with and without each feature, from the texts that no evidence came from.

    Which texts these are follows from their prompts alone, so with the same ``held_out`` no prompt
    serves both, whatever the order of the rows. Arguments and errors are those of
    ``collect_evidence``, but ``n_contexts`` counts active ones, and as many inactive ones; fewer
    where the texts have fewer.
    """
    _require_positive(n_contexts=n_contexts, window=window)
    reader = _Reader(session, features)
    active, inactive = (_Kept(reader.n_features, n_contexts, window) for _ in range(2))
    random = torch.Generator().manual_seed(session.seed)
    for ids, _, acts in reader.read(answer, lambda row: is_held_out(row, held_out, answer)):
        is_active = acts != 0
        is_silent = _silent_windows(is_active, window)
        for kept, choice in (active, is_active), (inactive, is_silent):
            places = _choose(choice, random)
            starts = places if choice is is_silent else _starts(places, len(ids), window)
            # Uniform draws are above zero here, so that zero means "not to be had".
            keys = 1 - torch.rand(reader.n_features, generator=random)
            kept.offer(keys * choice.any(dim=0), ids, acts, starts)
    sides = (kept.contexts(session.tokenizer) for kept in (active, inactive))
    return reader.in_order(
        HeldOutContexts(*each) for each in zip(reader.features, *sides, strict=True)
    )


def is_held_out(row: Mapping[str, Any], share: float, answer: str = "chosen") -> bool:
    """Whether a row's prompt (its answer, if it has none) is among a share of all, by its hash."""
    text = row.get("prompt") or row[answer]
    digest = hashlib.sha256(str(text).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


class _Reader:
    """Reads texts with the base model, and gives the activations of some features token by token.

    Attributes:
        features: ascending: the order of all tensors.
        sae: restricted to them.
    """

    def __init__(self, session: Session, features: Iterable[int] | None) -> None:
        sae = active_sae(session.model)
        self._asked = (
            sae.feature_index.tolist() if features is None else list(dict.fromkeys(features))
        )
        self.sae = sae if features is None else sae.restrict(self._asked)
        self.features = sorted(self._asked)
        self.n_features = len(self.features)
        self._session = session

    def in_order(self, records: Iterable[RecordT]) -> tuple[RecordT, ...]:
        """One record per feature, from their order here to the one that was asked for."""
        found = dict(zip(self.features, records, strict=True))
        return tuple(found[feature] for feature in self._asked)

    def read(
        self,
        answer: str,
        wanted: Callable[[Mapping[str, str]], bool],
        in_answers: bool = False,
    ) -> Iterator[tuple[list[int], Bool[Tensor, "seq"], Float[Tensor, "seq n_features"]]]:
        """Ids, which of them count, and activations, zero where not, of each text, on the CPU.

        Raises:
            ValueError: for no text, or an adapter that is disabled.
        """
        session = self._session
        pairs = zip(session.rows, session.tokens(answer), strict=True)
        texts = [text for row, text in pairs if wanted(row)]
        if not texts:
            raise ValueError(
                f"Expected at least one text, found none of {len(session.rows)}: `held_out` leaves "
                "nothing."
            )
        layer_name = only_layer(session.model).layer_name
        bar = session.bar("contexts", len(texts), unit="text")
        with evaluating(session.model), session.base(), bar:
            for part in batched(texts, session.batch_size):
                batch = session.pad(part)
                hidden_states = read_states(
                    session.model,
                    layer_name,
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                )
                for row, counted in enumerate(session.counted(batch).cpu()):
                    ids = part[row].input_ids
                    # One at a time: the activations of a whole batch may not fit.
                    acts = self.sae.encode(hidden_states[row : row + 1, : len(ids)])[0]
                    counted = counted[: len(ids)]
                    if in_answers:
                        counted[: part[row].n_prompt] = False
                    yield ids, counted, acts.cpu().float() * counted[:, None]
                bar.update(len(part))


def find_promoted(
    session: Session, sae: FrozenSAE, n_tokens: int
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """The tokens that each feature of an SAE promotes most, and those that it suppresses most.

    Those with the largest entries of ``W_U @ direction``, the logit lens without the final norm;
    none where the SAE is not as wide as the unembedding.
    """
    inner: Any = base_model(session.model)
    head = inner.get_output_embeddings()
    if head is None or head.weight.shape[1] != sae.info.d_in:
        nothing: list[tuple[str, ...]] = [()] * sae.n_features
        return nothing, nothing
    tokenizer = session.tokenizer
    # A model may have more rows than its tokenizer has tokens.
    last = min(len(tokenizer), head.weight.shape[0])
    hidden = [i for i in special_ids(tokenizer) if i < last]
    plain = next(i for i in range(last) if i not in hidden)
    best: tuple[list[tuple[str, ...]], list[tuple[str, ...]]] = ([], [])
    with torch.no_grad(), session.base():
        unembedding = head.weight[:last].float()
        special = torch.tensor(hidden, device=unembedding.device, dtype=torch.long)
        for rows in sae.directions.float().to(unembedding.device).split(_CHUNK):
            logits = rows @ unembedding.T
            for side, sign in zip(best, (1, -1), strict=True):
                signed = (sign * logits).index_fill_(1, special, -torch.inf)
                top = signed.topk(min(n_tokens, last - len(hidden)), dim=1).indices.tolist()
                # After another token, a token shows whether it begins with a space.
                side += [
                    tuple(token_texts([plain, token], tokenizer)[1] for token in tokens)
                    for tokens in top
                ]
    return best


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

    def contexts(self, tokenizer: Any) -> Iterator[tuple[Context, ...]]:
        """Those of each feature, largest key first."""
        for heap in self._heaps:
            yield tuple(
                Context(tuple(token_texts(ids.tolist(), tokenizer, special=True)), tuple(acts))
                for _, _, ids, acts in sorted(heap, reverse=True)
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
