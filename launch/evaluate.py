"""Evaluates a model on tasks; the same command goes on where an earlier one stopped.

    python -m launch.evaluate --checkpoint=DIR --task=configs/tasks --data=DATA --output=OUT
    python -m launch.evaluate --compare=OUT_A/results.json,OUT_B/results.json
    python -m launch.evaluate --checkpoint=DIR --task=mine.yaml --data=DATA --check

Several processes share the examples as they do in `launch.decode`.
"""

from pathlib import Path

from absl import flags

from glm_jax import cli
from glm_jax.evaluation import reports
from glm_jax.evaluation.results import RESULTS_FILE, compare, read_results
from glm_jax.evaluation.run import check, evaluate, with_data
from glm_jax.evaluation.task_config import TaskError, find_tasks, load_task
from glm_jax.evaluation.tasks import Model
from glm_jax.files import locked
from glm_jax.jobs.batch_job import Share
from launch.model_flags import (
    define_model_flags,
    define_speculation_flags,
    load_model,
    load_small_model,
    load_tokenizer,
    model_config,
    model_identity,
)

FLAGS = flags.FLAGS
define_model_flags()
define_speculation_flags()
cli.define_process_flags()
flags.DEFINE_multi_string("task", [], "a task file, or a folder of them; may be repeated")
flags.DEFINE_string("data", None, "folder of the data of all tasks")
flags.DEFINE_string("output", None, "folder of records and results")
flags.DEFINE_string(
    "published", "configs/published.yaml", "published numbers to print beside the measured ones"
)
flags.DEFINE_integer("batch_tokens", 4096, "maximum tokens of a batch to score", lower_bound=64)
flags.DEFINE_bool("skip_missing", False, "leave out tasks without data, with a warning")
flags.DEFINE_bool("check", False, "check the tasks' data and print errors, without a run")
flags.DEFINE_list(
    "compare", None, "two results.json to compare, with the significance of each difference"
)
flags.register_validator("compare", lambda files: files is None or len(files) == 2, "two files")
cli.require(("checkpoint", "task", "data", "output|check"), instead=("compare",))


def main() -> None:
    if FLAGS.compare:
        a, b = (read_results(Path(name)) for name in FLAGS.compare)
        print(reports.comparison_table(compare(a, b)))
        return
    configs = [
        load_task(path) for path in find_tasks(Path(cli.packaged(path)) for path in FLAGS.task)
    ]
    configs = with_data(configs, Path(FLAGS.data), FLAGS.skip_missing)
    tokenizer = load_tokenizer()
    if FLAGS.check:
        count = check(configs, Path(FLAGS.data), model_config(), tokenizer)
        if count:
            raise TaskError(f"{count} lines to mend")
        print(f"{len(configs)} tasks: all data can be used")
        return
    share = Share.of_process(FLAGS.mesh, *cli.join_processes(may_be_apart=True))
    output = Path(FLAGS.output)
    with locked(output, share.process, share.count):
        config, params = load_model(share.mesh)
        small = load_small_model(share.mesh, tokenizer)
        model = Model(params, config, tokenizer, FLAGS.batch_tokens, FLAGS.speculate, small)
        results = evaluate(configs, Path(FLAGS.data), output, model, share, model_identity())
    if results is None:
        print("this process is done; the last one to end writes the results")
    elif share.writes:
        precision = FLAGS.quantization and FLAGS.quantization.split(",")[0]
        published = reports.read_published(Path(cli.packaged(FLAGS.published)), precision)
        reports.write_report(results, published, output)
        print(reports.text_table(results, published))
        print(f"written to {output / RESULTS_FILE}, results.md and results.png")


if __name__ == "__main__":
    cli.run(main)
