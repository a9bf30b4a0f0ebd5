"""A thousand swaps of adapters, and everything that attaches for a while, leave nothing behind."""

from __future__ import annotations

import gc
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from helpers import D_IN, fsrl_model, tiny_model, tiny_sae, token_ids
from peft_fsrl import FSRLConfig, FSRLLayer, freeze_sae
from peft_fsrl.sae.frozen import _INSTANCES, FrozenSAE
from peft_fsrl.steering import (
    SteeringMonitor,
    ablate_features,
    observe,
    only_features,
    scale_steering,
    top_k_steering,
)

SWAPS = 1000


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread has nothing to do in so small a model, and waits for it at full speed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def hooks_of(model: nn.Module) -> Counter[str]:
    """How many hooks of each kind a model's modules have together."""
    return Counter(
        {
            kind: sum(len(hooks) for m in model.modules() if (hooks := getattr(m, kind)))
            for kind in vars(nn.Module())
            if kind.endswith("_hooks")
        }
    )


def alive() -> dict[str, int]:
    """How many tensors, layers and SAEs are alive in the process."""
    gc.collect()
    with warnings.catch_warnings():
        # Objects of other libraries warn when their class is looked at.
        warnings.simplefilter("ignore")
        objects = gc.get_objects()
        return {
            "tensors": sum(isinstance(o, torch.Tensor) for o in objects),
            "layers": sum(type(o) is FSRLLayer for o in objects),
            "saes": sum(type(o) is FrozenSAE for o in objects),
            "registered": len(_INSTANCES),
            "configs": sum(type(o) is FSRLConfig for o in objects),
        }


def assert_nothing_stays(before: dict[str, int]) -> None:
    """No more of anything than before; fewer is what other tests of the process had left."""
    found = alive()
    assert {name: n for name, n in found.items() if n > before[name]} == {}


def state_of(model: PeftModel) -> dict[str, Any]:
    layers = [m for m in model.modules() if isinstance(m, FSRLLayer)]
    return {
        "hooks": hooks_of(model),
        "parameters": [name for name, _ in model.named_parameters()],
        "adapters": list(model.peft_config),
        "held": [(list(m.fsrl_adapter), list(m.fsrl_sae)) for m in layers],
        "attached": [(len(m.observers), len(m.edits)) for m in layers],
        "attributes": sorted(name for m in layers for name in vars(m)),
    }


def resident_kib() -> int:
    """Memory of this process that is in RAM, now and not at its highest."""
    [line] = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmRSS")
    ]
    return int(line.split()[1])


@pytest.fixture
def references(tmp_path: Path) -> list[Any]:
    """Two live SAEs and two in folders, one of each for layer 1 and one for layer 2."""
    saes = [
        tiny_sae(architecture, seed=seed, metadata={"hook_name": f"blocks.{layer}.hook_resid_post"})
        for seed, (architecture, layer) in enumerate(
            [("standard", 1), ("topk", 2), ("gated", 1), ("jumprelu", 2)], start=40
        )
    ]
    for index in (2, 3):
        saes[index].save_model(tmp_path / str(index))
    return [saes[0], saes[1], str(tmp_path / "2"), str(tmp_path / "3")]


def swap(model: PeftModel, reference: Any, ids: torch.Tensor) -> None:
    model.add_adapter("other", FSRLConfig(sae=reference, task_type="CAUSAL_LM"))
    model.set_adapter("other")
    with torch.no_grad():
        model(input_ids=ids)
    model.set_adapter("default")
    model.delete_adapter("other")


@pytest.mark.slow
def test_a_thousand_swaps(references: list[Any]) -> None:
    model, ids = fsrl_model(), token_ids(1, 2)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    # The first round wraps the second layer, loads what is imported late, and fills pools.
    for step in range(20):
        swap(model, references[step % 4], ids)
    state, counted = state_of(model), alive()
    grown = []
    # In parts, for the allocator of a process that has done other things may still fill a pool.
    for _ in range(4):
        memory = resident_kib() if sys.platform == "linux" else 0
        for step in range(SWAPS // 4):
            swap(model, references[step % 4], ids)
        grown.append((resident_kib() if sys.platform == "linux" else 0) - memory)
    assert state_of(model) == state
    assert_nothing_stays(counted)
    # An adapter and its SAE have 1,200 floats: kept, 250 of them would be 1.2 MiB, every time.
    assert min(grown) < 0.8 * 1024
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_layer_without_adapters_steers_nothing(references: list[Any]) -> None:
    model, ids = fsrl_model(), token_ids()
    model.add_adapter("other", FSRLConfig(sae=references[1], task_type="CAUSAL_LM"))
    lower, upper = (module for module in model.modules() if isinstance(module, FSRLLayer))
    model.set_adapter("other")
    model.delete_adapter("default")
    assert list(lower.fsrl_adapter) == list(lower.fsrl_sae) == []
    events: list[Any] = []
    with observe(model, events.append), torch.no_grad():
        model(input_ids=ids)
    assert [event.layer_name for event in events] == [upper.layer_name]


def test_deleting_an_adapter_leaves_nothing_of_its_name() -> None:
    model = fsrl_model()
    model.add_adapter("other", FSRLConfig(layer=1, sae=tiny_sae(), task_type="CAUSAL_LM"))
    model.delete_adapter("other")
    [layer] = [module for module in model.modules() if isinstance(module, FSRLLayer)]
    tables = {**vars(layer), **layer._modules}
    assert [n for n, t in tables.items() if hasattr(t, "keys") and "other" in t] == []


def test_saved_and_loaded_again_and_again(tmp_path: Path) -> None:
    model = fsrl_model()
    model.save_pretrained(tmp_path)

    def reload() -> None:
        model.load_adapter(tmp_path, "again")
        model.set_adapter("again")
        model.set_adapter("default")
        model.delete_adapter("again")
        model.save_pretrained(tmp_path)

    for _ in range(3):
        reload()
    state, counted = state_of(model), alive()
    for _ in range(30):
        reload()
    assert state_of(model) == state
    assert_nothing_stays(counted)


def test_controls_and_monitors_leave_nothing() -> None:
    model, ids = fsrl_model(), token_ids(1, 3)

    def use_everything() -> None:
        with (
            torch.no_grad(),
            ablate_features(model, [1, 2]),
            only_features(model, range(9)),
            scale_steering(model, 0.5),
            top_k_steering(model, 4),
            observe(model, lambda event: None),
            SteeringMonitor(model, lambda record: None),
        ):
            model(input_ids=ids)
            model.generate(input_ids=ids, max_new_tokens=2, do_sample=False)

    use_everything()
    state, counted = state_of(model), alive()
    for _ in range(30):
        use_everything()
    assert state_of(model) == state
    assert_nothing_stays(counted)
    assert state["attached"] == [(0, 0)]


@pytest.mark.parametrize("architecture", ["standard", "temporal"])
def test_unloading_leaves_nothing(architecture: str) -> None:
    base, ids = tiny_model(), token_ids()
    with torch.no_grad():
        expected = base(input_ids=ids).logits
    counted, hooks = alive(), hooks_of(base)
    attributes = {name: set(vars(module)) for name, module in base.named_modules()}
    for seed in range(5):
        model = fsrl_model(base, sae=tiny_sae(architecture, seed=50 + seed))
        with torch.no_grad():
            assert not torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
        assert model.unload() is base
        del model
        assert hooks_of(base) == hooks
        added = {name: set(vars(m)) - attributes[name] for name, m in base.named_modules()}
        # PEFT sets the names of the base model's path.
        assert {name for names in added.values() for name in names} <= {"name_or_path"}
        assert_nothing_stays(counted)
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids).logits, expected)


def test_moving_an_sae_about_keeps_one_copy() -> None:
    before = alive()
    frozen = freeze_sae(tiny_sae(seed=60))
    for dtype in [torch.bfloat16, torch.float16, torch.float64] * 20:
        frozen = frozen.to(torch.device("cpu"), dtype)
        some = frozen.restrict([1, 2, 3])
        some.encode(torch.randn(2, D_IN, dtype=dtype))
        del some
    after = alive()
    assert after["saes"] == before["saes"] + 1
    assert after["registered"] == before["registered"] + 1
    del frozen
    assert_nothing_stays(before)
