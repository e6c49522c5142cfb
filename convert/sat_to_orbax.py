"""Converts the released shards, at any shard count, to a model folder.

python -m convert.sat_to_orbax --input=DOWNLOADS --output=DIR --tokenizer=ice_text.model
"""

from pathlib import Path

import jax
from absl import flags

from convert.conversion import PIECES, Options, convert_shards, keep_freed_memory
from glm_jax import cli, processes
from glm_jax.files import locked
from glm_jax.tokenizer import Tokenizer

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "input",
    None,
    "released shards: a folder with `latest`, an iteration's folder, a .tar, or its parts",
    required=True,
)
flags.DEFINE_string("output", None, "folder to write; must be missing or empty", required=True)
flags.DEFINE_integer(
    "num_heads", None, "number of attention heads, where the shards do not say", lower_bound=1
)
flags.DEFINE_integer(
    "max_sequence_length",
    2048,
    "number of positions that the model was trained with",
    lower_bound=1,
)
flags.DEFINE_string("tokenizer", None, "tokenizer's folder or .model file, copied into the output")
flags.DEFINE_enum(
    "dtype", None, ["float16", "bfloat16", "float32"], "dtype of floats; as stored by default"
)
flags.DEFINE_string(
    "quantization", None, "quantises on the way: int8, int4, or such as int4,group=128"
)
flags.DEFINE_bool("allow_non_finite", False, "accept weights that are NaN or infinite")
flags.DEFINE_bool(
    "allow_differing_copies",
    False,
    "where shards' copies of a whole tensor differ, take the first shard's",
)
flags.DEFINE_bool("checksums", True, "compare what is read with the files' checksums")
flags.DEFINE_integer(
    "process_id", None, "index of this process among --num_processes, from 0", lower_bound=0
)
flags.DEFINE_integer(
    "num_processes", None, "number of processes that share the work", lower_bound=1
)


def main() -> None:
    # Nothing is computed on an accelerator; arrays over many devices are stored in pieces.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", PIECES)
    keep_freed_memory()
    _, index, count = processes.resolve(None, FLAGS.num_processes, FLAGS.process_id, True)
    options = Options(
        num_heads=FLAGS.num_heads,
        max_sequence_length=FLAGS.max_sequence_length,
        dtype=FLAGS.dtype,
        quantization=FLAGS.quantization,
        allow_non_finite=FLAGS.allow_non_finite,
        allow_differing_copies=FLAGS.allow_differing_copies,
        is_checked=FLAGS.checksums,
        process_id=index,
        num_processes=count,
    )
    tokenizer = None if FLAGS.tokenizer is None else Tokenizer(FLAGS.tokenizer)
    with locked(Path(FLAGS.output), index, count):
        convert_shards(FLAGS.input, Path(FLAGS.output), options, tokenizer)


if __name__ == "__main__":
    cli.run(main)
