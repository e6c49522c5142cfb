"""GLM-130B in JAX: the public interface.

config, params = glm_jax.restore(path, mesh=None, dtype=None, quantization=None, adapter=None)
logits = glm_jax.forward(params, config, tokens, position_ids, mask)
answers = glm_jax.generate(params, config, prompts)
filled = glm_jax.fill_blanks(params, config, tokenizer, "Paris is in [MASK].")
tokenizer = glm_jax.Tokenizer(path)
"""

from glm_jax.checkpoints.model_folder import restore, save_model
from glm_jax.config import GLMConfig, SpecialTokens, glm_130b, glm_config
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.sampling import Sampling
from glm_jax.generation.blank_filling import fill_blanks
from glm_jax.generation.generate import generate
from glm_jax.model.glm import forward
from glm_jax.model.visibility import Visibility
from glm_jax.sharding import make_mesh
from glm_jax.tokenizer import Tokenizer

__all__ = [
    "GLMConfig",
    "Prompt",
    "Sampling",
    "SpecialTokens",
    "Tokenizer",
    "Visibility",
    "fill_blanks",
    "forward",
    "generate",
    "glm_130b",
    "glm_config",
    "make_mesh",
    "restore",
    "save_model",
]
