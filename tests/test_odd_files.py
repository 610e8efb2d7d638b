"""Odd files, tables and trees: each gets the right pixels or rows, or one clear line."""
# ruff: noqa: F811  (fixtures are imported by their names)
import contextlib
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, make_people, write_eval, write_train
from photo_files import JPEG, PIXELS, PNG, Y, chunk, encoded, in_jpeg, in_png, segment
from PIL import Image
from test_photos import COLOUR, END, GRAY, PLAIN, blocks, cut, no_foreign_line, read  # noqa: F401

from core.errors import InputError
from core.images import _with_stderr, check_images
from core.layout import list_images, read_eval, read_train
from core.tables import read_table

# --- truncated PNGs are accepted with wrong pixels ---

def test_a_png_that_is_cut_anywhere_is_refused_or_whole(read):
    simple = np.kron(np.arange(24, dtype=np.uint8).reshape(6, 4) * 10, np.ones((10, 12), np.uint8))
    for pixels in (PIXELS, np.dstack([simple] * 3)):
        whole = encoded(pixels, "PNG")
        for length in range(45, len(whole)):
            with contextlib.suppress(InputError):
                assert (read(whole[:length]) == pixels).all(), length


# --- F2, F3: damage that goes unnoticed ---

def error_of(tmp_path, data):
    (tmp_path / "x.jpg").write_bytes(data)
    return check_images(pd.Series([str(tmp_path / "x.jpg")])).error[0]


@pytest.mark.parametrize("quality", [92, 95])
@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_a_jpeg_whose_rest_is_zeros_is_named(tmp_path, quality, part):
    """An interrupted download into a file of full size; the end marker is missing."""
    for data in [encoded(COLOUR, "JPEG", quality=quality, subsampling=0),
                 encoded(blocks(20, 15), "JPEG", quality=quality)]:
        length = int(part * len(data))
        assert error_of(tmp_path, data[:length] + bytes(len(data) - length)) != ""


def test_few_odd_bytes_do_not_hide_the_damage_behind_them(tmp_path):
    """libjpeg prints only its first warning."""
    data = encoded(COLOUR, "JPEG", quality=92, restart_marker_blocks=8)
    markers = [i for i in range(len(data) - 1) if data[i] == 0xFF and 0xD0 <= data[i + 1] <= 0xD7]
    early, middle = markers[2], markers[len(markers) // 2]
    lost = data[:early] + b"\x12\x34\x56" + data[early:middle] + END
    assert error_of(tmp_path, lost) != ""
    # A hole: 11 of 100 are not named, with "58 extraneous bytes before marker 0xd7" and the like.
    silent, rng = 0, np.random.default_rng(1)
    for start in rng.integers(len(data) // 10, len(data) - 4200, 40):
        silent += error_of(tmp_path, data[:start] + data[start + 4096:]) == ""
    # Zeros inside a gray photo: 45 of 100 ("44 extraneous bytes before marker 0xd9").
    for start in rng.integers(len(GRAY) // 10, len(GRAY) - 4200, 40):
        damaged = GRAY[:start] + bytes(4096) + GRAY[start + 4096:]
        silent += error_of(tmp_path, damaged) == ""
    assert silent <= 8  # damage of which libjpeg says nothing cannot be found


# --- black photos from floats that exceed 1 a little ---

@pytest.mark.parametrize("high", [1.0000001, 1.02, 1.5])
def test_floats_that_exceed_1_a_little_are_no_black_photo(read, high):
    values = np.float32(Y / Y.max() * high)
    expected = np.rint(values.clip(0, 1) * 255)
    with contextlib.suppress(InputError):
        assert np.abs(read(encoded(values, "TIFF"))[..., 0] - expected).max() <= 8


# --- processes of the check ---

@pytest.fixture
def checking(tmp_path):
    """A running `tools.check_data` with its worker processes."""
    large = encoded(np.kron(COLOUR, np.ones((5, 5, 1), np.uint8)), "JPEG")
    for i in range(400):
        (tmp_path / f"{i}.jpg").write_bytes(large)
    process = subprocess.Popen([sys.executable, "-m", "tools.check_data", str(tmp_path)],
                               cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    workers = []
    while not workers and process.poll() is None:
        time.sleep(0.05)
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
            workers = [int(pid) for pid in file.read().split()]
    time.sleep(0.3)
    yield process, workers
    process.kill()
    for pid in workers:
        if os.path.exists(f"/proc/{pid}"):
            os.kill(pid, signal.SIGKILL)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_process_is_left_when_the_check_is_killed(checking):
    process, workers = checking
    process.terminate()
    process.wait(20)
    deadline = time.time() + 10
    while any(map(is_running, workers)) and time.time() < deadline:
        time.sleep(0.1)
    assert workers and not any(map(is_running, workers))


def test_a_killed_worker_of_the_check_is_one_line(checking):
    process, workers = checking
    os.kill(workers[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and b"Traceback" not in stderr
    assert stderr.count(b"\n") == 1 and b"memory" in stderr


# --- F6, F7: finding photos ---

def test_folders_that_cannot_be_read_are_counted_or_named():
    tmp_path = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "b.jpg").write_bytes(JPEG)
    code = (f"import os, logging; logging.basicConfig(format='%(message)s')\n"
            f"from core.layout import list_images\n"
            f"os.chmod({str(tmp_path / 'closed')!r}, 0)\n"
            f"os.chmod({str(tmp_path)!r}, 0o755)\n"
            f"os.setgid(65534); os.setuid(65534) if os.getuid() == 0 else None\n"
            f"print(list_images([{str(tmp_path)!r}]))")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    (tmp_path / "closed").chmod(0o755)
    shutil.rmtree(tmp_path)
    assert "closed" in result.stdout + result.stderr, result


def test_the_name_of_a_photo_does_not_depend_on_which_link_is_met_first(tmp_path):
    (tmp_path / "z_real").mkdir()
    (tmp_path / "z_real" / "x.jpg").write_bytes(JPEG)
    for name in "mabc":
        (tmp_path / name).symlink_to("z_real")
    assert list_images([tmp_path]).ImageID.tolist() in (
        ["z_real/x.jpg"], sorted(["a/x.jpg", "b/x.jpg", "c/x.jpg", "m/x.jpg", "z_real/x.jpg"]))


def test_a_photo_beside_the_folders_of_people_is_counted(tmp_path, caplog):
    root = write_train(tmp_path, make_people(2), shots=["mask1"])
    (root / "train" / "images" / "loose.jpg").write_bytes(JPEG)
    read_train(root)
    assert "loose.jpg" in caplog.text


def test_a_link_that_leads_to_itself_does_not_end_the_reading(tmp_path):
    root = write_train(tmp_path, make_people(2), shots=["mask1"])
    link = root / "train" / "images" / make_people(2)[0] / "normal.jpg"
    link.symlink_to(link.name)
    assert len(read_train(root)) == 2


def test_photos_in_linked_folders_match_by_unicode_form(tmp_path):
    root = write_eval(tmp_path, count=1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jpg").write_bytes(JPEG)
    link = unicodedata.normalize("NFD", "사진")
    (root / "eval" / "images" / link).symlink_to(tmp_path / "elsewhere")
    (root / "eval" / "info.csv").write_text("ImageID,ans\n사진/x.jpg,0\n")
    assert os.path.isfile(read_eval(root).path[0])


def test_two_lines_never_mean_the_same_folder(tmp_path):
    """The person would be in training and in validation."""
    root = write_train(tmp_path, make_people(2), shots=["mask1"])
    csv = root / "train" / "train.csv"
    csv.write_text(csv.read_text() + f"9,male,Asian,20,{make_people(2)[0]} \n")
    with pytest.raises(InputError):
        read_train(root)


# --- one line, also with line breaks in names ---

def test_a_missing_quote_is_one_line_that_names_the_row(tmp_path):
    root = write_eval(tmp_path, count=2)
    info = root / "eval" / "info.csv"
    info.write_text('ImageID,ans\n"a.jpg,0\nb.jpg,0\n')
    with pytest.raises(InputError, match="line 2") as caught:
        read_eval(root)
    assert "\n" not in str(caught.value)


# --- sound pixels that are refused for what stands beside them ---

@pytest.mark.parametrize("name", ["short transparency", "empty transparency", "short APP14"])
def test_sound_pixels_are_read(read, name):
    data = {
        "short transparency": in_png(chunk(b"tRNS", b"\0\1")),
        "empty transparency": in_png(chunk(b"tRNS", b"")),
        "short APP14": in_jpeg(segment(0xEE, b"Adobe")),
    }[name]
    expected = read(JPEG) if name == "short APP14" else PIXELS
    assert (read(data) == expected).all()


# --- refusals that say what the file is ---

@pytest.mark.parametrize(("form", "word"), [
    ("jpeg", "JPEG"), ("12 bit", "JPEG"), ("png", "truncated in IHDR"),
    ("tiff", "TIFF"), ("tiff mm", "TIFF"),
    ("float", "TIFF"), ("html", "HTML"), ("json", "JSON|text"), ("avi", "video"),
    ("avif", "damaged|trunc")])
def test_a_refusal_names_the_real_format(read, form, word):
    planes = np.stack([Y, Y, Y], axis=2).astype(np.float32) / 60
    strips = planes.astype(">f4").tobytes()
    entries = [(256, 4, 48), (257, 4, 60), (258, 3, 32 << 16), (259, 3, 1 << 16), (262, 3, 2 << 16),
               (273, 4, 200), (277, 3, 3 << 16), (278, 4, 60), (279, 4, len(strips)),
               (339, 3, 3 << 16)]
    mm = b"MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + b"".join(
        struct.pack(">HHII", tag, kind, 1, value) for tag, kind, value in entries)
    sof = JPEG.index(b"\xff\xc0")
    data = {
        "jpeg": JPEG[:160], "12 bit": JPEG[:sof + 4] + b"\x0c" + JPEG[sof + 5:], "png": PNG[:20],
        "tiff": encoded(PIXELS, "TIFF", compression="tiff_lzw")[:500],
        "tiff mm": mm.ljust(200, b"\0") + strips, "float": b"II*\0\xff\xff\xff\x7f",
        "html": b"\xef\xbb\xbf<!doctype html>", "json": b'{"message": "Not Found"}',
        "avi": b"RIFF\xff\xff\0\0AVI LIST", "avif": b"\0\0\0\x1cftypavif" + bytes(90),
    }[form]
    with pytest.raises(InputError, match=f"(?i){word}") as caught:
        read(data)
    assert "camera raw" not in str(caught.value) and "no photo in a known" not in str(caught.value)


# --- lines of other libraries ---

def test_a_damaged_tiff_prints_no_foreign_line(read, capfd):
    data = bytearray(encoded(COLOUR, "TIFF", compression="tiff_lzw"))
    data[len(data) // 3:len(data) // 3 + 30] = bytes(30)
    with contextlib.suppress(InputError):
        read(bytes(data))
    assert capfd.readouterr() == ("", "")


# --- tables that were read before ---

@pytest.mark.parametrize("content", [
    "\n\npath,age\na,1\n",  # pandas skipped empty lines in front
    "path,note,age,note\na,x,1,y\n",  # other columns are ignored, says the README
    "path,age,note\na,1," + "x" * 200_000 + "\n",
], ids=["empty lines in front", "repeated other column", "large cell"])
def test_tables_that_were_read_are_still_read(tmp_path, content):
    (tmp_path / "t.csv").write_text(content)
    assert read_table(tmp_path / "t.csv", ["path", "age"]).path.tolist() == ["a"]


# --- too little memory is not damage ---

def test_too_little_memory_is_not_called_damage(tmp_path):
    Image.new("RGB", (9000, 9000)).save(tmp_path / "x.png", compress_level=1)
    code = (f"import resource\nfrom core.images import read_image\n"
            f"used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
            f"resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000,) * 2)\n"
            f"read_image({str(tmp_path / 'x.png')!r})")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "restore or remove the file" not in result.stderr


def test_what_a_decoder_printed_before_it_failed_is_not_said_of_the_next_photo():
    def fail():
        os.write(2, b"damaged")
        raise ValueError

    with pytest.raises(ValueError):
        _with_stderr(fail)
    assert _with_stderr(os.write, 2, b"odd\n bytes") == (10, "odd bytes")
    assert _with_stderr(int) == (0, "")
