"""Read and split a made-up layout of many photos: seconds and memory.

    python -m benchmarks.scale --photos 100000

Every photo is a small file; nothing is decoded.
"""
import argparse
import io
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from layout import MASK_OF_SHOT, read_train, split_people


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=100_000)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        make_layout(Path(folder), args.photos)
        started = time.perf_counter()
        photos = read_train(folder)
        read = time.perf_counter()
        train, valid = split_people(photos, 0.2)
        done = time.perf_counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{len(photos)} photos of {photos.person.nunique()} people: read in {read - started:.2f} s, split into {len(train)} and "
          f"{len(valid)} in {done - read:.2f} s; peak memory {memory:.0f} MB")


def make_layout(root, num_photos):
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "JPEG")
    images, rng, rows = root / "train" / "images", np.random.default_rng(0), ["id,gender,race,age,path"]
    for i in range(num_photos // len(MASK_OF_SHOT)):
        gender, age = ("male", "female")[rng.integers(2)], rng.integers(18, 80)
        person = f"{i:06d}_{gender}_Asian_{age}"
        rows.append(f"{i:06d},{gender},Asian,{age},{person}")
        (images / person).mkdir(parents=True)
        for shot in MASK_OF_SHOT:
            (images / person / f"{shot}.jpg").write_bytes(file.getvalue())
    (root / "train" / "train.csv").write_text("\n".join(rows))


if __name__ == "__main__":
    main()
