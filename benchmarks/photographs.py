"""Count how many simulated photographs and drawings of digits a trained network recognizes.

python -m benchmarks.photographs runs/default

The photographs, in simulation.py and scenes.py, are made from test images of MNIST; drawings.py
draws strokes.
"""

import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.common import BENCHMARKS, markdown, provenance, save_json
from benchmarks.drawings import DRAWINGS, drawing
from benchmarks.scenes import SCENES, SEVERAL_DIGITS
from benchmarks.simulation import DAMAGES, photograph
from dataset import SIDE, load_data
from handwriting.predictor import Predictor, load_model, predict
from handwriting.prepare import SEVERAL, Prepared, prepare
from training.console import Number, Parser, exit_status

COLUMNS = "prepared", "resized", "MNIST", "wrong without warning", "right with warning", SEVERAL
KINDS = (*DAMAGES, *DRAWINGS, *SCENES, *SEVERAL_DIGITS)


def resize(picture):
    """What most published tools do: scale the whole picture to 28x28, in gray, light on dark."""
    pixels = np.array(picture.convert("L").resize((SIDE, SIDE)))
    return Prepared(255 - pixels if pixels.mean() > 127 else pixels)


def make_pictures(kind, test, count, rng):
    """`count` pictures of a kind, their digits int64 (N,), and their MNIST images or None."""
    if kind in DRAWINGS:
        digits, drawn = zip(*(drawing(rng) for _ in range(count)), strict=True)
        return [DRAWINGS[kind](coverage, rng) for coverage in drawn], np.array(digits), None
    if kind in SEVERAL_DIGITS:
        size, scene = SEVERAL_DIGITS[kind]
        chosen = rng.choice(len(test.data), (count, size), replace=False)
        pictures = [scene(images, rng) for images in test.data.numpy()[chosen]]
        return pictures, np.full(count, -1), None  # no single digit is right
    chosen = rng.choice(len(test.data), count, replace=False)
    images = test.data.numpy()[chosen]
    if kind in DAMAGES:
        pictures = [photograph(image, rng, kind) for image in images]
    else:
        pictures = [SCENES[kind](image, rng) for image in images]
    return pictures, test.targets.numpy()[chosen], images


def evaluate(predictor, test, kind, count, rng):
    """How many of `count` pictures of a kind are recognized in each form, as a dict."""
    pictures, digits, images = make_pictures(kind, test, count, rng)

    prepared = [prepare(picture) for picture in pictures]
    several = sum(SEVERAL in one.warnings for one in prepared)
    if kind in SEVERAL_DIGITS:
        return dict.fromkeys(COLUMNS[:-1]) | {COLUMNS[-1]: several}

    def predict_all(images):  # for each: is the digit correct, is there a warning
        records = [predict(predictor, image, addend=0)[0] for image in images]
        right = [r["digit"] == digit for r, digit in zip(records, digits.tolist(), strict=True)]
        return right, [bool(record["warnings"]) for record in records]

    right, warned = predict_all(prepared)
    pairs = list(zip(right, warned, strict=True))
    resized, _ = predict_all([resize(picture) for picture in pictures])
    originals = None if images is None else sum(predict_all(list(map(Prepared, images)))[0])
    silent, doubted = pairs.count((False, False)), pairs.count((True, True))
    counts = sum(right), sum(resized), originals, silent, doubted, several
    return dict(zip(COLUMNS, counts, strict=True))


def table(results):
    """The results file in Markdown, in percent of the pictures: a table, and a line.

    Kinds of which at least 99% are read correctly share a row, as do those of several digits.
    """
    count, lines, easy, several = results["count"], [], [], []

    def shares(rows):
        columns = ([n for n in column if n is not None] for column in zip(*rows, strict=True))
        return [f"{sum(c) / len(c) / count:.1%}" if c else "–" for c in columns]

    for kind, row in results["counts"].items():
        if kind in SEVERAL_DIGITS:
            several.append(f"{kind} {row[SEVERAL] / count:.1%}")
        elif row["prepared"] < 0.99 * count:
            lines.append([kind, *shares([row.values()])])
        else:
            easy.append(row.values())
    lines.append([f"{len(easy)} other kinds", *shares(easy)])
    names = "prepared", "resized", "as in MNIST", "wrong, no warning", "right, warning", SEVERAL
    return markdown(["kind", *names], lines) + f"\n\nSeveral digits: {', '.join(several)}."


def parse_args(argv):
    parser = Parser(prog="photographs.py", description=__doc__)
    flag = parser.add_argument
    flag("run", help="run directory or checkpoint")
    flag("--data-dir", default="data", metavar="DIR", help="dataset root (default: %(default)s)")
    text = "pictures of each kind (default: %(default)s)"
    flag("--count", type=Number(int, 1, 10_000), default=200, metavar="N", help=text)
    flag("--seed", type=Number(int, 0, 2**32 - 1), default=0, metavar="N", help="default: 0")
    text = "results file (default: %(default)s)"
    flag("--output", type=Path, default=BENCHMARKS / "photographs.json", metavar="FILE", help=text)
    return parser.parse_args(argv)


@exit_status
def main(argv):
    args = parse_args(argv)
    model, checkpoint = load_model(args.run)
    predictor = Predictor(model, checkpoint["recipe"])
    test = load_data("mnist", args.data_dir).test
    counts = {}
    for index, kind in enumerate(tqdm(KINDS, "photographs", leave=False, disable=None)):
        rng = np.random.default_rng([args.seed, index])
        counts[kind] = evaluate(predictor, test, kind, args.count, rng)
    results = {"count": args.count, "seed": args.seed, "counts": counts}
    print(table(results))
    save_json(args.output, provenance("photographs", argv) | results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
