"""The folder of a run: made once, never overwritten, and every file in it whole at any time."""

import csv
import io
import json
import os
import pickle
import shlex
import zipfile
import zlib
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from locks import CAN_LOCK, folder_lock

RUNS = "runs"
STARTED = {"args.json", ".args.json.tmp", ".last.pt.tmp"}  # all that there is before LAST
LAST, BEST = "last.pt", "best.pt"
CHECKPOINT = {"flags": dict, "recipe": dict, "history": list, "curve": list, "seconds": float}
CHECKPOINT |= {"network": dict, "optimizer": dict}

# What a damaged archive makes the standard library and torch raise, found by damaging some.
DAMAGE = (EOFError, KeyError, NotImplementedError, OSError, OverflowError, RuntimeError)
DAMAGE += (ValueError, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error)


class RunError(Exception):
    """The run's folder or one of its files can't be used; the message says what to do."""


class RunDir:
    """A run's folder. Its files are written beside their place, fsynced and renamed.

    Of several processes of a run one writes; for the others the folder is not `writable`, and
    what they would write goes nowhere. A `new` run must find no checkpoint in it.
    """

    def __init__(self, path, writable=True, new=False):
        self.path, self.writable, self.new = Path(path), writable, new

    @property
    def resume(self):
        """The flag that goes on with this run, quoted for a shell."""
        return f"--resume {shlex.quote(self.path.as_posix())}"

    @property
    def way_on(self):
        """What to do after a failure, to lose nothing that was kept."""
        return f"go on with {self.resume}" if self.has(LAST) else "begin the run again"

    @classmethod
    def create(cls, name, output_dir=None):
        """A new folder: `output_dir`, or `runs/<name>`, or `runs/<name>-2`, `-3` and so on.

        Raises:
            RunError: `output_dir` holds a run or is in use, or no folder can be made.
        """
        try:
            if output_dir is not None:
                Path(output_dir).mkdir(parents=True, exist_ok=True)
                return cls(output_dir, new=True).claim()
            number = 1
            while True:
                path = Path(RUNS, name if number == 1 else f"{name}-{number}")
                try:
                    path.mkdir(parents=True)
                    return cls(path, new=True).claim()
                except FileExistsError:
                    number += 1
        except OSError as error:
            where = output_dir or Path(RUNS, name)
            raise RunError(
                f"{where} can't be made or written ({error.strerror}); choose another --output-dir"
            ) from error

    def claim(self):
        """Take the folder for this run; what one left that got no checkpoint is no hindrance.

        Of two runs that take it at once, only one comes to be `working` in it.
        """
        with self.held():
            try:
                (self.path / "args.json").touch(exist_ok=False)
            except FileExistsError as error:
                if not (CAN_LOCK and self.is_leftover()):
                    raise self.taken() from error
        return self

    def is_leftover(self):
        """Whether all there is was left by a run that ended before its first checkpoint."""
        try:
            content = (self.path / "args.json").read_bytes()  # empty till the settings are known
            ours = not content or {"command", "flags", "recipe"} <= set(json.loads(content))
        except (OSError, ValueError, TypeError):
            return False
        return ours and STARTED.issuperset(os.listdir(self.path))

    def taken(self):
        """The error of a new run in the folder of another."""
        advice = "choose another --output-dir, or go on with --resume"
        return RunError(f"{self.path} holds a run already; {advice}")

    @contextmanager
    def held(self):
        """Hold the folder against other processes.

        Raises:
            RunError: another process is at work in it, or the run is new and it has a checkpoint.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(folder_lock(self.path, wait=False))
            except BlockingIOError as error:
                advice = "wait for it, or stop it"
                raise RunError(f"another process is at work in {self.path}; {advice}") from error
            if self.new and (self.path / LAST).exists():
                raise self.taken()
            yield

    @contextmanager
    def working(self):
        """Hold the folder for a run, cleared of what a killed one left half-written. See `held`."""
        if not self.writable:
            yield
            return
        with self.held():
            for kind in ("csv", "json", "png", "pt"):
                for leftover in self.path.glob(f".*.{kind}.tmp"):
                    leftover.unlink(missing_ok=True)
            yield

    def abandon(self):
        """Take away what a run without a checkpoint leaves, and the folder if it is empty then."""
        self.remove("args.json")
        if self.writable:
            with suppress(OSError):  # it has files of others
                self.path.rmdir()

    def has(self, name):
        """Whether there is a file of this name."""
        return (self.path / name).exists()

    def remove(self, name):
        """Remove the file `name` if there is one."""
        if self.writable:
            (self.path / name).unlink(missing_ok=True)

    def write(self, name, content):
        """Write bytes to the file `name`, which has either its old content or all of the new."""
        if self.writable:
            write_whole(self.path / name, content, f"mend that and {self.way_on}")

    def save_checkpoint(self, name, state):
        """Save a dict of plain values and tensors, so that `weights_only=True` can load it."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.write(name, buffer.getbuffer())

    def save_history(self, history):
        """Write `metrics.csv` from the history's rows, dicts with the same keys."""
        text = io.StringIO()
        writer = csv.DictWriter(text, history[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        self.write("metrics.csv", text.getvalue().encode())

    def save_json(self, name, value):
        """Write a dict of plain values as indented JSON."""
        self.write(name, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def save_figure(self, name, figure):
        """Write a matplotlib figure as a PNG, and return its path."""
        self.write(name, as_png(figure))
        return self.path / name


def as_png(figure):
    """A matplotlib figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getbuffer()


def write_whole(path, content, advice="choose another place"):
    """Write bytes to a file, which has its old content or none till it has all of the new.

    Raises:
        RunError: they can't be written; the message gives `advice`.
    """
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise RunError(f"{path} can't be written ({error.strerror}); {advice}") from error


def find_checkpoint(place):
    """The checkpoint that is meant by a run's folder, a file, or "": the newest run's.

    Raises:
        RunError: there is none.
    """
    if not place:
        found = Path(RUNS).glob(f"*/{LAST}")
        newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
        if newest is None:
            raise RunError(f"no run below {RUNS} has a checkpoint; name a run's folder")
        return newest
    path = Path(place, LAST) if os.path.isdir(place) else Path(place)
    if not os.path.exists(path):  # Path.exists raises at a name that is too long
        raise RunError(f"there is no checkpoint {path}; name a run's folder or a checkpoint")
    return path


def load_checkpoint(path):
    """A checkpoint's state, on the CPU. Nothing in the file is executed.

    Raises:
        RunError: it can't be read, is damaged, or is not a checkpoint of this program.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        advice = "mend that, or name another"
        raise RunError(f"{path} can't be read ({error.strerror}); {advice}") from error
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            marked = any(entry.external_attr for entry in archive.infolist())  # as a folder, say
            if marked or archive.testzip():  # torch.load takes damaged tensors without a word
                raise zipfile.BadZipFile
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except DAMAGE as error:
        raise RunError(
            f"{path} is damaged or no checkpoint of this program; name another"
        ) from error
    if not isinstance(state, dict) or not all(
        name in state and isinstance(state[name], kind) for name, kind in CHECKPOINT.items()
    ):
        raise RunError(f"{path} is no checkpoint of this program; name another")
    return state
