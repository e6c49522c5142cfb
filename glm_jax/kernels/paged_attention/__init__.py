"""Attention of one query a row over keys and values in pages."""
