"""Lines for the user."""

import sys

from training import distributed


def log(text, stream="stdout"):
    """Print a line on rank 0 unless the stream is closed.

    Characters that are unprintable, or missing in the encoding of the stream, are escaped.
    """
    file = getattr(sys, stream)
    if file and distributed.rank() == 0:
        encoding = getattr(file, "encoding", None) or "utf-8"
        text = printable(text).encode(encoding, "backslashreplace").decode(encoding)
        print(text, file=file, flush=True)


def warn(text):
    """`log` to stderr."""
    log(text, "stderr")


def printable(text):
    """The text with escape sequences in place of unprintable characters."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
