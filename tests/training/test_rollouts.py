"""What a trainer sends to vLLM: the adapter alone, and to nobody who would not steer with it."""

from __future__ import annotations

import base64
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load

from helpers import fsrl_model
from peft_fsrl.training.rollouts import vllm_from

# Of vLLM, where it is installed, and of TRL about it.
pytestmark = pytest.mark.filterwarnings("ignore")


class Client:
    """TRL's client of a server that answers with one status."""

    base_url = "http://server"

    def __init__(self, status: int) -> None:
        self.session, self.status = self, status
        self.posted: list[tuple[str, Any]] = []
        self.resets = 0

    def post(self, url: str, json: Any) -> Any:
        self.posted.append((url, json))
        return SimpleNamespace(status_code=self.status, text="no such route")

    def reset_prefix_cache(self) -> None:
        self.resets += 1


def built(generation: Any) -> Any:
    """A trainer with vLLM, as it is after it was built."""
    accelerator = SimpleNamespace(unwrap_model=lambda model: model, is_main_process=True)
    trainer = SimpleNamespace(model=fsrl_model(), accelerator=accelerator)
    if generation is not None:
        trainer.vllm_generation = generation
    with vllm_from(trainer, SimpleNamespace(use_vllm=True)):
        pass
    return trainer


def test_a_server_is_sent_the_adapter_alone() -> None:
    client = Client(200)
    trainer = built(SimpleNamespace(mode="server", vllm_client=client))
    trainer.vllm_generation.sync_weights()
    [(url, call)] = client.posted
    assert (url, call["method"]) == (
        "http://server/collective_rpc",
        "update_steering_from_text",
    )
    sent = load(base64.b64decode(call["args"][0]))
    expected = get_peft_model_state_dict(trainer.model)
    assert sent.keys() == expected.keys()
    assert all(".fsrl_adapter." in key for key in sent)
    assert all(torch.equal(sent[key], expected[key]) for key in sent)
    assert client.resets == 1


def test_a_server_that_does_not_take_it_is_an_error() -> None:
    client = Client(404)
    trainer = built(SimpleNamespace(mode="server", vllm_client=client))
    with pytest.raises(RuntimeError, match=r"404: no such route.*VLLM_SERVER_DEV_MODE=1"):
        trainer.vllm_generation.sync_weights()
    assert client.resets == 0


def test_an_engine_without_the_plugin_is_refused() -> None:
    config = SimpleNamespace(additional_config={})
    llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config))
    with pytest.raises(ValueError, match="would not steer"):
        built(SimpleNamespace(mode="colocate", llm=llm))


def test_a_trainer_that_merges_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be merged: set use_vllm=False"):
        built(None)
