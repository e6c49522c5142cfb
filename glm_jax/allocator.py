"""The C library's allocator, as programs that train on a CPU need it.

A train step takes its temporary memory, a gigabyte or more, in one piece, and returns it at the
end. By default glibc gives such a piece back to the system, so that every step has each of its
pages mapped and cleared again: a sixth of a step's time on two cores.
"""

import contextlib
import ctypes
import importlib.metadata
import importlib.util

import jax

# mallopt's parameters (malloc.h).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Make this process keep memory that it frees, to use it again.

    Called before jax is used: arenas that threads have already stay as they are. All threads then
    share one arena, for the others cannot hold such pieces.

    Returns:
      Whether it did: not without glibc, nor where jax may find an accelerator.
    """
    if _may_have_accelerator():
        return False
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
        return all(mallopt(*setting) for setting in settings)
    return False


def _may_have_accelerator() -> bool:
    """Return True if jax has a plugin for one and may use it; its devices are not looked for."""
    if platforms := jax.config.jax_platforms:
        return bool(platforms != "cpu")
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None
