"""Product of activations with a quantised weight."""
