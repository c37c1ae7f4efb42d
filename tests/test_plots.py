"""What the plots of a run say."""

import pytest
import torch
import torch.nn.functional as F
from matplotlib.patches import Rectangle

from dataset import draw_unseen
from model import ComplexNumbers
from training import plots
from training.metrics import Predictions

TITLE = "default, seed 0, epoch 1 of 1 (synthetic digits, NOT MNIST)"
SPLITS = {"train": ("digit", "sum"), "test": ("digit", "sum", "both")}


def history(epochs):
    row = {f"{s}_{name}_accuracy": 0.9 for s, names in SPLITS.items() for name in names}
    row |= {f"{s}_{name}_loss": 0.2 for s in SPLITS for name in ("digit", "sum")}
    return [row | {"epoch": epoch} for epoch in range(1, epochs + 1)]


def two_images():
    """Predictions for an image that is misread, 5 instead of 7, and one that is not, a 1."""
    digit = F.one_hot(torch.tensor([5, 1]), 10).float().log()[:, None].expand(2, 10, 10)
    total = torch.zeros(2, 10, 19).log_softmax(dim=2)  # 0 is predicted
    return Predictions(digit, total, torch.tensor([7, 1]), 0.0, None)


@pytest.fixture(scope="module")
def figures():
    """The plots of a run of two epochs."""
    images, addends = torch.zeros(2, 28, 28, dtype=torch.uint8), torch.tensor([3, 4])
    curve = [{"epoch": e, "train_digit_loss": 0.3, "train_sum_loss": 0.4} for e in (0.5, 1, 1.5, 2)]
    rest = two_images(), images, addends, ComplexNumbers(4), TITLE
    return dict(plots.run_figures(history(2), curve, *rest))


def texts(figure):
    """All texts of a figure, in one line."""
    found = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    return " ".join(" ".join(found).split())


def test_every_plot_says_what_it_shows_and_of_which_run(figures):
    found = [texts(figure) for figure in figures.values()]
    assert all(TITLE in text for text in found) and len(found) == 7
    assert len({text.split(TITLE)[0] for text in found}) == len(found)


def test_the_loss_plot_shows_training_at_its_points_and_test_per_epoch(figures):
    (axes,) = figures["loss.png"].axes
    drawn = {line.get_label().split(":")[0]: line.get_xydata().tolist() for line in axes.lines}
    assert drawn == {
        "digit, train": [[0.5, 0.3], [1, 0.3], [1.5, 0.3], [2, 0.3]],
        "sum, train": [[0.5, 0.4], [1, 0.4], [1.5, 0.4], [2, 0.4]],
        "digit, test": [[1, 0.2], [2, 0.2]],
        "sum, test": [[1, 0.2], [2, 0.2]],
    }
    text = texts(figures["loss.png"])  # the legend has the means of the last epoch
    assert "digit, train: 0.2" in text and "0.3" not in text.split("digit, train")[1]


def test_the_addition_table_has_each_most_frequent_sum_and_outlines_unseen_pairs():
    digits = torch.tensor([d for d in range(10) if d != 5]).repeat(5)  # no image of a 5
    sums = F.one_hot(digits[:, None] + torch.arange(10), 19).float()
    wrong = (digits == 3).nonzero().flatten()[:3]  # of five
    sums[wrong, 4] = F.one_hot(torch.tensor(12), 19).float()
    unseen = draw_unseen(30, 0)
    predictions = Predictions(torch.zeros(45, 10, 10), sums, digits, 0.0, unseen)
    (axes,) = plots.addition_figure(predictions, TITLE).axes
    cells = {}
    for text in axes.texts:
        addend, digit = map(round, text.get_position())
        cells[digit, addend] = [*cells.get((digit, addend), []), text.get_text()]
    expected = {(d, a): [str(d + a)] for d in range(10) if d != 5 for a in range(10)}
    assert cells == expected | {(3, 4): ["12", "40.0 %"]}
    centers = [p.get_center() for p in axes.patches if isinstance(p, Rectangle)]
    assert sorted([round(y), round(x)] for x, y in centers) == unseen.nonzero().tolist()


def test_mistakes_and_predictions_show_what_was_predicted(figures):
    assert "✗ 5, label 7" in texts(figures["mistakes.png"])
    text = texts(figures["predictions.png"])
    assert (
        "correct: 1 + 4 = 5" in text
        and text.count("digit 100.0 %") == 2
        and text.count(f"sum {100 / 19:.1f} %") == 2
    )


def test_the_learned_numbers_are_drawn_where_they_lie_the_easily_read_plane_first():
    head = ComplexNumbers(1)
    steps = torch.tensor([2.0, 0.3, 1.0])  # radians from number to number
    numbers = torch.polar(torch.ones(19, 3), torch.arange(19.0)[:, None] * steps)
    head.numbers.data = torch.stack([numbers.real, numbers.imag])
    axes = plots.numbers_figure(head.planes(), TITLE).axes
    for plane, component in zip(axes, (1, 2, 0), strict=True):
        assert [text.get_text() for text in plane.texts] == [str(n) for n in range(19)]
        places = torch.tensor([text.get_position() for text in plane.texts])
        torch.testing.assert_close(places, head.numbers[:, :, component].T.detach())
