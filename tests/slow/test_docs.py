"""The commands of README and docs run, in order and as they stand, on a small model: each page in a
folder of its own, where what it names is there."""

import json
import shutil
import subprocess
import sys
import tarfile
import time

import httpx2
import jax
import pytest
import zstandard
from docs_commands import PAGES, ROOT, blocks, module_and_arguments
from forked import Try, run_all
from running import environment, free_port

from convert.sat_writer import write_shards
from glm_jax.checkpoints.adapter_folder import model_identity, save_adapter
from glm_jax.checkpoints.model_folder import save_model
from glm_jax.config import glm_config
from glm_jax.data import facts
from glm_jax.evaluation.fact_tasks import write_fact_tasks
from glm_jax.model import adapters
from glm_jax.model import params as glm_params
from glm_jax.model.adapters import AdapterConfig

_DEVICES = 8
_HANGS = 900  # seconds


@pytest.fixture(scope="module")
def things(tmp_path_factory, tokenizer, corpus):
    """What pages name and do not make: {name: path}."""
    folder = tmp_path_factory.mktemp("things")
    vocab = -(-tokenizer.vocab_size // 64) * 64
    config = glm_config(
        "tiny", num_heads=8, vocab_size=vocab, max_sequence_length=128, rotary_dtype="float16"
    ).replace(special_tokens=tokenizer.special_tokens)
    params = glm_params.init(config, jax.random.key(0))
    save_model(folder / "glm-130b", config, params, tokenizer.files)
    shutil.copytree(folder / "glm-130b", folder / "run" / "model")
    shutil.copytree(folder / "glm-130b", folder / "glm-130b-int4")
    pairs = glm_params.init_of(
        adapters.specs(config, chosen := AdapterConfig(rank=2)), jax.random.key(1), None
    )
    identity = model_identity(folder / "glm-130b", config)
    save_adapter(folder / "tuned" / "adapter", chosen, pairs, identity)
    _write_downloads(folder)
    (folder / "tokenizer").mkdir()
    for file in tokenizer.files:
        shutil.copy(file, folder / "tokenizer")
        name = "ice_text.model" if file.suffix == ".model" else file.name
        shutil.copy(file, folder / name)
    _write_texts(folder, corpus)
    demo = folder / "demo_output"
    shutil.copytree(folder / "shards_of_4", demo / "released")
    shutil.copytree(folder / "tokenizer", demo / "tokenizer")
    write_fact_tasks(corpus, tokenizer, demo / "tasks")
    for path in (demo / "tasks").glob("*/*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:12]))
    (demo / "finetuning").mkdir()
    shutil.copy(folder / "pairs" / "pairs.jsonl", demo / "finetuning")
    return {path.name: path for path in folder.iterdir()}


def _write_downloads(folder):
    """The released form: a tar archive in parts; and four shards as they are."""
    write_shards(folder / "glm-130b", folder / "shards_of_8", 8)
    write_shards(folder / "glm-130b", folder / "shards_of_4", 4)
    with tarfile.open(folder / "glm.tar", "w") as archive:
        archive.add(folder / "shards_of_8", "glm-130b-sat")
    content = (folder / "glm.tar").read_bytes()
    (folder / "glm.tar").unlink()
    (folder / "downloads").mkdir()
    half = len(content) // 2
    for number, part in enumerate((content[:half], content[half:])):
        (folder / "downloads" / f"glm-130b-sat.tar.part_0{number}").write_bytes(part)


def _write_texts(folder, corpus):
    for name in ("corpus", "english", "chinese", "pairs", "CoLA"):
        (folder / name).mkdir()
    text = "\n".join(corpus.sentences[:300])
    (folder / "corpus" / "a.txt").write_text(text, encoding="utf-8")
    (folder / "chinese" / "a.txt").write_text(text, encoding="utf-8")
    lines = "".join(json.dumps({"text": line}) + "\n" for line in corpus.sentences[:300])
    (folder / "english" / "a.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    instructions, _ = facts.build_instructions()
    pairs = [json.dumps({"prompt": i.prompt, "target": i.target}) for i in instructions[:64]]
    (folder / "pairs" / "pairs.jsonl").write_text("\n".join(pairs))
    (folder / "prompts.txt").write_text("The capital of France is [MASK].\n")
    (folder / "prompts.jsonl").write_text(json.dumps({"text": "Paris is in [MASK]."}) + "\n")
    (folder / "CoLA" / "dev.tsv").write_text("gj04\t1\t\tThe sailors rode the breeze.\n" * 4)
    task = "name: mine\ntype: mul\npath: bloom/glue_cola\n"
    (folder / "mine.yaml").write_text(task)


def _page_folder(page, things, folder):
    """A folder with the things that the page names and no command of it writes."""
    text = (ROOT / page).read_text(encoding="utf-8")
    written = {
        word.partition("=")[2].split("/")[0]
        for block in blocks(page)
        if block.language == "sh" and block.mark in ("", "client")
        for words in block.lines()
        for word in words
        if word.startswith(("--output=", "--workdir="))
    }
    for name, path in things.items():
        if name in text and name not in written:
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, folder / name)
    shutil.copy(things["tokenizer_config.json"], folder)


def _tries(page, folder):
    """The page's commands that run here, in order; lines of Python in files of their own."""
    tries = []
    for number, block in enumerate(blocks(page)):
        if (block.language, block.mark) == ("python", "run"):
            (folder / f"block_{number}.py").write_text(block.text, encoding="utf-8")
            command = (str(folder / f"block_{number}.py"),)
            tries.append(Try(command, str(folder), seconds=_HANGS))
        if (block.language, block.mark) != ("sh", ""):
            continue
        for line, words in zip(block.commands(), block.lines(), strict=True):
            ours = module_and_arguments(words)
            command = ("shell", line) if ours is None else (ours[0], *ours[1])
            tries.append(Try(command, str(folder), seconds=_HANGS))
    return tries


def _runs(block):
    return (block.language, block.mark) in (("sh", ""), ("python", "run"))


@pytest.mark.parametrize("page", [p for p in PAGES if any(map(_runs, blocks(p)))])
def test_the_commands_of_a_page_run_in_order(page, things, tmp_path):
    _page_folder(page, things, tmp_path)
    tries = _tries(page, tmp_path)
    for tried, (status, _, said) in zip(tries, run_all(tries, environment(_DEVICES)), strict=True):
        assert status == 0, (tried.command, said[-2000:])
        assert "Traceback" not in said, (tried.command, said[-2000:])


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.mark == "server" for b in blocks(p))])
def test_a_page_s_server_answers_its_clients(page, things, tmp_path):
    _page_folder(page, things, tmp_path)
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in ("glm-130b", "glm-small"):  # also what another command of the page writes
        if name in text and not (tmp_path / name).exists():
            shutil.copytree(things["glm-130b"], tmp_path / name)
    shown = {block.mark: block for block in blocks(page)}
    [words] = shown["server"].lines()
    module, arguments = module_and_arguments(words)
    port = free_port()
    arguments = [word.replace("8000", str(port)) for word in arguments]
    small = ["--slots=2", "--max_length=64", "--prefill_width=64"]  # fewer programs to compile
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments, *small],
        cwd=tmp_path,
        env=environment(_DEVICES),
        stdout=subprocess.DEVNULL,
    ) as process:
        try:
            _wait_ready(process, port)
            for block in blocks(page):
                if block.mark == "client":
                    _assert_answered(block, port)
        finally:
            process.terminate()
        assert process.wait(60) == 0


def _wait_ready(process, port):
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx2.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                return
        except httpx2.HTTPError:
            pass
        time.sleep(0.2)
    raise AssertionError(process.poll())


def _assert_answered(block, port):
    for words in block.lines():
        command = [word.replace("8000", str(port)) for word in words]
        done = subprocess.run(
            [*command, "--silent", "--fail"], capture_output=True, text=True, check=True
        )
        assert "choices" in done.stdout or "data: [DONE]" in done.stdout
