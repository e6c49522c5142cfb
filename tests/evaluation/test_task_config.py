"""Task files: which fields there are, what they may say, whose modules run."""

import dataclasses

import pytest
from running import ROOT

from glm_jax.evaluation.task_config import TaskConfig, TaskError, find_tasks, load_task
from glm_jax.evaluation.tasks import (
    CrowsPairs,
    Lambada,
    MultipleChoice,
    Pile,
    StereoSet,
    task_class,
)

# As the released code's files spell them: hyphens, underscores, both in one name.
ORIGINAL = {
    "mmlu": """
name: "MMLU"
type: "mul"
module: "tasks.mmlu.task.MMLU"
path: "MMLU"
file-pattern:
  stem: "stem/*.json"
  other: "other/*.json"
no-tokenized: true
micro-batch-size: 8
max_seq-length: 896
""",
    "lambada": """
name: "LAMBADA"
type: "gen"
module: "tasks.lambada.task.LAMBADA"
path: "lambada/lambada"
file-pattern:
  test: "**/test.jsonl"
sampling_strategy: "BeamSearchStrategy"
num_beams: 16
max_gen_length: 5
use_task_mask: true
""",
    "pile": """
name: "Pile"
type: "lm"
module: "tasks.language-modeling.pile.Pile"
path: "pile"
file-pattern:
  test: "**/test_tokenized.jsonl"
generation-length: 1024
use_task_mask: true
""",
    "stereoset": """
name: "StereoSet"
type: "mul"
path: "data"
module: "tasks.ethnic.stereoset.tasks.StereoSetTask"
use_task_mask: True
file-pattern:
  test: "**/stereoset-dataset.jsonl"
micro-batch-size: 64
""",
    "crows": 'name: C\ntype: mul\npath: d\nmodule: "tasks.ethnic.crows-pair.tasks.CrowsPairTask"\n',
    "cmrc": 'name: "CMRC2018"\ntype: "gen"\npath: "CLUE/cmrc2018"\n',
}
CLASSES = {
    "mmlu": MultipleChoice,
    "lambada": Lambada,
    "pile": Pile,
    "stereoset": StereoSet,
    "crows": CrowsPairs,
}


@pytest.mark.parametrize("name", ORIGINAL)
def test_the_originals_files_load(tmp_path, name):
    (tmp_path / "task.yaml").write_text(ORIGINAL[name])
    config = load_task(tmp_path / "task.yaml")
    if name in CLASSES:
        assert task_class(config) is CLASSES[name]
    if name == "mmlu":
        assert (config.max_seq_length, config.micro_batch_size) == (896, 8)
        assert dict(config.file_pattern) == {"stem": "stem/*.json", "other": "other/*.json"}
        assert config.no_tokenized
    if name == "cmrc":
        assert config.metrics == ("EM", "F1")
        assert config.file_pattern == (("all", "**/*.json*"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("type: mul\npath: x", "'name' is missing"),
        ("name: a\ntype: mull\npath: x", "type='mull'"),
        ("name: a\ntype: mul\npath: x\nnum_beam: 3", "unknown field 'num_beam'"),
        ("name: a\ntype: mul\npath: x\nnum_beams: 3", "num_beams is not for tasks of type 'mul'"),
        ("name: a\ntype: gen\npath: x\nnum-beams: many", "num_beams: expected int, got 'many'"),
        ("name: a\ntype: mul\npath: x\nunidirectional: true", "set use_task_mask"),
        ("name: a\ntype: gen\npath: x\nsampling_strategy: Best", "sampling_strategy='Best'"),
        ("name: a\ntype: other\npath: x", "takes a module"),
        ("name: a\ntype: mul\npath: x\nmicro-batch-size: 1\nmicro_batch_size: 2", "given twice"),
        ("name: a\ntype: mul\npath: x\nfile-pattern: 3", "file_pattern=3"),
        ("- a\n- b", "no fields"),
        ("name: " + "[" * 100_000, "nested too deeply"),
        ("- " * 20_000 + "a", "nested too deeply"),
        ("name: &a [x]\ntype: *a\npath: x", "task.yaml:2 is no YAML: an alias"),
        ("name: a\ntype: mul\npath: !!timestamp 2020-13-45", "is no YAML"),
        ("name: a\nname: b\ntype: mul\npath: x", "'name' is given twice"),
        ("name: a\ntype: mul\npath: {b: c}", "path: expected str, got {'b': 'c'}"),
        ("name: ..\ntype: mul\npath: x", "'..': no name"),
        ("name: a\ntype: mul\npath: x\nfile-pattern: {../b: x}", "'../b': no name"),
        ("name: a\ntype: mul\npath: x\nfile-pattern: ../x", "a pattern below path"),
        ("name: a\ntype: mul\npath: x\nfile-pattern: /x", "a pattern below path"),
        ("name: a\ntype: gen\npath: x\nlength_penalty: .nan", "length_penalty=nan"),
        ("name: a\ntype: gen\npath: x\nlength_penalty: 1.0e+30", "length_penalty=1e+30"),
        ("name: a\ntype: gen\npath: x\nnum_beams: 100000", "num_beams=100000: from 1 to 128"),
        ("name: a\ntype: gen\npath: x\nmax-gen-length: 2147483648", "max_gen_length=2147"),
        ("name: a\ntype: gen\npath: x\nno_repeat_ngram_size: -1", "no_repeat_ngram_size=-1"),
        (
            "name: a\ntype: mul\npath: x\nmax_seq_length: " + "9" * 5000,
            "is no YAML: a number of too",
        ),
        ("name: [", "is no YAML"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, text, message):
    (tmp_path / "task.yaml").write_text(text)
    with pytest.raises(TaskError, match=r"task\.yaml") as raised:
        load_task(tmp_path / "task.yaml")
    assert message in str(raised.value)


def test_dates_in_task_files_are_texts_and_aliases_cost_nothing(tmp_path):
    (tmp_path / "task.yaml").write_bytes(b"\xef\xbb\xbfname: 2020-13-45\ntype: mul\npath: x\n")
    assert load_task(tmp_path / "task.yaml").name == "2020-13-45"
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 64))]
    (tmp_path / "task.yaml").write_text("\n".join([*lines, "name: *a63", "type: mul", "path: x"]))
    with pytest.raises(TaskError) as raised:
        load_task(tmp_path / "task.yaml")
    assert len(str(raised.value)) < 300


def test_settings_that_do_not_fit_are_named_before_anything_runs():
    with pytest.raises(TaskError, match="metric 'PPL': one of Accuracy"):
        task_class(TaskConfig("a", "mul", ".", metrics=("PPL",)))


def test_our_task_files_are_those_of_the_paper():
    configs = [load_task(path) for path in find_tasks([ROOT / "configs" / "tasks"])]
    assert len(configs) == 37
    assert len({config.name for config in configs}) == len(configs)
    for config in configs:
        task_class(config)
    by_type = [sum(config.type == kind for config in configs) for kind in ("mul", "gen", "lm")]
    assert by_type == [29, 4, 4]


def test_modules_that_are_no_tasks():
    config = TaskConfig("a", "mul", ".", module="glm_jax.evaluation.tasks.Missing")
    with pytest.raises(TaskError, match="Missing"):
        task_class(config)
    with pytest.raises(TaskError, match=r"json\.loads is no"):
        task_class(dataclasses.replace(config, module="json.loads"))


def test_a_module_is_not_run_before_its_class_is_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "inner_tasks").mkdir()
    (tmp_path / "inner_tasks" / "__init__.py").write_text("raise SystemExit('was run')")
    (tmp_path / "inner_tasks" / "own.py").write_text("class Own: pass")
    (tmp_path / "running_tasks.py").write_text("def f(): pass\nraise SystemExit('was run')")
    (tmp_path / "broken_tasks.py").write_text("class Own(")
    (tmp_path / "failing_tasks.py").write_text("class Own: pass\n1 / 0")
    config = TaskConfig("a", "mul", ".")
    for module, message in [
        ("running_tasks.f", "has no class f"),
        ("inner_tasks.own.Other", "has no class Other"),
        ("broken_tasks.Own", "'\\(' was never closed"),
        ("failing_tasks.Own", "ZeroDivisionError"),
        ("no_such_tasks.Own", "no Python file"),
        ("os/../x.Own", "MODULE.CLASS"),
        ("sys.Own", "no Python file"),
        ("Own", "MODULE.CLASS"),
    ]:
        with pytest.raises(TaskError, match=message):
            task_class(dataclasses.replace(config, module=module))
