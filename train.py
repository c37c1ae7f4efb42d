"""Train a two-headed network on MNIST: image and random number in, digit and their sum out.

python train.py                              # the default recipe, twenty epochs
python train.py --recipe fast                # one epoch, seconds
python train.py --epochs 20 --device cuda    # on a GPU; on the CPU where there is none
"""

import dataclasses
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

import torch
from tqdm import tqdm

import model
from cli import (
    UsageError,
    announce_changes,
    exit_status,
    lasting,
    parse_train,
    resolve_recipe,
    say,
    warn,
)
from dataset import DOUBTED, MNISTSum, split_off
from device import Stopped, pick_engine, stop_on_signals
from learner import Learner, evaluate, train_epoch
from rundir import BEST, LAST, RUNS, RunDir, RunError, load_checkpoint
from scores import BROKEN, Predictions, TrainingError, epoch_line, result_line, summarise

REDRAW_SECONDS = 10  # at least, between two drawings of loss.png
PREDICTIONS, MISTAKES = 24, 30  # test images at most in predictions.png and mistakes.png
DRY_BATCHES, DRY_IMAGES = 3, 200  # at most, in a dry run


def make_datasets(source, recipe, args, device):
    """The Dataset to train on, and a dict of those held out: "val" if there is one, and "test".

    Raises:
        UsageError: the validation split leaves nothing to train on.
    """
    count = len(source.train.data)
    if recipe.val_size >= count:
        raise UsageError(f"--val-size {recipe.val_size} leaves nothing to train on; give less")
    train, val = split_off(count, recipe.val_size, args.seed)
    test = torch.arange(len(source.test.data))
    if args.dry_run:
        train = train[: DRY_BATCHES * recipe.batch_size]
        val, test = val[:DRY_IMAGES], test[:DRY_IMAGES]
    part = partial(MNISTSum, mean=recipe.mean, std=recipe.std, seed=args.seed, device=device)
    options = {"addends": recipe.addends, "affine": recipe.affine}
    held_out = {"val": part(source.train, "val", val)} if recipe.val_size else {}
    held_out["test"] = part(source.test, "test", test)
    return part(source.train, "train", train, **options), held_out


def count_steps(recipe, images, world):
    """Steps that an epoch of so many images takes, each divided over `world` processes.

    Raises:
        UsageError: none, or batch normalisation would meet less than two images in one of them.
    """
    full, rest = divmod(images, recipe.batch_size)
    smallest = rest if rest and not recipe.drop_last else recipe.batch_size
    size = f"--batch-size {recipe.batch_size}"
    if not full and recipe.drop_last:
        raise UsageError(f"{size} leaves no full batch; give at most {images}")
    if smallest // world < 2 and model.has_batch_norm(model.build(recipe.encoder, recipe.join)):
        reason = f"makes a batch of {smallest}, which is too small for batch normalisation"
        reason += f" in {world} processes" if world > 1 else ""
        raise UsageError(f"{size} {reason}; give another, {images} images are to be divided")
    return full + (smallest == rest)


@dataclasses.dataclass
class Run:
    """A run: what it works with, and what it has done so far."""

    learner: Learner
    train_set: MNISTSum
    held_out: dict[str, MNISTSum]
    steps: int  # an epoch
    rundir: RunDir
    facts: dict  # what results.json says beside the results
    settings: dict  # the lasting flags and the recipe, in plain types
    tell: Callable[[str], None]  # prints a line, unless it is to be quiet
    bar: Callable[..., tqdm]
    started: float  # on the clock of time.perf_counter
    history: list[dict] = dataclasses.field(default_factory=list)  # a row an epoch
    curve: list[tuple] = dataclasses.field(default_factory=list)  # of the training loss
    predictions: Predictions | None = None  # for the test set, after the last whole epoch

    def take_up(self, path, stop):
        """Go on from a checkpoint, and mend what hangs on it."""
        state = load_checkpoint(path)  # again: till the folder was held, it could be written to
        self.learner.load(state)
        self.history, self.curve = state["history"], state["curve"]
        self.started -= state["seconds"]
        self.keep_best(state)
        self.rundir.save_history(self.history)
        self.predictions = evaluate(self.learner, self.held_out["test"], stop)

    def train(self, stop):
        """Train the epochs that are left, each saved when it is whole. Raises Stopped."""
        drawn = time.perf_counter()
        epochs = self.learner.recipe.epochs
        for epoch in range(len(self.history) + 1, epochs + 1):
            self.train_one(epoch, stop)
            self.save()
            self.tell(epoch_line(self.history[-1], epochs))
            due = time.perf_counter() - drawn > REDRAW_SECONDS and epoch < epochs
            if due and self.rundir.writable:
                import plots  # here, as matplotlib takes a second, which --help need not wait for

                figure = plots.loss_figure(self.curve, self.history, self.title())
                self.rundir.save_figure("loss.png", figure)
                drawn = time.perf_counter()

    def train_one(self, epoch, stop):
        """Train and evaluate one epoch, and add its row to the history."""
        learner, recipe = self.learner, self.learner.recipe
        total_steps = recipe.epochs * self.steps
        self.train_set.set_epoch(epoch, augment=epoch <= recipe.epochs - recipe.clean_epochs)
        clock = time.perf_counter()
        with self.bar(total=self.steps, desc=f"epoch {epoch}/{recipe.epochs}") as bar:
            done = (epoch - 1) * self.steps
            record = train_epoch(learner, self.train_set, done, total_steps, stop, bar)
        seconds = {"train_seconds": time.perf_counter() - clock}
        figures, curve = summarise(record, epoch)
        row = {"epoch": epoch, "lr": learner.optimizer.param_groups[0]["lr"]}
        row |= {f"train_{name}": value for name, value in figures.items()}
        for part, dataset in self.held_out.items():
            clock = time.perf_counter()
            predictions = evaluate(learner, dataset, stop)
            seconds[f"{part}_seconds"] = time.perf_counter() - clock
            figures = predictions.score()
            del figures["consistency"]  # has no column of its own
            row |= {f"{part}_{name}": value for name, value in figures.items()}
        if not all(map(math.isfinite, row.values())):
            raise TrainingError(BROKEN.format(f"on held-out images after epoch {epoch}"))
        self.history.append(row | {name: round(value, 3) for name, value in seconds.items()})
        self.curve.extend(curve)
        self.predictions = predictions

    def save(self):
        """Save the epoch just done: the checkpoint first, as all else can be made from it."""
        # What a shorter run left goes before, or a kill could leave its figures beside more epochs.
        self.rundir.remove("results.json")
        state = self.settings | {"history": self.history, "curve": self.curve}
        state |= {"seconds": time.perf_counter() - self.started, **self.learner.state()}
        self.rundir.save_checkpoint(LAST, state)
        self.keep_best(state)
        self.rundir.save_history(self.history)

    def keep_best(self, state):
        """Save the checkpoint of the last epoch again if it is the best one on held-out images."""
        validated = [row.get("val_both_accuracy", 0.0) for row in self.history]
        if validated[-1] > max(validated[:-1], default=0.0):
            self.rundir.save_checkpoint(BEST, state)

    def title(self):
        """A heading for pictures: what was run, how well, and what must be known of it."""
        row, facts = self.history[-1], self.facts
        text = f"{facts['recipe']}, seed {facts['seed']}, epoch {row['epoch']} of {facts['epochs']}"
        text += f": {100 * row['test_digit_accuracy']:.2f} % digit, "
        text += f"{100 * row['test_sum_accuracy']:.2f} % sum"
        return f"{text} ({facts['note']})" if facts["note"] else text

    def draw(self):
        """Draw the pictures, and return their paths."""
        import plots

        predictions, title = self.predictions, self.title()
        test_set = self.held_out["test"]
        images = test_set.images.cpu()
        shown = torch.arange(min(PREDICTIONS, len(images)))
        addends = test_set.addends[shown].cpu()
        digits, sums = (part[shown, addends] for part in predictions.predicted())
        some = images[shown], predictions.digits[shown], addends, digits, sums
        wrong, guesses, confidences = predictions.worst(MISTAKES)
        doubted = DOUBTED if self.facts["dataset"] == "mnist" else {}
        notes = ["label doubted" if index in doubted else "" for index in wrong.tolist()]
        worst = images[wrong], predictions.digits[wrong], guesses, confidences, wrong, notes
        figures = {
            "loss.png": plots.loss_figure(self.curve, self.history, title),
            "accuracy.png": plots.accuracy_figure(self.history, title),
            "confusion_matrix.png": plots.confusion_figure(*predictions.confusion(), title),
            "predictions.png": plots.predictions_figure(*some, title),
            "mistakes.png": plots.mistakes_figure(*worst, title),
        }
        return [self.rundir.save_figure(name, figure) for name, figure in figures.items()]

    def report(self):
        """Write results.json, but where it stands: after a call that trained nothing."""
        if self.rundir.has("results.json"):
            return
        seconds = {
            "train_seconds": round(sum(row["train_seconds"] for row in self.history), 3),
            "total_seconds": round(time.perf_counter() - self.started, 3),
        }
        test = {"test": self.predictions.score()}
        self.rundir.save_json("results.json", self.facts | test | seconds)


def describe(args, recipe, engine, source, network):
    """What is to be known of a run beside its results, for its files."""
    notes = [source.note, "DRY RUN: a few batches only" if args.dry_run else ""]
    return {
        "recipe": args.recipe,
        "dataset": source.name,
        "note": "; ".join(filter(None, notes)),
        "seed": args.seed,
        "epochs": recipe.epochs,
        "device": str(engine.device),
        "precision": engine.precision,
        "processes": engine.world,
        "threads": torch.get_num_threads(),
        "parameters": model.count_parameters(network),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": version("torchvision"),
        },
    }


def headlines(facts, engine, recipe, network, train_set, held_out, rundir):
    """The lines at a run's start."""
    sizes = [f"{len(part):,} {name}" for name, part in {"train": train_set, **held_out}.items()]
    processes = f"{facts['processes']} processes of " if facts["processes"] > 1 else ""
    threads = f"{processes}{facts['threads']} thread{'s' * (facts['threads'] > 1)}"
    yield f"device   {engine.device} ({engine.reason}), {engine.precision}, {threads}"
    yield f"data     {facts['dataset']}: {', '.join(sizes)} images"
    yield f"recipe   {facts['recipe']}: {recipe.about}"
    yield model.summary(network)
    yield f"seed     {facts['seed']}"
    yield f"run      {rundir.path}"


def say_note(facts):
    """Print what must be known of the results, if anything must."""
    if facts["note"]:
        say(f"note     {facts['note']}")


def main(argv=None):
    """Run the command line `argv`, by default the process's own; returns the exit status."""
    return exit_status(partial(run, sys.argv[1:] if argv is None else list(argv)))


def run(argv):
    """What the flags ask for, on the device that is there, by as many processes as there are."""
    started = time.perf_counter()
    args, path, state = parse_train(__doc__, argv)
    engine = pick_engine(args.device, args.precision, args.deterministic)
    if engine.fell_back:
        warn(f"warning: {engine.reason}: running on the CPU")
    command = shlex.join(["python", "train.py", *argv])
    with engine.joined():
        return carry_out(args, engine, path, state, command, started)


def carry_out(args, engine, path, state, command, started):
    """A run in the order of events: data, network, folder, epochs, result, pictures."""
    import mnist  # here, as torchvision takes seconds, which a wrong flag need not wait for

    recipe = resolve_recipe(args)
    source = mnist.load(args.dataset, args.data_dir, warn)
    if not engine.agrees(source.name):
        advice = "put it into each one's --data-dir, or give --dataset synthetic"
        raise RunError(f"some processes have MNIST, and some have not; {advice}")
    args.dataset = source.name  # a run that is resumed is never given the other
    settings = {"flags": lasting(args), "recipe": recipe.as_plain()}
    train_set, held_out = make_datasets(source, recipe, args, engine.device)
    steps = count_steps(recipe, len(train_set), engine.world)
    if state:
        announce_changes(state, settings)
    learner = Learner.build(recipe, engine, args.seed)
    facts = describe(args, recipe, engine, source, learner.network)
    if args.eval_only:
        learner.load(state)
        for part, dataset in held_out.items():
            say(result_line(part, evaluate(learner, dataset).score()))
        say_note(facts)
        return 0

    if state or engine.rank:
        rundir = RunDir(path.parent if state else RUNS, writable=engine.rank == 0)
    else:
        name = f"{args.name or args.recipe}{'-dry-run' if args.dry_run else ''}"
        rundir = RunDir.create(name, args.output_dir)
    tell = (lambda line: None) if args.quiet else say
    for line in headlines(facts, engine, recipe, learner.network, train_set, held_out, rundir):
        tell(line)
    hidden = args.quiet or engine.rank or os.environ.get("TQDM_DISABLE")
    bar = partial(tqdm, total=steps, leave=False, disable=True if hidden else None)  # None: no tty
    with rundir.working(), stop_on_signals() as stop:
        run = Run(learner, train_set, held_out, steps, rundir, facts, settings, tell, bar, started)
        try:
            if state:
                run.take_up(path, stop)
            if len(run.history) < recipe.epochs:  # else this call is not what made the run
                rundir.save_json("args.json", {"command": command, **facts, **settings})
            run.train(stop)
        except Stopped:
            pass
        except RuntimeError as error:  # what a process meets when another one has gone
            if engine.world == 1 or isinstance(error, torch.OutOfMemoryError):
                raise
            if stop.signum is None:
                cause = str(error).strip().splitlines()[0]
                failure = f"a process of this run failed: {cause}; {rundir.way_on}"
                raise RunError(failure) from error
        stopped = stop.signum is not None  # or else all is done, whatever comes while it draws
        if stopped:
            engine.abort()
            warn(f"stopped: {len(run.history)} of {recipe.epochs} epochs are done")
            if not run.history:
                rundir.abandon()
        else:
            run.report()
            seconds = sum(row["train_seconds"] for row in run.history)
            line = result_line("test", run.predictions.score())
            say(f"{line}; {seconds:.1f} s of training")
            say_note(facts)
        pictures = run.draw() if run.predictions and rundir.writable else []
    for picture in pictures:
        say(f"picture  {picture}")
    if stopped and run.history:
        say(f"resume   python train.py {rundir.resume}")
    if run.history:
        say(f"run      {rundir.path}")
    return stop.exit_status


if __name__ == "__main__":
    sys.exit(main())
