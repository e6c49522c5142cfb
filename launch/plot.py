"""Draws the metrics of a run: loss, learning rate, gradient norm and spikes.

python -m launch.plot --workdir=DIR [--output=curves.png]
"""

from pathlib import Path

from absl import flags

from glm_jax import cli
from glm_jax.training.curves import draw, read

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "folder of the run", required=True)
flags.DEFINE_string("output", None, "a PNG file; curves.png in the workdir by default")


def main() -> None:
    workdir = Path(FLAGS.workdir)
    output = Path(FLAGS.output or workdir / "curves.png")
    lines = read(workdir)
    draw(lines, output)
    print(f"wrote {output}: {len(lines)} logged lines, to step {lines[-1]['step']}")


if __name__ == "__main__":
    cli.run(main)
