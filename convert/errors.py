"""How a converter says that its input is wrong."""

import sys
from collections.abc import Callable

from absl import app

from glm_jax.config import ConfigError
from glm_jax.model.checkpoint import CheckpointError
from glm_jax.quantization import QuantizationError
from glm_jax.sharding import MeshError
from glm_jax.tokenizer import TokenizerError


class ConvertError(ValueError):
    """Input that cannot be converted: one line with what is wrong, where, what to do."""


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a command-line tool: a user's error is one line on stderr and exit status 1."""

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            print(f"error: unexpected argument {argv[1]!r}: all input is by flags", file=sys.stderr)
            sys.exit(2)
        try:
            main(argv)
        except (ConvertError, CheckpointError, ConfigError, MeshError, QuantizationError, TokenizerError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    app.run(guarded)
