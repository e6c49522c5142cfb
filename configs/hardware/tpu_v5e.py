"""TPU v5e: figures of Google Cloud's page on its system architecture."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "platform": "tpu",
            "device_kind": "TPU v5e",
            "topology": "v5e:2x2",  # chips of one host or the smallest slice
            "memory_bytes": 16 * 2**30,
            "memory_bandwidth": 819000000000,  # bytes per second
            "matrix_flops": 1.97e14,  # bfloat16 products, float32 sums, per second
        }
    )
