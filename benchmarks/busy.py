"""Time training alone and beside a busy process, with our thread settings and with torch's.

python -m benchmarks.busy --recipe fast

Flags of train.py go after --.
"""

import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

from benchmarks import common, seeds
from training.console import Parser, exit_status

# Equal to libgomp's defaults: idle threads spin for milliseconds before they sleep.
LIBGOMP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "300000"}


@contextmanager
def busy_process():
    """Another process that keeps one core busy."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def measure(flags, count):
    """Seconds of training with `count` seeds for both settings in both places, a dict of lists."""
    # The program sets both variables where the user has not.
    ours = {name: value for name, value in os.environ.items() if name not in LIBGOMP}
    seconds = {}
    for seed in range(count):  # outer loop: a change of the machine affects all
        for name, environment in {"ours": ours, "torch": ours | LIBGOMP}.items():
            for place, context in {"alone": nullcontext, "beside": busy_process}.items():
                with context(), tempfile.TemporaryDirectory() as directory:
                    run = seeds.train(Path(directory), [*flags, "--seed", str(seed)], environment)
                seconds.setdefault(f"{name}, {place}", []).append(run["train_seconds"])
                print(f"{name}, {place}, seed {seed}: {run['train_seconds']:.1f} s", flush=True)
    return seconds


def parse_args(argv):
    parser = Parser(prog="busy.py", description=__doc__)
    common.add_flags(parser, "busy.json", recipe="fast", seeds=5)
    return parser.parse_args(argv)


@exit_status
def main(argv):
    args = parse_args(argv)
    seconds = measure(["--recipe", args.recipe, *args.flags], args.seeds)
    results = common.provenance("busy", argv)
    results |= {name: common.summary(values) for name, values in seconds.items()}
    for name in seconds:
        print(f"{name}: median {results[name]['median']:.2f} s")
    common.save_json(args.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
