"""Requests in, tokens out, on the devices."""
