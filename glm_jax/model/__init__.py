"""The GLM architecture: parameters, layers, visibility, cache and forward pass."""
