"""Trains a GLM model; the same command goes on where an earlier one stopped.

    python -m launch.train --config=configs/train_tiny.py --workdir=DIR \\
        --config.data.files='corpus/*.txt' --config.data.tokenizer=DIR
"""

from pathlib import Path

from absl import flags

from glm_jax import cli, processes
from glm_jax.allocator import keep_freed_memory
from glm_jax.files import locked
from glm_jax.training.loop import train
from glm_jax.training.results import MODEL_FOLDER
from launch.training_flags import define_training_flags, last_step, profiled_steps

FLAGS = flags.FLAGS
define_training_flags("configs/train_tiny.py")


def main() -> None:
    keep_freed_memory()
    cli.join_processes()
    workdir = Path(FLAGS.workdir)
    with locked(workdir):
        history = train(FLAGS.config, workdir, profiled_steps())
    if processes.is_first():
        print(f"{last_step(history)}the model is in {workdir / MODEL_FOLDER}")


if __name__ == "__main__":
    cli.run(main)
