"""Rollouts of TRL's trainers in vLLM: the adapter alone is sent, and nothing is merged.

The base model never changes, so the engine keeps the weights that it has loaded. It steers with an
adapter of its own (``peft_fsrl.serving``), whose weights are replaced before each rollout.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

from peft import get_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor

# Under which vLLM's config, outputs and responses carry what is ours.
KEY = "peft_fsrl"
_offered: Callable[[], str] | None = None


def vllm_settings(arguments: Iterable[Any]) -> Any:
    """The settings with ``use_vllm=True`` among a trainer's arguments; None for none.

    Raises:
        ValueError: for settings with which vLLM loses what it has loaded.
    """
    found = next((each for each in arguments if getattr(each, "use_vllm", False) is True), None)
    if getattr(found, "vllm_enable_sleep_mode", False):
        raise ValueError(
            f"{type(found).__name__} has vllm_enable_sleep_mode=True: vLLM then drops the base "
            "model's weights, and a trainer of an FSRL adapter sends only the adapter's. Set it "
            "to False."
        )
    return found


@contextmanager
def vllm_from(trainer: Any, settings: Any) -> Iterator[None]:
    """Let the engines that a trainer makes of its model while it is built steer with its adapter.

    Args:
        trainer: being built.
        settings: from ``vllm_settings``; None for a trainer without vLLM.
    """
    global _offered
    if settings is None:
        yield
        return
    from trl.generation.vllm_client import VLLMClient

    # It opens a channel between GPUs, for weights that are not sent here.
    silent = patch.object(VLLMClient, "init_communicator", lambda self, *args, **kwargs: None)
    with silent, tempfile.TemporaryDirectory(prefix="peft_fsrl_rollouts_") as folder:
        _offered = partial(_save, trainer, folder)
        try:
            yield
        finally:
            _offered = None
    _send_adapter_only(trainer, settings)


def offered_adapter() -> str | None:
    """A folder with the adapter of the trainer that is being built here; None for none."""
    return None if _offered is None else _offered()


def _save(trainer: Any, folder: str) -> str:
    trainer.model.save_pretrained(folder)
    return folder


def _send_adapter_only(trainer: Any, settings: Any) -> None:
    generation = getattr(trainer, "vllm_generation", None)
    if generation is None:
        raise ValueError(
            f"{type(settings).__name__} has use_vllm=True, and this trainer sends weights to vLLM "
            "with the adapter merged into them. An FSRL adapter cannot be merged: set "
            "use_vllm=False, or train with GRPOTrainer or RLOOTrainer."
        )
    if generation.mode == "colocate":
        if KEY not in generation.llm.llm_engine.vllm_config.additional_config:
            raise ValueError(
                "vLLM was started without the plugin of peft_fsrl and would not steer: its "
                "rollouts would be the base model's. Install peft_fsrl where vLLM is (pip install "
                "-e . anew, if it was installed before it had one)."
            )
        generation.sync_weights = partial(_send_to_engine, trainer, generation.llm)
    else:
        generation.sync_weights = partial(_send_to_server, trainer, generation)


def _send_to_engine(trainer: Any, llm: Any) -> None:
    llm.collective_rpc("update_steering", args=(_adapter_state(trainer),))
    llm.reset_prefix_cache()


def _send_to_server(trainer: Any, generation: Any) -> None:
    state = _adapter_state(trainer)
    if not trainer.accelerator.is_main_process:
        return
    client = generation.vllm_client
    text = base64.b64encode(save(state)).decode()
    call = {"method": "update_steering_from_text", "args": [text]}
    answer = client.session.post(f"{client.base_url}/collective_rpc", json=call)
    if answer.status_code != 200:
        raise RuntimeError(
            f"The vLLM server at {client.base_url} did not take the adapter (status "
            f"{answer.status_code}: {answer.text[:300]}). Start it with VLLM_SERVER_DEV_MODE=1 and "
            "PEFT_FSRL_ADAPTER=folder in its environment, with an adapter of the same features."
        )
    client.reset_prefix_cache()


def _adapter_state(trainer: Any) -> dict[str, Tensor]:
    state = get_peft_model_state_dict(
        trainer.accelerator.unwrap_model(trainer.model), save_embedding_layers=False
    )
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}
