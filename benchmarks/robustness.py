"""How well checkpoints predict their validation photos when these are gray, blurred or noisy.

    python -m benchmarks.robustness results/fold-0 results/fold-1 [--every 4]

Each photo is changed after crop and resize. The people were not seen in training.
"""
import argparse
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset

from core.checkpoint import find_checkpoint, read_config
from core.device import choose_device
from core.images import read_image
from core.prediction import predict
from dataset import CropResize, create_eval_loader
from f1 import macro_f1
from inference import create_predictor


def shrink(pixels):
    height, width = pixels.shape[:2]
    small = cv2.resize(pixels, (width // 3, height // 3), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height))


def compress(pixels):
    return cv2.imdecode(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 20])[1], 1)


def add_noise(pixels):
    return pixels + np.random.default_rng(pixels.sum()).normal(0, 15, pixels.shape)


CHANGES = {
    "as it is": lambda pixels: pixels,
    "gray": lambda pixels: pixels @ np.full((3, 3), 1 / 3),
    "colour cast: red + 25, blue - 25": lambda pixels: pixels + np.array([25.0, 0, -25]),
    "half as bright": lambda pixels: pixels * 0.5,
    "blur, sigma 1.5 pixels": lambda pixels: cv2.GaussianBlur(pixels, (0, 0), 1.5),
    "shrunk to a third and enlarged": shrink,
    "JPEG of quality 20": compress,
    "noise, sigma 15 of 255": add_noise,
}


class ChangedPhotos(Dataset):
    """Photos as (image,): uint8 tensor (height, width, 3), after one of CHANGES."""

    def __init__(self, paths, crop_resize, change):
        self.paths, self.crop_resize, self.change = paths, crop_resize, change

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        pixels = self.crop_resize(read_image(self.paths[index], self.crop_resize.min_size))
        return (torch.from_numpy(np.clip(self.change(pixels), 0, 255).astype(np.uint8)),)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dirs", nargs="+", help="results folders or checkpoints")
    parser.add_argument("--every", type=int, default=1, help="use every N-th photo")
    args = parser.parse_args()
    device = choose_device("auto")
    for name, change in CHANGES.items():
        labels, answers = [], []
        for folder in map(find_checkpoint, args.model_dirs):
            config = read_config(folder)
            table = pd.read_csv(folder / "valid_predictions.csv")[::args.every]
            paths = [Path(config["train_dir"], "images", name) for name in table.ImageID]
            photos = ChangedPhotos(paths, CropResize(config["size"], config["crop"]), change)
            member = (create_predictor(folder, "torch", None, device), config["tta"])
            loader = create_eval_loader(photos, 64, 0, device)
            answers.append(predict([member], loader, device)[0].argmax(axis=1))
            labels.append(table.label)
        label, answer = np.concatenate(labels), np.concatenate(answers)
        right = [(label // 6 == answer // 6).mean(), (label // 3 % 2 == answer // 3 % 2).mean(),
                 (label % 3 == answer % 3).mean()]
        print(f"| {name} | {macro_f1(label, answer):.3f} | "
              f"{' / '.join(f'{value:.3f}' for value in right)} |", flush=True)


if __name__ == "__main__":
    main()
