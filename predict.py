"""Read digits in pictures with a trained network, and add a number to them.

python predict.py runs/default five.png --add 7
python predict.py runs/default *.jpg --json
python predict.py runs/default --export digits.pt2
"""

import io
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cli import UsageError, exit_status, predict_parser, say, warn
from dataset import NUM_DIGITS, SIDE
from handwriting import PictureError, prepare, read_picture, upright
from learner import restore
from rundir import as_png, find_checkpoint, load_checkpoint, write_whole
from scores import unsmoothed

BATCH = 256  # pictures
UNSURE = 0.8  # a digit less probable than this is doubtful
DRAWN = 20  # pictures at most that --save-picture draws
MODEL_CARD = """# {name}

Reads a handwritten digit, and adds a number to it.

- Task: a 28 x 28 picture, light on dark as MNIST's, and a number from 0 to 9, to the probabilities
  of the ten digits and of the nineteen sums.
- Network: recipe `{recipe}`, {parameters:,} parameters, {epochs} epochs, seed {seed}.
- Data: {dataset}.
- Figures on its test set, each image with all ten numbers: digit {digit:.2f} %, sum {sum:.2f} %.
- Speed where it was exported (threads: {threads}): one picture {latency:.2f} ms; {throughput:,.0f}
  pictures a second in batches of {batch}.
- Limits: one digit a picture, prepared as MNIST's were (20 pixels in its longer side, centred by
  mass): `handwriting.py` does that. What is no digit is read as one all the same.

```python
import torch
network = torch.export.load("{name}").module()
pixels = torch.zeros(1, 28, 28, dtype=torch.uint8)  # any number of pictures
addends = torch.tensor([7])
digit_probabilities, sum_probabilities = network(pixels, addends)  # (1, 10), (1, 19)
```
"""


class Predictor(nn.Module):
    """A trained network from pixels to probabilities, with its preparation inside."""

    def __init__(self, state):
        super().__init__()
        self.network = restore(state)
        recipe = state["recipe"]
        self.mean, self.std = recipe["mean"], recipe["std"]
        self.smoothing = recipe["label_smoothing"]

    def forward(self, pixels, addends):
        """uint8 (B, 28, 28) and int64 (B,) to probabilities of digits (B, 10) and sums (B, 19)."""
        images = (pixels.unsqueeze(1).float() / 255 - self.mean) / self.std
        both = self.network(images, F.one_hot(addends, NUM_DIGITS).float())
        return tuple(unsmoothed(log_probs.exp(), self.smoothing) for log_probs in both)


def read(files, keep):
    """Read and prepare pictures; those that can't be read are reported on stderr.

    Returns three lists: the files that could be read, the pictures prepared, and, if they are to be
    kept, the pictures themselves: those of a folder of photographs might not fit into memory.
    """
    readable, prepared, pictures = [], [], []
    for file in files:
        try:
            picture = read_picture(sys.stdin.buffer if file == "-" else file)
            prepared.append(prepare(picture))
        except PictureError as error:
            warn(f"error: {file}: {error}")
        else:
            readable.append(file)
            if keep:
                pictures.append(picture)
    return readable, prepared, pictures


@torch.no_grad()
def predict(predictor, prepared, addend):
    """Probabilities of digits (N, 10) and of sums (N, 19) for N prepared pictures."""
    pixels = torch.from_numpy(np.stack([one.pixels for one in prepared]))  # (N, 28, 28)
    addends = torch.full((len(pixels),), addend)
    batches = zip(pixels.split(BATCH), addends.split(BATCH), strict=True)
    digits, sums = zip(*(predictor(*batch) for batch in batches), strict=True)
    return torch.cat(digits), torch.cat(sums)


def as_record(file, prepared, digit_probabilities, sum_probabilities, addend):
    """What is to be said of one picture, in plain types."""
    digit_probability, digit = digit_probabilities.max(dim=0)
    sum_probability, total = sum_probabilities.max(dim=0)
    warnings = list(prepared.warnings)
    if digit_probability < UNSURE:
        warnings.append("the digit is doubtful")
    return {
        "file": file,
        "digit": int(digit),
        "digit_probability": float(digit_probability),
        "addend": addend,
        "sum": int(total),
        "sum_probability": float(sum_probability),
        "warnings": warnings,
    }


def as_line(record):
    """A record as a line to read."""
    digit, total = record["digit"], record["sum"]
    return (
        f"digit {digit} ({100 * record['digit_probability']:.1f} %)  "
        f"{digit} + {record['addend']} = {total} ({100 * record['sum_probability']:.1f} %)"
    )


def seconds_a_call(predictor, count):
    """Median time that the prediction of `count` pictures takes, in seconds."""
    pixels, addends = torch.zeros(count, SIDE, SIDE, dtype=torch.uint8), torch.zeros(count).long()
    times = []
    with torch.no_grad():
        for _ in range(12):
            start = time.perf_counter()
            predictor(pixels, addends)
            times.append(time.perf_counter() - start)
    return statistics.median(times[2:])  # the first ones prepare the kernels


def caveat(flags):
    """What must be known of the data that a network was trained on; "" if nothing."""
    synthetic = "synthetic digits, NOT MNIST" if flags["dataset"] != "mnist" else ""
    dry = "a few batches of a dry run" if flags["dry_run"] else ""
    return "; ".join(filter(None, [synthetic, dry]))


def export(predictor, state, file):
    """Write the network with torch.export, for any number of pictures, and a model card beside it.

    Returns the paths of both.
    """
    example = torch.zeros(2, SIDE, SIDE, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    batch = {0: torch.export.Dim("batch")}
    with torch.no_grad():
        program = torch.export.export(predictor, example, dynamic_shapes=(batch, batch))
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            node.meta.pop("stack_trace", None)  # the paths of this machine
    content = io.BytesIO()
    torch.export.save(program, content)
    flags, row = state["flags"], state["history"][-1]
    paths = Path(file), Path(f"{file}.md")
    card = MODEL_CARD.format(
        name=paths[0].name,
        recipe=flags["recipe"],
        parameters=sum(p.numel() for p in predictor.parameters()),
        epochs=row["epoch"],
        seed=flags["seed"],
        dataset=caveat(flags) or "MNIST",
        digit=100 * row["test_digit_accuracy"],
        sum=100 * row["test_sum_accuracy"],
        threads=torch.get_num_threads(),
        latency=1000 * seconds_a_call(predictor, 1),
        throughput=BATCH / seconds_a_call(predictor, BATCH),
        batch=BATCH,
    )
    write_whole(paths[0], content.getbuffer())
    write_whole(paths[1], card.encode())
    return paths


def main(argv=None):
    """Run the command line `argv`, by default the process's own; returns the exit status."""
    return exit_status(partial(run, sys.argv[1:] if argv is None else list(argv)))


def run(argv):
    """Read the pictures that can be read; returns 1 if one could not."""
    args = predict_parser(__doc__).parse_args(argv)
    if not args.image and not args.export:
        raise UsageError("there is nothing to do; name a picture, or give --export")
    if args.save_picture and len(args.image) > DRAWN:
        raise UsageError(f"--save-picture draws at most {DRAWN} pictures; name fewer")
    state = load_checkpoint(find_checkpoint(args.run))
    predictor = Predictor(state)
    if unfit := caveat(state["flags"]):
        warn(f"warning: the network was trained on {unfit}")
    if args.export:
        for path in export(predictor, state, args.export):
            say(f"exported {path}", sys.stderr if args.json else sys.stdout)
    files, prepared, pictures = read(args.image, keep=bool(args.save_picture))
    records = []
    if files:
        digits, sums = predict(predictor, prepared, args.add)
        records = [
            as_record(*row, args.add) for row in zip(files, prepared, digits, sums, strict=True)
        ]
        if args.save_picture:
            import plots

            seen = [one.pixels for one in prepared]
            lines = [as_line(record) for record in records]
            shown = [upright(picture) for picture in pictures]
            figure = plots.reading_figure(shown, seen, digits, sums, lines)
            write_whole(Path(args.save_picture), as_png(figure))
    for record in records:
        for text in record["warnings"]:
            warn(f"warning: {record['file']}: {text}")
    if args.json:
        say(json.dumps(records, indent=2))
    else:
        for record in records:
            say(f"{record['file']}: {as_line(record)}" if len(args.image) > 1 else as_line(record))
    return 0 if len(files) == len(args.image) else 1


if __name__ == "__main__":
    sys.exit(main())
