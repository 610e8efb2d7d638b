"""The data: person split, crop and resize, augmentation presets, dataset, batches.

    from dataset import MaskDataset, read_train, split_people

Batch k of a run depends only on (seed, k). It is therefore the same for any number of loader
processes, and after a resume. Tables of photos are pandas DataFrames with one row per photo.
"""
import functools
import logging
import math
import os
import random
import signal

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from core import distributed
from core.cli import STOP_SIGNALS
from core.errors import InputError
from core.images import read_image
from core.labels import AGES, NUM_CLASSES, PROBABILITIES, decode
from core.layout import (
    dataset_folders,
    read_eval,
    read_train,  # noqa: F401  (other files import it from here)
)
from core.tables import read_table

# Without this, importing albumentations asks the network for its newest version.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A

log = logging.getLogger("mask")

cv2.setNumThreads(0)  # one photo is too little work to share between threads


# --- person split ---

def split_people(photos, val_ratio=0.2, seed=0, n_folds=0, fold=0):
    """Split whole people into training and validation, stratified on gender x age band.

    People are shuffled within their group, the groups are concatenated, and validation takes
    evenly spaced positions (systematic sampling). The number of validation people is exact, and
    that of each group is exact to within one person. Fold k takes positions k, k + n_folds, ...

    Args:
        photos: the table of `read_train`.
        val_ratio: fraction of the people in validation, 0 <= val_ratio < 1; 0 trains on everyone.
        seed: seed of the shuffle.
        n_folds, fold: with n_folds >= 2 validation is this fold, and val_ratio is ignored.

    Returns:
        (train, valid): two tables without a common person.

    Raises:
        InputError: if one of them would be empty.
    """
    # Sorted first: the split must not depend on the order of the table.
    people = photos.drop_duplicates("person").sort_values("person")
    shuffled = people.iloc[np.random.default_rng(seed).permutation(len(people))]
    ordered = shuffled.sort_values(["gender", "age"], kind="stable").person.to_numpy()
    count = len(ordered)
    if n_folds:
        positions = np.arange(count)[fold::n_folds]  # spreads each group over all folds
    else:
        num_valid = round(count * val_ratio)
        # Take the middle of each of num_valid equal parts of the list.
        positions = ((np.arange(num_valid) + 0.5) * count / max(num_valid, 1)).astype(int)
    needs_valid = n_folds or val_ratio > 0
    if len(positions) == count or (needs_valid and not len(positions)) or count < n_folds:
        flag = f"--n_folds {n_folds}" if n_folds else f"--val_ratio {val_ratio}"
        raise InputError(f"{count} people are too few for {flag}: training and validation need at "
                         f"least one person each")
    is_valid = photos.person.isin(ordered[positions])
    return (photos[~is_valid].reset_index(drop=True), photos[is_valid].reset_index(drop=True))


# --- photos without labels ---

def add_soft_targets(photos, targets, files, data_dir):
    """Add the photos of the eval part to training, with predicted probabilities as their targets.

    These are pseudo-labels (Lee 2013), soft as in distillation (Hinton et al. 2015).

    Args:
        photos, targets: the table of the labelled photos, and their targets (N, 18).
        files: csv files with ImageID, which is a photo of the eval part, and p0..p17; the mean of
            the files is used.
        data_dir: the dataset.

    Returns:
        (photos, targets) with more rows, whose gender and age are the most probable ones; without
        files, what was passed.

    Raises:
        InputError: if a file lists other photos, or its values are not probabilities, and as
            `read_eval` and `read_table`.
    """
    if not files:
        return photos, targets
    eval_photos = read_eval(dataset_folders(data_dir)["eval_dir"] or data_dir)
    tables = [read_table(file, ["ImageID", *PROBABILITIES], key="ImageID") for file in files]
    added = eval_photos[eval_photos.ImageID.isin(tables[0].ImageID)]
    total = np.zeros((len(added), NUM_CLASSES))
    for file, table in zip(files, tables, strict=True):
        listed, expected = set(table.ImageID), set(added.ImageID)
        if listed != expected:
            name = min(listed - expected or expected - listed)
            raise InputError(f"--soft_targets {file}: {name!r} is not in the eval part of "
                             f"{data_dir}, or not in all files; expected the same photos in all")
        values = table[PROBABILITIES].apply(pd.to_numeric, errors="coerce")
        # Rounded probabilities may miss a sum of 1 by a little.
        wrong = ~(values.ge(0).all(axis=1) & values.sum(axis=1).between(0.99, 1.01))
        if wrong.any():
            raise InputError(f"--soft_targets {file}, line {table.index[wrong][0]}: expected "
                             f"p0..p17 >= 0 with a sum of 1")
        total += values.set_index(table.ImageID).loc[added.ImageID].to_numpy()
    total /= total.sum(axis=1, keepdims=True)
    log.info(f"photos of the eval part that join training: {len(added)}")
    _, gender, age = decode(total.argmax(axis=1))  # for the weighted sampler
    added = added.assign(gender=gender, age=age)
    targets = torch.cat([targets, torch.tensor(total, dtype=targets.dtype)])
    return pd.concat([photos, added], ignore_index=True), targets


# --- crop and resize ---

MAX_PLAIN_SHRINK = 1.35  # shrinking by up to this factor needs no antialiasing


class CropResize:
    """Centre crop, then resize: the one geometry of training, validation and inference.

    Args:
        size: (height, width) of the result in pixels.
        crop: (height, width) of the centre crop as fractions of the photo, each in (0, 1].
    """

    def __init__(self, size, crop=(1.0, 1.0)):
        self.size, self.crop = tuple(size), tuple(crop)
        # The decoder may shrink a photo to this size: enough for the antialiased resize.
        self.min_size = tuple(1.5 * side / part
                              for side, part in zip(self.size, self.crop, strict=True))

    def __call__(self, pixels, affine=None):
        """Crop and resize a photo; with `affine`, transform it in the same step.

        Args:
            pixels: uint8 array (H, W, 3).
            affine: 3 x 3 matrix from output pixels to input pixels, as `cv2.WARP_INVERSE_MAP`
                expects, in the coordinates of the result. Pixels from outside the crop come from
                the photo around it; outside the photo they are reflected.

        Returns:
            uint8 array (height, width, 3).
        """
        if affine is None:
            # Rounding to whole pixels moves the crop by at most half a pixel of the photo.
            top, left, height, width = (round(value) for value in self._crop_box(pixels))
            return _resize(pixels[top:top + height, left:left + width], self.size)

        # A photo that shrinks a lot is antialiased first, but only down to MAX_PLAIN_SHRINK times
        # the size: the warp below also blurs, and training photos must be as sharp as validation
        # photos.
        _, _, height, width = self._crop_box(pixels)
        if max(height / self.size[0], width / self.size[1]) > MAX_PLAIN_SHRINK:
            shrink = MAX_PLAIN_SHRINK * np.divide(self.size, (height, width))
            pixels = _resize(pixels, np.rint(pixels.shape[:2] * shrink).astype(int).tolist())

        # `to_photo` maps a pixel (x, y) of the result to the photo; pixel centres are at
        # half-integers. Together with `affine` it is one warp.
        top, left, height, width = self._crop_box(pixels)
        y, x = height / self.size[0], width / self.size[1]
        to_photo = np.array([[x, 0, left + x / 2 - 0.5], [0, y, top + y / 2 - 0.5], [0, 0, 1]])
        # OpenCV warps four channels twice as fast as three.
        warped = cv2.warpAffine(cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA), (to_photo @ affine)[:2],
                                self.size[::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                                borderMode=cv2.BORDER_REFLECT_101)
        return cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB)

    def _crop_box(self, pixels):
        """Return (top, left, height, width) of the centre crop, not rounded."""
        height, width = pixels.shape[0] * self.crop[0], pixels.shape[1] * self.crop[1]
        return (pixels.shape[0] - height) / 2, (pixels.shape[1] - width) / 2, height, width


def _resize(pixels, size):
    """Resize a uint8 array (H, W, 3) bilinearly to (height, width), antialiased if it shrinks."""
    if max(pixels.shape[0] / size[0], pixels.shape[1] / size[1]) <= MAX_PLAIN_SHRINK:
        return cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_LINEAR)
    # OpenCV has no antialiased bilinear resize; torch and Pillow have one.
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    resized = F.interpolate(planes, size=size, mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


# --- augmentation ---

class RandomAffine:
    """Random mirror, zoom, shift and rotation, done in the same pass as crop and resize.

    Args:
        flip: probability of the mirror image.
        p: probability of zoom, scale, shift and rotation, which are drawn together.
        zoom: range of the magnification, drawn for height and width separately.
        scale: range of a further magnification, the same for both; None for no such draw.
        shift: largest shift in each direction, as a fraction of the size.
        rotate: largest rotation in each direction, in degrees.
    """

    def __init__(self, flip=0.0, p=0.0, zoom=(1.0, 1.0), scale=None, shift=0.0, rotate=0.0):
        self.flip, self.p, self.zoom, self.scale = flip, p, zoom, scale
        self.shift, self.rotate = shift, rotate

    def draw(self, rng, size):
        """Return (flip the result afterwards?, affine matrix for `CropResize` or None)."""
        is_mirrored, is_moved = rng.random(2) < (self.flip, self.p)
        if not is_moved:
            return is_mirrored, None
        centre, zoom = np.array(size[::-1]) / 2 - 0.5, rng.uniform(*self.zoom, 2)
        if self.scale:
            zoom *= rng.uniform(*self.scale)
        angle = np.deg2rad(rng.uniform(-self.rotate, self.rotate))
        shift = rng.uniform(-self.shift, self.shift, 2) * size[::-1]
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix = np.eye(3)
        matrix[:2, :2] = rotation / zoom
        # The centre of the photo appears at the centre of the result plus the shift.
        matrix[:2, 2] = centre - matrix[:2, :2] @ (centre + shift)
        if is_mirrored:  # the matrix includes the flip
            matrix = matrix @ [[-1, 0, size[1] - 1], [0, 1, 0], [0, 0, 1]]
        return False, matrix


# To add a preset, write a function that returns a list of albumentations transforms for uint8 RGB
# images of the final size. Only the first item may be a RandomAffine.
AUGMENTATIONS = {
    "none": list,
    "flip": lambda: [RandomAffine(flip=0.5)],
    "base": lambda: [
        RandomAffine(flip=0.5, p=0.8, zoom=(0.9, 1.1), shift=0.05, rotate=10),
        A.RandomBrightnessContrast(0.2, 0.2, p=0.5),
        A.Erasing(scale=(0.02, 0.1), fill="random", p=0.25),
    ],
    # For photos framed differently, or of lower quality: gray, small, blurred, noisy, compressed.
    "robust": lambda: [
        RandomAffine(flip=0.5, p=0.8, zoom=(0.93, 1.07), scale=(0.8, 1.25), shift=0.1, rotate=15),
        A.RandomBrightnessContrast(0.2, 0.2, p=0.5),
        A.RGBShift(15, 15, 15, p=0.3),
        A.ToGray(p=0.1),
        A.Downscale((0.3, 0.9), {"downscale": cv2.INTER_AREA, "upscale": cv2.INTER_LINEAR}, p=0.25),
        A.GaussianBlur(0, (0.2, 1.2), p=0.15),
        A.GaussNoise((0.01, 0.05), p=0.15),
        A.ImageCompression(quality_range=(30, 95), p=0.25),
        A.Erasing(scale=(0.02, 0.1), fill="random", p=0.25),
    ],
}


class Augmentation:
    """A preset of AUGMENTATIONS; all its draws come from the seed of the photo."""

    def __init__(self, name):
        transforms = AUGMENTATIONS[name]()
        has_affine = transforms and isinstance(transforms[0], RandomAffine)
        self.affine = transforms.pop(0) if has_affine else RandomAffine()
        self.others = A.Compose(transforms)

    def __call__(self, pixels, crop_resize, seed):
        """Return the augmented crop of a photo, a uint8 array of the size of `crop_resize`."""
        rng = np.random.default_rng(seed)
        flip, matrix = self.affine.draw(rng, crop_resize.size)
        image = crop_resize(pixels, matrix)
        if flip:
            image = cv2.flip(image, 1)
        if len(self.others):
            # One generator for all transforms. With set_random_seed every transform would draw the
            # same numbers: an erased photo would always be a brightened one, too.
            self.others.set_random_state(rng, random.Random(seed))
            image = self.others(image=image)["image"]
        return image


# --- dataset and batches ---

class MaskDataset(Dataset):
    """Photos as (image, target): a uint8 tensor (height, width, 3), RGB, and a row of `targets`.

    Args:
        photos: a table with `path`.
        crop_resize: the `CropResize`, applied to every photo.
        augmentation: an `Augmentation` for items that are asked for as (index, seed). Items that
            are asked for by index alone are never augmented.
        targets: (N, 18) from `loss.soft_targets`; None for validation and inference.
    """

    def __init__(self, photos, crop_resize, augmentation=None, targets=None):
        self.paths = photos.path.to_numpy(dtype=str)
        self.targets = torch.empty(len(photos), 0) if targets is None else targets
        self.crop_resize, self.augmentation = crop_resize, augmentation

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        index, seed = item if isinstance(item, tuple) else (item, None)
        pixels = read_image(self.paths[index], self.crop_resize.min_size)
        if seed is None:
            image = self.crop_resize(pixels)
        else:
            image = self.augmentation(pixels, self.crop_resize, seed)
        return torch.from_numpy(image), self.targets[index]


# A photo is drawn with weight n ** -power, where n is the size of its gender x age group.
SAMPLERS = {"none": 0.0, "sqrt": 0.5, "balanced": 1.0}


class BatchSampler:
    """The batches of a training run. Batch k depends only on (seed, k).

    With sampler "none" all photos are shuffled again for each pass, and a batch may hold the end
    of one pass and the start of the next: no batch is short. With the other samplers photos are
    drawn with replacement.

    Args:
        photos: the table of the training photos; only gender and age are used.
        batch_size: photos per batch, of all processes together.
        sampler: a name in SAMPLERS.
        seed: random seed.
    """

    def __init__(self, photos, batch_size, sampler="none", seed=0):
        group = (photos.gender * len(AGES) + photos.age).to_numpy()
        weights = np.bincount(group)[group] ** -SAMPLERS[sampler]
        cumulative = np.cumsum(weights)
        self.cumulative = None if sampler == "none" else cumulative / cumulative[-1]
        self.num_photos, self.batch_size, self.seed = len(photos), batch_size, seed

    def batch(self, k):
        """Return batch k as a list of (index, seed of the augmentation)."""
        rng = np.random.default_rng([self.seed, 0, k])  # 0 here, 1 in `_permutation`
        if self.cumulative is None:
            start = k * self.batch_size
            indices = [_permutation(self.seed, position // self.num_photos, self.num_photos)[
                position % self.num_photos] for position in range(start, start + self.batch_size)]
        else:
            draws = rng.random(self.batch_size)
            indices = np.searchsorted(self.cumulative, draws, side="right").tolist()
        seeds = rng.integers(2**32, size=self.batch_size).tolist()
        return list(zip(indices, seeds, strict=True))

    def batches(self, start, stop):
        """Yield this process's share of the batches start, ..., stop - 1."""
        for k in range(start, stop):
            yield self.batch(k)[distributed.rank()::distributed.world_size()]


@functools.lru_cache(maxsize=2)  # a batch can reach from one permutation into the next
def _permutation(seed, number, size):
    return np.random.default_rng([seed, 1, number]).permutation(size).tolist()


def create_train_loader(dataset, sampler, start, stop, num_workers, device):
    """Return a DataLoader for one pass over the batches start, ..., stop - 1 of `sampler`."""
    return _create_loader(dataset, sampler.batches(start, stop), num_workers, device)


def create_eval_loader(dataset, batch_size, num_workers, device):
    """Return a DataLoader of all photos in order, in batches of one size.

    The batches are made equal, and the last is padded with the last photo; `predict` drops the
    padding. Each of several processes loads its own share of the batches.
    """
    num_batches = math.ceil(len(dataset) / batch_size)
    size = math.ceil(len(dataset) / max(num_batches, 1))
    batches = [[min(index, len(dataset) - 1) for index in range(k * size, (k + 1) * size)]
               for k in range(num_batches)]
    batches = batches[distributed.rank()::distributed.world_size()]
    return _create_loader(dataset, batches, num_workers, device)


def _create_loader(dataset, batches, num_workers, device):
    return DataLoader(dataset, batch_sampler=batches, num_workers=num_workers,
                      pin_memory=device.type == "cuda", persistent_workers=num_workers > 0,
                      worker_init_fn=_ignore_stop_signals)


def _ignore_stop_signals(worker_id):
    # Ctrl-C reaches the loader processes, too, but the training process still needs them until
    # the end of its step.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
