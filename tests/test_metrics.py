"""The metrics, against the same computed in another way."""

import pytest
import torch
import torch.nn.functional as F

from training.metrics import CURVE_POINTS, Predictions, epoch_metrics


@pytest.fixture
def predictions():
    draw = torch.Generator().manual_seed(3)
    digits = torch.randint(10, (30,), generator=draw)
    digit = 2 * torch.randn(30, 10, 10, generator=draw) + 3 * F.one_hot(digits, 10)[:, None]
    total = torch.randn(30, 10, 19, generator=draw)
    total = total + 3 * F.one_hot(digits[:, None] + torch.arange(10), 19)
    return Predictions(digit.log_softmax(2), total.log_softmax(2), digits)


def test_metrics_are_those_of_a_count_pair_by_pair(predictions):
    digit_loss = sum_loss = 0.0
    correct_digits = correct_sums = correct_both = consistent = 0
    for i, digit in enumerate(predictions.digits.tolist()):
        for addend in range(10):
            digit_log_probs = predictions.digit_log_probs[i, addend]
            sum_log_probs = predictions.sum_log_probs[i, addend]
            digit_loss += F.cross_entropy(digit_log_probs, torch.tensor(digit)).item()
            sum_loss += F.cross_entropy(sum_log_probs, torch.tensor(digit + addend)).item()
            predicted, total = int(digit_log_probs.argmax()), int(sum_log_probs.argmax())
            correct_digits += predicted == digit
            correct_sums += total == digit + addend
            correct_both += predicted == digit and total == digit + addend
            consistent += total == predicted + addend
    metrics = predictions.metrics()
    assert metrics["digit_loss"] == pytest.approx(digit_loss / 300, rel=1e-5)
    assert metrics["sum_loss"] == pytest.approx(sum_loss / 300, rel=1e-5)
    assert metrics["digit_accuracy"] == pytest.approx(correct_digits / 300)
    assert metrics["sum_accuracy"] == pytest.approx(correct_sums / 300)
    assert metrics["both_accuracy"] == pytest.approx(correct_both / 300)
    assert metrics["consistency"] == pytest.approx(consistent / 300)
    assert 0 < correct_both < correct_sums < 300  # so that all of these differ


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
def test_objectives_are_the_divergence_from_the_smoothed_targets(predictions, smoothing):
    metrics = predictions.metrics(smoothing)
    for name, log_probs, targets in zip(
        ("digit", "sum"), predictions[:2], predictions.targets(), strict=True
    ):
        classes = log_probs.shape[2]
        smoothed = (1 - smoothing) * F.one_hot(targets, classes) + smoothing / classes
        expected = F.kl_div(log_probs, smoothed, reduction="sum").item() / 300
        assert metrics[f"{name}_objective"] == pytest.approx(expected, rel=1e-4)


def test_the_addition_table_counts_the_sums_of_each_digit_and_addend(predictions):
    digits, _ = predictions.targets()
    _, sums = predictions.predicted()
    shares = predictions.addition()
    for digit in range(10):
        for addend in range(10):
            counts = sums[digits[:, 0] == digit, addend].bincount(minlength=19)
            expected = counts.double() / counts.sum()  # NaN if there is no such digit
            torch.testing.assert_close(shares[digit, addend], expected, equal_nan=True)


def test_all_misread_images_are_mistakes_the_most_confident_first(predictions):
    mistakes = predictions.mistakes(disputed={0, 1, 2, 3, 4})
    predicted, probability = predictions.image_digits()
    for row in mistakes:
        index, label, prediction, confidence, disputed = row
        assert label == predictions.digits[index] != prediction == predicted[index]
        assert confidence == probability[index] and disputed == (index < 5)
    confidences = [row[3] for row in mistakes]
    assert confidences == sorted(confidences, reverse=True)
    assert len(mistakes) == (predicted != predictions.digits).sum() > 0


def test_wrong_sums_are_those_of_correct_digits_the_most_confident_first(predictions):
    pairs = predictions.wrong_sums().tolist()
    (digits, totals), (predicted_digits, sums) = predictions.targets(), predictions.predicted()
    expected = [
        [i, addend]
        for i in range(30)
        for addend in range(10)
        if predicted_digits[i, addend] == digits[i, addend] and sums[i, addend] != totals[i, addend]
    ]
    assert sorted(pairs) == expected != []
    confidences = [predictions.sum_log_probs[i, addend].max() for i, addend in pairs]
    assert confidences == sorted(confidences, reverse=True)


def test_losses_of_an_epoch_are_means_over_images_not_over_batches():
    batches = torch.tensor([[1, 2, 7, 8, 0.5, 0.25, 1], [5, 6, 9, 9, 1, 0, 1]]).double()
    steps = batches * torch.tensor([[4], [1]])  # sums over four images, and over one
    metrics, curve = epoch_metrics(steps, epoch=3, label_smoothing=0.0)
    assert metrics == {
        "digit_loss": pytest.approx((1 * 4 + 5 * 1) / 5),
        "sum_loss": pytest.approx((2 * 4 + 6 * 1) / 5),
        "digit_objective": pytest.approx((7 * 4 + 9 * 1) / 5),
        "sum_objective": pytest.approx((8 * 4 + 9 * 1) / 5),
        "digit_accuracy": pytest.approx(3 / 5),
        "sum_accuracy": pytest.approx(1 / 5),
    }
    assert curve == [(2.5, 7.0, 8.0), (3.0, 9.0, 9.0)]


@pytest.mark.parametrize("steps", [1, 19, 20, 21, 468])
def test_the_curve_has_its_points_for_any_number_of_steps(steps):
    _, curve = epoch_metrics(torch.ones(steps, 7).double(), epoch=1, label_smoothing=0.1)
    assert len(curve) == min(steps, CURVE_POINTS)
    assert curve[-1][0] == 1.0
