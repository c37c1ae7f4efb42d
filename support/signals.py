"""Stopping on Ctrl-C or SIGTERM between two steps, so that files stay complete."""

import signal
from contextlib import contextmanager, suppress


class Stopped(Exception):
    """A stop was requested."""


class StopFlag:
    """Whether a signal has requested a stop. Call `check` where it is safe to stop."""

    signum = None

    def check(self):
        if self.signum is not None:
            raise Stopped

    @contextmanager
    def interruptible(self):
        """A block that ends early, without an error, if a stop is requested."""
        try:
            yield
        except (Stopped, RuntimeError):  # the latter if a peer has stopped first
            if self.signum is None:
                raise


NEVER = StopFlag()  # is never set


@contextmanager
def stop_on_signals():
    """A StopFlag that SIGINT and SIGTERM set. A second signal ends the program at once."""
    flag, previous = StopFlag(), {}

    def handle(signum, frame):
        flag.signum = signum
        for caught in previous:
            signal.signal(caught, signal.SIG_DFL)

    with suppress(ValueError):  # not in the main thread: the flag is never set
        for caught in (signal.SIGINT, signal.SIGTERM):
            previous[caught] = signal.signal(caught, handle)
    try:
        yield flag
    finally:
        for caught, handler in previous.items():
            signal.signal(caught, handler)
