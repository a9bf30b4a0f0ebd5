"""Write the golden checkpoints of a release, once: ``python tests/golden/make.py v0.1``.

What is written here binds every later release; see ``tests/tuner/test_golden.py``. A folder that
exists is never written again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "tuner")]

from test_golden import Stack  # noqa: E402

from helpers import D_IN, naive_steer, randomize_adapter, tiny_sae  # noqa: E402
from peft_fsrl import FSRLConfig, FSRLLayer  # noqa: E402

HOOK = {"hook_name": "blocks.1.hook_resid_post", "model_name": "stack"}


def write(folder: Path, config: FSRLConfig, saes: dict[int, object]) -> None:
    """Save an adapter with random values, inputs, and what the formula makes of them in float64."""
    model: PeftModel = get_peft_model(Stack(), config)
    x = torch.randn(2, 5, D_IN, generator=torch.Generator().manual_seed(7))
    expected = x.double()
    for seed, layer in enumerate(m for m in model.modules() if isinstance(m, FSRLLayer)):
        randomize_adapter(layer, seed=seed)
        adapter = layer.fsrl_adapter["default"]
        values = {name: p.detach().double() for name, p in adapter.named_parameters()}
        weight = values["weight"] @ values["down"] if "down" in values else values["weight"]
        sae = saes[int(layer.layer_name[-1])]
        rows = layer.fsrl_sae["default"].feature_index
        # Features that cannot be steered: a row of zeros, and a threshold that zero does not cross.
        whole = torch.zeros(sae.cfg.d_sae, D_IN, dtype=torch.float64)
        bias, threshold = (torch.zeros(sae.cfg.d_sae, dtype=torch.float64) for _ in range(2))
        whole[rows], bias[rows] = weight, values["bias"]
        given = values.get("threshold", values.get("log_threshold"))
        if given is not None:
            threshold[rows] = given
        expected, _, _ = naive_steer(
            sae.double(),
            expected,
            whole,
            bias,
            None if given is None else threshold,
            adapter.activation,
            adapter.bandwidth,
            config.non_negative,
        )
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink()
    save_file({"x": x, "expected": expected.detach().contiguous()}, folder / "example.safetensors")


def main() -> None:
    """Write every kind of adapter that the release can save."""
    root = TESTS / "golden" / sys.argv[1]
    if root.exists():
        sys.exit(f"{root} exists. Golden checkpoints are written once, by the release they name.")
    sae = tiny_sae("jumprelu", metadata=HOOK)
    write(root / "soft_threshold", FSRLConfig(layer=1, sae=sae), {1: sae})
    sae = tiny_sae("topk", metadata=HOOK, seed=1)
    write(root / "relu_rank", FSRLConfig(sae=sae, activation="relu", rank=3), {1: sae})
    saes = {
        0: tiny_sae("standard", "layer_norm", metadata={}, seed=2),
        2: tiny_sae("gated", metadata={}, seed=3),
    }
    config = FSRLConfig(
        sae=saes,
        activation="jumprelu",
        features={0: [1, 2, 23], 2: [0, 5]},
        jumprelu_bandwidth=0.5,
        l0_coeff=0.2,
    )
    write(root / "two_layers", config, saes)
    sae = tiny_sae("standard", "constant_norm_rescale", metadata={}, seed=4)
    config = FSRLConfig(
        target_modules=["layers.2"], sae=sae, non_negative=False, exclude_features=[3, 4]
    )
    write(root / "target_modules", config, {2: sae})


if __name__ == "__main__":
    main()
