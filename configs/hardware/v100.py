"""Tesla V100-SXM2-32GB.

From NVIDIA's V100 data sheet and the CUDA guide's tables of
compute capabilities.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "platform": "cuda",
            "device_kind": "Tesla V100-SXM2-32GB",
            "compute_capability": 7.0,
            "memory_bytes": 32 * 2**30,
            "memory_bandwidth": 900000000000,  # bytes per second
            "matrix_flops": 1.25e14,  # float16 products, float32 sums, per second
            "link_bandwidth": 150000000000,  # bytes per second: NVLink, one way
            "host_bandwidth": 16000000000,  # bytes per second: PCIe 3.0 x16, one way
            "devices_per_host": 8,
            "network_bandwidth": 6250000000,  # a GPU, of 4 InfiniBand EDR (DGX-1)
            "multiprocessors": 80,
            "threads_per_multiprocessor": 2048,
            "shared_memory_per_multiprocessor": 98304,
            "shared_memory_per_block": 98304,  # where a kernel asks for more than 48 KiB
            "l2_bytes": 12 * 2**19,
            "clock_ghz": 1.53,
        }
    )
