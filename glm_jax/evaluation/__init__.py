"""Evaluation: task files, examples, metrics and reports."""
