"""What a judge is shown, how its answers are read, and how well its labels hold up."""

from __future__ import annotations

import json
import re
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from peft import get_peft_model
from transformers.cli.serve import Serve
from transformers.utils import logging

from helpers import tiny_model, tiny_tokenizer
from judge_server import serve
from peft_fsrl import FSRLConfig
from peft_fsrl.analysis.labels import (
    Category,
    Context,
    Detection,
    FeatureEvidence,
    FeatureLabel,
    HeldOutContexts,
    Judge,
    Judgment,
    Labels,
    collect_evidence,
    collect_held_out,
    collect_judgments,
    default_categories,
    describe_features,
    judge_features,
    majority_labels,
    measure_detection,
    organism_labels,
    parse_verdict,
    with_descriptions,
    with_quality,
)
from peft_fsrl.analysis.labels.judging import (
    _fill,
    parse_active,
    render_context,
    render_evidence,
)
from peft_fsrl.analysis.session import Session
from peft_fsrl.organism import load


def evidence(feature: int, *texts: str) -> FeatureEvidence:
    """Evidence whose last word is where the feature is active."""
    contexts = tuple(
        Context(tuple(f" {w}" for w in text.split()), (0.0,) * (len(text.split()) - 1) + (2.0,))
        for text in texts
    )
    return FeatureEvidence(feature, 0.01, contexts, (" up",), (" down",))


def labeled(source: str, **features: str) -> Labels:
    """Labels from ``f3="style;tone"``."""
    found = tuple(
        FeatureLabel(int(name[1:]), None, tuple(filter(None, value.split(";"))), None)
        for name, value in features.items()
    )
    return Labels(source, ("style", "tone"), None, None, found)


@pytest.mark.parametrize(
    ("answer", "verdict", "confidence"),
    [
        ("It detects lists.\n\nANSWER: yes\nCONFIDENCE: 85", True, 0.85),
        ("ANSWER: No\nCONFIDENCE: 0", False, 0.0),
        ("**Answer:** *yes*\n**Confidence:** 100%", True, 1.0),
        ("`ANSWER: no`, CONFIDENCE: 7", False, 0.07),
        ('{"answer": "yes", "confidence": 0.8}', True, 0.8),
        ("answer = no; confidence = 1.0", False, 1.0),
        ("ANSWER: yes\nCONFIDENCE: 1", True, 0.01),
        ("ANSWER: yes\nCONFIDENCE: 0.5%", True, 0.005),
        ("ANSWER: yes\nCONFIDENCE: high", True, None),
        ("ANSWER: yes\nCONFIDENCE: 900", True, None),
        # The last one counts, and thoughts do not.
        ("ANSWER: yes? No: it is not about that.\nANSWER: no", False, None),
        ("<think>ANSWER: yes</think>\nANSWER: no", False, None),
        ("<think>never ends. ANSWER: yes", None, None),
        ("Yes.", True, None),
        ("no", False, None),
        # What is not an answer is not taken for "no".
        ("", None, None),
        ("ANSWER: yes or no\nCONFIDENCE: 50", None, 0.5),
        ("ANSWER: yes/no", None, None),
        ("ANSWER: nothing clear", None, None),
        ("ANSWER: maybe", None, None),
        ("The answer depends.", None, None),
        ("I think yes", None, None),
        ("Nothing to see", None, None),
    ],
)
def test_verdicts(answer: str, verdict: bool | None, confidence: float | None) -> None:
    assert parse_verdict(answer) == (verdict, pytest.approx(confidence))


@pytest.mark.parametrize(
    ("answer", "chosen"),
    [
        ("ACTIVE: 1, 3", {1, 3}),
        ("Because.\n**ACTIVE:** 2 and 4.", {2, 4}),
        ("active: [1 2 3]", {1, 2, 3}),
        ("ACTIVE: none", set()),
        ("ACTIVE: []", set()),
        ("ACTIVE: 1\nACTIVE: 4", {4}),
        ("ACTIVE:\n2", {2}),
        ("ACTIVE: ", None),
        ("ACTIVE: 5", None),
        ("ACTIVE: 0", None),
        ("ACTIVE: all of them", None),
        ("ACTIVE: 1 to 3 (the first ones)", None),
        ("1, 2", None),
        ("", None),
    ],
)
def test_choices(answer: str, chosen: set[int] | None) -> None:
    assert parse_active(answer, 4) == chosen


def test_what_the_judge_is_shown() -> None:
    context = Context(("Dear", " reader", ":", "\n", "-", " one"), (0.0, 0.4, 1.0, 2.0, 0.9, 1.2))
    assert render_context(context) == "Dear reader<<:>><<\\n>>- <<one>>"
    assert render_context(context, marked=False) == "Dear reader:\\n- one"
    text = render_evidence(evidence(3, "a list -"), "bullets")
    assert text == (
        "Description: bullets\n\n"
        "Contexts, strongest first (active on 1.000% of all tokens):\n1.  a list <<->>\n\n"
        "Tokens that it promotes: 'up'\n\nTokens that it suppresses: 'down'"
    )
    with pytest.raises(ValueError, match="a description, contexts or tokens to judge by"):
        render_evidence(FeatureEvidence(1, 0.0, (), (), ()), None)
    # What a user's definition says is not taken for a place to fill.
    assert _fill("{{a}} {{b}}", {"a": "{{b}}", "b": "x"}) == "{{b}} x"


def test_prompts_carry_definition_and_form() -> None:
    alignment, style = default_categories()
    assert (alignment.name, style.name) == ("alignment", "style")
    with serve(lambda prompt: "ANSWER: no\nCONFIDENCE: 9") as s:
        judge_features([evidence(3, "a b")], None, Judge(s.url, "m", max_concurrency=1))
    for request, category in zip(s.requests, (alignment, style), strict=True):
        system, user = request["messages"]
        assert (system["role"], user["role"]) == ("system", "user")
        assert category.definition in system["content"]
        assert f"# The category: {category.name}" in system["content"]
        assert "{{" not in system["content"]
        assert "Borderline cases" in system["content"]
        # The form that the prompt asks for is the form that is read.
        form = system["content"].split("nothing after them:")[1]
        assert parse_verdict(form)[0] is None
        filled = form.replace("yes or no", "yes").replace("a whole number", "42")
        assert parse_verdict(filled) == (True, 0.42)
        assert "<<b>>" in user["content"]


def by_words(prompt: str) -> str:
    """A judge that calls style what is active on a dash."""
    return "ANSWER: yes\nCONFIDENCE: 90" if "<<->>" in prompt else "ANSWER: no\nCONFIDENCE: 70"


def test_judging_from_evidence() -> None:
    material = [evidence(3, "a list -"), evidence(5, "a word")]
    category = Category("lists", "Whatever is a list.")
    with serve(by_words) as s:
        judge = Judge(s.url, "m")
        labels = judge_features(material, [category], judge)
        judgments = collect_judgments(material, [category], judge)
    assert labels == Labels(
        "judge m",
        ("lists",),
        None,
        None,
        (FeatureLabel(3, None, ("lists",), None), FeatureLabel(5, None, (), None)),
    )
    assert judgments == (
        Judgment(3, "lists", (True,), 0.9),
        Judgment(5, "lists", (False,), 0.7),
    )
    assert len(s.requests) == 2


def test_judging_descriptions_alone() -> None:
    described = Labels("Neuronpedia", (), None, None, (FeatureLabel(8, "lists", (), None),))
    with serve(lambda p: f"ANSWER: {'yes' if p == 'Description: lists' else 'no'}") as s:
        labels = judge_features(described, [Category("c", "d")], Judge(s.url, "m"))
        assert labels.members("c") == [8]
        assert labels.features[0].description == "lists"
        judge_features([evidence(8, "a")], None, Judge(s.url, "m"), descriptions=described)
    assert s.prompts[-1].startswith("Description: lists\n\nContexts")


def test_an_answer_that_cannot_be_read_is_no_verdict(caplog: pytest.LogCaptureFixture) -> None:
    def script(prompt: str) -> str:
        return "I would rather not say." if "secret" in prompt else "ANSWER: no"

    material = [evidence(1, "a secret"), evidence(2, "a b")]
    with serve(script) as s:
        labels = judge_features(material, None, Judge(s.url, "m"))
    assert [label.feature for label in labels.features] == [2]
    assert labels.undecided == (1,)
    assert "no labels for 1 of 2 features" in caplog.text


def test_several_samples() -> None:
    answers = iter(["yes", "no", "yes", "no", "no", "no", "yes", "???", "no"])
    material = [evidence(1, "a"), evidence(2, "b"), evidence(3, "c")]
    order = {"<<a>>": 0, "<<b>>": 1, "<<c>>": 2}
    table = list(answers)
    seen = [0, 0, 0]

    def script(prompt: str) -> str:
        row = next(place for word, place in order.items() if word in prompt)
        seen[row] += 1
        return f"ANSWER: {table[3 * row + seen[row] - 1]}\nCONFIDENCE: {10 * seen[row]}"

    with serve(script) as s:
        judge = Judge(s.url, "m", temperature=1.0, max_concurrency=1)
        labels = judge_features(material, [Category("c", "d")], judge, samples=3)
        judgments = collect_judgments(material, [Category("c", "d")], judge, samples=3)
        assert len(s.requests) == 9
    # Two of three; all; and a tie between one yes and one no.
    assert [(f.feature, f.categories, f.quality) for f in labels.features] == [
        (1, ("c",), pytest.approx(2 / 3)),
        (2, (), 1.0),
    ]
    assert labels.undecided == (3,)
    assert judgments[2] == Judgment(3, "c", (True, None, False), pytest.approx(0.2))
    assert judgments[2].verdict is None


def test_categories_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "medicine.md"
    path.write_text("Drugs and doses. Ünits too.", "utf-8")
    assert Category.from_file(path) == Category("medicine", "Drugs and doses. Ünits too.")
    assert Category.from_file(path, "drugs").name == "drugs"
    with pytest.raises(ValueError, match="a name and a definition"):
        Category("x", " ")
    judge = Judge("http://127.0.0.1:9/v1", "m")
    with pytest.raises(ValueError, match="each with a name of its own"):
        judge_features([evidence(1, "a")], [Category("x", "1"), Category("x", "2")], judge)
    with pytest.raises(ValueError, match="each with a name of its own"):
        judge_features([evidence(1, "a")], [], judge)
    with pytest.raises(ValueError, match="at least one feature"):
        judge_features([], None, judge)
    with pytest.raises(ValueError, match="at least one sample"):
        judge_features([evidence(1, "a")], None, judge, samples=0)
    with pytest.raises(ValueError, match="samples that can differ, got 2 at temperature 0"):
        judge_features([evidence(1, "a")], None, judge, samples=2)


def test_descriptions() -> None:
    def script(prompt: str) -> str:
        if "nothing" in prompt:
            return "I cannot tell."
        return "It is on dashes.\n\n**DESCRIPTION:** dashes that begin a list item"

    with serve(script) as s:
        labels = describe_features([evidence(1, "a -"), evidence(2, "nothing")], Judge(s.url, "m"))
    assert labels.features == (FeatureLabel(1, "dashes that begin a list item", (), None),)
    assert labels.undecided == (2,)


def test_answers_without_end_are_read_at_once() -> None:
    """Answers of an endpoint that means no good; a quadratic search would take minutes."""
    begun = time.monotonic()
    for answer in ("\n" * 300_000, "answer " * 100_000, "<think>" * 100_000, "ACTIVE: 1" * 99_999):
        with serve(lambda prompt, answer=answer: answer) as s:
            labels = describe_features([evidence(1, "a b")], Judge(s.url, "m"))
        assert labels.undecided == (1,)
        assert parse_verdict(answer) == (None, None)
        assert parse_active(answer, 4) is None
    assert parse_active(f"ACTIVE: {'9' * 5000}", 4) is None
    assert time.monotonic() - begun < 10


# Quality


def contexts(feature: int, active: str, inactive: str, n: int = 4) -> HeldOutContexts:
    def of(word: str, activation: float) -> tuple[Context, ...]:
        return tuple(
            Context((f"{word}{i}", " end"), (activation, activation / 2)) for i in range(n)
        )

    return HeldOutContexts(feature, of(active, 1.0), of(inactive, 0.0))


def described(**features: str) -> Labels:
    found = tuple(FeatureLabel(int(n[1:]), text, (), None) for n, text in features.items())
    return Labels("d", (), None, None, found)


def quiz_master(prompt: str) -> str:
    """Chooses the texts that have the description's word in them."""
    word = re.search(r"Description: (\w+)", prompt)[1]
    lines = re.findall(r"^(\d+)\. (.*)$", prompt, flags=re.MULTILINE)
    if word == "silence":
        return "hm"
    chosen = [number for number, text in lines if word in text or word == "everything"]
    return f"ACTIVE: {', '.join(chosen) or 'none'}"


def test_detection() -> None:
    held = [
        contexts(1, "dash", "dot"),
        contexts(2, "dash", "dot"),
        contexts(3, "dash", "dot"),
        contexts(4, "dash", "dot"),
        contexts(5, "dash", "dot"),
        contexts(6, "dash", "dot"),
    ]
    words = described(f1="dash", f2="dot", f3="nothing", f4="everything", f5="silence", f9="dash")
    with serve(quiz_master) as s:
        found = measure_detection(words, held, Judge(s.url, "m"), seed=3)
    assert found == (
        Detection(1, 4, 4, 4, 4, 1.0),
        Detection(2, 4, 4, 0, 0, 0.0),
        Detection(3, 4, 4, 0, 4, 0.5),
        Detection(4, 4, 4, 4, 0, 0.5),
        Detection(5, 4, 4, 0, 0, None),
    )
    # Neither marks nor order give it away.
    for prompt in s.prompts:
        assert "<<" not in prompt
    orders = {
        "".join("1" if "dash" in line else "0" for line in re.findall(r"\d\. .*", prompt))
        for prompt in s.prompts
    }
    assert len(orders) > 2
    labels = Labels(
        "x",
        ("c",),
        None,
        None,
        tuple(FeatureLabel(f, None, (), 0.25) for f in (1, 5, 7)),
    )
    assert [f.quality for f in with_quality(labels, found).features] == [1.0, 0.25, 0.25]
    assert with_descriptions(labels, words).features[0].description == "dash"
    assert with_descriptions(labels, words).features[2].description is None


def test_contexts_that_made_the_label_do_not_test_it() -> None:
    held = contexts(1, "dash", "dot", n=3)
    used = FeatureEvidence(1, 0.1, held.active[:2], (), ())
    with serve(quiz_master) as s:
        judge = Judge(s.url, "m")
        [found] = measure_detection(described(f1="dash"), [held], judge, evidence=[used])
        assert (found.n_active, found.n_inactive) == (1, 1)
        assert "dash2" in s.prompts[0]
        assert "dash0" not in s.prompts[0]
        everything = FeatureEvidence(1, 0.1, held.active, (), ())
        with pytest.raises(ValueError, match="at least one feature with a description"):
            measure_detection(described(f1="dash"), [held], judge, evidence=[everything])


def test_agreement_of_several_labelings() -> None:
    first = labeled("a", f1="style", f2="", f3="style;tone", f4="")
    second = labeled("b", f1="style", f2="style", f3="style", f5="")
    third = labeled("c", f1="", f2="", f3="style", f4="", f5="")
    merged = majority_labels([first, second, third])
    assert [(f.feature, f.categories) for f in merged.features] == [
        (1, ("style",)),
        (2, ()),
        (3, ("style",)),
    ]
    # Of two categories each: 2/3 and 1; 2/3 and 1; 1 and 2/3.
    assert [f.quality for f in merged.features] == pytest.approx([5 / 6] * 3)
    assert "a, b, c" in merged.source
    assert majority_labels([first, second]).undecided == (2, 3)
    with pytest.raises(ValueError, match="at least two labelings"):
        majority_labels([first])
    with pytest.raises(ValueError, match="features in common"):
        majority_labels([labeled("a", f1=""), labeled("b", f2="")])


# On the organism, and against a real server


def test_the_whole_way_on_the_organism(tmp_path: Path) -> None:
    """Evidence, a judge's labels, descriptions, held-out detection: with a judge that can read."""
    organism = load()
    config = FSRLConfig(layer=organism.layer, sae=str(organism.sae_path), task_type="CAUSAL_LM")
    model = get_peft_model(organism.load_model(), config)
    session = Session(model, organism.load_tokenizer(), organism.preferences(200))
    truth = {label.index: label for label in organism.feature_labels}
    best = [f for f in organism.features("style") if truth[f].auroc["style"] > 0.9]
    assert len(best) >= 4
    material = collect_evidence(session, best, n_contexts=4)
    held = collect_held_out(session, best, n_contexts=4)
    marks = r"(?<!\S)(-|\*|##|###)(?!\S)"

    def script(prompt: str) -> str:
        lines = re.findall(r"^(\d+)\. (.*)$", prompt, flags=re.MULTILINE)
        marked = [number for number, text in lines if re.search(marks, text)]
        if prompt.startswith("Description"):
            return f"ACTIVE: {', '.join(marked) or 'none'}"
        if len(marked) == len(lines):
            return "DESCRIPTION: markdown\nANSWER: yes\nCONFIDENCE: 90"
        return "DESCRIPTION: something else\nANSWER: no\nCONFIDENCE: 90"

    with serve(script) as s:
        judge = Judge(s.url, "m", cache=tmp_path / "answers.jsonl")
        labels = judge_features(material, [Category("style", "Markdown.")], judge)
        words = describe_features(material, judge)
        found = measure_detection(words, held, judge, evidence=material)
    assert set(labels.members("style")) == set(best)
    assert set(best) <= set(organism_labels(organism).members("style"))
    accuracies = [d.accuracy for d in found]
    assert len(accuracies) >= 3
    # Half of all texts are plain, so "markdown" must tell more than chance where it describes.
    assert sum(accuracies) / len(accuracies) > 0.6
    rated = with_quality(with_descriptions(labels, words), found)
    assert all(f.description == "markdown" for f in rated.features)
    assert any(f.quality is not None for f in rated.features)


@pytest.fixture
def transformers_server(tmp_path: Path) -> Iterator[str]:
    model = tiny_model()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    level = logging.get_verbosity()
    with warnings.catch_warnings(action="ignore"):
        server = Serve(str(tmp_path), host="127.0.0.1", port=port, device="cpu", non_blocking=True)
    try:
        deadline = time.monotonic() + 60
        while not server.server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill_server()
        logging.set_verbosity(level)


def test_against_transformers_serve(transformers_server: str, tmp_path: Path) -> None:
    """A real server and a model that babbles: answers, their cost, and no verdict made up."""
    cache = tmp_path / "answers.jsonl"
    judge = Judge(
        transformers_server,
        str(tmp_path),
        cache=cache,
        options={"max_tokens": 6},
        max_concurrency=2,
    )
    prompts = [[{"role": "user", "content": f"w5 w{i}"}] for i in (7, 8, 9)]
    answers = judge.ask(prompts)
    assert all(re.fullmatch(r"(w\d+ ?)+|", answer.strip()) for answer in answers)
    spend = judge.spend
    assert (spend.answered, spend.requests, spend.retried, spend.failed) == (3, 3, 0, 0)
    assert spend.unmetered == 0
    assert spend.prompt_tokens >= 3 * 2
    assert 0 < spend.completion_tokens <= 3 * 6
    labels = judge_features([evidence(1, "w5 w6")], [Category("c", "w7")], judge)
    assert (labels.features, labels.undecided) == ((), (1,))
    # A new object asks nobody.
    again = Judge("http://127.0.0.1:9/v1", str(tmp_path), cache=cache, options={"max_tokens": 6})
    assert again.ask(prompts) == answers
    keys = [json.loads(line)["key"] for line in cache.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 4
