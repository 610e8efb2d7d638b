"""How time and memory grow with the number of photos: reading, splitting and training.

    python -m benchmarks.scale --photos 100000

The photos are as small as possible, so that decoding takes almost no time. A small network is
trained on a tenth of them, on that tenth for ten times the epochs, and on all of them. Memory and
images/s should be the same in all three runs.
"""
import argparse
import io
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from core.labels import MASK_OF_SHOT
from dataset import read_train, split_people

ROOT = Path(__file__).parent.parent
BATCH = 64
FLAGS = ["--model", "test_efficientnet", "--weights", "none", "--resize", "32", "24",
         "--batch_size", str(BATCH), "--val_ratio", "0", "--eval_steps", "1000000",
         "--augmentation", "flip", "--device", "cpu"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=100_000,
                        help="number of photos, at least 700")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_dataset(folder / "all", args.photos)
        make_dataset(folder / "tenth", args.photos // 10)
        before, started = peak_memory(), time.perf_counter()
        photos = read_train(folder / "all")
        read = time.perf_counter()
        train, valid = split_people(photos, 0.2)
        done = time.perf_counter()
        print(f"{len(photos)} photos of {photos.person.nunique()} people: "
              f"read in {read - started:.2f} s, "
              f"split into {len(train)} and {len(valid)} in {done - read:.2f} s; "
              f"peak memory {peak_memory():.0f} MB, {before:.0f} MB before reading", flush=True)
        for name, num_photos, epochs in [("tenth", len(photos) // 10, 1),
                                         ("tenth", len(photos) // 10, 10),
                                         ("all", len(photos), 1)]:
            num_steps = math.ceil(epochs * num_photos / BATCH)
            speed, memory = run_training(folder / name, epochs, num_steps,
                                         folder / f"{name}-{epochs}")
            print(f"training on {name} of them, {epochs} epochs: {speed:.0f} images/s, "
                  f"peak memory {memory:.0f} MB", flush=True)


def peak_memory():
    """Return the peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_training(data_dir, epochs, num_steps, output_dir):
    """Run train.py; return (median images/s of its log lines, its peak memory in MB)."""
    argv = [sys.executable, str(ROOT / "train.py"), "--data_dir", str(data_dir), *FLAGS,
            "--epochs", str(epochs), "--log_interval", str(min(20, num_steps)),
            "--output_dir", str(output_dir)]
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT)
        status, usage = os.wait4(process.pid, 0)[1:]
        out.seek(0)
        text = out.read()
    if status:
        sys.exit(f"training failed: {text.strip()}")
    speeds = pd.Series(re.findall(r"([\d.]+) images/s", text), dtype=float)
    return speeds.median(), usage.ru_maxrss / 1024


def make_dataset(root, num_photos):
    """Write a train part with black photos of 32 x 32 pixels, seven of each person."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "JPEG")
    images, rng = root / "train" / "images", np.random.default_rng(0)
    rows = ["id,gender,race,age,path"]
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
