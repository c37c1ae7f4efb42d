"""Losses and accuracies of both outputs, and the lines that report them.

A loss is the cross-entropy with label smoothing minus its minimum, in nats: the KL divergence from
the smoothed label to the prediction, which is 0 if they are equal.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dataset import NUM_DIGITS, NUM_SUMS
from model import probabilities
from training.console import UserError
from training.processes import all_reduce_sum, merge_rows

# Test images with a disputed label (Northcutt et al. 2021, arXiv 2103.14749).
DISPUTED = {947, 1621, 1901, 2130, 2462, 2597, 2654, 3520, 3558, 5937, 6651, 6783, 8527, 9679, 9729}
CURVE_POINTS = 20  # of the training loss, per epoch
MISTAKE_COLUMNS = ("index", "label", "prediction", "confidence", "disputed")  # of mistakes.csv
CLASSES = {"digit": NUM_DIGITS, "sum": NUM_SUMS}
TRAIN_METRICS = [f"{output}_{name}" for name in ("loss", "accuracy") for output in CLASSES]
EVAL_METRICS = [*TRAIN_METRICS, "both_accuracy", "consistency"]
UNSEEN_METRICS = ["seen_sum_accuracy", "unseen_sum_accuracy"]


class Predictions(NamedTuple):
    """The predictions for N images, each with all ten addends; on the CPU."""

    digit_log_probs: torch.Tensor  # float32 (N, 10 addends, 10)
    sum_log_probs: torch.Tensor  # float32 (N, 10 addends, 19)
    digits: torch.Tensor  # int64 (N,), the labels
    label_smoothing: float = 0.0  # of the training
    unseen: torch.Tensor | None = None  # bool (10, 10), the pairs that training did not show

    @classmethod
    def merged(cls, outputs, digits, *options):
        """Merge the outputs of `classify_all` for the batches of all processes, on each of them."""
        batches = zip(*outputs, strict=True)
        return cls(*(merge_rows(parts, len(digits)).cpu() for parts in batches), digits, *options)

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
        """EVAL_METRICS, and UNSEEN_METRICS, over all pairs.

        Consistent: the predicted sum is the predicted digit plus the addend.
        """
        values = dict.fromkeys(EVAL_METRICS)  # their order
        digit, total = self.predicted()
        outputs = zip(CLASSES.items(), self[:2], self.targets(), (digit, total), strict=True)
        for (output, classes), log_probs, target, predicted in outputs:
            loss = F.cross_entropy(log_probs.mT, target, label_smoothing=self.label_smoothing)
            values[f"{output}_loss"] = loss - lowest_loss(self.label_smoothing, classes)
            values[f"{output}_accuracy"] = predicted == target
        values["both_accuracy"] = values["digit_accuracy"] & values["sum_accuracy"]
        values["consistency"] = total == digit + torch.arange(NUM_DIGITS)
        if self.unseen is not None:
            correct, unseen = values["sum_accuracy"], self.unseen[self.digits]  # (N, 10)
            values |= zip(UNSEEN_METRICS, (correct[~unseen], correct[unseen]), strict=True)
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

    def mistakes(self, disputed):
        """Misread images, most confident first, as MISTAKE_COLUMNS; disputed: a set of indices."""
        rows = zip(self.digits.tolist(), *(v.tolist() for v in self.image_digits()), strict=True)
        mistakes = [[i, *row, i in disputed] for i, row in enumerate(rows) if row[0] != row[1]]
        return sorted(mistakes, key=lambda mistake: -mistake[3])

    def wrong_sums(self):
        """Pairs (image, addend) with only the sum wrong, most confident first: int64 (M, 2)."""
        (digit, total), (predicted_digit, predicted_sum) = self.targets(), self.predicted()
        wrong = (predicted_digit == digit) & (predicted_sum != total)  # (N, 10)
        order = self.sum_log_probs.amax(dim=2)[wrong].argsort(descending=True, stable=True)
        return wrong.nonzero()[order]


def lowest_loss(label_smoothing, classes):
    """The minimum of the cross-entropy with label smoothing, in nats: the entropy of its target."""
    target = (1 - label_smoothing) * torch.eye(classes)[0] + label_smoothing / classes
    return torch.special.entr(target).sum().item()


@torch.no_grad()
def step_metrics(*outputs):
    """Sums over the images of a training step: (5,), TRAIN_METRICS and the number of images.

    Takes a triple for the digit and one for the sum: log-probabilities (B, C), targets (B,), the
    loss. The sums stay on the device: reading them at each step would stall a GPU.
    """
    values = [loss for *_, loss in outputs]
    values += [(log_probs.argmax(dim=1) == y).float().mean() for log_probs, y, _ in outputs]
    values.append(torch.ones_like(values[0]))
    return len(outputs[0][0]) * torch.stack(values)


def train_metrics(steps, epoch, label_smoothing):
    """TRAIN_METRICS of an epoch, and of parts of it with the epochs trained until then: dicts.

    steps: float64 (S, 5), a row of `step_metrics` for each step of this process.
    """
    steps = all_reduce_sum(steps)
    lowest = [lowest_loss(label_smoothing, classes) for classes in CLASSES.values()]
    lowest = torch.tensor([*lowest, 0, 0], dtype=steps.dtype)

    def means(part):  # over images, not over batches, since the last batch may be smaller
        values = (part[:, :-1].sum(dim=0) / part[:, -1].sum() - lowest).tolist()
        return {f"train_{name}": value for name, value in zip(TRAIN_METRICS, values, strict=True)}

    curve, done = [], 0
    for part in steps.tensor_split(min(CURVE_POINTS, len(steps))):
        done += len(part)
        curve.append({"epoch": epoch - 1 + done / len(steps)} | means(part))
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
    return " ".join(f"{text} {100 * v:.2f} %" for text, v in values.items() if v is not None)


def result_line(split, metrics, note, train_seconds=None):
    """The line that reports `Predictions.metrics`, with the time and a warning if any."""
    text = (
        f"result   {split}: {accuracies(metrics)} consistent {100 * metrics['consistency']:.2f} %"
    )
    text += f"; {train_seconds:.1f} s of training" if train_seconds is not None else ""
    return f"{text} ({note})" if note else text
