"""A server of two adapters over HTTP: bad requests, reports, counters, and 200 requests at once."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make serving")

from serving_helpers import load_reference, prompts, save_adapter, save_model, say, train

pytestmark = pytest.mark.filterwarnings("ignore")


class Server:
    """A running server.

    Attributes:
        url: where it answers.
        model: its folder.
        references: the adapters as transformers runs them.
    """

    def __init__(self, url: str, model: Path, references: dict[str, Any]) -> None:
        self.url, self.model, self.references = url, model, references

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def complete(self, prompt: list[int], **wish: Any) -> tuple[int, Any]:
        body = {"model": str(self.model), "prompt": prompt, "max_tokens": 10, "temperature": 0}
        options = {"ignore_eos": True, "return_token_ids": True, "vllm_xargs": wish}
        return self.post("/v1/completions", {**body, **options})

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=600) as answer:
            return answer.read().decode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    model = save_model(folder / "model")
    (model / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    adapters = {
        name: save_adapter(folder / name, model, seed=seed)
        for seed, name in enumerate(("one", "two"))
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    named = ",".join(f"{name}={path}" for name, path in adapters.items())
    options = "--dtype float32 --max-model-len 128 --max-num-seqs 16"
    command = [sys.executable, "-m", "peft_fsrl", "serve", named, "--base-model", str(model)]
    command += ["--port", str(port), f"--vllm-options={options} --kv-cache-memory-bytes 67108864"]
    env = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    scratch = folder / "scratch"
    scratch.mkdir()
    env["TMPDIR"] = str(scratch)
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(900):
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        references = {name: load_reference(model, path) for name, path in adapters.items()}
        yield Server(url, model, references)
    finally:
        process.terminate()
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    assert not list(scratch.glob("peft_fsrl*"))


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"fsrl_strength": "much"}, "fsrl_strength must be a finite number"),
        ({"fsrl_strength": float("nan")}, "fsrl_strength must be a finite number"),
        ({"fsrl_strength": float("inf")}, "fsrl_strength must be a finite number"),
        ({"fsrl_features": 21}, "fsrl_features must be a whole number from 0 to 20"),
        ({"fsrl_ablate": [96]}, "features 0 to 95"),
        ({"fsrl_adapter": "three"}, "expected one of ['one', 'two']"),
        ({"fsrl_phase": "decode"}, "fsrl_phase must be one of"),
        ({"fsrl_typo": 1}, "Unknown option fsrl_typo"),
    ],
)
def test_a_request_that_means_nothing_is_a_400(server: Server, wish: Any, says: str) -> None:
    status, answer = server.complete(prompts(1)[0], **wish)
    assert status == 400
    assert says in answer["error"]["message"]
    assert server.complete(prompts(1)[0])[0] == 200


def test_a_chat_is_steered_and_brings_its_features_along(server: Server) -> None:
    prompt = prompts(1)[0]
    words = " ".join(f"w{token}" for token in prompt)
    body = {"messages": [{"role": "user", "content": words}], "max_tokens": 10, "temperature": 0}
    body |= {"model": str(server.model), "ignore_eos": True, "return_token_ids": True}
    xargs = {"fsrl_features": 2, "fsrl_adapter": "two", "fsrl_strength": 0.5}
    status, answer = server.post("/v1/chat/completions", {**body, "vllm_xargs": xargs})
    assert status == 200
    expected, _ = say(server.references["two"], prompt, strength=0.5)
    assert answer["choices"][0]["token_ids"] == expected
    report = answer["kv_transfer_params"]["peft_fsrl"]
    assert (report["adapter"], report["strength"]) == ("two", 0.5)
    assert [token["position"] for token in report["tokens"]] == list(range(len(prompt) + 9))
    assert all(len(token["features"]) <= 2 for token in report["tokens"])
    _, plain = server.post("/v1/chat/completions", body)
    assert plain.get("kv_transfer_params") is None
    assert plain["choices"][0]["token_ids"] == say(server.references["one"], prompt)[0] != expected


def test_counters_stand_beside_those_of_vllm(server: Server) -> None:
    def read() -> dict[str, float]:
        lines = server.get("/metrics").splitlines()
        return {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith(("peft_fsrl", "vllm:prompt_tokens_total"))
        }

    before = read()
    prompt = prompts(1, seed=77)[0]
    _, answer = server.complete(prompt, fsrl_adapter="two", fsrl_features=20)
    # The engine writes at the end of a step, which may be after the answer.
    time.sleep(1)
    after = read()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    read_tokens = answer["kv_transfer_params"]["peft_fsrl"]["tokens"]
    # A step that was under way when the request ended counts too.
    tokens = grown['peft_fsrl_steered_tokens_total{adapter="two"}']
    assert tokens in (len(read_tokens), len(read_tokens) + 1)
    features = grown['peft_fsrl_steered_features_total{adapter="two"}']
    assert features >= sum(token["l0"] for token in read_tokens) > 0
    assert grown['peft_fsrl_steered_tokens_total{adapter="one"}'] == 0
    assert grown['peft_fsrl_nonfinite_tokens_total{adapter="two"}'] == 0
    assert any(name.startswith("vllm:prompt_tokens_total") for name in after)


def test_two_hundred_requests_each_get_their_own_answer(server: Server) -> None:
    rng = random.Random(0)
    shared = prompts(6, seed=8)
    wishes = [
        {
            "fsrl_adapter": rng.choice(("one", "two")),
            "fsrl_strength": rng.choice((0, 0.5, 1, 1, 1.5)),
            "fsrl_phase": rng.choice(("all", "all", "prompt", "generation")),
            "fsrl_ablate": rng.sample(range(96), rng.choice((0, 0, 30))),
        }
        for _ in range(200)
    ]
    asked = [(rng.choice(shared), wish) for wish in wishes]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda each: server.complete(each[0], **each[1]), asked))
    assert {status for status, _ in found} == {200}
    answers = [answer["choices"][0]["token_ids"] for _, answer in found]
    assert len({tuple(answer) for answer in answers}) > 30
    alone = [
        server.complete(prompt, **wish)[1]["choices"][0]["token_ids"] for prompt, wish in asked
    ]
    assert answers == alone
    for (prompt, wish), answer in zip(asked, answers, strict=True):
        expected, _ = say(
            server.references[wish["fsrl_adapter"]],
            prompt,
            strength=wish["fsrl_strength"],
            phase=wish["fsrl_phase"],
            ablated=wish["fsrl_ablate"],
        )
        assert answer == expected


def test_rollouts_of_a_server_are_those_of_the_model(server: Server, tmp_path: Path) -> None:
    # Last of all: training changes the server's first adapter.
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "model").symlink_to(server.model)
    (folder / "adapter").symlink_to(server.model.parent / "one")
    _, own = train("GRPO", folder, tmp_path / "a", generation_kwargs={"do_sample": False})
    settings = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url}
    # Several answers at temperature 0 are refused by vLLM; one token to choose from is as greedy.
    _, rollouts = train("GRPO", folder, tmp_path / "b", top_k=1, **settings)
    assert rollouts == own
    assert own[: len(own) // 2] != own[len(own) // 2 :]
