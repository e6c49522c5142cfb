"""NVIDIA A100-SXM4-80GB.

From NVIDIA's A100 Tensor Core GPU data sheet and the CUDA guide's tables of
compute capabilities.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "platform": "cuda",
            "device_kind": "NVIDIA A100-SXM4-80GB",
            "compute_capability": 8.0,
            "memory_bytes": 80 * 2**30,
            "memory_bandwidth": 2039000000000,  # bytes per second
            "matrix_flops": 3.12e14,  # float16 products, float32 sums, per second
            "link_bandwidth": 300000000000,  # bytes per second: NVLink, one way
            "host_bandwidth": 32000000000,  # bytes per second: PCIe 4.0 x16, one way
            "devices_per_host": 8,
            "network_bandwidth": 25000000000,  # a GPU, of InfiniBand HDR (DGX A100)
            "multiprocessors": 108,
            "threads_per_multiprocessor": 2048,
            "shared_memory_per_multiprocessor": 167936,
            "shared_memory_per_block": 166912,  # where a kernel asks for more than 48 KiB
            "l2_bytes": 80 * 2**19,
            "clock_ghz": 1.41,
        }
    )
