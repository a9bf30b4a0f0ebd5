"""How often a judge prefers one model's answers to another's, whatever their order."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from statistics import NormalDist
from string import Template
from typing import NamedTuple, Protocol

from ..records import Interval, Record
from ..training.sampling import BASE, TRAINED, model_variants, sample_answers
from .labels.judging import conclusion
from .session import Session

# A small "a" may be an article ("a tie", "to reach a verdict, a look at both"): it names an answer
# only where the line ends.
_VERDICT = re.compile(
    r"\b(?i:verdict)\W*(?:(?i:an?\s+)?(?i:(?P<tie>tie))\b|(?P<capital>[AB])\b"
    r"|(?P<small>[ab])\b(?=\W*$))",
    flags=re.MULTILINE,
)
_BARE = re.compile(r"\W*(?:an?\s+)?(a|b|tie)\W*", re.IGNORECASE)


class Asker(Protocol):
    """Who answers prompts; ``peft_fsrl.analysis.labels.Judge`` is one."""

    def ask(self, prompts: Sequence[Sequence[Mapping[str, str]]]) -> list[str]:
        """One text per chat, in order; a chat is a list of messages with role and content."""


class AnswerPair(NamedTuple):
    """A prompt with two answers to it.

    Attributes:
        prompt: as the judge is to see it.
        answer: of the model whose wins are counted.
        other: of its opponent.
    """

    prompt: str
    answer: str
    other: str


def sample_pairs(
    session: Session,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    do_sample: bool = True,
) -> list[AnswerPair]:
    """An answer of the trained model and one of its base to each prompt, under the same seed.

    Args:
        session: its model generates and has an FSRL adapter; its data are not read.
        prompts: texts, such as ``session.prompts[:100]``; a chat template has been applied where
            there is one.
        max_new_tokens: length limit of an answer.
        do_sample: sample; False takes the likeliest token each time.

    Raises:
        ValueError: for no prompt, or one without tokens.
    """
    said = {}
    variants = model_variants(session.model, {})
    for name in (TRAINED, BASE):
        with variants[name]():
            answers = sample_answers(
                session.model,
                prompts,
                session.tokenizer,
                max_new_tokens=max_new_tokens,
                seed=session.seed,
                batch_size=session.batch_size,
                do_sample=do_sample,
            )
        said[name] = [
            session.tokenizer.decode(each.said, skip_special_tokens=True) for each in answers
        ]
    return [AnswerPair(*row) for row in zip(prompts, said[TRAINED], said[BASE], strict=True)]


@dataclass(frozen=True)
class WinRate(Record):
    """How often a judge prefers one model's answers to another's, each pair seen in both orders.

    Attributes:
        model: whose wins are counted.
        opponent: the other.
        judge: who judged.
        n: prompts judged.
        wins: preferred in both orders.
        ties: everything else, equal answers among them.
        losses: the other preferred in both orders.
        win_rate: ``(wins + ties / 2) / n``.
        consistency: share of prompts with the same verdict in both orders.
        unreadable: answers of the judge, of ``2 n`` at most, from which no verdict could be read.
    """

    model: str
    opponent: str
    judge: str
    n: int
    wins: int
    ties: int
    losses: int
    win_rate: Interval
    consistency: float
    unreadable: int


def compute_win_rate(
    pairs: Iterable[AnswerPair],
    judge: Asker,
    *,
    model: str = TRAINED,
    opponent: str = BASE,
    judge_name: str | None = None,
    template: str | None = None,
    level: float = 0.95,
) -> WinRate:
    """Show every pair to a judge in both orders; only what it says in both counts.

    An answer wins if it is preferred in both orders; everything else that does not lose so is a
    tie, and a judge that looks at the order alone comes to a win rate of one half. Where a verdict
    cannot be read, that order has none. Equal answers are ties that nobody is asked about.

    The interval is Wilson's, with ties as half wins. No score between 0 and 1 varies more than wins
    and losses of the same mean do, so it is right without ties and too wide with them.

    Args:
        pairs: the answers.
        judge: asked once, for all of them.
        model: name of the model whose wins are counted.
        opponent: name of the other.
        judge_name: None takes the judge's ``model``, or the name of its class.
        template: text with ``$prompt``, ``$first`` and ``$second``, whose answer ends with
            ``Verdict: A``, ``Verdict: B`` or ``Verdict: tie``; None takes the package's
            ``prompts/win_rate.md``.
        level: confidence of the interval.

    Raises:
        ValueError: for no pair, a template without its places, or a judge that leaves prompts
            unanswered.
    """
    pairs = list(pairs)
    if not pairs:
        raise ValueError("Expected at least one pair of answers to judge, got none.")
    fill = _template(template)
    asked = [pair for pair in pairs if pair.answer != pair.other]
    chats = [
        [{"role": "user", "content": fill.safe_substitute(prompt=pair.prompt, first=a, second=b)}]
        for pair in asked
        for a, b in ((pair.answer, pair.other), (pair.other, pair.answer))
    ]
    texts = judge.ask(chats) if chats else []
    if len(texts) != len(chats):
        raise ValueError(f"Expected {len(chats)} answers from the judge, got {len(texts)}.")
    verdicts = [read_verdict(text) for text in texts]
    # From the model's side: 1 it wins, 0 a tie, -1 the other wins, None unreadable.
    swapped = [None if verdict is None else -verdict for verdict in verdicts[1::2]]
    orders = zip(verdicts[::2], swapped, strict=True)
    agreed = [a for a, b in orders if a is not None and a == b]
    n, wins, losses = len(pairs), agreed.count(1), agreed.count(-1)
    return WinRate(
        model=model,
        opponent=opponent,
        judge=judge_name or str(getattr(judge, "model", type(judge).__name__)),
        n=n,
        wins=wins,
        ties=n - wins - losses,
        losses=losses,
        win_rate=_wilson((wins + (n - wins - losses) / 2) / n, n, level),
        consistency=(len(agreed) + n - len(asked)) / n,
        unreadable=verdicts.count(None),
    )


def read_verdict(text: str) -> int | None:
    """1 for A, -1 for B, 0 for a tie, None where a judge's answer names none of them or several.

    What a reasoning model thinks aloud, between ``<think>`` marks, does not count.
    """
    text = conclusion(text)
    bare = _BARE.fullmatch(text)
    named = (
        {bare[1]} if bare else {found[found.lastgroup or 0] for found in _VERDICT.finditer(text)}
    )
    named = {name.lower() for name in named}
    return {"a": 1, "b": -1, "tie": 0}[named.pop()] if len(named) == 1 else None


def _template(text: str | None) -> Template:
    if text is None:
        text = (files(__package__) / "prompts" / "win_rate.md").read_text("utf-8")
    places = [f"${name}" for name in ("prompt", "first", "second")]
    missing = [place for place in places if place not in text]
    if missing:
        raise ValueError(f"Expected a template with {places}, found no {missing}.")
    return Template(text)


def _wilson(share: float, n: int, level: float) -> Interval:
    # SciPy's takes whole successes only, and ties are half ones.
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), level)
