"""Predictions on people's own pictures, from the command line and from the exported network."""

import io
import json
import re
import shutil
import weakref
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import mnist
import plots
import predict
import train
from handwriting import prepare
from rundir import load_checkpoint


def prepared_digits(part, count):
    """Digits of the stand-in, prepared as MNIST's are, so that a network may learn from them."""
    digits = mnist.stand_in(part, count)
    pixels = [prepare(Image.fromarray(image)).pixels for image in digits.data.numpy()]
    return SimpleNamespace(data=torch.from_numpy(np.stack(pixels)), targets=digits.targets)


DIGITS = prepared_digits("test", 40)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run that has learned such digits well enough to read them."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    source = mnist.Source("mnist", prepared_digits("train", 1000), DIGITS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist, "load", lambda *args: source)
        patch.setattr(train.Run, "draw", lambda run: [])
        flags = ["--recipe", "fast", "--epochs", "6", "--batch-size", "50", "--quiet"]
        assert train.main([*flags, "--output-dir", str(folder)]) == 0
    return folder / "last.pt"


@pytest.fixture
def trained(workplace, checkpoint):
    """That run, in the current folder."""
    (workplace / "run").mkdir()
    return Path(shutil.copy(checkpoint, workplace / "run")).parent


@pytest.fixture
def pictures(workplace):
    """Files of digits, dark on light, enlarged: a list of (file, digit)."""
    files = []
    for i, (pixels, digit) in enumerate(zip(DIGITS.data, DIGITS.targets.tolist(), strict=True)):
        picture = Image.fromarray(255 - pixels.numpy()).resize((112, 112), Image.Resampling.BICUBIC)
        picture.save(workplace / f"{i}.png")
        files.append((f"{i}.png", digit))
    return files


@pytest.fixture
def command(trained, capsys):
    """The command in this process: command(argument, ...) -> (exit status, stdout, stderr)."""

    def call(*arguments):
        capsys.readouterr()
        status = predict.main([str(trained), *map(str, arguments)])
        return status, *capsys.readouterr()

    return call


def test_a_picture_gets_its_line(command, pictures):
    file, digit = pictures[2]
    status, out, _ = command(file, "--add", 7)
    assert status == 0
    line = rf"digit {digit} \(\d+\.\d %\)  {digit} \+ 7 = {digit + 7} \(\d+\.\d %\)\n"
    assert re.fullmatch(line, out), out


def test_many_pictures_are_read_and_told_apart_by_their_names(command, pictures):
    status, out, _ = command(*[file for file, _ in pictures], "--add", 3, "--json")
    assert status == 0
    records = json.loads(out)
    assert [record["file"] for record in records] == [file for file, _ in pictures]
    right = [r["digit"] == digit for r, (_, digit) in zip(records, pictures, strict=True)]
    sums = [r["sum"] == digit + 3 for r, (_, digit) in zip(records, pictures, strict=True)]
    assert sum(right) >= 36 and sum(sums) >= 36
    keys = {"file", "digit", "digit_probability", "addend", "sum", "sum_probability", "warnings"}
    assert set(records[0]) == keys
    _, lines, _ = command(*[file for file, _ in pictures[:3]])
    assert [line.split(":")[0] for line in lines.splitlines()] == ["0.png", "1.png", "2.png"]


def test_pictures_do_not_pile_up_in_memory(command, pictures, monkeypatch):
    read, seen, alive = predict.read_picture, [], []

    def read_picture(file):
        picture = read(file)
        seen.append(weakref.ref(picture))
        alive.append(sum(one() is not None for one in seen))
        return picture

    monkeypatch.setattr(predict, "read_picture", read_picture)
    assert command(*[file for file, _ in pictures[:5]])[0] == 0
    assert len(alive) == 5 and max(alive) <= 2  # the one that is read, and the one before it


def test_more_pictures_than_a_batch_give_what_each_gives_alone(trained, monkeypatch):
    predictor = predict.Predictor(load_checkpoint(trained / "last.pt"))
    prepared = [SimpleNamespace(pixels=pixels.numpy()) for pixels in DIGITS.data[:7]]
    together = predict.predict(predictor, prepared, 4)
    monkeypatch.setattr(predict, "BATCH", 3)
    for ours, theirs in zip(predict.predict(predictor, prepared, 4), together, strict=True):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(ours.sum(dim=1), torch.ones(7))


def test_standard_input_is_read(command, pictures, monkeypatch, workplace):
    file, digit = pictures[1]
    stream = SimpleNamespace(buffer=io.BytesIO((workplace / file).read_bytes()))
    monkeypatch.setattr(predict.sys, "stdin", stream)
    status, out, _ = command("-", "--add", 1)
    assert status == 0 and out.startswith(f"digit {digit} ")


def test_a_bad_picture_is_reported_and_the_others_are_done(command, pictures, workplace):
    (workplace / "text.png").write_text("no picture")
    status, out, err = command("0.png", "text.png", "missing.png", "1.png")
    assert status == 1 and len(out.splitlines()) == 2
    lines = err.splitlines()
    assert [line.split(":")[1].strip() for line in lines if line.startswith("error")] == [
        "text.png",
        "missing.png",
    ]
    assert "Traceback" not in err


def test_a_picture_without_ink_is_warned_of(command, workplace):
    Image.new("L", (100, 100), 255).save(workplace / "white.png")
    _, out, err = command("white.png", "--json")
    assert json.loads(out)[0]["warnings"] and err.startswith("warning: white.png: ")


@pytest.mark.parametrize(
    "arguments",
    [["--add", "10"], ["--add", "-1"], [], ["--export", "x.txt"], ["--save-picture", "x.jpg"]],
)
def test_wrong_usage_is_one_line_and_status_2(command, arguments):
    arguments = arguments and ["0.png", *arguments]
    status, out, err = command(*arguments)
    assert (status, out) == (2, "") and re.fullmatch(r"error: [^\n]+; [^\n]+\n", err), err


@pytest.mark.parametrize("place", ["nowhere", "empty", "file"])
def test_a_run_without_a_checkpoint_is_one_line(workplace, capsys, place):
    (workplace / "empty").mkdir()
    (workplace / "file").write_bytes(b"PK\x03\x04 no checkpoint")
    assert predict.main([place, "0.png"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"error: [^\n]+; [^\n]+\n", err), err


def test_a_checkpoint_of_another_network_is_refused(trained, capsys):
    state = load_checkpoint(trained / "last.pt")
    state["recipe"]["encoder"] = "compact"
    torch.save(state, trained / "last.pt")
    assert predict.main([str(trained), "0.png"]) == 1
    assert "another network" in capsys.readouterr().err


def test_what_the_network_saw_is_drawn(command, pictures, workplace):
    assert command("0.png", "1.png", "--save-picture", "seen.png")[0] == 0
    with Image.open(workplace / "seen.png") as seen:
        assert seen.width == 1500 and seen.height > 500


def test_what_is_drawn_is_the_picture_as_it_was_read(command, workplace, monkeypatch):
    ink = Image.new("RGBA", (60, 40))  # transparent: white
    ink.paste("black", (28, 8, 32, 32))
    ink.save(workplace / "ink.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    ink.convert("RGB").save(workplace / "turned.jpg", exif=turned)
    draw, drawn = plots.reading_figure, []
    monkeypatch.setattr(plots, "reading_figure", lambda *a: drawn.extend(a[0]) or draw(*a))
    assert command("ink.png", "turned.jpg", "--save-picture", "seen.png")[0] == 0
    assert drawn[0].getextrema() == ((0, 255),) * 3
    assert drawn[0].size == (60, 40) and drawn[1].size == (40, 60)


@pytest.mark.parametrize(
    "flags, told", [({"dataset": "synthetic"}, "NOT MNIST"), ({"dry_run": True}, "dry run")]
)
def test_a_network_that_learned_no_mnist_is_warned_of(command, trained, pictures, flags, told):
    state = load_checkpoint(trained / "last.pt")
    state["flags"] |= flags
    torch.save(state, trained / "last.pt")
    status, _, err = command("0.png", "--export", "digits.pt2")
    assert status == 0 and re.match(f"warning: [^\n]*{told}", err)
    assert told in Path("digits.pt2.md").read_text()


def test_an_export_leaves_the_output_to_the_records(command, pictures):
    status, out, err = command("0.png", "--json", "--export", "digits.pt2")
    assert status == 0 and len(json.loads(out)) == 1 and "exported digits.pt2\n" in err


def test_the_exported_network_is_the_network_and_its_card_says_how_to_call_it(command, trained):
    status, out, _ = command("--export", "digits.pt2")
    assert status == 0 and out == "exported digits.pt2\nexported digits.pt2.md\n"
    with zipfile.ZipFile("digits.pt2") as archive:  # no paths of this machine
        for part in archive.namelist():
            assert str(ROOT).encode() not in archive.read(part), part
    predictor = predict.Predictor(load_checkpoint(trained / "last.pt"))
    exported = torch.export.load("digits.pt2").module()
    for count in (1, 2, 40):
        pixels, addends = DIGITS.data[:count], torch.arange(count) % 10
        with torch.no_grad():
            both = zip(exported(pixels, addends), predictor(pixels, addends), strict=True)
        for ours, theirs in both:
            torch.testing.assert_close(ours, theirs)
    digit, _ = exported(DIGITS.data, torch.zeros(40).long())
    assert (digit.argmax(dim=1) == DIGITS.targets).sum() >= 36

    card = Path("digits.pt2.md").read_text()
    names = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1), names)
    assert names["digit_probabilities"].shape == (1, 10)
    assert names["sum_probabilities"].shape == (1, 19)
    assert "fast" in card and "214,905 parameters" in card
