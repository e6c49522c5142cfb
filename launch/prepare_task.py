"""Makes a task's files from a data set in its public format.

    python -m launch.prepare_task --dataset=glue_cola --input=CoLA/dev.tsv --output=DATA
    python -m launch.prepare_task --dataset=mmlu --input=MMLU/data --output=DATA
    python -m launch.prepare_task --dataset=crows_pairs --input=crows_pairs_anonymized.csv \\
        --tokenizer=CHECKPOINT --output=DATA
"""

from pathlib import Path

from absl import flags

from glm_jax import cli
from glm_jax.evaluation.dataset_conversion import (
    PromptFileError,
    load_prompt_file,
    prepare_crows_pairs,
    prepare_mmlu,
    prepare_task,
)
from glm_jax.evaluation.texts import TEXTS, prepare_text
from glm_jax.tokenizer import Tokenizer

FLAGS = flags.FLAGS
_MMLU, _CROWS_PAIRS = "mmlu", "crows_pairs"
flags.DEFINE_string(
    "dataset", None, "name of a data set: of a file in --prompts, or of a text", required=True
)
flags.DEFINE_string("prompts", "configs/prompts", "folder of prompt files")
flags.DEFINE_string("input", None, "file or folder of the data set", required=True)
flags.DEFINE_string("output", None, "folder of the data of all tasks", required=True)
flags.DEFINE_string("split", "validation", "name of the file that is written")
flags.DEFINE_string("examples", None, "file of answered examples, for prompts that begin with some")
flags.DEFINE_string("tokenizer", None, "tokenizer's folder or .model file; crows_pairs needs one")


def main() -> None:
    source, output = Path(FLAGS.input), Path(FLAGS.output)
    folder = Path(cli.packaged(FLAGS.prompts))
    file = folder / f"{FLAGS.dataset}.yaml"
    if FLAGS.dataset in TEXTS:
        written = prepare_text(FLAGS.dataset, source, output)
    elif FLAGS.dataset == _CROWS_PAIRS:
        if FLAGS.tokenizer is None:
            raise PromptFileError("crows_pairs is made of tokens: give --tokenizer")
        written = prepare_crows_pairs(source, output, Tokenizer(FLAGS.tokenizer))
    elif FLAGS.dataset == _MMLU:
        written = prepare_mmlu(file, source, output)
    else:
        if not file.is_file():
            names = {path.stem for path in folder.glob("*.yaml")}
            known = sorted(names | set(TEXTS) | {_CROWS_PAIRS})
            raise PromptFileError(f"--dataset={FLAGS.dataset}: one of {', '.join(known)}")
        examples = None if FLAGS.examples is None else Path(FLAGS.examples)
        prompts = load_prompt_file(file)
        written = prepare_task(prompts, source, output, FLAGS.split, examples)
    for path, count in written.items():
        print(f"{path}: {count} lines")


if __name__ == "__main__":
    cli.run(main)
