"""Data sets of other formats, rows that are no examples, prompt files with mistakes."""

import json

import pytest
from running import ROOT

from glm_jax.evaluation.dataset_conversion import (
    PromptFile,
    PromptFileError,
    load_prompt_file,
    prepare_task,
)
from glm_jax.evaluation.sources import SourceError, read_file

PROMPTS = ROOT / "configs" / "prompts"
NLI = {"sentence1": "A dog runs.", "sentence2": "An animal runs.", "label": "entailment"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"sentence": "x", "label": "Positive"}\n{"sentence": "x"}\n', r":2: the field 'label'"),
        ('{"label": "Positive"}\n', r":1: .*no field 'sentence'"),
        ("{\n", r"is no jsonl"),
        ("", r"no row with a label"),
        ('{"sentence": "x", "label": "-"}\n', r"no row with a label"),
        ('{"sentence": "x", "label": 0}\n', r":1: label=0: one of Positive, Negative"),
        ('{"sentence": null, "label": "Positive"}\n', r":1: .*None where a text"),
        ('{"sentence": ["x"], "label": "Positive"}\n', r":1: .*\['x'\] where a text"),
        ('{"sentence": "a \\ud83d", "label": "Positive"}\n', r":1 is no jsonl: \\ud83d"),
        ('{"sentence": NaN, "label": "Positive"}\n', r":1 is no jsonl: not JSON: NaN"),
        ("[" * 100_000, r":1 is no jsonl: not JSON: nested"),
        ("[1]\n", r":1: expected an object with fields"),
    ],
)
def test_a_data_set_of_another_format_is_told(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_text(content)
    prompts = load_prompt_file(PROMPTS / "fewclue_eprstmt.yaml")
    with pytest.raises(SourceError, match=message):
        prepare_task(prompts, tmp_path / "x.jsonl", tmp_path / "data", "validation")
    assert not (tmp_path / "data").exists()


def test_rows_without_a_label_are_left_out_and_others_counted(tmp_path):
    rows = [NLI, NLI | {"label": "-"}, NLI | {"label": None}, NLI | {"label": -1}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = load_prompt_file(PROMPTS / "superglue_axb.yaml")
    written = prepare_task(prompts, tmp_path / "x.jsonl", tmp_path / "data", "validation")
    assert set(written.values()) == {1}
    (tmp_path / "x.jsonl").write_text(json.dumps(NLI | {"label": 1}))
    with pytest.raises(SourceError, match=r":1: label=1: one of entailment, not_entailment"):
        prepare_task(prompts, tmp_path / "x.jsonl", tmp_path / "data", "test")


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ("Tokyo", ["Tokyo"]),
        (["Tokyo", "東京", 3], ["Tokyo", "東京", "3"]),
        (None, "no list"),
        ({"text": ["Tokyo"]}, "no list"),
        ([None], "None where a text"),
        ([], "is empty"),
        ("", "is empty"),
        (7, "no list"),
    ],
)
def test_answers_are_texts(tmp_path, answers, expected):
    (tmp_path / "x.jsonl").write_text(json.dumps({"q": "Capital?", "a": answers}))
    prompts = PromptFile("t", "jsonl", prompts={"p": {"input": "{q}", "targets": "a"}})
    prepare = lambda: prepare_task(prompts, tmp_path / "x.jsonl", tmp_path, "test")
    if isinstance(expected, str):
        with pytest.raises(SourceError, match=expected):
            prepare()
        return
    [path] = prepare()
    assert json.loads(path.read_text())["targets_pretokenized"] == expected


def test_choices_of_a_field_are_texts(tmp_path):
    prompts = PromptFile("t", "jsonl", prompts={"p": {"input": "{q}", "choices": "c"}})
    for choices in (["a", None], ["a", ""], ["a", ["b"]], {"a": "b"}, "ab"):
        (tmp_path / "x.jsonl").write_text(json.dumps({"q": "?", "c": choices, "label": 0}))
        with pytest.raises(SourceError, match=r"x\.jsonl:1: the field 'c'"):
            prepare_task(prompts, tmp_path / "x.jsonl", tmp_path, "test")
    for label in ("x", 1.5, True, [0], 2, -2, 10**400):
        content = json.dumps({"q": "?", "c": ["a", "b"], "label": label})
        (tmp_path / "x.jsonl").write_text(content)
        with pytest.raises(SourceError, match=r"x\.jsonl:1: label"):
            prepare_task(prompts, tmp_path / "x.jsonl", tmp_path, "test")
    with pytest.raises(PromptFileError, match="split"):
        prepare_task(prompts, tmp_path / "x.jsonl", tmp_path, "../test")


@pytest.mark.parametrize("form", ["csv", "tsv"])
def test_a_row_with_a_cell_too_many_or_too_few_is_named(tmp_path, form):
    tab = {"csv": ",", "tsv": "\t"}[form]
    good = tab.join(["a\u2028b", "1"])
    for bad in (tab.join(["a", "b", "1"]), "a", good + tab):
        (tmp_path / "x").write_bytes(f"\ufeffs{tab}label\r\n{good}\r\n{bad}\n".encode())
        rows = read_file(tmp_path / "x", form)
        assert next(rows)[1] == {"s": "a\u2028b", "label": "1"}
        with pytest.raises(SourceError, match=r"x:3: expected 2 columns, found \d"):
            next(rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path: ../a\nformat: csv", "path='../a'"),
        ("path: /a\nformat: csv", "path='/a'"),
        ("path: [a]\nformat: csv", r"path=\['a'\]"),
        ("path: a\nformat: cvs", "format='cvs'"),
        ("path: a\nformat: csv\nprompts: {../p: {input: a, targets: b}}", "prompts="),
        ("path: a\nformat: csv\nprompts: {p: {input: a, choices: 3}}", "choices: texts"),
        ("path: a\nformat: csv\nlabels: [1]", "labels="),
        ("path: a\nformat: csv\nrow: x", "unknown field 'row'"),
        ("path: a\nformat: csv\nprompts: {p: {choices: [a]}}", "'input' is missing"),
        ("path: a\nformat: csv\nprompts: {p: {input: a}}", "either choices or targets"),
        ("format: csv", "path"),
        ("- a", "no fields"),
        ("path: a\nformat: csv\nshots: 2\nprompts: {p: {input: a, targets: b}}", "shots are for"),
    ],
)
def test_prompt_files_are_checked(tmp_path, text, message):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(PromptFileError, match=message):
        load_prompt_file(tmp_path / "p.yaml")


def test_a_quotation_mark_that_stays_open_takes_no_rows_with_it(tmp_path):
    (tmp_path / "a.csv").write_text('label,q\n0,"two\nlines"\n1,"open\n0,next\n1,last')
    with pytest.raises(SourceError, match=r"a\.csv:4: a quotation mark that no other closes"):
        list(read_file(tmp_path / "a.csv", "csv"))
    (tmp_path / "a.csv").write_text('label,q\n0,"two\nlines"\n1,last "word"')
    rows = [row["q"] for _, row in read_file(tmp_path / "a.csv", "csv")]
    assert rows == ["two\nlines", 'last "word"']


def test_a_row_with_what_json_does_not_have_is_named(tmp_path, monkeypatch):
    prompts = PromptFile(
        "a", "parquet", prompts={"b": {"input": "{q}", "targets": "q"}}, keep=("k",)
    )
    row = {"q": "a", "k": float("nan")}
    monkeypatch.setattr(
        "glm_jax.evaluation.dataset_conversion.read_rows", lambda *_: [("row 0", row)]
    )
    with pytest.raises(SourceError, match=r"row 0: the field 'k': .*not JSON"):
        prepare_task(prompts, tmp_path / "x.parquet", tmp_path / "out", "test")
    assert not (tmp_path / "out").exists()
