"""Adapters beside a frozen model in 4 bits: 130B parameters on one server."""

from ml_collections import ConfigDict

from glm_jax.training.finetuning import default_config


def get_config() -> ConfigDict:
    config = default_config(rank=16, alpha=32.0, dropout=0.05)
    config.quantization = "int4"
    config.mesh = "1,1,-1"
    config.steps = 1000
    config.data.batch_size = 16
    config.data.micro_batch_size = 4
    config.optimizer.learning_rate = 1e-4
    config.checkpoint_every = 100
    return config
