"""Plots of a run and of single predictions, as figures made without pyplot: no display needed."""

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
CORRECT_COLOR, WRONG_COLOR = "#009E73", "#CC79A7"  # Okabe-Ito, safe for color-blind readers
OUTPUT_COLORS = {"digit": "#0072B2", "sum": "#D55E00", "both": "#000000"}
SPLIT_STYLES = {"train": {"lw": 1, "alpha": 0.7}, "val": {"ls": ":"}, "test": {"lw": 2}}


def as_png(figure):
    """The content of a PNG file with the figure, bytes-like."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getbuffer()


def run_figures(history, curve, predictions, images, addends, disputed, title, label_smoothing):
    """All plots of a run, by file name. Tensors are on the CPU.

    predictions: of the N test images; images: uint8 (N, 28, 28); addends: int64 (N,), the one to
    show with each image; disputed: the set of indices of images with a disputed label.
    """
    return {
        "loss.png": loss_figure(curve, history, title, label_smoothing),
        "accuracy.png": _accuracy_figure(history, title),
        "confusion_matrix.png": _confusion_figure(*predictions.confusion(), title),
        "predictions.png": _samples_figure(predictions, images, addends, title),
        "mistakes.png": _mistakes_figure(predictions, images, disputed, title, label_smoothing),
    }


def loss_figure(curve, history, title, label_smoothing):
    """Negative log-likelihood of both outputs, in nats, against the epoch.

    curve: (position in epochs, digit loss, sum loss), means over the training samples since the
    previous point; history: the rows of metrics.csv; title: a line about the run.
    """
    note = "Plotted without label smoothing. Dotted: the plotted loss at which the training loss, "
    note += f"with label smoothing {label_smoothing:g}, is at its minimum."
    figure = new_figure("Loss per epoch", title, 5.6, note if label_smoothing else "")
    axes = figure.add_subplot()
    positions, *losses = zip(*curve, strict=True)
    for output, n, values in zip(("digit", "sum"), (NUM_DIGITS, NUM_SUMS), losses, strict=True):
        color, label = OUTPUT_COLORS[output], f"{output}, train: {values[-1]:.4f}"
        axes.plot(positions, values, color=color, label=label, **SPLIT_STYLES["train"])
        if label_smoothing:  # the target of the true class is 1 - s + s / n (n classes)
            lowest = -math.log(1 - label_smoothing * (1 - 1 / n))
            axes.axhline(lowest, color=color, linewidth=1, linestyle=":")
    _plot_history(axes, history, ("val", "test"), "loss")
    finish_curves(axes, "negative log-likelihood, nats (log scale)", "last value")
    axes.set_xlim(0, 1.02 * positions[-1])
    return figure


def prediction_figure(originals, pixels, digits, sums, titles):
    """A row per image: the original, the input of the network, the probabilities of both outputs.

    originals: N Pillow images; pixels: N of uint8 (28, 28); digits, sums: (N, 10), (N, 19).
    """
    figure = new_figure("Predicted digit and sum", "", height=0.5 + 2.4 * len(titles))
    rows = figure.subfigures(len(titles), 1, squeeze=False).flatten()
    for i, (row, title) in enumerate(zip(rows, titles, strict=True)):
        row.suptitle(title, x=0.012, ha="left")
        original, network_input, *bars = row.subplots(1, 4, width_ratios=(2, 2, 3, 6))
        original.imshow(originals[i])
        original.set(xticks=[], yticks=[], xlabel="original")
        network_input.imshow(pixels[i], cmap="gray", vmin=0, vmax=255)
        network_input.set(xticks=[], yticks=[], xlabel="input of the network")
        for axes, output, values in zip(bars, ("digit", "sum"), (digits[i], sums[i]), strict=True):
            classes = range(len(values))
            axes.bar(classes, 100 * values.numpy(), color=OUTPUT_COLORS[output])
            axes.set(xticks=classes, ylim=(0, 100), xlabel=output, ylabel="probability, %")
            axes.tick_params(axis="x", labelsize=8)
    return figure


def new_figure(heading, subtitle, height, note=""):
    """An empty figure, 10 inches (1,500 pixels) wide, with texts at the top and the bottom."""
    figure = Figure(figsize=(10, height), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    lines = [heading, *textwrap.wrap(subtitle, width=100)]
    figure.suptitle("\n".join(lines), x=0.012, ha="left", linespacing=1.5)
    figure.supxlabel(note, x=0.012, ha="left", fontsize=9)
    return figure


def finish_curves(axes, ylabel, legend_title):
    """Add labels, a log scale and a legend to axes with curves; zeros are below the scale."""
    drawn = [y for line in axes.lines for y in line.get_ydata() if y > 0] or [0.1]
    limits = min(drawn) / 1.6, 1.6 * max(drawn)  # always contain a tick
    axes.set(xlabel="epoch", ylabel=ylabel, ylim=limits, yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.locator_params(axis="x", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    axes.grid(color="0.9")
    axes.legend(title=legend_title, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _plot_history(axes, history, splits, metric):
    """A curve for each split and output that has the metric; accuracies as error rates."""
    epochs = [row["epoch"] for row in history]
    for split, output in itertools.product(splits, OUTPUT_COLORS):
        key = f"{split}_{output}_{metric}"
        if key in history[0]:
            y = np.array([row[key] for row in history])
            text = f"{y[-1]:.4f}" if metric == "loss" else f"{100 * y[-1]:.2f} %"
            y = y if metric == "loss" else 100 - 100 * y
            style = SPLIT_STYLES[split] | ({"lw": 0.8} if output == "both" else {})
            style |= {"color": OUTPUT_COLORS[output], "label": f"{output}, {split}: {text}"}
            axes.plot(epochs, y, marker=".", **style)


def _accuracy_figure(history, title):
    """Error rates: curves over the epochs or, after a single epoch, points side by side."""
    note = "Training errors are counted during the epoch, all others after it."
    figure = new_figure("Error rate per epoch", title, 5.6, note)
    axes = figure.add_subplot()
    _plot_history(axes, history, SPLIT_STYLES, "accuracy")
    finish_curves(axes, "error rate, % (log scale)", "accuracy in the last epoch")
    if len(history) == 1:
        for i, line in enumerate(axes.lines):
            line.set(xdata=[i], markersize=16)
        labels = [line.get_label().replace(": ", "\n") for line in axes.lines]
        axes.set_xticks(range(len(labels)), labels)
        axes.set(xlim=(-0.5, len(labels) - 0.5), xlabel="accuracy")
        axes.get_legend().remove()
    return figure


def _confusion_figure(digit_counts, sum_counts, title):
    """Confusion matrices of both outputs, one row per true class; only errors are colored."""
    note = "Digit: by mean probability over the ten addends. "
    note += "Color: errors as a share of the row (log scale)."
    figure = new_figure("Confusion matrices of the test set", title, 7.2, note)
    left, right = figure.subplots(1, 2, width_ratios=(12, 19))
    for axes, counts, text, size in (
        (left, digit_counts, "Digit: number of images", 9),
        (right, sum_counts, "Sum: number of (image, addend) pairs", 6.5),
    ):
        shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
        shares.fill_diagonal_(0)  # on the log scale, zero has no color
        axes.imshow(shares.numpy(), cmap="Oranges", norm=LogNorm(1e-5, 1), alpha=0.7)
        axes.set(title=text, xlabel="predicted", ylabel="true", anchor="N")
        axes.set(xticks=range(len(counts)), yticks=range(len(counts)))
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


def _mistakes_figure(predictions, images, disputed, title, label_smoothing):
    """The test images with a wrong predicted digit, the highest confidence first."""
    cells, errors = [], predictions.most_confident_errors(MAX_MISTAKES)
    for i, digit, confidence in zip(*(values.tolist() for values in errors), strict=True):
        above = f"{digit}, label: {predictions.digits[i]}"
        below = f"confidence {100 * confidence:.2f} %\ntest image {i}"
        below += "\nlabel disputed" if i in disputed else ""
        cells.append((images[i], above, below, False))
    if not cells:
        return new_figure("No test errors: every digit is correct", title, height=1.0)
    note = "Above: predicted digit and label. Confidence: mean probability over the ten addends."
    if label_smoothing:
        target = 100 * (1 - label_smoothing * (1 - 1 / NUM_DIGITS))
        note += f"\nThe target in training is {target:.0f} % (label smoothing {label_smoothing:g})."
    note += " Disputed: see Northcutt et al. 2021, labelerrors.com." if disputed else ""
    return _image_grid(cells, "Test errors with the highest confidence", title, note)


def _image_grid(cells, heading, title, note):
    """Cells (image, text above, text below, correct) in rows of COLUMNS."""
    rows = math.ceil(len(cells) / COLUMNS)
    figure = new_figure(heading, title, 1.0 + 2.4 * rows, note)
    for i, (image, above, below, correct) in enumerate(cells, start=1):
        axes = figure.add_subplot(rows, COLUMNS, i, xticks=[], yticks=[], xlabel=below)
        axes.imshow(image.numpy(), cmap="Greys", vmin=0, vmax=255)
        axes.set_title(f"{'✓' if correct else '✗'} {above}", fontsize=12)
        axes.spines[:].set(color=CORRECT_COLOR if correct else WRONG_COLOR, linewidth=3)
    return figure
