"""What a person sees: tokens as they come, blanks in colour, ids kept."""

import io

import pytest
from stub_tokenizer import WordTokenizer

from glm_jax.engine.beam_search import BeamSearch
from glm_jax.engine.sampling import Sampling
from glm_jax.generation.blank_filling import fill_blanks
from glm_jax.generation.terminal import Strategy, ask_texts, fill_all, render

GREEN, PLAIN = "\x1b[32;4m", "\x1b[0m"


class _Terminal(io.StringIO):
    """A terminal that remembers each thing that was written."""

    def __init__(self):
        super().__init__()
        self.writes = []

    def isatty(self):
        return True

    def write(self, text):
        self.writes.append(text)
        return super().write(text)


def _plain(text):
    return text.replace(GREEN, "").replace(PLAIN, "")


@pytest.mark.parametrize(
    ("text", "speculate"),
    [("t5 t9 [MASK] t33 [MASK] t7", 0), ("t100 t21 [gMASK]", 3), ("t12 t13", 0)],
)
def test_tokens_are_printed_as_they_come(golden_float32, golden_special, text, speculate):
    config, params = golden_float32
    tokenizer, terminal = WordTokenizer(golden_special), _Terminal()
    strategy = Strategy(Sampling(), 30, speculate=speculate)
    assert fill_all(params, config, tokenizer, [text], strategy, False, terminal) == 0
    filled = fill_blanks(params, config, tokenizer, text, max_length=30)
    printed = terminal.getvalue()
    assert _plain(printed) == filled.text + "\n"
    coloured = [w for w in terminal.writes if w.startswith(GREEN)]
    assert all(w.endswith(PLAIN) for w in coloured)
    # A token a write, not the answer in one.
    assert len(coloured) == sum(len(blank.split()) for blank in filled.blanks) > 4
    assert "".join(map(_plain, coloured)).split() == " ".join(filled.blanks).split()


def test_ids_come_back(golden_float32, golden_special, capsys):
    config, params = golden_float32
    tokenizer, strategy = WordTokenizer(golden_special), Strategy(Sampling(), max_tokens=2)
    texts = ["q1\tt5 [gMASK]", "no tab"]
    assert fill_all(params, config, tokenizer, texts, strategy, with_id=True) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("q1\tt5 ")
    assert len(printed.out.split()) == 4
    assert printed.err == "error: line 2: no tab between an id and a text (--with_id)\n"


def test_beams_are_printed_whole(golden_float32, golden_special):
    config, params = golden_float32
    terminal = _Terminal()
    strategy = Strategy(BeamSearch(2), max_tokens=3)
    tokenizer = WordTokenizer(golden_special)
    assert fill_all(params, config, tokenizer, ["t5 [gMASK]"], strategy, False, terminal) == 0
    assert len(_plain(terminal.getvalue()).split()) == 4


def test_asking_ends_with_an_empty_line_or_the_end(monkeypatch, tmp_path):
    given = iter(["one", "two", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(given))
    assert list(ask_texts(tmp_path / "history")) == ["one", "two"]

    def end(_):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert list(ask_texts(None)) == []


def test_rendering(golden_float32, golden_special):
    config, params = golden_float32
    tokenizer = WordTokenizer(golden_special)
    filled = fill_blanks(params, config, tokenizer, "t5 [MASK] t7", max_length=12)
    assert render(filled, in_colour=False) == filled.text
    assert _plain(render(filled, in_colour=True)) == filled.text
    assert GREEN in render(filled, in_colour=True)
