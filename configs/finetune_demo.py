"""Adapters for the demo's model: a minute on two cores, a new relation in two languages."""

from ml_collections import ConfigDict

from glm_jax.training.finetuning import default_config


def get_config() -> ConfigDict:
    config = default_config(rank=16, alpha=32.0)
    config.quantization = "int4"
    config.model.compute_dtype = "float32"
    config.steps = 200
    config.data.sequence_length = 128
    config.data.batch_size = 8
    config.optimizer.learning_rate = 3e-3
    config.optimizer.remat = "none"
    config.log_every = 25
    config.checkpoint_every = 100
    return config
