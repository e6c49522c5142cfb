"""TPU v5p: figures of Google Cloud's page on its system architecture."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "platform": "tpu",
            "generation": "v5p",
            "device_kind": "TPU v5p",
            # The smallest slice first; of a slice the first chips can be used alone.
            "topologies": "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8",
            "memory_bytes": 95 * 2**30,
            "memory_bandwidth": 2765000000000,  # bytes per second
            "matrix_flops": 4.59e14,  # bfloat16 products, float32 sums, per second
            "link_bandwidth": 600000000000,  # bytes per second: interconnect of a chip
        }
    )
