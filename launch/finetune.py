"""Trains a model further on instructions; the same command goes on where one stopped.

    python -m launch.finetune --config=configs/finetune_lora.py --checkpoint=DIR --workdir=DIR \\
        --config.data.files='pairs/*.jsonl' --config.quantization=int4
"""

from pathlib import Path

from absl import flags

from glm_jax import cli, processes
from glm_jax.allocator import keep_freed_memory
from glm_jax.files import locked
from glm_jax.training.finetuning import finetune, outcome
from launch.training_flags import define_training_flags, last_step, profiled_steps

FLAGS = flags.FLAGS
define_training_flags("configs/finetune_lora.py")
flags.DEFINE_string("checkpoint", None, "the model folder to begin with", required=True)


def main() -> None:
    keep_freed_memory()
    cli.join_processes()
    workdir = Path(FLAGS.workdir)
    with locked(workdir):
        history = finetune(FLAGS.config, Path(FLAGS.checkpoint), workdir, profiled_steps())
    if processes.is_first():
        print(f"{last_step(history)}{outcome(workdir)}")


if __name__ == "__main__":
    cli.run(main)
