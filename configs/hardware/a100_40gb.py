"""NVIDIA A100-SXM4-40GB.

From NVIDIA's A100 Tensor Core GPU data sheet and the CUDA guide's tables of
compute capabilities.
"""

from ml_collections import ConfigDict

from configs.hardware import a100_80gb


def get_config() -> ConfigDict:
    config = a100_80gb.get_config()
    config.device_kind = "NVIDIA A100-SXM4-40GB"
    config.memory_bytes = 40 * 2**30
    config.memory_bandwidth = 1555000000000  # bytes per second
    return config
