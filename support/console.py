"""Output lines, the progress bar, and the exit status of a script."""

import functools
import os
import sys

import torch
from tqdm import tqdm

from support import distributed
from support.errors import UserError


def log(text, stream="stdout", all_ranks=False):
    """Print a line on rank 0 (`all_ranks`: on each) unless the stream is closed.

    Characters that are unprintable, or missing in the encoding of the stream, are escaped.
    """
    file = getattr(sys, stream)
    if file and (all_ranks or distributed.rank() == 0):
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
        encoding = getattr(file, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)


def warn(text, all_ranks=False):
    """`log` to stderr."""
    log(text, "stderr", all_ranks)


def progress_bar(total, title, quiet):
    """A progress bar on stderr; hidden if that is not a terminal, if `quiet`, or if rank > 0."""
    hidden = quiet or distributed.rank() > 0 or not sys.stderr
    # None hides it if stderr is not a terminal.
    return tqdm(total=total, desc=title, leave=False, disable=hidden or None)


def exit_status(main):
    """Decorate `main(argv)`: an expected error becomes one line on stderr and an exit status."""

    @functools.wraps(main)
    def wrapper(argv=None):
        try:
            status = main(sys.argv[1:] if argv is None else list(argv))
            distributed.close()
            return status
        except UserError as error:
            return fail(error, str(error), error.status)
        except torch.OutOfMemoryError as error:
            return fail(error, f"{str(error).splitlines()[0]}; try a smaller --batch-size")
        except RuntimeError as error:
            if distributed.world_size() == 1 or os.environ.get("DEBUG") == "1":
                raise
            cause = str(error).strip().splitlines()[0]
            hint = f"{cause}; DEBUG=1 shows the traceback"
            return fail(error, f"another process of this run may have failed ({hint})")
        except OSError as error:
            if os.environ.get("DEBUG") == "1":
                raise
            try:
                print(end="", flush=True)
            except OSError:  # stdout is broken: Python would fail again at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            path = f"{error.filename}: " if error.filename else ""
            return fail(error, f"{path}{error.strerror or error} (DEBUG=1 shows the traceback)")
        except KeyboardInterrupt:
            warn("interrupted")
            return 130

    return wrapper


def fail(error, message, status=1):
    """Print an error with its notes: once for all ranks if they share it, else with its rank."""
    message = "; ".join([message, *getattr(error, "__notes__", ())])
    shared = getattr(error, "shared", False)
    if not shared:
        message, shared = distributed.share_error(message)
    if shared:  # all ranks get here
        distributed.close()
    warn(f"error: {message}", all_ranks=not shared)
    return status
