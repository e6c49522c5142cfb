"""Text in, text out: prompts, blanks, streams."""
