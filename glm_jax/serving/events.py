"""What a server says while it runs: loading, ready, requests, draining. Silent unless shown."""

import logging
import sys

log = logging.getLogger(__name__)


def show() -> None:
    """Has events written to standard output, a line each with its time."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
