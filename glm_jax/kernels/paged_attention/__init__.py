"""Attention of each row's new queries over keys and values in pages."""
