"""Command lines: flags in, one library call out."""
