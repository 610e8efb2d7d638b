"""Check every photo of a dataset: which cannot be decoded, which occur twice, what there is.

    python -m tools.check_data DIR     # exit status 0: no problem, 1: problems, 2: cannot be read
"""
import sys

import numpy as np
import pandas as pd

from core.cli import ArgumentParser, restores_process, run_cli
from core.images import check_images
from core.labels import CLASS_NAMES, NUM_CLASSES
from core.layout import find_part, list_images, read_eval, read_train


@restores_process
def main(argv=None):
    photos = read_parts(parse_args(argv).data_dir)
    # Decode every photo: this finds damage, and the digest finds copies.
    photos = photos.join(check_images(photos.path))
    print(describe(photos))
    bad, repeated = photos[photos.error != ""], find_repeated(photos)
    for line in [*bad.error, *repeated]:
        print(line)
    print(f"{len(photos)} photos: {len(bad)} cannot be decoded or are damaged, {len(repeated)} "
          f"occur again with another person, label or part")
    if len(bad) or repeated:
        sys.exit(1)


def read_parts(data_dir):
    """Return the photos of the train and eval parts, or of any folder.

    Returns:
        DataFrame with part and path, and for the train part person and label.
    """
    parts = {}
    if find_part(data_dir, "train"):
        parts["train"] = read_train(data_dir)[["path", "person", "label"]]
    if find_part(data_dir, "eval"):
        # Missing photos are an error of training and inference; here the others are checked.
        parts["eval"] = read_eval(data_dir, require_all=False)[["path"]]
    if not parts:
        parts["photos"] = list_images([data_dir])[["path"]]
    return pd.concat([table.assign(part=part) for part, table in parts.items()],
                     ignore_index=True)


def find_repeated(photos):
    """Return a line for each photo whose earlier copy has another person, label or part."""
    # Copies of one person and label are harmless; all others mean a wrong label or a leak.
    first, lines = {}, []
    for photo in photos[photos.digest != ""].itertuples():
        before = first.setdefault(photo.digest, photo)
        contradicts = photo.part == "train" and (
            (before.person, before.label) != (photo.person, photo.label))
        if before.part != photo.part or contradicts:
            lines.append(f"{photo.path}: the same photo as {before.path}")
    return lines


def describe(photos):
    """Return the counts of people, photos, sizes, modes and classes, one line each."""
    lines = []
    for part, table in photos.groupby("part", sort=False):
        people = f" of {table.person.nunique()} people" if part == "train" else ""
        lines.append(f"{part}: {len(table)} photos{people}")
    for column, name in [("size", "width x height"), ("mode", "modes")]:
        counts = photos[column].value_counts()
        shown = ", ".join(f"{value} ({count})" for value, count in counts.head(8).items())
        others = f" and {len(counts) - 8} others" if len(counts) > 8 else ""
        lines.append(f"{name}: {shown}{others}")
    if "label" in photos:
        counts = np.bincount(photos.label.dropna().astype(int), minlength=NUM_CLASSES)
        lines += [f"class {label:2d} {name:<26s} {counts[label]:6d}"
                  for label, name in enumerate(CLASS_NAMES)]
    return "\n".join(lines)


def parse_args(argv=None):
    parser = ArgumentParser(prog="python -m tools.check_data", description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", help="dataset with a train or eval part, or any photo folder")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_cli(main)
