"""Damaged files of every kind that the commands read give an InputError or a sound result.

FUZZ=20000 python -m pytest tests/test_fuzz.py runs that many examples of each test.
"""
import csv
import io
import os
import resource
import shutil
import struct
import zlib

import numpy as np
import pytest
from conftest import make_people, write_eval, write_train
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from photo_files import JPEG, PNG, WEBP, chunk, encoded, exif, segment
from PIL import Image

from core.checkpoint import find_checkpoint, read_training_state
from core.errors import InputError
from core.images import MAX_PIXELS, read_image
from core.layout import read_eval, read_train
from core.tables import read_table
from model import load_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
fuzz = settings(max_examples=int(os.environ.get("FUZZ", "60")), deadline=60_000, database=None,
                suppress_health_check=list(HealthCheck))
# KiB that any number of damaged files may add. A JPEG with a damaged header may be read as one of
# 200 million pixels, which takes 1.2 GB (measured). No other format makes so much of a short file.
MAX_MEMORY = 1_600_000


@pytest.fixture(scope="module", autouse=True)
def memory_is_bounded():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_MEMORY


# Positions are fractions of the file's length, so that they fit any file. An edit is a position,
# the new bytes, and the number of bytes that they replace.
new_bytes = st.binary(max_size=6) | st.sampled_from([b"0", b"9", b"-", b"\xff" * 4, b"\0" * 8])
edits = st.lists(st.tuples(st.floats(0, 1), new_bytes, st.integers(0, 12)), min_size=1, max_size=6)
cuts = st.none() | st.floats(0, 1)


def mutate(data, changes, cut):
    data = bytearray(data)
    for position, new, length in changes:
        start = int(position * len(data))
        data[start:start + length] = new
    return bytes(data if cut is None else data[:int(cut * len(data))])


def sample_photo(form):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image = {"GIF": image.convert("P"), "ICO": image.resize((32, 32)),
             "TIFF": image.convert("CMYK"), "PNG": image.convert("RGBA")}.get(form, image)
    block = Image.Exif()
    block[0x0112], block[0x8769] = 6, {0x9003: "2020:01:01 00:00:00"}  # rotated; its date and time
    has_exif = form in ("JPEG", "MPO", "PNG", "WEBP", "AVIF")
    return encoded(image, form, **({"exif": block} if has_exif else {}))


IMAGES = {form: sample_photo(form) for form in ("JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "GIF",
                                                "EPS", "DDS", "ICO")}


@fuzz
@given(st.sampled_from(sorted(IMAGES)), edits, cuts)
def test_a_damaged_photo_is_named_or_decoded(tmp_path_factory, form, changes, cut):
    path = tmp_path_factory.getbasetemp() / "fuzzed.jpg"
    path.write_bytes(mutate(IMAGES[form], changes, cut))
    try:
        image = read_image(path)
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert image.dtype == np.uint8 and image.shape[2] == 3 and image.size <= 3 * MAX_PIXELS


# --- metadata ---

# Payloads of all sizes; zlib streams, which text and colour profiles of a PNG hold.
streams = st.integers(0, 3_000_000).map(lambda size: b"a\0\0" + zlib.compress(bytes(size)))
payloads = st.one_of(st.binary(max_size=60), st.integers(0, 65_000).map(bytes), streams)
# Entries (tag, type, count, value) of EXIF, but for the orientation.
numbers = st.sampled_from([0, 1, 2, 8, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]) | st.integers(0, 2**32 - 1)
tags = st.sampled_from([0x0100, 0x010F, 0x011A, 0x0132, 0x8769, 0x8825, 0xA005, 0x927C, 0x0201])
entries = st.lists(st.tuples(tags, st.integers(0, 13), numbers, st.binary(max_size=4)), max_size=6)
# How the pixels are turned for each orientation.
TURNED = {1: lambda pixels: pixels, 2: np.fliplr, 3: lambda pixels: np.rot90(pixels, 2),
          4: np.flipud, 5: lambda pixels: pixels.transpose(1, 0, 2),
          6: lambda pixels: np.rot90(pixels, -1),
          7: lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2), 8: np.rot90}


@st.composite
def exif_blocks(draw):
    """Return (block, orientation): a block of EXIF with odd entries beside the orientation."""
    orientation, order = draw(st.integers(1, 8)), draw(st.sampled_from("<>"))
    before, behind = draw(entries), draw(entries)
    entry = (0x0112, 3, 1, struct.pack(order + "H", orientation))
    return exif(*before, entry, *behind, order=order) + draw(st.binary(max_size=30)), orientation


# Segments that are no EXIF, and chunks that are neither pixels nor transparency.
segments = st.builds(segment, st.sampled_from([*range(0xE1, 0xEE), 0xEF, 0xFE]),
                     payloads.map(lambda data: data[:65_533]))
names = st.sampled_from([b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"gAMA", b"cHRM", b"sRGB", b"pHYs",
                         b"sBIT", b"bKGD", b"hIST", b"tIME", b"acTL", b"fcTL", b"fdAT", b"prVt"])
chunks = st.builds(chunk, names, payloads, st.sampled_from([0, 0, 1]))


def webp_chunk(name, payload):
    return name + struct.pack("<I", len(payload)) + payload + bytes(len(payload) % 2)


@fuzz
@given(st.sampled_from(["JPEG", "PNG", "WEBP"]), st.lists(segments, max_size=30),
       st.lists(chunks, max_size=9), exif_blocks(), st.integers(0, 2), payloads)
def test_metadata_changes_nothing_but_the_orientation(tmp_path_factory, form, segments, chunks,
                                                      block, place, payload):
    """Metadata of any content and size; the EXIF comes first, in the middle or last."""
    block, orientation = block
    if form == "JPEG":
        assume(not any(part[4:10] == b"Exif\0\0" for part in segments))
        segments.insert(place * len(segments) // 2, segment(0xE1, b"Exif\0\0" + block))
        clean, data = JPEG, JPEG[:2] + b"".join(segments) + JPEG[2:]
    elif form == "PNG":
        chunks.insert(place * len(chunks) // 2, chunk(b"eXIf", block))
        half, clean = len(chunks) // 2, PNG  # before the pixels, and behind them
        data = b"".join([PNG[:33], *chunks[:half], PNG[33:-12], *chunks[half:], PNG[-12:]])
    else:
        size = struct.pack("<I", 47)[:3] + struct.pack("<I", 59)[:3]  # width - 1, height - 1
        parts = [webp_chunk(b"VP8X", b"\x0c\0\0\0" + size), WEBP[12:], webp_chunk(b"EXIF", block),
                 webp_chunk(b"XMP ", payload)]
        body = b"WEBP" + b"".join(parts)
        clean, data = WEBP, b"RIFF" + struct.pack("<I", len(body)) + body
    path = tmp_path_factory.getbasetemp() / "metadata.jpg"
    path.write_bytes(clean)
    expected = TURNED[orientation](read_image(path))
    path.write_bytes(data)
    assert np.array_equal(read_image(path), expected)


# --- tables ---

@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A small dataset, and the original bytes of its two tables."""
    root = write_train(tmp_path_factory.mktemp("tables"), make_people(3), shots=["mask1"])
    write_eval(root, count=3)
    return root, {part: (root / part / name).read_bytes() for part, name in TABLES.items()}


TABLES = {"train": "train.csv", "eval": "info.csv"}

texts = st.text("ab1김 ,;\t\"'\n.-#", min_size=1, max_size=8).map(str.strip).filter(bool)
cells = texts | st.sampled_from(["NA", "null", "007", "1e5", "True", "1.0", "0x1F", "inf"])
words = cells.filter(lambda text: "\n" not in text)
rows = st.lists(st.tuples(words, words, st.just("") | cells), min_size=1, max_size=6,
                unique_by=lambda row: row[0])


@fuzz
@given(rows, st.sampled_from(",;\t"), st.sampled_from(["\n", "\r\n", "\r"]),
       st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp949"]),
       st.booleans(), st.integers(0, 2), st.lists(st.integers(0, 9), max_size=2),
       st.none() | st.tuples(st.integers(0, 5), st.sampled_from(["short", "long"])))
def test_a_table_of_any_shape_is_read_rightly_or_refused_with_the_remedy(
        tmp_path_factory, rows, separator, end, encoding, all_quoted, trailing, ghosts, ragged):
    """Ragged rows have one cell too few or too many; ghost rows have no value."""
    columns, written = ["path", "age", "note"], [list(row) for row in rows]
    if ragged and ragged[0] < len(rows):
        index, kind = ragged
        written[index] = written[index][:1] if kind == "short" else [*written[index], "x"]
    else:
        ragged = None
    for position in ghosts:
        written.insert(position, ["", "", ""])
    # Written by Python's csv module; the line of each row is counted on the way.
    file, line, lines = io.StringIO(newline=""), 1, []
    quoting = csv.QUOTE_ALL if all_quoted else csv.QUOTE_MINIMAL
    writer = csv.writer(file, delimiter=separator, lineterminator="\n", quoting=quoting)
    for row in [columns, *written]:
        start = file.tell()
        writer.writerow(row + [""] * trailing)
        lines.append(line)
        line += file.getvalue()[start:].count("\n")
    text = file.getvalue().replace("\n", end)
    is_readable = encoding in ("utf-8", "utf-8-sig", "utf-16") or (
        encoding == "cp949" and text.isascii())
    path = tmp_path_factory.getbasetemp() / "shape.csv"
    path.write_bytes(text.encode(encoding))
    try:
        table = read_table(path, ["path", "age"], key="path")
    except InputError as error:
        message = str(error)
        assert "\n" not in message
        if is_readable:
            index = written.index(next(row for row in written if len(row) != 3))
            assert ragged and f"line {lines[1 + index]}: " in message
        else:
            assert "save it as CSV UTF-8" in message
    else:
        assert is_readable and not ragged
        expected = {at: row for at, row in zip(lines[1:], written, strict=True) if any(row)}
        assert table.columns.tolist() == columns
        assert table.index.tolist() == list(expected)
        assert table.to_numpy().tolist() == list(expected.values())


@fuzz
@given(st.sampled_from(sorted(TABLES)), edits, cuts)
def test_a_damaged_table_never_leads_out_of_the_dataset(tables, part, changes, cut):
    root, original = tables
    (root / part / TABLES[part]).write_bytes(mutate(original[part], changes, cut))
    try:
        photos = {"train": read_train, "eval": read_eval}[part](root)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert all(os.path.realpath(path).startswith(os.path.realpath(root))
                   for path in photos.path)


@pytest.fixture(scope="module")
def checkpoint(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzzed") / "checkpoint-9"
    return shutil.copytree(trained / "checkpoint-9", folder)


READERS = {"config.json": load_model, "model.safetensors": load_model,
           "training_state.pt": read_training_state,
           "trainer_state.json": lambda folder: find_checkpoint(folder.parent)}


@fuzz
@given(st.sampled_from(sorted(READERS)), edits, cuts, st.booleans())
def test_a_damaged_checkpoint_is_refused_in_one_line_or_read(checkpoint, trained, name, changes,
                                                             cut, in_header):
    original = (trained / "checkpoint-9" / name).read_bytes()
    if in_header and name == "model.safetensors":  # the header is the first tenth of the file
        changes = [(position / 10, new, length) for position, new, length in changes]
    (checkpoint / name).write_bytes(mutate(original, changes, cut))
    try:
        READERS[name](checkpoint)
    except InputError as error:
        assert "\n" not in str(error)
    finally:
        (checkpoint / name).write_bytes(original)
