"""Converts the released shards, at any shard count, to one Orbax checkpoint.

python -m convert.sat_to_orbax --input=DIR --output=DIR --num_heads=96
"""

from pathlib import Path

from absl import flags

from convert.sat_reader import convert_shards
from glm_jax import cli
from glm_jax.tokenizer import Tokenizer

FLAGS = flags.FLAGS
flags.DEFINE_string("input", None, "folder with `latest`, or an iteration's folder", required=True)
flags.DEFINE_string("output", None, "folder to write; must not hold anything", required=True)
flags.DEFINE_integer("num_heads", None, "attention heads (released: 96)", required=True)
flags.DEFINE_integer("max_sequence_length", 2048, "positions that the model was trained with")
flags.DEFINE_string("tokenizer", None, "folder or .model file, copied into the output")


def main() -> None:
    convert_shards(
        Path(FLAGS.input),
        Path(FLAGS.output),
        FLAGS.num_heads,
        FLAGS.max_sequence_length,
        None if FLAGS.tokenizer is None else Tokenizer(FLAGS.tokenizer),
    )


if __name__ == "__main__":
    cli.run(main)
