"""Opens image files, also damaged, huge or unsupported ones."""

import io
import re
import warnings
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from training.console import UserError

UNSUPPORTED = {"HEIC": rb"(?s)^.{4}ftyp(hei|hev|mif1|msf1)", "PDF": rb"^%PDF", "SVG": rb"<svg"}


MAX_PIXELS = 60_000_000  # of an image, also on the page; with transparency it takes 1.2 GB
Image.MAX_IMAGE_PIXELS = 2 * MAX_PIXELS  # Pillow refuses more than twice as many


def read_picture(file, formats=None):
    """Open a path or a binary stream in one of Pillow's `formats`, upright. UserError if unusable.

    A JPEG with up to four times MAX_PIXELS, as phones write them, is decoded at half its size.
    """
    try:
        content = Path(file).read_bytes() if isinstance(file, str) else file.read()
        with warnings.catch_warnings(action="ignore"):  # about chunks that don't matter
            image = Image.open(io.BytesIO(content), formats=formats)
            if min(image.size) < 3:
                raise UserError(f"only {image.width} x {image.height} pixels; give a larger image")
            half = image.width // 2, image.height // 2
            if image.width * image.height > MAX_PIXELS and not image.draft(None, half):
                raise UserError("too many pixels; give a smaller image")
            # Phone cameras write MPO: the photo, then a depth map or a gain map.
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise UserError("has several pages or frames; give a single image")
            image.load()
            with suppress(Exception):  # damaged EXIF data, of which Pillow raises many types
                image = ImageOps.exif_transpose(image)
            return image
    except UserError:
        raise
    except UnidentifiedImageError as error:
        for name, pattern in UNSUPPORTED.items():
            if re.search(pattern, content[:1000]):
                raise UserError(f"{name} is not supported; export it as JPEG or PNG") from error
        raise UserError("not a readable image") from error
    except Image.DecompressionBombError as error:
        raise UserError("too many pixels; give a smaller image") from error
    except MemoryError as error:
        raise UserError("not enough memory to read it; give a smaller image") from error
    except Exception as error:  # for damaged files Pillow raises errors of many types
        missing = re.search("Ghostscript|not available", str(error))  # which Pillow calls
        reason = getattr(error, "strerror", None) or (str(error) if missing else "damaged image")
        raise UserError(f"cannot be read ({reason})") from error
