"""How well checkpoints predict their validation photos when these are changed.

    python -m benchmarks.robustness results/fold-0 results/fold-1 [--every 4]

A photo is made worse, moved, or partly covered, after crop and resize. The people were not seen in
training. It prints macro F1, the recall of the three mask states, and the fractions of right
genders and ages.
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
from core.labels import MASKS, decode
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


def move(pixels, zoom=1.0, down=0.0, degrees=0.0):
    height, width = pixels.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2 - 0.5, height / 2 - 0.5), degrees, zoom)
    matrix[1, 2] += down * height
    return cv2.warpAffine(pixels, matrix, (width, height), borderMode=cv2.BORDER_REFLECT_101)


def cover(pixels, quarter):
    covered, height = pixels.copy(), pixels.shape[0]
    covered[quarter * height // 4:(quarter + 1) * height // 4] = 127
    return covered


CHANGES = {
    "as it is": lambda pixels: pixels,
    "gray": lambda pixels: pixels @ np.full((3, 3), 1 / 3),
    "colour cast: red + 25, blue - 25": lambda pixels: pixels + np.array([25.0, 0, -25]),
    "half as bright": lambda pixels: pixels * 0.5,
    "blur, sigma 1.5 pixels": lambda pixels: cv2.GaussianBlur(pixels, (0, 0), 1.5),
    "shrunk to a third and enlarged": shrink,
    "JPEG of quality 20": compress,
    "noise, sigma 15 of 255": add_noise,
    "0.8 times as large": lambda pixels: move(pixels, zoom=0.8),
    "1.25 times as large": lambda pixels: move(pixels, zoom=1.25),
    "10 % higher in the photo": lambda pixels: move(pixels, down=-0.1),
    "10 % lower in the photo": lambda pixels: move(pixels, down=0.1),
    "turned by 15 degrees": lambda pixels: move(pixels, degrees=15),
    "negative": lambda pixels: 255 - pixels,
    "highest quarter covered": lambda pixels: cover(pixels, 0),
    "second quarter covered": lambda pixels: cover(pixels, 1),
    "third quarter covered": lambda pixels: cover(pixels, 2),
    "lowest quarter covered": lambda pixels: cover(pixels, 3),
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
            paths = [Path(config["train_dir"], "images", image_id) for image_id in table.ImageID]
            photos = ChangedPhotos(paths, CropResize(config["size"], config["crop"]), change)
            member = (create_predictor(folder, "torch", None, device), config["tta"])
            loader = create_eval_loader(photos, 64, 0, device)
            answers.append(predict([member], loader, device)[0].argmax(axis=1))
            labels.append(table.label)
        label, answer = np.concatenate(labels), np.concatenate(answers)
        state = decode(label)[0]
        mask, gender, age = (true == answered for true, answered
                             in zip(decode(label), decode(answer), strict=True))
        recalls = " / ".join(f"{mask[state == k].mean():.3f}" for k in range(len(MASKS)))
        print(f"| {name} | {macro_f1(label, answer):.3f} | {recalls} | {gender.mean():.3f} / "
              f"{age.mean():.3f} |", flush=True)


if __name__ == "__main__":
    main()
