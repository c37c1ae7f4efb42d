"""The plot of predict.py: pictures, what the network sees of them, and what it predicts."""

from matplotlib.figure import Figure

from training.plots import OUTPUT_COLORS


def prediction_figure(predictions):
    """A row per image: the original, the input of the network, the probabilities of both outputs.

    A prediction: a Pillow image, uint8 (28, 28), probabilities (10,) and (19,), a title.
    """
    height = 0.5 + 2.4 * len(predictions)
    figure = Figure(figsize=(10, height), dpi=150, layout="constrained")
    rows = figure.subfigures(len(predictions), 1, squeeze=False).flatten()
    for row, (image, pixels, digits, sums, title) in zip(rows, predictions, strict=True):
        drawable = title.encode("latin-1", "backslashreplace").decode("latin-1")
        row.suptitle(drawable, x=0.012, ha="left", parse_math=False)
        original, network_input, *bars = row.subplots(1, 4, width_ratios=(2, 2, 3, 6))
        original.imshow(image)
        original.set(xticks=[], yticks=[], xlabel="original")
        network_input.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        network_input.set(xticks=[], yticks=[], xlabel="input of the network")
        for axes, output, values in zip(bars, ("digit", "sum"), (digits, sums), strict=True):
            classes = range(len(values))
            axes.bar(classes, 100 * values.numpy(), color=OUTPUT_COLORS[output])
            axes.set(xticks=classes, ylim=(0, 100), xlabel=output, ylabel="probability, %")
            axes.tick_params(axis="x", labelsize=8)
    return figure
