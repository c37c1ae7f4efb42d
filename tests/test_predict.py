"""predict.py: predictions for pictures, their output, and the exported network."""

import ast
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import weakref
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from training.synthetic import synthetic_mnist

import predict
import train
from handwriting import export
from handwriting.predictor import Predictor, load_model
from handwriting.prepare import NO_INK, prepare
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
        patch.setattr(plots, "run_figures", lambda *args: {})
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


def test_the_line_of_a_picture(command, pictures):
    file, digit = pictures[2]
    status, out, _ = command(file, "--add", 7)
    assert status == 0
    line = rf"digit {digit} \(\d+\.\d %\)  {digit} \+ 7 = {digit + 7} \(\d+\.\d %\)\n"
    assert re.fullmatch(line, out), out


def test_the_order_of_flags_and_pictures_does_not_matter(command, pictures):
    (one, _), (two, _) = pictures[:2]
    expected = command(one, two, "--json", "--add", 7)
    assert expected[0] == 0
    assert command("--json", one, "--add", 7, two) == expected
    assert command("--json", "--add", 7, "--", one, two) == expected


def test_several_pictures_are_recognized_and_labeled_with_their_names(command, pictures):
    status, out, _ = command(*[file for file, _ in pictures], "--add", 3, "--json")
    assert status == 0
    records = json.loads(out)
    assert [record["file"] for record in records] == [file for file, _ in pictures]
    correct = [r["digit"] == digit for r, (_, digit) in zip(records, pictures, strict=True)]
    sums = [r["sum"] == digit + 3 for r, (_, digit) in zip(records, pictures, strict=True)]
    assert sum(correct) >= 36 and sum(sums) >= 36
    keys = {"file", "digit", "digit_probability", "addend", "sum", "sum_probability", "warnings"}
    assert set(records[0]) == keys
    _, lines, _ = command(*[file for file, _ in pictures[:3]])
    assert [line.split(":")[0] for line in lines.splitlines()] == ["0.png", "1.png", "2.png"]


def test_a_pattern_means_its_matches_and_a_directory_its_pictures(command, pictures, workdir):
    """In shells that leave patterns to the program, as on Windows."""
    directory = workdir / "photos [1]"
    directory.mkdir()
    names = ["3.png", "2 [x].PNG", "notes.txt"]
    for name in names:
        shutil.copy("0.png", directory / name)

    def files(*arguments):
        return [one["file"] for one in json.loads(command(*arguments, "--json")[1])]

    assert files("1?.png") == [f"1{i}.png" for i in range(10)]
    inside = [str(directory / name) for name in ("2 [x].PNG", "3.png")]
    assert files(directory, "1.png") == [*inside, "1.png"]
    assert files("photos*") == files("photos [1]") == [os.path.relpath(file) for file in inside]
    assert files(directory / "2 [x].PNG") == inside[:1]  # a file, although it looks like a pattern
    (workdir / "empty").mkdir()
    for nothing in ("empty", "*.tif"):
        status, out, err = command(nothing, "0.png")
        assert status == 1 and re.fullmatch(f"error: {re.escape(nothing)}: [^\n]+\n", err)
        assert out.startswith("0.png: digit ")


@pytest.mark.parametrize("name, digit", [("five", 5), ("two", 2), ("nine", 9)])
def test_the_sample_pictures_are_recognized(name, digit, capsys):
    sample = ROOT / "samples" / f"{name}.png"
    assert predict.main([str(ROOT / "results" / "tiny.pt"), str(sample), "--add", "7"]) == 0
    assert re.match(rf"digit {digit} .*  {digit} \+ 7 = {digit + 7} ", capsys.readouterr().out)


def test_pixels_that_are_not_uint8_are_refused(trained):
    with pytest.raises(TypeError, match="uint8"):
        load_predictor(trained)(DIGITS.data / 255, torch.zeros(40).long())


def test_pictures_do_not_stay_in_memory(command, pictures, monkeypatch):
    read, seen, alive = predict.read_picture, [], []

    def read_picture(file):
        picture = read(file)
        seen.append(weakref.ref(picture))
        alive.append(sum(one() is not None for one in seen))
        return picture

    monkeypatch.setattr(predict, "read_picture", read_picture)
    assert command(*[file for file, _ in pictures[:5]])[0] == 0
    assert len(alive) == 5 and max(alive) <= 2  # this one and the one before it


def test_predictions_do_not_depend_on_the_batch(trained):
    network, addends = load_predictor(trained), torch.full((7,), 4)
    together = network(DIGITS.data[:7], addends)
    alone = [network(image[None], addends[:1]) for image in DIGITS.data[:7]]
    for ours, theirs in zip(zip(*alone, strict=True), together, strict=True):
        torch.testing.assert_close(torch.cat(ours), theirs)
        torch.testing.assert_close(theirs.sum(dim=1), torch.ones(7))


def test_a_picture_from_standard_input(command, pictures, monkeypatch, workdir):
    file, digit = pictures[1]
    stream = SimpleNamespace(buffer=io.BytesIO((workdir / file).read_bytes()))
    monkeypatch.setattr(predict.sys, "stdin", stream)
    status, out, _ = command("-", "--add", 1)
    assert status == 0 and out.startswith(f"digit {digit} ")


def test_an_unreadable_picture_is_reported_and_the_others_are_predicted(command, pictures, workdir):
    (workdir / "text.png").write_text("not an image")
    status, out, err = command("0.png", "text.png", "missing.png", "1.png")
    assert status == 1 and len(out.splitlines()) == 2
    lines = err.splitlines()
    assert [line.split(":")[1].strip() for line in lines if line.startswith("error")] == [
        "text.png",
        "missing.png",
    ]
    assert "Traceback" not in err


def test_a_picture_without_ink_has_no_digit(command, pictures, workdir):
    Image.new("L", (100, 100), 255).save(workdir / "white.png")
    assert command("white.png", "--save-picture", "plot.png") == (1, f"{NO_INK}\n", "")
    status, out, err = command("white.png", "0.png")
    assert status == 1 and err == ""
    assert out.startswith(f"white.png: {NO_INK}\n0.png: digit ")
    status, out, err = command("white.png", "--json")
    record = json.loads(out)[0]
    names = ("digit", "digit_probability", "sum", "sum_probability")
    assert status == 1 and [record[name] for name in names] == [None] * 4
    assert record["warnings"] == [NO_INK] and err == f"warning: white.png: {NO_INK}\n"


def test_predictions_are_printed_even_if_the_plot_cannot_be_written(command, pictures):
    status, out, err = command("0.png", "--save-picture", "missing/plot.png")
    assert status == 1 and out.startswith("digit ") and "cannot write missing/plot.png" in err


def test_the_plot_does_not_overwrite_a_picture(command, pictures, workdir):
    content = (workdir / "0.png").read_bytes()
    status, _, err = command("0.png", "1.png", "--save-picture", "./0.png")
    assert status == 2 and "overwrite" in err
    assert (workdir / "0.png").read_bytes() == content


def test_a_symbolic_link_to_itself_is_an_unreadable_picture(command, workdir):
    (workdir / "loop.png").symlink_to("loop.png")
    status, out, err = command("loop.png", "--save-picture", "plot.png")
    assert (status, out) == (1, "") and err.startswith("error: loop.png: ")


def predict_process(trained, *arguments, shell="", encoding="utf-8"):
    """predict.py as a process, with the redirections of a shell."""
    command = shlex.join([sys.executable, str(ROOT / "predict.py"), str(trained), *arguments])
    environment = os.environ | {"PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"}
    return subprocess.run(f"{command} {shell}", shell=True, env=environment, capture_output=True)


def test_names_that_the_stream_cannot_encode_are_escaped(trained, pictures, workdir):
    names = ["digit \u2713.png", "missing \u2713.png"]
    shutil.copy("0.png", names[0])
    done = predict_process(trained, *names, encoding="latin-1")
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert done.stdout.startswith(b"digit \\u2713.png: digit ")
    assert done.stderr.startswith(b"error: missing \\u2713.png: ")


@pytest.mark.skipif("os.name != 'posix'", reason="needs a POSIX shell")
def test_closed_streams_are_no_traceback(trained, pictures):
    done = predict_process(trained, "-", shell="<&-")
    assert done.returncode == 1 and re.fullmatch(b"error: -: [^\n]+\n", done.stderr), done.stderr
    done = predict_process(trained, "missing.png", "0.png", "--json", shell="2>&-")
    assert done.returncode == 1 and len(json.loads(done.stdout)) == 1


@pytest.mark.parametrize(
    "arguments",
    [["--add", "10"], ["--add", "-1"], [], ["--export", "x.txt"], ["--save-picture", "x.jpg"]],
)
def test_wrong_usage_is_one_line_and_status_2(command, arguments):
    arguments = arguments and ["0.png", *arguments]
    status, out, err = command(*arguments)
    assert (status, out) == (2, "") and re.fullmatch(r"error: [^\n]+\n", err), err


@pytest.mark.parametrize("place", ["nowhere", "empty", "file"])
def test_a_run_without_a_checkpoint_is_one_line(workdir, capsys, place):
    (workdir / "empty").mkdir()
    (workdir / "file").write_bytes(b"PK\x03\x04 not a checkpoint")
    assert predict.main([place, "0.png"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"error: [^\n]+\n", err), err


def test_a_checkpoint_of_another_network_is_refused(trained, capsys):
    change_checkpoint(trained, "recipe", {"encoder": "standard"})
    assert predict.main([str(trained), "0.png"]) == 1
    assert re.fullmatch("error: [^\n]*different network\n", capsys.readouterr().err)


@pytest.mark.parametrize("change", ["weights", "std"])
def test_probabilities_that_are_not_numbers_are_an_error(trained, pictures, capsys, change):
    checkpoint = torch.load(trained / "last.pt")
    if change == "std":
        checkpoint["recipe"]["std"] = 0.0
    else:
        next(iter(checkpoint["network"].values())).fill_(torch.nan)
    torch.save(checkpoint, trained / "last.pt")
    for arguments in (["0.png", "--json"], ["--export", "digits.pt2"]):
        assert predict.main([str(trained), *arguments]) == 1
        out, err = capsys.readouterr()
        assert out == "" and re.fullmatch("error: [^\n]*(not numbers|different network)\n", err)
    assert not Path("digits.pt2").exists()


def test_weights_that_overflow_are_an_error(trained, pictures, capsys):
    checkpoint = torch.load(trained / "last.pt")
    next(iter(checkpoint["network"].values())).fill_(3e38)
    torch.save(checkpoint, trained / "last.pt")
    assert predict.main([str(trained), "0.png", "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch("error: [^\n]*not numbers\n", err)


def test_pictures_and_predictions_are_plotted(command, pictures, workdir):
    assert command("0.png", "1.png", "--save-picture", "plot.png")[0] == 0
    with Image.open(workdir / "plot.png") as plot:
        assert plot.width == 1500 and plot.height > 500


def test_plots_do_not_need_the_backend_that_jupyter_sets(trained, pictures, monkeypatch, workdir):
    monkeypatch.setenv("MPLBACKEND", "missing")
    done = predict_process(trained, "0.png", "--save-picture", "plot.png")
    assert (done.returncode, done.stderr) == (0, b"") and (workdir / "plot.png").is_file()


def test_a_plot_shows_the_name_and_the_warnings(command, workdir, monkeypatch):
    picture = Image.new("L", (100, 60), 255)
    for left in (20, 70):
        picture.paste(0, (left, 10, left + 6, 50))
    name = os.fsdecode(b"two\xff.png")  # its bytes cannot be drawn
    picture.save(workdir / name)
    plot, rows = plots.prediction_figure, []
    monkeypatch.setattr(plots, "prediction_figure", lambda new: rows.extend(new) or plot(new))
    assert command(name, "--save-picture", "plot.png")[0] == 0
    *_, title = rows[0]
    assert title.startswith(r"two\udcff.png: digit") and "\nmore than one digit" in title


def test_pictures_are_plotted_upright_on_white(command, workdir, monkeypatch):
    ink = Image.new("RGBA", (60, 40))  # transparent: white
    ink.paste("black", (28, 8, 32, 32))
    ink.save(workdir / "ink.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    sheet = Image.new("RGB", ink.size, "white")
    sheet.paste(ink, mask=ink)
    sheet.save(workdir / "turned.jpg", exif=turned)
    plot, rows = plots.prediction_figure, []
    monkeypatch.setattr(plots, "prediction_figure", lambda new: rows.extend(new) or plot(new))
    assert command("ink.png", "turned.jpg", "--save-picture", "plot.png")[0] == 0
    assert rows[0][0].getextrema() == ((0, 255),) * 3
    assert rows[0][0].size == (60, 40) and rows[1][0].size == (40, 60)


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


def test_with_json_an_export_is_reported_on_stderr(command, pictures):
    status, out, err = command("0.png", "--json", "--export", "digits.pt2")
    assert status == 0 and len(json.loads(out)) == 1 and "exported digits.pt2\n" in err


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


def check_card(path):
    """Check a model card, and run its code in a directory with a picture of a five."""
    card, names = Path(path).read_text(), {}
    assert "fast" in card and "209,049 parameters" in card
    pixels = DIGITS.data[DIGITS.targets == 5][0].numpy()
    Image.fromarray(255 - pixels).resize((280, 280)).save("five.png")
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1), names)
    assert (int(names["digits"].argmax()), int(names["sums"].argmax())) == (5, 12)


def test_onnx_gives_the_same_for_all_addends_and_batch_sizes(exported_onnx, trained):
    onnxruntime = pytest.importorskip("onnxruntime")
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


def test_nothing_but_the_result_of_an_onnx_export_is_printed(exported_onnx, trained):
    """In a new process, in which the exporter could print before anything is captured."""
    command = [sys.executable, ROOT / "predict.py", trained, "--export", "again.onnx"]
    call = subprocess.run(command, capture_output=True, text=True)
    assert call.stdout == "exported again.onnx\nexported again.onnx.md\n" and call.stderr == ""


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_a_missing_onnx_package_is_one_line(command, monkeypatch, missing):
    find = importlib.util.find_spec
    without = lambda name, *rest: None if name == missing else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    status, out, err = command("--export", "digits.onnx")
    assert (status, out) == (1, "") and not Path("digits.onnx").exists()
    assert re.fullmatch(r"error: [^\n]*pip install onnx onnxscript\n", err), err


def test_a_directory_that_does_not_exist_is_one_line(command):
    status, out, err = command("--export", "nowhere/digits.pt2")
    assert (status, out) == (1, "") and re.fullmatch(r"error: cannot write [^\n]+\n", err), err


@pytest.mark.parametrize("suffix", export.FORMATS)
def test_the_code_of_a_card_is_valid_for_any_file_name(trained, suffix):
    model, checkpoint = load_model(trained)
    path = Path(f'o\'ne "two" {{three}}{suffix}')
    card = export.model_card(path, model, checkpoint)
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    (name,) = (node.value for node in ast.walk(ast.parse(code)) if is_name(node, suffix))
    assert name == path.name


def test_unprintable_characters_are_escaped_in_a_card(trained):
    model, checkpoint = load_model(trained)
    card = export.model_card(Path("a\x1b[31m.pt2"), model, checkpoint)
    assert all(line.isprintable() for line in card.splitlines())


def test_a_network_is_exported_to_several_files(command):
    status, out, _ = command("--export", "one.pt2", "--export", "two.pt2")
    assert status == 0 and out.count("exported ") == 4
    assert all(Path(f"{name}.pt2{end}").is_file() for name in ("one", "two") for end in ("", ".md"))


def is_name(node, suffix):
    return isinstance(node, ast.Constant) and str(node.value).endswith(suffix)
