"""Win rates of judges whose taste is known."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import pytest
from scipy.stats import binomtest

import helpers
from peft_fsrl.analysis import AnswerPair, Session, WinRate, compute_win_rate, sample_pairs
from peft_fsrl.analysis.winrate import read_verdict
from peft_fsrl.steering import scale_steering

Chats = Sequence[Sequence[Mapping[str, str]]]
MARKS = re.compile(r"<(request|answer_a|answer_b)>\n(.*?)\n</\1>", re.DOTALL)


class FakeJudge:
    """Says what ``prefer`` says about the two answers as they are shown."""

    def __init__(self, prefer: Callable[[str, str], str]) -> None:
        self._prefer = prefer
        self.asked: list[dict[str, str]] = []

    def ask(self, prompts: Chats) -> list[str]:
        answers = []
        for [message] in prompts:
            assert message["role"] == "user"
            shown = dict(MARKS.findall(message["content"]))
            self.asked.append(shown)
            answers.append(self._prefer(shown["answer_a"], shown["answer_b"]))
        return answers


def longer(first: str, second: str) -> str:
    if len(first) == len(second):
        return "They are alike.\nVerdict: tie"
    return f"The longer one.\n\n**Verdict: {'A' if len(first) > len(second) else 'B'}**"


PAIRS = [
    AnswerPair("a?", "long answer", "short"),
    AnswerPair("b?", "longer answer", "short"),
    AnswerPair("c?", "longest answer", "short"),
    AnswerPair("d?", "no", "short"),
    AnswerPair("e?", "equal", "alike"),
    AnswerPair("f?", "the same", "the same"),
]


def test_counts_of_a_judge_with_a_taste() -> None:
    judge = FakeJudge(longer)
    found = compute_win_rate(PAIRS, judge, model="ours", opponent="theirs")
    assert (found.wins, found.ties, found.losses, found.n) == (3, 2, 1, 6)
    assert (found.model, found.opponent, found.judge) == ("ours", "theirs", "FakeJudge")
    assert found.win_rate.value == pytest.approx(4 / 6)
    assert found.consistency == 1.0
    assert found.unreadable == 0
    assert WinRate.from_json(found.to_json()) == found
    asked = {(each["request"], each["answer_a"], each["answer_b"]) for each in judge.asked}
    expected = {(p.prompt, p.answer, p.other) for p in PAIRS[:5]}
    expected |= {(p.prompt, p.other, p.answer) for p in PAIRS[:5]}
    assert len(judge.asked) == 10
    assert asked == expected
    turned = [AnswerPair(pair.prompt, pair.other, pair.answer) for pair in PAIRS]
    other = compute_win_rate(turned, FakeJudge(longer), judge_name="someone")
    assert (other.wins, other.losses, other.judge) == (1, 3, "someone")
    assert other.win_rate.value == pytest.approx(1 - found.win_rate.value)
    assert other.win_rate.low == pytest.approx(1 - found.win_rate.high)


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_judge_of_positions_decides_nothing(letter: str) -> None:
    found = compute_win_rate(PAIRS[:5], FakeJudge(lambda a, b: f"Verdict: {letter}"))
    assert (found.wins, found.ties, found.losses) == (0, 5, 0)
    assert found.win_rate.value == 0.5
    assert found.consistency == 0.0


def test_a_tie_in_one_order_is_no_win() -> None:
    judge = FakeJudge(lambda a, b: "Verdict: A" if a != "short" else "Verdict: tie")
    found = compute_win_rate(PAIRS[:3], judge)
    assert (found.wins, found.ties, found.losses, found.consistency) == (0, 3, 0, 0.0)


def test_unreadable_answers_are_counted_and_decide_nothing() -> None:
    judge = FakeJudge(lambda a, b: "" if "longest" in a else longer(a, b))
    found = compute_win_rate(PAIRS[:4], judge)
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)
    assert (found.unreadable, found.consistency) == (1, 0.75)
    never = compute_win_rate(PAIRS[:4], FakeJudge(lambda a, b: "I cannot say."))
    assert (never.ties, never.unreadable, never.consistency) == (4, 8, 0.0)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A", 1),
        (" b. ", -1),
        ("tie", 0),
        ("**Verdict:** B", -1),
        ("Answer A is wrong, answer B is right.\nVerdict: B", -1),
        ("VERDICT - TIE", 0),
        ("verdict: A\n...\nVerdict: A", 1),
        ("verdict: A\n...\nVerdict: B", None),
        ("Verdict: Apples", None),
        ("Verdict: both", None),
        ("Verdict: a tie", 0),
        ("Verdict: A tie.", 0),
        ("a tie", 0),
        ("verdict: a", 1),
        ("Verdict: B, since it is right.", -1),
        ("To reach a verdict, a look at both.\nVerdict: B", -1),
        ("My verdict: a close call.", None),
        ("<think>Verdict: A? No, b.</think>\n\nVerdict: B", -1),
        ("<think>Verdict: A", None),
        ("Verdict: A? No.\n</think>\n\nVerdict: B", -1),
        ("A is better", None),
        ("", None),
    ],
)
def test_verdicts(text: str, verdict: int | None) -> None:
    assert read_verdict(text) == verdict


@pytest.mark.parametrize(("wins", "n"), [(0, 7), (3, 7), (7, 7), (45, 60)])
def test_the_interval_is_wilsons(wins: int, n: int) -> None:
    texts = [("long answer", "short")] * wins + [("short", "long answer")] * (n - wins)
    pairs = [AnswerPair(f"{i}?", *both) for i, both in enumerate(texts)]
    for level in (0.95, 0.8):
        found = compute_win_rate(pairs, FakeJudge(longer), level=level).win_rate
        ends = binomtest(wins, n).proportion_ci(level, method="wilson")
        assert (found.low, found.high) == pytest.approx((ends.low, ends.high), abs=1e-12)
        assert found.level == level


def test_a_template_of_ones_own() -> None:
    shown = []

    def first(a: str, b: str) -> str:
        shown.append((a, b))
        return "A"

    template = "<request>\n$prompt\n</request><answer_a>\n$first\n</answer_a>"
    full = template + "<answer_b>\n${second}\n</answer_b> costs $5"
    with pytest.raises(ValueError, match=r"no \['\$second'\]"):
        compute_win_rate(PAIRS, FakeJudge(first), template=template)
    pair = AnswerPair("$first", "$second {0}", "%s")
    compute_win_rate([pair], FakeJudge(first), template=full.replace("${second}", "$second"))
    assert shown == [("$second {0}", "%s"), ("%s", "$second {0}")]


def test_nothing_to_judge_and_a_judge_that_loses_prompts() -> None:
    with pytest.raises(ValueError, match="at least one pair"):
        compute_win_rate([], FakeJudge(longer))

    class Forgetful(FakeJudge):
        def ask(self, prompts: Chats) -> list[str]:
            return super().ask(prompts)[:-1]

    with pytest.raises(ValueError, match="Expected 10 answers from the judge, got 9"):
        compute_win_rate(PAIRS, Forgetful(longer))


def test_pairs_are_sampled_from_the_trained_model_and_its_base() -> None:
    model, tokenizer = helpers.fsrl_model(), helpers.tiny_tokenizer()
    prompts = ["w3 w4", "w5", "w6 w7 w8"]
    settings = {"max_new_tokens": 10, "do_sample": False}
    session = Session(model, tokenizer, batch_size=2)
    pairs = sample_pairs(session, prompts, **settings)
    assert [pair.prompt for pair in pairs] == prompts
    assert all(pair.answer != pair.other for pair in pairs)
    with scale_steering(model, 0.0):
        unsteered = sample_pairs(session, prompts, **settings)
    assert [pair.answer for pair in unsteered] == [pair.other for pair in pairs]
    found = compute_win_rate(unsteered, FakeJudge(longer))
    assert (found.ties, found.win_rate.value, found.consistency) == (3, 0.5, 1.0)
