"""Training: state, optimiser, step, checkpoints and the loop that runs them."""
