"""One pass of the base model over preference pairs: what its features do on both answers."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...files import replacing_file, require_folder
from ...sae.frozen import FrozenSAE
from ...steering import SteeringEvent, observe
from ...training.objectives import simpo_loss
from ...training.tokens import Tokenized
from ..content import digest_base, digest_json, digest_tokenizer
from ..preferences import preference_margins
from ..ranking import differentiable, steering_gradient
from ..segments import active_sae, only_layer
from ..session import Session

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

# Pairs that are read before they are written down.
_PART = 64
_FORMAT = 2
# What is summed over pairs; all else is kept for each.
_SUMS = ("slopes", "density")


@dataclass(frozen=True, eq=False)
class PairReading:
    """Features of the base model on the answers of preference pairs, chosen minus rejected.

    Only features that differ are kept: entry ``e`` says that in pair ``pair[e]`` the feature at
    ``place[e]`` among the SAE's own is more active in the chosen answer by ``matched[e]``, its mean
    over the first tokens of both answers, as many as the shorter one has, and by ``whole[e]``, its
    mean over all of them.

    Attributes:
        pair: shape ``(entries,)``, ascending.
        place: shape ``(entries,)``.
        matched: shape ``(entries,)``.
        whole: shape ``(entries,)``.
        lengths: tokens that count of the chosen and the rejected answers, shape ``(pairs, 2)``.
        prompts: mean activation of each prompt at the SAE's place, shape ``(pairs, d_in)``.
        slopes: sums over pairs of ``sum_t dL/dv_t`` at ``v = 0``, of its squares, and of
            ``sum_t |dL/dv_t|``, shape ``(3, n_features)``, float64.
        density: sum over answers of the share of tokens at which a feature is active, shape
            ``(n_features,)``, float64.
    """

    pair: Int[Tensor, "entries"]
    place: Int[Tensor, "entries"]
    matched: Float[Tensor, "entries"]
    whole: Float[Tensor, "entries"]
    lengths: Int[Tensor, "pairs 2"]
    prompts: Float[Tensor, "pairs d_in"]
    slopes: Float[Tensor, "3 n_features"]
    density: Float[Tensor, "n_features"]

    @property
    def n_pairs(self) -> int:
        """How many pairs were read."""
        return len(self.lengths)

    @property
    def n_features(self) -> int:
        """How many features the SAE has."""
        return self.slopes.shape[1]

    def dense(self, places: Int[Tensor, "some"]) -> Float[Tensor, "pairs some"]:
        """``matched`` of some features as a matrix, in float64."""
        column = torch.full((self.n_features,), -1)
        column[places] = torch.arange(len(places))
        kept = column[self.place] >= 0
        matrix = torch.zeros(self.n_pairs, len(places), dtype=torch.float64)
        matrix[self.pair[kept], column[self.place[kept]]] = self.matched[kept].double()
        return matrix

    def sums(self, values: Tensor) -> Float[Tensor, "n_features"]:
        """Sum of one value per entry by feature, in float64."""
        total = torch.zeros(self.n_features, dtype=torch.float64)
        return total.index_add(0, self.place, values.double())


class _Pair(NamedTuple):
    """One pair's part of a ``PairReading``."""

    place: Tensor
    matched: Tensor
    whole: Tensor
    lengths: Tensor
    prompt: Tensor
    density: Tensor


def read_pairs(session: Session, folder: Path | None = None) -> PairReading:
    """Run the base model once over all pairs, forward and backward.

    Special tokens and padding never count as parts of an answer or a prompt. Slopes count every
    token of both texts, for steering acts on every one.

    Args:
        session: its model has one FSRL layer; nothing is steered, whatever its adapter does.
        folder: where what was read is kept, some pairs a file; a later call on the same base model,
            SAE and pairs goes on from there. None keeps nothing.

    Raises:
        ValueError: for more than one FSRL layer, no active adapter, or no pair.
        OSError: if nothing can be written to the folder.
    """
    sae, rows = active_sae(session.model), session.rows
    key = ""
    if folder is not None:
        require_folder(folder)
        key = digest_json(_inputs(session, sae))
    parts = []
    with session.bar("pairs", len(rows)) as bar:
        for start in range(0, len(rows), _PART):
            some = replace(session, dataset=rows[start : start + _PART], progress=False)
            path = folder / f"pairs-{start:07d}.safetensors" if folder else None
            own = digest_json([key, some.rows])
            part = _load(path, own) if path else None
            if part is None:
                part = _read(some)
                if path:
                    tensors = {each.name: getattr(part, each.name) for each in fields(part)}
                    with replacing_file(path) as unfinished:
                        save_file(tensors, unfinished, {"key": own})
            parts.append(replace(part, pair=part.pair + start))
            bar.update(len(some.rows))
    joined: dict[str, Tensor] = {}
    for name in (each.name for each in fields(PairReading)):
        found = [getattr(part, name) for part in parts]
        joined[name] = torch.stack(found).sum(0) if name in _SUMS else torch.cat(found)
    return PairReading(**joined)


def _inputs(session: Session, sae: FrozenSAE) -> Any:
    """All that a reading depends on, beside the pairs."""
    return {
        "format": _FORMAT,
        "base": digest_base(session.model),
        "layer": only_layer(session.model).layer_name,
        "sae": [sae.info.fingerprint, str(sae.dtype), sae.feature_index.tolist()],
        "tokenizer": digest_tokenizer(session.tokenizer),
        "session": [session.beta, session.gamma, session.max_length],
    }


def _load(path: Path, key: str) -> PairReading | None:
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return PairReading(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (FileNotFoundError, SafetensorError):
        return None


def _read(session: Session) -> PairReading:
    found: list[_Pair] = []
    slopes = torch.zeros(3, active_sae(session.model).n_features, dtype=torch.float64)
    events: list[SteeringEvent] = []
    model = session.model
    with session.base(), differentiable(model), observe(model, events.append):
        for texts in session.batches("pairs"):
            loss = simpo_loss(preference_margins(model, texts, session.beta), session.gamma).sum()
            event = events.pop()
            [gradient] = torch.autograd.grad(loss, event.hidden_states)
            with torch.no_grad():
                for x, slope, counted, answer in _by_pair(session, texts, event, gradient):
                    of_tokens = steering_gradient(event.sae, x, slope).double()
                    of_pair = of_tokens.sum((0, 1))
                    slopes += torch.stack(
                        [of_pair, of_pair.square(), of_tokens.abs().sum((0, 1))]
                    ).cpu()
                    found.append(_compare(event.sae, x, counted, answer))
    entries = torch.tensor([len(each.place) for each in found])
    return PairReading(
        torch.arange(len(found)).repeat_interleave(entries),
        torch.cat([each.place for each in found]),
        torch.cat([each.matched for each in found]),
        torch.cat([each.whole for each in found]),
        torch.stack([each.lengths for each in found]),
        torch.stack([each.prompt for each in found]),
        slopes,
        torch.stack([each.density for each in found]).sum(0),
    )


def _by_pair(
    session: Session, texts: list[Tokenized], event: SteeringEvent, gradient: Tensor
) -> Any:
    """Activations, gradients, tokens that count and tokens of answers, of both sides of a pair."""
    batch = session.pad(texts)
    counted, answer = session.counted(batch), batch.answer_mask.bool()
    n = len(texts) // 2
    for number in range(n):
        sides = [number, number + n]
        # Padding is left out: an encoder that looks back must not see it.
        length = int(batch.attention_mask[sides].sum(dim=1).max())
        yield tuple(
            tensor[sides, :length] for tensor in (event.hidden_states, gradient, counted, answer)
        )


def _compare(
    sae: FrozenSAE,
    x: Float[Tensor, "2 seq d_in"],
    counted: Bool[Tensor, "2 seq"],
    answer: Bool[Tensor, "2 seq"],
) -> _Pair:
    """What one pair adds to a ``PairReading``, but for its slopes."""
    acts = [sae.encode(side[None])[0][kept] for side, kept in zip(x, counted & answer, strict=True)]
    lengths = torch.tensor([len(each) for each in acts])
    shorter = int(lengths.min())
    matched = _mean(acts[0][:shorter]) - _mean(acts[1][:shorter])
    whole = _mean(acts[0]) - _mean(acts[1])
    place = ((matched != 0) | (whole != 0)).nonzero()[:, 0]
    prompt = _mean(x[0][counted[0] & ~answer[0]])
    density = torch.stack([_mean(each != 0) for each in acts]).sum(0).double()
    entries = (place.cpu(), matched[place].cpu(), whole[place].cpu())
    return _Pair(*entries, lengths, prompt.cpu(), density.cpu())


def _mean(values: Float[Tensor, "tokens columns"]) -> Float[Tensor, "columns"]:
    """Mean over tokens in float32; zero where there are none."""
    return values.float().sum(dim=0) / max(1, len(values))
