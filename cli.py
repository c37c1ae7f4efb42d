"""The command lines: flags with ranges, and errors of one line."""

import argparse
import dataclasses
import math
import os
import re
import sys
import textwrap

import torch

from dataset import NUM_DIGITS, DataError
from device import DeviceError
from recipes import RECIPES, Recipe
from rundir import LAST, RunError, find_checkpoint, load_checkpoint
from scores import TrainingError

# Flags that concern one call, not the run; and settings that a run keeps to its end.
PASSING = {"resume", "eval_only", "quiet", "name", "output_dir"}
FIXED = {"recipe", "encoder", "join", "seed", "dataset", "dry_run"}
FIXED |= {"addends", "val_size", "affine", "mean", "std", "drop_last"}
FIXED |= {"optimizer", "optimizer_options"}  # a checkpoint brings back those that it was made with

DRY_EPOCHS = 2  # at most, in a dry run


def legible(text):
    """A text with escapes for what would break its line or can't be printed."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def say(text, file=None, by_any=False):
    """Print lines; of the processes that torchrun starts the first one does, or any that calls."""
    if by_any or os.environ.get("RANK", "0") == "0":
        print(*map(legible, text.split("\n")), sep="\n", file=file, flush=True)


def warn(text, by_any=False):
    """Print a line to stderr. See `say`."""
    say(legible(text), sys.stderr, by_any)


class UsageError(Exception):
    """The flags can't be used; the message says what to do."""


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations, whose errors are one line, raised as UsageError."""

    def __init__(self, **options):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **options)

    def error(self, message):
        raise UsageError(message if "; " in message else f"{message}; see {self.prog} --help")


def number(kind, low, high):
    """An argparse type: a number of `kind`, int or float, from `low` to `high`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            noun = "whole number" if kind is int else "number"
            advice = f"give a {noun} from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; {advice}")
        return value

    return parse


def matching(pattern, advice):
    """An argparse type: a text that matches `pattern` as a whole."""

    def parse(text):
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; give {advice}")
        return text

    return parse


folder = matching(r"[^\0]+", "a folder")


def train_parser(manual):
    """The parser of train.py. Flags of the recipe have no default here: it is the recipe's."""
    width = max(map(len, RECIPES))
    rows = [
        textwrap.fill(
            f"  {name:<{width}}  {recipe.about}", 100, subsequent_indent=" " * (width + 4)
        )
        for name, recipe in RECIPES.items()
    ]
    parser = Parser(prog="train.py", description=manual, epilog="\n".join(["recipes:", *rows]))
    count = number(int, 1, 100_000)
    device = matching(r"auto|cpu|cuda(:\d{1,2})?|mps", "auto, cpu, cuda, cuda:N or mps")
    name = matching(r"[^\0/\\.][^\0/\\]{0,99}", "the name of a folder, without slashes")

    group = parser.add_argument_group("recipe", "a flag given wins over the recipe")
    flag = group.add_argument
    flag(
        "--recipe", choices=RECIPES, default="default", help="a row of the table (default: default)"
    )
    flag("--epochs", type=count, metavar="N", help="passes over the training set, 1 to 100000")
    flag("-b", "--batch-size", type=count, metavar="N", help="images a step, 1 to 100000")
    rate = number(float, 1e-9, 100)
    flag("--lr", type=rate, metavar="X", help="the schedule's peak, 1e-9 to 100")
    decay = number(float, 0, 10)
    flag("--weight-decay", type=decay, metavar="X", help="0 to 10")
    flag("--addends", choices=["each-epoch", "once"], help="when the random numbers are drawn")
    size = number(int, 0, 59_999)
    flag("--val-size", type=size, metavar="N", help="training images held out, 0 to 59999")
    group = parser.add_argument_group("run")
    flag = group.add_argument
    seed = number(int, 0, 2**32 - 1)
    flag("--seed", type=seed, default=0, metavar="N", help="0 to 4294967295 (default: 0)")
    text = "auto: MNIST, or synthetic digits where it can't be had (default: auto)"
    flag("--dataset", choices=["auto", "mnist", "synthetic"], default="auto", help=text)
    text = "holds or gets MNIST/raw, as torchvision has it (default: data)"
    flag("--data-dir", type=folder, default="data", metavar="DIR", help=text)
    text = "auto, cpu, cuda, cuda:N or mps; the CPU if missing (default: auto)"
    flag("--device", type=device, default="auto", help=text)
    text = "auto: bf16 on GPUs and x86 processors that have it (default: auto)"
    flag("--precision", choices=["auto", "fp32", "bf16"], default="auto", help=text)
    text = "on a GPU: the same bits at each run; may be slower"
    flag("--deterministic", action="store_true", help=text)
    group = parser.add_argument_group("output")
    place = group.add_mutually_exclusive_group()
    text = "the run's folder (default: a new one below runs)"
    place.add_argument("--output-dir", type=folder, metavar="DIR", help=text)
    text = "the run's name below runs (default: the recipe's)"
    place.add_argument("--name", type=name, metavar="NAME", help=text)
    text = "go on with a run's folder or checkpoint; bare: with the newest run"
    group.add_argument("--resume", nargs="?", const="", metavar="PATH", help=text)
    text = "with --resume: print the checkpoint's figures, train nothing"
    group.add_argument("--eval-only", action="store_true", help=text)
    text = "the whole way in seconds: a few batches of everything"
    group.add_argument("--dry-run", action="store_true", help=text)
    group.add_argument("-q", "--quiet", action="store_true", help="print the result alone")
    return parser


def predict_parser(manual):
    """The parser of predict.py."""
    parser = Parser(prog="predict.py", description=manual)
    parser.add_argument("run", help="a run's folder, or a checkpoint")
    text = "pictures of a digit, in any format that Pillow reads; - for standard input"
    parser.add_argument("image", nargs="*", help=text)
    addend = number(int, 0, NUM_DIGITS - 1)
    text = "the number to add, 0 to 9 (default: 0)"
    parser.add_argument("--add", type=addend, default=0, metavar="N", help=text)
    text = "print a list of objects for programs"
    parser.add_argument("--json", action="store_true", help=text)
    text = "draw what the network saw, and its probabilities"
    drawn = matching(r"[^\0]+\.png", "a file's name that ends in .png")
    parser.add_argument("--save-picture", type=drawn, metavar="FILE.png", help=text)
    text = "write the network with torch.export, and a model card beside it"
    exported = matching(r"[^\0]+\.pt2", "a file's name that ends in .pt2")
    parser.add_argument("--export", type=exported, metavar="FILE.pt2", help=text)
    return parser


def resolve_recipe(args):
    """The table's row, with the flags that were given in their places."""
    columns = {column.name for column in dataclasses.fields(Recipe)}
    given = {k: v for k, v in vars(args).items() if k in columns and v is not None}
    recipe = dataclasses.replace(RECIPES[args.recipe], **given)
    if args.dry_run:
        recipe = dataclasses.replace(recipe, epochs=min(recipe.epochs, DRY_EPOCHS))
    return recipe


def parse_train(manual, argv):
    """The flags of train.py, and the checkpoint's path and state (or None) if there is one.

    With --resume, flags that are not given come from the run.

    Raises:
        UsageError: flags that don't fit together.
        RunError: the checkpoint can't be used.
    """
    parser = train_parser(manual)
    args = parser.parse_args(argv)
    if args.resume is None:
        if args.eval_only:
            raise UsageError("--eval-only needs a checkpoint; add --resume PATH")
        return args, None, None
    if args.name or args.output_dir:
        raise UsageError("--resume goes on in the run's own folder; leave out --name, --output-dir")
    path = find_checkpoint(args.resume)
    if path.name != LAST and not args.eval_only:
        raise UsageError(
            f"--resume goes on from a run's {LAST}; name its folder, or add --eval-only"
        )
    state = load_checkpoint(path)
    if state["flags"].get("recipe") not in RECIPES:
        raise RunError(f"{path} is of a recipe that this program does not have; name another")
    parser.set_defaults(**state["flags"])
    return parser.parse_args(argv), path, state


def lasting(args):
    """The flags that belong to a run however often it is resumed, in plain types."""
    return {k: v for k, v in vars(args).items() if k not in PASSING}


def announce_changes(before, now):
    """Say what is set otherwise than when the run was begun.

    Both are dicts with "flags" and "recipe"; `before`, a checkpoint's state, has a history too.

    Raises:
        UsageError: a change after which it would be another network, or other data.
    """
    notes, done = [], len(before["history"])
    before, now = (kept["flags"] | kept["recipe"] for kept in (before, now))
    if now["epochs"] < done:
        raise UsageError(f"--epochs {now['epochs']} is less than the {done} done; give more")
    for name in now:
        if name == "about" or name in before and before[name] == now[name]:
            continue
        flag = f"--{name.replace('_', '-')}"
        change = f"{flag} is now {now[name]}, was {before.get(name)}"
        if name in FIXED:
            raise UsageError(f"{change}, which makes it another experiment; begin a new run")
        if name == "epochs":
            change += ": the schedule goes on in the new length, so this is not the same as a run"
            change += " of that length from the start"
        notes.append(f"note: {change}")
    for note in notes:  # not before all is known to be allowed: an error stands alone
        warn(note)


def exit_status(command):
    """Run a command, and turn what it raises into one line on stderr and an exit status.

    0 to 1 and 128 + signal come from the command itself; 2 is wrong usage, 1 any other failure.
    """
    try:
        return command()
    except UsageError as error:
        warn(f"error: {error}")
        return 2
    except (DataError, RunError, TrainingError) as error:
        warn(f"error: {error}")
        return 1
    except DeviceError as error:
        warn(f"error: {error}", by_any=True)  # it may be this process's alone
        return 1
    except torch.OutOfMemoryError as error:
        warn(f"error: {str(error).splitlines()[0]}; try a smaller --batch-size", by_any=True)
        return 1
    except OSError as error:  # all others are caught where they arise
        if error.filename is None:  # stdout's, it seems: Python would try again, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        place = f"{error.filename}: " if error.filename else ""
        warn(f"error: {place}{error.strerror or error}; mend that and try again")
        return 1
    except KeyboardInterrupt:
        warn("error: interrupted; run it again")
        return 130
