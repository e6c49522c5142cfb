"""Fills blanks in texts that are typed in, or in each line of a file.

python -m launch.generate --checkpoint=DIR [--quantization=int4] [--input=FILE]
"""

from pathlib import Path

from absl import flags

from glm_jax import cli
from glm_jax.engine.prompt import PromptError
from glm_jax.generation.terminal import Strategy, ask_texts, fill_all, read_texts
from glm_jax.sharding import parse_mesh
from launch.model_flags import (
    define_model_flags,
    define_speculation_flags,
    define_strategy_flags,
    load_model,
    load_small_model,
    load_tokenizer,
    strategy,
)

FLAGS = flags.FLAGS
define_model_flags()
define_strategy_flags()
define_speculation_flags()
flags.mark_flag_as_required("checkpoint")
flags.DEFINE_string(
    "input", None, "file with one text a line; without it, texts are typed in the terminal"
)
flags.DEFINE_bool("with_id", False, "read and write lines of ID<tab>TEXT")
flags.DEFINE_string(
    "history",
    "~/.glm_jax_history",
    "file with the lines typed before, for the arrow keys; empty for none",
)


def main() -> None:
    settings = strategy()
    texts = None if FLAGS.input is None else read_texts(FLAGS.input)
    tokenizer = load_tokenizer()
    guide = settings.guide(tokenizer)  # before a model is read
    mesh = None if FLAGS.mesh is None else parse_mesh(FLAGS.mesh)
    choice = Strategy(
        settings.choice(tokenizer.encode),
        FLAGS.max_length,
        settings.max_tokens,
        FLAGS.seed,
        settings.unidirectional,
        FLAGS.speculate,
        load_small_model(mesh, tokenizer),
        guide,
    )
    config, params = load_model(mesh)
    if texts is None:
        history = Path(FLAGS.history).expanduser() if FLAGS.history else None
        fill_all(params, config, tokenizer, ask_texts(history), choice, FLAGS.with_id)
        return
    failures = fill_all(params, config, tokenizer, texts, choice, FLAGS.with_id)
    if failures:
        raise PromptError(f"{failures} of the texts could not be filled")


if __name__ == "__main__":
    cli.run(main)
