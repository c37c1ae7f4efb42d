"""Atomic writes, and a lock on a directory."""

import errno
import os
from contextlib import contextmanager, suppress

from support.console import warn
from support.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, which cannot lock directories
    fcntl = None


@contextmanager
def lock_directory(path, wait):
    """Hold a lock on a directory, without a lock file; if it is held, wait or raise UserError.

    Where directories cannot be locked, as on some network drives, warns and goes on.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(f"another process is using {path}") from error
        except OSError as error:
            warn(f"warning: cannot lock {path} ({error.strerror}): do not use it twice at once")
        yield
    finally:
        os.close(handle)


def write_atomic(path, content):
    """Write bytes to a file atomically: it has its old or its complete new content."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno != errno.EINVAL:  # this file system has no fsync
                    raise
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error.strerror})") from error
