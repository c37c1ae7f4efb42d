"""Train a two-headed network on MNIST: image and random addend in, digit and sum out.

python train.py                              # the default recipe
python train.py --recipe fast                # one epoch, in seconds
python train.py --epochs 20 --device cuda    # on a GPU; falls back to the CPU
python train.py --resume                     # continue the latest unfinished run

On several GPUs: torchrun --standalone --nproc-per-node 2 train.py
Checkpoints, metrics and plots are written to a new directory below runs/.
"""

import sys
import time
from functools import partial

import torch
import torch.nn.functional as F

from dataset import MNISTSum, load_data, split_indices
from model import build_model, count_parameters
from recipes import RECIPES, recipe_from_args
from support import distributed, metrics, rundir
from support.args import TRANSIENT, check_changes, parse_train_args
from support.console import exit_status, log, progress_bar, warn
from support.constants import NUM_DIGITS, NUM_SUMS
from support.device import move_model, pick_device, pick_precision
from support.errors import UserError
from support.signals import NEVER, stop_on_signals

EVAL_BATCH = 500  # images, each evaluated with all ten addends
PROGRESS_STEPS = 20  # steps between two updates of the losses in the progress bar
DRY_RUN_BATCHES, DRY_RUN_IMAGES = 3, 200  # at most


def train_epoch(model, optimizer, dataset, recipe, autocast, stop, progress):
    """Train for one epoch. Raises Stopped if a signal has requested it.

    Returns a row per step, float64 (S, 5) on the CPU: digit loss, sum loss, correct digits, correct
    sums, images. They are copied once, at the end: reading them at each step would stall a GPU.
    """
    model.train()
    rank, world_size = distributed.rank(), distributed.world_size()
    steps_per_epoch = dataset.num_batches(recipe.batch_size, recipe.drop_last)
    first_step, total_steps = (dataset.epoch - 1) * steps_per_epoch, recipe.epochs * steps_per_epoch
    batches = dataset.batches(recipe.batch_size, recipe.drop_last, rank, world_size)
    rows = []
    for step, (batch_size, batch) in enumerate(batches, start=first_step):
        stop.check()
        lr = recipe.lr * recipe.schedule(step, total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr

        image, digit, addend, total = batch  # (B, 1, 28, 28), (B,), (B, 10), (B,)
        with autocast():
            digit_log_probs, sum_log_probs = model(image, addend)  # (B, 10), (B, 19)
        # Under torchrun a process has only its share of the batch. The losses of the shares, each
        # divided by the size of the whole batch, add up to the mean loss of the batch.
        digit_loss = F.nll_loss(digit_log_probs, digit, reduction="sum") / batch_size
        sum_loss = F.nll_loss(sum_log_probs, total, reduction="sum") / batch_size
        loss = recipe.loss_weight * (
            with_label_smoothing(digit_loss, digit_log_probs, batch_size, recipe.label_smoothing)
            + with_label_smoothing(sum_loss, sum_log_probs, batch_size, recipe.label_smoothing)
        )
        optimizer.zero_grad()
        (world_size * loss).backward()  # DDP averages the gradients, which should be summed
        optimizer.step()

        correct_digits = (digit_log_probs.argmax(dim=1) == digit).sum()
        correct_sums = (sum_log_probs.argmax(dim=1) == total).sum()
        images = torch.full_like(digit_loss, len(digit))
        row = torch.stack([digit_loss, sum_loss, correct_digits, correct_sums, images]).detach()
        rows.append(row)
        progress.update()
        if (step + 1) % PROGRESS_STEPS == 0 and not progress.disable:
            losses = world_size * row[:2]  # estimated from this rank's share
            progress.set_postfix(digit=f"{losses[0]:.3f}", sum=f"{losses[1]:.3f}")
    distributed.broadcast_buffers(model)
    return distributed.all_reduce_sum(torch.stack(rows)).cpu().double()


def with_label_smoothing(loss, log_probs, batch_size, smoothing):
    """Add label smoothing to an NLL `loss`, as in `cross_entropy`; `log_probs` are (B, classes)."""
    uniform = -log_probs.sum() / (batch_size * log_probs.shape[1])
    return (1 - smoothing) * loss + smoothing * uniform


@torch.no_grad()
def evaluate(model, dataset, autocast, stop=NEVER):
    """Predict each image with all ten addends; returns `metrics.Predictions`, equal on all ranks.

    The images are divided among the processes, and each image is encoded once.
    """
    model.eval()
    count, device = len(dataset), dataset.device
    addends = torch.eye(NUM_DIGITS, device=device)
    log_probs = torch.zeros(count, NUM_DIGITS, NUM_DIGITS + NUM_SUMS, device=device)  # (N, 10, 29)
    share = torch.arange(distributed.rank(), count, distributed.world_size(), device=device)
    for indices in share.split(EVAL_BATCH):
        stop.check()
        with autocast():
            features = model.encoder(dataset.normalized(indices))  # (B, F)
        features = features.repeat_interleave(NUM_DIGITS, dim=0)  # (10 B, F)
        outputs = model.classify(features, addends.repeat(len(indices), 1))
        log_probs[indices] = torch.cat(outputs, dim=1).unflatten(0, (-1, NUM_DIGITS))
    log_probs = distributed.all_reduce_sum(log_probs).cpu()  # the other ranks' rows were 0
    digit_log_probs, sum_log_probs = log_probs.split([NUM_DIGITS, NUM_SUMS], dim=2)
    return metrics.Predictions(digit_log_probs, sum_log_probs, dataset.digits.cpu())


@exit_status
def main(argv):
    """Parse the flags, start or resume a run, train, report; returns the exit status."""
    start_time = time.perf_counter()
    args = parse_train_args(argv, __doc__, RECIPES)
    distributed.init_process_group()
    rank = distributed.rank()

    checkpoint = None
    if args.resume is not None:
        path = distributed.all_gather(rundir.checkpoint_to_resume(args))[0]
        checkpoint = rundir.load_checkpoint(path)
        args = parse_train_args(argv, __doc__, RECIPES, checkpoint["flags"])
    recipe = recipe_from_args(args)

    device, reason = pick_device(args.device, args.deterministic)
    args.precision = pick_precision(args.precision, device)
    bf16 = args.precision == "bf16"
    autocast = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=bf16)

    source = load_data(args.dataset, args.data_dir)
    distributed.require_equal(source.name, "only some of the processes have MNIST")
    args.dataset = source.name
    train_set, eval_sets = make_datasets(source, recipe, args, device)

    torch.manual_seed(args.seed)
    model = move_model(build_model(recipe.encoder, recipe.head), device)
    optimizer = make_optimizer(model, recipe)
    check_batch_size(recipe, len(train_set), model)
    steps = train_set.num_batches(recipe.batch_size, recipe.drop_last)  # per epoch

    flags = {name: value for name, value in vars(args).items() if name not in TRANSIENT}
    settings = {"flags": flags, "recipe": recipe.as_plain()}
    resume_flags = check_changes(checkpoint, args.eval_only, **settings) if checkpoint else []
    if args.eval_only:
        rundir.restore(checkpoint, model)
        distributed.finish_setup(device)
        for split, dataset in eval_sets.items():
            split_metrics = evaluate(model, dataset, autocast).metrics()
            log(metrics.result_line(split, split_metrics, checkpoint["info"]["note"]))
        return 0

    distributed.all_gather("ready")  # if a process has failed, no directory is created
    if checkpoint:
        directory = path.parent
    else:
        created = rundir.create_directory(args) if rank == 0 else None
        directory = distributed.all_gather(created)[0]  # that of rank 0
    run_dir = rundir.RunDir(directory, rank == 0, resume_flags)
    with run_dir.open(new=not checkpoint), stop_on_signals() as stop:
        history, curve, calls = [], [], []  # a row per epoch, the training loss, the invocations
        if checkpoint:
            checkpoint = rundir.load_checkpoint(path)  # again: it may have changed before the lock
            rundir.restore(checkpoint, model, optimizer)
            history, curve, calls = (checkpoint[name] for name in ("history", "curve", "calls"))
            start_time -= checkpoint["seconds"]  # total_seconds includes the earlier calls
            run_dir.save_derived(checkpoint)
        info, calls = rundir.run_info(
            argv, args, recipe, device, source.note, count_parameters(model), history, calls
        )
        if not args.quiet and len(history) < recipe.epochs:
            rundir.log_header(info, reason, recipe, {"train": train_set, **eval_sets}, run_dir)
        distributed.finish_setup(device)
        parallel_model = distributed.replicate(model)

        predictions = {}
        with stop.interruptible():
            for epoch in range(len(history) + 1, recipe.epochs + 1):
                train_set.set_epoch(epoch, augment=epoch <= recipe.epochs - recipe.clean_epochs)
                start = time.perf_counter()
                with progress_bar(steps, f"epoch {epoch}/{recipe.epochs}", args.quiet) as progress:
                    step_results = train_epoch(
                        parallel_model, optimizer, train_set, recipe, autocast, stop, progress
                    )
                seconds = {"train": time.perf_counter() - start}
                train_metrics, points = metrics.epoch_metrics(step_results, epoch)
                # "test" is last: if interrupted, predictions["test"] is that of a saved epoch.
                for split, dataset in eval_sets.items():
                    start = time.perf_counter()
                    predictions[split] = evaluate(model, dataset, autocast, stop)
                    seconds[split] = time.perf_counter() - start
                lr = optimizer.param_groups[0]["lr"]
                row = metrics.epoch_row(epoch, lr, train_metrics, predictions, seconds)
                history.append(row)
                curve += points
                checkpoint = {
                    **settings,
                    "info": info,
                    "calls": calls,
                    "history": history,
                    "curve": curve,
                    "network": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "seconds": time.perf_counter() - start_time,
                }
                run_dir.save_epoch(checkpoint)
                if not args.quiet:
                    log(metrics.epoch_line(row, recipe.epochs))
            if not predictions:
                if not args.quiet:
                    log(f"nothing left to train after epoch {len(history)}/{recipe.epochs}")
                predictions["test"] = evaluate(model, eval_sets["test"], autocast, stop)

        interrupted = stop.signum is not None
        if interrupted:
            distributed.abort()
            unsaved = "" if history else "; nothing was saved"
            warn(f"interrupted after epoch {len(history)}/{recipe.epochs}{unsaved}")
        else:
            test_metrics = predictions["test"].metrics()
            train_seconds = sum(row["train_seconds"] for row in history)
            if not run_dir.has("results.json"):  # else this call did not train
                results = info | {"test": test_metrics, "train_seconds": round(train_seconds, 3)}
                results["total_seconds"] = round(time.perf_counter() - start_time, 3)
                run_dir.save_json("results.json", results)
            log(metrics.result_line("test", test_metrics, info["note"], train_seconds))
        if "test" in predictions and rank == 0:
            from support import plots  # not at the top: importing matplotlib takes half a second

            test_set, title = eval_sets["test"], metrics.run_title(info, history[-1])
            shown = test_set.images.cpu(), test_set.addends.cpu(), source.disputed
            figures = plots.run_figures(
                history, curve, predictions["test"], *shown, title, recipe.label_smoothing
            )
            for name, figure in figures.items():
                run_dir.write(name, plots.as_png(figure))
    if interrupted and history:
        log(f"resume   {run_dir.resume_command()}")
    elif not interrupted and not args.quiet:
        log(f"saved    {run_dir.path}")
    return 0 if stop.signum is None else 128 + stop.signum  # also if stopped while plotting


def make_datasets(source, recipe, args, device):
    """The training set, and a dict of the sets to evaluate: "val" if there is one, and "test"."""
    count = len(source.train.data)
    if recipe.val_size >= count:
        raise UserError(f"--val-size {recipe.val_size} leaves no training images", status=2)
    train, val = split_indices(count, recipe.val_size, args.seed)
    test = torch.arange(len(source.test.data))
    if args.dry_run:
        train = train[: DRY_RUN_BATCHES * recipe.batch_size]
        val, test = val[:DRY_RUN_IMAGES], test[:DRY_RUN_IMAGES]
    make = partial(MNISTSum, mean=recipe.mean, std=recipe.std, seed=args.seed, device=device)
    eval_sets = {"val": make(source.train, "val", val)} if recipe.val_size else {}
    eval_sets["test"] = make(source.test, "test", test)
    options = {"addends": recipe.addends, "affine": recipe.affine}
    return make(source.train, "train", train, **options), eval_sets


def make_optimizer(model, recipe):
    """The optimizer of a recipe; `train_epoch` sets its learning rate at each step."""
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    options = {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "fused": fused}
    options |= recipe.optimizer_options
    return getattr(torch.optim, recipe.optimizer)(model.parameters(), **options)


def check_batch_size(recipe, num_images, model):
    """Raise UserError if every batch is dropped, or one is too small for batch normalization."""
    size, world_size = f"--batch-size {recipe.batch_size}", distributed.world_size()
    if recipe.drop_last and num_images < recipe.batch_size:
        raise UserError(f"{size} exceeds the {num_images} training images", status=2)
    last = 0 if recipe.drop_last else num_images % recipe.batch_size
    smallest = (last or recipe.batch_size) // world_size  # share of a process
    # BatchNorm2d also averages over pixels, but BatchNorm1d cannot normalize a single image.
    if smallest < 2 and any(isinstance(layer, torch.nn.BatchNorm1d) for layer in model.modules()):
        raise UserError(f"{size} leaves a process fewer than 2 images for batch normalization", 2)


if __name__ == "__main__":
    sys.exit(main())
