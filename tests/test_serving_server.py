"""The OpenAI-compatible server over loopback, by its own client. `.ci/serving` runs this in vLLM's environment."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: .ci/serving runs these tests in an environment that has it")

import openai

from fastqadapter.integrations.vllm.export import export_for_vllm
from serving import Answer, generated, load_all, save_adapters, save_tiny

PROMPT = list(range(5, 45))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("server")
    adapters = save_adapters(save_tiny(root / "base", "llama"), root / "trained", "shared", std=0.3)
    export_for_vllm(root / "base", adapters, root / "served")
    return root


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[openai.OpenAI]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "fastqadapter", "serve", str(root / "served"), "--served-model-name", "tiny"]
    options = [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "256",
    ]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with open(root / "server.log", "w") as log:
        server = subprocess.Popen([*command, *options], stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        for _ in range(300):
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                assert server.poll() is None, (root / "server.log").read_text()[-3000:]
                time.sleep(1)
        yield client
        assert server.poll() is None, "the server has died"
    finally:
        server.terminate()
        server.wait(timeout=60)


def completion(client: openai.OpenAI, **xargs: object) -> Answer:
    found = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=16, temperature=0, logprobs=1,
        extra_body={"vllm_xargs": xargs, "ignore_eos": True, "return_token_ids": True},
    )  # fmt: skip
    [choice] = found.choices
    return Answer(choice.token_ids, choice.logprobs.token_logprobs)


@pytest.mark.parametrize("extra", [{}, {"adapters": "brief=0.5", "alpha_0": 0.4, "alpha_tilde": 1.5}])
def test_completion_is_that_of_generate(client: openai.OpenAI, root: Path, extra: dict[str, object]) -> None:
    model = load_all(root / "base", {name: root / "trained" / name for name in ("polite", "brief")})
    expected, found = generated(model, PROMPT, 16, extra), completion(client, **extra)
    assert found.tokens == expected.tokens and found.log_probs == pytest.approx(expected.log_probs, abs=1e-3)


def test_chat_streams(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "w7 w8 w9"}], "max_tokens": 12, "temperature": 0}
    extra = {"vllm_xargs": {"adapters": ["brief=0.5"]}, "ignore_eos": True}
    whole = client.chat.completions.create(**asked, extra_body=extra).choices[0].message.content
    parts = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**asked, extra_body=extra, stream=True)
    ]
    assert "".join(parts) == whole and len([part for part in parts if part]) > 3


@pytest.mark.parametrize(
    ("xargs", "message"),
    [
        ({"adapters": "rude"}, "adapter 'rude' is not served; served are polite, brief"),
        ({"alpha_tilde": 0}, "alpha_tilde=0 is not a finite number > 0"),
        ({"alpha0": 1}, "did you mean alpha_0?"),
    ],
)
def test_mistakes_are_a_400(client: openai.OpenAI, xargs: dict[str, object], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        completion(client, **xargs)
    assert message in error.value.message
    assert len(completion(client).tokens) == 16


def test_serve_says_what_is_wrong(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastqadapter", "serve", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2 and "is not a folder that `fastqadapter export-vllm` wrote" in done.stderr
    assert len(done.stderr.splitlines()) == 1
