"""NVIDIA GeForce RTX 3090.

From NVIDIA's Ampere GA102 white paper and the CUDA guide's tables of
compute capabilities.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "platform": "cuda",
            "device_kind": "NVIDIA GeForce RTX 3090",
            "compute_capability": 8.6,
            "memory_bytes": 24 * 2**30,
            "memory_bandwidth": 936000000000,  # bytes per second
            "matrix_flops": 7.1e13,  # float16 products, float32 sums, per second
            "link_bandwidth": 32000000000,  # bytes per second: PCIe 4.0 x16, one way
            "host_bandwidth": 32000000000,  # bytes per second: PCIe 4.0 x16, one way
            "devices_per_host": 8,
            "multiprocessors": 82,
            "threads_per_multiprocessor": 1536,
            "shared_memory_per_multiprocessor": 102400,
            "shared_memory_per_block": 101376,  # where a kernel asks for more than 48 KiB
            "l2_bytes": 12 * 2**19,
            "clock_ghz": 1.695,
        }
    )
