"""Answers of a model's variants under one seed, with the features steered at each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..records import Record
from ..sae.frozen import FrozenSAE
from ..steering import SteeringEvent, fsrl_layers, observe
from ..training.sampling import Answer, model_variants, sample_answers
from .session import Session

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class SteeredFeature(Record):
    """One feature steered at one token, by ``value`` units of feature activation."""

    feature: int
    value: float


@dataclass(frozen=True)
class SteeredToken(Record):
    """A generated token.

    Attributes:
        text: of the token.
        steered: the features steered where it was predicted, largest ``|v|`` first; cut at some
            number.
        n_steered: how many there were.
    """

    text: str
    steered: tuple[SteeredFeature, ...]
    n_steered: int


@dataclass(frozen=True)
class Continuation(Record):
    """One answer to a prompt.

    Attributes:
        name: who answered: ``"base"``, ``"trained"``, or ``"without <category>"``.
        text: the answer, special tokens left out.
        tokens: its tokens and what steered them; empty where nobody looked.
        n_tokens: its length.
    """

    name: str
    text: str
    tokens: tuple[SteeredToken, ...]
    n_tokens: int


@dataclass(frozen=True)
class Generation(Record):
    """One prompt continued by several variants of a model, under the same seed."""

    prompt: str
    continuations: tuple[Continuation, ...]

    def text(self, name: str) -> str:
        """The answer of one variant.

        Raises:
            KeyError: if there is none of that name.
        """
        return {answer.name: answer.text for answer in self.continuations}[name]


def compare_generations(
    session: Session,
    prompts: Sequence[str],
    *,
    without: Mapping[str, Sequence[int]] | None = None,
    max_new_tokens: int = 48,
    n_features: int = 8,
    do_sample: bool = True,
    layer_name: str | None = None,
) -> tuple[Generation, ...]:
    """Continue each prompt as the base model, as trained, and without some features' steering.

    A token comes with the features steered at the position that predicted it: for the first token
    of an answer, the last of the prompt. The first prompt is sampled with the session's seed, the
    same for every variant, and each next prompt with the next seed.

    Args:
        session: its model generates and has an FSRL adapter; its data are not read.
        prompts: texts, such as ``session.prompts[:4]``; a chat template has been applied where
            there is one.
        without: features whose steering is zeroed, by category; one continuation
            ``"without <category>"`` each.
        max_new_tokens: length limit of a continuation.
        n_features: how many features to keep per token, largest ``|v|`` first.
        do_sample: sample; False takes the likeliest token each time.
        layer_name: the wrapped module whose features are recorded and zeroed; None for the only
            one.

    Returns:
        One entry per prompt; none for no prompt.

    Raises:
        ValueError: for several FSRL layers without ``layer_name``, or a prompt without tokens.
        IndexError: for a feature that the SAE does not have.
    """
    model, tokenizer = session.model, session.tokenizer
    layer_name = _one_layer(model, layer_name)
    variants = model_variants(model, without or {}, layer_name)
    results = []
    for number, prompt in enumerate(prompts):
        continuations = []
        for name, enter in variants.items():
            recorder = _Recorder(layer_name, n_features)
            with enter(), observe(model, recorder.look):
                [answer] = sample_answers(
                    model,
                    [prompt],
                    tokenizer,
                    max_new_tokens=max_new_tokens,
                    seed=session.seed + number,
                    do_sample=do_sample,
                    num_beams=1,
                )
            texts = token_texts(answer.said, tokenizer)
            seen = recorder.of(answer)
            tokens = tuple(
                SteeredToken(text, *features) for text, features in zip(texts, seen, strict=True)
            )
            continuations.append(Continuation(name, "".join(texts), tokens, len(tokens)))
        results.append(Generation(prompt, tuple(continuations)))
    return tuple(results)


def token_texts(ids: Sequence[int], tokenizer: Any, *, special: bool = False) -> list[str]:
    """The text of each token, so that together they are the text of all.

    A character made of several tokens goes to the one that completes it.

    Args:
        ids: token ids.
        tokenizer: the model's tokenizer.
        special: show special tokens; otherwise they are empty.
    """
    whole = tokenizer.decode(ids, skip_special_tokens=not special)
    texts, start = [], 0
    for n in range(1, len(ids) + 1):
        # A token's text depends on those before it, and decoders change what they have said when
        # more comes: of what the first n tokens give, only what remains at the end counts.
        head = tokenizer.decode(ids[:n], skip_special_tokens=not special)
        end = len(whole) if n == len(ids) else max(start, _n_shared(head, whole))
        texts.append(whole[start:end])
        start = end
    return texts


def strongest_features(
    v: Float[Tensor, "n_features"], sae: FrozenSAE, n: int
) -> tuple[tuple[SteeredFeature, ...], int]:
    """The ``n`` features that are steered most, largest ``|v|`` first, and how many there are.

    Args:
        v: the steering vector of one token.
        sae: says which features these are.
        n: how many to name.
    """
    v = v.detach().float().cpu()
    order = v.abs().argsort(descending=True, stable=True)[:n].tolist()
    index = sae.feature_index
    strongest = (SteeredFeature(int(index[i]), float(v[i])) for i in order if v[i] != 0)
    return tuple(strongest), int((v != 0).sum())


class _Recorder:
    def __init__(self, layer_name: str, n_features: int) -> None:
        self._layer_name = layer_name
        self._n_features = n_features
        self._lengths: list[int] = []
        self._steered: list[tuple[tuple[SteeredFeature, ...], int]] = []

    def look(self, event: SteeringEvent) -> None:
        if event.layer_name != self._layer_name:
            return
        vectors = event.steering_vector.detach().flatten(0, -2)
        self._lengths.append(len(vectors))
        self._steered.append(strongest_features(vectors[-1], event.sae, self._n_features))

    def of(self, answer: Answer) -> list[tuple[tuple[SteeredFeature, ...], int]]:
        n_prompt, n_said = len(answer.prompt), len(answer.said)
        if not self._lengths:
            # No adapter acts here, as inside `disable_adapter`.
            return [((), 0)] * n_said
        # The first pass reads the prompt, the others one token, or all where there is no cache.
        reads = enumerate(self._lengths)
        one_by_one = all(length == n_prompt + i or (i and length == 1) for i, length in reads)
        if not one_by_one or len(self._lengths) != n_said + len(answer.end):
            raise ValueError(
                "Expected forward passes that give one token each, found passes over "
                f"{self._lengths[:8]}... tokens. Remove other decoding modes, such as prompt "
                "lookup, from the model's `generation_config`."
            )
        return self._steered[:n_said]


def _n_shared(first: str, second: str) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _one_layer(model: nn.Module, layer_name: str | None) -> str:
    found = sorted(fsrl_layers(model))
    if layer_name is None and len(found) > 1:
        raise ValueError(f"Expected one FSRL layer, found {found}. Name one with `layer_name`.")
    if layer_name is not None and layer_name not in found:
        raise ValueError(f"No FSRL adapter wraps {layer_name!r}; found {found}.")
    return layer_name or found[0]
