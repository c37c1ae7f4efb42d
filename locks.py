"""A lock on a folder, held by one process at a time and freed by the system when that ends."""

import os
from contextlib import contextmanager

try:
    import fcntl
except ImportError:  # Windows: folders can't be locked there
    fcntl = None
CAN_LOCK = fcntl is not None


@contextmanager
def folder_lock(path, wait):
    """Hold the lock of the folder `path`. Raises BlockingIOError if another has it, unless `wait`.

    Nothing is written, so nothing is left behind by a process that was killed. Where the system
    has no such lock, there is none.
    """
    if not CAN_LOCK:
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(handle)
