"""Writes a model as released-layout shards.

python -m convert.orbax_to_sat --input=DIR --output=DIR --shards=8
"""

from pathlib import Path

from absl import flags

from convert.sat_writer import ITERATION_RULE, is_iteration, write_shards
from glm_jax import cli

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "input", None, "model to write: a model folder, safetensors or released shards", required=True
)
flags.DEFINE_string("output", None, "folder to write; must be missing or empty", required=True)
flags.DEFINE_integer("shards", 8, "number of tensor-parallel shards to write", lower_bound=1)
flags.DEFINE_string("iteration", "49300", "name of the iteration's folder, which `latest` holds")
flags.register_validator("iteration", is_iteration, ITERATION_RULE)
flags.DEFINE_enum(
    "quantization", None, ["int8", "int4"], "quantises each shard's rows by themselves"
)
flags.DEFINE_string("adapter", None, "folder of adapters to merge into a float model")


def main() -> None:
    write_shards(
        Path(FLAGS.input),
        Path(FLAGS.output),
        FLAGS.shards,
        FLAGS.iteration,
        FLAGS.quantization,
        None if FLAGS.adapter is None else Path(FLAGS.adapter),
    )


if __name__ == "__main__":
    cli.run(main)
