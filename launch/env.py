"""Prints what to send when something fails: versions, devices, mesh, memory, kernels' libraries.

python -m launch.env [--mesh=1,1,8]
"""

from absl import flags

from glm_jax import cli
from glm_jax.cli.environment import report

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "mesh", None, "mesh to try, sizes of data,fsdp,tensor; all devices along tensor by default"
)


def main() -> None:
    for line in report(FLAGS.mesh):
        print(line, flush=True)


if __name__ == "__main__":
    cli.run(main)
