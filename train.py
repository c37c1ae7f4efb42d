"""Train a two-headed network on MNIST: image and random addend in, digit and sum out.

python train.py                              # the default recipe
python train.py --recipe fast                # one epoch, in seconds
python train.py --epochs 20 --device cuda    # on a GPU; falls back to the CPU
python train.py --resume                     # continue the latest unfinished run

On several GPUs: torchrun --standalone --nproc-per-node 2 train.py
Checkpoints, metrics and plots are written to a new directory below runs/.

Our recipes, with the mean test accuracy of digit / sum and the training time on two CPU cores with
bf16 (several times as long without it):

  default   20 epochs  99.73 / 99.73 %  3 minutes   best accuracy for its cost
  fast       1 epoch   99.41 / 99.40 %  seconds     two convolutions
  tiny      60 epochs  99.56 / 99.55 %  5 minutes   5,893 parameters
  ensemble  20 epochs  99.74 / 99.74 %  47 minutes  six networks of default; on one core

Published systems, described in published/README.md: concat-mlp, shared-trunk, shared-trunk-slow,
shared-trunk-fixed, concat-linear, concat-linear-fixed, added, added-fixed.

In the results, "both" counts pairs of image and addend with digit and sum correct; "consistent"
those where the predicted sum is the predicted digit plus the addend. The losses that are printed
and plotted include label smoothing; their minimum is subtracted.
"""

import sys
import time
from functools import partial

from training.cli import UserError, exit_status, parse_train_args

if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:
    parse_train_args(["--help"], __doc__)  # exits, without the seconds that importing torch takes

import torch
import torch.nn.functional as F

from dataset import MNISTSum, load_data, split_indices
from model import build_model
from recipes import RECIPES, recipe_from_args
from training.device import broadcast_buffers, move_model, pick_device, replicate
from training.metrics import Predictions, step_metrics
from training.run import Run, start

EVAL_BATCH = 500  # images, each evaluated with all ten addends
DRY_RUN_BATCHES, DRY_RUN_IMAGES = 3, 200  # at most


def train_epoch(model, optimizer, dataset, recipe, epoch, autocast, progress):
    """Train for one epoch; returns the `step_metrics` of this process: float64 (S, 7), S steps."""
    model.train()
    torch.manual_seed(dataset.process_seed())  # for dropout, if the network has it
    batches = dataset.batches(recipe.batch_size, recipe.drop_last)  # this process's share of each
    steps = []
    for step, indices in enumerate(batches, start=(epoch - 1) * len(batches)):
        image, digit, addend, total = dataset.batch(indices)  # (B, 1, 28, 28), (B,), (B, 10), (B,)
        lr = recipe.lr * recipe.schedule(step, recipe.epochs * len(batches))
        for group in optimizer.param_groups:
            group["lr"] = lr

        with autocast():
            digit_log_probs, sum_log_probs = model(image, addend)  # (B, 10), (B, 19)
        digit_loss = smoothed_nll(digit_log_probs, digit, recipe.label_smoothing)
        sum_loss = smoothed_nll(sum_log_probs, total, recipe.label_smoothing)
        loss = recipe.loss_weight * (digit_loss + sum_loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        outputs = (digit_log_probs, digit, digit_loss), (sum_log_probs, total, sum_loss)
        steps.append(step_metrics(*outputs))
        progress.update()
    return torch.stack(steps).cpu().double()


def smoothed_nll(log_probs, target, smoothing):
    """`nll_loss` with label smoothing, as in `cross_entropy`: log_probs (B, C), target (B,)."""
    return (1 - smoothing) * F.nll_loss(log_probs, target) - smoothing * log_probs.mean()


@torch.no_grad()
def evaluate(model, dataset, autocast):
    """Predict each image with all ten addends; returns `metrics.Predictions`, equal on all ranks.

    The images are divided among the processes, and each image is encoded once.
    """
    start_time = time.perf_counter()
    model.eval()
    outputs = []
    for indices in dataset.share().split(EVAL_BATCH):
        with autocast():
            features = model.encoder(dataset.normalized(indices))  # (B, F)
        outputs.append(model.classify_all(features))  # (B, 10, 10), (B, 10, 19)
    return Predictions.merged(outputs, dataset.digits, start_time)


def evaluate_all(model, datasets, autocast):
    """`evaluate` on each of the datasets, a dict by split."""
    broadcast_buffers(model)
    return {split: evaluate(model, dataset, autocast) for split, dataset in datasets.items()}


@exit_status
def main(argv, recipes=RECIPES):
    """Parse the flags, start or resume a run, train, report; returns the exit status."""
    args, checkpoint = start(argv, __doc__, recipes)  # on resume, the flags are those of the run
    recipe = recipe_from_args(args, recipes)
    device, autocast = pick_device(args)
    data = load_data(args.dataset, args.data_dir)
    args.dataset = data.name  # saved with the run: resuming must not choose again
    train_set, eval_sets = make_datasets(data, recipe, args, device)
    torch.manual_seed(args.seed)
    model = move_model(build_model(recipe.encoder, recipe.head, recipe.members), device)
    optimizer = make_optimizer(model, recipe)

    run = Run(args, recipe, model, optimizer, train_set, eval_sets, checkpoint)
    if args.eval_only:
        return run.report(evaluate_all(model, eval_sets, autocast))
    with run:
        replicas = [replicate(member) for member in model.members]
        predictions = None
        for epoch in run.epochs_left():
            augment = epoch <= recipe.epochs - recipe.clean_epochs
            steps = 0  # becomes the sum over the members of an ensemble: float64 (S, 7)
            for member, replica in enumerate(replicas):
                train_set.set_epoch(epoch, member, augment)
                steps += train_epoch(
                    replica, optimizer, train_set, recipe, epoch, autocast, run.progress
                )
            run.progress.set_postfix_str("evaluating")
            predictions = evaluate_all(model, eval_sets, autocast)
            run.save_epoch(epoch, steps, predictions)
        run.finish(predictions or evaluate_all(model, eval_sets, autocast))
    return run.status


def make_datasets(data, recipe, args, device):
    """The training set, and a dict of the sets to evaluate: "val" if there is one, and "test"."""
    count = len(data.train.data)
    if recipe.val_size >= count:
        raise UserError(f"--val-size {recipe.val_size} leaves no training images", status=2)
    train, val = split_indices(count, recipe.val_size, args.seed)
    test = torch.arange(len(data.test.data))
    if args.dry_run:
        train = train[: DRY_RUN_BATCHES * recipe.batch_size]
        val, test = val[:DRY_RUN_IMAGES], test[:DRY_RUN_IMAGES]
    make = partial(MNISTSum, mean=recipe.mean, std=recipe.std, seed=args.seed, device=device)
    eval_sets = {"val": make(data.train, "val", val)} if recipe.val_size else {}
    eval_sets["test"] = make(data.test, "test", test)
    return make(data.train, "train", train, addends=recipe.addends, affine=recipe.affine), eval_sets


def make_optimizer(model, recipe):
    """The optimizer of a recipe; `train_epoch` sets its learning rate at each step."""
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    options = {"lr": recipe.lr, "weight_decay": recipe.weight_decay, **recipe.optimizer_options}
    return getattr(torch.optim, recipe.optimizer)(model.parameters(), fused=fused, **options)


if __name__ == "__main__":
    sys.exit(main())
