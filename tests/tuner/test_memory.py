"""Loading keeps one copy of an SAE and one of an adapter in memory, by what the kernel counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

WIDTH, FEATURES = 1024, 8192
MATRIX = WIDTH * FEATURES * 4 / 2**20
PROGRAM = f"""
import gc, json, sys
import torch
from peft import PeftModel, get_peft_model
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from transformers import LlamaConfig, LlamaForCausalLM
from peft_fsrl import FSRLConfig, load_sae

folder = sys.argv[1]

def status(name):
    lines = dict(line.split(":") for line in open("/proc/self/status").read().splitlines())
    return int(lines[name].split()[0]) / 1024

def model(width={WIDTH}):
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=8, hidden_size=width, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1))

def settings(sae):
    return FSRLConfig(layer=0, sae=sae, task_type="CAUSAL_LM")

def peak(run):
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    kept = run()
    found = status("VmHWM") - before
    del kept
    return found

def write(path, d_in, d_sae):
    JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae)).save_model(path)
    return path

# What is imported, and asked of the allocator, once.
small = write(folder + "/small", 16, 24)
get_peft_model(model(16), settings(small)).save_pretrained(folder + "/small_adapter")
PeftModel.from_pretrained(model(16), folder + "/small_adapter")
sae = write(folder + "/sae", {WIDTH}, {FEATURES})
gc.collect()
base = model()
measured = {{"load": peak(lambda: load_sae(sae))}}
measured["get"] = peak(lambda: get_peft_model(base, settings(sae)))
get_peft_model(model(), settings(sae)).save_pretrained(folder + "/adapter")
base = model()
measured["saved"] = peak(lambda: PeftModel.from_pretrained(base, folder + "/adapter"))
print(json.dumps(measured))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_nothing_is_in_memory_twice(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout.splitlines()[-1])
    # In matrices of d_in times d_sae: an encoder, a decoder, an adapter, and of an adapter that is
    # loaded also its file, which safetensors maps. A further copy of any would be one more.
    for name, matrices in (("load", 2), ("get", 3), ("saved", 4)):
        assert peak[name] > 0.9 * matrices * MATRIX, (name, peak)
        assert peak[name] < (matrices + 0.5) * MATRIX, (name, peak)
