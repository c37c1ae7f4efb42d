"""The directory of a run: never overwritten, and every file in it complete at any time."""

import csv
import io
import itertools
import json
import os
import platform
import shlex
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path

import torch

from support import distributed
from support.console import log, warn
from support.errors import UserError
from support.files import lock_directory, write_atomic

RUNS = Path("runs")
LAST, BEST = "last.pt", "best.pt"
PLOTS = ("loss.png", "accuracy.png", "confusion_matrix.png", "predictions.png", "mistakes.png")
RUN_FILES = (LAST, BEST, "args.json", "metrics.csv", "results.json", *PLOTS)
CHECKPOINT = {"flags": dict, "recipe": dict, "info": dict, "calls": list, "history": list}
CHECKPOINT |= {"curve": list, "seconds": float, "network": dict, "optimizer": dict}


class RunDir:
    """The directory of a run, `writable` on rank 0 only.

    `resume_flags`: changed flags, repeated in the command to resume until an epoch is saved.
    """

    def __init__(self, path, writable, resume_flags):
        self.path, self.writable, self.resume_flags = Path(path), writable, resume_flags

    @contextmanager
    def open(self, new):
        """Lock the directory; a `new` run must not find the files of another one.

        If there is a checkpoint, an error in the block gets a note with the command to resume.
        """
        with lock_directory(self.path, wait=False) if self.writable else nullcontext():
            if self.writable and new and any(map(self.has, RUN_FILES)):
                raise UserError(f"{self.path} already holds a run; choose another --output-dir")
            for name in RUN_FILES:  # left by a process that was killed while it wrote
                self.remove(f".{name}.tmp")
            try:
                yield
            except BaseException as error:
                if self.has(LAST):
                    error.add_note(f"resume with: {self.resume_command()}")
                raise
            finally:
                if self.writable and not self.has(LAST):
                    with suppress(OSError):  # not empty
                        self.path.rmdir()

    def resume_command(self):
        """The command that continues this run, quoted for a shell."""
        command = ["python", "train.py", "--resume", self.path.as_posix(), *self.resume_flags]
        return shlex.join(command)

    def has(self, name):
        return (self.path / name).exists()

    def write(self, name, content):
        """Write bytes to a file of the run. See `write_atomic`."""
        if self.writable:
            write_atomic(self.path / name, content)

    def remove(self, name):
        if self.writable:
            (self.path / name).unlink(missing_ok=True)

    def save_json(self, name, value):
        self.write(name, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def save_epoch(self, checkpoint):
        """Save the state after an epoch: the checkpoint, then the files derived from it."""
        # First remove results.json of a shorter run: it must never be next to a longer history.
        self.remove("results.json")
        self.save_checkpoint(LAST, checkpoint)
        self.save_derived(checkpoint)
        self.resume_flags = []

    def save_checkpoint(self, name, checkpoint):
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        self.write(name, buffer.getbuffer())

    def save_derived(self, checkpoint):
        """Write best.pt, metrics.csv and args.json, which the last checkpoint determines."""
        history, calls = checkpoint["history"], checkpoint["calls"]
        scores = [row.get("val_both_accuracy", 0.0) for row in history]  # 0: never better
        if scores[-1] > max(scores[:-1], default=0.0):
            self.save_checkpoint(BEST, checkpoint)
        text = io.StringIO()
        writer = csv.DictWriter(text, history[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        self.write("metrics.csv", text.getvalue().encode())
        settings = {name: checkpoint[name] for name in ("flags", "recipe", "calls")}
        # "recipe" is a name in the metadata; here it is replaced by the whole row.
        args = {"command": calls[-1]["command"], **checkpoint["info"], **settings}
        self.save_json("args.json", args)


def create_directory(args):
    """Create the directory of a new run: --output-dir, or runs/RECIPE, runs/RECIPE-2 and so on."""
    name = f"{args.recipe}-dry-run" if args.dry_run else args.recipe
    candidates = (RUNS / (f"{name}-{i}" if i > 1 else name) for i in itertools.count(1))
    for path in [Path(args.output_dir)] if args.output_dir else candidates:
        try:
            path.mkdir(parents=True, exist_ok=bool(args.output_dir))
            return path
        except OSError as error:
            if args.output_dir or not path.is_dir():
                raise UserError(f"cannot create {path} ({error.strerror})") from error


def latest_runs():
    """Path and last checkpoint of each run in RUNS, the most recent first, without dry runs."""
    for path in sorted(RUNS.glob(f"*/{LAST}"), key=os.path.getmtime, reverse=True):
        try:
            checkpoint = load_checkpoint(path)
        except UserError as error:
            warn(f"warning: {error}; skipped")
            continue
        if not checkpoint["flags"]["dry_run"]:
            yield path, checkpoint


def find_checkpoint(path):
    """The path of the checkpoint in a run directory, or of the checkpoint file itself."""
    found = Path(path, LAST) if os.path.isdir(path) else Path(path)
    if not os.path.exists(found):  # unlike Path.exists, accepts names that are too long
        raise UserError(f"no checkpoint at {found}")
    return found


def checkpoint_to_resume(args):
    """The path of the checkpoint that --resume names, by default of the latest unfinished run.

    With --eval-only, or with --epochs beyond what it has, a finished run counts too.
    """
    if args.resume:
        path = find_checkpoint(args.resume)
        if path.name != LAST and not args.eval_only:
            raise UserError(f"only {LAST} can be resumed; give its directory or use --eval-only", 2)
        return path
    for path, checkpoint in latest_runs():
        left = (args.epochs or checkpoint["recipe"]["epochs"]) - len(checkpoint["history"])
        if args.eval_only or left > 0:
            return path
    raise UserError(f"no {'' if args.eval_only else 'unfinished '}run in {RUNS}; give a run")


def load_checkpoint(path):
    """Load a checkpoint, or that of a run directory, on the CPU; UserError if it is not usable."""
    path = find_checkpoint(path)
    try:
        content = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            marked = any(entry.external_attr for entry in archive.infolist())  # torch sets none
            if marked or archive.testzip():  # torch.load accepts damaged tensors
                raise zipfile.BadZipFile
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # for a damaged archive, zipfile and torch raise many types
        reason = getattr(error, "strerror", None) or "damaged or not a checkpoint"
        raise UserError(f"cannot read {path} ({reason})") from error
    if not isinstance(checkpoint, dict) or not all(
        isinstance(checkpoint.get(name), kind) for name, kind in CHECKPOINT.items()
    ):
        raise UserError(f"{path} is not a checkpoint of this version of the program")
    return checkpoint


def restore(checkpoint, model, optimizer=None):
    """Load a checkpoint into a model and its optimizer. Raises UserError if they don't fit."""
    try:
        model.load_state_dict(checkpoint["network"])
        if optimizer:
            optimizer.load_state_dict(checkpoint["optimizer"])
            for group in optimizer.param_groups:
                group["weight_decay"] = optimizer.defaults["weight_decay"]  # may have changed
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("the checkpoint was saved from a different network") from error


def run_info(argv, args, recipe, device, note, parameters, history, calls):
    """Metadata of a run, and its `calls`, including this one if epochs are left to train."""
    call = {
        "command": shlex.join(["python", "train.py", *argv]),
        "first_epoch": len(history) + 1,
        "device": str(device),
        "precision": args.precision,
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # a subclass of str, which weights_only refuses
            "torchvision": version("torchvision"),
        },
    }
    calls = [*calls, call] if len(history) < recipe.epochs else calls
    groups = itertools.groupby(calls, key=lambda call: call["precision"])
    precisions = [f"{name} from epoch {next(group)['first_epoch']}" for name, group in groups]
    notes = [note, "DRY RUN: a few batches only" if args.dry_run else ""]
    notes += [", ".join(precisions) if len(precisions) > 1 else ""]
    info = {"recipe": args.recipe, "dataset": args.dataset, "note": "; ".join(filter(None, notes))}
    info |= {"seed": args.seed, "epochs": recipe.epochs, "parameters": parameters}
    info |= {k: v for k, v in calls[-1].items() if k not in ("command", "first_epoch")}
    return info, calls


def log_header(info, reason, recipe, datasets, run_dir):
    """Print the device, data, recipe, model, seed and directory of a run."""
    sizes = ", ".join(f"{len(part):,} {split}" for split, part in datasets.items())
    threads = f"{info['threads']} thread{'s' * (info['threads'] > 1)}"
    if info["processes"] > 1:
        threads = f"{info['processes']} processes with {threads} each"
    names = f"{recipe.encoder.__name__}, {recipe.head.__name__}"
    log(f"device   {info['device']} ({reason}), {info['precision']}, {threads}")
    log(f"data     {info['dataset']}: {sizes} images")
    log(f"recipe   {info['recipe']}: {recipe.description}")
    log(f"model    {names}: {info['parameters']:,} parameters")
    log(f"seed     {info['seed']}")
    log(f"run      {run_dir.path}")
