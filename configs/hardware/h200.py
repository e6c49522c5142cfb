"""NVIDIA H200.

From NVIDIA's H200 Tensor Core GPU data sheet (SXM) and the CUDA guide's tables of
compute capabilities: an H100's processors with more and faster memory.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "platform": "cuda",
            "device_kind": "NVIDIA H200",
            "compute_capability": 9.0,
            "memory_bytes": 139 * 2**30,  # what programs get of the published 141 GB
            "memory_bandwidth": 4800000000000,  # bytes per second
            "matrix_flops": 9.89e14,  # float16 products, float32 sums, per second
            "link_bandwidth": 450000000000,  # bytes per second: NVLink, one way
            "host_bandwidth": 64000000000,  # bytes per second: PCIe 5.0 x16, one way
            "devices_per_host": 8,
            "network_bandwidth": 50000000000,  # a GPU, of InfiniBand NDR (DGX H200)
            "multiprocessors": 132,
            "threads_per_multiprocessor": 2048,
            "shared_memory_per_multiprocessor": 233472,
            "shared_memory_per_block": 232448,  # where a kernel asks for more than 48 KiB
            "l2_bytes": 100 * 2**19,
            "clock_ghz": 1.98,
        }
    )
