"""What the plots of a run say."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

from training import plots
from training.metrics import Predictions

TITLE = "default, seed 0, epoch 1 of 1 (synthetic digits, NOT MNIST)"
SPLITS = {"train": ("digit", "sum"), "test": ("digit", "sum", "both")}


def history(epochs):
    row = {f"{s}_{name}_accuracy": 0.9 for s, names in SPLITS.items() for name in names}
    row |= {f"{s}_{name}_objective": 0.2 for s in SPLITS for name in ("digit", "sum")}
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


def test_the_loss_plot_shows_the_objective_of_training_at_its_points_and_of_test_per_epoch():
    (axes,) = run_figures(2, 0.1)["loss.png"].axes
    drawn = {line.get_label().split(":")[0]: line.get_xydata().tolist() for line in axes.lines}
    assert drawn == {
        "digit, train": [[1, 0.3], [2, 0.3]],
        "sum, train": [[1, 0.4], [2, 0.4]],
        "digit, test": [[1, 0.2], [2, 0.2]],
        "sum, test": [[1, 0.2], [2, 0.2]],
    }


def test_a_single_epoch_has_a_bar_for_each_error_rate_and_zero_is_visible():
    row = history(1)[0] | {"test_both_accuracy": 1.0}
    (axes,) = plots.accuracy_figure([row], TITLE).axes
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx([10, 10, 10, 10, 0])
    assert [text.get_text() for text in axes.texts] == ["10.00 %"] * 4 + ["0.00 %"]


def test_the_addition_table_has_each_most_frequent_sum_and_only_imperfect_accuracies():
    shares = torch.zeros(10, 10, 19)
    for digit, addend in itertools.product(range(10), range(10)):
        shares[digit, addend, digit + addend] = 1.0
    shares[3, 4] = F.one_hot(torch.tensor(12), 19) * 0.6 + F.one_hot(torch.tensor(7), 19) * 0.4
    shares[5] = torch.nan  # no image of a 5
    (axes,) = plots.addition_figure(shares, TITLE).axes
    cells = {}
    for text in axes.texts:
        addend, digit = map(round, text.get_position())
        cells[digit, addend] = [*cells.get((digit, addend), []), text.get_text()]
    expected = {(d, a): [str(d + a)] for d in range(10) if d != 5 for a in range(10)}
    assert cells == expected | {(3, 4): ["12", "40.0 %"]}


def test_wrong_sums_of_correct_digits_are_among_the_mistakes():
    text = texts(run_figures(1, 0.0)["mistakes.png"])  # the second image: 1 + 1 = 0 and so on
    assert "✗ 5, label 7" in text and "correct: 1 + 1 = 2" in text


def test_predictions_show_their_probabilities():
    text = texts(run_figures(1, 0.0)["predictions.png"])
    assert text.count("digit 100.0 %") == 2 and text.count(f"sum {100 / 19:.1f} %") == 2


def test_a_disputed_label_is_marked_with_its_source():
    text = texts(run_figures(1, 0.0)["mistakes.png"])
    assert "label disputed" in text and "labelerrors.com" in text


def test_each_row_of_a_prediction_has_its_title():
    image, pixels = Image.new("RGB", (40, 40)), torch.zeros(28, 28).byte().numpy()
    digits, sums = torch.full((10,), 0.1), torch.full((19,), 1 / 19)
    titles = ["one", r"two $\wrong$.png"]  # no formula
    figure = plots.prediction_figure([(image, pixels, digits, sums, title) for title in titles])
    assert [row.get_suptitle() for row in figure.subfigs] == titles
    assert plots.as_png(figure)


LATE_IMPORTS = """
import sys
from matplotlib.figure import Figure
from training import plots

before = set(sys.modules)
plots.as_png(Figure())
paths = [getattr(sys.modules[name], "__file__", None) or "" for name in {*sys.modules} - before]
print(*[path for path in paths if "matplotlib" in path and not path.endswith(".py")])
"""


def test_what_plots_need_is_imported_before_training():
    # Ctrl-C in the import of an extension module can become an ImportError at the end of a run.
    command = [sys.executable, "-c", LATE_IMPORTS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "\n"), result
