"""The geometry of the photos, the dataset, the sampler, the loader.

Every random draw comes from (seed, epoch, position in the epoch), so that the batches of a step are the same for any
number of workers, after a resume, and for any order of a directory listing.
"""
import functools
import signal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

import distributed
from layout import AGES, read_image

MILD = 1.35  # up to which shrinking needs no antialiasing
PREFETCHED = 2  # batches that each loader process is ahead
cv2.setNumThreads(0)  # a photo is too little work to share: waking other threads takes longer


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
            # No further, since the pass below softens: training's photos shall be as sharp as those of validation.
            shrink = MILD * np.divide(self.size, (height, width))
            pixels = _resize(pixels, np.rint(pixels.shape[:2] * shrink).astype(int).tolist())
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


class MaskDataset(Dataset):
    """Photos as (image, target): image a uint8 tensor (3, height, width), RGB 0..255; target a row of `targets`.

    Args:
        photos: a table with `path`.
        geometry: the `Geometry`, applied to every photo.
        augment: an `augmentation.Augmentation`, for items asked for as (index, draw seed); an item asked for by its index alone is
            never augmented.
        targets: (N, 18) of `loss.soft_targets`, or None where nothing is to be learned (rows are then empty).
    """

    def __init__(self, photos, geometry, augment=None, targets=None):
        self.paths = photos.path.to_numpy(dtype=str)
        self.targets = torch.empty(len(photos), 0) if targets is None else targets
        self.geometry, self.augment = geometry, augment

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        index, draw_seed = item if isinstance(item, tuple) else (item, None)
        pixels = read_image(self.paths[index], self.geometry.at_least)
        image = self.geometry(pixels) if draw_seed is None else self.augment(pixels, self.geometry, draw_seed)
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


class Loader:
    """Batches of (images, targets): uint8 (B, 3, H, W) in channels_last, and (B, C); in the order of its batch sampler.

    Loader processes live as long as this. They write photos into a few batches of memory that they share with this process, over
    and over, and it copies from there: memory shared anew for each batch, as DataLoader itself does it, is cleared by the system
    page by page, which can take a quarter of a photo's time.

    Args:
        dataset: a MaskDataset.
        num_workers: loader processes; 0 loads in this one.
        device: what the batches are for; those from processes are pinned for CUDA.
        batch_sampler: lists of the dataset's items: an EpochSampler at the start of an epoch, or nothing for all photos in order,
            `batch_size` at a time (of several processes each has its own batches).
    """

    def __init__(self, dataset, num_workers, device, batch_size=1, batch_sampler=None):
        if batch_sampler is None:
            batch_sampler = distributed.own_batches(len(dataset), batch_size)
        sizes = [len(batch) for batch in batch_sampler] if num_workers else []
        self.own_copy = torch.Tensor.pin_memory if device.type == "cuda" else torch.clone
        self.places = None
        if sizes:
            count = min(PREFETCHED * num_workers + 1, len(sizes))  # those under way, and the one that is being copied
            self.places = torch.empty(count, max(sizes), *dataset.geometry.size, 3, dtype=torch.uint8).share_memory_()
        self.batches = DataLoader(
            _Batches(dataset, self.places), batch_size=None, sampler=_Placed(batch_sampler, self.places), num_workers=num_workers,
            prefetch_factor=PREFETCHED if num_workers else None, persistent_workers=num_workers > 0, worker_init_fn=_start_worker,
            collate_fn=_as_it_is)

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for images, targets in self.batches:
            if self.places is not None:
                place, count = images
                images = self.own_copy(self.places[place, :count])  # the place is written again once the next batch is asked for
            yield images.permute(0, 3, 1, 2), torch.from_numpy(targets)


class _Placed:
    """A batch sampler's batches, each with the number of the place that it is written to."""

    def __init__(self, batch_sampler, places):
        self.batch_sampler, self.count = batch_sampler, 1 if places is None else len(places)

    def __len__(self):
        return len(self.batch_sampler)

    def __iter__(self):
        return ((number % self.count, batch) for number, batch in enumerate(self.batch_sampler))


class _Batches(Dataset):
    """A dataset's batches: (images (B, H, W, 3), or the place and number of them, and targets)."""

    def __init__(self, dataset, places):
        self.dataset, self.places = dataset, places

    def __getitem__(self, item):
        place, batch = item
        shape = (len(batch), *self.dataset.geometry.size, 3)
        images = torch.empty(shape, dtype=torch.uint8) if self.places is None else self.places[place, :len(batch)]
        targets = []
        for i, item in enumerate(batch):
            image, target = self.dataset[item]
            images[i] = image.permute(1, 2, 0)  # height x width x RGB in memory, which is what channels_last means
            targets.append(target)
        return images if self.places is None else (place, len(batch)), torch.stack(targets).numpy()


def _as_it_is(batch):
    return batch


def _start_worker(worker_id):
    # A signal to the whole process group stops the run at a whole step, for which its workers are still needed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)  # more would only fight with the other workers and the training step


def moved_ahead(loader, device):
    """The batches of a loader, their tensors on the device; on CUDA the next is copied there while one is computed with."""
    if device.type != "cuda":
        for batch in loader:
            yield [part.to(device) for part in batch]
        return
    stream, ready = torch.cuda.Stream(device), None
    for batch in loader:
        with torch.cuda.stream(stream):
            coming = [part.to(device, non_blocking=True) for part in batch]
        if ready is not None:
            yield ready
        torch.cuda.current_stream(device).wait_stream(stream)
        for part in coming:
            part.record_stream(torch.cuda.current_stream(device))  # its memory is free again once that one has used it
        ready = coming
    if ready is not None:
        yield ready


def normalize(images, mean, std):
    """A uint8 batch (B, 3, H, W) to a float batch on its device, channels last: (images / 255 - mean) / std."""
    images = images.to(torch.float32, memory_format=torch.channels_last)
    return images.sub_(_per_channel(tuple(mean), images.device)).div_(_per_channel(tuple(std), images.device))


@functools.cache  # a tensor made on the device would make the host wait for every batch
def _per_channel(values, device):
    return torch.tensor(values, device=device).view(1, 3, 1, 1) * 255
