"""The released architecture: 70 layers, hidden 12288, 96 heads, float16 rotary tables."""

from ml_collections import ConfigDict

from glm_jax.training.config import default_config


def get_config() -> ConfigDict:
    return default_config("130b", rotary_dtype="float16")
