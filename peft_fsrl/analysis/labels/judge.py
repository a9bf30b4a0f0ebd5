"""``Judge``: a language model at any OpenAI-compatible endpoint, and what asking it costs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_plus, urlsplit

from tqdm.auto import tqdm

from ...extras import install_command
from ...records import Record
from .source import printable

if TYPE_CHECKING:
    from openai import AsyncOpenAI

logger = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, str]]

# Statuses that speak of one prompt: too long, against a policy, not understood.
_REFUSALS = frozenset({400, 413, 422})
# Where so many are refused and none is answered, the prompts are not to blame.
_HOPELESS = 8
# Bytes of an answer: a few times what the longest has with the log probabilities of its tokens.
_LARGEST = 2**24
# Shorter ones are words that stand for no key, such as "none" and "EMPTY".
_SHORTEST_SECRET = 6
# Longer parts of an address's path are taken for keys.
_LONGEST_PLACE = 20
# Seconds to wait for a disk that takes no answer.
_PAUSES = (0.1, 1.0, 4.0)
# How every line of a cache begins; a killed process may leave any part of one.
_LINE = b'{"key": "'
_sent: ContextVar[list[int]] = ContextVar("sent")


class JudgeError(ConnectionError):
    """An endpoint that stopped answering; its earlier answers are kept.

    Attributes:
        done: prompts of the call that have an answer now.
        total: prompts of the call.
    """

    def __init__(self, message: str, done: int, total: int) -> None:
        super().__init__(message)
        self.done = done
        self.total = total


@dataclass(frozen=True)
class Spend(Record):
    """What a judge has cost so far.

    Attributes:
        prompts: that it was given, repeated ones counted once per call of ``ask``.
        cached: answered from the cache.
        answered: answered by the endpoint.
        refused: that the endpoint would not take, such as one that is too long.
        failed: given up.
        requests: sent to the endpoint, repetitions included.
        retried: of them, repetitions.
        prompt_tokens: as the endpoint reports them.
        completion_tokens: the same.
        unmetered: answers without such a report.
    """

    prompts: int
    cached: int
    answered: int
    refused: int
    failed: int
    requests: int
    retried: int
    prompt_tokens: int
    completion_tokens: int
    unmetered: int


class Judge:
    """Asks a model, several prompts at a time, and remembers every answer.

    Answers are kept by model, prompt and settings, not by address: the same model served elsewhere
    is not asked again. Keys, in the address or not, appear in no message and in no answer.

    Args:
        base_url: of the endpoint, for example ``"http://localhost:8000/v1"``; redirections are not
            followed.
        model: its name there.
        api_key: None takes the environment variable ``OPENAI_API_KEY``, if it is set.
        max_concurrency: requests under way at once.
        retries: of a request that failed for a reason that may pass, with the growing pauses, or
            those that the endpoint asks for, of the ``openai`` library.
        timeout: seconds after which a request has failed that is not answered to the end.
        cache: file of answers, made or continued; None remembers them as long as this object lives.
        temperature: of sampling; None leaves it to the endpoint.
        options: further arguments of the library's ``chat.completions.create``, such as
            ``{"max_tokens": 200}``.
        progress: show a progress bar.

    Raises:
        ImportError: without the extra ``judge``.
        ValueError: for a setting out of range, or a cache file that holds something else.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        max_concurrency: int = 8,
        retries: int = 4,
        timeout: float = 120.0,
        cache: str | os.PathLike[str] | None = None,
        temperature: float | None = 0.0,
        options: Mapping[str, Any] | None = None,
        progress: bool = False,
    ) -> None:
        _require_openai()
        if max_concurrency < 1 or retries < 0 or timeout <= 0:
            raise ValueError(
                "Expected max_concurrency of 1 or more, retries of 0 or more and a timeout above "
                f"0, got {max_concurrency}, {retries} and {timeout}."
            )
        self.base_url = base_url
        self.model = model
        # The library insists on a key; local servers do not look at it.
        self._api_key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self._secrets = _secrets(base_url, self._api_key)
        self._max_concurrency = max_concurrency
        self._retries = retries
        self._timeout = timeout
        self._settings = dict(options or {})
        if temperature is not None:
            self._settings["temperature"] = temperature
        self._cache = _AnswerCache(cache)
        self._progress = progress
        self._counts = dict.fromkeys(Spend.__dataclass_fields__, 0)

    def __repr__(self) -> str:
        url = urlsplit(self.base_url)
        place = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"
        return self._redact(f"Judge({place!r}, {self.model!r})")

    @property
    def repeats_itself(self) -> bool:
        """Whether the same prompt is to get the same answer: it was asked for no randomness."""
        return self._settings.get("temperature") == 0

    @property
    def spend(self) -> Spend:
        """What all calls together have cost since this object was made."""
        return Spend(**self._counts)

    def ask(self, prompts: Sequence[Messages], *, sample: int = 0) -> list[str]:
        """One answer per prompt, in order.

        Works where an event loop runs already, as in a notebook. What the cache has is not asked
        again, equal prompts are asked once, and every answer is kept as it comes in: after an
        interruption of any kind, the same call asks for the rest alone.

        Args:
            prompts: chats, each a list of messages with ``role`` and ``content``.
            sample: number of the answer, where a prompt is to be answered more than once.

        Returns:
            The texts. Empty for a prompt that the endpoint refused (HTTP status 400, 413 or 422),
            which is logged, counted in ``spend`` and asked again the next time.

        Raises:
            JudgeError: if the endpoint fails, or an answer cannot be written to the cache. No more
                prompts are sent then; those under way are waited for.
        """
        from anyio.from_thread import start_blocking_portal

        batch = _Batch(self, prompts, sample)
        if batch.waiting:
            # A loop of its own in a thread of its own, so that a running one is in nobody's way.
            with start_blocking_portal() as portal:
                portal.call(batch.run)
        return batch.answers()

    def _redact(self, text: str) -> str:
        return self._secrets.sub("***", text)

    def _count(self, **amounts: int) -> None:
        for name, amount in amounts.items():
            self._counts[name] += amount


class _Batch:
    """One call of ``ask``."""

    def __init__(self, judge: Judge, prompts: Sequence[Messages], sample: int) -> None:
        self._judge = judge
        self._cache = judge._cache
        settings = {"model": judge.model, "sample": sample, **judge._settings}
        requests = [{**settings, "messages": [dict(m) for m in prompt]} for prompt in prompts]
        self._keys = [_hash(request) for request in requests]
        self._requests = dict(zip(self._keys, requests, strict=True))
        self._answered = 0
        self._refusals: list[str] = []
        self._failure: str | None = None
        try:
            # What a full disk did not take the last time.
            self._cache.write()
        except OSError as error:
            self._failure = self._describe(error)
        missing = [key for key in self._requests if key not in self._cache.answers]
        self.waiting = missing if self._failure is None else []
        judge._count(prompts=len(self._requests), cached=len(self._requests) - len(missing))

    def answers(self) -> list[str]:
        """What there is, in the order of the prompts.

        Raises:
            JudgeError: if the endpoint failed, or took no prompt at all.
        """
        known = self._cache.answers
        done, total = sum(key in known for key in self._keys), len(self._keys)
        if self._failure is not None:
            # The exception itself may quote a key: what is safe of it stands in the message.
            message = f"stopped after {done} of {total} prompts: {self._failure} {self._resume()}"
            raise JudgeError(f"{self._judge!r} {message}", done, total)
        if self._refusals and not done:
            raise JudgeError(
                f"{self._judge!r} refused every prompt, the first with: {self._refusals[0]} Look "
                "at `model`, `temperature` and `options`.",
                done,
                total,
            )
        if self._refusals:
            logger.warning(
                "%r refused %d of %d prompts, which have no answer; the first with: %s",
                self._judge,
                len(self._refusals),
                total,
                self._refusals[0],
            )
        return [known.get(key, "") for key in self._keys]

    async def run(self) -> None:
        """Ask for what is missing."""
        import anyio

        keys = iter(self.waiting)
        progress = tqdm(
            total=len(self._requests),
            initial=len(self._requests) - len(self.waiting),
            desc=self._judge.model,
            unit="prompt",
            disable=not self._judge._progress,
            leave=False,
        )

        async def work(client: AsyncOpenAI) -> None:
            for key in keys:
                await self._ask(client, key)
                progress.update()
                hopeless = not self._answered and len(self._refusals) >= _HOPELESS
                if self._failure is not None or hopeless:
                    return

        with progress:
            async with _client(self._judge) as client, anyio.create_task_group() as group:
                for _ in range(min(self._judge._max_concurrency, len(self.waiting))):
                    group.start_soon(work, client)

    async def _ask(self, client: AsyncOpenAI, key: str) -> None:
        sent = [0]
        _sent.set(sent)
        arguments = {name: v for name, v in self._requests[key].items() if name != "sample"}
        try:
            await self._keep(key, await client.chat.completions.create(**arguments))
        # An endpoint may send anything at all, which its library and ours stumble over anywhere.
        except Exception as error:
            if getattr(error, "status_code", None) in _REFUSALS:
                self._refusals.append(self._describe(error))
                self._judge._count(refused=1)
            else:
                self._failure = self._failure or self._describe(error)
                self._judge._count(failed=1)
        finally:
            self._judge._count(requests=sent[0], retried=max(0, sent[0] - 1))

    async def _keep(self, key: str, completion: Any) -> None:
        import anyio

        answer = self._judge._redact(_text(completion))
        usage = getattr(completion, "usage", None)
        tokens = [getattr(usage, f"{kind}_tokens", None) for kind in ("prompt", "completion")]
        n_prompt, n_completion = (n if isinstance(n, int) and n > 0 else 0 for n in tokens)
        self._judge._count(
            answered=1,
            prompt_tokens=n_prompt,
            completion_tokens=n_completion,
            unmetered=int(usage is None),
        )
        self._answered += 1
        self._cache.add(key, answer)
        for pause in (*_PAUSES, None):
            try:
                self._cache.write()
                return
            except OSError:
                if pause is None:
                    raise
                await anyio.sleep(pause)

    def _describe(self, error: Exception) -> str:
        if isinstance(error, json.JSONDecodeError):
            return f"it sent what is not JSON ({error})."
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        text = f"{type(error).__name__}: {str(error).rstrip('.')}{cause}."
        # Keys first: half of one that was cut would not be found.
        return printable(self._judge._redact(text))

    def _resume(self) -> str:
        path, n_unwritten = self._cache.path, self._cache.n_unwritten
        if path is None:
            return (
                "This object remembers the answers: call it again for the rest. With `cache` they "
                "would also outlive it."
            )
        if n_unwritten:
            return (
                f"{n_unwritten} answers could not be written to {path}, and only this object has "
                "them: make room and call it again before it goes."
            )
        return f"The answers are in {path}: the same call asks for the rest alone."


class _AnswerCache:
    """Answers by the hash of what was asked, in memory and in a file.

    Each answer is one line of JSON, appended at once and never changed: a killed process loses at
    most the line that it was writing, which the next reader leaves out, and several processes may
    share a file. What cannot be written is kept for the next attempt.

    Attributes:
        path: the file; None keeps answers in memory alone.
        answers: all that is known.

    Raises:
        ValueError: for a file that holds something else.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path).expanduser()
        self.answers: dict[str, str] = {}
        self._unwritten: list[bytes] = []
        if self.path is not None and self.path.exists():
            self._read(self.path)

    @property
    def n_unwritten(self) -> int:
        """Answers that are in memory alone although there is a file."""
        return len(self._unwritten)

    def add(self, key: str, answer: str) -> None:
        """Keep an answer in memory, to be written."""
        self.answers[key] = answer
        if self.path is not None:
            self._unwritten.append(json.dumps({"key": key, "answer": answer}).encode() + b"\n")

    def write(self) -> None:
        """Append what is not in the file yet.

        Raises:
            OSError: if the disk does not take it; the next call tries again.
        """
        while self.path is not None and self._unwritten:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b", buffering=0) as file:
                # Half a line, ours or another process's, must not swallow the next.
                end = file.seek(0, os.SEEK_END)
                file.seek(max(0, end - 1))
                line = self._unwritten[0]
                if file.read(1) not in (b"", b"\n"):
                    line = b"\n" + line
                written = file.write(line)
                if written != len(line):
                    raise OSError(f"the disk took {written} of {len(line)} bytes")
            del self._unwritten[0]

    def _read(self, path: Path) -> None:
        damaged, foreign = 0, False
        for line in path.read_bytes().split(b"\n"):
            entry = _parse(line)
            if entry is not None:
                self.answers[entry[0]] = entry[1]
            elif line.strip():
                damaged += 1
                foreign |= not (line.startswith(_LINE) or _LINE.startswith(line))
        if foreign and not self.answers:
            raise ValueError(
                f"Expected a judge's answers in {path}, one JSON object with 'key' and 'answer' "
                "per line, found no such line. Name another file, or a new one."
            )
        if damaged:
            logger.warning(
                "%s: skipped %d incomplete line(s), as a killed process leaves them; %d answers "
                "are usable.",
                path,
                damaged,
                len(self.answers),
            )


def _parse(line: bytes) -> tuple[str, str] | None:
    try:
        entry = json.loads(line)
        key, answer = entry["key"], entry["answer"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (key, answer) if isinstance(key, str) and isinstance(answer, str) else None


def _hash(request: Mapping[str, Any]) -> str:
    """SHA-256 of everything that decides an answer."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _client(judge: Judge) -> AsyncOpenAI:
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError

    class BoundedClient(DefaultAsyncHttpxClient):
        """Bounds the time and the size of a whole answer; the library bounds neither."""

        async def send(self, request: Any, **settings: Any) -> Any:
            import anyio

            _sent.get()[0] += 1
            # The library retries what its HTTP library raises: httpx, or httpx2.
            http = sys.modules[type(request).__module__.partition(".")[0]]
            body = bytearray()
            try:
                with anyio.fail_after(judge._timeout):
                    response = await super().send(request, **{**settings, "stream": True})
                    try:
                        async for piece in response.aiter_raw():
                            body += piece
                            if len(body) > _LARGEST:
                                raise OpenAIError(f"it sent more than {_LARGEST:,} bytes")
                    finally:
                        await response.aclose()
            except TimeoutError as error:
                raise http.ReadTimeout(
                    f"no whole answer in {judge._timeout:g} s", request=request
                ) from error
            if response.headers.get("content-encoding", "identity") != "identity":
                raise OpenAIError("it compressed its answer, although asked not to")
            return http.Response(
                response.status_code, headers=response.headers, content=bytes(body), request=request
            )

    return AsyncOpenAI(
        base_url=judge.base_url,
        api_key=judge._api_key,
        max_retries=judge._retries,
        # Packed answers may unpack to anything.
        default_headers={"accept-encoding": "identity"},
        http_client=BoundedClient(timeout=None, follow_redirects=False),
    )


def _secrets(base_url: str, api_key: str) -> re.Pattern[str]:
    """Whatever of an address and a key must not be shown."""
    url = urlsplit(base_url)
    found = [api_key, *re.split("[:@]", url.netloc.rpartition("@")[0])]
    found += [pair.partition("=")[2] for pair in url.query.split("&")]
    found += [part for part in url.path.split("/") if len(part) >= _LONGEST_PLACE]
    found += [unquote_plus(each) for each in found]
    # The longest first: another may be its beginning.
    found = sorted((each for each in found if len(each) >= _SHORTEST_SECRET), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found)) or "(?!)")


def _text(completion: Any) -> str:
    """The text of an answer; empty where the model said nothing.

    Raises:
        ValueError: for anything but a chat completion.
    """
    choices = getattr(completion, "choices", None)
    message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else 0
    content = getattr(message, "content", None)
    if not hasattr(message, "content") or not isinstance(content, str | None):
        raise ValueError(
            "Expected a chat completion with a text (is `base_url` that of an OpenAI-compatible "
            f"endpoint? It often ends in '/v1'), got {completion!r}."
        )
    return content or ""


def _require_openai() -> None:
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Asking a judge needs openai, which cannot be imported. Run: "
            + install_command("judge")
        ) from error
