"""Task files, data files, tasks with rules of their own."""

import dataclasses
import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from running import ROOT
from stub_tokenizer import WordTokenizer

from glm_jax.decoding.prompt import PromptError
from glm_jax.evaluation.examples import DatasetError, Example, checked_items, read_items
from glm_jax.evaluation.sequences import SequenceError, choice_sequence
from glm_jax.evaluation.task_config import TaskConfig, TaskError, find_tasks, load_task
from glm_jax.evaluation.tasks import (
    CrowsPairs,
    Lambada,
    LanguageModel,
    Model,
    MultipleChoice,
    Pile,
    StereoSet,
    task_class,
)
from glm_jax.model import glm

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
        ("name: a\ntype: gen\npath: x\nnum-beams: many", "num_beams='many': int is due"),
        ("name: a\ntype: mul\npath: x\nunidirectional: true", "set use_task_mask"),
        ("name: a\ntype: gen\npath: x\nsampling_strategy: Best", "sampling_strategy='Best'"),
        ("name: a\ntype: other\npath: x", "takes a module"),
        ("name: a\ntype: mul\npath: x\nmicro-batch-size: 1\nmicro_batch_size: 2", "given twice"),
        ("name: a\ntype: mul\npath: x\nfile-pattern: 3", "file_pattern=3"),
        ("- a\n- b", "fields such as name"),
        ("name: [", "is no YAML"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, text, message):
    (tmp_path / "task.yaml").write_text(text)
    with pytest.raises(TaskError, match=r"task\.yaml") as raised:
        load_task(tmp_path / "task.yaml")
    assert message in str(raised.value)


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


def _write(path: Path, *lines: object) -> Path:
    path.write_text(
        "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    )
    return path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ([1], "no JSON object"),
        ({"choices": [[1]], "label": 0}, "inputs: missing, and so is inputs_pretokenized"),
        ({"inputs": [1], "choices": [[1]]}, "label: None"),
        ({"inputs": [1], "choices": [[1]], "label": 1}, "label: 1, and there are 1 choices"),
        ({"inputs": [1], "choices": [], "label": 0}, "choices: there is none"),
        ({"inputs": [999], "choices": [[1]], "label": 0}, "inputs: id 999 is not in"),
        ({"inputs": [1], "choices": [[1], ["x"]], "label": 0}, "choices[1]: 'x' is no id"),
        ({"inputs": 7, "choices": [[1]], "label": 0}, "inputs: 7 is neither"),
        (
            {"inputs": [1], "choices": [[2] * 70], "label": 0},
            "choices: 70 tokens are past max_seq_length=64",
        ),
    ],
)
def test_data_errors_name_file_line_and_field(tmp_path, golden_special, line, message):
    good = {"inputs": [1, 2], "choices": [[3], [4]], "label": 1}
    path = _write(tmp_path / "data.jsonl", good, "", line, good)
    config = TaskConfig("a", "mul", ".", max_seq_length=64)
    tokenizer = WordTokenizer(golden_special)
    with pytest.raises(DatasetError) as raised:
        read_items(path, config, tokenizer, 512)
    assert f"data.jsonl:3: {message}" in str(raised.value)
    items = list(checked_items(path, config, tokenizer, 512))
    assert [isinstance(item, DatasetError) for item in items] == [False, True, False]
    assert str(items[1]) == str(raised.value)


@pytest.fixture
def model(golden_float32, golden_special):
    config, params = golden_float32
    return Model(params, config, WordTokenizer(golden_special))


def test_ids_give_way_to_texts_where_the_task_says_so(tmp_path, golden_special):
    line = {"inputs": [1], "inputs_pretokenized": "t7 t8", "choices": [[3]], "label": 0}
    path = _write(tmp_path / "data.jsonl", line)
    config = TaskConfig("a", "mul", ".")
    read = lambda config: read_items(path, config, WordTokenizer(golden_special), 512)[0]
    assert read(config).context == (1,)
    assert read(dataclasses.replace(config, no_tokenized=True)).context == (7, 8)


def _alone(model, tokens, choice):
    """Log-probability of a choice by the model alone, tokens seen from left to right."""
    config, params = model.config, model.params
    ids = np.array([[*tokens, *choice[:-1]]])
    length = ids.shape[1]
    mask = np.tril(np.ones((1, length, length), bool))
    logits = np.asarray(glm.forward(params, config, ids, np.arange(length)[None], mask))[0]
    logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return sum(logits[len(tokens) - 1 + i, token] for i, token in enumerate(choice))


def test_unidirectional_choices_equal_each_alone(model):
    config = TaskConfig("a", "mul", ".", use_task_mask=True, unidirectional=True)
    task = MultipleChoice(config, model)
    example = Example((11, 12, 13), ((20, 21), (22,), (23, 24, 25)), 0)
    [(_, record)] = task.answer([example], [0])
    special = model.special
    for choice, value in zip(example.choices, record["log_probabilities"], strict=True):
        alone = _alone(model, [special.gmask, special.sop, *example.context], choice)
        assert value == pytest.approx(alone, abs=1e-4)
    blank = Example((11, special.mask), ((20,),), 0)
    with pytest.raises(SequenceError):
        choice_sequence(blank, config, special, True)
    fields = {"use_task_mask": True, "unidirectional": True, "max_gen_length": 8}
    generation = TaskConfig("g", "gen", ".", **fields)
    generating = task_class(generation)(generation, model)
    with pytest.raises(PromptError):
        generating.prompt(blank)


def test_multitask_encoding_gives_choices_positions_of_their_own(golden_special):
    config = TaskConfig("a", "mul", ".", use_multitask_encoding=True)
    example = Example((11, 12), ((20, 21), (22,)), 0)
    sequence = choice_sequence(example, config, golden_special, False)
    assert sequence.position_ids.tolist() == [0, 1, 2, 3, 4, 3]
    blank = dataclasses.replace(example, context=(11, golden_special.mask, 12))
    sequence = choice_sequence(blank, config, golden_special, False)
    assert sequence.position_ids.tolist() == [0, 1, 2, 1, 1, 1]


def test_long_contexts_lose_their_first_tokens(golden_special):
    config = TaskConfig("a", "mul", ".", max_seq_length=16)
    example = Example(tuple(range(100, 140)), ((20, 21), (22,)), 0)
    sequence = choice_sequence(example, config, golden_special, False)
    assert len(sequence) == 15
    assert sequence.tokens[:11].tolist() == list(range(129, 140))[:11]


class _Punctuated(WordTokenizer):
    """Some tokens are punctuation marks."""

    marks: ClassVar = {",": 300, ".": 301, "'": 302}

    def encode(self, text, control_words=()):
        return [
            self.marks[w] if w in self.marks else int(w[1:]) for w in text.split() if w[0] in "t,.'"
        ]

    def decode(self, ids):
        names = {token: mark for mark, token in self.marks.items()}
        return " ".join(names.get(i, f"t{i}") for i in ids)


def test_lambada_bans_punctuation_and_takes_the_first_word(golden_float32, golden_special):
    config, params = golden_float32
    tokenizer = _Punctuated(golden_special)
    model = Model(params, config, tokenizer)
    fields = {"sampling_strategy": "BeamSearchStrategy", "num_beams": 4, "max_gen_length": 3}
    task = Lambada(TaskConfig("l", "gen", ".", use_task_mask=True, **fields), model)
    search = task.search()
    assert set(search.banned_tokens) == {300, 301, 302}
    assert {(300,), (301,), (302,)} <= set(search.banned_prefixes)
    # Of the beams, the first that goes on with a mark; its first word.
    assert task.choose([(7, 8), (9, 300, 4), (5,)]) == (9,)
    assert task.choose([(7, 8), (9, 4)]) == (7,)
    example = Example((11, 12, 13), targets=((7,),))
    [(_, record)] = task.answer([example], [0])
    assert len(record["prediction"]) == 1
    assert record["prediction"][0] not in {300, 301, 302}
    metric = task.metrics()["Accuracy"]
    statistics = metric([[7], [8]], [example, example], tokenizer)
    assert statistics.finish(statistics.values.sum(0))[""] == 50


def test_banned_prefixes_are_banned_at_the_beginning_alone(golden_float32, golden_special):
    from glm_jax.decoding.beams import BeamSearch, beam_search
    from glm_jax.decoding.prompt import Prompt

    config, params = golden_float32
    prompt = Prompt((11, 12, 13, golden_special.gmask), None)
    run = lambda search: beam_search(params, config, prompt, search, max_length=len(prompt) + 4)
    free = run(BeamSearch(3))
    first, second = free[0].tokens[:2]
    held = run(BeamSearch(3, banned_prefixes=((first, second),)))
    assert all(found.tokens[:2] != (first, second) for found in held)
    assert any(found.tokens[0] == first for found in held) or first != free[1].tokens[0]
    never = run(BeamSearch(3, banned_tokens=(first,)))
    assert all(first not in found.tokens for found in never)
    without = run(BeamSearch(3, banned_prefixes=((first,),)))
    assert all(found.tokens[0] != first for found in without)


def test_windows_ask_for_every_token_once(model):
    from glm_jax.evaluation.examples import Document
    from glm_jax.evaluation.sequences import count_windows, window

    config = TaskConfig("w", "lm", ".", max_seq_length=16, generation_length=5, use_task_mask=True)
    for length in (1, 2, 14, 15, 16, 20, 21, 63):
        document = Document(tuple(range(100, 100 + length)), 1, 1)
        windows = [
            window(document, config, model.special, i)
            for i in range(count_windows(document, config))
        ]
        asked = np.concatenate([w.targets for w in windows])
        assert asked.tolist() == list(document.tokens)
        assert max(map(len, windows)) <= 16


def test_a_task_of_ones_own(tmp_path, model, monkeypatch):
    (tmp_path / "my_tasks.py").write_text(_documented_example())
    monkeypatch.syspath_prepend(tmp_path)
    _write(
        tmp_path / "data.jsonl",
        {"inputs": [11, 12], "choices": [[20], [21]], "label": 0},
        {"inputs": [13], "choices": [[22], [23, 24]], "label": 1},
    )
    config = TaskConfig("mine", "mul", ".", module="my_tasks.Calibrated")
    task = task_class(config)(config, model)
    examples = task.read(tmp_path / "data.jsonl")
    records = dict(task.answer(examples, range(2)))
    plain = dict(MultipleChoice(config, model).answer(examples, range(2)))
    for i in range(2):
        assert records[i]["log_probabilities"] == pytest.approx(plain[i]["log_probabilities"])
        assert len(records[i]["without_context"]) == 2
    statistics = task.metrics()["Accuracy"]([0, 1], examples, model.tokenizer)
    assert statistics.finish(statistics.values.sum(0))[""] == 100


def _documented_example() -> str:
    """The class that docs/evaluating.md shows."""
    text = (ROOT / "docs" / "evaluating.md").read_text(encoding="utf-8")
    blocks = text.split("```python\n")[1:]
    [example] = [b.split("```")[0] for b in blocks if "class Calibrated" in b]
    return example


def test_pile_needs_the_text_of_its_ids(tmp_path, model):
    config = TaskConfig("p", "lm", ".", use_task_mask=True)
    path = _write(tmp_path / "test.jsonl", {"text": [1, 2], "meta": {"pile_set_name": "A"}})
    with pytest.raises(DatasetError, match=r"test.jsonl:1: text_pretokenized"):
        Pile(config, model).read(path)
    path = _write(
        tmp_path / "test.jsonl",
        {"text": [1, 2], "text_pretokenized": "t1 t2", "meta": {"pile_set_name": "A"}},
        {"text": "t3 t4 t5", "meta": {"pile_set_name": "B"}},
    )
    documents = LanguageModel(config, model).read(path)
    assert [d.tokens for d in documents] == [(1, 2), (3, 4, 5)]
    assert [d.utf8_bytes for d in documents] == [5, 8]
