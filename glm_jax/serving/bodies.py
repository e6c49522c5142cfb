"""A request's JSON, read with bounded work: whatever is wrong with it, one error says so."""

import collections
import json
from typing import Any, NoReturn, TypeVar

from fastapi import HTTPException
from pydantic import BaseModel, ValidationError

from glm_jax.serving.errors import refused

_MOST_MEMBERS = 256  # of an object
_SHOWN = 80  # characters of a client's own that an error repeats
_Model = TypeVar("_Model", bound=BaseModel)


def parse(kind: type[_Model], content: bytes) -> _Model:
    """The request that a body is.

    Raises:
      HTTPException: it is none; 400 and one reason, of a size that does not grow with the body.
    """
    text = _checked(content)
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise _invalid(error) from None


def _checked(content: bytes) -> str:
    """A body's JSON, of what pydantic would let pass or make an error of each."""
    try:
        text = content.decode("utf-8-sig")
        found = json.loads(text, object_pairs_hook=_members, parse_constant=_no_number)
        if "\\u" in text:  # which can write halves of characters
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise refused(400, f"the body: not UTF-8 at byte {error.start + 1}") from None
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise refused(400, f"the body: half of a surrogate pair, {half}, is no text") from None
    except json.JSONDecodeError as error:
        raise refused(400, f"the body: not JSON: {error}") from None
    except RecursionError:
        raise refused(400, "the body: too many brackets in brackets") from None
    except ValueError:  # Python says how to allow more, which is no client's affair
        raise refused(400, "the body: a number of too many digits") from None
    if not isinstance(found, dict):
        raise refused(400, "the body: expected a JSON object")
    return text


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, each name of which is there once: which of two counts, readers disagree on."""
    if len(pairs) > _MOST_MEMBERS:
        raise refused(400, f"the body: an object of {len(pairs)} names; at most {_MOST_MEMBERS}")
    found = dict(pairs)
    if len(found) < len(pairs):
        [(name, _)] = collections.Counter(name for name, _ in pairs).most_common(1)
        raise refused(400, f"the body: the name {name[:_SHOWN]!a} twice in one object")
    return found


def _no_number(name: str) -> NoReturn:
    raise refused(400, f"the body: {name} is no number of JSON's")


def _invalid(error: ValidationError) -> HTTPException:
    """What to say of the first field that is wrong."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    param = str(found[0]["loc"][0])[:_SHOWN]
    # What may have several forms has an error for each; the wrong kind is the least telling.
    of_param = [item for item in found if item["loc"][0] == found[0]["loc"][0]]
    telling = [item for item in of_param if not item["type"].endswith("_type")] or of_param
    reasons = dict.fromkeys(item["msg"] for item in telling)
    return refused(400, f"{param}: " + "; or: ".join(reasons), param)
