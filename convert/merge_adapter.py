"""Writes a model folder with adapters merged into a float model.

python -m convert.merge_adapter --input=DIR --adapter=WORKDIR/adapter --output=DIR
"""

from pathlib import Path

from absl import flags

from convert.merging import write_merged
from glm_jax import cli

FLAGS = flags.FLAGS
flags.DEFINE_string("input", None, "float model that was fine-tuned", required=True)
flags.DEFINE_string("adapter", None, "folder of adapters, of the run's workdir", required=True)
flags.DEFINE_string("output", None, "folder to write; must be missing or empty", required=True)


def main() -> None:
    write_merged(Path(FLAGS.input), Path(FLAGS.adapter), Path(FLAGS.output))


if __name__ == "__main__":
    cli.run(main)
