"""Photos as bytes, built by hand: segments of JPEG, chunks of PNG, blocks of EXIF."""
import io
import struct
import zlib

import numpy as np
from PIL import Image

Y, X = np.mgrid[:60, :48]
PIXELS = np.stack([X * 4 + 20, Y * 4, 255 - X * 3], axis=2).clip(0, 255).astype(np.uint8)
NOISE = np.random.default_rng(0).bytes(3_000_000)


def encoded(image, form, **options):
    """Return an image, or an array of pixels, as the bytes of a file."""
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, form, **options)
    return file.getvalue()


JPEG = encoded(PIXELS, "JPEG", quality=95)
PNG = encoded(PIXELS, "PNG")
WEBP = encoded(PIXELS, "WEBP", lossless=True)


def segment(marker, payload):
    """Return a segment of a JPEG; the marker is 0xE1 for APP1 and so on."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


def in_jpeg(*segments):
    """Return JPEG with segments behind its first two bytes."""
    return JPEG[:2] + b"".join(segments) + JPEG[2:]


def chunk(kind, payload, damage=0):
    """Return a chunk of a PNG; `damage` changes its checksum."""
    checksum = struct.pack(">I", zlib.crc32(kind + payload) ^ damage)
    return struct.pack(">I", len(payload)) + kind + payload + checksum


def in_png(*chunks):
    """Return PNG with chunks behind its header."""
    return PNG[:33] + b"".join(chunks) + PNG[33:]


def exif(*entries, order="<"):
    """Return a block of EXIF with entries (tag, type, count, value of at most 4 bytes)."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(entries))
    body = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3].ljust(4, b"\0")
                    for entry in entries)
    return head + body + bytes(4)


def oriented(value, order="<"):
    """Return a block of EXIF with the name of a camera and an orientation."""
    return exif((0x010F, 2, 4, b"cam\0"), (0x0112, 3, 1, struct.pack(order + "H", value)),
                order=order)
