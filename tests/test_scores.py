"""The figures, against figures made another way."""

import pytest
import torch
import torch.nn.functional as F

from scores import CURVE_POINTS, Predictions, TrainingError, summarise


@pytest.fixture
def predictions():
    draw = torch.Generator().manual_seed(3)
    digits = torch.randint(10, (30,), generator=draw)
    digit = 2 * torch.randn(30, 10, 10, generator=draw) + 3 * F.one_hot(digits, 10)[:, None]
    total = torch.randn(30, 10, 19, generator=draw)
    sums = digits[:, None] + torch.arange(10)
    total = total + 3 * F.one_hot(sums, 19)
    return Predictions(digit.log_softmax(2), total.log_softmax(2), digits)


def test_scores_are_those_of_a_count_pair_by_pair(predictions):
    digit_loss = sum_loss = 0.0
    digit_right = sum_right = both_right = consistent = 0
    for i, digit in enumerate(predictions.digits.tolist()):
        for addend in range(10):
            of_digit = predictions.digit_log_probs[i, addend]
            of_sum = predictions.sum_log_probs[i, addend]
            digit_loss += F.cross_entropy(of_digit, torch.tensor(digit)).item()
            sum_loss += F.cross_entropy(of_sum, torch.tensor(digit + addend)).item()
            guess, total = int(of_digit.argmax()), int(of_sum.argmax())
            digit_right += guess == digit
            sum_right += total == digit + addend
            both_right += guess == digit and total == digit + addend
            consistent += total == guess + addend
    score = predictions.score()
    assert score["digit_loss"] == pytest.approx(digit_loss / 300, rel=1e-5)
    assert score["sum_loss"] == pytest.approx(sum_loss / 300, rel=1e-5)
    assert score["digit_accuracy"] == pytest.approx(digit_right / 300)
    assert score["sum_accuracy"] == pytest.approx(sum_right / 300)
    assert score["both_accuracy"] == pytest.approx(both_right / 300)
    assert score["consistency"] == pytest.approx(consistent / 300)
    assert 0 < both_right < sum_right < 300  # else the figures above would be told apart by none


def test_confusion_counts_every_pair_in_the_row_of_its_truth(predictions):
    digit, total = predictions.confusion()
    assert digit.shape == (10, 10) and total.shape == (19, 19)
    assert torch.equal(digit.sum(dim=1), 10 * predictions.digits.bincount(minlength=10))
    score = predictions.score()
    assert digit.trace() / 300 == pytest.approx(score["digit_accuracy"])
    assert total.trace() / 300 == pytest.approx(score["sum_accuracy"])
    first = int(predictions.digit_log_probs[0, 0].argmax())
    assert digit[predictions.digits[0], first] > 0


def test_the_worst_mistakes_come_first(predictions):
    indices, guesses, sure = predictions.worst(5)
    assert 0 < len(indices) <= 5
    assert (guesses != predictions.digits[indices]).all()
    assert sure.tolist() == sorted(sure.tolist(), reverse=True)
    everything = predictions.worst(1000)
    assert everything[2][0] == sure[0] and (everything[2] <= sure[0]).all()


def test_an_epochs_losses_are_means_over_images_not_over_batches():
    record = torch.tensor([[1.0, 2.0, 3.0, 2.0, 4.0], [5.0, 6.0, 1.0, 1.0, 1.0]]).double()
    row, curve = summarise(record, epoch=3)
    assert row == {
        "digit_loss": pytest.approx((1 * 4 + 5 * 1) / 5),
        "sum_loss": pytest.approx((2 * 4 + 6 * 1) / 5),
        "digit_accuracy": 4 / 5,
        "sum_accuracy": 3 / 5,
    }
    assert curve == [(2.5, 1.0, 2.0), (3.0, 5.0, 6.0)]


def test_the_curve_has_its_points_however_many_steps():
    for steps in (1, 19, 20, 21, 468):
        record = torch.ones(steps, 5).double()
        _, curve = summarise(record, epoch=1)
        assert len(curve) == min(steps, CURVE_POINTS)
        assert curve[-1][0] == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("head", [0, 1])
def test_a_broken_loss_names_its_epoch_and_first_step(value, head):
    record = torch.ones(10, 5).double()
    record[6:8, head] = value
    with pytest.raises(TrainingError, match="step 7 of 10 in epoch 4.*--lr"):
        summarise(record, epoch=4)
