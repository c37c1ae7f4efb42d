"""The figures: what the heads gave, in losses and in shares that are right."""

from typing import NamedTuple

import torch

from dataset import NUM_DIGITS, NUM_SUMS

CURVE_POINTS = 20  # of the training loss, an epoch


BROKEN = (
    "the loss became NaN or infinite {}; "
    "try a smaller --lr (of this epoch nothing is kept, of the earlier ones all)"
)


class TrainingError(Exception):
    """Training can't go on; the message says what to do."""


def summarise(record, epoch):
    """The record of an epoch's steps as a row of figures, and as points of the loss curve.

    Args:
        record: float64 (steps, 5), of each step the mean losses of the digit and of the sum, how
            many digits and how many sums were right, and how many images there were.
        epoch: from 1.

    Returns:
        a dict of the epoch's figures, and a list of (position in epochs, digit loss, sum loss).

    Raises:
        TrainingError: a loss is NaN or infinite.
    """
    broken = ~record[:, :2].isfinite().all(dim=1)
    if broken.any():
        step = int(broken.nonzero()[0]) + 1
        raise TrainingError(BROKEN.format(f"at step {step} of {len(record)} in epoch {epoch}"))

    def losses(steps):  # over images: the mean of the batches' means would favour a small batch
        images = steps[:, 4]
        return (images @ steps[:, :2] / images.sum()).tolist()

    _, _, digits_right, sums_right, images = record.sum(dim=0).tolist()
    digit_loss, sum_loss = losses(record)
    row = {
        "digit_loss": digit_loss,
        "sum_loss": sum_loss,
        "digit_accuracy": digits_right / images,
        "sum_accuracy": sums_right / images,
    }
    curve, done = [], 0
    for steps in record.tensor_split(min(CURVE_POINTS, len(record))):
        done += len(steps)
        curve.append((epoch - 1 + done / len(record), *losses(steps)))
    return row, curve


def unsmoothed(probabilities, label_smoothing):
    """What a network trained with label smoothing would give without: (..., C), sums to 1.

    Trained with smoothing e it tends to (1 - e) q + e / C for a probability q.
    """
    classes = probabilities.shape[-1]
    q = (probabilities - label_smoothing / classes).clamp(min=0)
    return q / q.sum(dim=-1, keepdim=True)


class Predictions(NamedTuple):
    """What a network predicts for N images, each with all ten addends; on the CPU."""

    digit_log_probs: torch.Tensor  # float32 (N, 10 addends, 10)
    sum_log_probs: torch.Tensor  # float32 (N, 10 addends, 19)
    digits: torch.Tensor  # int64 (N,), the true ones

    def truth(self):
        """The true digits and sums of the pairs: int64 (N, 10) each."""
        digit = self.digits[:, None].expand(-1, NUM_DIGITS)
        return digit, digit + torch.arange(NUM_DIGITS)

    def predicted(self):
        """The digits and sums predicted for the pairs: int64 (N, 10) each."""
        return self.digit_log_probs.argmax(dim=2), self.sum_log_probs.argmax(dim=2)

    def score(self):
        """The figures over all pairs: mean losses, and shares that are right, or consistent."""
        (digit, total), (predicted_digit, predicted_sum) = self.truth(), self.predicted()
        digit_right, sum_right = predicted_digit == digit, predicted_sum == total
        consistent = predicted_sum == predicted_digit + torch.arange(NUM_DIGITS)
        measured = {
            "digit_loss": -self.digit_log_probs.gather(2, digit[:, :, None]),
            "sum_loss": -self.sum_log_probs.gather(2, total[:, :, None]),
            "digit_accuracy": digit_right,
            "sum_accuracy": sum_right,
            "both_accuracy": digit_right & sum_right,
            "consistency": consistent,
        }
        return {name: values.double().mean().item() for name, values in measured.items()}

    def confusion(self):
        """Counts of pairs, a row a true class: int64 (10, 10) for digits, (19, 19) for sums."""
        sizes = (NUM_DIGITS, NUM_SUMS)
        return [
            torch.bincount((true * size + predicted).flatten(), minlength=size**2).view(size, size)
            for size, true, predicted in zip(sizes, self.truth(), self.predicted(), strict=True)
        ]

    def worst(self, count):
        """The wrongest digits: indices, predicted digits and their probabilities, each (n,).

        At most `count`, the surest first; an image's probabilities are its mean over the addends.
        """
        probability, guess = self.digit_log_probs.exp().mean(dim=1).max(dim=1)  # (N,)
        wrong = (guess != self.digits).nonzero().flatten()
        wrong = wrong[probability[wrong].argsort(descending=True, stable=True)][:count]
        return wrong, guess[wrong], probability[wrong]


def epoch_line(row, epochs):
    """A row of the history as a line to read."""
    parts = [part for part in ("train", "val", "test") if f"{part}_seconds" in row]
    losses = [f"{p} {row[f'{p}_digit_loss']:.4f}/{row[f'{p}_sum_loss']:.4f}" for p in parts]
    shares = [
        f"{part} digit {100 * row[f'{part}_digit_accuracy']:.2f} % "
        f"sum {100 * row[f'{part}_sum_accuracy']:.2f} % "
        f"both {100 * row[f'{part}_both_accuracy']:.2f} %"
        for part in parts[1:]
    ]
    epoch = f"{row['epoch']:>{len(str(epochs))}}/{epochs}"
    return (
        f"epoch {epoch}  loss digit/sum {' '.join(losses)}  {'  '.join(shares)}  "
        f"{row['train_seconds']:.1f} s"
    )


def result_line(part, score):
    """The figures of a Predictions' score as a line to read."""
    percent = {name: f"{100 * value:.2f} %" for name, value in score.items()}
    return (
        f"result   {part}: digit {percent['digit_accuracy']}, sum {percent['sum_accuracy']}, "
        f"both {percent['both_accuracy']}, consistent {percent['consistency']}"
    )
