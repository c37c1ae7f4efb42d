"""Atomic writes, and a lock on a directory."""

import errno
import os
from contextlib import ExitStack, contextmanager, suppress

from training.console import warn
from training.errors import UserError


@contextmanager
def lock_directory(path, wait):
    """Hold a lock on a directory, without a lock file; if it is held, wait or raise UserError.

    Where directories cannot be locked, as on some network drives and Windows, warns and goes on.
    """
    with ExitStack() as stack:
        try:
            import fcntl  # Windows has none

            handle = os.open(path, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(f"another process is using {path}") from error
        except (ImportError, OSError) as error:
            warn(f"warning: cannot lock {path} ({error}): do not use it twice at once")
        yield


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
