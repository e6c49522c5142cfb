"""NVIDIA H200.

From NVIDIA's H200 Tensor Core GPU data sheet (SXM): an H100's processors, links and network
(DGX H200) with more and faster memory.
"""

from ml_collections import ConfigDict

from configs.hardware import h100


def get_config() -> ConfigDict:
    config = h100.get_config()
    config.device_kind = "NVIDIA H200"
    config.memory_bytes = 139 * 2**30  # what programs get of the published 141 GB
    config.memory_bandwidth = 4800000000000  # bytes per second
    return config
