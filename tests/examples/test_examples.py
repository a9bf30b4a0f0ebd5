"""The example script, run as a user runs it: bad input is refused before any training."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

import helpers
import peft_fsrl
from peft_fsrl.analysis import Session, Summary

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "simpo.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, an SAE of its layer 1 and one of another width, and data."""
    folder = tmp_path_factory.mktemp("place")
    model = helpers.tiny_model()
    model.save_pretrained(folder / "model")
    helpers.tiny_tokenizer().save_pretrained(folder / "model")
    metadata = {"hook_name": helpers.HOOK_NAME, "model_name": "model"}
    helpers.tiny_sae(metadata=metadata).save_model(folder / "sae")
    helpers.tiny_sae(metadata=metadata, d_in=8).save_model(folder / "narrow")
    for split, rows, seed in (("train", 16, 0), ("test", 8, 1)):
        helpers.tiny_preferences(rows, seed).to_json(folder / "data" / f"{split}.json")
        Dataset.from_list([{"question": "w3", "answer": "w4"}]).to_json(
            folder / "questions" / f"{split}.json"
        )
    return folder


def flags(place: Path, **settings: str) -> list[str]:
    """Options for a run on the tiny model; ``settings`` replace some."""
    defaults = {
        "model_name_or_path": str(place / "model"),
        "dataset_name": str(place / "data"),
        "sae": str(place / "sae"),
        "layer": "1",
        "output_dir": str(place / "out"),
        "loss_type": "simpo",
        "cpo_alpha": "0",
        "beta": "10",
        "simpo_gamma": "5",
        "max_length": "32",
        "max_steps": "2",
        "learning_rate": "1e-2",
        "per_device_train_batch_size": "4",
        "bf16": "false",
        "gradient_checkpointing": "false",
        "use_cpu": "true",
        "report_to": "none",
        "save_strategy": "no",
    }
    return [f"--{name}={value}" for name, value in {**defaults, **settings}.items()]


def run(place: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the script in a process of its own."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *flags(place, **settings)],
        capture_output=True,
        text=True,
        cwd=place,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """The output folder of a run that went well."""
    result = run(place)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "SimPO loss" in result.stdout
    return place / "out"


def test_a_run_leaves_adapter_card_and_summary(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "eval_results.json",
        "README.md",
        "summary.json",
        "summary.txt",
        "trainer_state.json",
        "tokenizer.json",
    } <= names
    summary = Summary.from_json((finished / "summary.json").read_text())
    assert summary.trained.n == 8
    figures = json.loads((finished / "eval_results.json").read_text())
    assert figures["eval_loss"] == pytest.approx(summary.trained.loss, rel=1e-4)
    assert figures["eval_coherence/perplexity"] > 1
    card = (finished / "README.md").read_text()
    [info] = peft_fsrl.FSRLConfig.from_pretrained(str(finished)).sae_info.values()
    for expected in ("library_name: peft", "import peft_fsrl", info["fingerprint"], "simpo"):
        assert expected in card


def test_muon_trains_all_but_the_features_that_were_drawn(place: Path) -> None:
    out = place / "muon"
    settings = {"optimizer": "muon", "exclude_random": "5", "output_dir": str(out), "seed": "3"}
    result = run(place, **settings, summary_pairs="0", coherence_prompts="0", save_strategy="steps")
    assert result.returncode == 0, result.stderr[-3000:]
    excluded = peft_fsrl.FSRLConfig.from_pretrained(str(out)).exclude_features
    assert excluded == sorted(random.Random(3).sample(range(helpers.D_SAE), 5))
    [checkpoint] = out.glob("checkpoint-*")
    state = torch.load(checkpoint / "optimizer.pt")
    momenta = [s["momentum_buffer"].shape for s in state["state"].values() if len(s) == 2]
    assert momenta == [(helpers.D_SAE - 5, helpers.D_IN)]


def test_the_saved_adapter_scores_as_the_trained_one(place: Path, finished: Path) -> None:
    from peft_fsrl.analysis import score_preferences

    base = AutoModelForCausalLM.from_pretrained(place / "model")
    model = PeftModel.from_pretrained(base, finished)
    with torch.no_grad():
        scores = score_preferences(
            Session(model, helpers.tiny_tokenizer(), helpers.tiny_preferences(8, 1), batch_size=8)
        )
    assert scores == Summary.from_json((finished / "summary.json").read_text()).trained


def test_a_second_run_into_the_same_folder_fails_and_loses_nothing(
    place: Path, finished: Path, simpo: ModuleType
) -> None:
    before = {path: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    with pytest.raises(FileExistsError, match="an empty output directory, found another run"):
        simpo.main(*simpo.parse(flags(place)))
    assert {path: path.read_bytes() for path in finished.iterdir() if path.is_file()} == before


@pytest.fixture(scope="module")
def simpo() -> ModuleType:
    """The script as a module."""
    return helpers.load_example("simpo")


BAD_INPUT = {
    "narrow SAE": ({"sae": "{place}/narrow"}, "reads activations of width 8.*hidden size 16"),
    "no such layer": ({"layer": "7"}, "Layer 7 does not exist.*3 decoder layers"),
    "no such release": ({"sae": "gemma-scope-2b-pt-rez/x"}, "gemma-scope-2b-pt-res"),
    "no such sae_id": (
        {"sae": "gemma-scope-2b-pt-res/layer_12/width_65k/average_l0_73"},
        "average_l0_72",
    ),
    "no preferences": (
        {"dataset_name": "{place}/questions"},
        r"\['prompt', 'chosen', 'rejected'\].*\['answer', 'question'\]",
    ),
    "a prompt as long as max_length": (
        {"max_length": "4"},
        r"Row \d+ cannot be trained on.*fills max_length=4",
    ),
}


@pytest.mark.parametrize("mistake", BAD_INPUT)
def test_bad_input_is_refused_before_training(
    place: Path, simpo: ModuleType, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("training started")

    monkeypatch.setattr("transformers.Trainer.train", never)
    settings, message = BAD_INPUT[mistake]
    settings = {name: value.format(place=place) for name, value in settings.items()}
    options = flags(place, output_dir=str(place / "refused"), **settings)
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        simpo.main(*simpo.parse(options))
    assert not (place / "refused" / "adapter_model.safetensors").exists()


def test_no_flags_means_the_organism(simpo: ModuleType) -> None:
    script, args, model, _, job = simpo.parse(["--max_steps", "7"])
    assert (script.dataset_name, model.model_name_or_path) == ("organism", "organism")
    assert args.max_steps == 7
    assert (args.loss_type, args.cpo_alpha, args.beta, args.simpo_gamma) == ("simpo", 0, 10, 5)
    assert (job.style, job.honesty) == (0.9, 0.55)


def test_the_papers_settings_parse(simpo: ModuleType) -> None:
    config = ROOT / "examples" / "configs" / "gemma2_2b_ultrafeedback.yaml"
    script, args, model, fsrl, _ = simpo.parse(["--config", str(config), "--use_cpu", "true"])
    assert model.model_name_or_path == "google/gemma-2-2b-it"
    assert script.dataset_name == "princeton-nlp/llama3-ultrafeedback-armorm"
    config = fsrl.to_config()
    assert (config.layer, config.sae) == (
        12,
        "gemma-scope-2b-pt-res/layer_12/width_65k/average_l0_72",
    )
    assert args.simpo_gamma / args.beta == 0.5


@pytest.mark.parametrize(("given", "expected"), [((), True), (("--non_negative", "false"), False)])
def test_the_clamp_can_be_switched_off(
    simpo: ModuleType, given: tuple[str, ...], expected: bool
) -> None:
    _, _, _, fsrl, _ = simpo.parse([*given, "--use_cpu", "true"])
    assert fsrl.to_config().non_negative is expected


def test_equivalence_on_a_tiny_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import get_peft_model

    from peft_fsrl import organism
    from peft_fsrl.equivalence import Correspondence

    creature = organism.load()
    config = peft_fsrl.FSRLConfig(
        layer=creature.layer, sae=str(creature.sae_path), init_scale=0.05, init_threshold=0.7
    )
    get_peft_model(creature.load_model(), config).save_pretrained(tmp_path / "adapter")
    spec = importlib.util.spec_from_file_location("equivalence", SCRIPT.parent / "equivalence.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RANKS", (2, 8))
    monkeypatch.setattr(module, "N_FEATURES", (1, 4))
    options = {"adapter": tmp_path / "adapter", "out": tmp_path / "out", "pairs": 20, "checks": 5}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["equivalence.py", *arguments])
    module.main()
    record = Correspondence.from_json((tmp_path / "out" / "equivalence.json").read_text())
    assert len(record.token_ranks) == len(record.token_radii) > 100
    assert max(record.token_ranks) > 0
    assert min(record.token_radii) > 0
    assert [stand_in.ranks for stand_in in record.stand_ins] == [(2, 8)] * 2
    assert record.spanned[0] < record.spanned[1] <= 1
    assert (tmp_path / "out" / "equivalence.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "lora" / "adapter_model.safetensors").exists()
    checked, of = re.search(r"(\d+) of (\d+) certificates", capsys.readouterr().out).groups()
    assert int(checked) == int(of) >= 5
