"""Predict digits in images of your own handwriting, and their sums with a number.

python predict.py runs/default samples/five.png --add 7
python predict.py runs/default samples *.jpg --json
python predict.py runs/default --export digits.pt2 --export digits.onnx
"""

import json
import os
import sys
from glob import escape, glob
from mimetypes import guess_type
from pathlib import Path

from training.cli import Parser, exit_status
from training.errors import UserError

from handwriting.export import FORMATS, export
from handwriting.picture import read_picture
from handwriting.predictor import Predictor, load_model, predict
from handwriting.prepare import NO_INK, prepare, upright
from training.checkpoint import training_caveat
from training.console import log, warn
from training.files import write_atomic

MAX_PLOTTED = 20  # images


def parse_args(argv):
    parser = Parser(prog="predict.py", description=__doc__)
    flag = parser.add_argument
    flag("run", help="run directory or checkpoint")
    text = "image of a digit, directory of images, pattern such as *.jpg, or - for stdin"
    flag("image", nargs="*", default=[], help=text)
    text = "addend, 0 to 9 (default: 0)"
    flag("--add", type=int, choices=range(10), default=0, metavar="N", help=text)
    flag("--json", action="store_true", help="print a JSON list with one object per readable image")
    flag("--save-picture", type=Path, metavar="FILE.png", help="plot the images and predictions")
    text = "export the network: .pt2 for PyTorch, .onnx for other runtimes; repeatable"
    flag("--export", type=Path, action="append", default=[], metavar="FILE", help=text)
    args = parser.parse_intermixed_args(argv)  # flags may come between the run and the images
    args.image = [file for name in args.image for file in expand(name)]
    if not args.image and not args.export:
        parser.error("nothing to do: give an image or --export")
    outputs = [(args.save_picture, [".png"]), *((path, FORMATS) for path in args.export)]
    for path, suffixes in outputs:
        if path and path.suffix not in suffixes:
            parser.error(f"{path} does not end in {' or '.join(suffixes)}")
    inputs = map(os.path.realpath, args.image)
    if args.save_picture and os.path.realpath(args.save_picture) in inputs:
        parser.error(f"--save-picture would overwrite the image {args.save_picture}")
    if args.save_picture and len(args.image) > MAX_PLOTTED:
        parser.error(f"--save-picture is limited to {MAX_PLOTTED} images")
    return args


def expand(name):
    """The files that an argument means: itself, the images in a directory, a pattern's matches."""
    if os.path.isdir(name):
        files = sorted(glob(os.path.join(escape(name), "*")))
        types = {file: str(guess_type(file, strict=False)[0]) for file in files}
        return [file for file in files if types[file].startswith("image/")] or [name]
    if os.path.lexists(name):
        return [name]
    return [file for match in sorted(glob(name)) for file in expand(match)] or [name]


@exit_status
def main(argv):
    """Run the command line; the status is 1 if an image could not be read or has no ink."""
    args = parse_args(argv)
    model, checkpoint = load_model(args.run)
    predictor = Predictor(model, checkpoint["recipe"])
    if caveat := training_caveat(checkpoint["flags"]):
        warn(f"warning: the network was trained on {caveat}")
    for file in args.export:
        report = warn if args.json else log  # stdout is for the JSON
        for path in export(file, predictor, checkpoint):
            report(f"exported {path}")

    records, plotted = [], []
    for file in args.image:
        try:
            if file == "-" and not sys.stdin:
                raise UserError("stdin is closed")
            if os.path.isdir(file):
                raise UserError("no images in this directory")
            image = read_picture(sys.stdin.buffer if file == "-" else file)
        except UserError as error:
            warn(f"error: {file}: {error}")
            continue
        prepared = prepare(image)
        record, digits, sums = predict(predictor, prepared, args.add)
        record = {"file": file} | record
        records.append(record)
        line = as_line(record)
        for text in record["warnings"]:
            if args.json or text != line:
                warn(f"warning: {file}: {text}")
        if not args.json:
            log(f"{file}: {line}" if len(args.image) > 1 else line)
        if args.save_picture:
            original = upright(image)
            original.thumbnail((600, 600))  # many photographs would not fit into memory
            plotted.append((original, prepared.pixels, digits, sums, as_title(record)))
    if args.json:
        print(json.dumps(records, indent=2), flush=True)
    if plotted:
        from training import plots  # matplotlib is slow to import

        figure = plots.prediction_figure(plotted)
        write_atomic(args.save_picture, plots.as_png(figure))
    predicted = sum(record["digit"] is not None for record in records)
    return 0 if predicted == len(args.image) else 1


def as_line(record):
    if record["digit"] is None:
        return NO_INK
    percent, sum_percent = (100 * record[f"{name}_probability"] for name in ("digit", "sum"))
    text = "digit {digit} ({percent:.1f} %)  {digit} + {addend} = {sum} ({sum_percent:.1f} %)"
    return text.format(percent=percent, sum_percent=sum_percent, **record)


def as_title(record):
    """The name of a file and the line of its record, and its warnings on a second one."""
    name = Path(record["file"]).name.encode("latin-1", "backslashreplace").decode("latin-1")
    warnings = "; ".join(text for text in record["warnings"] if text != NO_INK)
    return "\n".join(filter(None, [f"{name}: {as_line(record)}", warnings]))


if __name__ == "__main__":
    sys.exit(main())
