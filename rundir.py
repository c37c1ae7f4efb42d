"""The folder of a run: made once, never overwritten, and every file in it whole at any time."""

import csv
import io
import json
import os
from pathlib import Path

import torch

RUNS = "runs"


class RunError(Exception):
    """The run's folder or one of its files can't be used; the message says what to do."""


class RunDir:
    """A run's folder. Its files are written beside their place, fsynced and renamed."""

    def __init__(self, path):
        self.path = Path(path)

    @classmethod
    def create(cls, name, output_dir=None):
        """A new folder: `output_dir`, or `runs/<name>`, or `runs/<name>-2`, `-3` and so on.

        Raises:
            RunError: `output_dir` holds a run, or no folder can be made.
        """
        try:
            if output_dir is not None:
                Path(output_dir).mkdir(parents=True, exist_ok=True)
                return cls(output_dir).claim()
            number = 1
            while True:
                path = Path(RUNS, name if number == 1 else f"{name}-{number}")
                try:
                    path.mkdir(parents=True)
                    return cls(path).claim()
                except FileExistsError:
                    number += 1
        except OSError as error:
            where = output_dir or Path(RUNS, name)
            raise RunError(
                f"{where} can't be made or written ({error.strerror}); choose another --output-dir"
            ) from error

    def claim(self):
        """Take the folder for this run: of two that try, one succeeds."""
        try:
            (self.path / "args.json").touch(exist_ok=False)
        except FileExistsError as error:
            raise RunError(
                f"{self.path} holds a run already; choose another --output-dir"
            ) from error
        return self

    def write(self, name, content):
        """Write bytes to the file `name`, which has either its old content or all of the new."""
        path = self.path / name
        beside = self.path / f".{name}.tmp"
        try:
            with open(beside, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except OSError as error:
            raise RunError(
                f"{path} can't be written ({error.strerror}); what was there before is kept"
            ) from error
        finally:
            beside.unlink(missing_ok=True)

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
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        self.write(name, buffer.getbuffer())
        return self.path / name
