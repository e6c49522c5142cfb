"""All 130B parameters trained further on one host of 8 A100 of 80 GB: parameters in bfloat16,
8-bit moments in the host's memory. With more devices leave them on these, and take more rows."""

from ml_collections import ConfigDict

from glm_jax.training.finetuning import default_config


def get_config() -> ConfigDict:
    config = default_config(rank=0)
    config.model.param_dtype = "bfloat16"
    config.mesh = "1,-1,8"
    config.steps = 4000
    config.data.batch_size = 4
    config.optimizer.learning_rate = 5e-6
    config.optimizer.moments = "int8"
    config.optimizer.offload_moments = True
    config.checkpoint_every = 250
    return config
