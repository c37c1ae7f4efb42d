"""The files of MNIST: only verified ones are used, and what happens if they are missing."""

import errno
import gzip
import re
import time
from pathlib import Path

import pytest
import torch

import dataset
from dataset import load_data
from training.errors import UserError
from training.synthetic import synthetic_mnist


def test_unpacked_and_packed_files_are_read(data_dir, idx_files, capsys):
    plain = load_data("mnist", data_dir)
    for name, content in idx_files.items():
        (data_dir / "MNIST" / "raw" / name).unlink()
        (data_dir / "MNIST" / "raw" / f"{name}.gz").write_bytes(gzip.compress(content))
    packed = load_data("mnist", data_dir)
    assert plain.name == packed.name == "mnist" and capsys.readouterr() == ("", "")
    for ours, theirs in ((plain.train, packed.train), (plain.test, packed.test)):
        assert torch.equal(ours.data, theirs.data) and ours.data.dtype == torch.uint8
        assert torch.equal(ours.targets, theirs.targets) and ours.targets.dtype == torch.int64
    assert torch.equal(plain.train.data, synthetic_mnist("train", 600).data)


@pytest.mark.parametrize("folder", ["MNIST/raw", "raw", ""])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_files_are_found_in_flatter_folders_and_under_their_original_names(
    tmp_path, idx_files, folder, suffix
):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for i, (name, content) in enumerate(idx_files.items()):
        path = tmp_path / folder / (name.replace("-idx", ".idx") if i % 2 else name)
        packed = path.with_name(path.name + suffix)
        packed.write_bytes(gzip.compress(content) if suffix else content)
        packed.chmod(0o400)
    files = sorted(tmp_path.rglob("*"))
    assert load_data("auto", tmp_path).name == "mnist"
    assert sorted(tmp_path.rglob("*")) == files


@pytest.mark.parametrize("kind", ["mnist", "auto"])
@pytest.mark.parametrize("fault", ["other", "packed"])  # see also test_faults.py
def test_a_damaged_file_is_named_and_not_used(data_dir, kind, fault):
    path = data_dir / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    content = path.read_bytes()
    path.unlink()
    if fault == "other":
        path.write_bytes(path.with_name("train-labels-idx1-ubyte").read_bytes())
    else:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content)[:-9])
    with pytest.raises(UserError, match=path.name):
        load_data(kind, data_dir)


@pytest.mark.parametrize("kind", ["mnist", "auto"])
def test_an_error_while_reading_names_the_file(data_dir, monkeypatch, kind):
    def read_bytes(path):  # as on a network drive: the error has no file name
        raise ConnectionAbortedError(errno.ECONNABORTED, "Connection aborted")

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(UserError, match="cannot read .*train-images-idx3-ubyte"):
        load_data(kind, data_dir)


def test_missing_files_are_downloaded_and_kept(tmp_path, mirror, capsys):
    directory = tmp_path / "new" / "data"
    source = load_data("auto", directory)
    assert (source.name, len(source.train.data), len(source.test.data)) == ("mnist", 600, 200)
    assert "downloading" in capsys.readouterr().err
    names = sorted(path.name for path in directory.rglob("*") if path.is_file())
    assert names == sorted(dataset.SHA256)
    load_data("mnist", directory)
    assert capsys.readouterr().err == ""


def respond(handler, length, body):
    handler.send_response(200)
    handler.send_header("Content-Length", str(length))
    handler.end_headers()
    handler.wfile.write(body)
    handler.close_connection = True


FAULTS = {
    "truncated": lambda handler: respond(handler, 1000, b"\x1f\x8b" + bytes(100)),
    "other content": lambda handler: respond(handler, 5, b"other"),
    "connection closed": lambda handler: handler.connection.close(),
    "no answer": lambda handler: time.sleep(5),
    "not found": lambda handler: handler.send_error(404),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_download_creates_no_file(tmp_path, mirror, monkeypatch, fault):
    monkeypatch.setattr(mirror, "do_GET", FAULTS[fault])
    monkeypatch.setattr(dataset, "DOWNLOAD_TIMEOUT", 0.2)
    with pytest.raises(UserError, match="cannot be downloaded"):
        load_data("mnist", tmp_path / "new" / "data")
    assert not any(path.is_file() for path in (tmp_path / "new").rglob("*"))


def test_a_download_with_a_wrong_digest_creates_no_file(tmp_path, mirror, monkeypatch):
    monkeypatch.setattr(dataset, "SHA256", dict.fromkeys(dataset.SHA256, "0"))
    with pytest.raises(UserError, match="cannot be downloaded"):
        load_data("mnist", tmp_path / "new")
    assert not any(path.is_file() for path in (tmp_path / "new").rglob("*"))


@pytest.mark.parametrize("kind", ["mnist", "auto"])
def test_without_a_network_the_message_says_where_to_place_the_files(
    kind, tmp_path, idx_files, monkeypatch, capsys
):
    monkeypatch.setattr(dataset, "synthetic_mnist", lambda split, count: f"{split} {count}")
    if kind == "mnist":
        with pytest.raises(UserError) as error:
            load_data("mnist", tmp_path / "new")
        message = str(error.value)
    else:
        source = load_data("auto", tmp_path / "new")
        assert source.name == "synthetic"
        assert (source.train, source.test) == ("train 60000", "test 10000")
        message = capsys.readouterr().err
        assert "NOT MNIST" in message
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    # Do what the message says.
    data_dir = re.search(r"place .* in (\S+)", message)[1]
    for name, content in idx_files.items():
        assert name in message
        Path(data_dir, name).write_bytes(content)
    assert load_data(kind, data_dir).name == "mnist"


def test_a_data_directory_that_is_a_file_is_one_line(job, tmp_path):
    (tmp_path / "file").touch()
    status, out, err = job("--dry-run", "--data-dir", "file")
    assert (status, out) == (1, "") and re.fullmatch("error: [^\n]*file[^\n]*\n", err)


def test_synthetic_digits_are_always_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours, again = synthetic_mnist("train", 1000), synthetic_mnist("train", 1000)
    assert torch.equal(ours.data, again.data) and torch.equal(ours.targets, again.targets)
    assert ours.data.shape == (1000, 28, 28) and ours.data.dtype == torch.uint8
    assert ours.targets.bincount(minlength=10).min() > 50
    assert 0.05 < ours.data.float().mean() / 255 < 0.25  # about as much ink as in MNIST
    assert not torch.equal(ours.data[:200], synthetic_mnist("test", 200).data)
    assert list(tmp_path.iterdir()) == []
