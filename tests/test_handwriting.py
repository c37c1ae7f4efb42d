"""The preparation of pictures: MNIST's own come out as they went in, however they are shown."""

import io
import os

import numpy as np
import pytest
from photographs import DAMAGES, photograph
from PIL import Image, ImageDraw

import mnist
from handwriting import CUT, NO_INK, SEVERAL, PictureError, prepare, read_picture

NEEDS_MNIST = pytest.mark.skipif(
    "MNIST_DIR" not in os.environ, reason="MNIST_DIR names no folder with MNIST"
)


@pytest.fixture
def images(monkeypatch):
    """MNIST's test images whose longer side is 20: all with MNIST_ALL set, else some 250."""
    monkeypatch.undo()
    every = mnist.VerifiedMNIST(os.environ["MNIST_DIR"], train=False).data.numpy()
    ink = every > 0
    first = [ink.any(axis=axis).argmax(axis=1) for axis in (2, 1)]
    last = [27 - ink.any(axis=axis)[:, ::-1].argmax(axis=1) for axis in (2, 1)]
    sides = np.maximum(last[0] - first[0], last[1] - first[1]) + 1
    assert (sides == 20).sum() == 9997
    return every[sides == 20][:: 1 if "MNIST_ALL" in os.environ else 40]


def shown(image, how):
    """An image of MNIST's in another way: its polarity, its place in a larger picture."""
    if "larger" in how:
        sheet = np.zeros((80, 100), np.uint8)
        sheet[31:59, 5:33] = image
        image = sheet
    return Image.fromarray(255 - image if "dark" in how else image)


@NEEDS_MNIST
@pytest.mark.parametrize("how", ["light", "dark", "light, larger", "dark, larger"])
def test_images_of_mnist_stay_as_they_are(images, how):
    for image in images:
        prepared = prepare(shown(image, how))
        assert np.abs(prepared.pixels.astype(int) - image).max() <= 1
        assert prepared.warnings == ()


def seven(size=200, ink="black", paper="white", mode="RGB"):
    """A seven in the middle of a sheet."""
    sheet = Image.new("RGB", (size, size), paper)
    points = [(0.3, 0.25), (0.7, 0.25), (0.45, 0.8)]
    line = [(x * size, y * size) for x, y in points]
    ImageDraw.Draw(sheet).line(line, fill=ink, width=size // 16, joint="curve")
    return sheet.convert(mode)


def likeness(one, two):
    """Correlation of two prepared digits, at the best of the places a pixel apart."""
    one, two = one.pixels.astype(float), two.pixels.astype(float)
    shifts = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    return max(np.corrcoef(np.roll(one, s, (0, 1)).ravel(), two.ravel())[0, 1] for s in shifts)


def looks_alike(one, two):
    return likeness(one, two) > 0.9


@pytest.mark.parametrize(
    "picture",
    [
        seven(800),
        seven(ink="white", paper="black"),
        seven(ink="yellow", paper=(200, 200, 200)),
        seven(ink=(200, 80, 80), paper=(100, 120, 200)),
        seven(mode="L"),
        seven(mode="1"),
        seven(mode="P"),
        seven(mode="CMYK"),
    ],
)
def test_colours_sizes_and_kinds_of_picture_do_not_matter(picture):
    prepared = prepare(picture)
    assert prepared.warnings == () and looks_alike(prepared, prepare(seven()))
    assert prepared.pixels.shape == (28, 28) and prepared.pixels.max() == 255
    rows, columns = (
        np.nonzero(prepared.pixels.any(axis=1))[0],
        np.nonzero(prepared.pixels.any(0))[0],
    )
    assert max(np.ptp(rows), np.ptp(columns)) + 1 == 20


def test_transparency_is_white_paper():
    picture = seven().convert("L")
    clear = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    clear.paste((0, 0, 0, 255), mask=picture.point(lambda grey: 255 - grey))
    assert looks_alike(prepare(clear), prepare(seven()))


def test_16_bits_are_read():
    grey = np.asarray(seven(mode="L")).astype(np.uint16) * 200 + 3000
    assert looks_alike(prepare(Image.fromarray(grey)), prepare(seven()))


def test_exif_turns_the_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    seven().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "seven.jpg", exif=exif, quality=95)
    assert looks_alike(prepare(read_picture(str(tmp_path / "seven.jpg"))), prepare(seven()))


def test_specks_are_dropped_and_a_second_digit_is_warned_of():
    picture = seven()
    for x, y in ((20, 30), (180, 40), (30, 170)):
        ImageDraw.Draw(picture).ellipse([x, y, x + 2, y + 2], fill="black")
    specks = prepare(picture)
    assert specks.warnings == () and looks_alike(specks, prepare(seven()))
    two = Image.new("RGB", (400, 200), "white")
    for x in (0, 200):
        two.paste(seven(), (x, 0))
    assert prepare(two).warnings == (SEVERAL,)


def test_a_digit_in_two_pieces_is_one_digit():
    picture = Image.new("L", (200, 200), 255)
    draw = ImageDraw.Draw(picture)
    draw.line([(70, 60), (70, 100), (110, 105), (120, 130), (100, 155), (65, 150)], 0, width=10)
    draw.line([(85, 50), (130, 48)], 0, width=10)  # the bar of a five
    prepared = prepare(picture)
    assert prepared.warnings == () and prepared.pixels[:8].any()


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_a_sheet_without_ink_is_warned_of(grey):
    prepared = prepare(Image.new("L", (100, 80), grey))
    assert prepared.warnings == (NO_INK,) and not prepared.pixels.any()


def test_noise_is_no_ink():
    noise = np.random.default_rng(0).normal(180, 8, (300, 400, 3)).clip(0, 255).astype(np.uint8)
    assert prepare(Image.fromarray(noise)).warnings == (NO_INK,)


def test_a_pattern_that_drowns_any_ink_is_no_ink():
    draw = np.random.default_rng(32)
    y, x = np.mgrid[-1:1:200j, -1:1:200j]
    sheet = 180 + draw.normal(0, 1, (200, 200, 3))
    inside = np.maximum(abs(x), abs(y)) < 0.9
    sheet += (40 * np.sign(np.sin(8 * x + 32)) * inside)[..., None]
    prepared = prepare(Image.fromarray(sheet.clip(0, 255).astype(np.uint8)))
    assert prepared.warnings == (NO_INK,) and not prepared.pixels.any()


def test_ink_at_the_edge_is_warned_of():
    assert CUT in prepare(seven().crop((0, 60, 200, 200))).warnings


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_photograph_gives_nearly_the_digit_that_was_written(damage):
    digits = mnist.stand_in("test", 6).data.numpy()
    for index, digit in enumerate(digits):
        written = np.zeros((200, 200), np.uint8)
        written[20:188, 20:188] = np.asarray(Image.fromarray(digit).resize((168, 168)))
        seen = prepare(photograph(digit, np.random.default_rng(index), damage))
        # A thin pen's line is a fraction of the stroke that it is compared with.
        enough = 0.55 if damage == "thin pen" else 0.75
        assert likeness(prepare(Image.fromarray(written)), seen) > enough, index


def as_file(content):
    return lambda folder: (folder / "file").write_bytes(content)


def png(picture):
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


BAD = {
    "missing": lambda folder: None,
    "a folder": lambda folder: (folder / "file").mkdir(),
    "text": as_file(b"no picture"),
    "empty": as_file(b""),
    "cut off": as_file(png(seven())[:300]),
    "1x1": as_file(png(Image.new("L", (1, 1)))),
    "a bomb": as_file(png(Image.new("1", (20_000, 20_000)))),
    "animated": lambda folder: seven().save(
        folder / "file", "GIF", save_all=True, append_images=[seven(ink="red")]
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_good_picture_is_refused_in_one_line(tmp_path, kind):
    BAD[kind](tmp_path)
    with pytest.raises(PictureError, match="^[^\n;]+; [^\n]+$"):
        read_picture(str(tmp_path / "file"))
