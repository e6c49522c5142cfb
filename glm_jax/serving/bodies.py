"""Reads the JSON of a request with bounded work, and one error for whatever is wrong with it."""

import collections
import itertools
import json
from typing import Any, NoReturn, TypeVar

from fastapi import HTTPException
from pydantic import BaseModel, ValidationError

from glm_jax.serving.errors import refused

_MAX_MEMBERS = 256  # of an object
_MAX_SHOWN = 80  # characters of a client's own that an error repeats
_MAX_STEPS, _MAX_STEP = 4, 20  # of a location within a field, and characters of each
_Model = TypeVar("_Model", bound=BaseModel)


def parse(kind: type[_Model], content: bytes) -> _Model:
    """Parse a body as a request of some kind.

    Raises:
      HTTPException: 400 with one reason, whose length does not grow with the body.
    """
    text = _checked(content)
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise _invalid(error) from None


def _checked(content: bytes) -> str:
    """Return the text of a body, without what pydantic would accept or report item by item."""
    try:
        text = content.decode("utf-8-sig")
        content = json.loads(text, object_pairs_hook=_members, parse_constant=_no_number)
        if "\\u" in text:  # may write half of a surrogate pair
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise refused(400, f"the body: not UTF-8 at byte {error.start + 1}") from None
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise refused(400, f"the body: half of a surrogate pair, {half}, is no text") from None
    except json.JSONDecodeError as error:
        raise refused(400, f"the body: not JSON: {error}") from None
    except RecursionError:
        raise refused(400, "the body: too many brackets in brackets") from None
    except ValueError:  # of int(), whose own message is about Python's settings
        raise refused(400, "the body: a number of too many digits") from None
    if not isinstance(content, dict):
        raise refused(400, "the body: expected a JSON object")
    return text


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object of unique names: parsers disagree on which of two values counts."""
    if len(pairs) > _MAX_MEMBERS:
        raise refused(400, f"the body: an object of {len(pairs)} names; at most {_MAX_MEMBERS}")
    members = dict(pairs)
    if len(members) < len(pairs):
        [(name, _)] = collections.Counter(name for name, _ in pairs).most_common(1)
        raise refused(400, f"the body: the name {name[:_MAX_SHOWN]!a} twice in one object")
    return members


def _no_number(name: str) -> NoReturn:
    raise refused(400, f"the body: {name} is no number of JSON's")


def _invalid(error: ValidationError) -> HTTPException:
    """Return the error to raise for the first field that is wrong."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    param = str(errors[0]["loc"][0])[:_MAX_SHOWN]
    # A field of several forms has an error for each; one about its type says least.
    of_param = [item for item in errors if item["loc"][0] == errors[0]["loc"][0]]
    specific = [item for item in of_param if not item["type"].endswith("_type")] or of_param
    reasons = dict.fromkeys(item["msg"] for item in specific)
    # Where forms differ, so do the ends of their locations.
    steps = zip(*(item["loc"][1 : 1 + _MAX_STEPS] for item in of_param), strict=False)
    common = itertools.takewhile(lambda step: len(set(step)) == 1, steps)
    where = "".join(_step(part) for part, *_ in common)
    message = f"{param}: " + "; or: ".join(reasons)
    return refused(400, f"{message}, at {param}{where}" if where else message, param)


def _step(part: str | int) -> str:
    """Return one step of a location within a field."""
    if isinstance(part, str) and part.isidentifier():
        return "." + part[:_MAX_STEP]
    return f"[{part[:_MAX_STEP]!a}]" if isinstance(part, str) else f"[{part}]"
