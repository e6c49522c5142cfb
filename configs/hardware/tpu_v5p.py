"""TPU v5p: figures of Google Cloud's page on its system architecture."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "platform": "tpu",
            "device_kind": "TPU v5p",
            "topology": "v5p:2x2x1",  # chips of one host or the smallest slice
            "memory_bytes": 95 * 2**30,
            "memory_bandwidth": 2765000000000,  # bytes per second
            "matrix_flops": 4.59e14,  # bfloat16 products, float32 sums, per second
        }
    )
