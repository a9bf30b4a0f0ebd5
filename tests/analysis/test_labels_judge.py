"""The judge: answers in order, never asked twice, never lost, and counted to the last request."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from judge_server import Reply, serve
from peft_fsrl.analysis.labels import Judge, JudgeError
from peft_fsrl.analysis.records import Spend


def ask(*texts: str) -> list[list[dict[str, str]]]:
    """One prompt of one message per text."""
    return [[{"role": "user", "content": text}] for text in texts]


def echo(prompt: str) -> str:
    return f"you said {prompt}"


def test_answers_in_order_and_spend() -> None:
    with serve(
        lambda prompt: Reply(echo(prompt), wait=lambda: time.sleep(0.02 / len(prompt)))
    ) as s:
        judge = Judge(s.url, "m", api_key="secret", options={"max_tokens": 7})
        texts = ["a", "b b", "c c c", "a"]
        assert judge.ask(ask(*texts)) == [echo(text) for text in texts]
    # The repeated prompt was sent once.
    assert sorted(s.prompts) == ["a", "b b", "c c c"]
    assert judge.spend == Spend(
        prompts=3,
        cached=0,
        answered=3,
        refused=0,
        failed=0,
        requests=3,
        retried=0,
        prompt_tokens=1 + 2 + 3,
        completion_tokens=3 + 4 + 5,
        unmetered=0,
    )
    assert all(r["max_tokens"] == 7 and r["temperature"] == 0.0 for r in s.requests)
    assert set(s.keys) == {"Bearer secret"}
    assert "secret" not in repr(judge)


def test_concurrency_is_bounded_and_used() -> None:
    with serve(lambda prompt: Reply("x", wait=lambda: time.sleep(0.05))) as s:
        Judge(s.url, "m", max_concurrency=3).ask(ask(*map(str, range(12))))
    assert s.most == 3


def test_cache_outlives_the_object_and_knows_what_was_asked(tmp_path: Path) -> None:
    cache = tmp_path / "new" / "answers.jsonl"
    with serve(echo) as s:
        Judge(s.url, "m", cache=cache).ask(ask("a", "b"))
    with serve(lambda prompt: "other") as s:
        again = Judge(s.url, "m", cache=cache)
        assert again.ask(ask("a", "c", "b")) == [echo("a"), "other", echo("b")]
        assert (again.spend.cached, again.spend.answered) == (2, 1)
        # Anything that decides an answer makes another question of it.
        assert Judge(s.url, "m2", cache=cache).ask(ask("a")) == ["other"]
        assert Judge(s.url, "m", cache=cache, temperature=1.0).ask(ask("a")) == ["other"]
        assert Judge(s.url, "m", cache=cache, options={"seed": 1}).ask(ask("a")) == ["other"]
        assert again.ask(ask("a"), sample=1) == ["other"]
        assert len(s.prompts) == 5
        assert "sample" not in s.requests[-1]
    assert all(
        set(json.loads(line)) == {"key", "answer"} for line in cache.read_text().splitlines()
    )


@pytest.mark.parametrize(
    "bad", [Reply(status=500), Reply(status=429), Reply(drop=True)], ids=["500", "429", "dropped"]
)
def test_passing_troubles_are_retried_and_counted(bad: Reply) -> None:
    visits = itertools.count()

    def script(prompt: str) -> Reply | str:
        return bad if next(visits) < 2 else echo(prompt)

    with serve(script) as s:
        judge = Judge(s.url, "m", retries=2)
        assert judge.ask(ask("a")) == [echo("a")]
    assert len(s.requests) == 3
    assert (judge.spend.requests, judge.spend.retried, judge.spend.failed) == (3, 2, 0)


def test_endpoint_that_fails_half_way(tmp_path: Path) -> None:
    cache = tmp_path / "answers.jsonl"
    texts = [f"{i}" for i in range(10)]
    with serve(lambda prompt: Reply(status=503) if int(prompt) >= 4 else echo(prompt)) as s:
        judge = Judge(s.url, "m", cache=cache, retries=1, max_concurrency=1)
        with pytest.raises(JudgeError, match=r"stopped after 4 of 10 .*503.*answers\.jsonl") as e:
            judge.ask(ask(*texts))
        # Nothing is sent after the failure: 4 answers, one prompt tried twice.
        assert len(s.requests) == 6
    assert (e.value.done, e.value.total) == (4, 10)
    assert (judge.spend.answered, judge.spend.failed, judge.spend.retried) == (4, 1, 1)
    with serve(echo) as s:
        resumed = Judge(s.url, "m", cache=cache)
        assert resumed.ask(ask(*texts)) == [echo(text) for text in texts]
        assert sorted(s.prompts) == texts[4:]


def test_without_a_file_the_object_remembers() -> None:
    healthy = threading.Event()

    def script(prompt: str) -> Reply | str:
        return echo(prompt) if prompt == "a" or healthy.is_set() else Reply(status=401)

    with serve(script) as s:
        judge = Judge(s.url, "m", max_concurrency=1)
        with pytest.raises(JudgeError, match=r"stopped after 1 of 2.*This object remembers"):
            judge.ask(ask("a", "b"))
        # A wrong key is not tried again.
        assert judge.spend.retried == 0
        healthy.set()
        assert judge.ask(ask("a", "b")) == [echo("a"), echo("b")]
        assert s.prompts == ["a", "b", "b"]


def test_what_was_under_way_is_waited_for_and_kept() -> None:
    failed = threading.Event()

    def script(prompt: str) -> Reply:
        if prompt == "bad":
            failed.set()
            return Reply(status=404)
        return Reply(echo(prompt), wait=lambda: (failed.wait(5), time.sleep(0.1)))

    with serve(script) as s:
        judge = Judge(s.url, "m", max_concurrency=2)
        with pytest.raises(JudgeError, match="after 1 of 3"):
            judge.ask(ask("slow", "bad", "never"))
        assert sorted(s.prompts) == ["bad", "slow"]
    assert judge.spend.answered == 1


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(raw="{not json"), "not JSON"),
        (Reply(raw="<html>hello</html>", content_type="text/html"), "Expected a chat completion"),
        (Reply(raw='{"object": "list"}'), "Expected a chat completion"),
        (Reply(raw='{"choices": []}'), "Expected a chat completion"),
    ],
)
def test_an_endpoint_of_another_kind(reply: Reply, message: str) -> None:
    with serve(lambda prompt: reply) as s, pytest.raises(JudgeError, match=message):
        Judge(s.url, "m").ask(ask("a"))


def test_nobody_there_and_too_slow() -> None:
    with serve(echo) as s:
        pass
    with pytest.raises(JudgeError, match=r"after 0 of 1 prompts.*Connection"):
        Judge(s.url, "m", retries=0).ask(ask("a"))
    release = threading.Event()
    with serve(lambda prompt: Reply("late", wait=lambda: release.wait(5))) as s:
        judge = Judge(s.url, "m", retries=0, timeout=0.2)
        with pytest.raises(JudgeError, match="Timeout"):
            judge.ask(ask("a"))
        release.set()


def test_one_refused_prompt_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    with serve(lambda p: Reply(status=400) if p == "long" else echo(p)) as s:
        judge = Judge(s.url, "m", max_concurrency=1)
        assert judge.ask(ask("long", "a", "b")) == ["", echo("a"), echo("b")]
        assert "refused 1 of 3 prompts" in caplog.text
        assert (judge.spend.refused, judge.spend.answered, judge.spend.retried) == (1, 2, 0)
        judge.ask(ask("long", "a"))
        assert s.prompts == ["long", "a", "b", "long"]


def test_an_endpoint_that_refuses_everything_is_left_alone() -> None:
    with serve(lambda prompt: Reply(status=422)) as s:
        with pytest.raises(JudgeError, match=r"refused every prompt.*scripted 422.*options"):
            Judge(s.url, "m", max_concurrency=2).ask(ask(*map(str, range(50))))
        assert len(s.requests) <= 8 + 1


def test_silent_and_unmetered_answers() -> None:
    with serve(lambda prompt: Reply(None, usage=False)) as s:
        judge = Judge(s.url, "m")
        assert judge.ask(ask("a")) == [""]
    assert (judge.spend.unmetered, judge.spend.prompt_tokens) == (1, 0)


def test_inside_a_running_event_loop() -> None:
    async def main() -> list[str]:
        return Judge(s.url, "m").ask(ask("a", "b"))

    with serve(echo) as s:
        assert asyncio.run(main()) == [echo("a"), echo("b")]


def test_nothing_to_ask() -> None:
    assert Judge("http://127.0.0.1:9/v1", "m").ask([]) == []


@pytest.mark.parametrize(
    "settings", [{"max_concurrency": 0}, {"retries": -1}, {"timeout": 0}], ids=str
)
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Expected max_concurrency of 1 or more"):
        Judge("http://x/v1", "m", **settings)


def test_half_a_line_at_the_end_of_the_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "answers.jsonl"
    with serve(echo) as s:
        Judge(s.url, "m", cache=cache, max_concurrency=1).ask(ask("a", "b"))
        whole = cache.read_bytes()
        cache.write_bytes(whole[:-9])
        judge = Judge(s.url, "m", cache=cache)
        assert "1 incomplete line(s) left out" in caplog.text
        assert judge.ask(ask("a", "b")) == [echo("a"), echo("b")]
        assert s.prompts == ["a", "b", "b"]
        # What was appended after the half line can be read.
        assert Judge(s.url, "m", cache=cache).ask(ask("a", "b", "b")) == [
            echo("a"),
            echo("b"),
            echo("b"),
        ]
        assert len(s.prompts) == 3


@pytest.mark.parametrize("content", ["feature,category\n1,style\n", "[1, 2]", "\x00\x01"])
def test_a_cache_that_is_something_else(tmp_path: Path, content: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"Expected a judge's answers in .*labels\.csv"):
        Judge("http://x/v1", "m", cache=path)
    assert path.read_text() == content


WORKER = """
import sys
from peft_fsrl.analysis.labels import Judge
prompts = [[{"role": "user", "content": str(i)}] for i in range(200)]
Judge(sys.argv[1], "m", cache=sys.argv[2], max_concurrency=4).ask(prompts)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_a_killed_process_loses_nothing(how: signal.Signals, tmp_path: Path) -> None:
    cache = tmp_path / "answers.jsonl"
    with serve(lambda prompt: Reply(echo(prompt), wait=lambda: time.sleep(0.02))) as s:
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, s.url, str(cache)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        deadline = time.monotonic() + 200
        while len(s.requests) < 60 and time.monotonic() < deadline:
            time.sleep(0.005)
        worker.send_signal(how)
        _, stderr = worker.communicate(timeout=60)
        assert worker.returncode != 0
        if how == signal.SIGINT:
            assert stderr.splitlines()[-1].startswith("KeyboardInterrupt")
        before = len(s.requests)
        kept = cache.read_bytes().count(b"}\n")
        # All but what was under way.
        assert 60 - 4 <= kept < 200
        resumed = Judge(s.url, "m", cache=cache)
        texts = [str(i) for i in range(200)]
        assert resumed.ask(ask(*texts)) == [echo(text) for text in texts]
        assert resumed.spend.cached == kept
        assert len(s.requests) - before == 200 - kept
