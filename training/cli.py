"""The command line: flags, their ranges, and the exit status of a script."""

import argparse
import functools
import os
import re
import shlex
import signal
import sys
from contextlib import suppress

from training.errors import UserError

TRANSIENT = {"command", "resume", "eval_only", "quiet", "output_dir"}  # not stored with the run
MAY_CHANGE = {"epochs", "device", "precision", "data_dir"}  # when a run is resumed


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations whose errors are one line."""

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


def train_parser(description=""):
    """The parser of train.py. Flags that replace a setting of the recipe default to None."""
    parser = Parser(prog="train.py", description=description)
    size, images, seed = number(int, 2, 100_000), number(int, 0, 59_999), number(int, 0, 2**32 - 1)

    def flag(*names, **options):
        if "default" in options:
            options["help"] += " (default: %(default)s)"
        group.add_argument(*names, **options)

    group = parser.add_argument_group("recipe", "flags override the recipe")
    flag("--recipe", default="default", metavar="NAME", help="see above")
    flag("--epochs", type=number(int, 1, 5000), metavar="N", help="training epochs, 1 to 5000")
    flag("-b", "--batch-size", type=size, metavar="N", help="images per step, 2 to 100000")
    flag("--lr", type=number(float, 1e-9, 100), metavar="X", help="peak learning rate, 1e-9 to 100")
    flag("--weight-decay", type=number(float, 0, 10), metavar="X", help="weight decay, 0 to 10")
    flag("--addends", choices=["each-epoch", "once"], help="when the addends are drawn")
    flag("--val-size", type=images, metavar="N", help="held-out training images, 0 to 59999")

    group = parser.add_argument_group("run")
    flag("--seed", type=seed, default=0, metavar="N", help="random seed, 0 to 4294967295")
    flag("--data-dir", metavar="DIR", help="where MNIST is, or is downloaded to (default: data)")
    text = "auto: MNIST, or synthetic digits if it is unavailable and no --data-dir is given"
    flag("--dataset", choices=["auto", "mnist", "synthetic"], default="auto", help=text)
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
    text = "with --resume: evaluate a run, by default the latest; do not train"
    flag("--eval-only", action="store_true", help=text)
    flag("--dry-run", action="store_true", help="smoke test: a few batches end to end")
    flag("-q", "--quiet", action="store_true", help="print only the result")
    return parser


def parse_train_args(argv, description="", saved=None):
    """Parse the flags of train.py. On resume, those not given are the `saved` ones of the run."""
    parser = train_parser(description)
    parser.set_defaults(**saved or {})
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "train.py", *argv])
    if args.eval_only and args.resume is None:
        parser.error("--eval-only needs --resume")
    if args.output_dir and args.resume is not None:
        parser.error("--resume continues in the directory of the run: omit --output-dir")
    for name in (saved or {}).keys() - MAY_CHANGE:
        if getattr(args, name) != saved[name]:
            parser.error(f"--{name.replace('_', '-')} cannot change on resume: start a new run")
    if args.data_dir and args.dataset == "auto":
        args.dataset = "mnist"  # no silent substitution
    # An absolute path, to resume from another directory.
    args.data_dir = os.path.abspath(os.path.expanduser(args.data_dir or "data"))
    return args


def interrupt(signum, frame):
    """A handler of signals that does what Python does on SIGINT, and tells which one it was."""
    raise KeyboardInterrupt(signum)


def interrupt_status(error):
    """The exit status after a KeyboardInterrupt, as in a shell."""
    return 128 + next(iter(error.args), signal.SIGINT)


def exit_status(main):
    """Decorate `main(argv)`: an expected error becomes one line on stderr and an exit status.

    SIGTERM and SIGHUP raise KeyboardInterrupt like SIGINT, unless they are ignored (nohup).
    """
    from training import distributed  # not at the top: --help should not wait for torch
    from training.console import printable

    @functools.wraps(main)
    def wrapper(argv=None, **options):
        with suppress(ValueError):  # signal.signal raises it outside of the main thread
            # Windows has no SIGHUP.
            for signum in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
                if signal.getsignal(signum) == signal.SIG_DFL:
                    signal.signal(signum, interrupt)
        try:
            status = main(sys.argv[1:] if argv is None else list(argv), **options)
            distributed.close()
            return status
        except UserError as error:
            return fail(error, str(error), error.status)
        except KeyboardInterrupt as error:
            if sys.stderr:
                print("interrupted", file=sys.stderr)
            return interrupt_status(error)
        except (MemoryError, RuntimeError) as error:
            if re.search("MemoryError|out of memory|DefaultCPUAllocator|bad_alloc", repr(error)):
                return fail(error, "out of memory; try a smaller batch (--batch-size) or picture")
            if distributed.world_size() == 1:
                raise
            return fail(error, str(error).splitlines()[0])  # perhaps another process has ended
        except OSError as error:
            try:
                print(end="", flush=True)
            except OSError:  # stdout is broken: Python would fail again at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return fail(error, str(error))

    def fail(error, message, status=1):
        message = printable("; ".join([message, *getattr(error, "__notes__", ())]))
        rank = f"rank {distributed.rank()}: " if distributed.world_size() > 1 else ""
        if sys.stderr:
            print(f"error: {rank}{message}", file=sys.stderr, flush=True)
        return status

    return wrapper
