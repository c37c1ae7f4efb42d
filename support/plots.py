"""Plots of a run and of single predictions, as figures made without pyplot: no display needed.

The colors are from the Okabe-Ito palette, which is safe for color-blind readers.
"""

import io
import itertools
import math
import textwrap

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from support.constants import NUM_DIGITS, NUM_SUMS

COLUMNS, MAX_SAMPLES, MAX_MISTAKES = 6, 24, 30  # of the plots made of images
GRAY, CORRECT_COLOR, WRONG_COLOR = "0.35", "#009E73", "#CC79A7"
HEAD_COLORS = {"digit": "#0072B2", "sum": "#D55E00", "both": "#000000"}
SPLIT_STYLES = {
    "train": {"lw": 1, "marker": ".", "alpha": 0.7},
    "val": {"lw": 1.5, "marker": "s", "ls": ":", "markerfacecolor": "white"},
    "test": {"lw": 2, "marker": "o"},
}


def as_png(figure):
    """The content of a PNG file with the figure, bytes-like."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getbuffer()


def run_figures(
    history, curve, predictions, images, addends, disputed_labels, title, label_smoothing
):
    """All plots of a run: a dict from file names to figures.

    history, curve, title, label_smoothing: as for loss_figure; predictions: of the N test images;
    images: uint8 (N, 28, 28); addends: int64 (N,), the one to show with each image;
    disputed_labels: a set of indices of test images. All tensors are on the CPU.
    """
    return {
        "loss.png": loss_figure(curve, history, title, label_smoothing),
        "accuracy.png": _accuracy_figure(history, title),
        "confusion_matrix.png": _confusion_figure(*predictions.confusion(), title),
        "predictions.png": _samples_figure(predictions, images, addends, title),
        "mistakes.png": _mistakes_figure(predictions, images, disputed_labels, title),
    }


def loss_figure(curve, history, title, label_smoothing):
    """Negative log-likelihood of both heads, in nats, against the epoch.

    curve: (position in epochs, digit loss, sum loss), means over the training samples since the
    previous point; history: the rows of metrics.csv; title: a line about the run.
    """
    # The smoothed target gives the true one of n classes the probability 1 - s + s / n.
    lowest = [-math.log(1 - label_smoothing * (1 - 1 / n)) for n in (NUM_DIGITS, NUM_SUMS)]
    note = (
        f"Plotted without label smoothing. Training uses label smoothing {label_smoothing:g}: its "
        "objective is lowest at the dotted lines, {:.3f} (digit) and {:.3f} (sum), not at 0."
    ).format(*lowest)
    figure = new_figure("Loss per epoch", title, 5.6, note if label_smoothing else "")
    axes = figure.add_subplot()
    positions, *losses = zip(*curve, strict=True)
    for head, values, value in zip(("digit", "sum"), losses, lowest, strict=True):
        style = SPLIT_STYLES["train"] | {"color": HEAD_COLORS[head], "marker": ""}
        axes.plot(positions, values, label=f"{head}, train: {values[-1]:.4f}", **style)
        if label_smoothing:
            axes.axhline(value, color=HEAD_COLORS[head], linewidth=1, linestyle=":")
    _plot_history(axes, history, ("val", "test"), "loss")
    finish_curves(axes, "negative log-likelihood, nats (log scale)", "last value")
    axes.set_xlim(0, 1.02 * positions[-1])
    return figure


def prediction_figure(originals, pixels, digits, sums, titles):
    """One row per image: the original, the input of the network, the probabilities of both heads.

    originals: N RGB images of PIL; pixels: N uint8 arrays (28, 28); digits: (N, 10) and sums:
    (N, 19), probabilities; titles: N lines.
    """
    figure = new_figure("Predicted digit and sum", "", height=0.5 + 2.4 * len(titles))
    grid = figure.subplots(len(titles), 4, squeeze=False, width_ratios=(2, 2, 3, 5))
    for i, (original, network_input, *bars) in enumerate(grid):
        original.imshow(originals[i])
        original.set(xticks=[], yticks=[], xlabel="original", anchor="W")
        original.set_title(titles[i], loc="left")
        network_input.imshow(pixels[i], cmap="gray", vmin=0, vmax=255)
        network_input.set(xticks=[], yticks=[], xlabel="input of the network")
        for axes, head, values in zip(bars, ("digit", "sum"), (digits[i], sums[i]), strict=True):
            axes.bar(range(len(values)), 100 * values.numpy(), color=HEAD_COLORS[head])
            axes.set(xticks=range(len(values)), ylim=(0, 100), xlabel=head, ylabel="probability, %")
            axes.tick_params(axis="x", labelsize=8)
    return figure


def new_figure(heading, subtitle, height, note=""):
    """An empty figure, 10 inches (1,500 pixels) wide and `height` inches high, with its texts."""
    figure = Figure(figsize=(10, height), dpi=150, layout="constrained")
    lines = textwrap.wrap(subtitle, width=110)
    place = {"x": 0.012, "va": "top"}
    figure.text(y=1 - 0.12 / height, s=heading, fontsize=14, weight="bold", **place)
    figure.text(y=1 - 0.42 / height, s="\n".join(lines), fontsize=10.5, color=GRAY, **place)
    figure.supxlabel(note, x=0.012, ha="left", fontsize=9, color=GRAY)
    header = 0.42 + 0.22 * len(lines)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1, rect=(0, 0, 1, 1 - header / height))
    return figure


def finish_curves(axes, ylabel, legend_title):
    """Add labels, a log scale and a legend to axes with curves; zeros are below the scale."""
    drawn = [y for line in axes.lines for y in line.get_ydata() if y > 0] or [0.1]
    axes.set(xlabel="epoch", ylabel=ylabel, yscale="log", ylim=(min(drawn) / 2, 2 * max(drawn)))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.locator_params(axis="x", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    axes.grid(color="0.9")
    place = {"loc": "upper left", "bbox_to_anchor": (1, 1), "frameon": False}
    axes.legend(title=legend_title, alignment="left", **place)


def _plot_history(axes, history, splits, metric):
    """A curve for each split and head of which the history has the metric; errors for accuracy."""
    epochs = [row["epoch"] for row in history]
    for split, head in itertools.product(splits, HEAD_COLORS):
        key = f"{split}_{head}_{metric}"
        if key in history[0]:
            y = np.array([row[key] for row in history])
            text = f"{y[-1]:.4f}" if metric == "loss" else f"{100 * y[-1]:.2f} %"
            y = y if metric == "loss" else 100 - 100 * y
            style = SPLIT_STYLES[split] | ({"lw": 0.8} if head == "both" else {})
            style |= {"color": HEAD_COLORS[head], "markersize": 4}
            axes.plot(epochs, y, label=f"{head}, {split}: {text}", **style)


def _accuracy_figure(history, title):
    """Error rates: curves over the epochs or, after a single epoch, points side by side."""
    note = "Training errors are counted during the epoch, all others after it."
    figure = new_figure("Error rate per epoch", title, 5.6, note)
    axes = figure.add_subplot()
    _plot_history(axes, history, SPLIT_STYLES, "accuracy")
    finish_curves(axes, "error rate, % (log scale)", "accuracy in the last epoch")
    if len(history) == 1:
        for i, line in enumerate(axes.lines):
            line.set(xdata=[i], markersize=9)
        labels = [line.get_label().replace(": ", "\n") for line in axes.lines]
        axes.set_xticks(range(len(labels)), labels)
        axes.set(xlim=(-0.5, len(labels) - 0.5), xlabel="accuracy")
        axes.get_legend().remove()
    return figure


def _confusion_figure(digit_counts, sum_counts, title):
    """Confusion matrices of both heads, one row per true class; only errors are colored."""
    note = "An image's digit is predicted from its mean probabilities over the ten addends. "
    note += "Color: errors relative to the number in the row, on a log scale."
    figure = new_figure("Confusion matrices of the test set", title, 7.2, note)
    left, right = figure.subplots(1, 2, width_ratios=(12, 19))
    for axes, head, counts, unit, size in (
        (left, "digit", digit_counts, "images", 9),
        (right, "sum", sum_counts, "(image, addend) pairs", 6.5),
    ):
        shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
        norm = LogNorm(1e-5, 1)  # zero has no color
        axes.imshow(shares.fill_diagonal_(0).numpy(), cmap="Oranges", norm=norm, alpha=0.7)
        axes.set(xlabel=f"predicted {head}", ylabel=f"true {head}", anchor="N")
        axes.set(xticks=range(len(counts)), yticks=range(len(counts)))
        axes.set_title(f"{head.capitalize()}: number of {unit}", fontsize=11, loc="left")
        # Clipped texts are left out of the layout, which need not measure hundreds of them.
        style = {"ha": "center", "va": "center", "fontsize": size, "clip_on": True}
        for true, predicted in counts.nonzero().tolist():
            axes.text(predicted, true, int(counts[true, predicted]), **style)
    return figure


def _samples_figure(predictions, images, addends, title):
    """The first test images, each with its predicted digit and sum."""
    cells, (predicted_digits, predicted_sums) = [], predictions.predicted()
    for i, addend in enumerate(addends[:MAX_SAMPLES].tolist()):
        digit = int(predictions.digits[i])
        predicted = int(predicted_digits[i, addend]), int(predicted_sums[i, addend])
        correct = predicted == (digit, digit + addend)
        above = f"{predicted[0]} + {addend} = {predicted[1]}"
        below = "" if correct else f"correct: {digit} + {addend} = {digit + addend}"
        cells.append((images[i], above, below, correct))
    heading = f"Predictions for the first {len(cells)} test images"
    return _image_grid(cells, heading, title, "Above: predicted digit + addend = predicted sum.")


def _mistakes_figure(predictions, images, disputed_labels, title):
    """The test images with a wrong predicted digit, the highest confidence first."""
    cells, errors = [], predictions.most_confident_errors(MAX_MISTAKES)
    for i, digit, confidence in zip(*(values.tolist() for values in errors), strict=True):
        above = f"{digit}, label: {predictions.digits[i]}" + "*" * (i in disputed_labels)
        below = f"confidence {100 * confidence:.2f} %\ntest image {i}"
        cells.append((images[i], above, below, False))
    if not cells:
        return new_figure("No test errors: every digit is correct", title, height=1.0)
    note = "Above: predicted digit and label. Confidence: mean probability over the ten addends."
    if any("*" in above for _, above, *_ in cells):
        note += " *: label disputed, see Northcutt et al. 2021, labelerrors.com."
    return _image_grid(cells, "Test errors with the highest confidence", title, note)


def _image_grid(cells, heading, title, note):
    """Cells (image, text above, text below, correct) in rows of COLUMNS."""
    rows = math.ceil(len(cells) / COLUMNS)
    figure = new_figure(heading, title, 1.0 + 2.2 * rows, note)
    for i, (image, above, below, correct) in enumerate(cells, start=1):
        axes = figure.add_subplot(rows, COLUMNS, i, xticks=[], yticks=[], xlabel=below)
        axes.imshow(image.numpy(), cmap="Greys", vmin=0, vmax=255)
        axes.set_title(f"{'✓' if correct else '✗'} {above}", fontsize=12)
        axes.spines[:].set(color=CORRECT_COLOR if correct else WRONG_COLOR, linewidth=3)
    return figure
