"""The log of a server's events: loading, ready, requests, draining. Silent until `show`."""

import logging
import sys

log = logging.getLogger(__name__)


def show() -> None:
    """Write events to standard output, one line each, with the time."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
