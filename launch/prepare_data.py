"""Tokenises text into shards for training; the same command goes on where an earlier one stopped.

    python -m launch.prepare_data --input='english/*.jsonl.zst' --output=data/en \\
        --tokenizer=DIR --language=en
"""

import os
from pathlib import Path

from absl import flags

from glm_jax import cli
from glm_jax.data import pipeline
from glm_jax.data.documents import KINDS_OF_FILES, find_files
from glm_jax.data.tokenize_files import prepare
from glm_jax.files import locked
from glm_jax.tokenizer import Tokenizer

FLAGS = flags.FLAGS
flags.DEFINE_string("input", None, "comma-separated files and patterns", required=True)
flags.DEFINE_string("output", None, "folder to write", required=True)
flags.DEFINE_string("tokenizer", None, "tokenizer's folder", required=True)
flags.DEFINE_enum(
    "kind", "text", KINDS_OF_FILES, "text: documents; instructions: prompts and targets"
)
flags.DEFINE_string("language", "text", "name of the data set in metrics")
flags.DEFINE_integer("sequence_length", 2048, "tokens of a row in training", lower_bound=8)
flags.DEFINE_integer(
    "processes", os.cpu_count(), "number of processes that tokenise", lower_bound=1
)
flags.DEFINE_integer(
    "max_bad_lines", 100, "maximum lines that cannot be used; they are left out and listed", 0
)


def main() -> None:
    output = Path(FLAGS.output)
    with locked(output):
        about = prepare(
            find_files(FLAGS.input),
            output,
            Tokenizer(FLAGS.tokenizer),
            kind=FLAGS.kind,
            language=FLAGS.language,
            window=pipeline.window_length(FLAGS.sequence_length),
            processes=FLAGS.processes,
            max_bad_lines=FLAGS.max_bad_lines,
        )
    print(
        f"wrote {FLAGS.output}: {about['records']} records, {about['tokens']} tokens, "
        f"{len(about['shards'])} shards; {about['bad_lines']} bad lines left out"
    )


if __name__ == "__main__":
    cli.run(main)
