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

from training.console import Parser, UserError, exit_status, log, path, warn
from training.files import write_atomic

MAX_PLOTTED = 20  # images


def parse_args(argv):
    parser = Parser(prog="predict.py", description=__doc__)
    flag = parser.add_argument
    flag("run", type=path, help="run directory or checkpoint")
    text = "image of a digit, directory of images, pattern such as *.jpg, or - for stdin"
    flag("image", type=path, nargs="*", default=[], help=text)
    text = "addend, 0 to 9 (default: 0)"
    flag("--add", type=int, choices=range(10), default=0, metavar="N", help=text)
    flag("--json", action="store_true", help="print a JSON list with one object per readable image")
    flag("--save-picture", type=path, metavar="FILE.png", help="plot the images and predictions")
    text = "export the network: .pt2 for PyTorch, .onnx for other runtimes; repeatable"
    flag("--export", type=path, action="append", default=[], metavar="FILE", help=text)
    args = parser.parse_intermixed_args(argv)  # flags may come between the run and the images
    args.image = [file for name in args.image for file in expand(name)]
    if not args.image and not args.export:
        parser.error("nothing to do: give an image or --export")
    outputs = [(args.save_picture, [".png"]), *((file, [".pt2", ".onnx"]) for file in args.export)]
    for file, suffixes in outputs:
        if file and Path(file).suffix not in suffixes:
            parser.error(f"{file} does not end in {' or '.join(suffixes)}")
    if args.save_picture and len(args.image) > MAX_PLOTTED:
        parser.error(f"--save-picture is limited to {MAX_PLOTTED} images")
    inputs = map(os.path.realpath, args.image)
    if args.save_picture and os.path.realpath(args.save_picture) in inputs:
        parser.error(f"--save-picture would overwrite the image {args.save_picture}")
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
    # Not at the top, because torch takes too long for --help and wrong usage.
    from handwriting.export import export
    from handwriting.picture import read_picture
    from handwriting.predictor import Predictor, load_model, predict
    from handwriting.prepare import as_rgb, prepare
    from training.checkpoint import training_caveat

    sys.stdout.reconfigure(errors="backslashreplace")  # file names can have any bytes
    model, checkpoint = load_model(args.run)
    predictor = Predictor(model, checkpoint["recipe"])
    if caveat := training_caveat(checkpoint["flags"]):
        warn(f"warning: the network was trained on {caveat}")
    report = warn if args.json else log  # stdout is for the JSON
    for file in args.export:
        for written in export(Path(file), predictor, checkpoint):
            report(f"exported {written}")

    records, plotted = [], []
    for file in args.image:
        try:
            image = read_picture(sys.stdin.buffer if file == "-" else file)
        except UserError as error:
            warn(f"error: {file}: {error}")
            continue
        prepared = prepare(image)
        record, digits, sums = predict(predictor, prepared, args.add)
        records.append({"file": file} | record)
        line = as_line(record)
        notes = [text for text in record["warnings"] if text != line]
        for text in record["warnings"] if args.json else notes:
            warn(f"warning: {file}: {text}")
        if not args.json:
            log(f"{file}: {line}" if len(args.image) > 1 else line)
        if args.save_picture:
            original = as_rgb(image)
            original.thumbnail((600, 600))  # many photographs would not fit into memory
            title = "\n".join([f"{Path(file).name}: {line}", *notes])
            plotted.append((original, prepared.pixels, digits, sums, title))
    if args.json:
        log(json.dumps(records, indent=2))
    if plotted:
        from handwriting.plot import prediction_figure  # matplotlib is slow to import
        from training.plots import as_png

        write_atomic(Path(args.save_picture), as_png(prediction_figure(plotted)))
    predicted = sum(record["digit"] is not None for record in records)
    return 0 if predicted == len(args.image) else 1


def as_line(record):
    """The prediction, or why there is none."""
    if record["digit"] is None:
        return "; ".join(record["warnings"])
    percent, sum_percent = (100 * record[f"{name}_probability"] for name in ("digit", "sum"))
    text = "digit {digit} ({percent:.1f} %)  {digit} + {addend} = {sum} ({sum_percent:.1f} %)"
    return text.format(percent=percent, sum_percent=sum_percent, **record)


if __name__ == "__main__":
    sys.exit(main())
