"""Decoding photos, and finding those that are damaged.

Only the pixels and the orientation of a file are used. Other metadata is ignored.
"""
import contextlib
import functools
import hashlib
import io
import logging
import math
import multiprocessing
import os
import re
import struct
import threading
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

import cv2
import numpy as np
import pandas as pd
from joblib import cpu_count
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from core.cli import script
from core.errors import InputError, as_one_line, explain_error

log = logging.getLogger("mask")

# Formats that are decoded, whatever the file's name; other Pillow formats can start programs.
FORMATS = ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF"]
IMAGE_SUFFIXES = [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff",
                  ".gif"]
if find_spec("PIL.AvifImagePlugin"):  # Pillow 11.3
    FORMATS.append("AVIF")
    IMAGE_SUFFIXES.append(".avif")
MIN_SIDE = 16
# Decoding takes up to 1.2 GB of memory for a JPEG of this size, and 4.3 GB for other formats.
MAX_PIXELS = 200_000_000
Image.MAX_IMAGE_PIXELS = None  # Pillow would warn at half of that; _decode has the limit

# OpenCV decodes a JPEG at 1/1, 1/2, 1/4 or 1/8 of its size.
# With IMREAD_COLOR_RGB these flags give colours, in spite of their names.
REDUCED_FLAGS = {1: 0, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
                 8: cv2.IMREAD_REDUCED_GRAYSCALE_8}
ORIENTATION = 0x0112  # a tag of EXIF

JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")

# Length of a PNG's tRNS chunk, by colour type: gray, RGB.
TRNS_LENGTH = {b"\0": 2, b"\2": 6}

# What a file may be instead: its first bytes, a name, and what to do.
CONVERT, DOWNLOAD = "convert it to JPEG", "download or copy it again"
SIGNATURES = [
    (rb"....ftyp(hei|hev|mif1|msf1)", "a HEIC photo", CONVERT),
    (rb"....ftypavi[fs]", "an AVIF photo that is damaged, or needs Pillow 11.3", DOWNLOAD),
    (rb"....ftyp|RIFF....AVI|\x1aE\xdf\xa3", "a video", "remove it"),
    (rb"\xff\x0a|....JXL ", "a JPEG XL photo", CONVERT),
    (rb"....jP  ", "a JPEG 2000 photo", CONVERT),
    (rb"8BPS", "a Photoshop file", CONVERT),
    (rb"IIU\0|IIR[OS]|FUJI", "a camera raw file", CONVERT),
    (rb"II[*+]\0|MM\0[*+]", "a TIFF file that is damaged or of an unusual kind", CONVERT),
    (rb"\xff\xd8", "a JPEG that is damaged or of an unusual kind", DOWNLOAD),
    (rb"\x89PNG", "a damaged PNG", DOWNLOAD),
    (rb"GIF8|BM|RIFF....WEBP", "a damaged photo", DOWNLOAD),
    (rb"%!PS|%PDF", "a PostScript or PDF file", CONVERT),
    (rb"version https://git-lfs", "a Git LFS pointer, not the photo", "run git lfs pull"),
    (rb"PK\x03\x04|Rar!|7z\xbc\xaf|\x1f\x8b", "an archive", "unpack it"),
    (rb"(\xef\xbb\xbf)?\s*(<!doctype html|<html|<head)", "an HTML page", DOWNLOAD),
    (rb"(\xef\xbb\xbf)?\s*(<\?xml|<svg|[{\[])", "an XML, SVG or JSON text", DOWNLOAD),
    (rb"\0+$", "a file of zeros", DOWNLOAD),
    (rb"$", "an empty file", DOWNLOAD),
]


def read_image(path, min_size=(math.inf, math.inf)):
    """Decode a photo of any mode (grayscale, palette, alpha, CMYK, 16-bit, float) to upright RGB.

    Transparent photos are laid on white. A photo whose damage the decoder repairs is used, and
    named in a warning.

    Args:
        path: the photo.
        min_size: (height, width) that the result must keep. A JPEG may be decoded at 1/2, 1/4 or
            1/8 of its size as long as neither side gets smaller than this.

    Returns:
        uint8 array (height, width, 3).

    Raises:
        InputError: if the photo cannot be decoded, has a side under 16 pixels or more than 200
            million pixels.
    """
    pixels, _, _, damage = _decode(path, min_size)
    if damage:
        _warn_once(path, damage)
    return pixels


@functools.cache
def _warn_once(path, damage):
    # Processes other than 0 log only errors, and each decodes photos of its own.
    log.error(f"warning: {path}: damaged ({damage}), used as far as it can be decoded; restore it, "
              f"or leave it out with --on_bad_image skip")


def _decode(path, min_size=(math.inf, math.inf)):
    """Return (pixels, size in words, Pillow's mode, damage that was repaired or "")."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.read()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; restore it, or start again without it") from None
    except OSError as error:  # the error of a read does not name the file
        raise InputError(explain_error(OSError(error.errno, error.strerror, str(path)))) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings do not name the file
            return _decode_bytes(path, data, min_size)
    except (InputError, MemoryError):
        raise
    except UnidentifiedImageError:
        what, remedy = next(((name, todo) for pattern, name, todo in SIGNATURES
                             if re.match(pattern, data[:1000], re.DOTALL | re.IGNORECASE)),
                            ("no photo in a known format", "restore or remove the file"))
        raise InputError(f"{path}: cannot be decoded: it is {what}; {remedy}") from None
    except Exception as error:  # damaged files make the decoders raise exceptions of any class
        if isinstance(error, cv2.error) and "Insufficient memory" in str(error):
            raise MemoryError from None
        check = script("tools.check_data")
        raise InputError(f"{path}: cannot be decoded ({as_one_line(error)}); restore or remove the "
                         f"file; {check} finds all such files") from None


def _decode_bytes(path, data, min_size):
    data, orientation, header = data.lstrip(b"\r\n"), 0, None  # web servers add line breaks
    is_jpeg = data.startswith(b"\xff\xd8\xff")
    if is_jpeg:
        orientation, header = _read_jpeg_header(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        data, orientation = _without_png_metadata(data)
    # Most JPEGs do not need Pillow: their header gives size and mode.
    image = None if header else Image.open(io.BytesIO(data), formats=FORMATS)
    width, height, mode = header or (*image.size, image.mode)
    if min(width, height) < MIN_SIDE or width * height > MAX_PIXELS:
        raise InputError(f"{path}: {width} x {height} pixels; expected sides of at least "
                         f"{MIN_SIDE} and at most {MAX_PIXELS:,} pixels; remove or resize it")
    facts, damage = (f"{width} x {height}", mode), ""
    # OpenCV decodes JPEGs twice as fast as Pillow, with the same pixels.
    if is_jpeg:
        if orientation >= 5:  # width and height change places
            min_size = min_size[::-1]
        factor = max(n for n in REDUCED_FLAGS if n == 1 or (
            height >= n * min_size[0] and width >= n * min_size[1]))
        flags = REDUCED_FLAGS[factor] | cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        pixels, damage = _decode_jpeg(data, flags)
        if mode in ("RGB", "L") and pixels is not None:
            return _rotate(pixels, orientation), *facts, damage
    with image or Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _, text = _with_stderr(image.load)  # libtiff's messages
        damage = damage or text
        orientation = orientation or _orientation(image.info.get("exif", b""))  # WebP, AVIF
        if image.mode.startswith(("I", "F")):
            image = Image.fromarray(_to_uint8(np.asarray(image)))
        elif image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return _rotate(np.array(image.convert("RGB")), orientation), *facts, damage


def _decode_jpeg(data, flags):
    """Return (pixels or None, damage that libjpeg repaired or "").

    Raises:
        ValueError: if the file ends before the photo does.
    """
    pixels, text = _with_stderr(cv2.imdecode, np.frombuffer(data, np.uint8), flags)
    if "Premature end of JPEG file" in text:
        raise ValueError("the file is truncated")
    # A few bytes too many before the end marker are harmless.
    if re.search(r"\b[1-7] extraneous bytes before marker 0xd9", text):
        text = ""
    if not (text or data.endswith(b"\xff\xd9") or _has_end_marker(data)):
        text = "its end is missing"
    return pixels, text


def _has_end_marker(data):
    """Return whether a JPEG has its end marker; anything may follow, such as a phone's video."""
    position = 2
    # The next marker: not 0xFF00 (a byte 0xFF of the pixels), nor a restart marker.
    while found := JPEG_MARKER.search(data, position):
        if found[0] == b"\xff\xd9":
            return True
        position = found.end() + int.from_bytes(data[found.end():found.end() + 2], "big")
    return False


def _with_stderr(function, *args):
    """Call a function of a C library; return (its result, what it printed to stderr).

    libjpeg and libtiff report damage only on stderr, without the name of the photo. Use it only in
    processes that decode in one thread: what other threads print would be attributed to the photo.
    """
    try:
        (reader, writer), stderr = _pipe(os.getpid()), os.dup(2)
    except (OSError, AttributeError):  # no stderr, too many open files; Python 3.11 on Windows
        return function(*args), ""
    text = b""
    try:
        os.dup2(writer, 2)
        result = function(*args)
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        # Also after an exception, or the next photo would get the text.
        with contextlib.suppress(BlockingIOError):  # nothing was printed
            text = os.read(reader, 65536)
    return result, " ".join(text.decode(errors="replace").split())[:150]


@functools.lru_cache(maxsize=1)
def _pipe(pid):  # a forked process has another pid, and gets a pipe of its own
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, False)
    return ends


def _to_uint8(values):
    """Scale integers of more than 8 bits, or floats, to 0..255; ValueError for other ranges."""
    low, high = float(values.min()), float(values.max())
    # Filters push floats of 0..1 a little over the edges.
    ranges = [(1, -0.25, 1.5)] if values.dtype.kind == "f" else []
    for scale, least, most in [*ranges, (255, 0, 255), (65535, 0, 65535)]:
        is_ambiguous = ranges and scale > 1 and high < 16  # floats; hardly a photo of 0..255
        if least <= low and high <= most and not is_ambiguous:  # False for NaN, too
            return np.rint(values * (255.0 / scale)).clip(0, 255).astype(np.uint8)
    raise ValueError(f"values from {low:g} to {high:g}; expected 0..1, 0..255 or 0..65535")


def _rotate(pixels, orientation):
    """Turn pixels upright, by the EXIF orientation 1..8; 0 is 1."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


# --- metadata ---

def _read_jpeg_header(data):
    """Return (orientation or 0, (width, height, Pillow's mode) or None if they are not found)."""
    position, orientation, header = 2, 0, None
    while data[position:position + 1] == b"\xff":
        marker = data[position + 1] if position + 1 < len(data) else 0xDA
        if marker == 0xDA:  # start of scan: the pixels
            return orientation, header
        if marker == 0xFF:  # padding
            position += 1
            continue
        end = position + 2 + int.from_bytes(data[position + 2:position + 4], "big")
        segment = data[position:end]
        if marker == 0xE1 and segment[4:10] == b"Exif\0\0":
            orientation = orientation or _orientation(segment[4:])
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(segment) >= 10:
            _, height, width, channels = struct.unpack(">BHHB", segment[4:10])
            header = width, height, {1: "L", 3: "RGB"}.get(channels, "CMYK")
        position = end
    return orientation, header


def _without_png_metadata(data):
    """Return (file, orientation or 0); ValueError if chunks of the pixels are damaged.

    Pillow refuses sound pixels for what other chunks hold, and does not compare all checksums.
    """
    parts, position, orientation = [data[:8]], 8, 0
    while position + 8 <= len(data) and parts[-1][4:8] != b"IEND":
        length, kind = struct.unpack(">I4s", data[position:position + 8])
        chunk = data[position:position + 12 + length]
        position += 12 + length
        is_whole = chunk[-4:] == zlib.crc32(chunk[4:-4]).to_bytes(4, "big")
        if kind == b"eXIf":
            orientation = orientation or _orientation(chunk[8:-4])
        elif kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            if not is_whole:
                what = "wrong checksum" if len(chunk) == 12 + length else "the file is truncated"
                raise ValueError(f"{what} in {kind.decode()}")
            parts.append(chunk)
        elif kind == b"tRNS" and is_whole and length == TRNS_LENGTH.get(parts[1][17:18], length):
            parts.append(chunk)
    if parts[-1][4:8] != b"IEND":
        parts.append(b"\0\0\0\0IEND\xaeB`\x82")
    return b"".join(parts), orientation


def _orientation(exif):
    """Return the orientation 1..8 in a block of EXIF data, or 0 if there is none."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 0
    with contextlib.suppress(struct.error):  # the block is cut
        start, = struct.unpack_from(order + "I", exif, 4)
        count, = struct.unpack_from(order + "H", exif, start)
        for offset in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, offset)
            if tag == ORIENTATION and kind in (3, 4):  # unsigned, 16 or 32 bits
                value, = struct.unpack_from(order + {3: "H", 4: "I"}[kind], exif, offset + 8)
                return value if value <= 8 else 0
    return 0


# --- checking a whole dataset ---

def check_images(paths):
    """Decode photos as training does, on all cores that this process may use.

    Args:
        paths: Series of strings.

    Returns:
        DataFrame with the index of `paths`: error (one line for a photo that cannot be decoded or
        is damaged, or ""), size ("384 x 512", width x height), mode (Pillow's name), and digest
        (SHA-256 of the upright RGB pixels; "" for a photo with an error).
    """
    # Processes, not threads: `_with_stderr` redirects the stderr of the whole process.
    workers = min(cpu_count(), len(paths) // 32)
    with ProcessPoolExecutor(max(workers, 1), initializer=end_with_parent) as pool:
        results = pool.map(_check_image, paths, chunksize=8) if workers > 1 else map(
            _check_image, paths)
        rows = list(tqdm(results, total=len(paths), disable=None, unit="photo", desc="check"))
    return pd.DataFrame(rows, columns=["error", "size", "mode", "digest"], index=paths.index)


def end_with_parent():
    """Initialize a worker of a pool so that it ends when its parent is killed."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


def _check_image(path):
    try:
        pixels, size, mode, damage = _decode(path)
    except InputError as error:
        return str(error), "?", "?", ""
    if damage:
        return f"{path}: damaged ({damage}); restore or remove the file", size, mode, ""
    digest = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
    return "", size, mode, digest


def drop_bad_images(photos):
    """Return the table of photos without those that are damaged or cannot be decoded; log each."""
    errors = check_images(photos.path).error
    for error in errors[errors != ""]:
        log.warning(f"skipped: {error}")
    log.info(f"{(errors != '').sum()} of {len(photos)} photos skipped: they cannot be decoded or "
             f"are damaged")
    return photos[errors == ""].reset_index(drop=True)
