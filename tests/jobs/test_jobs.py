"""Files of requests in, records out: each line once, whatever it holds."""

import dataclasses
import gzip
import json
import random

import numpy as np
import pytest
import zstandard
from conftest import GOLDEN
from stub_tokenizer import WordTokenizer

from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.engine.request import Request
from glm_jax.engine.sampling import Sampling
from glm_jax.errors import UserError
from glm_jax.generation.blank_filling import PartlyFilled
from glm_jax.generation.driver import complete_all
from glm_jax.generation.terminal import read_texts
from glm_jax.generation.text_request import TextRequest
from glm_jax.jobs import record_store
from glm_jax.jobs.record_store import AnswerWriter, JobError, answered, claim, merge
from glm_jax.jobs.request_files import read_by_priority, read_lines
from glm_jax.jobs.request_runner import RequestRunner, share

FILL = [c for c in json.loads((GOLDEN / "fill_blanks.json").read_text()) if c["kind"] == "greedy"]


@pytest.fixture(scope="module")
def job(golden_float32, golden_special):
    def make(**options):
        config, params = golden_float32
        tokenizer = WordTokenizer(golden_special)
        engine = Engine(params, config, EngineSettings(3, 40, page_size=16), golden_special)
        return RequestRunner(engine, params, config, tokenizer, **options)

    return make


def _write(path, *lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_lines_of_lower_priority_numbers_are_answered_first(job, tmp_path):
    """A line that is no request has none."""
    lines = [{"text": "t5 t6"}, {"text": "t7"}, {"text": "t5", "priority": 3}] * 3
    lines += [{"text": "t6", "priority": -2}, {"text": "t6", "priority": -1}, "nothing"]
    path = _write(tmp_path / "in.jsonl", *lines)
    got = [line.index for line in read_by_priority(path, TextRequest())]
    assert got == [9, 10, 0, 1, 3, 4, 6, 7, 11, 2, 5, 8]
    defaults = TextRequest(max_tokens=2)
    ordered = [record["index"] for record in job().answer(read_by_priority(path, defaults))]
    assert ordered[:2] == [9, 10] or ordered[:3] == [11, 9, 10]
    assert set(ordered[-3:]) == {2, 5, 8}
    wrong = _write(tmp_path / "wrong.jsonl", {"text": "t5", "priority": 1001}, {"text": "t5"})
    failed, answered = _records(job(), wrong, defaults)
    assert failed["error"] == "priority=1001: from -1000 to 1000"
    assert "error" not in answered


def _records(job, path, defaults=None):
    lines = read_lines(path, defaults or TextRequest(max_tokens=6))
    return sorted(job.answer(lines), key=lambda record: record["index"])


@pytest.mark.parametrize("case", FILL, ids=[c["text"] for c in FILL])
def test_texts_are_filled_as_the_original_does(
    golden_float32, golden_special, tmp_path, monkeypatch, case
):
    config, params = golden_float32
    monkeypatch.setattr(
        type(golden_special), "end_tokens", property(lambda _: tuple(case["end_tokens"]))
    )
    settings = EngineSettings(2, case["out_seq_length"], page_size=16)
    engine = Engine(params, config, settings, golden_special)
    job = RequestRunner(engine, params, config, WordTokenizer(golden_special))
    [record] = _records(job, _write(tmp_path / "in.txt", case["text"]), TextRequest())
    assert record["text"] == case["answers"][0]
    assert record["blanks"] == case["blanks"][0]


def test_every_line_has_a_record(job, tmp_path):
    path = _write(
        tmp_path / "in.jsonl",
        {"text": "t5 [MASK] t9 [MASK]", "id": "two", "metadata": [1, "x"]},
        "",
        {"text": "t5 [gMASK]", "temperature": 1.0, "top_k": 9, "log_probabilities": True},
        "no json",
        "[1]",
        {"id": 7},
        {"text": "t5", "tempreature": 1.0},
        {"text": 5},
        {"text": "t5", "top_k": 1.5},
        {"text": "t5", "max_tokens": True},
        {"text": "t5", "top_p": 2},
        {"text": "t5", "seed": -1},
        {"text": "t5", "banned_tokens": ["a"]},
        {"text": "t5", "banned_tokens": [512]},
        {"text": "t5", "num_beams": 2, "top_k": 3},
        {"text": " ".join(["t5"] * 50)},
        {"text": "t5 [MASK]", "unidirectional": True},
        {"text": "t5 t6", "num_beams": 2, "max_tokens": 3},
        {"text": "t5 t6", "unidirectional": True},
    )
    first, second, *wrong, searched, last = _records(job(), path)
    assert (first["index"], first["id"], first["metadata"]) == (0, "two", [1, "x"])
    assert len(first["blanks"]) == len(first["tokens"]) == 2
    assert first["text"].split()[0] == "t5"
    assert (second["index"], second["id"]) == (1, 3)
    assert (
        [len(x) for x in second["tokens"]] == [len(x) for x in second["log_probabilities"]] == [6]
    )
    assert all(value < 0 for value in second["log_probabilities"][0])
    messages = [(record["line"], record["error"]) for record in wrong]
    expected = [
        (4, "not JSON"),
        (5, "not a JSON object"),
        (6, "the field 'text' is missing"),
        (7, "unknown field 'tempreature'"),
        (8, "text=5: expected str, got int"),
        (9, "top_k=1.5: expected int, got float"),
        (10, "max_tokens=True: expected int, got bool"),
        (11, "top_p=2: from 0 to 1"),
        (12, "seed=-1"),
        (13, "banned_tokens holds 'a': expected int, got str"),
        (14, "banned token 512 is not in the vocabulary"),
        (15, "top_k=3 beside num_beams=2"),
        (16, "the text has 51 tokens: no room for an answer in 40"),
        (17, "a blank in a unidirectional text"),
    ]
    assert len(messages) == len(expected)
    for (line, message), (expected_line, start) in zip(messages, expected, strict=True):
        assert line == expected_line
        assert message.startswith(start), (message, start)
    assert len(searched["beams"]) == 2
    assert searched["text"] == searched["beams"][0]["text"]
    assert searched["beams"][0]["score"] >= searched["beams"][1]["score"]
    assert last["text"].startswith("t5 t6 ")
    assert "error" not in last


def test_settings_of_a_line_go_before_the_jobs(job, tmp_path):
    path = _write(tmp_path / "in.jsonl", {"text": "t5"}, {"text": "t5", "max_tokens": 2})
    long, short = _records(job(), path, TextRequest(max_tokens=4))
    assert [len(record["tokens"][0]) for record in (long, short)] == [4, 2]
    assert long["tokens"][0][:2] == short["tokens"][0]
    assert long["finish_reason"] == "length"


def test_a_text_without_room_loses_its_beginning_where_that_is_wanted(job, tmp_path):
    words = " ".join(f"t{n}" for n in range(3, 63))
    path = _write(
        tmp_path / "in.jsonl", {"text": words, "max_tokens": 8}, {"text": f"[MASK] {words}"}
    )
    kept, cut = _records(job(truncates=True), path)
    # 40 tokens: 8 of the answer, sop, [gMASK], and the last 30 words.
    assert kept["text"].split()[:30] == words.split()[-30:]
    assert len(kept["tokens"][0]) == 8
    assert cut["error"].startswith("its blank is in what was cut off")


def test_answers_do_not_depend_on_who_gives_them(job, tmp_path):
    """Sampled, by one and by each of three shares."""
    path = _write(tmp_path / "in.txt", *[f"t{n} t{n + 1} [gMASK]" for n in range(3, 20)])
    defaults = TextRequest(temperature=1.0, max_tokens=5)
    whole = _records(job(seed=3), path, defaults)
    none = np.zeros(len(whole), bool)
    shared = [
        record
        for process in range(3)
        for record in job(seed=3).answer(share(read_lines(path, defaults), none, process, 3))
    ]
    assert sorted(shared, key=lambda record: record["index"]) == whole
    assert len({str(record["tokens"]) for record in whole}) > 10
    other = _records(job(seed=4), path, defaults)
    assert [r["tokens"] for r in other] != [r["tokens"] for r in whole]


def test_plain_texts_may_hold_anything(tmp_path):
    path = tmp_path / "in.txt"
    path.write_bytes('{"text": 1}\r\n\n \n你好 [MASK]\n'.encode() + b"a\xffb\n")
    lines = list(read_lines(path, TextRequest()))
    assert [(line.index, line.number) for line in lines] == [(0, 1), (1, 4), (2, 5)]
    assert [line.request.text for line in lines[:2]] == ['{"text": 1}', "你好 [MASK]"]
    assert lines[2].error == "not UTF-8 at byte 2"
    with pytest.raises(UserError, match="No such file"):
        list(read_lines(tmp_path / "missing", TextRequest()))


def test_packed_and_marked_prompts_are_read_as_if_they_were_not(tmp_path):
    content = b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b [MASK]"}\n\n{"text": "\\ud83d"}\n'
    files = {"p.jsonl": content, "p.jsonl.gz": gzip.compress(content)}
    files["p.json.zst"] = zstandard.ZstdCompressor().compress(content)
    for name, written in files.items():
        path = tmp_path / name
        path.write_bytes(written)
        assert record_store.describe_input(path)["requests"] == 2
        first, second = read_lines(path, TextRequest())
        assert first.request.text == "a\u2028b [MASK]"
        assert second.number == 3
        assert "half of a character" in second.error
    (tmp_path / "cut.jsonl.gz").write_bytes(files["p.jsonl.gz"][:-1])
    with pytest.raises(UserError, match="cut off"):
        record_store.describe_input(tmp_path / "cut.jsonl.gz")
    marked = tmp_path / "p.txt"
    marked.write_bytes(b"\xef\xbb\xbfone\x0c\r\ntwo")
    assert read_texts(str(marked)) == ["one\x0c", "two"]
    assert [line.request.text for line in read_lines(marked, TextRequest())] == ["one\x0c", "two"]


def test_what_was_half_written_is_answered_again(tmp_path):
    claim(tmp_path, {"input": {"requests": 4}})
    writer = AnswerWriter(tmp_path, 0)
    for index in (2, 0):
        writer.write({"index": index, "text": "a\u2028\ud800b"})
    writer.close()
    [part] = tmp_path.glob("part_*")
    with part.open("ab") as file:
        file.write(b'{"index": 1, "te')
    other = AnswerWriter(tmp_path, 1)
    other.write({"index": 3, "text": "c"})
    other.close()
    [part] = tmp_path.glob("part_00001*")
    part.write_bytes(b"\0\0\0\n" + part.read_bytes())
    assert answered(tmp_path, 4).tolist() == [True, False, True, True]
    with pytest.raises(
        JobError, match="1 of 4 answers are missing, the first of them to request 1"
    ):
        merge(tmp_path)
    assert not (tmp_path / record_store.MERGED_FILE).exists()
    again = AnswerWriter(tmp_path, 0)
    again.write({"index": 1, "text": "b"})
    again.write({"index": 2, "text": "twice"})
    again.close()
    assert sorted(p.name for p in tmp_path.glob("part_*")) == [
        "part_00000_00000.jsonl",
        "part_00000_00001.jsonl",
        "part_00001_00000.jsonl",
    ]
    records = [json.loads(line) for line in merge(tmp_path).read_text().splitlines()]
    assert [record["index"] for record in records] == [0, 1, 2, 3]
    assert (records[2]["text"] == "a\u2028\ud800b") is True


@pytest.mark.parametrize("flips", range(8))
def test_a_changed_byte_of_an_answer_is_found(flips, tmp_path, capsys):
    claim(tmp_path, {"input": {"requests": 2}})
    writer = AnswerWriter(tmp_path, 0)
    for index in range(2):
        writer.write({"index": index, "text": "Paris"})
    writer.close()
    [part] = tmp_path.glob("part_*")
    content = part.read_bytes()
    first = content.index(b"\n")
    changed = bytearray(content)
    changed[random.Random(flips).randrange(first - len(b', "crc32": "01234567"}'))] ^= 1 << flips
    part.write_bytes(changed)
    assert answered(tmp_path, 2).tolist() == [False, True]
    assert f"{part}:1: this answer is not what was written" in capsys.readouterr().err
    with pytest.raises(JobError, match="1 of 2 answers are missing"):
        merge(tmp_path)
    again = AnswerWriter(tmp_path, 0)
    again.write({"index": 0, "text": "Paris"})
    again.close()
    records = [json.loads(line) for line in merge(tmp_path).read_text().splitlines()]
    assert records == [{"index": 0, "text": "Paris"}, {"index": 1, "text": "Paris"}]


@pytest.mark.parametrize("index", [-1, 2, True, 0.0, "0", None, []])
def test_an_index_of_no_request_is_no_answer(index, tmp_path):
    claim(tmp_path, {"input": {"requests": 2}})
    writer = AnswerWriter(tmp_path, 0)
    writer.write({"index": index, "text": "c"})
    writer.close()
    assert not answered(tmp_path, 2).any()
    with pytest.raises(JobError, match="2 of 2 answers are missing"):
        merge(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"input": {"requests": 1e99}}', "\0", "[" * 9999]
)
def test_a_damaged_description_of_a_job_is_found(content, tmp_path):
    claim(tmp_path, {"input": {"requests": 9}})
    file = tmp_path / "job.json"
    file.write_text(content)
    with pytest.raises(JobError, match=r"job\.json"):
        merge(tmp_path)


def test_a_changed_number_in_the_description_of_a_job_is_found(tmp_path):
    claim(tmp_path, {"input": {"requests": 9}})
    file = tmp_path / "job.json"
    file.write_text(file.read_text().replace("9", "1", 1))
    with pytest.raises(JobError, match="is not what was written"):
        merge(tmp_path)


def test_parts_have_so_many_records(tmp_path, monkeypatch):
    monkeypatch.setattr(record_store, "_RECORDS_A_PART", 3)
    claim(tmp_path, {"input": {"requests": 7}})
    writer = AnswerWriter(tmp_path, 2)
    for index in range(7):
        writer.write({"index": index})
    writer.close()
    parts = sorted(tmp_path.glob("part_00002_*"))
    assert [len(part.read_text().splitlines()) for part in parts] == [3, 3, 1]
    assert len(merge(tmp_path).read_text().splitlines()) == 7


def test_another_job_is_refused(tmp_path):
    claim(tmp_path / "out", {"seed": 0, "input": {"requests": 1}})
    claim(tmp_path / "out", {"seed": 0, "input": {"requests": 1}})
    # A description may be older than a setting that has its default now.
    old, new = {"input": {"requests": 1}, "seed": 0}, {"input": {"requests": 1}, "seed": 0, "a": 1}
    claim(tmp_path / "out", new, defaults={"a": 1})
    claim(tmp_path / "out", old)
    with pytest.raises(JobError, match="a was 1 and is 2"):
        claim(tmp_path / "out", new | {"a": 2}, defaults={"a": 1})
    with pytest.raises(JobError, match="seed was 0 and is 1"):
        claim(tmp_path / "out", {"seed": 1, "input": {"requests": 1}})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.jsonl").write_text("{}\n")
    with pytest.raises(JobError, match="holds files that no job wrote"):
        claim(tmp_path / "other", {})
    with pytest.raises(JobError, match="is no job's output"):
        merge(tmp_path)
    with pytest.raises(JobError, match="holds no prompt"):
        record_store.describe_input(_write(tmp_path / "empty.txt", "", " "))


def test_a_search_goes_on_beside_other_lines(job, tmp_path):
    search = {"text": "t5 t6 [MASK] t9 [MASK]", "num_beams": 2, "max_tokens": 6}
    plain = [{"text": f"t{n} [gMASK]", "max_tokens": n} for n in (1, 2, 3)]
    path = _write(tmp_path / "in.jsonl", search, *plain, search)
    records = list(job().answer(read_lines(path, TextRequest())))
    assert [record["index"] for record in records] == [1, 2, 3, 0, 4]
    for number, line in enumerate([search, *plain]):
        [alone] = _records(job(), _write(tmp_path / f"{number}.jsonl", line))
        [together] = [record for record in records if record["index"] == number]
        assert together == alone | {"index": number, "id": number + 1}
    assert records[4]["beams"] == records[3]["beams"]


def test_the_likeliest_choice_fills_a_blank(job, golden_float32, golden_special, tmp_path):
    choices = [" t20 t21", " t30", " t40 t41 t42"]
    texts = ["t5 [MASK] t9", "t5 t6"]
    lines = [{"text": text, "choices": choices, "top_k": 3} for text in texts]
    lines += [{"text": texts[1], "choices": choices[:2], "unidirectional": True}]
    path = _write(
        tmp_path / "in.jsonl",
        *lines,
        {"text": "[MASK] [MASK]", "choices": choices},
        {"text": "t5", "choices": [" t20", " "]},
        {"text": "t5", "choices": [" t20", " t20" * 40]},
        {"text": "t5", "choices": "t20"},
    )
    *records, several, empty, long, no_list = _records(job(), path)
    config, params = golden_float32
    engine = Engine(params, config, EngineSettings(3, 40, page_size=16), golden_special)
    for line, record in zip(lines, records, strict=True):
        wanted = [_generated(engine, config, choice, **line) for choice in line["choices"]]
        found = [choice["log_probability"] for choice in record["choices"]]
        np.testing.assert_allclose(found, wanted, atol=1e-4)
        assert [choice["text"] for choice in record["choices"]] == line["choices"]
        best = line["choices"][record["choice"]]
        assert record["choice"] == int(np.argmax(found))
        assert record["blanks"] == [best.strip()]
        assert best in record["text"]
        assert record["finish_reason"] == "stop"
    assert "2 blanks: choices are for the one blank" in several["error"]
    assert "choices[1]: empty" in empty["error"]
    assert "choices[1]: 40 tokens behind 3 of the text: at most 40 together" in long["error"]
    assert "choices='t20': expected a list" in no_list["error"]


def _generated(engine, config, choice, text, unidirectional=False, **_):
    """The log-probability that the engine gives a choice where nothing else may come."""
    tokenizer = WordTokenizer(engine.special)
    partly = PartlyFilled.begin(tokenizer, text, 40, unidirectional)
    total, prompt = 0.0, partly.prompt()
    for token in tokenizer.encode(choice):
        banned = tuple(other for other in range(config.vocab_size) if other != token)
        request = Request(prompt, Sampling(banned_tokens=banned), 1, log_probabilities=True)
        [answer] = complete_all(engine, [request])
        assert answer.tokens == (token,)
        total += answer.log_probabilities[0]
        prompt = dataclasses.replace(prompt, prefix=(*prompt.prefix, token))
    return total
