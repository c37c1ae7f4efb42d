"""Opens image files, also damaged, huge or unsupported ones."""

import io
import math
import re
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from training.console import UserError

UNSUPPORTED = {"HEIC": rb"(?s)^.{4}ftyp(hei|hev|mif1|msf1)", "PDF": rb"^%PDF", "SVG": rb"<svg"}


def read_picture(file, formats=None, max_pixels=90_000_000):
    """Open a path or a binary stream in one of Pillow's `formats`. UserError if unusable.

    Images with transparency or more than 8 bits take more memory: they may have half of
    `max_pixels`. A JPEG with more pixels is decoded at a half, quarter or eighth of its size.
    """
    try:
        content = Path(file).read_bytes() if isinstance(file, str) else file.read()
        with warnings.catch_warnings(action="ignore"):  # about chunks that don't matter
            image = Image.open(io.BytesIO(content), formats=formats)
            if min(image.size) < 3:
                raise UserError(f"only {image.width} x {image.height} pixels; give a larger image")
            doubled = image.has_transparency_data or image.mode[0] in "IF"
            excess = image.width * image.height * (1 + doubled) / max_pixels
            if excess > 1:
                factor = 2 ** math.ceil(math.log2(excess) / 2)  # of width and height
                if not image.draft(None, (image.width // factor, image.height // factor)):
                    raise UserError("too many pixels; give a smaller image")
            # Phone cameras write MPO: the photo, then a depth map or a gain map.
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise UserError("has several pages or frames; give a single image")
            image.load()
            return ImageOps.exif_transpose(image)  # here: damaged EXIF data raises too
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
