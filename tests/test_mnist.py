"""MNIST's files: nothing but the right ones is used, however they come."""

import functools
import gzip
import hashlib
import http.server
import threading
import time

import pytest
import torch

import mnist


@pytest.fixture
def announced():
    return []


def load(kind, folder, announced):
    return mnist.load(kind, folder, announced.append)


@pytest.fixture
def mirror(tmp_path, idx_files, monkeypatch):
    """A local server in the mirrors' place, with the .gz files; its handler can be spoilt."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    resources = []
    for name, content in idx_files.items():
        packed = gzip.compress(content)
        (folder / f"{name}.gz").write_bytes(packed)
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(mnist.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(mnist.MNIST, "resources", resources)
    yield Handler
    server.shutdown()
    server.server_close()


def nothing_left(folder):
    return [path for path in folder.rglob("*") if path.is_file() or path.name.startswith(".")] == []


def test_unpacked_and_packed_files_are_read(data_dir, idx_files, announced):
    plain = load("mnist", data_dir, announced)
    for name, content in idx_files.items():
        (data_dir / "MNIST" / "raw" / name).unlink()
        (data_dir / "MNIST" / "raw" / f"{name}.gz").write_bytes(gzip.compress(content))
    packed = load("mnist", data_dir, announced)
    assert plain.name == packed.name == "mnist" and not announced
    for ours, theirs in ((plain.train, packed.train), (plain.test, packed.test)):
        assert torch.equal(ours.data, theirs.data) and ours.data.dtype == torch.uint8
        assert torch.equal(ours.targets, theirs.targets) and ours.targets.dtype == torch.int64
    assert torch.equal(plain.train.data, mnist.stand_in("train", 600).data)


def test_processed_files_are_not_read(data_dir, announced):
    processed = data_dir / "VerifiedMNIST" / "processed", data_dir / "MNIST" / "processed"
    for folder in processed:
        folder.mkdir(parents=True)
        for part in ("training.pt", "test.pt"):
            torch.save((torch.zeros(3, 28, 28), torch.zeros(3)), folder / part)
    assert len(load("mnist", data_dir, announced).train) == 600


@pytest.mark.parametrize("kind", ["mnist", "auto"])
@pytest.mark.parametrize("part", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("harm", ["truncated", "extended", "flipped", "other", "folder", "gz"])
def test_a_damaged_file_is_named_and_never_used(data_dir, announced, kind, part, harm):
    path = data_dir / "MNIST" / "raw" / part
    content = bytearray(path.read_bytes())
    path.unlink()
    if harm == "folder":
        path.mkdir()
    elif harm == "gz":
        path = path.with_name(f"{part}.gz")
        path.write_bytes(gzip.compress(content)[:-9])
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        other = path.with_name("t10k-images-idx3-ubyte").read_bytes()
        path.write_bytes(
            {
                "truncated": content[:-1],
                "extended": content + b"\0",
                "flipped": flipped,
                "other": other[:-1],
            }[harm]
        )
    with pytest.raises(mnist.DataError, match=part) as error:
        load(kind, data_dir, announced)
    assert "; " in str(error.value) and not isinstance(error.value, mnist.Absent)


def test_absent_files_are_downloaded_and_kept(tmp_path, mirror, announced):
    folder = tmp_path / "new"
    source = load("auto", folder, announced)
    assert (source.name, len(source.train), len(source.test)) == ("mnist", 600, 200)
    assert "download" in announced[0]
    names = sorted(path.name for path in folder.rglob("*") if path.is_file())
    assert names == sorted(mnist.SHA256)
    load("mnist", folder, announced)
    assert len(announced) == 1


def cut_short(handler):
    size = int(handler.headers.get("Content-Length", 0))
    handler.send_response(200)
    handler.send_header("Content-Length", str(1000 + size))
    handler.end_headers()
    handler.wfile.write(b"\x1f\x8b" + bytes(100))
    handler.close_connection = True


def other_content(handler):
    body = gzip.compress(b"not these")
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def reset(handler):
    handler.connection.close()


def silence(handler):
    time.sleep(5)


@pytest.mark.parametrize("fault", [cut_short, other_content, reset, silence])
def test_a_broken_download_leaves_nothing(tmp_path, mirror, announced, monkeypatch, fault):
    monkeypatch.setattr(mirror, "do_GET", fault)
    monkeypatch.setattr(mnist, "CONNECTION_TIMEOUT", 0.2)
    folder = tmp_path / "new"
    with pytest.raises(mnist.Absent, match="downloaded"):
        load("mnist", folder, announced)
    assert nothing_left(folder)


def test_a_download_that_drips_is_given_up(tmp_path, mirror, announced, monkeypatch):
    def drip(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        for _ in range(20):
            handler.wfile.write(b"x")
            time.sleep(0.1)

    monkeypatch.setattr(mirror, "do_GET", drip)
    monkeypatch.setattr(mnist, "DOWNLOAD_TIMEOUT", 0.5)
    start = time.monotonic()
    with pytest.raises(mnist.Absent, match="not done within"):
        load("mnist", tmp_path / "new", announced)
    assert time.monotonic() - start < 2
    assert nothing_left(tmp_path / "new")


def test_without_a_network_auto_says_that_it_takes_the_stand_in(tmp_path, announced, monkeypatch):
    monkeypatch.setattr(mnist, "stand_in", lambda part, count: f"{part} {count}")
    source = load("auto", tmp_path / "new", announced)
    assert source[:3] == ("synthetic", "train 60000", "test 10000")
    assert "NOT MNIST" in source.note and "NOT MNIST" in announced[-1]


def test_without_a_network_mnist_names_files_folder_and_way_out(tmp_path, announced):
    folder = tmp_path / "new"
    with pytest.raises(mnist.Absent) as error:
        load("mnist", folder, announced)
    for text in (*mnist.SHA256, str(folder / "MNIST" / "raw"), "--data-dir"):
        assert text in str(error.value)


def test_a_data_folder_that_is_a_file_is_an_error(tmp_path, announced):
    (tmp_path / "file").touch()
    for kind in ("auto", "mnist"):
        with pytest.raises(mnist.DataError, match="--data-dir"):
            load(kind, tmp_path / "file", announced)


def test_the_stand_in_is_seeded_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours, again = mnist.stand_in("train", 1000), mnist.stand_in("train", 1000)
    assert torch.equal(ours.data, again.data) and torch.equal(ours.targets, again.targets)
    assert ours.data.shape == (1000, 28, 28) and ours.data.dtype == torch.uint8
    assert ours.targets.bincount(minlength=10).min() > 50
    assert 0.05 < ours.data.float().mean() / 255 < 0.25  # ink covers about as much as MNIST's
    assert not torch.equal(ours.data[:200], mnist.stand_in("test", 200).data)
    assert list(tmp_path.iterdir()) == []
