"""The main job from end to end, on a small model and real input: `make demo`.

Writes a bilingual corpus of facts, trains a tokenizer and a GLM model on it, exports the
model as released-layout shards, converts those back, quantises, and asks all three
precisions for facts in forms that were held out.
"""

import shutil
import time
from pathlib import Path

from absl import flags

from configs import demo as demo_config
from convert.conversion import Options, convert_shards
from convert.sat_writer import write_shards
from glm_jax import cli
from glm_jax.data import facts
from glm_jax.decoding.blank_filling import fill_blanks
from glm_jax.decoding.quiz import Score, ask
from glm_jax.model.checkpoint import refuse_non_empty, restore
from glm_jax.tokenizer import train_tokenizer
from glm_jax.training.loop import MODEL_FOLDER, train

FLAGS = flags.FLAGS
flags.DEFINE_string("output", "demo_output", "folder to write; an earlier demo there is removed")
flags.DEFINE_integer("steps", None, "training steps; those of configs/demo.py by default")

_SHARDS = 4
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
    text = output / "facts.txt"
    if not text.exists():
        refuse_non_empty(output)  # what another demo left may go, nothing else
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)

    corpus = facts.build_corpus()
    text.write_text("\n".join(corpus.sentences) + "\n", encoding="utf-8")
    print(f"corpus: {len(corpus.sentences)} sentences, {len(corpus.questions)} forms held out")

    tokenizer = train_tokenizer(corpus.sentences, output / "tokenizer", 3000)
    config = demo_config.get_config()
    config.data.files, config.data.tokenizer = str(text), str(output / "tokenizer")
    config.steps = FLAGS.steps or config.steps
    config.model.vocab_size = -(-tokenizer.vocab_size // 64) * 64
    history = train(config, output / "run")
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
        Options(max_sequence_length=config.model.max_sequence_length),
        tokenizer,
    )
    scores = {}
    for precision, quantization in (("float32", None), ("INT8", "int8"), ("INT4", "int4")):
        model, params = restore(output / "converted", dtype="float32", quantization=quantization)
        scores[precision] = ask(params, model, tokenizer, corpus.questions)
    print(f"\nfilled by the {precision} model:")
    for prompt in _TEXTS:
        filled = fill_blanks(params, model, tokenizer, prompt, max_length=48)
        print(f"  {prompt}  ->  {filled.text}")
    _print_table(scores, corpus.questions)
    print(f"\nall of it took {time.perf_counter() - began:.0f} s")


def _print_table(scores: dict[str, Score], questions: tuple[facts.Question, ...]) -> None:
    print("\naccuracy on held-out forms (exact match)")
    header = f"{'precision':<10}" + "".join(f"{r:>11}" for r in facts.RELATIONS)
    print(header + f"{'English':>10}{'Chinese':>10}{'all':>8}{'tokens/s':>10}")
    for precision, score in scores.items():
        cells = [score.accuracy(relation=r) for r in facts.RELATIONS]
        languages = [score.accuracy(language=language) for language in facts.LANGUAGES]
        print(
            f"{precision:<10}"
            + "".join(f"{cell:>11.1%}" for cell in cells)
            + "".join(f"{cell:>10.1%}" for cell in languages)
            + f"{score.accuracy():>8.1%}{score.tokens_per_second:>10.0f}"
        )
    baseline = facts.majority_accuracy(questions)
    print(f"always the commonest answer of a relation: {baseline:.1%} of all")


if __name__ == "__main__":
    cli.run(main)
