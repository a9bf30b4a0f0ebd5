"""Pushes adapters to the Hub at ``HF_ENDPOINT`` and loads them back; prints what it found as JSON.

A process of its own: ``huggingface_hub`` reads its endpoint, cache and token when it is imported.
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, create_repo, upload_folder
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from torch import nn
from transformers import AutoModelForCausalLM

from helpers import (
    D_IN,
    D_SAE,
    fsrl_model,
    only_layer,
    randomize_adapter,
    tiny_model,
    tiny_sae,
    token_ids,
)
from peft_fsrl import FSRLConfig, load_sae

FOLDER = Path(sys.argv[1])
IDS = token_ids()
RESULTS: dict[str, Any] = {}


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER / "base")


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def same(name: str, model: nn.Module, expected: torch.Tensor) -> None:
    RESULTS[name] = bool(torch.equal(logits(model), expected))


def live_sae() -> None:
    model = fsrl_model(base())
    first = logits(model)
    model.push_to_hub("team/adapter")
    same("PeftModel", PeftModel.from_pretrained(base(), "team/adapter"), first)
    same(
        "AutoPeftModelForCausalLM", AutoPeftModelForCausalLM.from_pretrained("team/adapter"), first
    )
    plain = base()
    plain.load_adapter("team/adapter", peft_config=FSRLConfig.from_pretrained("team/adapter"))
    same("load_adapter", plain, first)
    two = PeftModel.from_pretrained(base(), "team/adapter", adapter_name="one")
    two.load_adapter("team/adapter", adapter_name="two")
    two.set_adapter("two")
    same("second adapter", two, first)

    randomize_adapter(only_layer(model), seed=9)
    second = logits(model)
    model.push_to_hub("team/adapter", revision="v2")
    same("main", PeftModel.from_pretrained(base(), "team/adapter"), first)
    same("revision", PeftModel.from_pretrained(base(), "team/adapter", revision="v2"), second)
    plain = base()
    config = FSRLConfig.from_pretrained("team/adapter", revision="v2")
    plain.load_adapter("team/adapter", download_kwargs={"revision": "v2"}, peft_config=config)
    same("load_adapter revision", plain, second)
    offline = FSRLConfig.from_pretrained("team/adapter", revision="v2", local_files_only=True)
    RESULTS["config from the cache"] = Path(offline.resolve_saes()[""]["path"]).is_dir()

    model.save_pretrained(str(FOLDER / "saved"))
    upload_folder(repo_id="team/adapter", folder_path=FOLDER / "saved", path_in_repo="deep/er")
    nested = PeftModel.from_pretrained(base(), "team/adapter", subfolder="deep/er")
    same("subfolder", nested, second)
    plain = base()
    config = FSRLConfig.from_pretrained("team/adapter", subfolder="deep/er")
    plain.load_adapter("team/adapter", download_kwargs={"subfolder": "deep/er"}, peft_config=config)
    same("load_adapter subfolder", plain, second)


def several_layers() -> None:
    saes = {0: tiny_sae(metadata={}), 2: tiny_sae("topk", metadata={}, seed=1)}
    model = fsrl_model(base(), sae=saes, layer=[0, 2])
    model.push_to_hub("team/several")
    same("several layers", PeftModel.from_pretrained(base(), "team/several"), logits(model))


def transformers_push() -> None:
    plain = base()
    plain.load_adapter(
        str(FOLDER / "saved"), peft_config=FSRLConfig.from_pretrained(FOLDER / "saved")
    )
    plain.push_to_hub("team/plain")
    same("pushed by transformers", PeftModel.from_pretrained(base(), "team/plain"), logits(plain))


def hub_sae() -> None:
    tiny_sae().save_model(FOLDER / "sae" / "layer_1")
    create_repo("team/saes")
    upload_folder(repo_id="team/saes", folder_path=FOLDER / "sae")
    model = fsrl_model(base(), sae="team/saes/layer_1")
    model.push_to_hub("team/named")
    same("SAE by its name", PeftModel.from_pretrained(base(), "team/named"), logits(model))
    same("AutoModelForCausalLM", AutoModelForCausalLM.from_pretrained("team/named"), logits(model))
    RESULTS["reference"] = PeftConfig.from_pretrained("team/named").sae


def registered_release() -> None:
    """A release of SAELens's registry that exists only as torch files, one of them hostile."""
    release = get_pretrained_saes_directory()["gpt2-small-hook-z-kk"]
    create_repo(release.repo_id)
    sae = tiny_sae(metadata={})
    good, bad = (release.saes_map[f"blocks.{layer}.hook_z"] for layer in (0, 1))
    config = {"act_size": D_IN, "dict_size": D_SAE, "act_name": "blocks.0.attn.hook_z"}
    folder = FOLDER / "registered"
    folder.mkdir()
    for path in (good, bad):
        (folder / path.replace(".pt", "_cfg.json")).write_text(json.dumps(config))
    torch.save(sae.state_dict(), folder / good)
    torch.save(Hostile(), folder / bad)
    upload_folder(repo_id=release.repo_id, folder_path=folder)
    loaded = load_sae("gpt2-small-hook-z-kk/blocks.0.hook_z")
    x = torch.randn(3, D_IN)
    RESULTS["registered release"] = torch.allclose(loaded.encode(x), sae.encode(x), atol=1e-6)
    RESULTS["registered hook"] = loaded.info.hook_name
    try:
        load_sae("gpt2-small-hook-z-kk/blocks.1.hook_z")
    except pickle.UnpicklingError as error:
        RESULTS["hostile file"] = str(error)
    RESULTS["hostile code ran"] = (FOLDER / "ran").exists()


class Hostile:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (FOLDER / "ran",)


def refusals() -> None:
    for name, call in {
        "missing repository": lambda: PeftModel.from_pretrained(base(), "team/nothing"),
        "wrong token": lambda: fsrl_model(base()).push_to_hub("team/adapter", token="hf_wrong"),
    }.items():
        try:
            call()
        except Exception as error:
            RESULTS[name] = f"{type(error).__name__}: {error}"


tiny_model().save_pretrained(FOLDER / "base")
for step in (
    live_sae,
    several_layers,
    transformers_push,
    hub_sae,
    registered_release,
    refusals,
):
    step()
RESULTS["files"] = {
    repo: sorted(HfApi().list_repo_files(repo)) for repo in ("team/adapter", "team/named")
}
sys.stdout.write(json.dumps(RESULTS))
