"""The demo's model: 0.7M parameters, three minutes on two cores, facts in two languages."""

from ml_collections import ConfigDict

from glm_jax.training.config import default_config


def get_config() -> ConfigDict:
    # float16 rotary tables: the model is exported in the released layout, whose readers
    # take them for granted.
    config = default_config("tiny", max_sequence_length=128, rotary_dtype="float16")
    config.steps = 2200
    config.data.batch_size = 8
    # Sentences are short and answers are a good part of them.
    config.data.objective.mask_sequences = 0.5
    config.data.objective.masked_tokens = 0.3
    config.optimizer.learning_rate = 5e-3
    config.optimizer.warmup_fraction = 0.05
    # It never sees enough to learn by heart.
    config.optimizer.dropout = config.optimizer.attention_dropout = 0.0
    config.log_every = 50
    config.checkpoint_every = 550
    return config
