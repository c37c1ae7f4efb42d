"""Losses and accuracies of both outputs, and the lines that report them."""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dataset import NUM_DIGITS, NUM_SUMS
from model import kl_loss, probabilities
from training.console import UserError
from training.processes import world_size

CURVE_POINTS = 20  # of the training loss, per epoch
TRAIN_METRICS = "digit_loss", "sum_loss", "digit_accuracy", "sum_accuracy"


class Predictions(NamedTuple):
    """The predictions for N images, each with all ten addends; on the CPU."""

    digit_log_probs: torch.Tensor  # float32 (N, 10 addends, 10)
    sum_log_probs: torch.Tensor  # float32 (N, 10 addends, 19)
    digits: torch.Tensor  # int64 (N,), the labels
    label_smoothing: float  # of the training
    unseen: torch.Tensor | None  # bool (10, 10), the pairs that training did not show

    def targets(self):
        """True digits and sums of all (image, addend) pairs: int64 (N, 10) each."""
        digit = self.digits[:, None].expand(-1, NUM_DIGITS)
        return digit, digit + torch.arange(NUM_DIGITS)

    def predicted(self):
        """Predicted digits and sums for all pairs: int64 (N, 10) each."""
        return self.digit_log_probs.argmax(dim=2), self.sum_log_probs.argmax(dim=2)

    def image_digits(self):
        """Predicted digit of each image and its probability, averaged over the addends: (N,)."""
        probs = probabilities(self.digit_log_probs, self.label_smoothing).mean(dim=1)
        confidence, digit = probs.max(dim=1)
        return digit, confidence

    def metrics(self):
        """Losses and accuracies over all pairs, a dict.

        Consistent: the predicted sum is the predicted digit plus the addend.
        """
        true_digit, true_sum = self.targets()
        digit, total = self.predicted()
        digit_right, sum_right = digit == true_digit, total == true_sum  # (N, 10)
        values = {
            "digit_loss": kl_loss(self.digit_log_probs, true_digit, self.label_smoothing),
            "sum_loss": kl_loss(self.sum_log_probs, true_sum, self.label_smoothing),
            "digit_accuracy": digit_right,
            "sum_accuracy": sum_right,
            "both_accuracy": digit_right & sum_right,
            "consistency": total == digit + torch.arange(NUM_DIGITS),
        }
        if self.unseen is not None:
            unseen = self.unseen[self.digits]  # (N, 10)
            values["seen_sum_accuracy"] = sum_right[~unseen]
            values["unseen_sum_accuracy"] = sum_right[unseen]
        return {name: value.double().mean().item() for name, value in values.items()}

    def confusion(self):
        """Confusion matrices (true, predicted): images (10, 10) and, for sums, pairs (19, 19)."""
        digits = NUM_DIGITS * self.digits + self.image_digits()[0]
        sums = NUM_SUMS * self.targets()[1] + self.predicted()[1]
        cells = (digits, NUM_DIGITS), (sums.flatten(), NUM_SUMS)  # true class x classes + predicted
        return [cell.bincount(minlength=n * n).view(n, n) for cell, n in cells]

    def addition(self):
        """Shares of the predicted sums for each true digit and addend: (10, 10, 19), or NaN."""
        sums = F.one_hot(self.predicted()[1], NUM_SUMS).double()  # (N, 10, 19)
        counts = sums.new_zeros(NUM_DIGITS, *sums.shape[1:]).index_add(0, self.digits, sums)
        return counts / counts.sum(dim=2, keepdim=True)

    def mistakes(self):
        """Misread images, most confident first: rows (index, label, prediction, confidence)."""
        digit, confidence = self.image_digits()
        columns = torch.arange(len(digit)), self.digits, digit, confidence
        rows = zip(*(column[digit != self.digits].tolist() for column in columns), strict=True)
        return sorted(rows, key=lambda row: -row[3])


def train_metrics(steps, epoch):
    """TRAIN_METRICS of an epoch, and of parts of it with the epochs trained until then: dicts.

    steps: what `train_epoch` returns in this process.
    """
    if world_size() > 1:
        dist.all_reduce(steps)  # sums, in place

    def means(part):  # over images, not over batches, since the last batch may be smaller
        values = (part[:, :-1].sum(dim=0) / part[:, -1].sum()).tolist()
        return {f"train_{name}": value for name, value in zip(TRAIN_METRICS, values, strict=True)}

    parts = steps.tensor_split(min(CURVE_POINTS, len(steps)))
    ends = [epoch - 1 + (i + 1) / len(parts) for i in range(len(parts))]
    curve = [{"epoch": end} | means(part) for end, part in zip(ends, parts, strict=True)]
    return means(steps), curve


def epoch_row(epoch, optimizer, trained, predictions, seconds):
    """The row of metrics.csv for an epoch, a dict, from its `train_metrics` and Predictions.

    Raises UserError if a value is not finite.
    """
    row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"]} | trained
    for split, part in predictions.items():
        row |= {f"{split}_{name}": value for name, value in part.metrics().items()}
    if not all(map(math.isfinite, row.values())):
        message = f"the loss of epoch {epoch} is NaN or infinite"
        raise UserError(f"{message}: start a new run with a smaller --lr")
    return row | {"train_seconds": round(seconds, 3)}


def epoch_line(row, epochs):
    """The line that reports an epoch, from its row of metrics.csv."""
    splits = [split for split in ("train", "val", "test") if f"{split}_digit_loss" in row]
    text = f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  loss digit/sum"
    for split in splits:
        text += f" {split} {row[f'{split}_digit_loss']:.4f}/{row[f'{split}_sum_loss']:.4f}"
    for split in splits[1:]:
        text += f"  {split} {accuracies(row, f'{split}_')}"
    return f"{text}  {row['train_seconds']:.1f} s"


def accuracies(metrics, prefix=""):
    """Text with the accuracies in a dict of metrics whose names have a prefix."""
    names = {"digit": "digit", "sum": "sum", "both": "both"}
    names |= {"seen pairs": "seen_sum", "unseen pairs": "unseen_sum"}
    values = {text: metrics.get(f"{prefix}{name}_accuracy") for text, name in names.items()}
    return ", ".join(f"{text} {100 * v:.2f} %" for text, v in values.items() if v is not None)


def result_line(split, metrics, note):
    """The line that reports `Predictions.metrics`, with a warning if any."""
    consistent = f"consistent {100 * metrics['consistency']:.2f} %"
    text = f"result   {split}: {accuracies(metrics)}, {consistent}"
    return f"{text} ({note})" if note else text
