"""The flags of train.py."""

import argparse
import os
import re

from training.checkpoint import LAST, RUNS, find_checkpoint, latest_runs, load_checkpoint
from training.console import Number, Parser, UserError, path
from training.processes import from_rank_0
from training.recipe import add_flags

TRANSIENT = {"resume", "eval_only", "quiet", "output_dir"}  # not stored with the run
MAY_CHANGE = {"epochs", "device", "precision", "data_dir"}  # when a run is resumed


def device_name(text):
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?|mps", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, cpu, cuda, cuda:N or mps")
    return text


def train_parser(description, recipes):
    """The parser of train.py. Flags that replace a setting of the recipe default to None."""
    parser = Parser(prog="train.py", description=description)

    def flag(*names, **options):
        if "default" in options:
            options["help"] += " (default: %(default)s)"
        group.add_argument(*names, **options)

    group = parser.add_argument_group("run")
    flag("--recipe", default="default", metavar="NAME", help="see above")
    seed = Number(int, 0, 2**32 - 1)
    flag("--seed", type=seed, default=0, metavar="N", help="random seed, 0 to 4294967295")
    text = "where MNIST is, or is downloaded to (default: data)"
    flag("--data-dir", type=path, metavar="DIR", help=text)
    text = "auto: MNIST, or synthetic digits if it is unavailable and no --data-dir is given"
    flag("--dataset", choices=["auto", "mnist", "synthetic"], default="auto", help=text)
    text = "auto, cpu, cuda, cuda:N or mps; falls back to the CPU"
    flag("--device", type=device_name, default="auto", help=text)
    text = "auto: bf16 on GPUs and CPUs that have it in hardware"
    flag("--precision", choices=["auto", "fp32", "bf16"], default="auto", help=text)
    flag("--deterministic", action="store_true", help="bit-for-bit reproducible GPU runs; slower")

    group = parser.add_argument_group("output")
    text = "run directory; by default runs/RECIPE or, if it exists, runs/RECIPE-2 and so on"
    flag("--output-dir", type=path, metavar="DIR", help=text)
    text = "resume a run, by default the latest unfinished one; with --output-dir: the run there, "
    text += "or start it if there is none"
    flag("--resume", nargs="?", const="", type=os.path.expanduser, metavar="RUN", help=text)
    text = "with --resume: evaluate a run, by default the latest; do not train"
    flag("--eval-only", action="store_true", help=text)
    flag("--dry-run", action="store_true", help="smoke test: a few batches end to end")
    flag("-q", "--quiet", action="store_true", help="print only the result")

    group = parser.add_argument_group("settings", "each replaces a setting of the recipe")
    add_flags(group, recipes)
    return parser


def parse_args(argv, description, recipes):
    """Parse the flags; returns them, and the checkpoint to resume or None.

    On resume, `resume` becomes the path of the checkpoint, `output_dir` its directory, and the
    flags that are not given become those of the run.
    """
    parser = train_parser(description, recipes)
    args, checkpoint = parser.parse_args(argv), None
    if args.eval_only and args.resume is None:
        parser.error("--eval-only needs --resume")
    if args.resume and args.output_dir:
        parser.error("give the run to continue as --output-dir or as --resume, not as both")
    source = from_rank_0(checkpoint_to_resume, args, recipes)
    if source:
        checkpoint = load_checkpoint(source)
        saved = checkpoint["flags"]
        parser.set_defaults(**saved)
        args = parser.parse_args(argv)
        for name in saved.keys() - MAY_CHANGE:
            if getattr(args, name) != saved[name]:
                flag = f"--{name.replace('_', '-')}"
                parser.error(f"{flag} cannot change on resume: start a new run")
        # The run may be from another machine: its directory is not created here.
        lost = not os.path.isdir(args.data_dir) and args.data_dir == saved["data_dir"]
        if lost and saved["dataset"] == "mnist":
            raise UserError(f"the run's MNIST was in {args.data_dir}: pass --data-dir")
        args.output_dir = source.parent
    args.resume = source
    if args.data_dir and args.dataset == "auto":
        args.dataset = "mnist"  # no silent substitution
    args.data_dir = os.path.abspath(args.data_dir or "data")  # to resume from another directory
    return args, checkpoint


def checkpoint_to_resume(args, recipes):
    """The path of the checkpoint that the flags name, or None for a new run."""
    if args.resume is None:
        return None
    if args.output_dir:
        there = find_checkpoint(args.output_dir)
        return there if there.exists() or args.eval_only else None
    if args.resume:
        given = find_checkpoint(args.resume)
        if given.exists() and given.name != LAST and not args.eval_only:
            message = f"only {LAST} of a run can be resumed; see --eval-only for others"
            raise UserError(message, status=2)
        return given
    for latest, checkpoint in latest_runs(recipes):
        left = (args.epochs or checkpoint["recipe"]["epochs"]) - len(checkpoint["history"])
        if args.eval_only or left > 0:
            return latest
    raise UserError(f"no {'' if args.eval_only else 'unfinished '}run in {RUNS}; give a run")


def saved_flags(args, dataset, precision):
    """The flags that are saved with a run, a dict, with the dataset and precision picked."""
    picked = vars(args) | {"dataset": dataset, "precision": precision}
    return {name: value for name, value in picked.items() if name not in TRANSIENT}
