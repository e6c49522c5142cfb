"""Command-line tools that turn other people's checkpoints into ours, and back."""
