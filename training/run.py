"""The bookkeeping of a run: its directory, history, checkpoints, printed lines and plots.

A run directory is never overwritten, and every file in it is complete at any time.
"""

import csv
import io
import itertools
import json
import math
import os
import platform
import shlex
import sys
import time
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from training import checkpoint as checkpoints
from training import distributed, metrics, plots
from training.checkpoint import LAST, RUNS, training_caveat
from training.cli import TRANSIENT, interrupt_status, parse_train_args
from training.console import log, printable, warn
from training.constants import DISPUTED
from training.errors import DivergedError, UserError
from training.files import lock_directory, write_atomic

BEST, LOG = "best.pt", "log.txt"


def start(argv, description, recipes):
    """Connect the processes and parse the flags; returns these and the checkpoint to resume.

    On resume, flags that are not given are those of the run.
    """
    args = parse_train_args(argv, description)
    distributed.connect()
    if args.resume is None:
        return args, None
    path = distributed.from_rank_0(checkpoints.checkpoint_to_resume, args, recipes)
    checkpoint = checkpoints.load_checkpoint(path)
    if path.name != LAST and not args.eval_only:
        raise UserError(f"only {LAST} of a run can be resumed; see --eval-only for others", 2)
    if not args.resume:  # the command to resume names the run; a shell may pass --resume ""
        words = (word for word in argv if word not in ("--resume", ""))
        argv = [*words, "--resume", str(path.parent)]
    args = parse_train_args(argv, description, checkpoint["flags"])
    args.resume = str(path)
    return args, checkpoint


class Run:
    """A context for the training of a model: `with Run(...) as run`.

    Creates the directory of the run, or continues in it with the model and the optimizer restored.
    If it is interrupted, it ends with the command that continues the run. Rank 0 writes all files.
    The eval_sets are MNISTSums by split; checkpoint is the one to resume, or None.
    """

    def __init__(self, args, recipe, model, optimizer, train_set, eval_sets, checkpoint):
        self.args, self.recipe, self.model, self.optimizer = args, recipe, model, optimizer
        self.datasets = {"train": train_set, **eval_sets}
        self.history, self.curve, self.predictions = [], [], {}
        self.status, self.start_time = 0, time.perf_counter()
        self.contexts = ExitStack()
        self.info = {
            "recipe": args.recipe,
            "dataset": args.dataset,
            "note": training_caveat(vars(args)),
            "seed": args.seed,
            "epochs": recipe.epochs,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "device": str(train_set.device),
            "precision": args.precision,
            "processes": distributed.world_size(),
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("torch", "torchvision")}
            | {"python": platform.python_version()},
        }
        self.flags = {name: value for name, value in vars(args).items() if name not in TRANSIENT}
        if checkpoint:
            self.restore(checkpoint)

    def restore(self, checkpoint):
        """Continue after a checkpoint. Raises UserError if it is of a different experiment."""
        may_differ = {"description": "", "epochs": 0}
        if checkpoint["recipe"] | may_differ != self.recipe.as_plain() | may_differ:
            raise UserError(f"recipe {self.args.recipe!r} has changed: start a new run", status=2)
        trained = len(checkpoint["history"])
        if self.recipe.epochs < trained:
            raise UserError(f"--epochs must be at least {trained}, the epochs already trained", 2)
        optimizer = None if self.args.eval_only else self.optimizer
        checkpoints.restore(checkpoint, self.model, optimizer)
        self.history, self.curve = checkpoint["history"], checkpoint["curve"]
        self.start_time -= checkpoint["seconds"]  # total_seconds includes the earlier invocations

    def __enter__(self):
        args, recipe = self.args, self.recipe
        # Also refuses an impossible batch size, before the directory is created.
        batches = self.datasets["train"].batches(recipe.batch_size, recipe.drop_last)
        steps = len(batches) * recipe.members * (recipe.epochs - len(self.history))
        hidden = args.quiet or distributed.rank() > 0 or not sys.stderr
        bar = tqdm(total=steps, leave=False, disable=hidden or None)  # None: if not a terminal
        self.progress = self.contexts.enter_context(bar)
        self.path = Path(distributed.from_rank_0(run_directory, args))
        if distributed.rank() == 0:
            self.contexts.enter_context(lock_directory(self.path, wait=False))
            self.identity = os.stat(self.path)
            if self.history:
                self.save_derived()  # the run may have been killed before it wrote them
            elif any(name != LOG and name[0] != "." for name in os.listdir(self.path)):
                raise UserError(f"{self.path} is not empty; choose another --output-dir")
            self.log(f"command  {args.command}", show=None)
            self.log(f"versions {self.info['versions']}", show=None)
        if len(self.history) < recipe.epochs and not args.quiet:
            self.log_header()
        return self

    def log_header(self):
        """Print the device, data, recipe, model, seed and directory of the run."""
        info, recipe = self.info, self.recipe
        sizes = ", ".join(f"{len(part):,} {split}" for split, part in self.datasets.items())
        processes = f"{info['processes']} processes of " if info["processes"] > 1 else ""
        threads = f"{processes}{info['threads']} thread{'s' * (info['threads'] > 1)}"
        names = f"{recipe.encoder.__name__}, {recipe.head.__name__}"
        self.log(f"device   {info['device']}, {info['precision']}, {threads}")
        self.log(f"data     {info['dataset']}: {sizes} images")
        self.log(f"recipe   {info['recipe']}: {recipe.description}")
        self.log(f"model    {names}: {info['parameters']:,} parameters")
        self.log(f"seed     {info['seed']}")
        self.log(f"run      {self.path}")

    def __exit__(self, kind, error, traceback):
        saved, interrupted = (self.path / LAST).exists(), isinstance(error, KeyboardInterrupt)
        with self.contexts:
            if interrupted:
                self.status = interrupt_status(error)
                unsaved = "" if saved else "; nothing was saved"
                done = f"{len(self.history)}/{self.recipe.epochs}"
                self.log(f"interrupted after epoch {done}{unsaved}", show=warn)
                self.save_plots()
                if saved:
                    self.log(f"resume   {self.resume_command()}")
            elif error and saved and not isinstance(error, DivergedError):
                error.add_note(f"resume with: {self.resume_command()}")
        if distributed.rank() == 0 and not saved:
            with suppress(OSError):
                (self.path / LOG).unlink(missing_ok=True)
                self.path.rmdir()
        return interrupted

    def epochs_left(self):
        """Yield the epochs to train, counted from 1."""
        first, last = len(self.history) + 1, self.recipe.epochs
        if first > last and not self.args.quiet:
            longer = "to train longer, add --epochs with a larger number"
            self.log(f"nothing left to train after epoch {last}/{last}: {longer}")
        for epoch in range(first, last + 1):
            self.epoch_start = time.perf_counter()
            self.progress.set_description(f"epoch {epoch}/{last}")
            self.progress.set_postfix_str("")
            yield epoch

    def save_epoch(self, epoch, steps, predictions):
        """Save the state after an epoch, and print its metrics.

        steps: float64 (S, 7), the `step_metrics` of this process; predictions: by split.
        """
        evaluation = {split: part.seconds for split, part in predictions.items()}
        training = time.perf_counter() - self.epoch_start - sum(evaluation.values())
        smoothing = self.recipe.label_smoothing
        steps = distributed.all_reduce_sum(steps)
        train_metrics, points = metrics.epoch_metrics(steps, epoch, smoothing)
        evaluated = {split: part.metrics(smoothing) for split, part in predictions.items()}
        row = {"epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"]}
        for split, values in {"train": train_metrics, **evaluated}.items():
            row |= {f"{split}_{name}": value for name, value in values.items()}
        for split, seconds in {"train": training, **evaluation}.items():
            row[f"{split}_seconds"] = round(seconds, 3)
        if not all(map(math.isfinite, row.values())):
            message = f"the loss of epoch {epoch} is NaN or infinite: start a new run"
            raise DivergedError(f"{message} with a smaller --lr")
        self.history.append(row)
        self.curve += points
        if distributed.rank() == 0:
            self.check_directory()
            # First remove results.json of a shorter run: it must never be next to a longer history.
            (self.path / "results.json").unlink(missing_ok=True)
            self.save_checkpoint(LAST)
            self.save_derived()
        self.predictions = predictions  # only now: those of a saved epoch
        if not self.args.quiet:
            self.log(metrics.epoch_line(row, self.recipe.epochs))

    def finish(self, predictions):
        """Print the result on the test set; save it, and the plots."""
        self.predictions = predictions
        test = predictions["test"].metrics(self.recipe.label_smoothing)
        seconds = sum(row["train_seconds"] for row in self.history)
        if distributed.rank() == 0 and not (self.path / "results.json").exists():
            total = time.perf_counter() - self.start_time
            results = {"train_seconds": round(seconds, 3), "total_seconds": round(total, 3)}
            self.save_json("results.json", self.info | {"test": test} | results)
        self.log(metrics.result_line("test", test, self.info["note"], seconds))
        self.save_plots()
        if not self.args.quiet:
            self.log(f"saved    {self.path}")

    def report(self, predictions):
        """Print the results of predictions by split."""
        if not self.args.quiet:
            log(f"run      {self.args.resume}, epoch {len(self.history)}")
        for split, part in predictions.items():
            log(metrics.result_line(split, part.metrics(), self.info["note"]))
        return 0

    def log(self, text, show=log):
        """Print a line, and append it to the log file of the run."""
        if show:
            with tqdm.external_write_mode():
                show(text)
        if distributed.rank() == 0:
            with open(self.path / LOG, "a", encoding="utf-8") as file:
                file.write(f"{printable(text)}\n")

    def check_directory(self):
        """Raise UserError if another directory has the name now."""
        if not os.path.samestat(os.stat(self.path), self.identity):
            raise UserError(f"{self.path} was replaced by another directory")

    def write(self, name, content):
        """Write bytes to a file of the run."""
        self.check_directory()
        write_atomic(self.path / name, content)

    def save_json(self, name, value):
        self.write(name, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def save_csv(self, name, columns, rows):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([columns, *rows])
        self.write(name, text.getvalue().encode())

    def save_checkpoint(self, name):
        content = {
            "flags": self.flags,
            "recipe": self.recipe.as_plain(),
            "history": self.history,
            "curve": self.curve,
            "seconds": time.perf_counter() - self.start_time,
            "network": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        self.write(name, buffer.getbuffer())

    def save_derived(self):
        """Write best.pt, metrics.csv and args.json, which belong to the last checkpoint."""
        scores = [row.get("val_both_accuracy", 0.0) for row in self.history]  # 0: never better
        if scores[-1] > max(scores[:-1], default=0.0):
            self.save_checkpoint(BEST)
        self.save_csv("metrics.csv", self.history[0].keys(), map(dict.values, self.history))
        settings = {"flags": self.flags, "recipe": self.recipe.as_plain()}
        self.save_json("args.json", {"command": self.args.command} | self.info | settings)

    def save_plots(self):
        """Draw the plots of the last saved epoch, once, and list the misread images."""
        splits, self.predictions = self.predictions, {}
        if not splits or distributed.rank() > 0:
            return
        self.progress.set_postfix_str("drawing plots")
        row, test_set = self.history[-1], self.datasets["test"]
        title = "{recipe}, seed {seed}, epoch {} of {epochs}: ".format(row["epoch"], **self.info)
        digit, total = (100 * row[f"test_{output}_accuracy"] for output in ("digit", "sum"))
        title += f"{digit:.2f} % digit, {total:.2f} % sum"
        title += f" ({self.info['note']})" if self.info["note"] else ""
        disputed = DISPUTED if self.args.dataset == "mnist" else set()
        shown = test_set.images.cpu(), test_set.addends.cpu(), disputed, title
        predictions = splits["test"]
        self.save_csv("mistakes.csv", metrics.MISTAKE_COLUMNS, predictions.mistakes(disputed))
        curves = self.history, self.curve, predictions
        figures = plots.run_figures(*curves, *shown, self.recipe.label_smoothing)
        for name, figure in figures.items():
            self.write(name, plots.as_png(figure))

    def resume_command(self):
        """The command that continues this run: the one that was typed, if it has --resume."""
        new = shlex.join(["python", "train.py", "--resume", self.path.as_posix()])
        return self.args.command if self.args.resume else new


def run_directory(args):
    """The directory of a run. A new one is created: runs/RECIPE, runs/RECIPE-2 and so on."""
    if args.resume:
        return os.path.dirname(args.resume)
    name = f"{args.recipe}-dry-run" if args.dry_run else args.recipe
    candidates = (RUNS / (f"{name}-{i}" if i > 1 else name) for i in itertools.count(1))
    for path in [Path(args.output_dir)] if args.output_dir else candidates:
        try:
            path.mkdir(parents=True, exist_ok=bool(args.output_dir))
            return path
        except OSError as error:
            if args.output_dir or not path.is_dir():
                raise UserError(f"cannot create {path} ({error.strerror})") from error
