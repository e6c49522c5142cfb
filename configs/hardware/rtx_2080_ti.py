"""NVIDIA GeForce RTX 2080 Ti.

From NVIDIA's Turing white paper and the CUDA guide's tables of
compute capabilities.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "platform": "cuda",
            "device_kind": "NVIDIA GeForce RTX 2080 Ti",
            "compute_capability": 7.5,
            "memory_bytes": 11 * 2**30,
            "memory_bandwidth": 616000000000,  # bytes per second
            "matrix_flops": 5.38e13,  # float16 products, float32 sums, per second
            "link_bandwidth": 16000000000,  # bytes per second: PCIe 3.0 x16, one way
            "host_bandwidth": 16000000000,  # bytes per second: PCIe 3.0 x16, one way
            "devices_per_host": 8,
            "multiprocessors": 68,
            "threads_per_multiprocessor": 1024,
            "shared_memory_per_multiprocessor": 65536,
            "shared_memory_per_block": 65536,  # where a kernel asks for more than 48 KiB
            "l2_bytes": 11 * 2**19,
            "clock_ghz": 1.545,
        }
    )
