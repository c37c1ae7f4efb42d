"""A run: its directory, whose files are complete at any time, and what it prints."""

import csv
import io
import itertools
import json
import platform
import shlex
import signal
import sys
import time
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from training import plots
from training.checkpoint import FORMAT, LAST, RUNS, training_caveat, unwrapped
from training.console import UserError, log, rank
from training.files import write_atomic
from training.metrics import DISPUTED, MISTAKE_COLUMNS, result_line
from training.processes import from_rank_0, world_size

BEST, LOG = "best.pt", "log.txt"


class Run:
    """The directory of a run. Rank 0 writes its files, and prints its lines.

    Args:
        directory: where, or None for a new one: runs/RECIPE, runs/RECIPE-2 and so on.
        saved_epochs: how many epochs of the run in it are saved already.
        argv: the flags as typed.
        flags: the flags that are saved, a dict in JSON types.
    """

    def __init__(self, directory, saved_epochs, argv, flags, recipe, quiet):
        self.flags, self.recipe, self.quiet = flags, recipe, quiet
        self.status, self.saved_epochs = 0, saved_epochs
        name = flags["recipe"] + "-dry-run" * flags["dry_run"]
        self.path, self.created = from_rank_0(make_directory, directory, saved_epochs, name)
        launcher = f"torchrun --standalone --nproc-per-node {world_size()}".split()
        script = [*(launcher if world_size() > 1 else ["python"]), "train.py"]
        self.command = shlex.join([*script, *argv])
        resume = [*script, "--resume", self.path.as_posix()]
        self.resume_command = self.command if "--resume" in argv else shlex.join(resume)

    def log_start(self, model, device, datasets):
        """Print the device, data, recipe, model, seed and directory of the run."""
        flags, recipe, threads = self.flags, self.recipe, torch.get_num_threads()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        self.info = {
            "recipe": flags["recipe"],
            "dataset": flags["dataset"],
            "note": training_caveat(flags),
            "seed": flags["seed"],
            "epochs": recipe.epochs,
            "parameters": parameters,
            "device": str(device),
            "precision": flags["precision"],
            "processes": world_size(),
            "threads": threads,
            "versions": {name: version(name) for name in ("torch", "torchvision")}
            | {"python": platform.python_version()},
        }
        sizes = ", ".join(f"{len(part):,} {split}" for split, part in datasets.items())
        processes = f"{world_size()} processes of " if world_size() > 1 else ""
        self.log(f"command  {self.command}", show=False)
        self.log(f"device   {device}, {flags['precision']}, {processes}{threads} threads")
        self.log(f"data     {flags['dataset']}: {sizes} images")
        self.log(f"recipe   {flags['recipe']}: {recipe.description}")
        self.log(
            f"model    {recipe.encoder.__name__}, {recipe.head.__name__}: {parameters:,} parameters"
        )
        self.log(f"seed     {flags['seed']}")
        self.log(f"run      {self.path}")

    def log(self, text, show=None):
        """Append a line to log.txt, and print it, by default unless the run is quiet."""
        if show or (show is None and not self.quiet):
            with tqdm.external_write_mode():
                log(text)
        if rank() == 0:
            with open(self.path / LOG, "a", encoding="utf-8") as file:
                file.write(f"{text}\n")

    def progress_bar(self, steps):
        """A progress bar for training steps, on a terminal only."""
        hidden = self.quiet or rank() > 0 or not sys.stderr
        return tqdm(total=steps, leave=False, disable=hidden or None)

    @contextmanager
    def resumable(self):
        """A context that ends on Ctrl-C with the command that continues the run.

        A directory without a checkpoint is removed at the end, if the run created it.
        """
        try:
            yield
        except KeyboardInterrupt as error:
            self.status = 128 + next(iter(error.args), signal.SIGINT)  # as in a shell
            self.log(f"interrupted after epoch {self.saved_epochs}/{self.recipe.epochs}", show=True)
            if self.saved_epochs:
                self.log(f"resume   {self.resume_command}", show=True)
        finally:
            if rank() == 0 and self.created and not (self.path / LAST).exists():
                with suppress(OSError):
                    (self.path / LOG).unlink(missing_ok=True)
                    self.path.rmdir()

    def save_epoch(self, model, optimizer, history, curve):
        """Save the state after an epoch: rows of metrics.csv, and of loss.png."""
        if rank() == 0:
            checkpoint = {
                "format": FORMAT,
                "flags": self.flags,
                "recipe": self.recipe.as_plain(),
                "processes": world_size(),
                "history": history,
                "curve": curve,
                "time": time.time(),
                "network": unwrapped(model).state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            buffer = io.BytesIO()
            torch.save(checkpoint, buffer)
            scores = [row.get("val_both_accuracy", 0.0) for row in history]  # 0: never better
            if scores[-1] > max(scores[:-1], default=0.0):
                self.write(BEST, buffer.getbuffer())
            # It must never be next to a longer history.
            (self.path / "results.json").unlink(missing_ok=True)
            self.write(LAST, buffer.getbuffer())
        self.saved_epochs = len(history)
        if rank() == 0:
            self.save_tables(history)

    def save_tables(self, history):
        """Write metrics.csv and args.json."""
        self.save_csv("metrics.csv", history[0].keys(), map(dict.values, history))
        settings = {"flags": self.flags, "recipe": self.recipe.as_plain()}
        self.save_json("args.json", {"command": self.command} | self.info | settings)

    def save_results(self, predictions, history):
        """Print and save the results on the test set."""
        test, seconds = predictions.metrics(), sum(row["train_seconds"] for row in history)
        if rank() == 0:
            self.save_tables(history)  # the run may have been killed before it wrote them
            self.save_json("results.json", self.info | {"test": test, "train_seconds": seconds})
        self.log(result_line("test", test, self.info["note"], seconds), show=True)

    def save_plots(self, predictions, history, curve, test_set, head):
        """Draw the plots of the last epoch, and list the misread images."""
        if rank() > 0:
            return
        title = "{recipe}, seed {seed}, epoch {} of {epochs}: ".format(len(history), **self.info)
        accuracies = history[-1]["test_digit_accuracy"], history[-1]["test_sum_accuracy"]
        title += "{:.2f} % digit, {:.2f} % sum".format(*(100 * value for value in accuracies))
        title += f" ({self.info['note']})" if self.info["note"] else ""
        disputed = DISPUTED if self.flags["dataset"] == "mnist" else set()
        self.save_csv("mistakes.csv", MISTAKE_COLUMNS, predictions.mistakes(disputed))
        images = test_set.images.cpu(), test_set.addends.cpu(), disputed
        for name, figure in plots.run_figures(history, curve, predictions, *images, head, title):
            self.write(name, plots.as_png(figure))
        self.log(f"saved    {self.path}")

    def write(self, name, content):
        """Write bytes to a file of the run."""
        write_atomic(self.path / name, content)

    def save_json(self, name, value):
        self.write(name, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def save_csv(self, name, columns, rows):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([columns, *rows])
        self.write(name, text.getvalue().encode())


def make_directory(directory, saved_epochs, name):
    """The path of a run's directory, and whether it was created. No other run is overwritten."""
    candidates = (RUNS / (f"{name}-{i}" if i > 1 else name) for i in itertools.count(1))
    for path in [Path(directory)] if directory else candidates:
        existed = path.exists()
        try:
            path.mkdir(parents=True, exist_ok=bool(directory))
        except FileExistsError as error:
            if directory:
                raise UserError(f"{path} is not a directory") from error
            continue
        except OSError as error:
            raise UserError(f"cannot create {path} ({error.strerror})") from error
        if not saved_epochs and (path / LAST).exists():
            message = f"{path} has another run: add --resume, or choose another --output-dir"
            raise UserError(message)
        return path, not existed
