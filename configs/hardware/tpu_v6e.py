"""TPU v6e: figures of Google Cloud's page on its system architecture."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "platform": "tpu",
            "generation": "v6e",
            "device_kind": "TPU v6e",
            # The smallest slice first; of a slice the first chips can be used alone.
            "topologies": "2x2 2x4 4x4 4x8 8x8 8x16 16x16",
            "memory_bytes": 32 * 2**30,
            "memory_bandwidth": 1640000000000,  # bytes per second
            "matrix_flops": 9.18e14,  # bfloat16 products, float32 sums, per second
            "link_bandwidth": 448000000000,  # bytes per second: interconnect of a chip
        }
    )
