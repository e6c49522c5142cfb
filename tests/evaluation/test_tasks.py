"""Data files of tasks, and tasks with rules of their own."""

import dataclasses
import gzip
import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from running import ROOT
from stub_tokenizer import WordTokenizer

from glm_jax.engine.prompt import PromptError
from glm_jax.engine.request import Completion
from glm_jax.evaluation import tasks
from glm_jax.evaluation.examples import DatasetError, Example, checked_items, read_items
from glm_jax.evaluation.sequences import SequenceError, choice_sequence
from glm_jax.evaluation.task_config import TaskConfig
from glm_jax.evaluation.tasks import (
    Lambada,
    LanguageModel,
    Model,
    MultipleChoice,
    Pile,
    task_class,
)
from glm_jax.model import glm


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
        ({"inputs": [1], "choices": [[1]]}, "label: expected the number"),
        ({"inputs": [1], "choices": [[1]], "label": 1}, "label: 1, and there are 1 choices"),
        ({"inputs": [1], "choices": [], "label": 0}, "choices: there is none"),
        ({"inputs": [999], "choices": [[1]], "label": 0}, "inputs: id 999 is not in"),
        ({"inputs": [1], "choices": [[1], ["x"]], "label": 0}, "choices[1]: 'x' is no id"),
        ({"inputs": 7, "choices": [[1]], "label": 0}, "inputs: 7 is neither"),
        ("[" * 100_000, "not JSON: nested"),
        ('{"inputs": [1], "choices": [[1]], "label": NaN}', "not JSON: NaN"),
        ({"inputs": "t1 \ud83d", "choices": [[1]], "label": 0}, "'inputs': \\ud83d at character 4"),
        ({"inputs": [1], "choices": [[1]], "label": 0, "x": {"y": "\ud83d"}}, "'x': \\ud83d"),
        (
            {"inputs": [1], "choices": {"0": [1]}, "label": 0},
            "choices: expected a list, got {",
        ),
        ({"inputs": [1], "choices": 7, "label": 0}, "choices: expected a list, got 7"),
        ({"inputs": [1], "choices": "t1", "label": 0}, "choices: expected a list, got 't1'"),
        ({"inputs": [1], "choices": None, "label": 0}, "choices: expected a list, got None"),
        ({"inputs": [1], "choices": [{"a": 1}], "label": 0}, "choices[0]: {'a': 1} is neither"),
        ({"inputs": [1], "choices": [[1], []], "label": 0}, "choices[1]: empty"),
        ({"inputs": [1], "choices_pretokenized": ["", "t1"], "label": 0}, "choices[0]: empty"),
        (
            {"inputs": [1], "choices": [[1]], "label": [0]},
            "label: expected the number",
        ),
        (
            {"inputs": [1], "choices": [[1]], "label": "0"},
            "label: expected the number",
        ),
        (
            {"inputs": [1], "choices": [[1]], "label": True},
            "label: expected the number",
        ),
        ({"inputs": [10**4000], "choices": [[1]], "label": 0}, "inputs: id 1000"),
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


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"a": 1}, "targets: expected a list, got {'a': 1}"),
        (7, "targets: expected a list, got 7"),
        (None, "targets: expected a list, got None"),
        ([None], "targets[0]: None is no id"),
        ([], "targets: there is none"),
        (["t1", 7], "targets[1]: 7 is neither"),
    ],
)
def test_targets_of_odd_kinds_are_named(tmp_path, golden_special, targets, message):
    path = _write(tmp_path / "data.jsonl", {"inputs": [1], "targets": targets})
    with pytest.raises(DatasetError) as raised:
        read_items(path, TaskConfig("a", "gen", "."), WordTokenizer(golden_special), 512)
    assert f"data.jsonl:1: {message}" in str(raised.value)


def test_control_words_in_data_are_text_and_masks_of_inputs_are_masks(tmp_path, tokenizer):
    special = tokenizer.special_tokens
    text = "ends by <eop> after <sop>, hides [MASK]"
    line = {"inputs": text, "choices": [text, "x"], "label": 0, "targets": text, "text": text}
    for kind, name in [("mul", "a.jsonl"), ("gen", "a.jsonl"), ("lm", "a.jsonl"), ("lm", "a.txt")]:
        path = _write(tmp_path / name, text if name == "a.txt" else line)
        [item] = read_items(path, TaskConfig("a", kind, "."), tokenizer, 4096)
        if kind == "lm":
            plain = item.tokens
        else:
            assert [t for t in item.context if t in tokenizer._special_ids] == [special.mask]
            plain = (*item.choices, *item.targets)[0]
        assert tokenizer.decode(plain).strip() == text
        assert not any(token in tokenizer._special_ids for token in plain)


@pytest.mark.parametrize("name", ["data.jsonl.gz", "data.json"])
def test_data_files_may_be_packed_and_marked(tmp_path, golden_special, name):
    content = b'\xef\xbb\xbf{"inputs": [1], "choices": [[2]], "label": 0}\r\n'
    packed = gzip.compress(content) if name.endswith(".gz") else content
    (tmp_path / name).write_bytes(packed)
    config, tokenizer = TaskConfig("a", "mul", "."), WordTokenizer(golden_special)
    assert read_items(tmp_path / name, config, tokenizer, 512)[0].choices == ((2,),)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(content)[:-3])
    for bad in ("cut.jsonl.gz", "missing.jsonl", "."):
        items = list(checked_items(tmp_path / bad, config, tokenizer, 512))
        assert isinstance(items[-1], DatasetError)


def test_an_answer_ends_before_eod(model, monkeypatch):
    eod, eop = model.special.eod, model.special.eop
    answers = [(20, eod, eop), (20, eod), (20, eop), (20,), (eod, eop), (20, eod, 21)]

    class Answering:
        def __init__(self, *_):
            pass

    def complete_all(engine, requests):
        for request_id, _ in enumerate(requests):
            yield Completion(request_id, answers[request_id], (), "stop")

    monkeypatch.setattr(tasks, "Engine", Answering)
    monkeypatch.setattr(tasks, "complete_all", complete_all)
    config = TaskConfig("a", "gen", ".", max_seq_length=64, max_gen_length=8)
    examples = [Example((1, 2), targets=((20,),))] * len(answers)
    task = task_class(config)(config, model)
    found = dict(task.answer(examples, range(len(answers))))
    assert [tuple(found[i]["prediction"]) for i in range(6)] == [(20,)] * 4 + [(), (20,)]
    assert model.special.without_end((20, 30, eop), (30,)) == (20,)


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
    from glm_jax.engine.beam_search import BeamSearch, beam_search
    from glm_jax.engine.prompt import Prompt

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
