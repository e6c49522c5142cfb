"""The smallest run that learns something: two layers, a minute on two cores."""

from ml_collections import ConfigDict

from glm_jax.training.config import default_config


def get_config() -> ConfigDict:
    config = default_config("tiny", vocab_size=2048)
    config.steps = 300
    config.data.batch_size = 8
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_fraction = 0.05
    config.optimizer.dropout = config.optimizer.attention_dropout = 0.0
    return config
