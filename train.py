"""Train a two-headed network on MNIST: image and random number in, digit and their sum out.

python train.py                              the default recipe, twenty epochs
python train.py --recipe fast                one epoch, seconds
python train.py --epochs 20 --device cuda    on a GPU; on the CPU where there is none
"""

import dataclasses
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import mnist
import model
import plots
from cli import UsageError, exit_status, say, train_parser, warn
from dataset import NUM_DIGITS, NUM_SUMS, MNISTSum, split_off
from device import Engine, Stopped, pick_engine, stop_on_signals
from recipes import RECIPES, Recipe
from rundir import RunDir
from scores import Predictions, epoch_line, summarise

EVAL_BATCH = 500  # images; each is joined with all ten addends
BAR_EVERY = 20  # steps between two readings of the loss from the device
REDRAW_SECONDS = 10  # at least, between two drawings of loss.png
PREDICTIONS, MISTAKES = 24, 30  # test images at most in predictions.png and mistakes.png
DRY_EPOCHS, DRY_BATCHES, DRY_IMAGES = 2, 3, 200  # at most, in a dry run


def resolve_recipe(args):
    """The table's row, with the flags that were given in their places."""
    columns = {column.name for column in dataclasses.fields(Recipe)}
    given = {k: v for k, v in vars(args).items() if k in columns and v is not None}
    recipe = dataclasses.replace(RECIPES[args.recipe], **given)
    if args.dry_run:
        recipe = dataclasses.replace(recipe, epochs=min(recipe.epochs, DRY_EPOCHS))
    return recipe


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


@dataclasses.dataclass
class Learner:
    """What learns, and how: all that training changes, beside the recipe and the engine."""

    recipe: Recipe
    engine: Engine
    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    averaged: AveragedModel | None

    @classmethod
    def build(cls, recipe, engine, seed):
        """A network with the seed's initial weights, and its optimiser."""
        torch.manual_seed(seed)
        network = engine.place(model.build(recipe.encoder, recipe.join))
        optimizer = getattr(torch.optim, recipe.optimizer)(
            network.parameters(),
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            fused=engine.device.type in ("cpu", "cuda"),
            **recipe.optimizer_options,
        )
        averaged = None
        if recipe.averaging:
            average = get_ema_multi_avg_fn(recipe.averaging)
            averaged = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
        return cls(recipe, engine, network, optimizer, averaged)

    @property
    def trained(self):
        """The network whose figures are reported: the averaged one, where the recipe averages."""
        return self.averaged.module if self.averaged else self.network

    def state(self):
        """All that training changes, as plain types and tensors."""
        return {
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged else None,
            "optimizer": self.optimizer.state_dict(),
        }


def count_steps(recipe, images, network):
    """Steps an epoch of so many images takes.

    Raises:
        UsageError: none, or one of them meets batch normalisation with a batch of one image.
    """
    full, rest = divmod(images, recipe.batch_size)
    smallest = rest if rest and not recipe.drop_last else recipe.batch_size
    size = f"--batch-size {recipe.batch_size}"
    if not full and recipe.drop_last:
        raise UsageError(f"{size} leaves no full batch; give at most {images}")
    if smallest == 1 and model.has_batch_norm(network):
        reason = "makes a batch of one image, which batch normalisation can't take"
        raise UsageError(f"{size} {reason}; give another, {images} images are to be divided")
    return full + (smallest == rest)


def train_epoch(learner, dataset, step, total_steps, stop, bar):
    """Train one epoch, from `step` of `total_steps` on.

    Returns what each step gave, float64 (steps, 5) on the CPU: the mean losses of the digit and of
    the sum, how many digits and how many sums were right, how many images there were. It stays on
    the device till the epoch's end: reading it at each step would make the device wait.
    """
    recipe, network, optimizer = learner.recipe, learner.network, learner.optimizer
    network.train()
    record, sizes = [], []
    for image, digit, addend, total in dataset.batches(recipe.batch_size, recipe.drop_last):
        stop.check()
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * recipe.schedule(step, total_steps)
        with learner.engine.autocast():
            digit_log_probs, sum_log_probs = network(image, addend)  # (B, 10), (B, 19)
        digit_loss = F.nll_loss(digit_log_probs, digit)
        sum_loss = F.nll_loss(sum_log_probs, total)
        optimizer.zero_grad()
        (recipe.digit_weight * digit_loss + recipe.sum_weight * sum_loss).backward()
        optimizer.step()
        if learner.averaged:
            learner.averaged.update_parameters(network)
        digits_right = (digit_log_probs.argmax(dim=1) == digit).sum()
        sums_right = (sum_log_probs.argmax(dim=1) == total).sum()
        record.append(torch.stack([digit_loss, sum_loss, digits_right, sums_right]).detach())
        sizes.append([len(digit)])
        step += 1
        bar.update()
        if step % BAR_EVERY == 0 and not bar.disable:
            bar.set_postfix(digit=f"{digit_loss.item():.3f}", sum=f"{sum_loss.item():.3f}")
    return torch.cat([torch.stack(record).cpu().double(), torch.tensor(sizes)], dim=1)


@torch.no_grad()
def evaluate(learner, dataset, stop):
    """Predictions for each image with each of the ten addends; each image is encoded once."""
    network, engine = learner.trained, learner.engine
    network.eval()
    every_addend = torch.eye(NUM_DIGITS, device=engine.device)
    digit_log_probs, sum_log_probs = [], []
    for indices in torch.arange(len(dataset), device=engine.device).split(EVAL_BATCH):
        stop.check()
        with engine.autocast():
            features = network.encode(dataset.normalised(indices))  # (B, F)
        pairs = features.repeat_interleave(NUM_DIGITS, dim=0)  # (10 B, F)
        digit, total = network.join(pairs, every_addend.repeat(len(indices), 1))
        digit_log_probs.append(digit.view(-1, NUM_DIGITS, NUM_DIGITS))
        sum_log_probs.append(total.view(-1, NUM_DIGITS, NUM_SUMS))
    parts = torch.cat(digit_log_probs), torch.cat(sum_log_probs), dataset.digits
    return Predictions(*(part.cpu() for part in parts))


@dataclasses.dataclass
class Run:
    """A run: what it works with, and what it has done so far."""

    learner: Learner
    train_set: MNISTSum
    held_out: dict[str, MNISTSum]
    steps: int  # an epoch
    rundir: RunDir
    facts: dict  # what results.json says beside the results
    settings: dict  # the flags and the recipe, in plain types
    tell: Callable[[str], None]  # prints a line, unless it is to be quiet
    history: list[dict] = dataclasses.field(default_factory=list)  # a row an epoch
    curve: list[tuple] = dataclasses.field(default_factory=list)  # of the training loss
    predictions: Predictions | None = None  # for the test set, after the last whole epoch

    def train(self, stop):
        """Train the epochs that are left, each saved when it is whole. Raises Stopped."""
        drawn = time.perf_counter()
        epochs = self.learner.recipe.epochs
        for epoch in range(len(self.history) + 1, epochs + 1):
            self.train_one(epoch, stop)
            self.save()
            self.tell(epoch_line(self.history[-1], epochs))
            if time.perf_counter() - drawn > REDRAW_SECONDS and epoch < epochs:
                figure = plots.loss_figure(self.curve, self.history, self.title())
                self.rundir.save_figure("loss.png", figure)
                drawn = time.perf_counter()

    def train_one(self, epoch, stop):
        """Train and evaluate one epoch, and add its row to the history."""
        learner, total_steps = self.learner, self.learner.recipe.epochs * self.steps
        self.train_set.set_epoch(epoch)
        clock = time.perf_counter()
        with self.bar(f"epoch {epoch}/{learner.recipe.epochs}") as bar:
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
        self.history.append(row | {name: round(value, 3) for name, value in seconds.items()})
        self.curve.extend(curve)
        self.predictions = predictions

    def bar(self, text):
        """A progress bar on stderr, which is not drawn where stderr is no terminal."""
        quiet = self.settings["flags"]["quiet"] or os.environ.get("TQDM_DISABLE")
        disable = True if quiet else None
        return tqdm(total=self.steps, desc=text, leave=False, disable=disable)

    def save(self):
        """Save the epoch just done: the checkpoint first, as all else can be made from it."""
        state = self.settings | {"history": self.history, "curve": self.curve}
        state |= self.learner.state()
        self.rundir.save_checkpoint("last.pt", state)
        validated = [row.get("val_both_accuracy", 0.0) for row in self.history]
        if validated[-1] > max(validated[:-1], default=0.0):
            self.rundir.save_checkpoint("best.pt", state)
        self.rundir.save_history(self.history)

    def title(self):
        """A heading for pictures: what was run, how well, and what must be known of it."""
        row, facts = self.history[-1], self.facts
        text = f"{facts['recipe']}, seed {facts['seed']}, epoch {row['epoch']} of {facts['epochs']}"
        text += f": {100 * row['test_digit_accuracy']:.2f} % digit, "
        text += f"{100 * row['test_sum_accuracy']:.2f} % sum"
        return f"{text} ({facts['note']})" if facts["note"] else text

    def draw(self):
        """Draw the pictures, and return their paths."""
        predictions, title = self.predictions, self.title()
        test_set = self.held_out["test"]
        images = test_set.images.cpu()
        shown = torch.arange(min(PREDICTIONS, len(images)))
        addends = test_set.addends[shown].cpu()
        digits, sums = (part[shown, addends] for part in predictions.predicted())
        some = images[shown], predictions.digits[shown], addends, digits, sums
        wrong, guesses, confidences = predictions.worst(MISTAKES)
        truths, notes = predictions.digits[wrong], [""] * len(wrong)
        worst = images[wrong], truths, guesses, confidences, wrong, notes
        figures = {
            "loss.png": plots.loss_figure(self.curve, self.history, title),
            "accuracy.png": plots.accuracy_figure(self.history, title),
            "confusion_matrix.png": plots.confusion_figure(*predictions.confusion(), title),
            "predictions.png": plots.predictions_figure(*some, title),
            "mistakes.png": plots.mistakes_figure(*worst, title),
        }
        return [self.rundir.save_figure(name, figure) for name, figure in figures.items()]

    def report(self, total_seconds):
        """Write results.json, print the result, and return the line that says it."""
        test = self.predictions.score()
        train_seconds = round(sum(row["train_seconds"] for row in self.history), 3)
        seconds = {"train_seconds": train_seconds, "total_seconds": round(total_seconds, 3)}
        self.rundir.save_json("results.json", self.facts | {"test": test} | seconds)
        percent = {name: f"{100 * value:.2f} %" for name, value in test.items()}
        say(
            f"result   test: digit {percent['digit_accuracy']}, sum {percent['sum_accuracy']}, "
            f"both {percent['both_accuracy']}, consistent {percent['consistency']}; "
            f"{train_seconds:.1f} s of training"
        )
        if self.facts["note"]:
            say(f"note     {self.facts['note']}")


def main(argv=None):
    """Run the command line `argv`, by default the process's own; returns the exit status."""
    return exit_status(partial(run, sys.argv[1:] if argv is None else list(argv)))


def run(argv):
    """A run in the order of events: flags, device, data, network, folder, epochs, pictures."""
    started = time.perf_counter()
    args = train_parser(__doc__).parse_args(argv)
    tell = (lambda line: None) if args.quiet else say
    recipe = resolve_recipe(args)
    engine = pick_engine(args.device, args.precision)
    if engine.warning:
        warn(f"warning: {engine.warning}")
    source = mnist.load(args.dataset, args.data_dir, warn)
    train_set, held_out = make_datasets(source, recipe, args, engine.device)
    learner = Learner.build(recipe, engine, args.seed)
    steps = count_steps(recipe, len(train_set), learner.network)
    name = f"{args.name or args.recipe}{'-dry-run' if args.dry_run else ''}"
    rundir = RunDir.create(name, args.output_dir)

    notes = [source.note, "DRY RUN: a few batches only" if args.dry_run else ""]
    facts = {
        "recipe": args.recipe,
        "dataset": source.name,
        "note": "; ".join(filter(None, notes)),
        "seed": args.seed,
        "epochs": recipe.epochs,
        "device": str(engine.device),
        "precision": engine.precision,
        "threads": torch.get_num_threads(),
        "parameters": model.count_parameters(learner.network),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": version("torchvision"),
        },
    }
    settings = {"flags": vars(args), "recipe": recipe.as_plain()}
    command = shlex.join(["python", "train.py", *argv])
    rundir.save_json("args.json", {"command": command, **facts, **settings})

    sizes = [f"{len(part):,} {name}" for name, part in {"train": train_set, **held_out}.items()]
    tell(
        f"device   {engine.device} ({args.device}), {engine.precision}, {facts['threads']} threads"
    )
    tell(f"data     {source.name}: {', '.join(sizes)} images")
    tell(f"recipe   {args.recipe}: {recipe.about}")
    tell(model.summary(learner.network))
    tell(f"seed     {args.seed}")
    tell(f"run      {rundir.path}")

    run = Run(learner, train_set, held_out, steps, rundir, facts, settings, tell)
    with stop_on_signals() as stop:
        try:
            run.train(stop)
        except Stopped:
            warn(f"stopped after epoch {len(run.history)} of {recipe.epochs}")
        pictures = run.draw() if run.history else []
    if stop.signum is None:
        run.report(time.perf_counter() - started)
    for path in pictures:
        say(f"picture  {path}")
    say(f"run      {rundir.path}")
    return stop.exit_status


if __name__ == "__main__":
    sys.exit(main())
