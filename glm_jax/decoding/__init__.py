"""From prompts to tokens: sampling, generation and blank filling."""
