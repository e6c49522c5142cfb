"""Trains a GLM model; the same command goes on where an earlier one stopped.

    python -m launch.train --config=configs/train_tiny.py --workdir=DIR \
        --config.data.files='corpus/*.txt' --config.data.tokenizer=DIR
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from glm_jax import cli
from glm_jax.training.loop import MODEL_FOLDER, train

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "experiment, a file of configs/")
flags.DEFINE_string("workdir", None, "checkpoints, metrics and the finished model", required=True)
# A file that cannot be loaded raises here, at the first look into it.
flags.register_validator(
    "config",
    lambda config: config is not None and "model" in config,
    "give an experiment, such as configs/train_tiny.py",
)


def main() -> None:
    workdir = Path(FLAGS.workdir)
    history = train(FLAGS.config, workdir)
    last = f", loss {history[-1]['loss']:.3f}" if history else ""
    print(f"step {FLAGS.config.steps}{last}; the model is in {workdir / MODEL_FOLDER}")


if __name__ == "__main__":
    cli.run(main)
