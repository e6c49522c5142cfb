"""Each command line in each situation that inputs, outputs and numbers can be in: one line on
stderr and the right status, never a trace."""

import json
import shutil

import jax
import pytest
from conftest import GOLDEN
from evaluation_folder import write_evaluation
from forked import Try, run_all
from running import ROOT, environment

from glm_jax.checkpoints.adapter_folder import model_identity, save_adapter
from glm_jax.config import glm_config
from glm_jax.model import adapters
from glm_jax.model import params as glm_params
from glm_jax.model.adapters import AdapterConfig

# Of each command line: its flags, then which of them are files, folders and outputs. All paths
# are those of the fixture's folder; "" is a path that is no flag.
TRAIN = {
    "config": f"{ROOT}/configs/train_tiny.py",
    "workdir": "OUT",
    "config.data.files": "text.txt",
    "config.data.tokenizer": "model",
    "config.model.vocab_size": "4096",
    "config.data.sequence_length": "48",
    "config.steps": "1",
    "config.peak_flops": "1e9",
}
FINETUNE = {
    "config": f"{ROOT}/configs/finetune_demo.py",
    "workdir": "OUT",
    "checkpoint": "model",
    "config.data.files": "pairs.jsonl",
    "config.data.sequence_length": "48",
    "config.steps": "1",
    "config.peak_flops": "1e9",
}
DECODE = {"checkpoint": "model", "input": "prompts.txt", "output": "OUT", "max_length": "24"}
EVALUATE = {"checkpoint": "model", "task": "tasks", "data": "data", "output": "OUT"}
COMMANDS = {
    "launch.train": (TRAIN, ["config.data.files"], ["config.data.tokenizer"], ["workdir"]),
    "launch.finetune": (FINETUNE, ["config.data.files"], ["checkpoint"], ["workdir"]),
    "launch.plot": ({"workdir": "folder"}, [], ["workdir"], []),
    "launch.plan": ({"hardware": "a100-40g", "output": "OUT"}, [], [], []),
    "launch.benchmark": ({"suite": "decode_step", "output": "OUT"}, [], [], ["output"]),
    "launch.tune": (
        {"measure": "true", "checkpoint": "model", "output": "OUT"}, [], ["checkpoint"], ["output"],
    ),
    "launch.demo": ({"output": "OUT", "steps": "1"}, [], [], ["output"]),
    "launch.train_tokenizer": (
        {"input": "text.txt", "output": "OUT", "num_text_tokens": "400"},
        ["input"], [], ["output"],
    ),
    "launch.prepare_data": (
        {"input": "text.txt", "output": "OUT", "tokenizer": "model", "processes": "1"},
        ["input"], ["tokenizer"], ["output"],
    ),
    "launch.prepare_task": (
        {"dataset": "glue_cola", "input": "dev.tsv", "output": "OUT",
         "prompts": f"{ROOT}/configs/prompts"},
        ["input"], ["prompts"], ["output"],
    ),
    "launch.generate": (
        {"checkpoint": "model", "input": "prompts.txt", "max_length": "24"},
        ["input"], ["checkpoint", "tokenizer", "adapter"], [],
    ),
    "launch.decode": (DECODE, ["input"], ["checkpoint", "tokenizer"], ["output"]),
    # Its data and its output come after the model: their cases take a second each.
    "launch.evaluate": (EVALUATE, ["task"], ["checkpoint"], []),
    "launch.serve": ({"checkpoint": "model"}, ["api_keys"], ["checkpoint"], []),
    "convert.inspect": ({"": "shards"}, [], [""], []),
    "convert.verify": ({"num_heads": "8", "": "shards", " ": "shards"}, [], ["", " "], []),
    "convert.sat_to_orbax": (
        {"input": "shards", "output": "OUT", "num_heads": "8", "max_sequence_length": "64"},
        [], ["input", "tokenizer"], ["output"],
    ),
    "convert.orbax_to_sat": (
        {"input": "model", "output": "OUT", "shards": "2"}, [], ["input", "adapter"], ["output"],
    ),
    "convert.orbax_to_safetensors": (
        {"input": "model", "output": "OUT"}, [], ["input"], ["output"],
    ),
    "convert.merge_adapter": (
        {"input": "model", "adapter": "adapter", "output": "OUT"},
        [], ["input", "adapter"], ["output"],
    ),
}  # fmt: skip
FILES = ("missing", "empty", "binary", "utf16", "unreadable", "folder")
FOLDERS = ("missing", "empty", "folder", "unreadable_folder", "text.txt", "run")
# Which are no errors: a file is replaced, there is nothing to do, a bad line has a record.
GOOD = {
    ("launch.generate", "input", "empty"),
    ("launch.decode", "input", "binary"),
    ("launch.benchmark", "output", "full"),  # found when it has measured, minutes later
    ("launch.plot", "workdir", "run"),
}
WITHOUT_NUMBERS = ("launch.plot", "launch.prepare_task", "convert.merge_adapter")
BAD_NUMBERS = ("nan", "inf", "-inf", "-1", "x", "1e400", "99999999999999999999", "")
OUTPUTS = ("read_only/x", "text.txt", "text.txt/x", "full")


def _write_inputs(folder, tokenizer, corpus):
    write_evaluation(folder, tokenizer, corpus, 2)
    (folder / "text.txt").write_text("\n".join(corpus.sentences[:200]), encoding="utf-8")
    (folder / "prompts.txt").write_text("Paris is in [MASK].\n")
    (folder / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "target": "b"}))
    (folder / "dev.tsv").write_text("gj04\t1\t\tThe sailors rode the breeze.\n")
    (folder / "run").mkdir()
    line = {"step": 1, "loss": 1.0, "is_skipped": False, "is_spike": False, "activation_scale": []}
    (folder / "run" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    shutil.copytree(GOLDEN / "checkpoints" / "tp2", folder / "shards")
    config = glm_config("tiny", num_heads=8, vocab_size=4096, max_sequence_length=64)
    stored = json.loads((folder / "model" / "config.json").read_text())
    config = config.replace(vocab_size=stored["vocab_size"])
    chosen = AdapterConfig(rank=2)
    pairs = glm_params.init_of(adapters.specs(config, chosen), jax.random.key(0), None)
    save_adapter(folder / "adapter", chosen, pairs, model_identity(folder / "model", config))
    (folder / "empty").write_bytes(b"")
    (folder / "binary").write_bytes(bytes(range(256)) * 20)
    (folder / "utf16").write_text("Paris is in [MASK].\n" * 20, encoding="utf-16")
    (folder / "unreadable").write_text("{}")
    (folder / "unreadable").chmod(0)
    (folder / "folder").mkdir()
    (folder / "unreadable_folder").mkdir(mode=0)
    (folder / "read_only").mkdir(mode=0o555)


def _arguments(flags):
    return tuple(v if not name.strip() else f"--{name}={v}" for name, v in flags.items())


def _tries(folder):
    """{(module, flag, situation): Try}; each has an output of its own."""
    tries = {}
    for module, (flags, files, folders, outputs) in COMMANDS.items():
        situations = [(flag, s) for flag in files for s in FILES]
        situations += [(flag, s) for flag in folders for s in FOLDERS]
        situations += [(flag, s) for flag in outputs for s in OUTPUTS]
        for flag, situation in situations:
            if (module, flag, situation) in GOOD:
                continue
            is_full = situation == "full"
            chosen = flags | ({} if is_full else {flag: situation})
            place = f"out{len(tries)}"
            command = (module, *(a.replace("OUT", place) for a in _arguments(chosen)))
            tries[module, flag, situation] = Try(command, str(folder), is_full)
        tries[module, "numbers", ""] = Try(
            (module, *_arguments(flags)), str(folder), bad_numbers=BAD_NUMBERS
        )
    return tries


@pytest.fixture(scope="module")
def answers(tmp_path_factory, tokenizer, corpus):
    folder = tmp_path_factory.mktemp("situations")
    _write_inputs(folder, tokenizer, corpus)
    tries = _tries(folder)
    done = run_all(list(tries.values()), environment(1, JAX_ENABLE_COMPILATION_CACHE="false"))
    return dict(zip(tries, done, strict=True))


ALL = list(_tries("x"))
CASES = [case for case in ALL if case[1] != "numbers"]


@pytest.mark.parametrize("case", [c for c in ALL if c[1] == "numbers"], ids=lambda c: c[0])
def test_no_flag_takes_a_number_that_makes_no_sense(answers, case):
    status, stdout, stderr = answers[case]
    assert status == 0, stderr[-1500:]
    statuses = json.loads(stdout)
    assert bool(statuses) == (case[0] not in WITHOUT_NUMBERS)
    taken = {given for given, status in statuses.items() if status != 2}
    # These favour short answers, and repetition.
    penalties = ("length_penalty", "presence_penalty", "frequency_penalty")
    assert taken <= {f"--{name}=-1" for name in penalties}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case))
def test_one_line_and_the_right_status(answers, case):
    status, _, stderr = answers[case]
    assert status == 1, (status, stderr[-1500:])
    assert "Traceback" not in stderr, stderr[-1500:]
    last = [line for line in stderr.strip().splitlines() if line][-1]
    assert last.startswith("error: ")
    assert len(last) < 600
    assert sum(line.startswith("error:") for line in stderr.splitlines()) == 1
