"""The files of MNIST: only the right ones are used, and what happens if they are missing."""

import re
import socket
import time
import traceback
from pathlib import Path

import pytest
import torch

import synthetic
from dataset import load_data
from synthetic import synthetic_mnist
from training.console import UserError


def assert_fails(text, *args):
    """Loading fails with one exception, without a chain of others; its message has this text."""
    with pytest.raises(UserError, match=text) as error:
        load_data(*args)
    assert "".join(traceback.format_exception(error.value)).count("Traceback") == 1
    assert "\n" not in str(error.value)


def files(directory):
    return [path for path in directory.rglob("*") if path.is_file()]


def test_the_images_and_labels_of_the_files_are_loaded(data_dir, capsys):
    source = load_data("mnist", data_dir)
    assert source.name == "mnist" and capsys.readouterr() == ("", "")
    for ours, theirs in ((source.train, ("train", 600)), (source.test, ("test", 200))):
        expected = synthetic_mnist(*theirs)
        assert torch.equal(ours.data, expected.data) and ours.data.dtype == torch.uint8
        assert torch.equal(ours.targets, expected.targets) and ours.targets.dtype == torch.int64


@pytest.mark.parametrize("kind", ["mnist", "auto"])
def test_other_files_in_the_place_of_mnist_are_refused(data_dir, kind):  # such as Fashion-MNIST
    path = data_dir / "MNIST" / "raw" / "train-images-idx3-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert_fails("not MNIST", kind, data_dir)
    path.write_bytes(content[:-1])  # see also test_faults.py
    assert_fails("cannot be read", kind, data_dir)


def test_missing_files_are_downloaded_and_kept(tmp_path, mirror, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    source = load_data("auto", "~/new/data")
    assert (source.name, len(source.train.data), len(source.test.data)) == ("mnist", 600, 200)
    assert {path.parent for path in files(tmp_path / "new")} == {tmp_path / "new/data/MNIST/raw"}
    out, err = capsys.readouterr()  # no progress bars
    assert out == "" and re.fullmatch("downloading [^\n]*\n", err)
    monkeypatch.setattr(mirror, "do_GET", None)
    load_data("mnist", tmp_path / "new" / "data")
    assert capsys.readouterr() == ("", "")


FAULTS = {
    "truncated": lambda it: it.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n\x1f"),
    "no answer": lambda it: time.sleep(9),
    "not found": lambda it: it.send_error(404),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_download_is_one_error_and_can_be_repeated(tmp_path, mirror, monkeypatch, fault):
    with monkeypatch.context() as patch:
        patch.setattr(mirror, "do_GET", FAULTS[fault])
        set_timeout, start = socket.setdefaulttimeout, time.monotonic()
        patch.setattr(socket, "setdefaulttimeout", lambda limit: set_timeout(limit and 0.2))
        assert_fails("cannot be downloaded", "mnist", tmp_path / "new")
    assert time.monotonic() - start < 5
    assert load_data("mnist", tmp_path / "new").name == "mnist"


def test_without_a_network_the_message_says_where_to_place_the_files(
    tmp_path, small, monkeypatch, capsys
):
    monkeypatch.setattr(synthetic, "synthetic_mnist", lambda split, count: f"{split} {count}")
    source, err = load_data("auto", tmp_path / "new"), capsys.readouterr().err
    assert (source.name, source.train, source.test) == ("synthetic", "train 60000", "test 10000")
    with pytest.raises(UserError) as error:
        load_data("mnist", tmp_path / "new")
    assert "NOT MNIST" in err and str(error.value) in err and "--data-dir" in err
    assert not files(tmp_path)
    raw = Path(re.search(r"put .* in (\S+)", err)[1])
    raw.mkdir(parents=True, exist_ok=True)
    for name, content in small[0].items():
        (raw / name).write_bytes(content)
    assert load_data("auto", tmp_path / "new").name == "mnist"


def test_synthetic_digits_are_always_the_same():
    ours, again = synthetic_mnist("train", 1000), synthetic_mnist("train", 1000)
    assert torch.equal(ours.data, again.data) and torch.equal(ours.targets, again.targets)
    assert ours.data.shape == (1000, 28, 28) and ours.data.dtype == torch.uint8
    assert ours.targets.bincount(minlength=10).min() > 50
    assert 0.05 < ours.data.float().mean() / 255 < 0.25  # about as much ink as in MNIST
    assert not torch.equal(ours.data[:200], synthetic_mnist("test", 200).data)
