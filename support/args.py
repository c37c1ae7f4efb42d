"""The command-line flags of train.py, their ranges, and which of them may change on resume."""

import argparse
import os
import re

from support.console import warn
from support.errors import UserError

TRANSIENT = {"resume", "eval_only", "quiet", "output_dir"}  # flags not stored with the run
# Flags and recipe columns that cannot change with --eval-only, and those that cannot on resume.
EVALUATION = {"recipe", "encoder", "head", "mean", "std", "seed", "dataset", "dry_run", "val_size"}
IMMUTABLE = EVALUATION | {"addends", "affine", "drop_last", "optimizer", "optimizer_options"}


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations that raises UserError with a one-line message."""

    def __init__(self, **options):
        options |= {"formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help", status=2)


def number(kind, low, high):
    """An argparse type: a number of `kind`, int or float, from `low` to `high`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__  # for argparse's own message
    return parse


def device_name(text):
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?|mps", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, cpu, cuda, cuda:N or mps")
    return text


def train_parser(description, recipes):
    """The parser of train.py. Flags that replace a column of the recipe default to None."""
    width = max(map(len, recipes))
    rows = [f"  {name:<{width}}  {recipe.description}" for name, recipe in recipes.items()]
    parser = Parser(prog="train.py", description=description, epilog="\n".join(["recipes:", *rows]))
    count, images, seed = number(int, 1, 100_000), number(int, 0, 59_999), number(int, 0, 2**32 - 1)

    def flag(*names, **options):
        if "default" in options:
            options["help"] += " (default: %(default)s)"
        group.add_argument(*names, **options)

    group = parser.add_argument_group("recipe", "flags override the recipe")
    flag("--recipe", choices=recipes, default="default", metavar="NAME", help="see the table below")
    flag("--epochs", type=count, metavar="N", help="training epochs, 1 to 100000")
    flag("-b", "--batch-size", type=count, metavar="N", help="images per step, 1 to 100000")
    flag("--lr", type=number(float, 1e-9, 100), metavar="X", help="peak learning rate, 1e-9 to 100")
    flag("--weight-decay", type=number(float, 0, 10), metavar="X", help="weight decay, 0 to 10")
    flag("--addends", choices=["each-epoch", "once"], help="when the addends are drawn")
    flag("--val-size", type=images, metavar="N", help="held-out training images, 0 to 59999")

    group = parser.add_argument_group("run")
    flag("--seed", type=seed, default=0, metavar="N", help="random seed, 0 to 4294967295")
    text = "auto: MNIST, or synthetic digits if it is unavailable"
    flag("--dataset", choices=["auto", "mnist", "synthetic"], default="auto", help=text)
    flag("--data-dir", default="data", metavar="DIR", help="dataset root, in torchvision's layout")
    text = "auto, cpu, cuda, cuda:N or mps; falls back to the CPU"
    flag("--device", type=device_name, default="auto", help=text)
    text = "auto: bf16 on GPUs and CPUs that have it in hardware"
    flag("--precision", choices=["auto", "fp32", "bf16"], default="auto", help=text)
    flag("--deterministic", action="store_true", help="bit-for-bit reproducible GPU runs; slower")

    group = parser.add_argument_group("output")
    text = "run directory; by default runs/RECIPE or, if it exists, runs/RECIPE-2 and so on"
    flag("--output-dir", metavar="DIR", help=text)
    text = "resume from a run directory, by default the latest unfinished run"
    flag("--resume", nargs="?", const="", metavar="PATH", help=text)
    flag("--eval-only", action="store_true", help="with --resume: evaluate, do not train")
    flag("--dry-run", action="store_true", help="smoke test: a few batches end to end")
    flag("-q", "--quiet", action="store_true", help="print only the result")
    return parser


def parse_train_args(argv, description, recipes, saved=None):
    """Parse the flags of train.py; those not given come from the `saved` ones of a resumed run."""
    parser = train_parser(description, recipes)
    parser.set_defaults(**saved or {})
    if saved and saved["dataset"] == "mnist" and not os.path.isdir(f"{saved['data_dir']}/MNIST"):
        parser.set_defaults(data_dir="data")  # the run comes from another machine
    args = parser.parse_args(argv)
    args.data_dir = os.path.abspath(args.data_dir)  # to resume from another directory
    if args.recipe not in recipes:  # that of a resumed run; argparse does not check defaults
        parser.error(f"the recipe {args.recipe!r} does not exist")
    if args.eval_only and args.resume is None:
        parser.error("--eval-only needs --resume")
    if args.output_dir and args.resume is not None:
        parser.error("--resume continues in the directory of the run: omit --output-dir")
    return args


def check_changes(checkpoint, eval_only, flags, recipe):
    """Warn of changes since the resumed run, or raise UserError; returns the flags to repeat.

    With `eval_only`, changes that affect only training are ignored.
    """
    # A column replaces the flag of the same name, which is None if it was not given.
    saved, current = checkpoint["flags"] | checkpoint["recipe"], flags | recipe
    changed_flags, done = [], len(checkpoint["history"])
    for name, value in current.items():
        if name == "description" or (name in saved and saved[name] == value):
            continue
        if eval_only and name in recipe and name not in EVALUATION:
            continue
        label = f"--{name.replace('_', '-')}" if name in flags else f"recipe column {name}"
        change = f"{label} is now {value}, was {saved.get(name)}"
        if name in IMMUTABLE:
            raise UserError(f"{change}: it cannot change on resume; start a new run", 2)
        if name == "epochs" and value <= done:
            raise UserError(f"--epochs {value} must exceed the {done} already trained", 2)
        if name == "epochs":
            change += "; the learning rate follows the new schedule"
        if name == "data_dir" and current["dataset"] == "synthetic":
            change += "; the run stays on synthetic digits, NOT MNIST"
        warn(f"warning: {change}")
        if name in flags:
            changed_flags += [label] if value is True else [label, str(value)]
    return changed_flags
