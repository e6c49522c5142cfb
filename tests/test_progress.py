"""Progress: a bar in a terminal, lines in a file."""

import io

import pytest

from glm_jax import progress


class _Stream(io.StringIO):
    def __init__(self, is_terminal):
        super().__init__()
        self.isatty = lambda: is_terminal


def _stream(monkeypatch, is_terminal):
    stream = _Stream(is_terminal)
    monkeypatch.setattr(progress.sys, "stderr", stream)
    return stream


EITHER = pytest.mark.parametrize("is_terminal", [False, True], ids=["file", "terminal"])


@EITHER
def test_it_is_a_bar_in_a_terminal_and_lines_elsewhere(is_terminal, monkeypatch):
    stream = _stream(monkeypatch, is_terminal)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    assert list(progress.progress_bar("abc", desc="reading", unit="letter")) == ["a", "b", "c"]
    shown = stream.getvalue()
    if is_terminal:
        assert shown.count("\r") >= 2
        assert "3/3" in shown
        return
    assert "\r" not in shown
    lines = shown.splitlines()
    assert all(line.startswith("reading: ") for line in lines)
    counts = [line.split()[1] for line in lines]
    assert sorted(set(counts)) == ["0/3", "1/3", "2/3", "3/3"]
    assert counts == sorted(counts)


def test_lines_are_far_apart(monkeypatch):
    stream = _stream(monkeypatch, False)
    bar = progress.progress_bar(desc="working", total=1000, initial=10)
    for _ in range(990):
        bar.update()
    bar.set_postfix_str("7 tokens/s", refresh=False)
    bar.close()
    first, last = stream.getvalue().splitlines()
    assert "10/1000" in first
    assert "1000/1000" in last
    assert last.endswith(", 7 tokens/s]")


@EITHER
def test_of_unknown_length_it_counts(is_terminal, monkeypatch):
    stream = _stream(monkeypatch, is_terminal)
    assert sum(progress.progress_bar(iter([1, 2]), desc="reading", unit="doc")) == 3
    assert "reading: 2doc [" in stream.getvalue()


def test_a_bar_that_is_off_says_nothing(monkeypatch):
    stream = _stream(monkeypatch, False)
    with progress.progress_bar(desc="working", total=2, disable=True) as bar:
        bar.update()
    assert stream.getvalue() == ""
