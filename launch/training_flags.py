"""Flags of the launchers that train."""

from absl import flags

from glm_jax import cli

FLAGS = flags.FLAGS


def define_training_flags(example: str) -> None:
    """Define the flags of an experiment and of its run's folder.

    Args:
      example: a file of configs/ to name and to show in help.
    """
    cli.define_experiment_flag(example)
    flags.DEFINE_string(
        "workdir", None, "folder of the run: checkpoints, metrics and the result", required=True
    )
    flags.DEFINE_list("profile_steps", [], "FIRST,LAST: steps to profile, into the workdir")
    cli.define_process_flags()
    flags.register_validator(
        "profile_steps",
        lambda steps: (
            not steps
            or (
                len(steps) == 2
                and all(step.isascii() and step.isdigit() for step in steps)
                and 1 <= int(steps[0]) <= int(steps[1])
            )
        ),
        "give the first step, from 1 on, and the last, such as 10,12",
    )


def profiled_steps() -> range:
    """Return the steps of `--profile_steps`."""
    first, last = map(int, FLAGS.profile_steps or (0, -1))
    return range(first, last + 1)


def last_step(history: list[dict[str, float]]) -> str:
    """Describe the last logged step of a run."""
    logged = [line for line in history if "loss" in line]
    return f"step {logged[-1]['step']}, loss {logged[-1]['loss']:.3f}; " if logged else ""
