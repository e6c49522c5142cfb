"""Measures quantised products on the device that is here, and writes a table of the fastest.

    python -m launch.tune --measure --output=tables --minutes=12
    GLM_JAX_TABLES=tables glm-jax generate ...

Every implementation and all its block sizes are tried for the linears of a model, beside XLA's
float16 product; docs/kernels.md says more. Without --measure: what the tables in use hold for this
device.
"""

from absl import flags

from glm_jax import cli
from launch.model_flags import is_scheme
from launch.suites import tuning
from launch.suites.tuned_products import ROWS

FLAGS = flags.FLAGS
flags.DEFINE_bool("measure", False, "measure; a run that was ended goes on where it was")
flags.DEFINE_string("output", "tables", "folder of the table, which GLM_JAX_TABLES then names")
flags.DEFINE_float("minutes", 10, "minutes after which to end", lower_bound=0.1)
flags.DEFINE_multi_string(
    "checkpoint",
    ["random:130b"],
    "a model whose linears to measure: its folder, or random:SIZE; may be repeated",
)
flags.DEFINE_multi_integer(
    "tensor_parallel", [1, 8, 4], "devices that share a tensor; may be repeated", lower_bound=1
)
flags.DEFINE_multi_string(
    "quantization",
    ["int4", "int4,group=128", "int8", "int4,group=64", "int4,group=32", "int8,group=128"],
    "formats of weights, the most important first; may be repeated",
)
flags.register_validator("quantization", lambda texts: all(map(is_scheme, texts)))
flags.DEFINE_multi_integer(
    "rows",
    list(ROWS),
    "rows of activations, the most important first; may be repeated",
    lower_bound=1,
)
flags.DEFINE_integer(
    "candidates",
    12,
    "block sizes of each kernel to try at most, those that its rules expect to be fast first",
    lower_bound=1,
)


def main() -> None:
    request = tuning.Request(
        output=FLAGS.output,
        seconds=60 * FLAGS.minutes,
        checkpoints=FLAGS.checkpoint,
        tensor_parallel=FLAGS.tensor_parallel,
        quantization=FLAGS.quantization,
        rows=FLAGS.rows,
        candidates=FLAGS.candidates,
    )
    if FLAGS.measure:
        tuning.run(request)
    else:
        for line in tuning.report():
            print(line)


if __name__ == "__main__":
    cli.run(main)
