"""Floating-point operations of a model's matrix products: the one count of metrics, plans and
benchmarks. A multiplication and an addition are two operations; all else is too few to count."""

from glm_jax.config import GLMConfig


def block_flops(config: GLMConfig, tokens: int, keys: int) -> float:
    """Count the operations of all blocks in a forward pass.

    Args:
      tokens: number of tokens.
      keys: number of keys that each token attends to.
    """
    return _weight_flops(config, tokens) + _attention_flops(config, tokens, keys)


def logit_flops(config: GLMConfig, tokens: int) -> float:
    """Count the operations of the output projection in a forward pass."""
    return 2.0 * tokens * config.hidden_size * config.vocab_size


def training_flops(
    config: GLMConfig,
    tokens: int,
    keys: int,
    is_frozen: bool = False,
    remat: str = "none",
) -> float:
    """Count the operations of a forward and a backward pass.

    A product's backward pass is two products, one for the gradient of each operand.

    Args:
      tokens, keys: see `block_flops`.
      is_frozen: weights have no gradients, as beside adapters; these are too small to count.
      remat: which products the backward pass computes again; see `Recipe`. Model FLOPs
        utilisation counts without them.
    """
    linears, attention = _weight_flops(config, tokens), _attention_flops(config, tokens, keys)
    weights = linears + logit_flops(config, tokens)
    again = {"blocks": linears + attention, "attention": linears}.get(remat, 0.0)
    return (2.0 if is_frozen else 3.0) * weights + 3.0 * attention + again


def _weight_flops(config: GLMConfig, tokens: int) -> float:
    hidden, inner = config.hidden_size, config.inner_hidden_size
    return 2.0 * tokens * config.num_layers * (4 * hidden**2 + 3 * hidden * inner)


def _attention_flops(config: GLMConfig, tokens: int, keys: int) -> float:
    """Count the products of queries with keys and of probabilities with values."""
    return 4.0 * tokens * keys * config.num_layers * config.hidden_size
