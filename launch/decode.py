"""Answers every prompt of a file; the same command goes on where an earlier one stopped.

    python -m launch.decode --checkpoint=DIR --input=prompts.jsonl --output=DIR --mesh=1,1,8
    python -m launch.decode --output=DIR --merge

Several processes share the prompts: where the mesh's data axis divides by their number each
has a model of its own (--num_processes and --process_id are enough then), else all run one
model together (--coordinator too).
"""

from pathlib import Path

from absl import flags

from glm_jax import cli
from glm_jax.files import locked
from glm_jax.jobs.batch_job import BatchJob, Share, run_batch
from glm_jax.jobs.record_store import merge
from launch.model_flags import (
    adapter_names,
    define_engine_flags,
    define_model_flags,
    define_strategy_flags,
    engine_settings,
    load_model,
    load_small_model,
    load_tokenizer,
    model_identity,
    strategy,
)

FLAGS = flags.FLAGS
define_model_flags(names_adapters=True)
define_engine_flags()
define_strategy_flags()
cli.define_process_flags()
flags.DEFINE_string(
    "input", None, "prompts: JSON lines where its name ends in .jsonl or .json, else a text a line"
)
flags.DEFINE_string("output", None, "folder of the answers", required=True)
flags.DEFINE_bool("merge", False, "write all answers to one file, in the order of the input")
flags.DEFINE_bool("log_probabilities", False, "write the log-probability of each generated token")
flags.DEFINE_enum(
    "too_long",
    "error",
    ["error", "truncate"],
    "a text that leaves no room for an answer is an error, or loses its first tokens",
)
cli.require(("checkpoint", "input"), instead=("merge",))


def main() -> None:
    folder = Path(FLAGS.output)
    if FLAGS.merge:
        print(f"all answers are in {merge(folder)}")
        return
    share = Share.of_process(FLAGS.mesh, *cli.join_processes(may_be_apart=True))
    tokenizer = load_tokenizer()
    defaults = strategy()
    defaults.guide(tokenizer)  # before a model is read
    batch = BatchJob(
        source=Path(FLAGS.input),
        folder=folder,
        defaults=defaults.with_fields({"log_probabilities": FLAGS.log_probabilities}),
        seed=FLAGS.seed,
        truncates=FLAGS.too_long == "truncate",
        settings=engine_settings(),
        adapters=adapter_names(),
    )
    with locked(folder, share.process, share.count):
        batch.claim(model_identity())
        config, params = load_model(share.mesh)
        small = load_small_model(share.mesh, tokenizer)
        counts = run_batch(batch, share, config, params, tokenizer, small)
    if share.writes:
        print(
            f"prompts answered by this process: {counts.answered}, failed: {counts.failed}; "
            "--merge puts all answers together"
        )
        if FLAGS.speculate:
            print(f"{counts.drafts.accepted} of {counts.drafts.checked} draft tokens accepted")


if __name__ == "__main__":
    cli.run(main)
