"""Chat templates: Jinja files that make a prompt of messages, as transformers' chat templates do.

A template comes from whoever runs the server, messages from clients: it is rendered in jinja2's
sandbox, and whatever fails is one line.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from glm_jax.errors import UserError, shortened
from glm_jax.text_files import TextFileError, read_text


class ChatTemplateError(UserError):
    """A template that is none, or messages that it does not take."""


class _Generation(Extension):
    """`{% generation %}`, which marks what a model writes: rendered as if it were not there."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A template that makes a prompt of messages."""

    def __init__(self, source: str, name: str = "the chat template"):
        """
        Args:
          name: for messages.

        Raises:
          ChatTemplateError: the source is no template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(f"{name}:{error.lineno}: {error.message}") from error
        except (RecursionError, SyntaxError, MemoryError) as error:  # of Python's compiler
            raise ChatTemplateError(f"{name}: nested too deeply") from error

    @classmethod
    def read(cls, file: str) -> "ChatTemplate":
        """Read a template from a file.

        Raises:
          ChatTemplateError: it cannot be read, or is no template.
        """
        try:
            return cls(read_text(Path(file)), f"--chat_template={file}")
        except TextFileError as error:
            raise ChatTemplateError(f"--chat_template={error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """Return the prompt of messages, up to where the answer begins.

        Args:
          messages: each with `role` and `content`.
          variables: further ones of the template.

        Raises:
          ChatTemplateError: the template refuses the messages, or fails on them.
        """
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **variables,
            )
        except _RefusedError as error:
            reason = f"refuses the messages: {error}"
        except Exception as error:  # of whatever the template does with them
            reason = f"fails on these messages: {error or type(error).__name__}"
        line = " ".join(reason.split())
        raise ChatTemplateError(shortened(f"the server's chat template {line}"))


class _RefusedError(jinja2.TemplateError):
    """What a template raises by `raise_exception`."""


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _to_json(value: Any, **options: Any) -> str:
    # jinja2's own filter escapes what HTML has a meaning for.
    return json.dumps(value, **{"ensure_ascii": False} | options)
