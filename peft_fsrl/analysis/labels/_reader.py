"""Texts read by the base model, and the activations of features token by token."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...steering import SteeringEvent, base_model, fsrl_layers, observe
from ...training.likelihood import batched, pad
from ...training.running import evaluating
from ...training.tokens import Tokenized, tokenize

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

# Features multiplied with the whole vocabulary at once.
_CHUNK = 64


class Reader:
    """Reads texts with the base model, and gives the activations of some features token by token.

    Attributes:
        asked: the features in the order asked for.
        features: the same, ascending: the order of all tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        features: Iterable[int] | None,
        answer: str,
        max_length: int | None,
    ) -> None:
        layers = fsrl_layers(model)
        if len(layers) != 1:
            raise ValueError(f"Expected one FSRL layer, found {sorted(layers)}.")
        [layer] = layers.values()
        [name] = [name for name in layer.active_adapters if name in layer.fsrl_sae]
        sae = layer.fsrl_sae[name]
        self.asked = (
            sae.feature_index.tolist() if features is None else list(dict.fromkeys(features))
        )
        self._sae = sae if features is None else sae.restrict(self.asked)
        self.features = sorted(self.asked)
        self.n_features = len(self.features)
        self._model = model
        self._tokenizer = tokenizer
        self._answer = answer
        self._max_length = max_length
        self._special = set(tokenizer.all_special_ids)
        self._hidden_states: Tensor | None = None

    def n_counted(self, ids: Sequence[int]) -> int:
        """How many tokens are not special."""
        return sum(token not in self._special for token in ids)

    def read(
        self, rows: Iterable[Mapping[str, Any]], batch_size: int, description: str | None
    ) -> Iterator[tuple[list[int], Float[Tensor, "seq n_features"]]]:
        """Ids and activations of each text, on the CPU, zero on special tokens.

        Raises:
            ValueError: for no text, or an adapter that is disabled.
        """
        device = next(self._model.parameters()).device
        progress = tqdm(desc=description, unit="text", disable=description is None, leave=False)
        seen = 0
        with (
            evaluating(self._model),
            observe(self._model, self._look),
            progress,
        ):
            for part in batched(rows, batch_size):
                texts = [self._tokenize(row) for row in part]
                batch = pad(texts, device)
                self._model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
                hidden_states, self._hidden_states = self._hidden_states, None
                if hidden_states is None:
                    raise ValueError(
                        "No adapter was at work, so nothing was seen. Enable the adapter: what "
                        "counts here is its layer's output before any steering."
                    )
                for row, (ids, _) in enumerate(texts):
                    # One at a time: the activations of a whole batch may not fit.
                    acts = self._sae.encode(hidden_states[row : row + 1, : len(ids)])
                    yield ids, acts[0].cpu().float() * self._counts(ids)[:, None]
                seen += len(part)
                progress.update(len(part))
        if not seen:
            raise ValueError(
                "Expected at least one text, found none: the data set is empty, or `held_out` "
                "leaves nothing of it."
            )

    def lens(self, n_tokens: int) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
        """The tokens that each feature promotes and suppresses most."""
        inner: Any = base_model(self._model)
        head = inner.get_output_embeddings()
        if head is None or head.weight.shape[1] != self._sae.info.d_in:
            nothing: list[tuple[str, ...]] = [()] * self.n_features
            return nothing, nothing
        piece = _pieces_of_single_tokens(self._tokenizer, self._special)
        hidden = [i for i in self._special if i < head.weight.shape[0]]
        last = min(len(self._tokenizer), head.weight.shape[0])
        best: tuple[list[tuple[str, ...]], list[tuple[str, ...]]] = ([], [])
        with torch.no_grad():
            # A model may have more rows than its tokenizer has tokens.
            unembedding = head.weight[:last].float()
            for rows in self._sae.directions.float().to(unembedding.device).split(_CHUNK):
                logits = rows @ unembedding.T
                for side, sign in zip(best, (1, -1), strict=True):
                    signed = (sign * logits).index_fill_(
                        1, torch.tensor(hidden, device=logits.device, dtype=torch.long), -torch.inf
                    )
                    top = signed.topk(min(n_tokens, last - len(hidden)), dim=1).indices.tolist()
                    side += [tuple(piece(token) for token in tokens) for tokens in top]
        return best

    def _look(self, event: SteeringEvent) -> None:
        self._hidden_states = event.hidden_states

    def _tokenize(self, row: Mapping[str, Any]) -> Tokenized:
        prompt = row.get("prompt") or ""
        return tokenize(prompt, row[self._answer], self._tokenizer, self._max_length)

    def _counts(self, ids: Sequence[int]) -> Bool[Tensor, "seq"]:
        return torch.tensor([token not in self._special for token in ids])


def pieces(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of each token; joined they are the text of all, spaces between words included."""
    # Bytes that are no character yet are left to the token that completes it.
    prefixes = [tokenizer.decode(ids[:end]).rstrip("\ufffd") for end in range(1, len(ids))]
    texts = ["", *prefixes, tokenizer.decode(ids)] if ids else []
    return [after[_common(before, after) :] for before, after in itertools.pairwise(texts)]


def _common(before: str, after: str) -> int:
    differ = (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
    return next(differ, min(len(before), len(after)))


def _pieces_of_single_tokens(tokenizer: Any, special: set[int]) -> Callable[[int], str]:
    # After another token, a token shows whether it begins with a space.
    anchor = next(token for token in range(len(tokenizer)) if token not in special)
    return lambda token: pieces([anchor, token], tokenizer)[1]
