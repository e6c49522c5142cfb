"""All parameters trained further, in bfloat16 with 8-bit moments: the fewest devices."""

from ml_collections import ConfigDict

from glm_jax.training.finetuning import default_config


def get_config() -> ConfigDict:
    config = default_config(rank=0)
    config.model.param_dtype = "bfloat16"
    config.mesh = "1,-1,8"
    config.steps = 1000
    config.data.batch_size = 32
    config.data.micro_batch_size = 8
    config.optimizer.learning_rate = 5e-6
    config.optimizer.moments = "int8"
    config.checkpoint_every = 250
    return config
