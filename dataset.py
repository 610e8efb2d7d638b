"""The transforms, the dataset, the sampler, the loader.

Every random draw comes from (seed, epoch, position in the epoch), so that the batches of a step are the same for any
number of workers, after a resume, and for any order of a directory listing.
"""
import functools
import os
import random
import signal

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

import distributed
from layout import AGES, read_image

# Without this, importing albumentations asks the network for its newest version.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A
import cv2

MILD = 1.35  # up to which shrinking needs no antialiasing


class Geometry:
    """The one deterministic geometry of training, validation and inference: centre crop, then resize.

    Args:
        size: (height, width) in pixels of the result.
        crop: (height, width) of the centre crop as fractions of the photo, each in (0, 1].
    """

    def __init__(self, size, crop=(1.0, 1.0)):
        self.size, self.crop = tuple(size), tuple(crop)
        # What the decoder must leave of a whole photo, so that the antialiased resize still has something to choose from.
        self.at_least = tuple(1.5 * side / share for side, share in zip(self.size, self.crop, strict=True))

    def __call__(self, pixels, jitter=None):
        """The result (height, width, 3) of a photo, both uint8 arrays.

        Args:
            pixels: (height, width, 3).
            jitter: (3, 3) affine map from (x, y) in the result to where in the result without it the pixel comes from. What it
                moves in from outside the crop is the photo there, and outside the photo its reflection.
        """
        if jitter is None:
            top, left, height, width = (round(value) for value in self._box(pixels))
            return _resize(pixels[top:top + height, left:left + width], self.size)
        _, _, height, width = self._box(pixels)
        if max(height / self.size[0], width / self.size[1]) > MILD:
            height, width = round(pixels.shape[0] * self.size[0] / height), round(pixels.shape[1] * self.size[1] / width)
            pixels = _resize(pixels, (height, width))
        top, left, height, width = self._box(pixels)
        scale_y, scale_x = height / self.size[0], width / self.size[1]
        # Pixel centres are at halves: one place in the photo for each pixel of the result, in a single pass.
        place = np.array([[scale_x, 0, left + scale_x / 2 - 0.5], [0, scale_y, top + scale_y / 2 - 0.5], [0, 0, 1]]) @ jitter
        # Of four channels OpenCV warps twice as many pixels in the same time as of three.
        warped = cv2.warpAffine(cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA), place[:2], self.size[::-1],
                                flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REFLECT_101)
        return cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB)

    def _box(self, pixels):
        """(top, left, height, width) of the centre crop, not yet rounded."""
        height, width = pixels.shape[0] * self.crop[0], pixels.shape[1] * self.crop[1]
        return (pixels.shape[0] - height) / 2, (pixels.shape[1] - width) / 2, height, width


def _resize(pixels, size):
    """A uint8 array (H, W, 3) resized bilinearly to size (height, width), antialiased where it shrinks."""
    if max(pixels.shape[0] / size[0], pixels.shape[1] / size[1]) <= MILD:
        return cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_LINEAR)
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    resized = F.interpolate(planes, size=size, mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


class Jitter:
    """Random changes of place, made in the same pass as crop and resize; each draws from the generator it is given.

    Args:
        flip: probability of the mirror image.
        p: probability of the others, which then come together.
        zoom: range of the magnification, drawn for height and width each.
        shift: largest move in either direction, as a fraction of the size.
        rotate: largest turn in either direction, in degrees.
    """

    def __init__(self, flip=0.0, p=0.0, zoom=(1.0, 1.0), shift=0.0, rotate=0.0):
        self.flip, self.p, self.zoom, self.shift, self.rotate = flip, p, zoom, shift, rotate

    def draw(self, rng, size):
        """(whether to mirror the result, the (3, 3) map for a Geometry of this size or None)."""
        is_mirrored, moves = rng.random(2) < (self.flip, self.p)
        if not moves:
            return is_mirrored, None
        centre, zoom = np.array(size[::-1]) / 2 - 0.5, rng.uniform(*self.zoom, 2)
        turn, shift = np.deg2rad(rng.uniform(-self.rotate, self.rotate)), rng.uniform(-self.shift, self.shift, 2) * size[::-1]
        matrix = np.eye(3)
        matrix[:2, :2] = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) / zoom
        matrix[:2, 2] = centre - matrix[:2, :2] @ (centre + shift)
        return is_mirrored, matrix


# To add one: a function that returns a list of transforms, and an entry here. The first may be a Jitter; the others are
# albumentations transforms of uint8 RGB images of the final size.
AUGMENTATIONS = {
    "none": list,
    "flip": lambda: [Jitter(flip=0.5)],
    "base": lambda: [
        Jitter(flip=0.5, p=0.8, zoom=(0.9, 1.1), shift=0.05, rotate=10),
        A.RandomBrightnessContrast(0.2, 0.2, p=0.5),
        A.Erasing(scale=(0.02, 0.1), fill="random", p=0.25),
    ],
    "strong": lambda: [
        Jitter(flip=0.5, p=0.9, zoom=(0.8, 1.2), shift=0.08, rotate=15),
        A.ColorJitter(brightness=(0.7, 1.3), contrast=(0.7, 1.3), saturation=(0.7, 1.3), hue=(-0.03, 0.03), p=0.8),
        A.OneOf([A.GaussianBlur(sigma_limit=(0.3, 1.2)), A.GaussNoise(std_range=(0.02, 0.08))], p=0.3),
        A.Erasing(scale=(0.02, 0.15), fill="random", p=0.4),
    ],
}


class MaskDataset(Dataset):
    """Photos as (image, target): image a uint8 tensor (3, height, width), RGB 0..255; target a row of `targets`.

    Args:
        photos: a table with `path`.
        geometry: the `Geometry`, applied to every photo.
        augmentation: a name in AUGMENTATIONS, for items asked for as (index, draw seed); an item asked for by its index alone is
            never augmented.
        targets: (N, 18) of `loss.soft_targets`, or None where nothing is to be learned (rows are then empty).
    """

    def __init__(self, photos, geometry, augmentation="none", targets=None):
        self.paths = photos.path.to_numpy(dtype=str)
        self.targets = torch.empty(len(photos), 0) if targets is None else targets
        self.geometry = geometry
        transforms = AUGMENTATIONS[augmentation]()
        self.jitter = transforms.pop(0) if transforms and isinstance(transforms[0], Jitter) else Jitter()
        self.augment = A.Compose(transforms)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        index, draw_seed = item if isinstance(item, tuple) else (item, None)
        pixels = read_image(self.paths[index], self.geometry.at_least)
        if draw_seed is None:
            image = self.geometry(pixels)
        else:
            rng = np.random.default_rng(draw_seed)
            is_mirrored, jitter = self.jitter.draw(rng, self.geometry.size)
            image = self.geometry(pixels, jitter)
            image = cv2.flip(image, 1) if is_mirrored else image
            if len(self.augment):
                # One shared generator: set_random_seed would give every transform the same draws, so that an erased
                # photo would always be a brightened one, too.
                self.augment.set_random_state(rng, random.Random(draw_seed))
                image = self.augment(image=image)["image"]
        return torch.from_numpy(image).permute(2, 0, 1), self.targets[index]


# Exponent of 1 / (photos in a person's gender x age group): how often a photo is drawn.
SAMPLERS = {"none": 0.0, "sqrt": 0.5, "balanced": 1.0}


class EpochSampler:
    """Batches of (index, draw seed) for a DataLoader's `batch_sampler`; all draws come from (seed, epoch, position).

    With sampler "none" an epoch is every photo once, in a new order. Otherwise it is as many draws with replacement, the
    photos of a gender x age group of n photos weighted n^-1/2 ("sqrt") or n^-1 ("balanced"). Labels come from the
    table, never from an image. The batches of an epoch differ in size by at most one, so that none is a runt.

    Args:
        photos: the table of the training photos.
        batch_size: the largest batch, of all processes together; each takes its share of it.
        sampler: a name in SAMPLERS.
        seed: of all draws.
    """

    def __init__(self, photos, batch_size, sampler="none", seed=0):
        group = (photos.gender * len(AGES) + photos.age).to_numpy()
        weights = np.bincount(group)[group] ** -SAMPLERS[sampler]
        self.probabilities = None if sampler == "none" else weights / weights.sum()
        self.num_photos, self.seed = len(photos), seed
        self.num_batches = -(-len(photos) // batch_size)
        self.edges = np.linspace(0, self.num_photos, self.num_batches + 1).round().astype(int)
        self.set_epoch(0)

    def set_epoch(self, epoch, first_batch=0):
        """Choose the epoch (from 0), and the batch to start it at (after a resume)."""
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self):
        return self.num_batches - self.first_batch

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.probabilities is None:
            order = rng.permutation(self.num_photos)
        else:
            order = rng.choice(self.num_photos, self.num_photos, p=self.probabilities)
        draws = list(zip(order.tolist(), rng.integers(2**32, size=self.num_photos).tolist(), strict=True))
        for batch in range(self.first_batch, self.num_batches):
            yield draws[self.edges[batch]:self.edges[batch + 1]][distributed.rank()::distributed.world_size()]

    def sizes(self):
        """The size of each batch to come, of all processes together."""
        return np.diff(self.edges)[self.first_batch:].tolist()


def create_loader(dataset, num_workers, batch_size=1, batch_sampler=None):
    """A DataLoader of uint8 batches whose workers stay alive: in order for validation, or by an EpochSampler."""
    if batch_sampler is None:
        batch_sampler = distributed.own_batches(len(dataset), batch_size)
    return DataLoader(dataset, batch_sampler=batch_sampler, num_workers=num_workers, pin_memory=torch.cuda.is_available(),
                      persistent_workers=num_workers > 0, worker_init_fn=_start_worker, collate_fn=_collate)


def _collate(items):
    """A batch that keeps the layout of its photos in memory, height x width x RGB, which is what channels_last means."""
    images, targets = zip(*items, strict=True)
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2), torch.stack(targets)


def _start_worker(worker_id):
    # A signal to the whole process group stops the run at a whole step, for which its workers are still needed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # One thread a worker: more would only fight with the other workers and the training step.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def normalize(images, mean, std, device):
    """A uint8 batch (B, 3, H, W) to a float batch on `device`, channels last: (images / 255 - mean) / std."""
    images = images.to(device, non_blocking=True, memory_format=torch.channels_last).float()
    return images.sub_(_per_channel(tuple(mean), device)).div_(_per_channel(tuple(std), device))


@functools.cache  # a tensor made on the device would make the host wait for every batch
def _per_channel(values, device):
    return torch.tensor(values, device=device).view(1, 3, 1, 1) * 255
