"""Evaluations from the command line."""

import json
import subprocess
import sys

import pytest
from evaluation_folder import write_evaluation
from running import ROOT, environment


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, corpus):
    return write_evaluation(tmp_path_factory.mktemp("evaluation"), tokenizer, corpus, 12)


def _run(*arguments, module="launch.evaluate", **variables):
    command = [sys.executable, "-m", module, *arguments]
    variables = environment(1, **variables)
    return subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300
    )


def test_evaluate_compare_and_check(folder, tmp_path):
    given = [f"--checkpoint={folder}/model", f"--task={folder}/tasks", f"--data={folder}/data"]
    first = _run(*given, f"--output={tmp_path}/a")
    assert first.returncode == 0, first.stderr
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert list(results["tasks"]) == ["choose", "fill", "predict"]
    for name in results["tasks"]:
        assert f"\n{name} " in first.stdout
    assert results["tasks"]["predict"]["examples"] == 24
    assert {"results.md", "results.png", "records"} <= {p.name for p in (tmp_path / "a").iterdir()}
    choose = [f"--task={folder}/tasks/choose.yaml", given[0], given[2]]
    second = _run(*choose, f"--output={tmp_path}/b", "--quantization=int4")
    assert second.returncode == 0, second.stderr
    files = f"{tmp_path}/a/results.json,{tmp_path}/b/results.json"
    compared = _run(f"--compare={files}")
    assert compared.returncode == 0, compared.stderr
    rows = compared.stdout.splitlines()
    assert len(rows) == 1 + 2
    checked = _run(*given, "--check")
    assert checked.returncode == 0
    assert "3 tasks: all data can be used" in checked.stdout
    refused = _run(*given, f"--output={tmp_path}/a", "--quantization=int8")
    assert refused.returncode == 1
    assert "quantization was None and is 'int8'" in refused.stderr


def test_bad_data_and_flags_are_one_line(folder, tmp_path):
    data = tmp_path / "data" / "choose"
    data.mkdir(parents=True)
    lines = (folder / "data" / "choose" / "en.jsonl").read_text().splitlines(keepends=True)
    (data / "en.jsonl").write_text(lines[0] + '{"inputs": [1]}\n' + lines[1])
    given = [f"--checkpoint={folder}/model", f"--task={folder}/tasks/choose.yaml"]
    given.append(f"--data={tmp_path}/data")
    checked = _run(*given, "--check")
    assert checked.returncode == 1
    assert "en.jsonl:2: choices: missing" in checked.stdout
    assert checked.stderr.strip().splitlines()[-1] == "error: 1 lines to mend"
    failed = _run(*given, f"--output={tmp_path}/out")
    assert failed.returncode == 1
    assert "en.jsonl:2: choices: missing" in failed.stderr.splitlines()[-1]
    assert _run("--task=x").returncode == 2


def test_prepare_task(tmp_path):
    (tmp_path / "dev.tsv").write_text("gj04\t1\t\tThe cat sat.\n")
    run = lambda *more: _run(f"--output={tmp_path}", *more, module="launch.prepare_task")
    done = run("--dataset=glue_cola", f"--input={tmp_path}/dev.tsv")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation.jsonl: 1 lines") == 3
    missing = run("--dataset=glue_cola", f"--input={tmp_path}/none.tsv")
    assert missing.returncode == 1
    assert "none.tsv: No such file" in missing.stderr
    unknown = run("--dataset=glue", f"--input={tmp_path}/dev.tsv")
    assert unknown.returncode == 1
    assert "one of clue_afqmc" in unknown.stderr


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
    done = _run(
        *("--model", "glm_jax", "--model_args", f"checkpoint={folder}/model,mesh=1;1;1"),
        *("--tasks", "pick,write,roll", "--include_path", str(tmp_path / "tasks")),
        *("--output_path", str(tmp_path / "out")),
        module="launch.harness",
        PYTHONPATH=str(ROOT),  # the harness itself takes PyTorch
        HF_HOME=str(tmp_path / "cache"),
        HF_HUB_OFFLINE="1",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    [path] = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    assert results["pick"]["acc,none"] in (0.0, 0.5, 1.0)
    assert results["write"]["exact_match,none"] in (0.0, 0.5, 1.0)
    # Random weights: about log2(vocabulary) bits for each of few bytes.
    assert 1 < results["roll"]["bits_per_byte,none"] < 12
