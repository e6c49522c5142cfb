"""Text of users: packed, marked, cut, damaged, in other encodings."""

import gzip
from pathlib import Path

import pytest
import zstandard

from glm_jax.errors import UserError
from glm_jax.text_files import (
    check_characters,
    is_compressed,
    is_json_lines,
    parse_json,
    raw_lines,
    read_json,
    read_lines,
    read_text,
    to_json,
)

TEXT = "one\r\ntwo\x0cstill\u2028two\x85still\rtwo\n\n三"
LINES = ["one", "two\x0cstill\u2028two\x85still\rtwo", "", "三"]
SKIPPED_FRAME = b"\x50\x2a\x4d\x18\x02\x00\x00\x00hi"


def _zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _split_frames(content: bytes) -> bytes:
    return SKIPPED_FRAME + _zstd(content[:5]) + SKIPPED_FRAME + _zstd(content[5:])


@pytest.mark.parametrize("pack", [bytes, gzip.compress, _zstd, _split_frames])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "marked"])
@pytest.mark.parametrize("name", ["packed", "text.txt"])
def test_lines_are_the_same_however_a_file_is_compressed(tmp_path, pack, mark, name):
    suffix = {gzip.compress: ".gz", bytes: ""}.get(pack, ".zst") if name == "packed" else ""
    file = _write(tmp_path / f"{name}{suffix}", pack(mark + TEXT.encode()))
    assert list(read_lines(file)) == LINES
    assert read_text(file) == TEXT.replace("\r\n", "\n")
    assert is_compressed(file) == (pack is not bytes)


@pytest.mark.parametrize("pack", [gzip.compress, _zstd])
def test_a_file_that_was_cut_anywhere_or_goes_on_in_garbage_is_an_error(tmp_path, pack):
    packed = pack(b"a line\n" * 40)
    for end in range(len(packed)):
        file = _write(tmp_path / "cut.gz", packed[:end])
        with pytest.raises(UserError, match="cut"):
            list(raw_lines(file))
    for damaged in (packed + b"more", packed[:-6] + b"\xff" + packed[-5:]):
        file = _write(tmp_path / "damaged.zst", damaged)
        with pytest.raises(UserError, match=r"damaged\.zst: .* cut off or damaged"):
            read_text(file)


def test_what_is_unpacked_at_once_stays_small(tmp_path):
    content = b"a" * 30_000_000
    file = _write(tmp_path / "small.zst", zstandard.ZstdCompressor().compress(content))
    assert next(raw_lines(file)) == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text".encode("utf-16"), "UTF-16"),
        (b"\xfe\xff\x00t", "UTF-16"),
        (gzip.compress("text".encode("utf-16"), mtime=0), "UTF-16"),
        ("text".encode("utf-16-le"), ":1: a NUL byte"),
        (b"fine\n\xff\xd8", ":2: not UTF-8 at byte 1"),
        (b"fine\ncut \xe4\xb8\n", ":2: not UTF-8 at byte 5"),
        (b"PK\x03\x04...", "zip"),
        (b"\xfd7zXZ\x00...", "xz"),
        (b"BZh91AY&SY...", "bzip2"),
    ],
)
def test_other_encodings_and_binary_files_are_named(tmp_path, content, message):
    file = _write(tmp_path / "file.txt", content)
    for read in (lambda: list(read_lines(file)), lambda: read_text(file)):
        with pytest.raises(UserError, match=message) as raised:
            read()
        assert str(raised.value).startswith(str(file))
        assert "\n" not in str(raised.value)


def test_plain_text_named_as_packed_folders_and_missing_files_are_one_line(tmp_path):
    for name, message in [
        ("a.gz", "not compressed"),
        ("a.zst", "not compressed"),
        ("b.zst", "empty"),
    ]:
        content = b"text" if message == "not compressed" else b""
        file = _write(tmp_path / name, content)
        for read in (lambda path: list(raw_lines(path)), is_compressed, read_text):
            with pytest.raises(UserError, match=f"{name}: {message}"):
                read(file)
    for path, message in [(tmp_path, "Is a directory"), (tmp_path / "no", "No such file")]:
        with pytest.raises(UserError, match=message):
            read_text(path)


def test_the_parts_of_a_file_hold_each_line_once(tmp_path):
    for mark in (b"", b"\xef\xbb\xbf"):
        content = mark + b"a\n\nlonger line\r\nlast"
        file = _write(tmp_path / "parts.txt", content)
        for size in range(1, len(content) + 1):
            parts = [raw_lines(file, at, at + size) for at in range(0, len(content), size)]
            assert [x for part in parts for x in part] == [b"a", b"", b"longer line", b"last"]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "[NaN]",
        "[1e400]",
        "-Infinity",
        "9" * 5000,
        "[" * 101 + "]" * 101,
        "",
    ],
)
def test_what_is_no_json_is_one_line(tmp_path, text):
    with pytest.raises(UserError, match=r"^not JSON: ") as raised:
        parse_json(text)
    assert len(str(raised.value)) < 200
    assert "sys." not in str(raised.value)
    with pytest.raises(UserError, match=r"file\.json: not JSON: "):
        read_json(_write(tmp_path / "file.json", text.encode()))


def test_json_of_a_hundred_levels_and_many_brackets_is_read():
    assert parse_json("[" * 100 + "]" * 100)
    assert len(parse_json("[" + "[],{}," * 1000 + "[1.5]]")) == 2001


def test_written_json_has_no_nan():
    value = {"loss": float("nan"), "scales": [1.5, float("inf")], "step": 3, "text": "NaN"}
    expected = {"loss": None, "scales": [1.5, None], "step": 3, "text": "NaN"}
    assert parse_json(to_json(value, indent=1)) == expected


def test_halves_of_characters_are_named():
    check_characters({"whole": ["😀", 1, None]})
    for text in ('"a \\ud83d b"', '[1, {"a": ["a \\ud83d"]}]', '{"a \\ud83d": 1}'):
        with pytest.raises(UserError, match=r"\\ud83d at character 3"):
            check_characters(parse_json(text))


def test_json_lines_are_known_by_their_name():
    names = ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.zst", "A.JSONL.GZ"]
    assert all(is_json_lines(Path(name)) for name in names)
    assert not any(is_json_lines(Path(name)) for name in ["a.txt", "a.gz", "json", "a.jsonl.txt"])
