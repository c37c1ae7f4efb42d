"""Pictures of a run, from its history and its counts: loss, accuracy, confusion, samples, mistakes.

Every function returns a matplotlib `Figure`, which the caller saves:

    accuracy_figure(history, "default, 20 epochs, seed 0").savefig("accuracy.png")

Figures are made without pyplot, so they need no display and leave no global state. A colour always
means the same head and a line style the same split; the colours are of the Okabe-Ito palette, which
colour-blind readers can tell apart. Tensors are expected on the CPU.
"""

import math
import textwrap
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from torch import Tensor

Numbers = Sequence[float] | Tensor  # one for each image: (N,)

WIDTH, DPI = 10.0, 150  # inches, pixels an inch: every picture is 1,500 pixels wide
COLUMNS = 6  # of the pictures made of cells

RIGHT_COLOUR, WRONG_COLOUR, NOTE_COLOUR = "#009E73", "#CC79A7", "#F0E442"
CURVE_NAMES = {"train": "training", "val": "validation"}  # the others are named as they are
CURVE_STYLES = {
    "train": {"linestyle": "-", "linewidth": 1.0, "marker": ".", "markersize": 6, "alpha": 0.7},
    "val": {"linestyle": ":", "linewidth": 1.5, "marker": "s", "markerfacecolor": "white"},
    "test": {"linestyle": "-", "linewidth": 2.0, "marker": "o"},
    "ours": {"linestyle": "-", "linewidth": 2.0},
    "published": {"linestyle": "--", "linewidth": 1.0, "markerfacecolor": "white"},
}
# "Both right" nearly coincides with "sum right", so it is thin and drawn on top.
HEAD_STYLES = {
    "digit": {"color": "#0072B2"},
    "sum": {"color": "#D55E00"},
    "both": {"color": "#000000", "linewidth": 0.8, "markersize": 2.5},
}

# The accuracy axis is logarithmic in (error + offset), in per cent: 99 to 99.9 % get as much room
# as 0 to 90 %, and 100 % is at a finite height.
ERROR_OFFSET = 0.05
ACCURACY_TICKS = (0, 5, 10, 20, 40, 60, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9, 99.95, 99.98, 100)


def loss_figure(curve: Sequence[tuple], history: Sequence[dict], title: str) -> Figure:
    """Losses of both heads, in nats, against the epoch.

    curve: (position in epochs, digit loss, sum loss), each loss a mean over the training samples
    since the point before. history: a row an epoch with `epoch`, `test_digit_loss`,
    `test_sum_loss` and, where there is a validation split, `val_digit_loss` and `val_sum_loss`.
    """
    figure = _figure(title, height=5.4)
    axes = figure.add_subplot(xlabel="epochs of training")
    axes.set_yscale("log", nonpositive="mask")  # a loss of exactly 0 is left out
    axes.set_ylabel("mean cross-entropy loss, nats (log scale)")
    nats = "{:.4f}".format
    positions, *losses = zip(*curve, strict=True)
    for head, values in zip(("digit", "sum"), losses, strict=True):
        _draw(axes, "train", head, positions, values, nats, marker="")
    _draw_history(axes, ("val", "test"), "loss", history, nats)
    # Plain decimals at 1, 2, 5 and their tenfolds: matplotlib's own labels are powers of ten.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axes.set_xlim(0, 1.02 * positions[-1])
    _finish(axes, "last value, nats")
    return figure


def accuracy_figure(history: Sequence[dict], title: str) -> Figure:
    """Accuracies after each epoch, in per cent, on a scale that opens up towards 100 %.

    history: a row an epoch with `epoch` and the fractions `train_digit_accuracy`,
    `train_sum_accuracy`, `test_digit_accuracy`, `test_sum_accuracy`, `test_both_accuracy` and,
    where there is a validation split, the same three for `val`.
    """
    figure = _figure(title, height=5.4)
    axes = figure.add_subplot(xlabel="epochs of training")
    _draw_history(axes, ("train", "val", "test"), "accuracy", history, _percent)
    _accuracy_axes(axes)
    axes.set_xlim(history[0]["epoch"] - 0.5, history[-1]["epoch"] + 0.5)
    _finish(axes, "after the last epoch")
    return figure


def comparison_figure(
    history: Sequence[dict], published: dict[str, Sequence[float]], title: str
) -> Figure:
    """Test accuracies of a run, solid, over the published ones of the same network, dashed.

    history: as for `accuracy_figure`; published: head -> per cent after each epoch from the first.
    The heads differ in their markers too, for black print.
    """
    figure = _figure(title, height=5.4)
    axes = figure.add_subplot(xlabel="epochs of training")
    epochs = [row["epoch"] for row in history]
    for head, marker in (("digit", "o"), ("sum", "s")):
        theirs = published[head]
        numbers = range(1, len(theirs) + 1)
        _draw(axes, "published", head, numbers, theirs, _percent, marker=marker)
        ours = [100 * row[f"test_{head}_accuracy"] for row in history]
        _draw(axes, "ours", head, epochs, ours, _percent, marker=marker)
    _accuracy_axes(axes)
    _finish(axes, "after the last epoch")
    return figure


def confusion_figure(digit_counts: Tensor, sum_counts: Tensor, title: str) -> Figure:
    """Confusion matrices of both heads, counted in pairs of an image and an addend.

    digit_counts: (10, 10) int, sum_counts: (19, 19) int; a row a true class, a column a predicted
    one. Only errors are coloured, by their share of the row: beside the diagonal they would all
    look alike.
    """
    figure = _figure(title, height=6.9)
    # The room beneath the smaller matrix holds the keys to the colours.
    grid = figure.add_gridspec(4, 2, width_ratios=(12, 19), height_ratios=(14, 1, 1, 2))
    digit_axes = figure.add_subplot(grid[0, 0])
    sum_axes = figure.add_subplot(grid[:, 1])
    panels = (("digit", digit_axes, digit_counts), ("sum", sum_axes, sum_counts))
    for row, (head, axes, counts) in enumerate(panels, start=1):
        key = figure.add_subplot(grid[row, 0])
        colours = _draw_confusion(axes, counts, head)
        figure.colorbar(colours, cax=key, orientation="horizontal", extend="max", format="{x:g}")
        key.set_xlabel(f"{head} errors, % of the row")
    note = "Numbers: pairs of an image and an addend.\nGrey: predicted right. Empty: no pair."
    figure.text(0.01, 0.02, note)
    return figure


def predictions_figure(
    images: Tensor,
    digits: Numbers,
    addends: Numbers,
    predicted_digits: Numbers,
    predicted_sums: Numbers,
    title: str,
) -> Figure:
    """Images with what the network makes of them, "7 + 5 = 12", and the truth where that is wrong.

    images: (N, 28, 28) uint8; the others: (N,) int.
    """
    figure, cells = _cells(images, title)
    for axes, digit, addend, predicted_digit, predicted_sum in zip(
        cells, digits, addends, predicted_digits, predicted_sums, strict=True
    ):
        right = bool(predicted_digit == digit and predicted_sum == digit + addend)
        truth = "" if right else f"truth: {digit} + {addend} = {digit + addend}"
        _label(axes, f"{predicted_digit} + {addend} = {predicted_sum}", truth, right)
    keys = (
        Patch(edgecolor=RIGHT_COLOUR, facecolor="none", linewidth=1.5, label="✓ both right"),
        Patch(color=WRONG_COLOUR, label="✗ digit or sum wrong"),
    )
    figure.legend(handles=keys, loc="outside lower center", ncols=2, frameon=False)
    return figure


def mistakes_figure(
    images: Tensor,
    digits: Numbers,
    predicted_digits: Numbers,
    confidences: Numbers,
    indices: Numbers,
    notes: Sequence[str],
    title: str,
) -> Figure:
    """Wrongly read images, or the statement that there are none.

    images: (N, 28, 28) uint8, N from 0; digits: (N,) int, the truth; confidences: (N,) the
    probability given to the wrong digit, a fraction; indices: (N,) int, where in the test set;
    notes: N remarks, drawn over the image unless empty.
    """
    if len(images) == 0:
        figure = _figure(title, height=2.5)
        figure.text(0.5, 0.35, "✓ No mistakes: every digit is right", ha="center", fontsize=16)
        return figure
    figure, cells = _cells(images, title)
    for axes, digit, predicted, confidence, index, note in zip(
        cells, digits, predicted_digits, confidences, indices, notes, strict=True
    ):
        sure = _percent(100 * float(confidence))
        _label(axes, f"{predicted}, truth: {digit}", f"{sure} sure\ntest image {index}", False)
        if note:
            box = {"facecolor": NOTE_COLOUR, "edgecolor": "none", "pad": 2}
            text = textwrap.fill(note, 24)
            axes.text(13.5, 26.5, text, ha="center", va="bottom", fontsize=8, bbox=box)
    return figure


def reading_figure(
    originals: Sequence, pixels: Sequence, digits: Tensor, sums: Tensor, titles: Sequence[str]
) -> Figure:
    """Pictures, what the network saw of them, and the probabilities that it gave: a row each.

    originals: N pictures of Pillow's, RGB; pixels: N of (28, 28) uint8; digits: (N, 10) and sums:
    (N, 19), probabilities; titles: N lines.
    """
    figure = _figure("", height=2.4 * len(originals))
    rows = figure.subplots(len(originals), 4, squeeze=False, width_ratios=(2, 2, 3, 5))
    for places, original, seen, *chances, title in zip(
        rows, originals, pixels, digits, sums, titles, strict=True
    ):
        places[0].imshow(original)
        places[0].set_xlabel("picture")
        places[1].imshow(seen, cmap="gray", vmin=0, vmax=255)
        places[1].set_xlabel("what the network saw")
        for axes in places[:2]:
            axes.set(xticks=[], yticks=[])
        for axes, head, chance in zip(places[2:], ("digit", "sum"), chances, strict=True):
            axes.bar(range(len(chance)), 100 * chance.numpy(), **HEAD_STYLES[head])
            axes.set(xticks=range(len(chance)), ylim=(0, 100), xlabel=head, ylabel="%")
            axes.tick_params(axis="x", labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
        places[3].set_title(title, loc="right", fontsize=11)
    return figure


def _figure(title: str, height: float) -> Figure:
    """An empty figure of the common width, `height` inches high, its title wrapped."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    figure.suptitle(textwrap.fill(title, width=85), x=0.01, ha="left", fontsize=13, weight="bold")
    return figure


def _draw(
    axes: Axes, curve: str, head: str, x: Sequence, y: Sequence, text: Callable, **style
) -> None:
    """One line with about 25 markers, the last value among them and, as `text`, in the legend."""
    spacing = max(1, len(x) // 25)
    markers = {"markersize": 5, "markevery": ((len(x) - 1) % spacing, spacing), "clip_on": False}
    style = markers | CURVE_STYLES[curve] | HEAD_STYLES[head] | style
    axes.plot(x, y, label=f"{head}, {CURVE_NAMES.get(curve, curve)}: {text(y[-1])}", **style)


def _draw_history(
    axes: Axes, splits: Sequence[str], measure: str, history: Sequence[dict], text: Callable
) -> None:
    """A line for each split and head of which the rows have the measure; fractions as per cent."""
    epochs = [row["epoch"] for row in history]
    unit = 100 if measure == "accuracy" else 1
    for split in splits:
        for head in HEAD_STYLES:
            key = f"{split}_{head}_{measure}"
            if key in history[0]:
                _draw(axes, split, head, epochs, [unit * row[key] for row in history], text)


def _finish(axes: Axes, title: str) -> None:
    """The finish of a plot of curves: grid, frame, and a legend beside it, where no curve runs."""
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    place = {"loc": "upper left", "bbox_to_anchor": (1, 1), "frameon": False}
    axes.legend(title=title, alignment="left", **place)


def _percent(accuracy: float) -> str:
    """Per cent as text with two decimals, which says 100 only where there was no error at all."""
    rounded = round(accuracy, 2)
    return "> 99.99 %" if accuracy < 100 and rounded == 100 else f"{rounded:.2f} %"


def _stretch(accuracy: np.ndarray) -> np.ndarray:
    """Height of an accuracy in per cent; beyond 100 %, where margins reach, that of 100 %."""
    return -np.log10(100 + ERROR_OFFSET - np.minimum(accuracy, 100))


def _unstretch(height: np.ndarray) -> np.ndarray:
    return 100 + ERROR_OFFSET - 10 ** -np.asarray(height)


def _accuracy_axes(axes: Axes) -> None:
    """The axes of accuracies after whole epochs: from the tick below all drawn to that above."""
    drawn = np.concatenate([line.get_ydata() for line in axes.lines])
    low = max((tick for tick in ACCURACY_TICKS if tick < min(drawn.min(), 99.5)), default=0)
    high = min(tick for tick in ACCURACY_TICKS if tick >= max(drawn.max(), 5))
    ticks = [high]
    apart = 0.045 * (_stretch(high) - _stretch(low))  # of the axis, lest labels touch
    for tick in reversed(ACCURACY_TICKS):
        if tick >= low and _stretch(ticks[-1]) - _stretch(tick) > apart:
            ticks.append(tick)
    axes.set_yscale("function", functions=(_stretch, _unstretch))
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(low, high)
    axes.set_ylabel("accuracy, % (log scale of the error)")
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def _draw_confusion(axes: Axes, counts: Tensor, head: str) -> ScalarMappable:
    """One matrix with its counts; returns what a key to its colours needs."""
    shares = 100 * counts.double() / counts.sum(dim=1, keepdim=True).clamp(min=1)
    shares.fill_diagonal_(math.nan)
    shares = shares.clamp(min=1e-9).numpy()  # nought has no logarithm, and belongs under the scale
    # From visible for one pair in 11,350 to not too dark for black print.
    full = np.array(to_rgb(HEAD_STYLES[head]["color"]))
    colours = LinearSegmentedColormap.from_list(head, (0.9 + 0.1 * full, 0.2 + 0.8 * full))
    colours = colours.with_extremes(under="white", bad="0.88")
    classes, norm = range(len(counts)), LogNorm(0.005, 10)
    image = axes.pcolormesh(classes, classes, shares, cmap=colours, norm=norm, ec="0.92", lw=0.5)
    for true, predicted in counts.nonzero().tolist():
        count = int(counts[true, predicted])
        text = axes.text(predicted, true, count, ha="center", va="center", fontsize=6.2)
        text.set_in_layout(False)  # the layout need not measure hundreds of them
    axes.set(xticks=classes, yticks=classes, xlabel=f"predicted {head}", ylabel=f"true {head}")
    axes.set(aspect="equal", anchor="N")
    axes.invert_yaxis()
    axes.tick_params(length=0)
    return image


def _cells(images: Tensor, title: str) -> tuple[Figure, list[Axes]]:
    """A figure with the images (N, 28, 28) uint8 in rows of COLUMNS, and their N axes."""
    rows = math.ceil(len(images) / COLUMNS)
    figure = _figure(title, height=1.2 + 2.0 * rows)
    places = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for axes in places[len(images) :]:
        axes.set_axis_off()
    cells = list(places[: len(images)])
    for axes, image in zip(cells, images, strict=True):
        axes.imshow(image.numpy(), cmap="Greys", vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[])
    return figure, cells


def _label(axes: Axes, above: str, beneath: str, right: bool) -> None:
    """Texts of a cell and its verdict, by mark, by width of the frame and by colour."""
    colour = RIGHT_COLOUR if right else WRONG_COLOUR
    box = None if right else {"facecolor": colour, "edgecolor": "none", "pad": 2.5}
    axes.set_title(f"{'✓' if right else '✗'} {above}", fontsize=12, bbox=box)
    axes.set_xlabel(beneath, fontsize=10)
    axes.spines[:].set(color=colour, linewidth=1.5 if right else 4)
