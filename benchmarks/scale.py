"""What the number of photos costs: reading and splitting them, and the speed and memory of training.

    python -m benchmarks.scale --photos 100000

Photos of a made-up layout, as small as they may be, so that what is measured is not decoding. Training is that of a small network
on a tenth of them, on that tenth for ten times the epochs, and on all: neither memory nor images/s should tell the difference.
"""
import argparse
import io
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

from layout import MASK_OF_SHOT, read_train, split_people

ROOT = Path(__file__).parent.parent
FLAGS = ["--model", "test_efficientnet", "--weights", "none", "--resize", "32", "24", "--batch_size", "64", "--val_ratio", "0",
         "--eval_steps", "1000000", "--augmentation", "flip", "--device", "cpu"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=100_000)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_layout(folder / "all", args.photos)
        make_layout(folder / "tenth", args.photos // 10)
        started = time.perf_counter()
        photos = read_train(folder / "all")
        read = time.perf_counter()
        train, valid = split_people(photos, 0.2)
        done = time.perf_counter()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{len(photos)} photos of {photos.person.nunique()} people: read in {read - started:.2f} s, split into {len(train)} "
              f"and {len(valid)} in {done - read:.2f} s; peak memory {memory:.0f} MB", flush=True)
        for name, epochs in [("tenth", 1), ("tenth", 10), ("all", 1)]:
            speed, memory = run_training(folder / name, epochs, folder / f"{name}-{epochs}")
            print(f"training on {name} of them, {epochs} epochs: {speed:.0f} images/s, peak memory {memory:.0f} MB", flush=True)


def run_training(data_dir, epochs, output_dir):
    """(median images/s, peak memory in MB) of a train.py process."""
    argv = [sys.executable, str(ROOT / "train.py"), "--data_dir", str(data_dir), *FLAGS, "--epochs", str(epochs), "--output_dir",
            str(output_dir)]
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=subprocess.DEVNULL)
        status, usage = os.wait4(process.pid, 0)[1:]
        out.seek(0)
        text = out.read()
    assert status == 0, text
    return pd.Series(re.findall(r"([\d.]+) images/s", text), dtype=float).median(), usage.ru_maxrss / 1024


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
