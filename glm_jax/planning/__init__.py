"""Compilation for devices that are not here: does a job fit, and how fast can it be."""
