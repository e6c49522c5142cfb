"""Learns a tokenizer from text.

python -m launch.train_tokenizer --input='corpus/*.txt' --output=DIR --num_text_tokens=8000
"""

from pathlib import Path

from absl import flags

from glm_jax import cli
from glm_jax.data.documents import find_files, read_documents
from glm_jax.files import locked, refuse_non_empty
from glm_jax.tokenizer import train_tokenizer

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "input", None, "comma-separated text or .jsonl files and patterns", required=True
)
flags.DEFINE_string("output", None, "folder to write; must be missing or empty", required=True)
flags.DEFINE_integer(
    "num_text_tokens", 8000, "pieces of text, bytes included", lower_bound=300, upper_bound=10**6
)


def main() -> None:
    output = Path(FLAGS.output)
    with locked(output):
        refuse_non_empty(output)
        documents = read_documents(find_files(FLAGS.input))
        # What cannot be written is known before the work, not after it.
        output.mkdir(parents=True, exist_ok=True)
        tokenizer = train_tokenizer(documents, output, FLAGS.num_text_tokens)
    print(f"wrote {FLAGS.output}: {tokenizer.vocab_size} ids, special tokens included")


if __name__ == "__main__":
    cli.run(main)
