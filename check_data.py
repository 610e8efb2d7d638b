"""Look at every photo of a dataset before a run does: what cannot be decoded, what recurs with another person or part, and
what there is.

    python check_data.py DIR                          # exit status 0: all is well, 1: something was found, 2: cannot be read
"""
import hashlib
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from errors import ArgumentParser, InputError, run
from layout import CLASS_NAMES, NUM_CLASSES, find_part, list_images, read_eval, read_image, read_train

log = logging.getLogger("mask")


def main(argv=None):
    logging.basicConfig(format="%(message)s", stream=sys.stdout, force=True)
    log.setLevel(logging.INFO)
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", help="dataset with a train part, an eval part or both, or any folder of photos")
    photos = read_parts(parser.parse_args(argv).data_dir)
    photos = photos.join(check_images(photos.path))
    print(describe(photos))
    bad, repeated = photos[photos.error != ""], find_repeated(photos)
    for line in [*bad.error, *repeated]:
        print(line)
    print(f"{len(photos)} photos: {len(bad)} cannot be used, {len(repeated)} occur again with another person or part")
    if len(bad) or repeated:
        sys.exit(1)


def read_parts(data_dir):
    """The photos of a dataset's train and eval parts, or of any folder: part, path, and person, shot and label in training."""
    parts = {}
    if find_part(data_dir, "train"):
        parts["train"] = read_train(data_dir)[["path", "person", "shot", "label"]]
    if find_part(data_dir, "eval"):
        parts["eval"] = read_eval(data_dir, finds_all=False)[["path"]]
    if not parts:
        parts["photos"] = list_images([data_dir])[["path"]]
    return pd.concat([table.assign(part=name) for name, table in parts.items()], ignore_index=True)


def check_images(paths):
    """Decode photos as training does, on all cores: a table in their order.

    Args:
        paths: Series of strings.

    Returns:
        DataFrame with its index: error (the one line that training would end with, or ""), size ("384 x 512", width x height),
        mode (Pillow's) and digest (of the upright RGB pixels; "" where there are none).
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow and hashlib let other threads run
        rows = list(tqdm(pool.map(_check_image, paths), total=len(paths), disable=None, unit="photo", desc="check"))
    return pd.DataFrame(rows, columns=["error", "size", "mode", "digest"], index=paths.index)


def _check_image(path):
    size = mode = "?"
    try:
        pixels = read_image(path)
        with Image.open(path) as original:
            size, mode = "{} x {}".format(*original.size), original.mode
        return "", size, mode, hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
    except InputError as error:
        return str(error), size, mode, ""


def drop_bad_images(photos):
    """A table of photos without those that cannot be used; each is named."""
    errors = check_images(photos.path).error
    for error in errors[errors != ""]:
        log.warning(f"skipped: {error}")
    log.info(f"{(errors != '').sum()} of {len(photos)} photos skipped: they cannot be used")
    return photos[errors == ""].reset_index(drop=True)


def find_repeated(photos):
    """A line for each photo whose pixels occurred before with another person, or in another part."""
    first, lines = {}, []
    for photo in photos[photos.digest != ""].itertuples():
        before = first.setdefault(photo.digest, photo)
        if before.part != photo.part or (photo.part == "train" and before.person != photo.person):
            lines.append(f"{photo.path}: the same photo as {before.path}")
    return lines


def describe(photos):
    """Counts of what there is, a line each."""
    lines = [f"{part}: {len(table)} photos" + (f" of {table.person.nunique()} people" if part == "train" else "")
             for part, table in photos.groupby("part", sort=False)]
    columns = ["size", "mode"] + (["shot"] if "shot" in photos else [])
    for column in columns:
        counts = photos[column].value_counts()
        shown = ", ".join(f"{name} ({count})" for name, count in counts.head(8).items())
        lines.append(f"{column}s: {shown}{f' and {len(counts) - 8} others' if len(counts) > 8 else ''}")
    if "label" in photos:
        counts = np.bincount(photos.label.dropna().astype(int), minlength=NUM_CLASSES)
        lines += [f"class {label:2d} {name:<26s} {counts[label]:6d}" for label, name in enumerate(CLASS_NAMES)]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
