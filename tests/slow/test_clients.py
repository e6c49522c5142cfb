"""Clients that people use get what the server answers to a plain request, each in a process of the
environment that `make .venv-clients` makes."""

import json
import signal
import subprocess
from pathlib import Path

import httpx2
import numpy as np
import pytest
from running import ROOT, ServerProcess, save_tiny

PYTHON = ROOT / ".venv-clients" / "bin" / "python"
SCRIPTS = Path(__file__).parent / "clients"
TEXTS = ["The capital of France is Paris.", "日本", "a"]
MAX_TOKENS = 8


@pytest.fixture(scope="module")
def asked(tokenizer, tmp_path_factory):
    """What each client is to ask, of a server that runs."""
    if not PYTHON.exists():
        pytest.skip(f"no environment of clients: make {PYTHON.parent.parent.name}")
    folder = tmp_path_factory.mktemp("small")
    save_tiny(folder, tokenizer)
    given = ["--name=small", "--slots=2", "--chat_template=configs/chat/dialogue.jinja"]
    server = ServerProcess(f"--checkpoint={folder}", f"--tokenizer={folder}", *given)
    try:
        server.wait_ready()
        url = server.url + "/v1"
        text = "The capital of"
        yield {"url": url, "model": "small", "text": text, "texts": TEXTS, "max_tokens": MAX_TOKENS}
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
    finally:
        server.process.kill()
        server.process.communicate()


@pytest.fixture(scope="module")
def expected(asked):
    def post(path, **fields):
        response = httpx2.post(asked["url"] + path, json={"model": "small"} | fields, timeout=120)
        return response.raise_for_status().json()

    settings = {"temperature": 0, "max_tokens": MAX_TOKENS}
    messages = [{"role": "user", "content": asked["text"]}]
    completion = post("/completions", prompt=asked["text"], **settings)
    chat = post("/chat/completions", messages=messages, **settings)
    assert chat["usage"]["completion_tokens"] == MAX_TOKENS
    return {
        "models": ["small"],
        "completion": completion["choices"][0]["text"],
        "chat": chat["choices"][0]["message"]["content"],
        "embeddings": [e["embedding"] for e in post("/embeddings", input=TEXTS)["data"]],
    }


@pytest.mark.parametrize("client", ["openai", "litellm", "langchain", "llm"])
def test_a_client_gets_what_the_server_answers(asked, expected, client, tmp_path):
    variables = {
        "HOME": str(tmp_path),
        "LLM_USER_PATH": str(tmp_path),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it loads one
        "OPENAI_API_KEY": "none",
    }
    ran = subprocess.run(
        [PYTHON, SCRIPTS / f"ask_with_{client}.py", json.dumps(asked)],
        capture_output=True,
        text=True,
        env=variables,
        cwd=tmp_path,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    got = json.loads(ran.stdout.splitlines()[-1])
    assert "".join(got.pop("stream")) == got["chat"]
    np.testing.assert_allclose(got.pop("embeddings"), expected["embeddings"], atol=1e-5)
    assert got
    assert got == {name: expected[name] for name in got}
    print(f"{client}: {', '.join(got)}, stream, embeddings")
