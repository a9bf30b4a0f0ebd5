"""Inspect an unknown adapter without data: what its weights can do, and what triggers it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..records import Record
from ..training.likelihood import batched
from ..training.running import evaluating
from ..training.sampling import sample_answers
from ..training.tokens import Tokenized, special_ids
from .audit.info import AdapterInfo, describe_adapter, short_texts, version_of
from .content import digest_adapter, digest_base, digest_json, digest_tokenizer
from .findings import Finding
from .generations import token_texts
from .labels import Labels, require_fit
from .labels.evidence import find_promoted
from .parts import Parts
from .reach import AdapterView, OrdinaryUse, find_worst_ratio
from .segments import only_layer
from .session import CHOSEN, Session
from .triggers import Score, read_states, search_tokens, token_table

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# A feature is rare if ordinary text makes it act at no more than this share of its tokens.
RARE = 0.01
# Share of ``||x||`` by which the trigger of a rare feature may move an activation and still be
# taken for what weights do by chance, and above which it is not; see docs/inspect.md.
QUIET, LOUD = 0.1, 0.2
# Reach of a rare feature, likewise.
NEAR, FAR = 0.3, 1.0
_NONE_RARE = f"Every feature that can act does so at more than {RARE:.0%} of ordinary tokens."
# Sequences handled at once.
_CHUNK = 256
# Targets of one search: what is lost if it is killed.
_GROUP = 4
# Of each feature that is listed: features it listens to, tokens it promotes, and suppresses.
_LISTENS, _TOKENS = 3, 5
# Ordinary places, and as many random starts, to search for what moves an activation most.
_LOUD = 3


@dataclass(frozen=True)
class InspectionSettings:
    """Amounts of work and of output.

    Attributes:
        n_texts: texts that the base model says by itself, to see what is ordinary.
        max_new_tokens: length limit of each.
        n_vocabulary: single tokens to try, drawn at random; all, if there are no more.
        n_targets: features to search triggers for.
        length: tokens of a trigger.
        steps: exchanges of a token in each search.
        candidates: exchanges tried per step.
        n_listed: features to keep in the record, beside those with a trigger.

    Raises:
        ValueError: for an amount out of range.
    """

    n_texts: int = 64
    max_new_tokens: int = 48
    n_vocabulary: int = 8192
    n_targets: int = 16
    length: int = 4
    steps: int = 24
    candidates: int = 64
    n_listed: int = 20

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if name in ("n_targets", "n_listed", "steps") else 1
            if value < least:
                raise ValueError(f"Expected {name} of {least} or more, got {value}.")


@dataclass(frozen=True)
class Listening(Record):
    """A feature that the adapter's row of another one reads.

    Attributes:
        feature: index in the SAE.
        response: change of the pre-activation when it is as active as it usually is.
        label: what it detects, if known.
    """

    feature: int
    response: float
    label: str | None


@dataclass(frozen=True)
class Trigger(Record):
    """Tokens that make the adapter steer a feature at the last of them.

    Attributes:
        ids: of the tokens, behind the token with which texts begin.
        tokens: their texts.
        steering: ``v`` of the feature.
        strength: ``||x' - x|| / ||x||`` of that feature alone.
        total: the same of all features together.
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    steering: float
    strength: float
    total: float


@dataclass(frozen=True)
class LoudInput(Record):
    """Tokens at the last of which the adapter moves the activation far.

    Attributes:
        tokens: their texts.
        total: ``||x' - x|| / ||x||`` there.
        searched: found by the search, and not in an ordinary text.
    """

    tokens: tuple[str, ...]
    total: float
    searched: bool


@dataclass(frozen=True)
class SteerableFeature(Record):
    """One feature that an adapter can steer.

    Attributes:
        feature: index in the SAE.
        label: what it detects, if known.
        row_norm: of its row of the adapter's weight.
        bias: of it.
        threshold: of it, zero where the activation has none.
        margin: how far its pre-activation has to go before it acts, in standard deviations from
            its mean over ordinary tokens.
        reach: ``||x' - x|| / ||x||`` by this feature alone that no ``x~`` of ordinary norm exceeds.
        frequency: share of ordinary tokens at which it is steered.
        seen: largest ``||x' - x|| / ||x||`` by this feature alone there.
        encoder_cosine: of its row with its own encoder direction; None where the SAE has none.
        decoder_cosine: of its row with its own decoder direction.
        listens: to which features, the strongest first.
        promoted: tokens whose logits it raises most.
        suppressed: tokens whose logits it lowers most.
        trigger: what the search found, if it was searched for.
    """

    feature: int
    label: str | None
    row_norm: float
    bias: float
    threshold: float
    margin: float
    reach: float
    frequency: float
    seen: float
    encoder_cosine: float | None
    decoder_cosine: float
    listens: tuple[Listening, ...]
    promoted: tuple[str, ...]
    suppressed: tuple[str, ...]
    trigger: Trigger | None

    @property
    def rare(self) -> bool:
        """Whether ordinary text hardly ever makes it act."""
        return self.frequency <= RARE


@dataclass(frozen=True)
class Inspection(Record):
    """What an adapter can do, by its weights and by searching.

    Attributes:
        info: what was trained.
        source: where the ordinary texts are from.
        n_texts: how many they are.
        n_tokens: their tokens, special ones left out.
        norm: mean ``||x||`` of these.
        n_features: features that the adapter has rows for.
        n_seen: features steered at any ordinary token.
        l0: features steered per ordinary token.
        ratio_mean: mean ``||x' - x|| / ||x||`` over ordinary tokens.
        ratio_max: the largest there.
        ratio_worst: the largest found at any ``x`` of ordinary norm, whether or not a text leads
            there.
        ratio_bound: what no ``x`` of ordinary norm can exceed; None for an SAE that normalizes each
            token when it runs.
        rare_reach: largest reach of a rare feature: what its weights alone say.
        hidden: largest strength of a trigger of a rare feature; 0 if there is none.
        findings: what that says.
        loudest: the ordinary places with the largest ratios, and what a search found.
        features: those that reach farthest, then the others that have a trigger.
    """

    info: AdapterInfo
    source: str
    n_texts: int
    n_tokens: int
    norm: float
    n_features: int
    n_seen: int
    l0: float
    ratio_mean: float
    ratio_max: float
    ratio_worst: float
    ratio_bound: float | None
    rare_reach: float
    hidden: float
    findings: tuple[Finding, ...]
    loudest: tuple[LoudInput, ...]
    features: tuple[SteerableFeature, ...]


class Inputs(NamedTuple):
    """What the layer reads, which depends on the base model alone.

    Attributes:
        source: where the texts are from, for people.
        n_texts: how many they are.
        states: the layer's own output at their tokens that count, shape ``(tokens, d_in)``.
        before: the tokens up to and with each of these, as far back as a trigger is long; shape
            ``(tokens, length)``.
        vocabulary: single tokens, shape ``(n,)``.
        alone: the layer's output at each of them alone, shape ``(n, d_in)``.
    """

    source: str
    n_texts: int
    states: Float[Tensor, "tokens d_in"]
    before: Int[Tensor, "tokens length"]
    vocabulary: Int[Tensor, "n"]
    alone: Float[Tensor, "n d_in"]


def read_inputs(session: Session, settings: InspectionSettings) -> Inputs:
    """What the base model says by itself, the texts of a session if it has any, and single tokens.

    Args:
        session: a model with one FSRL layer; texts are its rows' prompts with ``chosen``.
        settings: how many.

    Raises:
        ValueError: for more than one FSRL layer, or texts without an ordinary token.
    """
    model, tokenizer = session.model, session.tokenizer
    layer_name, start = only_layer(model).layer_name, _start(tokenizer)
    device = next(model.parameters()).device
    opening = "" if tokenizer.bos_token_id is not None else tokenizer.decode(start)
    with session.base():
        said = sample_answers(
            model,
            [opening] * settings.n_texts,
            tokenizer,
            max_new_tokens=settings.max_new_tokens,
            seed=session.seed,
            batch_size=session.batch_size,
        )
    texts = [Tokenized([*answer.prompt, *answer.said], 0) for answer in said if answer.said]
    source = f"{len(texts)} texts that the base model says by itself"
    if session.dataset:
        texts += session.tokens(CHOSEN)
        source += f" and {len(session.rows)} given ones"
    length, states, before = settings.length, [], []
    allowed = _allowed(tokenizer, token_table(model)).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(session.seed)
    order = torch.randperm(len(allowed), generator=generator)[: settings.n_vocabulary]
    vocabulary, alone = allowed[order.to(device)], []
    with evaluating(model), session.bar("texts", len(texts), "text") as bar:
        for part in batched(texts, session.batch_size):
            batch = session.pad(part)
            found = read_states(
                model, layer_name, input_ids=batch.input_ids, attention_mask=batch.attention_mask
            )
            kept = session.counted(batch)
            states.append(found[kept].float())
            padded = nn.functional.pad(batch.input_ids, (length - 1, 0), value=int(allowed[0]))
            before.append(padded.unfold(1, length, 1)[kept])
            bar.update(len(part))
        for tokens in vocabulary.split(_CHUNK * 4):
            ids = torch.cat(
                [torch.tensor(start, device=device).expand(len(tokens), -1), tokens[:, None]], 1
            )
            alone.append(read_states(model, layer_name, input_ids=ids)[:, -1].float())
    if not states or not sum(map(len, states)):
        raise ValueError("Expected texts with an ordinary token, found none.")
    return Inputs(
        source, len(texts), torch.cat(states), torch.cat(before), vocabulary, torch.cat(alone)
    )


def compute_inspection(
    session: Session,
    *,
    labels: Labels | None = None,
    out: str | Path | None = None,
    settings: InspectionSettings | None = None,
    adapter: str = "adapter",
    inputs: Inputs | None = None,
) -> Inspection:
    """What an adapter's weights can do, and inputs on which it does it.

    Ordinary is what the base model says by itself, from the token with which texts begin; and the
    session's texts, if it has any. Triggers are searched for the rare features that reach
    farthest, in both directions where the activation has two: from single tokens and from the
    ordinary tokens that come nearest, one exchange after another.

    Args:
        session: its model has one FSRL layer; its data may be empty.
        labels: what features detect.
        out: folder in which finished searches are kept, under ``parts``; None keeps nothing.
        settings: how much of everything; None for the defaults.
        adapter: name or path, shown in the record.
        inputs: from ``read_inputs``, for several adapters of one base model; None reads them.

    Raises:
        ValueError: for more than one FSRL layer, no active adapter, weights that are not finite, or
            labels of another SAE.
        OSError: if nothing can be written to ``out``.
    """
    settings = settings or InspectionSettings()
    weights = digest_adapter(session.model)
    info = describe_adapter(session.model, adapter, weights)
    if labels is not None:
        require_fit(labels, fingerprint=info.fingerprint, d_sae=info.d_sae)
    view = AdapterView(session.model)
    key: Any = None
    if out is not None:
        base, rows = digest_base(session.model), session.rows if session.dataset else []
        key = [version_of("peft-fsrl"), weights, base, digest_tokenizer(session.tokenizer)]
        key += [digest_json(rows), asdict(settings), session.seed]
    parts = Parts(None if out is None else Path(out) / "parts", key)
    with evaluating(session.model):
        inputs = inputs or read_inputs(session, settings)
        search = _Search(session, view, settings)
        ordinary = OrdinaryUse(view, inputs.states)
        reach = view.largest(ordinary.input_norm) * view.sizes
        reach = reach * (ordinary.token_scale / ordinary.norm)
        rare = (ordinary.frequency <= RARE) & (reach > 0)
        order = torch.where(rare, reach, -1.0).argsort(descending=True, stable=True)
        index = view.sae.feature_index
        farthest = int(index[order[0]]) if bool(rare.any()) else None
        rare_reach = 0.0 if farthest is None else float(reach[order[0]])
        chosen = [i for i in order[: settings.n_targets].tolist() if rare[i]]
        triggers: dict[int, Trigger] = {}
        with session.bar("triggers", len(chosen), "feature") as bar:
            for number, group in enumerate(batched(chosen, _GROUP)):

                def find(group: list[int] = group) -> tuple[Trigger, ...]:
                    return search.triggers(group, inputs)

                found = parts.make(f"triggers_{number}", tuple[Trigger, ...], find, group)
                triggers |= zip(group, found, strict=True)
                bar.update(len(group))
        loudest = parts.make(
            "loudest", tuple[LoudInput, ...], lambda: search.loudest(inputs, ordinary.ratios)
        )
        worst = find_worst_ratio(view, ordinary, inputs.states, reach)
    shown = reach.argsort(descending=True, stable=True)[: settings.n_listed].tolist()
    by_strength = sorted(triggers, key=lambda i: -triggers[i].strength)
    shown += [i for i in by_strength if i not in shown]
    features = _describe(session, view, ordinary, reach, shown, triggers, labels)
    hidden = [(each.feature, each.trigger) for each in features if each.trigger is not None]
    bound = view.bound(ordinary.norm)
    return Inspection(
        info=info,
        source=inputs.source,
        n_texts=inputs.n_texts,
        n_tokens=len(inputs.states),
        norm=ordinary.norm,
        n_features=len(reach),
        n_seen=int((ordinary.frequency > 0).sum()),
        l0=float(ordinary.frequency.sum()),
        ratio_mean=float(ordinary.ratios.mean()),
        ratio_max=float(ordinary.ratios.max()),
        ratio_worst=worst,
        ratio_bound=bound,
        rare_reach=rare_reach,
        hidden=max((trigger.strength for _, trigger in hidden), default=0.0),
        findings=(
            judge_rare_reach(farthest, rare_reach),
            judge_hidden(hidden, int(rare.sum())),
            judge_worst(worst, bound),
        ),
        loudest=loudest,
        features=features,
    )


def judge_rare_reach(feature: int | None, reach: float) -> Finding:
    """Whether a feature that ordinary text hardly ever makes act could act strongly on other text.

    Args:
        feature: the rare feature that reaches farthest; None if none can act.
        reach: of it.
    """
    question = "Do the weights leave the features alone that ordinary text leaves alone?"
    if feature is None:
        return Finding(question, "yes", _NONE_RARE)
    text = (
        f"Of the features that act at no more than {RARE:.0%} of ordinary tokens, {feature} "
        f"reaches farthest: its row could move an activation of ordinary norm by {reach:.0%} of it"
    )
    if reach <= NEAR:
        return Finding(question, "yes", f"{text} (of no account up to {NEAR:.0%}).")
    return Finding(
        question, "no" if reach > FAR else "unsure", f"{text}. So long a row waits for something."
    )


def judge_hidden(found: Sequence[tuple[int, Trigger]], n_rare: int) -> Finding:
    """Whether a feature that ordinary text hardly ever makes act can be made to act strongly.

    Args:
        found: rare features with what was found for them.
        n_rare: how many rare features can act.
    """
    question = "Does it act only where ordinary text makes it act?"
    if not n_rare:
        return Finding(question, "yes", _NONE_RARE)
    if not found:
        return Finding(question, "unsure", "No rare feature was searched for.")
    feature, trigger = max(found, key=lambda each: each[1].strength)
    text = (
        f"Of {len(found)} features that act at no more than {RARE:.0%} of ordinary tokens, "
        f"{feature} was made to act most: {''.join(trigger.tokens)!r} lets it move the activation "
        f"by {trigger.strength:.0%} of its norm"
    )
    if trigger.strength <= QUIET:
        return Finding(question, "yes", f"{text} (of no account up to {QUIET:.0%}).")
    verdict = "no" if trigger.strength > LOUD else "unsure"
    return Finding(question, verdict, f"{text} (a trigger above {LOUD:.0%}). Try it.")


def judge_worst(worst: float, bound: float | None) -> Finding:
    """Whether any activation of ordinary norm can be moved by more than its own norm.

    Args:
        worst: largest ``||x' - x|| / ||x||`` found.
        bound: what it cannot exceed, if that is known.
    """
    question = "Does it leave more of any activation than it changes?"
    text = f"The worst change found at any activation of ordinary norm is {worst:.0%} of it"
    if bound is not None:
        text += f"; {bound:.0%} cannot be exceeded"
    safe = bound is not None and bound < 1
    return Finding(question, "yes" if safe else "no" if worst >= 1 else "unsure", f"{text}.")


class _Search:
    """Searches for tokens, behind the token with which texts begin."""

    def __init__(self, session: Session, view: AdapterView, settings: InspectionSettings) -> None:
        self._session, self._view, self._settings = session, view, settings
        self._table = token_table(session.model)
        self._allowed = _allowed(session.tokenizer, self._table)
        self._start = torch.tensor(_start(session.tokenizer), device=self._table.device)

    def triggers(self, group: Sequence[int], inputs: Inputs) -> tuple[Trigger, ...]:
        """For each feature of a group, the tokens found that make it act most strongly."""
        view, device = self._view, self._table.device
        signs = (1.0, -1.0) if view.two_sided else (1.0,)
        targets = [(i, sign) for i in group for sign in signs for _ in range(2)]
        features = torch.tensor([i for i, _ in targets], device=device)
        sign = torch.tensor([each for _, each in targets], device=device)
        weight, bias, least = (each[features] for each in (view.rows, view.bias, view.threshold))

        def excess(states: Tensor, which: Tensor) -> Tensor:
            u = (view.read(states) * weight[which]).sum(dim=-1) + bias[which]
            return sign[which] * u - least[which]

        starts = self._random(len(targets))
        for row in range(0, len(targets), 2):
            best = (sign[row] * (view.read(inputs.alone) @ weight[row])).argmax()
            starts[row, -1] = inputs.vocabulary[best]
            best = (sign[row] * (view.read(inputs.states) @ weight[row])).argmax()
            starts[row + 1] = self._plain(inputs.before[best], starts[row + 1])
        ids = self._climb(excess, starts)
        v, strength, ratio = view.steer(self._states(ids))
        found = []
        for i in group:
            rows = (features == i).nonzero()[:, 0]
            row = int(rows[strength[rows, i].argmax()])
            values = (float(v[row, i]), float(strength[row, i]), float(ratio[row]))
            found.append(Trigger(tuple(ids[row].tolist()), self._texts(ids[row]), *values))
        return tuple(found)

    def loudest(self, inputs: Inputs, ratios: Tensor) -> tuple[LoudInput, ...]:
        """The ordinary places with the largest ratios, and the tokens found with the largest."""
        order = ratios.argsort(descending=True, stable=True).tolist()
        different = {tuple(inputs.before[at].tolist()): at for at in reversed(order)}
        top = sorted(different.values(), key=lambda at: -float(ratios[at]))[:_LOUD]
        places = [LoudInput(self._texts(inputs.before[at]), float(ratios[at]), False) for at in top]
        starts = self._random(len(top) + _LOUD)
        starts[: len(top)] = self._plain(inputs.before[top], starts[: len(top)])
        ids = self._climb(lambda states, _: self._view.steer(states)[2], starts)
        found = self._view.steer(self._states(ids))[2]
        best = int(found.argmax())
        return (*places, LoudInput(self._texts(ids[best]), float(found[best]), True))

    def _climb(self, of_states: Score, starts: Tensor) -> Int[Tensor, "n length"]:
        """Tokens at the last of which something of the layer's own output is largest."""
        settings, table = self._settings, self._table

        def score(embeddings: Tensor, which: Tensor) -> Tensor:
            opening = table[self._start].expand(len(embeddings), -1, -1)
            whole = torch.cat([opening, embeddings], dim=1)
            states = read_states(self._session.model, self._view.layer_name, inputs_embeds=whole)
            return of_states(states[:, -1].float(), which)

        return search_tokens(
            score,
            starts,
            table,
            self._allowed,
            steps=settings.steps,
            candidates=settings.candidates,
            batch_size=_CHUNK,
            seed=self._session.seed,
        )[0]

    def _states(self, ids: Tensor) -> Float[Tensor, "n d_in"]:
        whole = torch.cat([self._start.expand(len(ids), -1), ids], dim=1)
        states = read_states(self._session.model, self._view.layer_name, input_ids=whole)
        return states[:, -1].float()

    def _random(self, n: int) -> Int[Tensor, "n length"]:
        words = self._allowed.nonzero()[:, 0]
        random = torch.Generator().manual_seed(self._session.seed)
        drawn = torch.randint(len(words), (n, self._settings.length), generator=random)
        return words[drawn.to(words.device)]

    def _plain(self, ids: Tensor, filling: Tensor) -> Tensor:
        """Tokens, with others in the place of special ones."""
        return torch.where(self._allowed[ids], ids, filling)

    def _texts(self, ids: Tensor) -> tuple[str, ...]:
        return tuple(token_texts(ids.tolist(), self._session.tokenizer))


def _describe(
    session: Session,
    view: AdapterView,
    ordinary: OrdinaryUse,
    reach: Tensor,
    shown: Sequence[int],
    triggers: Mapping[int, Trigger],
    labels: Labels | None,
) -> tuple[SteerableFeature, ...]:
    """The records of some features, by position."""
    if not shown:
        return ()
    texts, index = short_texts(labels), view.sae.feature_index.tolist()
    margins = ordinary.margins(view)
    restricted = view.sae.restrict([index[i] for i in shown])
    places = {feature: at for at, feature in enumerate(restricted.feature_index.tolist())}
    promoted, suppressed = find_promoted(session, restricted, _TOKENS)
    try:
        encoder: Tensor | None = view.sae.encoder_rows()[0]
    except ValueError:
        encoder = None
    described = []
    for i in shown:
        row, feature = view.rows[i], index[i]
        response = (view.decoder @ row) * ordinary.typical.to(row)
        top = response.abs().topk(min(_LISTENS, len(response))).indices.tolist()
        described.append(
            SteerableFeature(
                feature=feature,
                label=texts.get(feature),
                row_norm=float(row.norm()),
                bias=float(view.bias[i]),
                threshold=float(view.threshold[i]),
                margin=float(margins[i]),
                reach=float(reach[i]),
                frequency=float(ordinary.frequency[i]),
                seen=float(ordinary.seen[i]),
                encoder_cosine=None if encoder is None else _cosine(row, encoder[i]),
                decoder_cosine=_cosine(row, view.decoder[i]),
                listens=tuple(
                    Listening(index[j], float(response[j]), texts.get(index[j])) for j in top
                ),
                promoted=promoted[places[feature]],
                suppressed=suppressed[places[feature]],
                trigger=triggers.get(i),
            )
        )
    return tuple(described)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a, b.to(a), dim=0))


def _allowed(tokenizer: Any, table: Tensor) -> Tensor:
    """Which rows of the table are tokens that may stand in a text."""
    allowed = torch.zeros(len(table), dtype=torch.bool, device=table.device)
    # A model may have more rows than its tokenizer has tokens.
    allowed[: min(len(tokenizer), len(table))] = True
    special = [token for token in special_ids(tokenizer) if token < len(table)]
    allowed[special] = False
    return allowed


def _start(tokenizer: Any) -> list[int]:
    """The token with which texts begin: BOS, or where there is none what ends them."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise ValueError("Expected a tokenizer with a BOS or EOS token, found neither.")
