"""The command line: messages, errors, types of flags, and the exit status of a script."""

import argparse
import functools
import json
import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class UserError(Exception):
    """An error that the user can fix: a script prints it as one line and exits with `status`."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations whose errors are one line."""

    def __init__(self, **options):
        options |= {"formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help", status=2)


class Number(NamedTuple):
    """An argparse type: a number of `kind`, int or float, from `low` to `high`."""

    kind: type
    low: float
    high: float

    def __call__(self, text):
        with suppress(ValueError):
            value = self.kind(text)
            if self.low <= value <= self.high:
                return value
        kind = "an integer" if self.kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {kind} from {self.low} to {self.high}")


def path(text):
    """An argparse type: a path that is not empty, with ~ expanded."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return os.path.expanduser(text)


def rank():
    """The number of this process if torchrun started it, else 0; other programs set RANK too."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def log(text, stream="stdout"):
    """Print a line on rank 0, unless the stream is closed."""
    if rank() == 0 and (file := getattr(sys, stream)):
        print(text, file=file, flush=True)


def warn(text):
    """`log` to stderr."""
    log(text, "stderr")


def exit_status(main):
    """Decorate `main(argv)`: an expected error becomes one line on stderr and an exit status."""

    def interrupt(signum, frame):
        raise KeyboardInterrupt(signum)

    @functools.wraps(main)
    def wrapper(argv=None):
        with suppress(ValueError):  # outside of the main thread
            signal.signal(signal.SIGTERM, interrupt)
        try:
            return main(sys.argv[1:] if argv is None else list(argv))
        except UserError as error:
            return fail(f"error: {error}", error.status)
        except KeyboardInterrupt as error:
            return fail("interrupted", 128 + next(iter(error.args), signal.SIGINT))
        except (MemoryError, RuntimeError) as error:
            if not re.search("MemoryError|out of memory|DefaultCPUAllocator", repr(error)):
                raise
            return fail("error: out of memory; try a smaller --batch-size or picture", 1)
        except BrokenPipeError:  # of `| head`; Python would fail again when it flushes stdout
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except OSError as error:  # no permission, a full disk
            return fail(f"error: {error}", 1)

    return wrapper


def fail(message, status):
    """Print a message to stderr, and hand it to torchrun for its report; returns the status."""
    print(message, file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        report = {"message": message, "extraInfo": {"timestamp": int(time.time())}}
        Path(file).write_text(json.dumps({"message": report}))
    return status
