"""A conversation with a steered model, token by token with the features steered there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ..analysis.generations import SteeredFeature, SteeredToken, strongest_features
from ..analysis.labels import FeatureLabel, Labels, for_model
from ..steering import SteeringEvent, ablate_features, fsrl_layers, observe, scale_steering
from ..training.running import as_base
from .requests import Served, SteeringRequest, parse_request

HELP = """\
/strength 0.5   scale the steering; 0 is the base model, 1 the adapter
/ablate 66,137  zero the steering of features or of a category; alone: of none
/base           the base model, and back
/reset          forget the conversation
/quit           leave
"""


class Chat:
    """A conversation and how its answers are steered.

    Args:
        model: a PEFT model with an FSRL adapter.
        tokenizer: of the model. Without a chat template, turns are lines of text.
        labels: of the SAE's features.
        max_new_tokens: length limit of an answer.
        temperature: 0 takes the likeliest token.
        n_features: how many features to keep per token, largest ``|v|`` first.

    Attributes:
        asked: how the next answer is steered.
        labels: by feature.
        categories: features by category, from the labels.
        scales: factors of the steering of categories; 1 where there is none.
        messages: the conversation so far, in transformers' form.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        labels: Labels | None = None,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        n_features: int = 1,
    ) -> None:
        self._model, self._tokenizer, self._n_features = model, tokenizer, n_features
        layers = fsrl_layers(model).values()
        d_sae = min(sae.info.d_sae for layer in layers for sae in layer.fsrl_sae.values())
        self.labels: dict[int, FeatureLabel] = {}
        self.categories: dict[str, list[int]] = {}
        self.scales: dict[str, float] = {}
        if labels is not None:
            self.labels = {each.feature: each for each in for_model(labels, model).features}
            self.categories = {name: labels.members(name) for name in labels.categories}
        self._served = Served(
            {"default": ""}, {"default": d_sae}, {}, None, self.categories, ["default"]
        )
        self._options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
        self._options["do_sample"] = temperature > 0
        if temperature > 0:
            self._options["temperature"] = temperature
        self._wish: dict[str, Any] = {}
        self._before = 1.0
        self.asked = SteeringRequest("default")
        self.messages: list[dict[str, str]] = []

    def command(self, line: str) -> str:
        """Do what a line that begins with a slash says; returns what to tell the user.

        Raises:
            ValueError: for a command that there is not, or a value that means nothing.
        """
        name, _, value = line.strip().partition(" ")
        value = value.strip()
        if name == "/strength":
            return self._ask("strength", _number(value))
        if name == "/ablate":
            return self._ask("ablate", value if value else ())
        if name == "/base":
            if self.asked.strength:
                self._before = self.asked.strength
            return self._ask("strength", 0.0 if self.asked.strength else self._before)
        if name == "/reset":
            self.messages.clear()
            return "The conversation begins anew."
        if name == "/help":
            return HELP
        raise ValueError(f"There is no command {name!r}:\n{HELP}")

    @torch.no_grad()
    def say(self, text: str, write: Callable[[SteeredToken], Any]) -> str:
        """Answer a message.

        Args:
            text: what the user says.
            write: called with each piece of the answer and the features that were steered where
                it was decided on.

        Returns:
            The whole answer.
        """
        self.messages.append({"role": "user", "content": text})
        streamer = _Streamer(self._tokenizer, self._n_features, write)
        inputs = self._encode().to(self._model.device)
        with ExitStack() as stack:
            stack.enter_context(observe(self._model, streamer.look))
            strength = self.asked.strength
            # The base has none of what an adapter trains beside the steering, either.
            steer = scale_steering(self._model, strength) if strength else as_base(self._model)
            stack.enter_context(steer)
            stack.enter_context(ablate_features(self._model, self.asked.ablated))
            for category, scale in self.scales.items():
                members = self.categories[category]
                stack.enter_context(scale_steering(self._model, scale, features=members))
            self._model.generate(**inputs, **self._options, streamer=streamer)
        self.messages.append({"role": "assistant", "content": streamer.text})
        return streamer.text

    def _ask(self, key: str, value: Any) -> str:
        wish = {**self._wish, f"fsrl_{key}": value}
        self.asked, self._wish = parse_request(wish, self._served), wish
        without = ", ".join(map(str, self.asked.ablated)) or "none"
        return f"strength {self.asked.strength:g}, without features: {without}"

    def _encode(self) -> Any:
        if getattr(self._tokenizer, "chat_template", None):
            return self._tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        lines = "\n".join(message["content"] for message in self.messages)
        return self._tokenizer(lines, return_tensors="pt")


class _Streamer(BaseStreamer):
    """Turns tokens into pieces of text, each with the features steered where it was predicted."""

    def __init__(
        self, tokenizer: Any, n_features: int, write: Callable[[SteeredToken], Any]
    ) -> None:
        self._tokenizer, self._n_features, self._write = tokenizer, n_features, write
        self._tokens: list[int] = []
        self._steered: tuple[tuple[SteeredFeature, ...], int] = ((), 0)
        self._has_prompt = False
        self.text = ""

    def look(self, event: SteeringEvent) -> None:
        v = event.steering_vector[0, -1]
        self._steered = strongest_features(v, event.sae, self._n_features)

    def put(self, value: Tensor) -> None:
        if not self._has_prompt:
            self._has_prompt = True
            return
        self._tokens.extend(value.flatten().tolist())
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        # Half of a character of several bytes waits for its other half.
        if len(text) > len(self.text) and not text.endswith("\ufffd"):
            self._write(SteeredToken(text[len(self.text) :], *self._steered))
            self.text = text

    def end(self) -> None:
        return


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
