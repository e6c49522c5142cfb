"""Files become shards once, in any number of goes, and bad lines are counted and named."""

import gzip
import json

import numpy as np
import pytest
import zstandard

from glm_jax.data import tokenize_files
from glm_jax.data.documents import find_files
from glm_jax.data.records import DataError, Record, open_dataset
from glm_jax.data.tokenize_files import prepare
from glm_jax.errors import UserError
from glm_jax.files import OutputError


def _prepare(folder, output, tokenizer, **changes):
    options = dict(
        kind="text",
        language="en",
        window=20,
        processes=1,
        max_bad_lines=10,
        part_bytes=2000,
    )
    return prepare(find_files(f"{folder}/*"), output, tokenizer, **(options | changes))


def _tokens(output, tokenizer):
    dataset = open_dataset(output, tokenizer)
    records = [Record.decode(dataset.records[i]) for i in range(len(dataset.records))]
    assert dataset.tokens == sum(len(record.tokens) for record in records)
    return [record.tokens.tolist() for record in records]


@pytest.fixture
def source(tmp_path, corpus):
    folder = tmp_path / "source"
    folder.mkdir()
    lines = [sentence.encode() for sentence in corpus.sentences[:300]]
    (folder / "a.txt").write_bytes(b"\n".join(lines[:150]))
    as_json = b"\n".join(json.dumps({"text": line.decode()}).encode() for line in lines[150:200])
    (folder / "b.jsonl").write_bytes(as_json)
    (folder / "c.txt.gz").write_bytes(gzip.compress(b"\n".join(lines[200:250])))
    (folder / "d.txt.zst").write_bytes(
        zstandard.ZstdCompressor().compress(b"\n".join(lines[250:300]))
    )
    return folder


@pytest.mark.parametrize("processes", [1, 2])
def test_every_document_is_there_once_in_order(source, tmp_path, tokenizer, corpus, processes):
    about = _prepare(source, tmp_path / "out", tokenizer, processes=processes)
    assert len(about["shards"]) > 5
    whole = [token for window in _tokens(tmp_path / "out", tokenizer) for token in window]
    eod = tokenizer.special_tokens.eod
    expected = [token for s in corpus.sentences[:300] for token in [*tokenizer.encode(s), eod]]
    assert whole == expected
    assert about["bad_lines"] == 0


def test_broken_off_it_goes_on_with_what_is_left(source, tmp_path, tokenizer, monkeypatch):
    _prepare(source, tmp_path / "whole", tokenizer)
    done, real = [], tokenize_files._tokenize_shard

    def dying(job, output, settings):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(job)
        real(job, output, settings)

    with monkeypatch.context() as patched:
        patched.setattr(tokenize_files, "_tokenize_shard", dying)
        with pytest.raises(KeyboardInterrupt):
            _prepare(source, tmp_path / "out", tokenizer)
    with pytest.raises(DataError, match="is not a complete dataset"):
        open_dataset(tmp_path / "out", tokenizer)
    rest = []
    monkeypatch.setattr(
        tokenize_files, "_tokenize_shard", lambda job, **how: (rest.append(job), real(job, **how))
    )
    (tmp_path / "out" / "00001-of-00002.array_record.0a1b2c3d.partial").write_text("killed")
    _prepare(source, tmp_path / "out", tokenizer)
    assert not list((tmp_path / "out").glob("*.partial"))
    assert not set(rest) & set(done)
    assert _tokens(tmp_path / "out", tokenizer) == _tokens(tmp_path / "whole", tokenizer)


def test_bad_lines_are_left_out_and_listed_with_their_numbers(tmp_path, tokenizer):
    folder = tmp_path / "source"
    folder.mkdir()
    lines = [json.dumps({"text": f"number {i} is here"}).encode() for i in range(100)]
    lines[3], lines[70], lines[99] = b"{not json", b'{"txt": 1}', b"\xff\xfe"
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    about = _prepare(folder, tmp_path / "out", tokenizer, part_bytes=500)
    assert (about["bad_lines"], about["lines"]) == (3, 100)
    listed = (tmp_path / "out" / "bad_lines.txt").read_text().splitlines()
    assert [line.split(":")[1] for line in listed] == ["4", "71", "100"]
    assert all(line.startswith(str(folder / "a.jsonl")) for line in listed)
    with pytest.raises(DataError, match="3 bad lines, more than 2"):
        _prepare(folder, tmp_path / "strict", tokenizer, max_bad_lines=2)


def test_instructions(tmp_path, tokenizer):
    folder = tmp_path / "source"
    folder.mkdir()
    pairs = [
        {"prompt": "Capital of France?", "target": "Paris"},
        {"prompt": "Say it: [MASK].", "target": "now", "mask": "[MASK]"},
        {"prompt": "x", "target": "", "mask": "[MASK]"},
        {"prompt": "x", "target": "y", "mask": "[HAT]"},
    ]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n\n")
    about = _prepare(folder, tmp_path / "out", tokenizer, kind="instructions")
    assert (about["records"], about["bad_lines"]) == (2, 2)
    records = open_dataset(tmp_path / "out", tokenizer).records
    first, second = Record.decode(records[0]), Record.decode(records[1])
    prompt = tokenizer.encode("Capital of France?")
    assert first.tokens.tolist() == prompt + tokenizer.encode("Paris")
    assert (first.prompt_length, first.mask) == (len(prompt), None)
    assert second.mask == "mask"
    assert tokenizer.special_tokens.mask in second.tokens[: second.prompt_length]


def test_marked_multi_frame_and_misnamed_files_are_read_whole(tmp_path, tokenizer):
    folder = tmp_path / "source"
    folder.mkdir()
    pack = lambda text: zstandard.ZstdCompressor().compress(text.encode())
    (folder / "a.jsonl.zst").write_bytes(pack('\ufeff{"text": "one"}\n') + pack('{"text": "two"}'))
    (folder / "b.txt").write_bytes(gzip.compress("\ufeffthree\x0cthree\r\nfour".encode()))
    (folder / "c.txt").write_bytes("\ufefffive\u2028five\n".encode() + b"six\n" * 500)
    about = _prepare(folder, tmp_path / "out", tokenizer, window=100, part_bytes=100)
    assert about["bad_lines"] == 0
    texts = [tokenizer.decode(tokens[:-1]) for tokens in _tokens(tmp_path / "out", tokenizer)]
    assert texts[:5] == ["one", "two", "three\x0cthree", "four", "five\u2028five"]
    assert texts[5:] == ["six"] * 500


def test_lines_that_are_no_text_are_counted_and_named(tmp_path, tokenizer):
    folder = tmp_path / "source"
    folder.mkdir()
    lines = [b'{"text": "a \\ud83d"}', b"[" * 100_000, b'{"text": NaN}', b"\xff", b'"\0"', b"{}"]
    (folder / "a.jsonl").write_bytes(b"\n".join([*lines, b'{"text": "good"}']))
    about = _prepare(folder, tmp_path / "out", tokenizer, part_bytes=10**6)
    assert (about["records"], about["bad_lines"]) == (1, 6)
    listed = (tmp_path / "out" / "bad_lines.txt").read_text().splitlines()
    reasons = [
        "half of a char",
        "nested",
        "NaN",
        "not UTF-8",
        "NUL",
        'not a JSON object with "text"',
    ]
    for number, (line, reason) in enumerate(zip(listed, reasons, strict=True), 1):
        assert line.startswith(f"{folder / 'a.jsonl'}:{number}: ")
        assert reason in line
        assert len(line) < 300
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=r"no text .*; 6 bad lines, the first: .*a\.jsonl:1: "):
        _prepare(folder, tmp_path / "none", tokenizer, part_bytes=10**6)


def test_damaged_notes_of_a_folder_are_named(source, tmp_path, tokenizer):
    _prepare(source, tmp_path / "out", tokenizer)
    for content in (b"{", b"[]", b"[" * 100_000, b"\xff\xfe{\0", b"{}"):
        for name in ("dataset.json", "plan.json"):
            (tmp_path / "out" / name).write_bytes(content)
        with pytest.raises(DataError, match=r"dataset\.json: .*prepare the data again"):
            open_dataset(tmp_path / "out", tokenizer)
        with pytest.raises(DataError, match=r"plan\.json.*prepare it again|begun with another"):
            _prepare(source, tmp_path / "out", tokenizer)


def test_what_does_not_fit_is_refused(source, tmp_path, tokenizer):
    _prepare(source, tmp_path / "out", tokenizer)
    with pytest.raises(DataError, match="begun with another window"):
        _prepare(source, tmp_path / "out", tokenizer, window=30)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(OutputError, match="not empty"):
        _prepare(source, tmp_path / "full", tokenizer)
    about = json.loads((tmp_path / "out" / "dataset.json").read_text())
    (tmp_path / "out" / about["shards"][2]).rename(tmp_path / "gone")
    with pytest.raises(DataError, match=r"00002-of-\d+.array_record is missing"):
        open_dataset(tmp_path / "out", tokenizer)
    about["tokenizer"] = "0" * 64
    (tmp_path / "out" / "dataset.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match="another tokenizer"):
        open_dataset(tmp_path / "out", tokenizer)


def test_a_broken_archive_is_named(tmp_path, tokenizer):
    folder = tmp_path / "source"
    folder.mkdir()
    content = gzip.compress(bytes(np.random.default_rng(0).integers(32, 120, 9000, np.uint8)))
    (folder / "a.txt.gz").write_bytes(content[:2000])
    with pytest.raises(UserError, match=r"a\.txt\.gz: cannot be read to its end"):
        _prepare(folder, tmp_path / "out", tokenizer)
