"""What training changes about a photo at random: a preset of AUGMENTATIONS by its name.

To add one, write a function that returns a list of transforms, and name it in AUGMENTATIONS.
"""
import os
import random

import cv2
import numpy as np

# Without this, importing albumentations asks the network for its newest version.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A


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
        """(whether to mirror the result, the (3, 3) map for a Geometry of this size or None): a map mirrors by itself."""
        is_mirrored, moves = rng.random(2) < (self.flip, self.p)
        if not moves:
            return is_mirrored, None
        centre, zoom = np.array(size[::-1]) / 2 - 0.5, rng.uniform(*self.zoom, 2)
        turn, shift = np.deg2rad(rng.uniform(-self.rotate, self.rotate)), rng.uniform(-self.shift, self.shift, 2) * size[::-1]
        matrix = np.eye(3)
        matrix[:2, :2] = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) / zoom
        matrix[:2, 2] = centre - matrix[:2, :2] @ (centre + shift)
        return False, matrix @ [[-1, 0, size[1] - 1], [0, 1, 0], [0, 0, 1]] if is_mirrored else matrix


# The first of a list may be a Jitter; the others are albumentations transforms of uint8 RGB images of the final size.
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


class Augmentation:
    """A preset, applied to a photo; every draw comes from the draw seed.

    Args:
        name: in AUGMENTATIONS.
    """

    def __init__(self, name):
        transforms = AUGMENTATIONS[name]()
        self.jitter = transforms.pop(0) if transforms and isinstance(transforms[0], Jitter) else Jitter()
        self.others = A.Compose(transforms)

    def __call__(self, pixels, geometry, draw_seed):
        """A uint8 array (H, W, 3) of the geometry's size, from a whole photo like it and a seed in 0 .. 2^32 - 1."""
        rng = np.random.default_rng(draw_seed)
        is_mirrored, jitter = self.jitter.draw(rng, geometry.size)
        image = geometry(pixels, jitter)
        image = cv2.flip(image, 1) if is_mirrored else image
        if len(self.others):
            # One shared generator: set_random_seed would give every transform the same draws, so that an erased photo
            # would always be a brightened one, too.
            self.others.set_random_state(rng, random.Random(draw_seed))
            image = self.others(image=image)["image"]
        return image
