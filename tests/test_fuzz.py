"""Damaged files of every kind that the commands read: our own error or a sound result, nothing else, quickly.

FUZZ=20000 python -m pytest tests/test_fuzz.py runs as many examples of each test as it says.
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

from checkpoint import find_checkpoint, load_model, read_training_state
from errors import InputError
from layout import read_eval, read_image, read_train

fuzz = settings(max_examples=int(os.environ.get("FUZZ", "60")), deadline=5000, database=None,
                suppress_health_check=list(HealthCheck))
MEMORY = 1_000_000  # KiB that any number of damaged files may add; the largest photo allowed takes 192 MB as RGB


@pytest.fixture(scope="module", autouse=True)
def memory_is_bounded():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY


# Places as fractions of the file, so that they fit any file; what is put there, and how many bytes it replaces.
new_bytes = st.binary(max_size=6) | st.sampled_from([b"0", b"9", b"-", b"\xff\xff\xff\xff", b"\0" * 8])
edits = st.lists(st.tuples(st.floats(0, 1), new_bytes, st.integers(0, 12)), min_size=1, max_size=6)
cuts = st.none() | st.floats(0, 1)


def mutate(data, changes, cut):
    data = bytearray(data)
    for place, new, length in changes:
        start = int(place * len(data))
        data[start:start + length] = new
    return bytes(data if cut is None else data[:int(cut * len(data))])


def encoded(form):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image = {"GIF": image.convert("P"), "ICO": image.resize((32, 32)), "TIFF": image.convert("CMYK"),
             "PNG": image.convert("RGBA")}.get(form, image)
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112], exif[0x8769] = 6, {0x9003: "2020:01:01 00:00:00"}  # lies on its side; when it was taken
    image.save(file, form, **({"exif": exif} if form in ("JPEG", "MPO", "PNG", "WEBP", "AVIF") else {}))
    return file.getvalue()


IMAGES = {form: encoded(form) for form in ("JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "GIF", "EPS", "DDS", "ICO")}


@pytest.mark.filterwarnings("ignore::UserWarning")
@fuzz
@given(st.sampled_from(sorted(IMAGES)), edits, cuts)
def test_images(tmp_path_factory, form, changes, cut):
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
    """A dataset to spoil, and the sound bytes of its two tables."""
    root = write_eval(write_train(tmp_path_factory.mktemp("tables"), make_people(3), shots=["mask1"]), count=3)
    return root, {part: (root / part / name).read_bytes() for part, name in [("train", "train.csv"), ("eval", "info.csv")]}


@pytest.mark.filterwarnings("ignore::UserWarning")
@fuzz
@given(st.sampled_from(["train", "eval"]), edits, cuts)
def test_tables(tables, part, changes, cut):
    root, sound = tables
    name = {"train": "train.csv", "eval": "info.csv"}[part]
    (root / part / name).write_bytes(mutate(sound[part], changes, cut))
    try:
        photos = {"train": read_train, "eval": read_eval}[part](root)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert all(os.path.realpath(path).startswith(os.path.realpath(root)) for path in photos.path)


@pytest.fixture(scope="module")
def checkpoint(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzzed") / "checkpoint-9"
    shutil.copytree(trained / "checkpoint-9", folder)
    (folder / "SHA256SUMS").unlink()  # which would find every change before a reader does
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
@fuzz
@given(st.sampled_from(["config.json", "model.safetensors", "training_state.pt", "trainer_state.json"]), edits, cuts, st.booleans())
def test_checkpoints(checkpoint, trained, name, changes, cut, in_header):
    folder, sound = checkpoint, (trained / "checkpoint-9" / name).read_bytes()
    if in_header and name == "model.safetensors":
        changes = [(place / 10, new, length) for place, new, length in changes]
    (folder / name).write_bytes(mutate(sound, changes, cut))
    read = {"training_state.pt": read_training_state, "trainer_state.json": lambda folder: find_checkpoint(folder.parent)}
    try:
        read.get(name, load_model)(folder)
    except InputError as error:
        assert "\n" not in str(error)
    finally:
        (folder / name).write_bytes(sound)
