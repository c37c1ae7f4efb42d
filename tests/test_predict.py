"""predict.py: predictions for pictures, their output, and the exported network."""

import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import predict
import train
from handwriting import plot
from handwriting.predictor import Predictor, load_model
from handwriting.prepare import NO_INK, prepare
from synthetic import synthetic_mnist
from training import plots


def prepared_digits(split, count):
    """Synthetic digits, normalized as those of MNIST, so that a network can learn from them."""
    digits = synthetic_mnist(split, count)
    pixels = [prepare(Image.fromarray(image)).pixels for image in digits.data.numpy()]
    return SimpleNamespace(data=torch.from_numpy(np.stack(pixels)), targets=digits.targets)


DIGITS = prepared_digits("test", 40)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that has learned to recognize such digits."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    source = SimpleNamespace(name="mnist", train=prepared_digits("train", 1000), test=DIGITS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_data", lambda *args: source)
        patch.setattr(plots, "run_figures", lambda *args: [])
        flags = ["--recipe", "fast", "--epochs", "6", "--batch-size", "50", "--quiet"]
        assert train.main([*flags, "--output-dir", str(directory)]) == 0
    return directory / "last.pt"


@pytest.fixture
def trained(workdir, checkpoint):
    """A run directory with it in the current directory."""
    (workdir / "run").mkdir()
    return Path(shutil.copy(checkpoint, workdir / "run")).parent


@pytest.fixture
def pictures(workdir):
    """Picture files of digits, dark on light, enlarged: a list of (file, digit)."""
    files = []
    for i, (pixels, digit) in enumerate(zip(DIGITS.data, DIGITS.targets.tolist(), strict=True)):
        picture = Image.fromarray(255 - pixels.numpy()).resize((112, 112), Image.Resampling.BICUBIC)
        picture.save(workdir / f"{i}.png")
        files.append((f"{i}.png", digit))
    return files


@pytest.fixture
def command(trained, capsys):
    """predict.py in this process: command(argument, ...) -> (exit status, stdout, stderr)."""

    def call(*arguments):
        capsys.readouterr()
        status = predict.main([str(trained), *map(str, arguments)])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def exported_onnx(command):
    """digits.onnx; skips the test if torch is too old for the installed exporter."""
    status, out, err = command("--export", "digits.onnx")
    if torch.__version__ < "2.11" and "install a newer version" in err:
        assert (status, out) == (1, "") and re.fullmatch(r"error: [^\n]+\n", err)
        pytest.skip(err.strip())
    assert (status, out) == (0, "exported digits.onnx\nexported digits.onnx.md\n")
    return Path("digits.onnx")


def load_predictor(run):
    model, checkpoint = load_model(run)
    return Predictor(model, checkpoint["recipe"])


def change_checkpoint(run, key, values):
    checkpoint = torch.load(run / "last.pt")
    checkpoint[key] |= values
    torch.save(checkpoint, run / "last.pt")


def test_the_order_of_flags_and_pictures_does_not_matter(command, pictures):
    expected = command("0.png", "1.png", "--json", "--add", 7)
    assert expected[0] == 0
    assert command("--json", "0.png", "--add", 7, "1.png") == expected


def test_several_pictures_are_recognized_and_labeled_with_their_names(command, pictures):
    files, digits = zip(*pictures, strict=True)
    status, out, _ = command(*files, "--add", 3, "--json")
    records = json.loads(out)
    assert status == 0 and [record["file"] for record in records] == list(files)
    correct = [r["digit"] == digit for r, digit in zip(records, digits, strict=True)]
    sums = [r["sum"] == digit + 3 for r, digit in zip(records, digits, strict=True)]
    assert sum(correct) >= 36 and sum(sums) >= 36
    keys = {"file", "digit", "digit_probability", "addend", "sum", "sum_probability", "warnings"}
    assert set(records[0]) == keys
    assert re.findall("^(.*): digit", command(*files[:3])[1], re.M) == list(files[:3])


def test_a_pattern_means_its_matches_and_a_directory_its_pictures(command, pictures):
    """In shells that leave patterns to the program, as on Windows."""
    inside = [os.path.join("photos [1]", name) for name in ("2 [x].PNG", "3.png")]
    os.mkdir("photos [1]")
    for file in (*inside, os.path.join("photos [1]", "notes.txt")):
        shutil.copy("0.png", file)

    def files(*arguments):
        return [one["file"] for one in json.loads(command(*arguments, "--json")[1])]

    assert files("1?.png") == [f"1{i}.png" for i in range(10)]
    assert files("photos [1]", "1.png") == [*inside, "1.png"]
    assert files("photos*") == inside
    assert files(inside[0]) == inside[:1]  # a file, although it looks like a pattern
    os.mkdir("empty")
    for nothing in ("empty", "*.tif"):
        status, out, err = command(nothing, "0.png")
        assert status == 1 and re.fullmatch(f"error: {re.escape(nothing)}: [^\n]+\n", err)
        assert out.startswith("0.png: digit ")


OTHER_PIXELS = DIGITS.data / 255, DIGITS.data[:, :27], DIGITS.data[:, None], DIGITS.data[0]


@pytest.mark.parametrize("pixels", OTHER_PIXELS)
def test_pixels_of_another_type_or_shape_are_refused(trained, pixels):
    with pytest.raises(ValueError, match="28, 28"):
        load_predictor(trained)(pixels, torch.zeros(40).long())


def test_the_line_of_a_picture_from_standard_input(command, pictures, monkeypatch, workdir):
    file, digit = pictures[1]
    stream = SimpleNamespace(buffer=io.BytesIO((workdir / file).read_bytes()))
    monkeypatch.setattr(predict.sys, "stdin", stream)
    status, out, _ = command("-", "--add", 7)
    line = rf"digit {digit} \(\d+\.\d %\)  {digit} \+ 7 = {digit + 7} \(\d+\.\d %\)\n"
    assert status == 0 and re.fullmatch(line, out), out


def test_an_unreadable_picture_is_reported_and_the_others_are_predicted(command, pictures):
    Path("text.png").write_text("not an image")
    with Image.open("2.png") as image:
        image.save("exif.jpg", exif=b"Exif\0\0garbage!")  # is ignored
    status, out, err = command("0.png", "text.png", "missing.png", "exif.jpg", "1.png")
    assert status == 1 and re.findall("^(.*): digit", out, re.M) == ["0.png", "exif.jpg", "1.png"]
    assert re.fullmatch("error: text.png: [^\n]+\nerror: missing.png: [^\n]+\n", err)


def test_a_picture_without_ink_has_no_digit(command, pictures):
    Image.new("L", (100, 100), 255).save("white.png")
    status, out, err = command("white.png", "0.png", "--save-picture", "plot.png")
    assert (status, err) == (1, "") and out.startswith(f"white.png: {NO_INK}\n0.png: digit ")
    status, out, err = command("white.png", "--json")
    (record,) = json.loads(out)
    names = ("digit", "digit_probability", "sum", "sum_probability")
    assert status == 1 and [record[name] for name in names] == [None] * 4
    assert record["warnings"] == [NO_INK] and err == f"warning: white.png: {NO_INK}\n"


def test_the_plot_does_not_overwrite_a_picture(command, pictures):
    content = Path("0.png").read_bytes()
    assert command("0.png", "1.png", "--save-picture", "./0.png")[0] == 2
    assert Path("0.png").read_bytes() == content


WRONG = "0.png --add 10", "", "''", "--export ''", "--export x.txt", "0.png --save-picture x.jpg"


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_usage_is_one_line_and_status_2(command, arguments):
    status, out, err = command(*shlex.split(arguments))
    assert (status, out) == (2, "") and re.fullmatch(r"error: [^\n]+\n", err), err


@pytest.mark.parametrize("place", ["nowhere", "empty", "file", "run"])
def test_a_run_without_a_usable_checkpoint_is_one_line(command, trained, place, capsys):
    Path("empty").mkdir()
    Path("file").write_bytes(b"PK\x03\x04 not a checkpoint")
    change_checkpoint(trained, "recipe", {"encoder": "standard"})  # another network
    assert predict.main([place, "0.png"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"error: [^\n]+\n", err), err


def test_a_plot_shows_pictures_upright_on_white_with_names_and_warnings(command, monkeypatch):
    draw, rows = plot.prediction_figure, []
    monkeypatch.setattr(plot, "prediction_figure", lambda new: rows.extend(new) or draw(new))
    two = Image.new("RGBA", (100, 60))  # transparent: white
    for left in (20, 70):
        two.paste("black", (left, 10, left + 6, 50))
    two.save("two.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    two.save("turned.png", exif=turned)
    assert command("two.png", "turned.png", "--save-picture", "plot.png")[0] == 0
    (picture, *_, title), (upright, *_) = rows
    assert picture.getextrema() == ((0, 255),) * 3
    assert picture.size == (100, 60) and upright.size == (60, 100)
    assert title.startswith("two.png: digit ") and "\nmore than one digit" in title
    with Image.open("plot.png") as image:
        assert image.width == 1500


@pytest.mark.parametrize(
    "flags, caveat", [({"dataset": "synthetic"}, "NOT MNIST"), ({"dry_run": True}, "DRY RUN")]
)
def test_a_network_not_trained_on_all_of_mnist_gives_a_warning(
    command, trained, pictures, flags, caveat
):
    change_checkpoint(trained, "flags", flags)
    status, _, err = command("0.png", "--export", "digits.pt2")
    assert status == 0 and re.match(f"warning: [^\n]*{caveat}", err)
    assert caveat in Path("digits.pt2.md").read_text()


def test_with_json_exports_are_reported_on_stderr(command, pictures):
    status, out, err = command("0.png", "--json", "--export", "one.pt2", "--export", "two.pt2")
    assert status == 0 and len(json.loads(out)) == 1
    assert err == "".join(f"exported {n}.pt2\nexported {n}.pt2.md\n" for n in ("one", "two"))


def test_the_exported_network_gives_the_same_and_the_code_in_its_card_runs(command, trained):
    status, out, _ = command("--export", "digits.pt2")
    assert status == 0 and out == "exported digits.pt2\nexported digits.pt2.md\n"
    with zipfile.ZipFile("digits.pt2") as archive:  # no paths of this machine
        for part in archive.namelist():
            assert str(ROOT).encode() not in archive.read(part), part
    network = load_predictor(trained)
    exported = torch.export.load("digits.pt2").module()
    for count in (1, 2, 40):
        pixels, addends = DIGITS.data[:count], torch.arange(count) % 10
        with torch.no_grad():
            both = zip(exported(pixels, addends), network(pixels, addends), strict=True)
        for ours, theirs in both:
            torch.testing.assert_close(ours, theirs)
    digit, _ = exported(DIGITS.data, torch.zeros(40).long())
    assert (digit.argmax(dim=1) == DIGITS.targets).sum() >= 36
    check_card("digits.pt2.md")


def run_code(card, picture):
    """Run the code of a model card for a picture; returns the digit and the sum with 7, or None."""
    (code,), names = re.findall(r"```python\n(.*?)```", card, re.DOTALL), {}
    try:
        exec(code.replace("five.png", str(picture)), names)
    except ValueError:  # no drawing
        return None
    return int(names["digits"].argmax()), int(names["sums"].argmax())


def check_card(path):
    """Run the code of a model card on plain papers, on transparency, a blank, and the samples."""
    card = Path(path).read_text()
    ink = Image.fromarray(DIGITS.data[DIGITS.targets == 5][0].numpy()).resize((280, 280))
    for paper, color in (("white", 0), ("#808080", 0), ("#c8c8c8", 80), ("#282828", 255), (0, 0)):
        drawing = Image.new("RGBA", (400, 300), paper)
        drawing.paste((color,) * 3 + (255,), (90, 10), mask=ink)
        drawing.save("drawing.png")
        assert run_code(card, "drawing.png") == (5, 12), paper
        Image.new("RGBA", (400, 300), paper).save("blank.png")
        assert run_code(card, "blank.png") is None
    read = {path.stem: run_code(card, path) for path in (ROOT / "samples").iterdir()}
    assert read == {"five": (5, 12), "two": None, "nine": None}  # two and nine are screenshots


def test_onnx_gives_the_same_for_all_addends_and_batch_sizes(exported_onnx, trained):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = pytest.importorskip("onnx").load(exported_onnx)
    assert model.ir_version <= 9 and model.opset_import[0].version <= 20  # as onnxruntime 1.17
    content, predictor = exported_onnx.read_bytes(), load_predictor(trained)
    for path in (ROOT, torch.__path__[0], Path.home()):  # no paths of this machine
        assert str(path).encode() not in content
    assert sorted(path.name for path in Path().glob("*.onnx*")) == ["digits.onnx", "digits.onnx.md"]
    session = onnxruntime.InferenceSession("digits.onnx")
    assert [one.name for one in session.get_inputs()] == ["pixels", "addend"]
    pixels = DIGITS.data.repeat(7, 1, 1)
    for count in (1, 2, 256):
        for addend in range(10):
            batch, addends = pixels[:count], torch.full((count,), addend)
            outputs = session.run(None, {"pixels": batch.numpy(), "addend": addends.numpy()})
            for ours, theirs in zip(outputs, predictor(batch, addends), strict=True):
                torch.testing.assert_close(torch.from_numpy(ours), theirs, atol=1e-4, rtol=0)
                assert (ours.argmax(axis=1) == theirs.numpy().argmax(axis=1)).all()
    check_card("digits.onnx.md")


def test_a_missing_onnx_package_is_one_line(command, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    status, out, err = command("--export", "digits.onnx")
    assert (status, out) == (1, "") and not Path("digits.onnx").exists()
    assert re.fullmatch(r"error: [^\n]*pip install onnx onnxscript\n", err), err


def test_help_does_not_wait_for_torch():
    code = "import sys, predict; print(predict.main(['--help']))"
    command = [sys.executable, "-X", "importtime", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "usage: predict.py" in done.stdout
    assert not re.search(r"\| +(torch|numpy|PIL|matplotlib)$", done.stderr, re.M)
