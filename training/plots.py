"""Plots of a run, as figures made without pyplot: no display needed."""

import io
import itertools
import math
import textwrap

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator

from dataset import NUM_DIGITS, NUM_SUMS
from model import probabilities

COLUMNS, MAX_IMAGES = 8, 24  # of the plots made of images
CORRECT_COLOR, WRONG_COLOR = "#009E73", "#CC79A7"  # Okabe-Ito, safe for color-blind readers
OUTPUT_COLORS = {"digit": "#0072B2", "sum": "#D55E00", "both": "#000000"}
SPLIT_STYLES = {
    "train": {"lw": 1, "alpha": 0.7, "marker": "."},
    "val": {"ls": ":", "marker": "."},
    "test": {"lw": 2, "marker": "."},
}


def as_png(figure):
    """The content of a PNG file with the figure, bytes-like."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getbuffer()


def run_figures(history, curve, predictions, images, addends, head, title):
    """Yield all plots of a run, with their file names. Tensors are on the CPU.

    history: the rows of metrics.csv; curve: training metrics at parts of epochs; predictions: of
    the N test images; images: uint8 (N, 28, 28); addends: int64 (N,), the one to show with each.
    """
    yield "loss.png", curves_figure("loss", curve, history, title)
    yield "accuracy.png", curves_figure("accuracy", history, history, title)
    yield "confusion_matrix.png", confusion_figure(*predictions.confusion(), title)
    yield "addition.png", addition_figure(predictions, title)
    yield "predictions.png", samples_figure(predictions, images, addends, title)
    yield "mistakes.png", mistakes_figure(predictions, images, title)
    if hasattr(head, "numbers"):
        yield "numbers.png", numbers_figure(head.planes(), title)


def curves_figure(metric, train_rows, history, title):
    """The "loss" or the error rate ("accuracy") of both outputs against the epoch."""
    if metric == "loss":
        heading, ylabel = "Loss", "loss, nats (log scale)"
        note = "KL divergence from the label, smoothed as in training, to the prediction."
    else:
        heading, ylabel = "Error rate", "error rate, % (log scale)"
        note = "Training errors are counted during the epoch, all others after it."
    figure = new_figure(heading, title, 5.6, note, right=2)
    axes = figure.add_subplot(xlabel="epoch", ylabel=ylabel, yscale="log")
    drawn = []
    for split, output in itertools.product(SPLIT_STYLES, OUTPUT_COLORS):
        key = f"{split}_{output}_{metric}"
        if key not in history[0]:
            continue
        rows = train_rows if split == "train" else history
        values = [row[key] for row in [*rows, history[-1]]]
        if metric == "accuracy":
            values = [100 - 100 * value for value in values]
        label = f"{output}, {split}: {values.pop():.3g}"
        style = SPLIT_STYLES[split] | {"color": OUTPUT_COLORS[output]}
        axes.plot([row["epoch"] for row in rows], values, label=label, **style)
        drawn += [value for value in values if value > 0]
    drawn = drawn or [0.1]  # zeros are below a log scale
    axes.set_ylim(min(drawn) / 1.6, 1.6 * max(drawn))  # always contains a tick
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.locator_params(axis="x", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    axes.grid(color="0.9")
    axes.legend(title="in the last epoch", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def new_figure(heading, subtitle, height, note="", right=0.2):
    """An empty figure, 10 inches (1,500 pixels) wide, with texts at the top and the bottom.

    right: the margin there, in inches. Matplotlib's automatic layouts take seconds.
    """
    figure = Figure(figsize=(10, height), dpi=150)
    lines = [heading, *textwrap.wrap(subtitle, width=100)]
    figure.text(0.012, 1 - 0.1 / height, "\n".join(lines), va="top", fontsize=12, linespacing=1.5)
    figure.text(0.012, 0.1 / height, note, va="bottom", fontsize=9, linespacing=1.4)
    top, bottom = 0.45 + 0.26 * len(lines), 0.75 + 0.18 * note.count("\n")
    figure.subplots_adjust(0.07, bottom / height, 1 - right / 10, 1 - top / height)
    return figure


def confusion_figure(digit_counts, sum_counts, title):
    """Confusion matrices of both outputs, one row per true class; only errors are colored."""
    note = "Digit: by mean probability over the ten addends."
    figure = new_figure("Confusion matrices of the test set", title, 7.2, note)
    left, right = figure.subplots(1, 2, width_ratios=(12, 19))
    for axes, counts, text, size in (
        (left, digit_counts, "Digit: number of images", 9),
        (right, sum_counts, "Sum: number of (image, addend) pairs", 6.5),
    ):
        shares = 100 * counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
        shares.fill_diagonal_(0)  # on the log scale, zero has no color
        colors = axes.imshow(shares.numpy(), cmap="Oranges", norm=LogNorm(1e-3, 100), alpha=0.7)
        axes.set(title=text, xlabel="predicted", ylabel="true", anchor="N")
        axes.set(xticks=range(len(counts)), yticks=range(len(counts)))
        style = {"ha": "center", "va": "center", "fontsize": size}
        for true, predicted in counts.nonzero().tolist():
            axes.text(predicted, true, int(counts[true, predicted]), **style)
    style = {"location": "bottom", "format": "{x:g}", "label": "errors, % of the row"}
    figure.colorbar(colors, cax=left.inset_axes((0, -0.35, 1, 0.05)), **style)
    return figure


def addition_figure(predictions, title):
    """The sum predicted most often for each true digit and addend, colored by it."""
    shares, unseen = predictions.addition(), predictions.unseen
    note = "Below a sum: the accuracy, if less than 99.95 %. Bold and red: not the correct sum."
    note += "\nOutlined: pairs that never occurred in training." if unseen is not None else ""
    figure = new_figure("Addition table: the sum predicted most often", title, 6.6, note)
    axes = figure.add_subplot(xlabel="addend", ylabel="true digit")
    axes.set(xticks=range(NUM_DIGITS), yticks=range(NUM_DIGITS))
    sums = shares.argmax(dim=2).where(~shares[:, :, 0].isnan(), math.nan)
    axes.imshow(sums.numpy(), cmap="turbo", vmin=0, vmax=NUM_SUMS - 1, alpha=0.6, aspect="auto")
    style = {"ha": "center", "va": "center"}
    for digit, addend in (sums >= 0).nonzero().tolist():
        total, accuracy = int(sums[digit, addend]), 100 * shares[digit, addend, digit + addend]
        wrong = {} if total == digit + addend else {"color": "#B00000", "weight": "bold"}
        axes.text(addend, digit - 0.1, total, fontsize=14, **wrong, **style)
        if accuracy < 99.95:
            axes.text(addend, digit + 0.3, f"{accuracy:.1f} %", fontsize=8, **style)
    for digit, addend in unseen.nonzero().tolist() if unseen is not None else []:
        corner = addend - 0.46, digit - 0.44
        axes.add_patch(Rectangle(corner, 0.92, 0.88, fill=False, edgecolor="black", linewidth=1.5))
    return figure


def numbers_figure(planes, title):
    """The numbers 0 to 18, complex (19, C), in the plane of each component that is used."""
    sizes = planes.abs().amax(dim=0)
    planes = planes[:, sizes > 0.1 * sizes.max()]
    note = "Multiplying two complex numbers adds their angles. So the network adds if equal steps"
    note += " from number to number\nare equal angles: then 3 times 4 points in the direction of 7."
    rows = math.ceil(planes.shape[1] / 4)
    figure = new_figure("The numbers that the network has learned", title, 1.3 + 2.7 * rows, note)
    colors = [OUTPUT_COLORS["digit" if i < NUM_DIGITS else "sum"] for i in range(NUM_SUMS)]
    for i, numbers in enumerate(planes.T, start=1):
        x, y = numbers.real.tolist(), numbers.imag.tolist()
        axes = figure.add_subplot(rows, 4, i, aspect="equal", xticks=[0], yticks=[0])
        axes.set(xticklabels=[], yticklabels=[])
        axes.grid(color="0.85")
        axes.margins(0.12)
        axes.plot(x, y, color="0.75", lw=0.8)
        axes.scatter(x, y, s=6, c=colors)
        for number, color in enumerate(colors):
            style = {"color": color, "fontsize": 9, "ha": "center", "va": "bottom"}
            axes.text(x[number], y[number], number, **style)
    return figure


def samples_figure(predictions, images, addends, title):
    """The first test images, each with one addend: predicted digit and sum, their probabilities."""
    cells = []
    for index, addend in enumerate(addends[:MAX_IMAGES].tolist()):
        outputs = (log_probs[index, addend] for log_probs in predictions[:2])
        probs = (probabilities(output, predictions.label_smoothing) for output in outputs)
        (digit_p, digit), (sum_p, total) = (p.max(dim=0) for p in probs)
        true = int(predictions.digits[index])
        correct = (digit, total) == (true, true + addend)
        below = f"digit {100 * digit_p:.1f} %\nsum {100 * sum_p:.1f} %"
        below += "" if correct else f"\ncorrect: {true} + {addend} = {true + addend}"
        cells.append((images[index], f"{digit} + {addend} = {total}", below, correct))
    heading = f"Predictions for the first {len(cells)} test images"
    return image_grid(cells, heading, title, "Predicted digit + addend = predicted sum.")


def mistakes_figure(predictions, images, title):
    """The misread images of which the network is most certain."""
    mistakes = predictions.mistakes()
    cells = []
    for index, label, predicted, confidence in mistakes[:MAX_IMAGES]:
        below = f"{100 * confidence:.1f} %\nimage {index}"
        cells.append((images[index], f"{predicted}, label {label}", below, False))
    heading = f"Most confident mistakes: {len(mistakes):,} of {len(images):,} digits"
    return image_grid(cells, heading, title, "Mean probability over the ten addends.")


def image_grid(cells, heading, title, note):
    """Cells (image, text above, text below, correct) in rows of COLUMNS."""
    rows = max(1, math.ceil(len(cells) / COLUMNS))
    figure = new_figure(heading, title, 1.5 + 1.75 * rows, note)
    figure.subplots_adjust(0.012, right=0.988)
    axes = figure.add_subplot()  # one for all cells, because one each takes seconds to draw
    for i, (image, above, below, correct) in enumerate(cells):
        y, x = divmod(i, COLUMNS)
        left, right, top, bottom = x + 0.12, x + 0.88, y + 0.14, y + 0.68
        extent = left, right, bottom, top
        axes.imshow(image.numpy(), extent=extent, cmap="Greys", vmin=0, vmax=255)
        color = CORRECT_COLOR if correct else WRONG_COLOR
        frame = {"fill": False, "edgecolor": color, "linewidth": 3}
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, **frame))
        mark = "✓" if correct else "✗"
        axes.text(x + 0.5, top - 0.03, f"{mark} {above}", fontsize=11, ha="center", va="bottom")
        axes.text(x + 0.5, bottom + 0.04, below, fontsize=8, ha="center", va="top")
    axes.set(xlim=(0, COLUMNS), ylim=(rows, 0), aspect="auto")
    axes.axis("off")
    return figure
