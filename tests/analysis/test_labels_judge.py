"""The judge: answers in order, never asked twice, never lost, and counted to the last request."""

from __future__ import annotations

import asyncio
import errno
import gzip
import itertools
import json
import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
import tracemalloc
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pytest

from judge_server import Reply, completion, serve
from peft_fsrl.analysis.labels import Judge, JudgeError, Spend
from peft_fsrl.analysis.labels import judge as judging


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
    assert {headers["authorization"] for headers in s.headers} == {"Bearer secret"}
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


NO_TEXT = [
    {"content": ["a"]},
    {"content": 7},
    {"content": {"text": "a"}},
    "a",
    None,
]


@pytest.mark.parametrize("message", NO_TEXT, ids=str)
def test_answers_that_are_no_text(message: Any) -> None:
    raw = json.dumps({"choices": [{"message": message}]})
    error = pytest.raises(JudgeError, match="Expected a chat completion with a text")
    with serve(lambda prompt: Reply(raw=raw)) as s, error:
        Judge(s.url, "m").ask(ask("a"))


@pytest.mark.parametrize(
    "raw", ["[" * 100_000, '{"choices": {"0": 1}}', '{"choices": "ab"}', "null", "[1]", '"text"']
)
def test_bodies_of_any_shape(raw: str) -> None:
    with serve(lambda prompt: Reply(raw=raw)) as s, pytest.raises(JudgeError):
        Judge(s.url, "m").ask(ask("a"))


@pytest.mark.parametrize("usage", [[1], "many", {"prompt_tokens": "3", "completion_tokens": -2}])
def test_a_report_of_the_cost_that_makes_no_sense(usage: Any) -> None:
    body = {"choices": [{"message": {"content": "fine"}}], "usage": usage}
    with serve(lambda prompt: Reply(raw=json.dumps(body))) as s:
        judge = Judge(s.url, "m")
        assert judge.ask(ask("a")) == ["fine"]
    assert (judge.spend.prompt_tokens, judge.spend.completion_tokens) == (0, 0)


def test_an_answer_that_dribbles_is_too_slow() -> None:
    with serve(lambda prompt: Reply("x" * 400, dribble=0.05)) as s:
        judge = Judge(s.url, "m", retries=1, timeout=0.3)
        begun = time.monotonic()
        with pytest.raises(JudgeError, match=r"no whole answer in 0\.3 s"):
            judge.ask(ask("a"))
    # Two attempts and a pause; sent to the end, one alone would take half a minute.
    assert time.monotonic() - begun < 5
    assert (judge.spend.requests, judge.spend.retried) == (2, 1)


def test_an_answer_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "_LARGEST", 2_000)
    with serve(lambda prompt: "x" * (500 if prompt == "small" else 2_000)) as s:
        judge = Judge(s.url, "m")
        assert judge.ask(ask("small")) == ["x" * 500]
        with pytest.raises(JudgeError, match="more than 2,000 bytes"):
            judge.ask(ask("large"))
    assert len(s.requests) == 2


def test_an_answer_that_unpacks_to_much_more() -> None:
    bomb = gzip.compress(json.dumps(completion("x" * 50_000_000, "a")).encode(), 1)
    headers = {"content-encoding": "gzip"}
    with serve(lambda prompt: Reply(raw=bomb, headers=headers)) as s:
        tracemalloc.start()
        with pytest.raises(JudgeError, match="compressed its answer"):
            Judge(s.url, "m").ask(ask("a"))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert s.headers[0]["accept-encoding"] == "identity"
    assert peak < 10_000_000


def test_redirections_are_not_followed() -> None:
    with serve(echo) as other:
        there = {"location": f"{other.url}/chat/completions"}
        error = pytest.raises(JudgeError, match="307")
        with serve(lambda prompt: Reply(status=307, headers=there)) as s, error:
            Judge(s.url, "m", api_key="top-secret").ask(ask("a"))
    assert other.requests == []


def test_keys_are_never_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither one in the address, wherever it stands, nor one that the endpoint repeats."""
    keys = ["sk-0123456789", "us er/pass", "query+key", "path0123456789abcdefgh"]
    seen: list[str] = []

    def script(prompt: str) -> Reply | str:
        says = f"no such key: {' '.join(keys)} \x1b[31m"
        if prompt == "answer":
            return says
        raw = json.dumps({"error": {"message": says}})
        return Reply(raw=raw, status=400 if prompt == "refuse" else 401)

    with serve(script) as s:
        address = s.url.replace("http://", "http://me:us%20er%2Fpass@")
        address += "/path0123456789abcdefgh?key=query%2Bkey"
        judge = Judge(address, "m", api_key=keys[0], cache=tmp_path / "a.jsonl")
        seen += [repr(judge), *judge.ask(ask("answer", "refuse"))]
        with pytest.raises(JudgeError) as error:
            judge.ask(ask("fail"))
        seen += ["".join(traceback.format_exception(error.value)), caplog.text]
        seen.append((tmp_path / "a.jsonl").read_text())
    for text in seen:
        assert not any(key in text for key in keys)
        assert not any(quote_plus(key) in text for key in keys[1:])
    assert "no such key: *** *** *** ***" in seen[1]
    assert "no such key: ***" in caplog.text
    assert "\x1b" not in str(error.value)


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
        assert "skipped 1 incomplete line(s)" in caplog.text
        assert judge.ask(ask("a", "b")) == [echo("a"), echo("b")]
        assert s.prompts == ["a", "b", "b"]
        # What was appended after the half line can be read.
        assert Judge(s.url, "m", cache=cache).ask(ask("a", "b", "b")) == [
            echo("a"),
            echo("b"),
            echo("b"),
        ]
        assert len(s.prompts) == 3


@pytest.mark.parametrize("n", [1, 8, 9, 30, 90])
def test_half_a_first_line(tmp_path: Path, n: int) -> None:
    cache = tmp_path / "answers.jsonl"
    with serve(echo) as s:
        Judge(s.url, "m", cache=cache).ask(ask("a"))
        cache.write_bytes(cache.read_bytes()[:n])
        assert Judge(s.url, "m", cache=cache).ask(ask("a")) == [echo("a")]
        assert Judge(s.url, "m", cache=cache).ask(ask("a")) == [echo("a")]
    assert len(s.requests) == 2


class Disk:
    """A disk with room for so many bytes, under the judge alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: float) -> None:
        self.room = room
        self.refusals = 0
        monkeypatch.setattr(judging, "open", self.open, raising=False)
        monkeypatch.setattr(judging, "_PAUSES", (0.01, 0.01))

    def open(self, *arguments: Any, **options: Any) -> Any:
        file, disk = open(*arguments, **options), self  # noqa: SIM115

        class Full:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: Any) -> None:
                file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def write(self, line: bytes) -> int:
                if not disk.room:
                    disk.refusals += 1
                    raise OSError(errno.ENOSPC, "No space left on device")
                taken = int(min(disk.room, len(line)))
                disk.room -= taken
                return file.write(line[:taken])

        return Full()


def test_a_full_disk_loses_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "answers.jsonl"
    disk = Disk(monkeypatch, room=150)
    texts = list("abcdef")
    with serve(echo) as s:
        judge = Judge(s.url, "m", cache=cache, max_concurrency=2)
        message = r"No space left.* answers could not be written to .*call it again"
        with pytest.raises(JudgeError, match=message):
            judge.ask(ask(*texts))
        n = len(s.requests)
        assert n < len(texts), "nothing is asked that cannot be kept"
        with pytest.raises(JudgeError, match="No space left"):
            judge.ask(ask(*texts))
        assert len(s.requests) == n
        disk.room = math.inf
        assert judge.ask(ask(*texts)) == [echo(text) for text in texts]
        assert len(s.requests) == len(texts)
        # What another process reads: everything, and the half line is in nobody's way.
        assert Judge(s.url, "m", cache=cache).ask(ask(*texts)) == [echo(text) for text in texts]
        assert len(s.requests) == len(texts)


def test_a_disk_that_is_full_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "answers.jsonl"
    disk = Disk(monkeypatch, room=150)

    def free() -> None:
        while not disk.refusals:
            time.sleep(0.001)
        disk.room = math.inf

    thread = threading.Thread(target=free)
    thread.start()
    with serve(echo) as s:
        Judge(s.url, "m", cache=cache).ask(ask(*"abcdef"))
        thread.join()
        assert Judge(s.url, "m", cache=cache).ask(ask(*"abcdef")) == [echo(t) for t in "abcdef"]
    assert len(s.requests) == 6


def test_half_a_line_of_another_process(tmp_path: Path) -> None:
    cache = tmp_path / "answers.jsonl"
    with serve(echo) as s:
        judge = Judge(s.url, "m", cache=cache)
        judge.ask(ask("a"))
        with cache.open("ab") as file:
            file.write(b'{"key": "cut off')
        judge.ask(ask("b"))
        Judge(s.url, "m", cache=cache).ask(ask("a", "b"))
    assert len(s.requests) == 2


@pytest.mark.parametrize("content", ["feature,category\n1,style\n", "[1, 2]", "\x00\x01"])
def test_a_cache_that_is_something_else(tmp_path: Path, content: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"Expected a judge's answers in .*labels\.csv"):
        Judge("http://x/v1", "m", cache=path)
    assert path.read_text() == content


def work(url: str, cache: Path, texts: list[str]) -> None:
    # A shell that starts a job in the background makes it ignore the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        Judge(url, "m", cache=cache, max_concurrency=4).ask(ask(*texts))
    except KeyboardInterrupt:
        os._exit(42)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_a_killed_process_loses_nothing(how: signal.Signals, tmp_path: Path) -> None:
    cache = tmp_path / "answers.jsonl"
    texts = [str(i) for i in range(80)]
    with serve(lambda prompt: Reply(echo(prompt), wait=lambda: time.sleep(0.01))) as s:
        # A process of its own that need not import everything again.
        worker = multiprocessing.get_context("fork").Process(
            target=work, args=(s.url, cache, texts)
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This process.*is multi-threaded")
            worker.start()
        deadline = time.monotonic() + 60
        while len(s.requests) < 30 and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(worker.pid, how)
        worker.join(60)
        assert worker.exitcode == {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 42}[how]
        before = len(s.requests)
        kept = cache.read_bytes().count(b"}\n")
        # All but what was under way.
        assert 30 - 4 <= kept < 80
        resumed = Judge(s.url, "m", cache=cache)
        assert resumed.ask(ask(*texts)) == [echo(text) for text in texts]
        assert resumed.spend.cached == kept
        assert len(s.requests) - before == 80 - kept
