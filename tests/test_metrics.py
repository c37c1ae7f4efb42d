"""The metrics, against the same computed in another way."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from training.metrics import CURVE_POINTS, Predictions, train_metrics


@pytest.fixture
def predictions():
    draw = torch.Generator().manual_seed(3)
    digits = torch.randint(10, (30,), generator=draw)
    digit = 2 * torch.randn(30, 10, 10, generator=draw) + 3 * F.one_hot(digits, 10)[:, None]
    total = torch.randn(30, 10, 19, generator=draw)
    total = total + 3 * F.one_hot(digits[:, None] + torch.arange(10), 19)
    return Predictions(digit.log_softmax(2), total.log_softmax(2), digits, 0.0, None)


def test_metrics_are_those_of_a_count_pair_by_pair(predictions):
    counts = Counter()
    for i, digit in enumerate(predictions.digits.tolist()):
        for addend in range(10):
            outputs = predictions.digit_log_probs[i, addend], predictions.sum_log_probs[i, addend]
            counts["digit_loss"] -= outputs[0][digit].item()
            counts["sum_loss"] -= outputs[1][digit + addend].item()
            predicted, total = (int(output.argmax()) for output in outputs)
            counts["digit_accuracy"] += predicted == digit
            counts["sum_accuracy"] += total == digit + addend
            counts["both_accuracy"] += (predicted, total) == (digit, digit + addend)
            counts["consistency"] += total == predicted + addend
    expected = {name: pytest.approx(count / 300, rel=1e-5) for name, count in counts.items()}
    assert predictions.metrics() == expected
    assert 0 < counts["both_accuracy"] < counts["sum_accuracy"] < 300


def test_confusion_counts_an_image_once_by_its_mean_probability_and_each_of_its_sums(predictions):
    digit_counts, sum_counts = torch.zeros(10, 10).long(), torch.zeros(19, 19).long()
    for i, digit in enumerate(predictions.digits.tolist()):
        mean = sum(predictions.digit_log_probs[i, addend].exp() for addend in range(10)) / 10
        digit_counts[digit, mean.argmax()] += 1
        for addend in range(10):
            sum_counts[digit + addend, predictions.sum_log_probs[i, addend].argmax()] += 1
    for ours, theirs in zip(predictions.confusion(), (digit_counts, sum_counts), strict=True):
        assert torch.equal(ours, theirs)
    assert digit_counts.sum() == 30 and sum_counts.sum() == 300


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_are_the_divergence_from_the_smoothed_targets(predictions, smoothing):
    targets = predictions.targets()
    smoothed = [
        (1 - smoothing) * F.one_hot(target, classes) + smoothing / classes
        for target, classes in zip(targets, (10, 19), strict=True)
    ]
    metrics = predictions._replace(label_smoothing=smoothing).metrics()
    for name, log_probs, target in zip(("digit", "sum"), predictions[:2], smoothed, strict=True):
        expected = F.kl_div(log_probs, target, reduction="sum").item() / 300
        assert metrics[f"{name}_loss"] == pytest.approx(expected, rel=1e-4)


def test_unseen_pairs_are_counted_apart_from_seen_ones(predictions):
    unseen = torch.rand(10, 10, generator=torch.Generator().manual_seed(4)) < 0.3
    metrics, counts = predictions._replace(unseen=unseen).metrics(), {True: [], False: []}
    for i, digit in enumerate(predictions.digits.tolist()):
        for addend in range(10):
            correct = int(predictions.sum_log_probs[i, addend].argmax()) == digit + addend
            counts[bool(unseen[digit, addend])].append(correct)
    for name, values in (("unseen", counts[True]), ("seen", counts[False])):
        assert metrics.pop(f"{name}_sum_accuracy") == pytest.approx(sum(values) / len(values))
    assert metrics == predictions.metrics()


def test_all_misread_images_are_mistakes_the_most_confident_first(predictions):
    mistakes = predictions.mistakes()
    predicted, probability = predictions.image_digits()
    for index, label, prediction, confidence in mistakes:
        assert label == predictions.digits[index] != prediction == predicted[index]
        assert confidence == probability[index]
    confidences = [row[3] for row in mistakes]
    assert confidences == sorted(confidences, reverse=True)
    assert len(mistakes) == (predicted != predictions.digits).sum() > 0


def test_metrics_of_an_epoch_are_means_over_images_not_over_batches():
    batches = torch.tensor([[7, 8, 0.5, 0.25, 1], [9, 9, 1, 0, 1]]).double()
    steps = batches * torch.tensor([[4], [1]])  # sums over four images, and over one
    metrics, curve = train_metrics(steps, epoch=3)
    assert metrics == {
        "train_digit_loss": pytest.approx((7 * 4 + 9 * 1) / 5),
        "train_sum_loss": pytest.approx((8 * 4 + 9 * 1) / 5),
        "train_digit_accuracy": pytest.approx(3 / 5),
        "train_sum_accuracy": pytest.approx(1 / 5),
    }
    points = [(point["epoch"], point["train_digit_loss"]) for point in curve]
    assert points == [(2.5, pytest.approx(7)), (3.0, pytest.approx(9))]


@pytest.mark.parametrize("steps", [1, 19, 20, 21, 468])
def test_the_curve_has_its_points_for_any_number_of_steps(steps):
    _, curve = train_metrics(torch.ones(steps, 5).double(), epoch=1)
    assert len(curve) == min(steps, CURVE_POINTS) and curve[-1]["epoch"] == 1.0
