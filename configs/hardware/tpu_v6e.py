"""TPU v6e: figures of Google Cloud's page on its system architecture."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "platform": "tpu",
            "device_kind": "TPU v6e",
            "topology": "v6e:2x2",  # chips of one host or the smallest slice
            "memory_bytes": 32 * 2**30,
            "memory_bandwidth": 1640000000000,  # bytes per second
            "matrix_flops": 9.18e14,  # bfloat16 products, float32 sums, per second
        }
    )
