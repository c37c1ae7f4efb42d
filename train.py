"""Train a two-headed network on MNIST: image and random addend in, digit and sum out.

python train.py                              # the default recipe
python train.py --recipe fast                # one epoch, in seconds
python train.py --epochs 20 --device cuda    # on a GPU; falls back to the CPU
python train.py --unseen-pairs 50            # half of the pairs of digit and addend left out
python train.py --resume                     # continue the latest unfinished run

On several GPUs: torchrun --standalone --nproc-per-node 2 train.py
Checkpoints, metrics and plots are written to a new directory below runs/.

Our recipes, with the mean test accuracy of digit / sum and about the training time on two idle CPU
cores with bf16:

  default   20 epochs  99.71 / 99.71 %  4 minutes   best accuracy for its cost
  fast       1 epoch   99.41 / 99.40 %  seconds     two convolutions
  tiny      60 epochs  99.51 / 99.51 %  minutes     5,714 parameters

outer-product is default with a head that looks sums up instead of adding; --unseen-pairs shows it.
Published systems, see published/README.md: concat-mlp, shared-trunk, shared-trunk-slow,
shared-trunk-fixed, concat-linear, concat-linear-fixed, added, added-fixed.

In the results, "both" counts pairs of image and addend with digit and sum correct; "consistent"
those where the predicted sum is the predicted digit plus the addend.
"""

import gc
import sys
import time
from functools import partial

import training  # noqa: F401 (first: sets what torch reads from the environment)

# isort: split
import torch

from dataset import MNISTSum, draw_unseen, load_data, split_indices
from model import build_model, kl_loss
from recipes import RECIPES
from training.checkpoint import restore, training_caveat
from training.console import exit_status, log
from training.device import move_model, pick_device
from training.flags import parse_args, saved_flags
from training.metrics import Predictions, epoch_line, epoch_row, result_line, train_metrics
from training.processes import close, connect, from_rank_0, replicate
from training.recipe import check_resumable, recipe_from_args
from training.run import Run

EVAL_BATCH = 500  # images, each evaluated with all ten addends
DRY_RUN_BATCHES, DRY_RUN_IMAGES = 3, 200  # at most


def train_epoch(model, optimizer, dataset, recipe, epoch, autocast, progress):
    """Train for one epoch; returns sums over the images of each step: float64 (S, 5).

    They are those of `TRAIN_METRICS`, and the number of images.
    """
    model.train()
    torch.manual_seed(dataset.seed + epoch)  # for dropout, if the network has it
    batches = dataset.batches(recipe.batch_size, recipe.drop_last)  # this process's share of each
    steps = []
    for step, indices in enumerate(batches, start=(epoch - 1) * len(batches)):
        image, digit, addend, total = dataset.batch(indices)  # (B, 1, 28, 28), (B,), (B, 10), (B,)
        lr = recipe.lr * recipe.schedule(step, recipe.epochs * len(batches))
        for group in optimizer.param_groups:
            group["lr"] = lr

        with autocast():
            digit_log_probs, sum_log_probs = model(image, addend)  # (B, 10), (B, 19)
        digit_loss = kl_loss(digit_log_probs, digit, recipe.label_smoothing)
        sum_loss = kl_loss(sum_log_probs, total, recipe.label_smoothing)
        loss = recipe.digit_weight * digit_loss + recipe.sum_weight * sum_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        digit_right = (digit_log_probs.argmax(dim=1) == digit).float().mean()
        sum_right = (sum_log_probs.argmax(dim=1) == total).float().mean()
        means = torch.stack([digit_loss, sum_loss, digit_right, sum_right, torch.ones_like(loss)])
        steps.append(len(digit) * means.detach())  # stays on the device: reading it would stall
        progress.update()
    return torch.stack(steps).cpu().double()


@torch.no_grad()
def evaluate(model, datasets, autocast, label_smoothing, unseen):
    """Predict each image with all ten addends; returns Predictions by split, as in `datasets`."""
    model.eval()
    predictions = {}
    for split, dataset in datasets.items():
        outputs = []
        for indices in torch.arange(len(dataset), device=dataset.device).split(EVAL_BATCH):
            with autocast():
                features = model.encoder(dataset.normalized(indices))  # (B, F), once per image
            outputs.append(model.classify_all(features))  # (B, 10, 10), (B, 10, 19)
        outputs = [torch.cat(parts).cpu() for parts in zip(*outputs, strict=True)]
        predictions[split] = Predictions(*outputs, dataset.digits.cpu(), label_smoothing, unseen)
    return predictions


@exit_status
def main(argv):
    """Parse the flags, start or resume a run, train, report; returns the exit status."""
    connect()
    args, checkpoint = parse_args(argv, __doc__, RECIPES)  # on resume, the flags of the run
    recipe = recipe_from_args(args, RECIPES)
    device, precision = pick_device(args.device, args.precision, args.deterministic)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=precision == "bf16")
    data = load_data(args.dataset, args.data_dir)
    unseen = draw_unseen(recipe.unseen_pairs, args.seed)
    train_set, eval_sets = make_datasets(data, recipe, unseen, args.seed, args.dry_run, device)
    torch.manual_seed(args.seed)
    model = move_model(build_model(recipe.encoder, recipe.head), device)
    optimizer = make_optimizer(model, recipe)

    flags = saved_flags(args, data.name, precision)
    history, curve = [], []  # rows of metrics.csv, and of loss.png
    if checkpoint:
        check_resumable(checkpoint, recipe)
        restore(checkpoint, model, None if args.eval_only else optimizer)
        history, curve = checkpoint["history"], checkpoint["curve"]
    evaluation = evaluate, model, eval_sets, autocast, recipe.label_smoothing, unseen
    predict = partial(from_rank_0, *evaluation)
    if args.eval_only:
        if not args.quiet:
            log(f"run      {args.resume}, epoch {len(history)}")
        for split, predictions in predict().items():
            log(result_line(split, predictions.metrics(), training_caveat(flags)))
        return 0

    epochs = range(len(history) + 1, recipe.epochs + 1)  # that are left
    steps = len(epochs) * len(train_set.batches(recipe.batch_size, recipe.drop_last))
    run = Run(args.output_dir, len(history), argv, flags, recipe, args.quiet)
    run.log_start(model, device, {"train": train_set, **eval_sets})
    with run.resumable(), run.progress_bar(steps) as progress:
        replica, predictions = replicate(model), None
        for epoch in epochs:
            train_set.set_epoch(epoch)
            start = time.perf_counter()
            metrics = train_epoch(replica, optimizer, train_set, recipe, epoch, autocast, progress)
            seconds = time.perf_counter() - start
            predictions = predict()
            trained, points = train_metrics(metrics, epoch)
            row = epoch_row(epoch, optimizer, trained, predictions, seconds)
            run.save_epoch(model, optimizer, history + [row], curve + points)
            history, curve = history + [row], curve + points
            run.log(epoch_line(row, recipe.epochs))
        predictions = predictions or predict()  # if no epoch was left
        run.save_results(predictions["test"], history)
        run.save_plots(predictions["test"], history, curve, eval_sets["test"], model.head)
    close()
    return run.status


def make_datasets(data, recipe, unseen, seed, dry_run, device):
    """The training set, and a dict of the sets to evaluate: "val" if there is one, and "test"."""
    count = len(data.train.data)
    train, val = split_indices(count, recipe.val_size, seed)
    test = torch.arange(len(data.test.data))
    if dry_run:
        train = train[: DRY_RUN_BATCHES * recipe.batch_size]
        val, test = val[:DRY_RUN_IMAGES], test[:DRY_RUN_IMAGES]
    make = partial(MNISTSum, mean=recipe.mean, std=recipe.std, seed=seed, device=device)
    eval_sets = {"val": make(data.train, "val", val)} if recipe.val_size else {}
    eval_sets["test"] = make(data.test, "test", test)
    affine = recipe.rotate, recipe.translate, recipe.scale, recipe.shear
    affine = affine if any(affine) else None
    options = {"addends": recipe.addends, "unseen": unseen, "affine": affine}
    return make(data.train, "train", train, **options), eval_sets


def make_optimizer(model, recipe):
    """The optimizer of a recipe; `train_epoch` sets its learning rate at each step."""
    parameters = dict(model.named_parameters())
    numbers = [parameters.pop(name) for name in [*parameters] if name.endswith("head.numbers")]
    groups = [{"params": [*parameters.values()], "weight_decay": recipe.weight_decay}]
    groups.append({"params": numbers, "weight_decay": recipe.numbers_decay})
    options = {"lr": recipe.lr, "fused": next(model.parameters()).device.type in ("cpu", "cuda")}
    if recipe.optimizer == "SGD":
        return torch.optim.SGD(groups, momentum=recipe.momentum, **options)
    betas = recipe.momentum, recipe.beta2
    return getattr(torch.optim, recipe.optimizer)(groups, betas=betas, **options)


if __name__ == "__main__":
    exit_code = main()
    gc.freeze()  # else Python spends over half a second at exit looking for garbage in torch
    sys.exit(exit_code)
