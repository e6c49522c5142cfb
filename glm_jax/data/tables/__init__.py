"""Tables of facts; see `glm_jax.data.facts`."""
