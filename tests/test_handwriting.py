"""Preparing pictures: MNIST's own images are unchanged, and photographs give nearly the digit."""

import io
import json
import os
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin

import predict
from benchmarks.drawings import DRAWINGS, drawing, letterboxed
from benchmarks.photographs import make_pictures
from benchmarks.scenes import SCENES, SEVERAL_DIGITS, noisy, on_paper, wide_pen
from benchmarks.simulation import DAMAGES, photograph
from dataset import load_data
from handwriting.picture import MAX_PIXELS, read_picture
from handwriting.prepare import CUT, NO_INK, SEVERAL, SMALL, as_mnist, prepare
from synthetic import synthetic_mnist
from training.console import UserError


@pytest.mark.skipif("MNIST_DIR" not in os.environ, reason="MNIST_DIR is not set")
@pytest.mark.parametrize("how", ["light", "dark", "light, larger", "dark, larger"])
def test_images_of_mnist_are_unchanged(monkeypatch, how):
    """All whose longer side is 20 if MNIST_ALL is set, else 250, also on a larger sheet."""
    monkeypatch.undo()  # of the small MNIST
    images = load_data("mnist", os.environ["MNIST_DIR"]).test.data.numpy()
    images = [image for image in images if np.ptp(np.nonzero(image), axis=1).max() == 19]
    assert len(images) == 9997
    for image in images[:: 1 if "MNIST_ALL" in os.environ else 40]:
        sheet = image
        if "larger" in how:
            sheet = np.zeros((80, 100), np.uint8)
            sheet[31:59, 5:33] = image
        prepared = prepare(Image.fromarray(255 - sheet if "dark" in how else sheet))
        assert np.abs(prepared.pixels.astype(int) - image).max() <= 1
        assert prepared.warnings == ()


def seven(size=200, ink="black", paper="white", mode="RGB", width=None):
    """A seven in the middle of a sheet, its strokes `width` pixels wide."""
    sheet = Image.new("RGB", (size, size), paper)
    points = [(0.3, 0.25), (0.7, 0.25), (0.45, 0.8)]
    line = [(x * size, y * size) for x, y in points]
    ImageDraw.Draw(sheet).line(line, fill=ink, width=width or size // 16, joint="curve")
    return sheet.convert(mode)


def correlation(one, two):
    """The correlation of two prepared digits, at the best shift by up to a pixel."""
    one, two = one.pixels.astype(float), two.pixels.astype(float)
    shifts = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    return max(np.corrcoef(np.roll(one, s, (0, 1)).ravel(), two.ravel())[0, 1] for s in shifts)


def similar(one, two):
    return correlation(one, two) > 0.9


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
def test_color_size_and_mode_of_a_picture_do_not_matter(picture):
    prepared = prepare(picture)
    assert prepared.warnings == () and similar(prepared, prepare(seven()))
    assert prepared.pixels.shape == (28, 28) and prepared.pixels.max() == 255
    sides = [np.ptp(np.nonzero(prepared.pixels.any(axis=axis))) + 1 for axis in (0, 1)]
    assert max(sides) == 20


@pytest.mark.parametrize("width", [1, 5, 20])
def test_thin_strokes_are_neither_fainter_nor_thinner_than_thick_ones(width):
    thin, thick = prepare(seven(400, width=width)), prepare(seven(400, width=36))
    assert np.median(thin.pixels[thin.pixels > 25]) > 200
    assert correlation(thin, thick) > 0.85


def test_shrinking_leaves_out_no_row():
    for side in range(20, 70):
        for row in np.eye(side):
            pixels = as_mnist(np.outer(row, np.ones(side)))
            assert pixels.max() == 255 and 1 <= pixels.any(axis=1).sum() <= 2


def test_16_bits_are_read():
    gray = np.asarray(seven(mode="L")).astype(np.uint16) * 200 + 3000
    assert similar(prepare(Image.fromarray(gray)), prepare(seven()))


def test_specks_are_dropped():
    picture = seven()
    for x, y in ((20, 30), (180, 40), (30, 170)):
        ImageDraw.Draw(picture).ellipse([x, y, x + 2, y + 2], fill="black")
    specks = prepare(picture)
    assert specks.warnings == () and similar(specks, prepare(seven()))


@pytest.mark.parametrize("size, corner", [((400, 200), (200, 0)), ((200, 400), (0, 200))])
def test_a_second_digit_on_other_paper_gives_a_warning(size, corner):
    two = Image.new("RGB", size)
    two.paste(seven(ink="#6e5ac8", paper="#3c373c"))
    two.paste(seven(ink="#8246dc", paper="#a096a5"), corner)
    assert prepare(two).warnings == (SEVERAL,)


@pytest.mark.parametrize("kind", SEVERAL_DIGITS)
def test_several_digits_are_not_read_as_one_without_a_word(kind, tmp_path, capsys):
    digits = synthetic_mnist("test", 40)
    pictures, _, _ = make_pictures(kind, digits, 10, np.random.default_rng(8))
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / f"{index}.png")
    assert predict.main([str(ROOT / "results/tiny.pt"), str(tmp_path), "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert sum(SEVERAL in record["warnings"] for record in records) >= 9


def test_a_digit_in_two_pieces_is_one_digit():
    picture = Image.new("L", (200, 200), 255)
    draw = ImageDraw.Draw(picture)
    draw.line([(70, 60), (70, 100), (110, 105), (120, 130), (100, 155), (65, 150)], 0, width=10)
    draw.line([(85, 50), (130, 48)], 0, width=10)  # the bar of a five
    prepared = prepare(picture)
    assert prepared.warnings == () and prepared.pixels[:8].any()


@pytest.mark.parametrize("gray", [0, 128, 255])
def test_a_sheet_without_ink_gives_a_warning(gray):
    prepared = prepare(Image.new("L", (100, 80), gray))
    assert prepared.warnings == (NO_INK,) and not prepared.pixels.any()


def test_noise_is_not_ink():
    noise = np.random.default_rng(0).normal(180, 8, (300, 400, 3)).clip(0, 255).astype(np.uint8)
    assert prepare(Image.fromarray(noise)).warnings == (NO_INK,)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_photograph_gives_nearly_the_digit_that_was_written(damage):
    correlations = []
    for index, digit in enumerate(synthetic_mnist("test", 6).data.numpy()):
        written = np.zeros((200, 200), np.uint8)
        written[20:188, 20:188] = np.asarray(Image.fromarray(digit).resize((168, 168)))
        photographed = prepare(photograph(digit, np.random.default_rng(index), damage))
        correlations.append(correlation(prepare(Image.fromarray(written)), photographed))
    # The line of a thin pen covers only a part of the stroke that it is compared with. A hard
    # shadow's edge is taken for ink in one or two of a hundred pictures.
    assert sorted(correlations)[1] > (0.55 if damage == "thin pen" else 0.75)


@pytest.mark.parametrize("seed", [40, 242])
def test_the_edge_of_a_shadow_beside_a_small_digit_is_not_read(seed):
    digit = synthetic_mnist("test", 40).data.numpy()[seed % 40]
    written = prepare(Image.fromarray(digit).resize((168, 168)))
    seen = prepare(photograph(digit, np.random.default_rng(seed), "all"))
    assert seen.warnings == () and correlation(written, seen) > 0.9


@pytest.mark.parametrize("scene", [*DRAWINGS.values(), letterboxed])
def test_a_digit_is_found_on_its_sheet_canvas_or_screen(scene):
    correlations = []
    for seed in range(12):
        rng = np.random.default_rng([7, seed])
        _, coverage = drawing(rng)
        drawn = Image.fromarray((255 * coverage).astype(np.uint8))
        paper = ImageOps.invert(drawn).convert("RGB") if scene == letterboxed else coverage
        correlations.append(correlation(prepare(scene(paper, rng)), prepare(drawn)))
    assert sorted(correlations)[1] > 0.8


@pytest.mark.parametrize("size", [60, 100, 200])
def test_a_dark_tile_is_a_sheet_on_every_page(size):
    for image in synthetic_mnist("test", 6).data.numpy():
        page = Image.new("RGB", (size, size), "white")
        page.paste(Image.fromarray(image), (size // 4, size // 3))
        prepared = prepare(page)
        assert prepared.warnings == () and similar(prepared, prepare(Image.fromarray(image)))


@pytest.mark.parametrize("side", [20, 200])
def test_a_digit_that_is_too_small_in_a_huge_photo_gives_a_warning(side):
    digit = synthetic_mnist("test", 1).data.numpy()[0]
    coverage = np.zeros((1500, 2000))
    coverage[600 : 600 + side, 900 : 900 + side] = wide_pen(digit, side)
    prepared = prepare(noisy(on_paper(coverage), np.random.default_rng(0)))
    if side < 100:
        assert {SMALL, NO_INK} & set(prepared.warnings)
    else:
        assert prepared.warnings == () and similar(prepared, prepare(Image.fromarray(digit)))


@pytest.mark.parametrize("kind", [*SCENES])
def test_a_digit_is_read_in_what_people_send(kind):
    chosen = synthetic_mnist("test", 40)
    pictures, _, images = make_pictures(kind, chosen, 12, np.random.default_rng(7))
    correlations = []
    for picture, image in zip(pictures, images, strict=True):
        prepared = prepare(picture)
        expected = prepare(Image.fromarray(image).resize((168, 168)))
        correlations.append(1 if prepared.warnings else correlation(prepared, expected))
    assert sorted(correlations)[1] > 0.7  # some are turned and distorted


def test_a_digit_cut_out_without_margin_is_read_with_a_warning():
    whole = seven(mode="L")
    cut = whole.crop(ImageOps.invert(whole).getbbox())
    for picture in (cut, ImageOps.invert(cut)):
        prepared = prepare(picture)
        assert prepared.warnings == (CUT,) and similar(prepared, prepare(whole))


def test_the_digit_is_what_a_ring_encloses_or_what_is_underlined():
    for ring in (True, False):
        picture = seven()
        draw = ImageDraw.Draw(picture)
        if ring:
            draw.ellipse([20, 10, 180, 190], outline="black", width=5)
        else:
            draw.line([30, 180, 170, 178], fill="black", width=5)
        prepared = prepare(picture)
        assert prepared.warnings == () and similar(prepared, prepare(seven()))


def test_a_digit_with_a_loop_is_not_taken_for_a_sheet():
    zero = Image.new("L", (200, 200), 255)
    ImageDraw.Draw(zero).rounded_rectangle([60, 40, 140, 160], 30, outline=0, width=24)
    prepared = prepare(zero)
    assert prepared.warnings == () and prepared.pixels[14, 14] == 0
    assert prepared.pixels[14].max() == 255


def test_the_first_picture_of_a_phones_photo_is_read(tmp_path):
    depth = Image.new("RGB", (50, 50))
    seven().save(tmp_path / "seven.jpg", "MPO", save_all=True, append_images=[depth])
    assert similar(prepare(read_picture(str(tmp_path / "seven.jpg"))), prepare(seven()))


def encoded(picture, kind="PNG", **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


TWO = {"save_all": True, "append_images": [seven(ink="red")]}
BAD = {
    "HEIC": b"\0\0\0\x18ftypheic",
    "not a readable": b"not an image",
    "damaged": encoded(seven())[:300],
    "1 x 1": encoded(Image.new("L", (1, 1))),
    "several pages": encoded(seven(), "TIFF", **TWO),
}


@pytest.mark.parametrize("reason", BAD)
def test_an_unusable_picture_is_an_error_of_one_line_with_the_reason(reason):
    with pytest.raises(UserError, match=f"^[^\n]*{reason}[^\n]*$"):
        read_picture(io.BytesIO(BAD[reason]))


@pytest.mark.parametrize("mode", ["1", "LA", "RGBA"])
def test_one_limit_of_pixels_for_every_kind_of_image(monkeypatch, mode):
    """Checked before anything is decoded."""
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", Mock(side_effect=MemoryError))
    for width, reason in ((1000, "memory"), (1001, "too many pixels")):
        with pytest.raises(UserError, match=reason):
            read_picture(io.BytesIO(encoded(Image.new(mode, (width, MAX_PIXELS // 1000)))))


def test_a_jpeg_of_200_megapixels_is_decoded_at_half_its_size_and_a_larger_one_refused():
    sheet = Image.new("L", (16_384, 12_288), 255)
    sheet.paste(seven(8000, mode="L"), (4000, 2000))
    image = read_picture(io.BytesIO(encoded(sheet, "JPEG")))
    assert image.size == (8192, 6144) and similar(prepare(image), prepare(seven()))
    with pytest.raises(UserError, match="too many pixels"):
        read_picture(io.BytesIO(encoded(Image.new("L", (16_384, 16_384)), "JPEG")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_is_ignored(kind):
    content = encoded(seven(), kind, exif=b"Exif\0\0garbage!")
    assert similar(prepare(read_picture(io.BytesIO(content))), prepare(seven()))
