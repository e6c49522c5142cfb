"""The main job from end to end, on a small model and real input.

    python -m launch.demo --output=DIR

Writes a bilingual corpus of facts, trains a tokenizer and a GLM model on it, exports the
model as released-layout shards, converts those back, quantises, and evaluates all three
precisions on facts in forms that were held out: to choose, to fill in, to predict. Then
teaches it a new relation by adapters.
"""

import shutil
import time
from pathlib import Path
from typing import Any

from absl import flags

from configs import demo as demo_config
from convert.conversion import Options, convert_shards
from convert.sat_writer import write_shards
from glm_jax import cli
from glm_jax.checkpoints.model_folder import restore
from glm_jax.data import facts
from glm_jax.evaluation.fact_tasks import write_fact_tasks
from glm_jax.evaluation.run import evaluate
from glm_jax.evaluation.tasks import Model
from glm_jax.files import locked, refuse_non_empty
from glm_jax.generation.blank_filling import fill_blanks
from glm_jax.jobs.batch_job import Share
from glm_jax.model.device_layout import prepare
from glm_jax.tokenizer import train_tokenizer
from glm_jax.training.loop import train
from glm_jax.training.results import MODEL_FOLDER
from launch.demo_finetuning import interval, teach

FLAGS = flags.FLAGS
flags.DEFINE_string("output", "demo_output", "folder to write; an earlier demo there is removed")
flags.DEFINE_integer(
    "steps", None, "training steps; as in configs/demo.py by default", lower_bound=1
)

_SHARDS = 4
_TEXT_FILE = "facts.txt"
_TEXTS = (
    "The capital of France is [MASK].",
    "日本的首都是[MASK]。",
    "The capital of [MASK] is [MASK].",
    "The currency of Poland is",
    "巴西位于",
)


def main() -> None:
    began = time.perf_counter()
    output = Path(FLAGS.output)
    with locked(output):
        if not (output / _TEXT_FILE).exists():
            refuse_non_empty(output)  # what another demo left may go, nothing else
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        show(output)
    print(f"\nall of it took {time.perf_counter() - began:.0f} s")
    print(next_steps(output))


def show(output: Path) -> None:
    """Run all steps, from text to a fine-tuned model, in an empty folder."""
    corpus = facts.build_corpus()
    text = output / _TEXT_FILE
    text.write_text("\n".join(corpus.sentences) + "\n", encoding="utf-8")
    print(f"corpus: {len(corpus.sentences)} sentences, {len(corpus.questions)} forms held out")

    tokenizer = train_tokenizer(corpus.sentences, output / "tokenizer", 3000)
    experiment = demo_config.get_config()
    experiment.data.files, experiment.data.tokenizer = str(text), str(output / "tokenizer")
    experiment.steps = FLAGS.steps or experiment.steps
    experiment.model.vocab_size = -(-tokenizer.vocab_size // 64) * 64
    history = train(experiment, output / "run")
    print(
        "loss: "
        + ", ".join(
            f"{h['loss']:.2f} at {h['step']:.0f}" for h in history[:: max(1, len(history) // 6)]
        )
    )

    write_shards(output / "run" / MODEL_FOLDER, output / "released", _SHARDS)
    convert_shards(
        output / "released",
        output / "converted",
        Options(max_sequence_length=experiment.model.max_sequence_length),
        tokenizer,
    )
    tasks = write_fact_tasks(corpus, tokenizer, output / "tasks")
    results = {}
    for precision, quantization in (("float32", None), ("INT8", "int8"), ("INT4", "int4")):
        config, params = restore(output / "converted", dtype="float32", quantization=quantization)
        params = prepare(params)
        model = Model(params, config, tokenizer)
        folder, identity = output / "evaluation" / precision, {"quantization": quantization}
        found = evaluate(tasks, output / "tasks", folder, model, Share(0, 1, None), identity)
        assert found is not None
        results[precision] = found["tasks"]
    print(f"\nfilled by the {precision} model:")
    for prompt in _TEXTS:
        filled = fill_blanks(params, config, tokenizer, prompt, max_length=48)
        print(f"  {prompt}  ->  {filled.text}")
    print_table(results)
    baseline = facts.majority_accuracy(corpus.questions)
    print(f"filling in the commonest answer of a relation: {baseline:.1%}; choosing blindly: 25%")
    teach(output / "converted", corpus, output / "finetuning")


def next_steps(output: Path) -> str:
    """Commands to go on with, on what the demo has left."""
    model, adapter = output / "converted", output / "finetuning" / "run" / "adapter"
    return f"""
what to try next, with this environment active (docs/first_steps.md goes on):
  glm-jax generate --checkpoint={model}        # asks for texts with [MASK]
  glm-jax generate --checkpoint={model} --adapter={adapter} --quantization=int4
  glm-jax serve --checkpoint={model}           # a page to try it on, http://127.0.0.1:8000
  glm-jax evaluate --checkpoint={model} --task={output / "tasks"} --data={output / "tasks"} \\
      --output={output / "results"}
  glm-jax plot --workdir={output / "run"}               # its loss as curves.png"""


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """Each precision's numbers, with their 95% intervals, in English and Chinese."""
    print("\nforms that were held out, English and Chinese")
    columns = [(task, language) for task in results["float32"] for language in facts.LANGUAGES]
    print(f"{'precision':<10}" + "".join(f"{f'{t} {lang}':>23}" for t, lang in columns))
    for precision, tasks in results.items():
        cells = []
        for task, language in columns:
            [result] = tasks[task]["groups"][language]["files"].values()
            [(metric, number)] = result["metrics"].items()
            digits = 2 if metric == "BPB" else 1
            cells.append(interval(number, digits))
        print(f"{precision:<10}" + "".join(f"{cell:>23}" for cell in cells))
    print("choose, fill: percent right; predict: bits per byte, less is better")


if __name__ == "__main__":
    cli.run(main)
