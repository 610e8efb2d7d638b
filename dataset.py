"""The transforms, the dataset, the sampler, the loader.

Every random draw comes from (seed, epoch, position in the epoch), so that the batches of a step are the same for any
number of workers, after a resume, and for any order of a directory listing.
"""
import os
import random
import signal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import distributed
from layout import AGES, read_image

# Without this, importing albumentations asks the network for its newest version.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A
import cv2


class Geometry:
    """The one deterministic geometry of training, validation and inference: centre crop, then resize.

    Args:
        size: (height, width) in pixels of the result.
        crop: (height, width) of the centre crop as fractions of the photo, each in (0, 1].
    """

    def __init__(self, size, crop=(1.0, 1.0)):
        self.size, self.crop = tuple(size), tuple(crop)

    def __call__(self, image):
        """An RGB PIL image to a uint8 array (height, width, 3)."""
        crop_h, crop_w = image.height * self.crop[0], image.width * self.crop[1]
        top, left = (image.height - crop_h) / 2, (image.width - crop_w) / 2
        # Crop and antialiased resize in one pass; reducing_gap shrinks by whole factors first where that is safe.
        resized = image.resize(self.size[::-1], Image.Resampling.BILINEAR, box=(left, top, left + crop_w, top + crop_h),
                               reducing_gap=3.0)
        return np.array(resized)


# To add one: a function that returns a list of albumentations transforms of uint8 RGB images, and an entry here.
AUGMENTATIONS = {
    "none": list,
    "flip": lambda: [A.HorizontalFlip(p=0.5)],
    "base": lambda: [
        A.HorizontalFlip(p=0.5),
        A.Affine(scale=(0.9, 1.1), translate_percent=0.05, rotate=(-10, 10), border_mode=cv2.BORDER_REFLECT_101, p=0.8),
        A.RandomBrightnessContrast(0.2, 0.2, p=0.5),
        A.Erasing(scale=(0.02, 0.1), fill="random", p=0.25),
    ],
    "strong": lambda: [
        A.HorizontalFlip(p=0.5),
        A.Affine(scale=(0.8, 1.2), translate_percent=0.08, rotate=(-15, 15), border_mode=cv2.BORDER_REFLECT_101, p=0.9),
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
        augmentation: a name in AUGMENTATIONS, applied after the geometry to items asked for as (index, draw seed);
            an item asked for by its index alone is never augmented.
        targets: (N, 18) of `loss.soft_targets`, or None where nothing is to be learned (rows are then empty).
    """

    def __init__(self, photos, geometry, augmentation="none", targets=None):
        self.paths = photos.path.to_numpy(dtype=str)
        self.targets = torch.empty(len(photos), 0) if targets is None else targets
        self.geometry = geometry
        self.augment = A.Compose(AUGMENTATIONS[augmentation]())

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        index, draw_seed = item if isinstance(item, tuple) else (item, None)
        image = self.geometry(read_image(self.paths[index]))
        if draw_seed is not None:
            # One shared generator: set_random_seed would give every transform the same draws, so that a flipped
            # photo would always be a brightened one, too.
            self.augment.set_random_state(np.random.default_rng(draw_seed), random.Random(draw_seed))
            image = self.augment(image=image)["image"]
        return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1), self.targets[index]


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
                      persistent_workers=num_workers > 0, worker_init_fn=_start_worker)


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
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) * 255 for values in (mean, std))
    return images.sub_(mean).div_(std)
