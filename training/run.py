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
from pathlib import Path

import torch
from tqdm import tqdm

from training.checkpoint import FORMAT, LAST, RUNS, training_caveat, unwrapped
from training.console import UserError, log, rank
from training.files import write_atomic
from training.metrics import result_line
from training.processes import from_rank_0, world_size


class Run:
    """The directory of a run. Rank 0 writes its files, and prints its lines.

    Args:
        directory: where, or None for a new one: runs/RECIPE, runs/RECIPE-2 and so on.
        saved_epochs: how many epochs of the run in it are saved already.
        argv: the flags as typed.
        flags: the flags that are saved, a dict in JSON types.
    """

    def __init__(self, directory, saved_epochs, argv, flags, recipe, quiet):
        # Not at the top: Matplotlib fails here, in one line, if it finds no writable directory.
        from training import plots

        self.plots = plots
        self.flags, self.recipe, self.quiet = flags, recipe, quiet
        self.status, self.saved_epochs = 0, saved_epochs
        self.note = training_caveat(flags)
        name = f"{flags['recipe']}-dry-run" if flags["dry_run"] else flags["recipe"]
        self.path = from_rank_0(make_directory, directory, saved_epochs, name)
        launcher = f"torchrun --standalone --nproc-per-node {world_size()}".split()
        script = [*(launcher if world_size() > 1 else ["python"]), "train.py"]
        self.command = shlex.join([*script, *argv])
        resume = [*script, "--resume", self.path.as_posix()]
        self.resume_command = self.command if "--resume" in argv else shlex.join(resume)

    def log_start(self, model, device, datasets):
        """Print the device, data, recipe, model, seed and directory of the run."""
        flags, recipe, threads = self.flags, self.recipe, torch.get_num_threads()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        self.settings = {
            "command": self.command,
            "flags": {name: value for name, value in flags.items() if name != "data_dir"},
            "recipe": recipe.as_plain(),
            "parameters": parameters,
            "device": str(device),
            "processes": world_size(),
            "threads": threads,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        sizes = ", ".join(f"{len(part):,} {split}" for split, part in datasets.items())
        network = f"{recipe.encoder.__name__}, {recipe.head.__name__}"
        self.log(f"device   {device}, {flags['precision']}, {world_size()} x {threads} threads")
        self.log(f"data     {flags['dataset']}: {sizes} images")
        self.log(f"recipe   {flags['recipe']}: {recipe.description}")
        self.log(f"model    {network}: {parameters:,} parameters")
        self.log(f"seed     {flags['seed']}")
        self.log(f"run      {self.path}")

    def log(self, text, always=False):
        """Append a line to log.txt, and print it unless the run is quiet."""
        if always or not self.quiet:
            with tqdm.external_write_mode():
                log(text)
        if rank() == 0:
            with open(self.path / "log.txt", "a", encoding="utf-8") as file:
                file.write(f"{text}\n")

    def progress_bar(self, steps):
        """A progress bar for training steps, on a terminal only."""
        hidden = self.quiet or rank() > 0 or not sys.stderr
        return tqdm(total=steps, leave=False, disable=hidden or None)

    @contextmanager
    def resumable(self):
        """A context that ends on Ctrl-C with the command that continues the run."""
        try:
            yield
        except KeyboardInterrupt as error:
            self.status = 128 + next(iter(error.args), signal.SIGINT)  # as in a shell
            self.log(
                f"interrupted after epoch {self.saved_epochs}/{self.recipe.epochs}", always=True
            )
            if self.saved_epochs:
                self.log(f"resume   {self.resume_command}", always=True)

    def save_epoch(self, model, optimizer, history, curve):
        """Save the state after an epoch: rows of metrics.csv, and of loss.png."""
        if rank() == 0:
            # last.pt comes last: a run killed before it repeats the epoch and all its files.
            (self.path / "results.json").unlink(missing_ok=True)
            self.save_csv("metrics.csv", history[0].keys(), map(dict.values, history))
            self.save_json("args.json", self.settings)
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
            content = io.BytesIO()
            torch.save(checkpoint, content)
            scores = [row.get("val_both_accuracy", 0.0) for row in history]  # 0: never better
            if scores[-1] > max(scores[:-1], default=0.0):
                write_atomic(self.path / "best.pt", content.getbuffer())
            write_atomic(self.path / LAST, content.getbuffer())
        self.saved_epochs = len(history)

    def save_results(self, predictions, history):
        """Print and save the results on the test set."""
        test, seconds = predictions.metrics(), sum(row["train_seconds"] for row in history)
        if rank() == 0:
            self.save_json("results.json", self.settings | {"test": test, "train_seconds": seconds})
        self.log(
            f"{result_line('test', test, self.note)}; {seconds:.1f} s of training", always=True
        )

    def save_plots(self, predictions, history, curve, test_set, head):
        """Draw the plots of the last epoch, and list the misread images."""
        if rank() == 0:
            flags, last = self.flags, history[-1]
            title = f"{flags['recipe']}, seed {flags['seed']}, "
            title += f"epoch {len(history)} of {self.recipe.epochs}: "
            title += f"{100 * last['test_digit_accuracy']:.2f} % digit, "
            title += f"{100 * last['test_sum_accuracy']:.2f} % sum"
            title += f" ({self.note})" if self.note else ""
            columns = "index", "label", "prediction", "confidence"
            self.save_csv("mistakes.csv", columns, predictions.mistakes())
            images = test_set.images.cpu(), test_set.addends.cpu()
            drawn = self.plots.run_figures(history, curve, predictions, *images, head, title)
            for name, figure in drawn:
                write_atomic(self.path / name, self.plots.as_png(figure))
        self.log(f"saved    {self.path}")

    def save_json(self, name, value):
        text = json.dumps(value, indent=2, allow_nan=False)
        write_atomic(self.path / name, f"{text}\n".encode())

    def save_csv(self, name, columns, rows):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([columns, *rows])
        write_atomic(self.path / name, text.getvalue().encode())


def make_directory(directory, saved_epochs, name):
    """The path of a run's directory, created if necessary. No other run is overwritten."""
    if directory:
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        if (path / LAST).exists() and not saved_epochs:
            raise UserError(f"{path} has another run: add --resume, or change --output-dir")
        return path
    for i in itertools.count(1):
        path = RUNS / (f"{name}-{i}" if i > 1 else name)
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
