"""Losses and accuracies of both outputs, and the lines that report them."""

import math
from typing import NamedTuple

import torch

from support.constants import NUM_DIGITS, NUM_SUMS
from support.errors import UserError

CURVE_POINTS = 20  # of the training loss, per epoch


class Predictions(NamedTuple):
    """The predictions for N images, each with all ten addends; on the CPU."""

    digit_log_probs: torch.Tensor  # float32 (N, 10 addends, 10)
    sum_log_probs: torch.Tensor  # float32 (N, 10 addends, 19)
    digits: torch.Tensor  # int64 (N,), the labels

    def targets(self):
        """True digits and sums of all (image, addend) pairs: int64 (N, 10) each."""
        digit = self.digits[:, None].expand(-1, NUM_DIGITS)
        return digit, digit + torch.arange(NUM_DIGITS)

    def predicted(self):
        """Predicted digits and sums for all pairs: int64 (N, 10) each."""
        return self.digit_log_probs.argmax(dim=2), self.sum_log_probs.argmax(dim=2)

    def image_digits(self):
        """Predicted digit of each image and its probability, averaged over the addends: (N,)."""
        probability, digit = self.digit_log_probs.exp().mean(dim=1).max(dim=1)
        return digit, probability

    def metrics(self):
        """Metrics over all pairs. Consistent: the predicted sum is the predicted digit + addend."""
        (digit, total), (predicted_digit, predicted_sum) = self.targets(), self.predicted()
        correct_digit, correct_sum = predicted_digit == digit, predicted_sum == total
        values = {
            "digit_loss": -self.digit_log_probs.gather(2, digit[:, :, None]),
            "sum_loss": -self.sum_log_probs.gather(2, total[:, :, None]),
            "digit_accuracy": correct_digit,
            "sum_accuracy": correct_sum,
            "both_accuracy": correct_digit & correct_sum,
            "consistency": predicted_sum == predicted_digit + torch.arange(NUM_DIGITS),
        }
        return {name: value.double().mean().item() for name, value in values.items()}

    def confusion(self):
        """Confusion matrices (true, predicted): images (10, 10) and, for sums, pairs (19, 19)."""
        digits = NUM_DIGITS * self.digits + self.image_digits()[0]
        sums = NUM_SUMS * self.targets()[1] + self.predicted()[1]
        cells = (digits, NUM_DIGITS), (sums.flatten(), NUM_SUMS)  # true class x classes + predicted
        return [cell.bincount(minlength=n * n).view(n, n) for cell, n in cells]

    def most_confident_errors(self, count):
        """Indices, predicted digits and probabilities of misread images, most confident first."""
        digit, probability = self.image_digits()
        wrong = (digit != self.digits).nonzero().flatten()
        wrong = wrong[probability[wrong].argsort(descending=True, stable=True)][:count]
        return wrong, digit[wrong], probability[wrong]


def epoch_metrics(step_results, epoch):
    """Means of an epoch, and points of its loss curve: (epochs trained, digit loss, sum loss).

    step_results: float64 (S, 5), from `train_epoch`.
    """

    def mean_losses(part):  # over images, not over batches, since the last batch may be smaller
        images = part[:, 4]
        return (images @ part[:, :2] / images.sum()).tolist()

    correct_digits, correct_sums, images = step_results[:, 2:].sum(dim=0).tolist()
    metrics = dict(zip(("digit_loss", "sum_loss"), mean_losses(step_results), strict=True))
    metrics |= {"digit_accuracy": correct_digits / images, "sum_accuracy": correct_sums / images}
    curve, done = [], 0
    for part in step_results.tensor_split(min(CURVE_POINTS, len(step_results))):
        done += len(part)
        curve.append((epoch - 1 + done / len(step_results), *mean_losses(part)))
    return metrics, curve


def epoch_row(epoch, lr, train_metrics, predictions, seconds):
    """A row of metrics.csv, from dicts by split. Raises UserError if a loss is NaN or infinite."""
    metrics = {"train": train_metrics} | {s: part.metrics() for s, part in predictions.items()}
    row = {"epoch": epoch, "lr": lr}
    for split, values in metrics.items():
        row |= {f"{split}_{k}": v for k, v in values.items() if k != "consistency"}
    if not all(map(math.isfinite, row.values())):
        message = f"the loss of epoch {epoch} is NaN or infinite; try a smaller --lr"
        raise UserError(message, shared=True)
    return row | {f"{split}_seconds": round(value, 3) for split, value in seconds.items()}


def epoch_line(row, epochs):
    """The line that reports an epoch, from its row of metrics.csv."""
    splits = [split for split in ("train", "val", "test") if f"{split}_seconds" in row]
    text = f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  loss digit/sum"
    for split in splits:
        text += f" {split} {row[f'{split}_digit_loss']:.4f}/{row[f'{split}_sum_loss']:.4f}"
    for split in splits[1:]:
        text += f"  {split}"
        for name in ("digit", "sum", "both"):
            text += f" {name} {100 * row[f'{split}_{name}_accuracy']:.2f} %"
    return f"{text}  {row['train_seconds']:.1f} s"


def run_title(info, row):
    """A line on a run for its plots: recipe, seed, epoch, accuracies, and a warning if any."""
    digit, total = (100 * row[f"test_{output}_accuracy"] for output in ("digit", "sum"))
    text = f"{info['recipe']}, seed {info['seed']}, epoch {row['epoch']} of {info['epochs']}: "
    text += f"{digit:.2f} % digit, {total:.2f} % sum"
    return f"{text} ({info['note']})" if info["note"] else text


def result_line(split, metrics, note, train_seconds=None):
    """The line that reports `Predictions.metrics`, with the time and a warning if any."""
    percent = {name: f"{100 * value:.2f} %" for name, value in metrics.items()}
    text = f"result   {split}: digit {percent['digit_accuracy']}, sum {percent['sum_accuracy']}, "
    text += f"both {percent['both_accuracy']}, consistent {percent['consistency']}"
    text += f"; {train_seconds:.1f} s of training" if train_seconds is not None else ""
    return f"{text} ({note})" if note else text
