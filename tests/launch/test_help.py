"""`--help` of every command line, what wrong flags are answered with, and the commands of the
docs: their flags here, and all that can run here in tests/slow/test_docs.py."""

import importlib
import json
import re

import pytest
from docs_commands import MARKS, PAGES, blocks, module_and_arguments
from forked import Try, run_all
from ml_collections import ConfigDict
from running import ROOT, environment

from glm_jax.cli.experiments import fields
from glm_jax.serving.connections import DEFAULT_CONNECTIONS
from glm_jax.training.field_help import _CLASSES, _FIELDS, field_help

MODULES = sorted(
    f"{folder}.{path.stem}"
    for folder in ("launch", "convert")
    for path in (ROOT / folder).glob("*.py")
    if not path.stem.startswith("_") and "cli.run" in path.read_text(encoding="utf-8")
)
# Of a command line: its flags, and what the line on stderr says.
WRONG = {
    "launch.generate": {
        "": ["missing --checkpoint (a model folder"],
        "--checkpont=x": ["unknown flag --checkpont; did you mean --checkpoint?"],
        "--model=x": ["unknown flag --model; did you mean --checkpoint"],
        "--text=x": ["did you mean --ban or --input?"],
        "--max-length=3": ["unknown flag --max-length; did you mean --max_length?"],
        "--checkpoint": ["--checkpoint has no value: give --checkpoint=VALUE, a model folder"],
        "--checkpoint=x --slots=3": ["unknown flag --slots"],
        "--checkpoint=x --seed=many": ["--seed=many: expected an integer"],
        "--checkpoint=x --seed=-1": ["error: --seed=-1: from 0 to"],
        "--checkpoint=x --activation_bits=4": ["--activation_bits=4: expected 8"],
        "--checkpoint=x --with_id=3": ["--with_id=3: expected true or false"],
        "--checkpoint=x --dtype=int9": ["--dtype=int9: expected one of float32, bfloat16"],
    },
    "launch.train": {
        "": ["missing --config (an experiment", "such as configs/train_tiny.py) and --workdir ("],
        "--workdir=w --config.steps=3": ["--config.steps: give --config=FILE before it"],
        "--workdir=w --config=README.md": ["--config=README.md: there is no such file"],
        "--workdir=w --config=text.txt": ["--config=text.txt is no experiment: SyntaxError"],
        "--workdir=w --config=other.py": ["other.py: its get_config() returns no experiment"],
        "--workdir=w --config=configs/train_tiny.py --config.foo=3": [
            "--config.foo: configs/train_tiny.py has no field 'foo'; --help lists all"
        ],
        "--workdir=w --config=configs/train_tiny.py --config.learning_rate=3": [
            "did you mean --config.optimizer.learning_rate?"
        ],
        "--workdir=w --config=configs/train_tiny.py --config.data.batch_sise=3": [
            "did you mean --config.data.batch_size?"
        ],
        "--workdir=w --config=configs/train_tiny.py --config.steps=abc": [
            "--config.steps=abc: expected an integer"
        ],
    },
    "launch.plan": {
        "--hardware=h100 --config.foo=3": ["configs/glm_130b.py has no field 'foo'"],
        "": ["give --hardware, or --table"],
    },
    "launch.decode": {
        "": ["missing --output (folder of the answers); give --checkpoint and --input, or --merge"],
        "--output=o --checkpoint=x": ["give --input, or --merge"],
    },
    "launch.evaluate": {
        "--checkpoint=x": ["give --task, --data and --output (or --check), or --compare"],
    },
    "convert.inspect": {"": ["0 paths given, expected PATH"]},
}
# Commands of the docs; the harness and `glm-jax` itself have parsers of their own.
_ALL = [
    (page, words)
    for page in PAGES
    for b in blocks(page)
    for words in b.lines()
    if b.language == "sh"
]
DOCUMENTED = {
    (page, " ".join(words)): ours
    for page, words in _ALL
    if (ours := module_and_arguments(words))
    and ours[0] not in ("launch.harness", "launch.__main__")
}
CASES = [(module, given) for module, of_it in WRONG.items() for given in of_it]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each of `CASES` and each module's `--help` says; in a folder that is no checkout."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "text.txt").write_text("Paris is in France.\n")
    (folder / "other.py").write_text("def get_config():\n    return 3\n")
    tries = {case: Try((case[0], *case[1].split()), str(folder)) for case in CASES}
    tries |= {(m, "--help"): Try((m, "--help"), str(folder), is_parsed_only=True) for m in MODULES}
    tries |= {
        ours: Try(ours, str(folder), is_parsed_only=True)
        for ours in {(module, *arguments) for module, arguments in DOCUMENTED.values()}
    }
    example = ("launch.train", "-h", "--config=configs/demo.py")
    tries["demo"] = Try(example, str(folder))
    return dict(zip(tries, run_all(list(tries.values()), environment(1)), strict=True))


@pytest.mark.parametrize("module", MODULES)
def test_help_shows_its_own_flags_and_no_others(answers, module):
    status, output, said = answers[module, "--help"]
    assert (status, said) == (0, "")
    own, _, shown = output.partition("\n")
    listed = re.findall(r"^  --(?:\[no\])?(\w+)(?:=\S+)?$", shown, re.M)
    assert sorted(listed) == json.loads(own)
    assert f"python -m {module}" in shown
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize("file", ["train_tiny", "finetune_lora", "glm_130b"])
def test_help_shows_the_fields_of_the_experiment(answers, file):
    modules = {"finetune_lora": "launch.finetune", "glm_130b": "launch.plan"}
    shown = answers[modules.get(file, "launch.train"), "--help"][1]
    assert f"with the values of configs/{file}.py:" in shown
    _assert_shows_fields(shown, file)


def test_help_shows_the_fields_of_the_file_that_is_given(answers):
    status, shown, _ = answers["demo"]
    assert status == 0
    _assert_shows_fields(shown, "demo")


def _assert_shows_fields(shown, file):
    config: ConfigDict = importlib.import_module(f"configs.{file}").get_config()
    entries = re.split(r"^  --config\.", shown, flags=re.M)[1:]
    texts = {e.split(maxsplit=1)[0]: " ".join(e.split(maxsplit=1)[1].split()) for e in entries}
    expected = fields(config)
    assert list(texts) == list(expected)
    for name, value in expected.items():
        assert texts[name].endswith(f"(default: {value if value != '' else repr(value)})")
        assert not texts[name].startswith("(")


def test_defaults_of_0_are_shown(answers):
    shown = " ".join(answers["launch.generate", "--help"][1].split())
    assert "from 0 to 100 (default: 0.0)" in shown
    assert "seed of sampling; from 0 to 4294967295 (default: 0)" in shown


def test_the_default_that_help_names_is_the_servers(answers):
    shown = answers["launch.serve", "--help"][1]
    assert f"maximum open connections; {DEFAULT_CONNECTIONS.count} by default" in shown


def test_every_field_of_every_experiment_has_help():
    known = set()
    for path in (ROOT / "configs").glob("*.py"):
        if path.stem != "__init__":
            known |= set(fields(importlib.import_module(f"configs.{path.stem}").get_config()))
    assert all(field_help(name) for name in known)
    assert set(_FIELDS) <= known
    assert {name.rpartition(".")[0] for name in known} >= set(_CLASSES)


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_wrong_flags_are_named_in_words(answers, case):
    status, _, said = answers[case]
    assert status == 2, said
    [line] = said.splitlines()
    assert line.startswith("error: ")
    assert "None" not in line
    for words in WRONG[case[0]][case[1]]:
        assert words in line


@pytest.mark.parametrize("command", DOCUMENTED, ids=" ".join)
def test_commands_of_the_docs_have_flags_that_are_there(answers, command):
    module, arguments = DOCUMENTED[command]
    status, _, said = answers[module, *arguments]
    assert (status, said) == (0, "")


def test_every_block_says_what_it_needs():
    found = [block for page in PAGES for block in blocks(page)]
    assert len({block.page for block in found if block.language == "sh"}) >= 10
    for block in found:
        marks = {"sh": MARKS, "python": ("", "run"), "mermaid": ("",)}
        assert block.mark in marks[block.language], block
        if block.language == "python":
            compile(block.text, block.page, "exec")
    # What is written as a block without a fence is no command.
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert not re.search(r"^    (python|glm-jax|pip|make|curl) ", text, re.M), page


def test_what_installs_is_there():
    """Targets of make, extras of the package, files that are sourced."""
    lines = [
        line for page in PAGES for b in blocks(page) if b.mark == "setup" for line in b.lines()
    ]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert {line[0] for line in lines} == {"make", "source", "pip", "glm-jax"}
    for line in lines:
        if line[0] == "make":
            assert re.search(rf"^{line[1]}:", makefile, re.M), line
        elif line[0] == "pip":
            [extra] = re.findall(r"\[(\w+)\]", line[-1])
            assert f'"{extra}": ' in setup, line
        elif line[0] == "source":
            assert line[1] == ".venv/bin/activate"
            assert "\nVENV := .venv\n" in makefile
