"""``Judge``: a language model at any OpenAI-compatible endpoint, and what asking it costs."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from ..records import Spend
from ._cache import AnswerCache, hash_request

if TYPE_CHECKING:
    from openai import AsyncOpenAI

logger = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, str]]

# Statuses that speak of one prompt: too long, against a policy, not understood.
_REFUSALS = frozenset({400, 413, 422})
# Where so many are refused and none is answered, the prompts are not to blame.
_HOPELESS = 8
_sent: ContextVar[list[int]] = ContextVar("sent")


class JudgeError(ConnectionError):
    """An endpoint that stopped answering; what it had answered is kept.

    Attributes:
        done: prompts of the call that have an answer now.
        total: prompts of the call.
    """

    def __init__(self, message: str, done: int, total: int) -> None:
        super().__init__(message)
        self.done = done
        self.total = total


class Judge:
    """Asks a model, several prompts at a time, and remembers every answer.

    Answers are kept by model, prompt and settings, not by address: the same model served elsewhere
    is not asked again.

    Args:
        base_url: of the endpoint, for example ``"http://localhost:8000/v1"``.
        model: its name there.
        api_key: None takes the environment variable ``OPENAI_API_KEY``, if it is set.
        max_concurrency: requests under way at once.
        retries: of a request that failed for a reason that may pass, with the growing pauses, or
            those that the endpoint asks for, of the ``openai`` library.
        timeout: seconds after which a request has failed.
        cache: file of answers, made or continued; None remembers them as long as this object lives.
        temperature: of sampling; None leaves it to the endpoint.
        options: further arguments of the library's ``chat.completions.create``, such as
            ``{"max_tokens": 200}``.

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
    ) -> None:
        _require_openai()
        if max_concurrency < 1 or retries < 0 or timeout <= 0:
            raise ValueError(
                "Expected max_concurrency of 1 or more, retries of 0 or more and a timeout above "
                f"0, got {max_concurrency}, {retries} and {timeout}."
            )
        self.base_url = base_url
        self.model = model
        self._api_key = api_key
        self._max_concurrency = max_concurrency
        self._retries = retries
        self._timeout = timeout
        self._settings = dict(options or {})
        if temperature is not None:
            self._settings["temperature"] = temperature
        self._cache = AnswerCache(cache)
        self._counts = dict.fromkeys(Spend.__dataclass_fields__, 0)

    def __repr__(self) -> str:
        return f"Judge({self.base_url!r}, {self.model!r})"

    @property
    def repeats_itself(self) -> bool:
        """Whether the same prompt is to get the same answer: it was asked for no randomness."""
        return self._settings.get("temperature") == 0

    @property
    def spend(self) -> Spend:
        """What all calls together have cost since this object was made."""
        return Spend(**self._counts)

    def ask(
        self, prompts: Sequence[Messages], *, sample: int = 0, description: str | None = None
    ) -> list[str]:
        """One answer per prompt, in order.

        Works where an event loop runs already, as in a notebook. What the cache has is not asked
        again, equal prompts are asked once, and every answer is kept as it comes in: after an
        interruption of any kind, the same call asks for the rest alone.

        Args:
            prompts: chats, each a list of messages with ``role`` and ``content``.
            sample: number of the answer, where a prompt is to be answered more than once.
            description: shown beside the progress bar; None shows no bar.

        Returns:
            The texts. Empty for a prompt that the endpoint refused (HTTP status 400, 413 or 422),
            which is logged, counted in ``spend`` and asked again the next time.

        Raises:
            JudgeError: if the endpoint fails. No more prompts are sent then; those under way are
                waited for.
        """
        from anyio.from_thread import start_blocking_portal

        batch = _Batch(self, prompts, sample, description)
        if batch.waiting:
            # A loop of its own in a thread of its own, so that a running one is in nobody's way.
            with start_blocking_portal() as portal:
                portal.call(batch.run)
        return batch.answers()

    def _request(self, prompt: Messages, sample: int) -> dict[str, Any]:
        messages = [dict(message) for message in prompt]
        return {"model": self.model, "messages": messages, "sample": sample, **self._settings}

    def _client(self) -> AsyncOpenAI:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        async def count(request: Any) -> None:
            _sent.get()[0] += 1

        return AsyncOpenAI(
            base_url=self.base_url,
            # The library insists on a key; local servers do not look at it.
            api_key=self._api_key or os.environ.get("OPENAI_API_KEY") or "none",
            max_retries=self._retries,
            timeout=self._timeout,
            http_client=DefaultAsyncHttpxClient(event_hooks={"request": [count]}),
        )

    def _count(self, **amounts: int) -> None:
        for name, amount in amounts.items():
            self._counts[name] += amount


class _Batch:
    """One call of ``ask``."""

    def __init__(
        self, judge: Judge, prompts: Sequence[Messages], sample: int, description: str | None
    ) -> None:
        self._judge = judge
        self._description = description
        requests = [judge._request(prompt, sample) for prompt in prompts]
        self._keys = [hash_request(request) for request in requests]
        self._cache = judge._cache
        self.requests = dict(zip(self._keys, requests, strict=True))
        self.waiting = [key for key in self.requests if self._cache.get(key) is None]
        self._answered = 0
        self._refusals: list[str] = []
        self._failure: Exception | None = None
        cached = len(self.requests) - len(self.waiting)
        judge._count(prompts=len(self.requests), cached=cached)

    def answers(self) -> list[str]:
        """What there is, in the order of the prompts.

        Raises:
            JudgeError: if the endpoint failed, or took no prompt at all.
        """
        done = sum(self._cache.get(key) is not None for key in self._keys)
        total = len(self._keys)
        if self._failure is not None:
            raise JudgeError(
                f"{self._judge!r} stopped after {done} of {total} prompts: "
                f"{_describe(self._failure)} {self._how_to_resume()}",
                done,
                total,
            ) from self._failure
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
        return [self._cache.get(key) or "" for key in self._keys]

    async def run(self) -> None:
        """Ask for what is missing."""
        import anyio

        keys = iter(self.waiting)
        progress = tqdm(
            total=len(self.requests),
            initial=len(self.requests) - len(self.waiting),
            desc=self._description,
            unit="prompt",
            disable=self._description is None,
            leave=False,
        )

        async def work(client: AsyncOpenAI) -> None:
            for key in keys:
                await self._ask(client, key)
                progress.update()
                if self._is_over():
                    return

        with progress:
            async with self._judge._client() as client, anyio.create_task_group() as group:
                for _ in range(min(self._judge._max_concurrency, len(self.waiting))):
                    group.start_soon(work, client)

    def _is_over(self) -> bool:
        hopeless = not self._answered and len(self._refusals) >= _HOPELESS
        return self._failure is not None or hopeless

    async def _ask(self, client: AsyncOpenAI, key: str) -> None:
        import openai

        sent = [0]
        _sent.set(sent)
        arguments = {name: v for name, v in self.requests[key].items() if name != "sample"}
        try:
            completion = await client.chat.completions.create(**arguments)
            self._keep(key, completion)
        except openai.APIStatusError as error:
            if error.status_code in _REFUSALS:
                self._refusals.append(_describe(error))
                self._judge._count(refused=1)
            else:
                self._fail(error)
        except (openai.OpenAIError, OSError, ValueError) as error:
            self._fail(error)
        finally:
            self._judge._count(requests=sent[0], retried=max(0, sent[0] - 1))

    def _keep(self, key: str, completion: Any) -> None:
        answer = _text(completion)
        usage = getattr(completion, "usage", None)
        self._judge._count(
            answered=1,
            prompt_tokens=getattr(usage, "prompt_tokens", None) or 0,
            completion_tokens=getattr(usage, "completion_tokens", None) or 0,
            unmetered=int(usage is None),
        )
        self._answered += 1
        self._cache.add(key, answer)

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error
        self._judge._count(failed=1)

    def _how_to_resume(self) -> str:
        if self._cache.path is None:
            return (
                "This object remembers the answers: call it again for the rest. With `cache` they "
                "would also outlive it."
            )
        return f"The answers are in {self._cache.path}: the same call asks for the rest alone."


def _text(completion: Any) -> str:
    """The text of an answer; empty where the model said nothing.

    Raises:
        ValueError: for anything but a chat completion.
    """
    choices = getattr(completion, "choices", None)
    message = getattr(choices[0], "message", None) if choices else None
    if message is None:
        raise ValueError(
            f"Expected a chat completion, got {str(completion)[:200]!r}. Is `base_url` that of an "
            "OpenAI-compatible endpoint? It often ends in '/v1'."
        )
    return message.content or ""


def _describe(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"it sent what is not JSON ({error})."
    cause = f" ({error.__cause__})" if error.__cause__ else ""
    return f"{type(error).__name__}: {str(error).rstrip('.')}{cause}."


def _require_openai() -> None:
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Asking a judge needs the package `openai`: pip install 'peft-fsrl[judge]'."
        ) from error
