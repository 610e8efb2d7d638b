"""Damaged files of every kind that the commands read give an InputError or a sound result.

FUZZ=20000 python -m pytest tests/test_fuzz.py runs that many examples of each test.
"""
import io
import os
import resource
import shutil

import numpy as np
import pytest
from conftest import make_people, write_eval, write_train
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from core.checkpoint import find_checkpoint, read_training_state
from core.errors import InputError
from core.images import read_image
from core.layout import read_eval, read_train
from model import load_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
fuzz = settings(max_examples=int(os.environ.get("FUZZ", "60")), deadline=5000, database=None,
                suppress_health_check=list(HealthCheck))
# KiB that any number of damaged files may add. The largest photo allowed takes 192 MB as RGB.
MAX_MEMORY = 1_000_000


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


def encoded(form):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image = {"GIF": image.convert("P"), "ICO": image.resize((32, 32)),
             "TIFF": image.convert("CMYK"), "PNG": image.convert("RGBA")}.get(form, image)
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112], exif[0x8769] = 6, {0x9003: "2020:01:01 00:00:00"}  # rotated; its date and time
    has_exif = form in ("JPEG", "MPO", "PNG", "WEBP", "AVIF")
    image.save(file, form, **({"exif": exif} if has_exif else {}))
    return file.getvalue()


IMAGES = {form: encoded(form) for form in ("JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "GIF",
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
        assert image.dtype == np.uint8 and image.shape[2] == 3 and image.size <= 3 * 64_000_000


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A small dataset, and the original bytes of its two tables."""
    root = write_train(tmp_path_factory.mktemp("tables"), make_people(3), shots=["mask1"])
    write_eval(root, count=3)
    return root, {part: (root / part / name).read_bytes() for part, name in TABLES.items()}


TABLES = {"train": "train.csv", "eval": "info.csv"}


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
