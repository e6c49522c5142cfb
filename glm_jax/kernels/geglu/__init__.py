"""GeGLU, the gated linear unit of a feed-forward layer."""
