"""Every data set, from a sample of its public format to examples that a task reads."""

import csv
import json
from pathlib import Path

import pytest
import yaml
import zstandard
from running import ROOT

from glm_jax.evaluation.dataset_conversion import (
    load_prompt_file,
    prepare_crows_pairs,
    prepare_mmlu,
    prepare_task,
)
from glm_jax.evaluation.examples import read_items
from glm_jax.evaluation.sources import SourceError
from glm_jax.evaluation.task_config import find_tasks, load_task
from glm_jax.evaluation.texts import TEXTS, prepare_text

PROMPTS = ROOT / "configs" / "prompts"
NLI = {"sentence1": "A dog runs.", "sentence2": "An animal runs.", "label": "entailment"}
PAIR = {"id": 1, "sentence1": "今天很冷", "sentence2": "天气寒冷", "label": "1"}
WINOGRAD = {
    "target": {"span1_text": "小明", "span2_text": "他", "span1_index": 0, "span2_index": 6},
    "text": "小明走了,因为他饿了。",
    "label": "true",
    "idx": 0,
}
SUMMARY = {"id": 1, "abst": "本文研究语言模型。", "keyword": ["语言", "模型"], "label": "0"}
SQUAD = {
    "version": "v1",
    "data": [
        {
            "paragraphs": [
                {
                    "context": "北京是首都。",
                    "qas": [
                        {
                            "id": "1",
                            "question": "首都是哪里?",
                            "answers": [{"text": "北京", "answer_start": 0}] * 2,
                        }
                    ],
                }
            ]
        }
    ],
}
HATE = "comment;isHate\nI like tea.;0.0\nThey are vermin.;0.8333\nA walk.;0.2\nBad people.;1.0\n"
# File content, the first line's right answer, and how many lines there are.
SAMPLES = {
    "glue_cola": ('gj04\t1\t\tThe cat sat.\ngj04\t0\t*\tCat the "sat.\n', "yes", 2),
    "glue_mnli": (
        "index\tsentence1\tsentence2\tgold_label\n0\tHe ran.\tHe moved.\tentailment\n"
        "1\tHe ran.\tHe sat.\t-\n",
        "True",
        1,
    ),
    "glue_qnli": (
        "index\tquestion\tsentence\tlabel\n0\tWho?\tIt rains.\tnot_entailment\n",
        "no",
        1,
    ),
    "glue_wnli": ("index\tsentence1\tsentence2\tlabel\n0\tIt fell.\tIt broke.\t1\n", "yes", 1),
    "math_qa": (
        [
            {
                "Problem": "what is 1 + 1 ?",
                "Rationale": "add",
                "options": "a ) 1 , b ) 2 , c ) 3,000 , d ) 4 , e ) none",
                "correct": "b",
                "category": "general",
            }
        ],
        "2",
        1,
    ),
    "mc_taco": ("He ate.\thow long did it take?\ttwo years\tno\tEvent Duration\n", "no", 1),
    "openbook_qa": (
        {
            "id": "7",
            "question": {
                "stem": "Ice is",
                "choices": [{"text": "hot", "label": "A"}, {"text": "cold", "label": "B"}],
            },
            "answerKey": "B",
        },
        "cold",
        1,
    ),
    "pubmed_qa": (
        {
            "123": {
                "QUESTION": "Does it work?",
                "CONTEXTS": ["We tried.", "It failed."],
                "LABELS": ["A", "B"],
                "final_decision": "no",
            }
        },
        "no",
        1,
    ),
    "superglue_axb": (NLI | {"logic": "x"}, "yes", 1),
    "superglue_axg": (
        {"premise": "She ran.", "hypothesis": "She sat.", "label": "not_entailment", "idx": 0},
        "no",
        1,
    ),
    "clue_afqmc": (PAIR, "相同", 1),
    "clue_c3": (
        [
            [
                ["男:你好。", "女:你好。"],
                [{"question": "几个人?", "choice": ["一个", "两个"], "answer": "两个"}],
                "1",
            ]
        ],
        "两个",
        1,
    ),
    "clue_cluewsc": (WINOGRAD, "是", 1),
    "clue_cmnli": (NLI, "可以", 1),
    "clue_ocnli": (NLI | {"label": "neutral", "level": "easy"}, "不一定", 1),
    "clue_cmrc2018": (SQUAD, "北京", 1),
    "clue_drcd": (SQUAD, "北京", 1),
    "clue_csl": (SUMMARY, "不是", 1),
    "fewclue_bustm": (PAIR | {"label": "0"}, "不同", 1),
    "fewclue_chid": (
        {
            "id": 1,
            "candidates": ["一石二鸟", "画蛇添足"],
            "content": "这真是#idiom#。",
            "answer": 1,
        },
        "画蛇添足",
        1,
    ),
    "fewclue_cluewsc": (WINOGRAD | {"label": "false"}, "不是", 1),
    "fewclue_csl": (SUMMARY | {"label": "1"}, "是", 1),
    "fewclue_eprstmt": ({"id": 1, "sentence": "很好吃", "label": "Positive"}, "很", 1),
    "fewclue_ocnli": (NLI, "可以", 1),
    "lambada": ({"text": "He called her but she did not answer the phone"}, "phone", 1),
    "stereoset": (
        {
            "data": {
                "intrasentence": [
                    {
                        "id": "x",
                        "target": "nurse",
                        "bias_type": "gender",
                        "context": "The nurse was BLANK today.",
                        "sentences": [
                            {"sentence": f"The nurse was {w} today.", "id": w, "gold_label": label}
                            for w, label in (
                                ("kind", "stereotype"),
                                ("very rude", "anti-stereotype"),
                                ("blue", "unrelated"),
                            )
                        ],
                    }
                ]
            }
        },
        "kind",
        1,
    ),
    "ethos_zero_shot": (HATE, "no", 4),
    "ethos_one_shot": (HATE, "yes", 3),
    "ethos_few_shot_binary": (HATE + HATE.split("\n", 1)[1] * 3, "no", 6),
    "ethos_few_shot_multiclass": (
        "comment;violence;gender;race\n" + "a;0;0;0.9\nb;0;0.6;0\nc;0.9;0.1;0.2\n" * 5,
        "sexist",
        5,
    ),
}


def _sample(name: str, folder: Path) -> Path:
    content, *_ = SAMPLES[name]
    form = load_prompt_file(PROMPTS / f"{name}.yaml").format
    path = folder / f"sample.{form}"
    if not isinstance(content, str):
        content = json.dumps(content, ensure_ascii=False) + "\n"
    path.write_text(content, encoding="utf-8")
    return path


def test_every_prompt_file_is_tried():
    names = {path.stem for path in PROMPTS.glob("*.yaml")}
    assert names == set(SAMPLES) | {"mmlu"}


@pytest.fixture(scope="module")
def tasks():
    return {
        config.path: config for config in map(load_task, find_tasks([ROOT / "configs" / "tasks"]))
    }


@pytest.mark.parametrize("name", SAMPLES)
def test_from_public_format_to_examples(tmp_path, tokenizer, tasks, name):
    _, answer, count = SAMPLES[name]
    prompts = load_prompt_file(PROMPTS / f"{name}.yaml")
    config = tasks[prompts.path]
    [(_, pattern), *_] = config.file_pattern
    split = Path(pattern).stem
    written = prepare_task(prompts, _sample(name, tmp_path), tmp_path / "data", split)
    assert set(written.values()) == {count}
    assert len(written) == len(prompts.prompts)
    found = config.files(tmp_path / "data")
    assert not set(found) ^ {config.file_pattern[0][0]}
    for path in found[config.file_pattern[0][0]]:
        line = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
        assert "{" not in line["inputs_pretokenized"]
        if config.type == "gen":
            assert line["targets_pretokenized"] == [answer]
        examples = read_items(path, config, tokenizer, tokenizer.vocab_size)
        assert len(examples) == count
        if config.type == "mul" and len(written) == 1:
            assert line["choices_pretokenized"][line["label"]] == answer
    if config.type == "mul":
        first = json.loads(next(iter(written)).read_text(encoding="utf-8").splitlines()[0])
        choices = load_prompt_file(PROMPTS / f"{name}.yaml").prompts
        assert first["choices_pretokenized"][first["label"]] == answer, choices


def test_shots_are_answered_and_left_out(tmp_path):
    prompts = load_prompt_file(PROMPTS / "ethos_few_shot_binary.yaml")
    [path] = prepare_task(prompts, _sample("ethos_few_shot_binary", tmp_path), tmp_path, "test")
    for line in path.read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["inputs_pretokenized"]
        assert text.count("Question:") == 11
        assert text.count("[MASK]") == 1
        assert text.endswith("[MASK]")
        assert text.count(": yes") == text.count(": no") == 5


def test_mmlu(tmp_path):
    groups = yaml.safe_load((PROMPTS / "mmlu.yaml").read_text())["groups"]
    assert sum(map(len, groups.values())) == 57
    for split, count in (("dev", 5), ("test", 3)):
        folder = tmp_path / "source" / split
        folder.mkdir(parents=True)
        for subject in (s for subjects in groups.values() for s in subjects):
            with (folder / f"{subject}_{split}.csv").open("w", newline="") as file:
                for i in range(count):
                    csv.writer(file).writerow([f"Is it {i}, then?", 1, 2, 3, 4, "ABCD"[i % 4]])
    written = prepare_mmlu(PROMPTS / "mmlu.yaml", tmp_path / "source", tmp_path / "data")
    assert len(written) == 57
    path = tmp_path / "data" / "mmlu" / "stem" / "college_physics.jsonl"
    line = json.loads(path.read_text().splitlines()[1])
    text = line["inputs_pretokenized"]
    assert text.count("Is it") == 6
    assert "about college physics" in text
    assert "Answer: A\n\n" in text
    assert text.endswith("D. 4\nAnswer:")
    assert line["choices_pretokenized"] == ["A", "B", "C", "D"]
    assert line["label"] == 1
    (tmp_path / "source" / "test" / "virology_test.csv").unlink()
    with pytest.raises(SourceError, match=r"virology_test\.csv"):
        prepare_mmlu(PROMPTS / "mmlu.yaml", tmp_path / "source", tmp_path / "data")


def test_crows_pairs_asks_for_each_shared_token(tmp_path, tokenizer):
    path = tmp_path / "pairs.csv"
    path.write_text(
        ",sent_more,sent_less,stereo_antistereo,bias_type\n"
        "0,The capital of France is Paris.,The capital of Poland is Paris.,stereo,nationality\n"
        "1,The capital of France is Rome.,The capital of Italy is Rome.,antistereo,nationality\n"
    )
    [written] = prepare_crows_pairs(path, tmp_path, tokenizer)
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    mask = tokenizer.special_tokens.mask
    for line in lines:
        place = line["inputs"].index(mask)
        whole = [*line["inputs"][:place], *line["choices"][0], *line["inputs"][place + 1 :]]
        text = tokenizer.decode(whole)
        is_first = line["sent_ID"] == 1
        wanted = [("France", "Poland"), ("Italy", "France")][line["pair_ID"]][not is_first]
        assert wanted in text
    counts = [[x["sent_ID"] for x in lines if x["pair_ID"] == pair] for pair in (0, 1)]
    for sentences in counts:
        assert sentences.count(1) == sentences.count(2) > 3


def test_texts(tmp_path, tokenizer, tasks):
    (tmp_path / "wiki.txt").write_text("The capital of France is Paris .\n")
    [path] = prepare_text("wikitext_2", tmp_path / "wiki.txt", tmp_path / "data")
    assert path == tmp_path / "data" / TEXTS["wikitext_2"]
    [found] = tasks["wikitext-2"].files(tmp_path / "data")["test"]
    [document] = read_items(found, tasks["wikitext-2"], tokenizer, tokenizer.vocab_size)
    assert document.words == 7
    lines = b"".join(
        json.dumps({"text": text, "meta": {"pile_set_name": name}}).encode() + b"\n"
        for text, name in (("France", "Wiki"), ("Poland", "Books"))
    )
    (tmp_path / "test.jsonl.zst").write_bytes(zstandard.compress(lines))
    [path] = prepare_text("pile", tmp_path / "test.jsonl.zst", tmp_path / "data")
    assert path.read_bytes() == lines
    assert len(read_items(path, tasks["pile"], tokenizer, tokenizer.vocab_size)) == 2
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(SourceError, match=r"bad\.jsonl:1: no document of the Pile"):
        prepare_text("pile", tmp_path / "bad.jsonl", tmp_path / "data")
    assert path.read_bytes() == lines


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    table = pyarrow.table({"text": [" = Title = \n", "A line .\n"]})
    parquet.write_table(table, tmp_path / "test.parquet")
    [path] = prepare_text("ptb", tmp_path / "test.parquet", tmp_path / "data")
    assert path.read_text() == " = Title = \nA line .\n"
