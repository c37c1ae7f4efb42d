"""What the plots of a run say."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from support import plots
from support.metrics import Predictions

TITLE = "default, seed 0, epoch 1 of 1 (synthetic digits, NOT MNIST)"
SPLITS = {"train": ("digit", "sum"), "test": ("digit", "sum", "both")}


def history(epochs):
    row = {f"{s}_{name}_accuracy": 0.9 for s, names in SPLITS.items() for name in names}
    row |= {f"{s}_{name}_loss": 0.2 for s in SPLITS for name in ("digit", "sum")}
    return [row | {"epoch": epoch} for epoch in range(1, epochs + 1)]


def run_figures(epochs, label_smoothing):
    """The plots of a run on two images, the first of which is misread and disputed."""
    digit = F.one_hot(torch.tensor([5, 1]), 10).float().log()[:, None].expand(2, 10, 10)
    total = torch.zeros(2, 10, 19).log_softmax(dim=2)
    predictions = Predictions(digit, total, torch.tensor([7, 1]))
    images, addends = torch.zeros(2, 28, 28, dtype=torch.uint8), torch.tensor([3, 4])
    curve = [(epoch, 0.3, 0.4) for epoch in range(1, epochs + 1)]
    return plots.run_figures(
        history(epochs), curve, predictions, images, addends, {0}, TITLE, label_smoothing
    )


def texts(figure):
    """All texts of a figure, in one line."""
    found = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    return " ".join(" ".join(found).split())


def test_every_plot_says_what_it_shows_and_of_which_run():
    figures = run_figures(2, 0.1).values()
    assert all(TITLE in texts(figure) for figure in figures)
    headings = {figure.get_suptitle().splitlines()[0] for figure in figures}
    assert len(headings) == len(figures) and "" not in headings


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_loss_plot_explains_label_smoothing(label_smoothing):
    text = texts(run_figures(1, label_smoothing)["loss.png"])
    assert ("label smoothing" in text) == (label_smoothing > 0)


def test_the_points_of_a_single_epoch_do_not_overlap():
    (axes,) = run_figures(1, 0.0)["accuracy.png"].axes
    points = [tuple(line.get_xdata()) for line in axes.lines]
    assert len(points) == len(set(points)) == 5


def test_a_disputed_label_is_marked_with_its_source():
    text = texts(run_figures(1, 0.0)["mistakes.png"])
    assert "label disputed" in text and "labelerrors.com" in text


def test_each_row_of_a_prediction_has_its_title():
    image, pixels = Image.new("RGB", (40, 40)), torch.zeros(28, 28).byte().numpy()
    digits, sums = torch.full((2, 10), 0.1), torch.full((2, 19), 1 / 19)
    figure = plots.prediction_figure([image] * 2, [pixels] * 2, digits, sums, ["one", "two"])
    assert [row.get_suptitle() for row in figure.subfigs] == ["one", "two"]
