"""lm-evaluation-harness with our model in it; all its flags are its own.

python -m launch.harness --model glm_jax --model_args checkpoint=DIR --tasks lambada_openai
"""

import sys

from glm_jax.errors import UserError, system_refusal


def main() -> int:
    if {"-h", "--help"} & set(sys.argv[1:2]):
        print(__doc__)
    try:
        from lm_eval.__main__ import cli_evaluate

        from glm_jax.evaluation import harness  # noqa: F401  # registers the model
    except ImportError as error:
        print(f"error: {error}: pip install 'glm_jax[harness]'", file=sys.stderr)
        return 1
    try:
        cli_evaluate()
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is missing: pip install {error.name}", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if (refused := system_refusal(error, "standard output")) is None:
            raise
        print(f"error: {refused}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
