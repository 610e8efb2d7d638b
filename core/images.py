"""Decoding photos, and finding those that cannot be decoded."""
import hashlib
import io
import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from PIL import Image, ImageOps
from tqdm import tqdm

from core.errors import InputError, as_one_line

log = logging.getLogger("mask")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
# Formats that are decoded, whatever the file's name; other Pillow formats can start programs.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")
MIN_SIDE, MAX_PIXELS = 16, 64_000_000
EXIF_ORIENTATION = 0x0112
# OpenCV decodes a JPEG at 1/1, 1/2, 1/4 or 1/8 of its size.
# With IMREAD_COLOR_RGB these flags give colours, in spite of their names.
REDUCED = {1: 0, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
           8: cv2.IMREAD_REDUCED_GRAYSCALE_8}


def read_image(path, min_size=(math.inf, math.inf)):
    """Decode a photo to upright RGB: grayscale, palette, alpha, CMYK, 16-bit, EXIF-rotated alike.

    Args:
        path: the photo.
        min_size: (height, width) that the result must keep. A JPEG may be decoded at 1/2, 1/4 or
            1/8 of its size as long as neither side gets smaller than this.

    Returns:
        uint8 array (height, width, 3).

    Raises:
        InputError: if the photo cannot be decoded, has a side under 16 pixels or more than 64
            million pixels.
    """
    try:
        data = Path(path).read_bytes()
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if min(width, height) < MIN_SIDE or width * height > MAX_PIXELS:
                raise InputError(f"{path}: {width} x {height} pixels; expected sides of at least "
                                 f"{MIN_SIDE} and at most {MAX_PIXELS:,} pixels; remove or resize "
                                 f"it")
            # OpenCV decodes the usual kind of JPEG twice as fast, with the same pixels. It does
            # not report a truncated file, so the end-of-image marker must be there.
            if (image.format == "JPEG" and image.mode == "RGB" and data.endswith(b"\xff\xd9")
                    and _is_upright(image)):
                factor = max(n for n in REDUCED if n == 1 or (
                    height >= n * min_size[0] and width >= n * min_size[1]))
                flags = REDUCED[factor] | cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
                pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
                if pixels is not None:
                    return pixels
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):
                # 16 bits per channel: keep the high byte, where Pillow would clip at 255.
                pixels = np.asarray(image).astype(np.float64)
                image = Image.fromarray((pixels / 256).clip(0, 255).astype(np.uint8))
            return np.array(image.convert("RGB"))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; restore it, or start again without it") from None
    except Exception as error:  # damaged files make the decoders raise exceptions of any class
        raise InputError(f"{path}: cannot be decoded ({as_one_line(error)}); restore or remove the "
                         f"file; python -m tools.check_data finds all such files") from None


def _is_upright(image):
    return "exif" not in image.info or image.getexif().get(EXIF_ORIENTATION, 1) == 1


def check_images(paths):
    """Decode photos as training does, on all cores.

    Args:
        paths: Series of strings.

    Returns:
        DataFrame with the index of `paths`: error (the line that training would stop with, or
        ""), size ("384 x 512", width x height), mode (Pillow's name), and digest (SHA-256 of the
        upright RGB pixels; "" for a photo that cannot be decoded).
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoders and hashlib release the GIL
        rows = list(tqdm(pool.map(_check_image, paths), total=len(paths), disable=None,
                         unit="photo", desc="check"))
    return pd.DataFrame(rows, columns=["error", "size", "mode", "digest"], index=paths.index)


def _check_image(path):
    try:
        pixels = read_image(path)
        with Image.open(path) as original:
            size, mode = "{} x {}".format(*original.size), original.mode
        digest = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
        return "", size, mode, digest
    except InputError as error:
        return str(error), "?", "?", ""


def drop_bad_images(photos):
    """Return the table of photos without those that cannot be decoded; log each of them."""
    errors = check_images(photos.path).error
    for error in errors[errors != ""]:
        log.warning(f"skipped: {error}")
    log.info(f"{(errors != '').sum()} of {len(photos)} photos skipped: they cannot be decoded")
    return photos[errors == ""].reset_index(drop=True)
