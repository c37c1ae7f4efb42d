"""Atomic writes."""

import os
from contextlib import suppress

from training.console import UserError


def write_atomic(path, content):
    """Write bytes to a file atomically: it has its old or its complete new content."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror})") from error
    finally:  # also after Ctrl-C
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
