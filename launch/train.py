"""Trains a GLM model; the same command goes on where an earlier one stopped.

    python -m launch.train --config=configs/train_tiny.py --workdir=DIR \
        --config.data.files='corpus/*.txt' --config.data.tokenizer=DIR
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from glm_jax import cli, processes
from glm_jax.training.loop import MODEL_FOLDER, train

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "experiment, a file of configs/")
flags.DEFINE_string("workdir", None, "checkpoints, metrics and the finished model", required=True)
flags.DEFINE_list("profile_steps", [], "FIRST,LAST: steps of which the workdir gets a trace")
cli.define_process_flags()
# A file that cannot be loaded raises here, at the first look into it.
flags.register_validator(
    "config",
    lambda config: config is not None and "model" in config,
    "give an experiment, such as configs/train_tiny.py",
)
flags.register_validator(
    "profile_steps",
    lambda steps: not steps or (len(steps) == 2 and all(step.isdigit() for step in steps)),
    "give the first step and the last, such as 10,12",
)


def main() -> None:
    cli.join_processes()
    workdir = Path(FLAGS.workdir)
    first, last = map(int, FLAGS.profile_steps or (0, -1))
    history = train(FLAGS.config, workdir, range(first, last + 1))
    if processes.is_first():
        logged = [line for line in history if "loss" in line]
        end = f"step {logged[-1]['step']}, loss {logged[-1]['loss']:.3f}; " if logged else ""
        print(f"{end}the model is in {workdir / MODEL_FOLDER}")


if __name__ == "__main__":
    cli.run(main)
