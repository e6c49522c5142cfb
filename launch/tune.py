"""Writes the table of block sizes of the GPU kernel: for GLM-130B's shapes, and the figures
of the GPUs that the model behind it used.

    python -m launch.tune
"""

import dataclasses
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from configs.hardware import a100_80gb, h100, rtx_3090
from glm_jax import cli
from glm_jax.config import glm_config
from glm_jax.files import write_text
from glm_jax.kernels.quantized_matmul import tuning
from glm_jax.kernels.quantized_matmul.tuning import Gpu, Problem
from glm_jax.text_files import to_json

FLAGS = flags.FLAGS
flags.DEFINE_string("output", str(Path(tuning.__file__).with_name(tuning.FILE)), "file to write")
_GPUS = (a100_80gb, rtx_3090, h100)
_GROUP_SIZES = (None, 128)


def problems() -> list[Problem]:
    """The products of GLM-130B at tensor parallel 1, 4 and 8."""
    config = glm_config("130b")
    hidden, inner = config.hidden_size, config.inner_hidden_size
    shapes = [
        shape
        for parallel in (1, 4, 8)
        for shape in (
            (hidden, 3 * hidden // parallel),
            (hidden // parallel, hidden),
            (hidden, 2 * inner // parallel),
            (inner // parallel, hidden),
        )
    ]
    return [
        Problem(rows, *shape, group or shape[0], bits)
        for shape in shapes
        for bits in (8, 4)
        for group in _GROUP_SIZES
        for rows in tuning.ROW_BUCKETS
    ]


def figures(hardware: ConfigDict) -> Gpu:
    return Gpu(
        multiprocessors=hardware.multiprocessors,
        memory_bandwidth=float(hardware.memory_bandwidth),
        matrix_flops=float(hardware.matrix_flops),
        shared_memory=hardware.shared_memory_per_multiprocessor,
        shared_memory_per_block=hardware.shared_memory_per_block,
        threads=hardware.threads_per_multiprocessor,
        registers=2**16,
    )


def main() -> None:
    gpus, blocks = {}, {}
    for module in _GPUS:
        hardware = module.get_config()
        capability = str(hardware.compute_capability)
        gpus[capability] = figures(hardware)
        for problem in problems():
            chosen = tuning.choose(problem, gpus[capability])
            if chosen is not None:
                blocks[tuning.table_key(capability, problem)] = dataclasses.astuple(chosen)
    content = {
        "gpus": {name: dataclasses.asdict(gpu) for name, gpu in gpus.items()},
        "blocks": blocks,
    }
    text = to_json(content, indent=1)
    write_text(Path(FLAGS.output), text.replace("\n   ", " ").replace("\n  ]", " ]") + "\n")
    print(f"{len(blocks)} products on {len(gpus)} GPUs: {FLAGS.output}")


if __name__ == "__main__":
    cli.run(main)
