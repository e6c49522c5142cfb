"""Evaluations from the command line."""

import json
import subprocess
import sys

import pytest
from evaluation_folder import write_evaluation
from forked import Try, run_all
from running import ROOT, environment


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, corpus):
    return write_evaluation(tmp_path_factory.mktemp("evaluation"), tokenizer, corpus, 12)


def _evaluations(folder, made):
    """{name: command}, in order; their outputs are in `made`."""
    model = ("launch.evaluate", f"--checkpoint={folder}/model")
    given = (*model, f"--task={folder}/tasks", f"--data={folder}/data")
    choose = (*model, f"--task={folder}/tasks/choose.yaml")
    bad = (*choose, f"--data={made}/data")
    return {
        "first": (*given, f"--output={made}/a"),
        "second": (*choose, given[-1], f"--output={made}/b", "--quantization=int4"),
        "compared": ("launch.evaluate", f"--compare={made}/a/results.json,{made}/b/results.json"),
        "checked": (*given, "--check"),
        "refused": (*given, f"--output={made}/a", "--quantization=int8"),
        "bad, checked": (*bad, "--check"),
        "bad": (*bad, f"--output={made}/out"),
        "flags": ("launch.evaluate", "--task=x"),
    }


def _preparations(made):
    cola = ("launch.prepare_task", f"--output={made}", "--dataset=glue_cola")
    return {
        "prepared": (*cola, f"--input={made}/dev.tsv"),
        "missing": (*cola, f"--input={made}/none.tsv"),
        "unknown": (*cola, "--dataset=glue", f"--input={made}/dev.tsv"),
    }


@pytest.fixture(scope="module")
def answers(folder, tmp_path_factory):
    """The folder of outputs; and {name: (status, stdout, stderr)}, all in forks of one process."""
    made = tmp_path_factory.mktemp("made")
    (made / "data" / "choose").mkdir(parents=True)
    lines = (folder / "data" / "choose" / "en.jsonl").read_text().splitlines(keepends=True)
    bad = lines[0] + '{"inputs": [1]}\n' + lines[1]
    (made / "data" / "choose" / "en.jsonl").write_text(bad)
    (made / "dev.tsv").write_text("gj04\t1\t\tThe cat sat.\n")
    commands = _evaluations(folder, made) | _preparations(made)
    tries = [Try(command, str(ROOT)) for command in commands.values()]
    return made, dict(zip(commands, run_all(tries, environment(1)), strict=True))


def test_evaluate_compare_and_check(answers):
    made, of = answers
    status, shown, said = of["first"]
    assert status == 0, said
    results = json.loads((made / "a" / "results.json").read_text())
    assert list(results["tasks"]) == ["choose", "fill", "predict"]
    for name in results["tasks"]:
        assert f"\n{name} " in shown
    assert results["tasks"]["predict"]["examples"] == 24
    assert {"results.md", "results.png", "records"} <= {p.name for p in (made / "a").iterdir()}
    status, _, said = of["second"]
    assert status == 0, said
    status, shown, said = of["compared"]
    assert status == 0, said
    assert len(shown.splitlines()) == 1 + 2
    status, shown, _ = of["checked"]
    assert status == 0
    assert "3 tasks: all data can be used" in shown
    status, _, said = of["refused"]
    assert status == 1
    assert "quantization was None and is 'int8'" in said


def test_bad_data_and_flags_are_one_line(answers):
    _, of = answers
    status, shown, said = of["bad, checked"]
    assert status == 1
    assert "en.jsonl:2: choices: missing" in shown
    assert said.strip().splitlines()[-1] == "error: 1 lines to mend"
    status, _, said = of["bad"]
    assert status == 1
    assert "en.jsonl:2: choices: missing" in said.splitlines()[-1]
    assert of["flags"][0] == 2


def test_prepare_task(answers):
    _, of = answers
    status, shown, said = of["prepared"]
    assert status == 0, said
    assert shown.count("validation.jsonl: 1 lines") == 3
    status, _, said = of["missing"]
    assert status == 1
    assert "none.tsv: No such file" in said
    status, _, said = of["unknown"]
    assert status == 1
    assert "one of clue_afqmc" in said


@pytest.mark.slow  # the harness is long to import; tests/evaluation/test_harness.py has its parts
def test_harness(folder, tmp_path):
    """A local task of the harness's own format, through its own command."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e .[harness]")
    lines = [
        {"question": "The capital of France is", "choices": ["Paris", "Rome"], "gold": 0},
        {"question": "日本的首都是", "choices": ["北京", "东京"], "gold": 1},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = (
        "dataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path}/data.jsonl\ntest_split: test\n"
    )
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "pick.yaml").write_text(
        f"task: pick\n{common}output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{gold}}"\n'
        "metric_list:\n  - metric: acc\n"
    )
    (tmp_path / "tasks" / "write.yaml").write_text(
        f"task: write\n{common}output_type: generate_until\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{choices[gold]}}"\n'
        "generation_kwargs:\n  until: ['。']\n  max_gen_toks: 4\n"
        "metric_list:\n  - metric: exact_match\n"
    )
    (tmp_path / "tasks" / "roll.yaml").write_text(
        f"task: roll\n{common}output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{question}}"\n'
        "metric_list:\n  - metric: bits_per_byte\n"
    )
    command = [
        *(sys.executable, "-m", "launch.harness"),
        *("--model", "glm_jax", "--model_args", f"checkpoint={folder}/model,mesh=1;1;1"),
        *("--tasks", "pick,write,roll", "--include_path", str(tmp_path / "tasks")),
        *("--output_path", str(tmp_path / "out")),
    ]
    variables = environment(
        1,
        PYTHONPATH=str(ROOT),  # the harness itself takes PyTorch
        HF_HOME=str(tmp_path / "cache"),
        HF_HUB_OFFLINE="1",
    )
    done = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    [path] = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    assert results["pick"]["acc,none"] in (0.0, 0.5, 1.0)
    assert results["write"]["exact_match,none"] in (0.0, 0.5, 1.0)
    # Random weights: about log2(vocabulary) bits for each of few bytes.
    assert 1 < results["roll"]["bits_per_byte,none"] < 12
