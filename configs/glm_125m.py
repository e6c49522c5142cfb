"""GLM with about 125M parameters, in the shape of the 130B model."""

from ml_collections import ConfigDict

from glm_jax.training.config import default_config


def get_config() -> ConfigDict:
    return default_config("125m")
