"""Attention over per-row key ranges."""
