"""NVIDIA H100 80GB HBM3.

From NVIDIA's H100 Tensor Core GPU data sheet (SXM) and the CUDA guide's tables of
compute capabilities.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "platform": "cuda",
            "device_kind": "NVIDIA H100 80GB HBM3",
            "compute_capability": 9.0,
            "memory_bytes": 80 * 2**30,
            "memory_bandwidth": 3350000000000,  # bytes per second
            "matrix_flops": 9.89e14,  # float16 products, float32 sums, per second
            "link_bandwidth": 450000000000,  # bytes per second: NVLink, one way
            "host_bandwidth": 64000000000,  # bytes per second: PCIe 5.0 x16, one way
            "devices_per_host": 8,
            "network_bandwidth": 50000000000,  # a GPU, of InfiniBand NDR (DGX H100)
            "multiprocessors": 132,
            "threads_per_multiprocessor": 2048,
            "shared_memory_per_multiprocessor": 233472,
            "shared_memory_per_block": 232448,  # where a kernel asks for more than 48 KiB
            "l2_bytes": 100 * 2**19,
            "clock_ghz": 1.98,
        }
    )
