"""A model behind HTTP: OpenAI's completions, blanks of a text, and a page to try both."""
