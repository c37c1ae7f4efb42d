"""Atomic writes."""

import os


def write_atomic(path, content):
    """Write bytes to a file atomically: it has its old or its complete new content."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
