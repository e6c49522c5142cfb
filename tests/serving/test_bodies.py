"""Bodies that are no requests: one error each, at a price that does not grow with them."""

import pytest
from fastapi import HTTPException
from served import NAME, list_of

from glm_jax.serving.bodies import parse
from glm_jax.serving.schemas import CompletionRequest

LARGE = 1_000_000


def _with(**fields):
    """A completion request some of whose fields are JSON as it is given."""
    whole = {"model": f'"{NAME}"', "prompt": '"a"'} | fields
    return ("{" + ",".join(f'"{name}": {value}' for name, value in whole.items()) + "}").encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"null", "expected a JSON object"),
        (_with()[:-1], "not JSON"),
        ('{"model": "é"}'.encode("latin-1"), "not UTF-8 at byte 12"),
        ('{"model": "a"}'.encode("utf-16"), "not UTF-8"),
        (_with(temperature="NaN"), "NaN is no number"),
        (_with(temperature="-Infinity"), "-Infinity is no number"),
        (_with(temperature="1e400"), "temperature: Input should be a finite number"),
        (_with(temperature="1" + "0" * 400), "temperature: Input should be"),
        (_with(top_k="1" + "0" * 400), "top_k: Input should be"),
        (_with(top_k="1e400"), "top_k: Input should be a valid integer"),
        (_with(top_k="9" * 5000), "a number of too many digits"),
        (_with(top_k="true"), "top_k: Input should be a valid integer"),
        (_with(seed="1e30"), "seed: Input should be less"),
        (_with(no_repeat_ngram="1000001"), "no_repeat_ngram: Input should be less"),
        (_with(prompt="[" * 100_000), "too many brackets"),
        (_with(prompt='{"a":' * 100_000), "too many brackets"),
        (_with(prompt=r'"a \ud83d [MASK]."'), r"half of a surrogate pair, '\ud83d'"),
        (_with(stop=r'["\ude00\ud83d"]'), r"half of a surrogate pair, '\ude00'"),
        (b'{"\\ud83d": 1}', r"half of a surrogate pair, '\ud83d'"),
        (b'{"model": "a", "model": "a", "prompt": "a"}', "'model' twice"),
        (_with(stream_options='{"a": 1, "a": 1}'), "'a' twice"),
        (_with(unheard="1"), "unheard: Extra inputs are not permitted"),
        (_with(**{f"x{i}": "1" for i in range(300)}), "an object of 302 names"),
        (_with(**{"x" * LARGE: "1"}), "Extra inputs are not permitted"),
        (_with(prompt='["a", 1]'), "prompt: Input should be a valid"),
        (_with(prompt="[[]]"), "prompt: List should have at least 1 item"),
        (_with(stop=list_of("1", LARGE)), "stop: "),
        (_with(banned_texts=list_of("1", LARGE)), "banned_texts: "),
    ],
)
def test_a_body_that_is_no_request(content, message):
    with pytest.raises(HTTPException) as caught:
        parse(CompletionRequest, content)
    assert caught.value.status_code == 400
    found = caught.value.detail["message"]
    assert message in found
    assert len(found) < 300
    assert "\n" not in found


def test_odd_bodies_that_are_requests():
    smile = _with(prompt=r'"\ud83d\ude00"')
    assert parse(CompletionRequest, smile).prompt == "\U0001f600"
    assert parse(CompletionRequest, b"\xef\xbb\xbf" + smile).prompt == "\U0001f600"
    assert parse(CompletionRequest, _with(top_k="2.0")).top_k == 2
