"""Losses and accuracies of both outputs, and the lines that report them."""

import time
from typing import NamedTuple

import torch
import torch.nn.functional as F

from training import distributed
from training.constants import NUM_DIGITS, NUM_SUMS

CURVE_POINTS = 20  # of the training loss, per epoch
MISTAKE_COLUMNS = ("index", "label", "prediction", "confidence", "disputed")  # of mistakes.csv
CLASSES = {"digit": NUM_DIGITS, "sum": NUM_SUMS}
# Loss: without label smoothing. Objective: with it, less its minimum.
TRAIN_METRICS = [
    f"{output}_{name}" for name in ("loss", "objective", "accuracy") for output in CLASSES
]


class Predictions(NamedTuple):
    """The predictions for N images, each with all ten addends; on the CPU."""

    digit_log_probs: torch.Tensor  # float32 (N, 10 addends, 10)
    sum_log_probs: torch.Tensor  # float32 (N, 10 addends, 19)
    digits: torch.Tensor  # int64 (N,), the labels
    seconds: float = 0.0  # how long it took to make them

    @classmethod
    def merged(cls, outputs, digits, start_time):
        """Merge the outputs of `classify_all` for the batches of all processes, on each of them."""
        batches = zip(*outputs, strict=True)
        merged = [distributed.merge_rows(parts, len(digits)).cpu() for parts in batches]
        return cls(*merged, digits.cpu(), time.perf_counter() - start_time)

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

    def metrics(self, label_smoothing=0.0):
        """Metrics over all pairs. Consistent: the predicted sum is the predicted digit + addend."""
        values = dict.fromkeys(TRAIN_METRICS)  # the order of the columns of metrics.csv
        digit, total = self.predicted()
        outputs = zip(CLASSES.items(), self[:2], self.targets(), (digit, total), strict=True)
        for (output, classes), log_probs, target, predicted in outputs:
            objective = F.cross_entropy(log_probs.mT, target, label_smoothing=label_smoothing)
            values[f"{output}_loss"] = -log_probs.gather(2, target[:, :, None])
            values[f"{output}_objective"] = objective - lowest_loss(label_smoothing, classes)
            values[f"{output}_accuracy"] = predicted == target
        values["both_accuracy"] = values["digit_accuracy"] & values["sum_accuracy"]
        values["consistency"] = total == digit + torch.arange(NUM_DIGITS)
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
    """The minimum of a loss with label smoothing, in nats: the entropy of its target."""
    target = (1 - label_smoothing) * torch.eye(classes)[0] + label_smoothing / classes
    return torch.special.entr(target).sum().item()


@torch.no_grad()
def step_metrics(*outputs):
    """Sums over the images of a training step: (7,), TRAIN_METRICS and the number of images.

    Takes a triple for the digit and one for the sum: log-probabilities (B, C), targets (B,), what
    is minimized. The sums stay on the device: reading them at each step would stall a GPU.
    """
    values = [F.nll_loss(log_probs, target) for log_probs, target, _ in outputs]
    values += [objective for _, _, objective in outputs]
    values += [(log_probs.argmax(dim=1) == y).float().mean() for log_probs, y, _ in outputs]
    values.append(torch.ones_like(values[0]))
    return len(outputs[0][0]) * torch.stack(values)


def epoch_metrics(steps, epoch, label_smoothing):
    """Means of an epoch, and points of its loss curve: (epochs trained, digit, sum).

    steps: float64 (S, 7), a row of `step_metrics` for each step. The curve is of the objective.
    """

    def means(part):  # over images, not over batches, since the last batch may be smaller
        values = (part[:, :-1].sum(dim=0) / part[:, -1].sum()).tolist()
        row = dict(zip(TRAIN_METRICS, values, strict=True))
        for output, classes in CLASSES.items():
            row[f"{output}_objective"] -= lowest_loss(label_smoothing, classes)
        return row

    curve, done = [], 0
    for part in steps.tensor_split(min(CURVE_POINTS, len(steps))):
        done += len(part)
        row = means(part)
        curve.append((epoch - 1 + done / len(steps), row["digit_objective"], row["sum_objective"]))
    return means(steps), curve


def epoch_line(row, epochs):
    """The line that reports an epoch, from its row of metrics.csv."""
    splits = [split for split in ("train", "val", "test") if f"{split}_seconds" in row]
    text = f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  loss digit/sum"
    for split in splits:
        digit, total = (row[f"{split}_{output}_objective"] for output in CLASSES)
        text += f" {split} {digit:.4f}/{total:.4f}"
    for split in splits[1:]:
        text += f"  {split}"
        for name in ("digit", "sum", "both"):
            text += f" {name} {100 * row[f'{split}_{name}_accuracy']:.2f} %"
    return f"{text}  {row['train_seconds']:.1f} s"


def result_line(split, metrics, note, train_seconds=None):
    """The line that reports `Predictions.metrics`, with the time and a warning if any."""
    percent = {name: f"{100 * value:.2f} %" for name, value in metrics.items()}
    text = f"result   {split}: digit {percent['digit_accuracy']}, sum {percent['sum_accuracy']}, "
    text += f"both {percent['both_accuracy']}, consistent {percent['consistency']}"
    text += f"; {train_seconds:.1f} s of training" if train_seconds is not None else ""
    return f"{text} ({note})" if note else text
