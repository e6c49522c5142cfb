"""Compiling for devices that are not here: will it fit, how fast can it be."""
