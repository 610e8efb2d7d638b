"""Measure the speed of loading, training and prediction against common alternatives.

    python -m benchmarks.speed                            # all sections, on the sample dataset
    python -m benchmarks.speed --data_dir DIR --only prediction --rounds 5

The same photos are used on both sides of a pair. Each figure comes from its own process, timed
after some warm-up batches, so start-up and export are not counted. Its memory is the peak of the
process and its children (proportional set size, read twice a second; Linux only). The works of a
section alternate; a ratio is the median over the rounds.

The stock loader uses the transform of the competition's baseline: Pillow, then Resize, ToTensor
and Normalize of torchvision. The timm functions use its own loader, and the inner loops of its
training and inference scripts with their default flags.
"""
import argparse
import contextlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parent.parent
LARGE, SMALL, CROP = (384, 288), (128, 96), (0.8, 0.95)
BATCH, WARM_UP = 32, 4
LOADED, TRAINED = 63 * BATCH, 21 * BATCH  # photos; 288 and 96 people

# Section -> pairs of a work and the work that it is compared with. Each work is a function in this
# file, except for `train`, which is train.py.
PAIRS = {
    "loading": [("load_training", "load_stock"), ("load_training", "load_timm"),
                ("load_training_small", "load_training"), ("load_validation", "load_training")],
    "training": [("train", "train_timm"), ("train", "train_timm_channels_last"),
                 ("train", "train_in_memory")],
    "prediction": [("predict_onnxruntime", "predict_timm"), ("predict_torch", "predict_timm")],
}
GROUPS = [("loading", ""), *itertools.product(["training", "prediction"],
                                              ["tf_efficientnet_lite0", "efficientnet_b4"])]


def main(argv=None):
    args = parse_args(argv)
    if args.work:
        print(json.dumps(globals()[args.work](*([args, args.model] if args.model else [args]))))
        return
    from core.device import choose_device
    from core.sample_data import draw_sample_dataset
    args.data_dir = Path(args.data_dir or draw_sample_dataset("data/sample")).resolve()
    args.device = str(choose_device(args.device))
    rows = []
    with tempfile.TemporaryDirectory() as args.folder:
        for section, model in GROUPS:
            if section not in args.only:
                continue
            pairs = [pair for pair in PAIRS[section]
                     if args.device == "cpu" or pair[0] != "predict_onnxruntime"]
            if section != "loading":
                run(f"prepare_{section}", model, args)
            works = dict.fromkeys(work for pair in pairs for work in pair)
            rounds = [{work: run(work, model, args) for work in works}
                      for _ in range(args.rounds)]
            for own, other in pairs:
                table = pd.DataFrame([{
                    "speed": results[own][0], "other": results[other][0],
                    "ratio": results[own][0] / results[other][0],
                    "memory": results[own][1], "other_memory": results[other][1],
                } for results in rounds])
                rows.append({"model": model, "work": own, "against": other, **table.median(),
                             "ratio_low": table.ratio.min(), "ratio_high": table.ratio.max()})
            pd.DataFrame(rows).to_csv(args.out, index=False, float_format="%.3f")
            print(pd.DataFrame(rows[-len(pairs):]).to_string(
                index=False, float_format="{:.2f}".format), flush=True)
    print(f"images/s and MB, medians of {args.rounds} rounds; {describe_machine(args.device)}; "
          f"wrote {args.out}")


def run(work, model, args):
    """Do one measurement in its own process; return (images/s, peak memory in MB)."""
    python = [sys.executable, "-W", "ignore"]
    argv = [*python, "-m", "benchmarks.speed", "--work", work, "--model", model,
            "--data_dir", str(args.data_dir), "--device", args.device, "--folder", args.folder]
    if work == "train":
        argv = [*python, str(ROOT / "train.py"), "--data_dir", f"{args.folder}/data",
                "--model", model, "--weights", "none", "--resize", *map(str, SMALL),
                "--crop", *map(str, CROP), "--augmentation", "base", "--batch_size", str(BATCH),
                "--epochs", "1", "--val_ratio", "0", "--log_interval", str(WARM_UP),
                "--device", args.device, "--output_dir", f"{args.folder}/results", "--overwrite"]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process, memory = subprocess.Popen(argv, cwd=ROOT, stdout=out, stderr=errors), 0
        while process.poll() is None:
            memory = max(memory, proportional_memory(process.pid))
            time.sleep(0.5)
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            sys.exit(f"{work} {model} failed: {errors.read().strip()}")
        text = out.read()
    if work != "train":
        return json.loads(text.splitlines()[-1]), memory
    # train.py prints its speed every WARM_UP steps; the first of these lines is the warm-up.
    speeds = [float(speed) for speed in re.findall(r"([\d.]+) images/s", text)][1:]
    return len(speeds) / sum(1 / speed for speed in speeds), memory


def proportional_memory(pid):
    """Return the MB of a process and its descendants; pages that they share are counted once.

    Returns 0 if the process has ended or the system does not have this information.
    """
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        own = int(re.search(r"^Pss: +(\d+)", rollup, re.M)[1]) / 1024
        children = [child for task in Path(f"/proc/{pid}/task").iterdir()
                    for child in (task / "children").read_text().split()]
    except (OSError, TypeError):
        return 0
    return own + sum(map(proportional_memory, children))


def rate(counts, warm_up=1):
    """Return the images/s of an iterable of batch sizes, after `warm_up` batches."""
    import torch
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    counts = iter(counts)
    for _ in range(warm_up):
        next(counts)
    wait()
    started, total = time.perf_counter(), sum(counts)
    wait()
    return total / (time.perf_counter() - started)


# --- loading: batches that arrive in the training process, from one loader process ---

def training_photos(args, count=LOADED):
    from core.layout import read_train
    photos = read_train(args.data_dir)
    if len(photos) < count:
        sys.exit(f"{args.data_dir}: has {len(photos)} photos; expected at least {count}; pass "
                 f"another --data_dir")
    return photos.iloc[:count].reset_index(drop=True)


def load_training(args, size=LARGE, num_workers=1):
    """Our loader with the augmentation of the default recipe: uint8 batches on the device."""
    import torch

    from core.device import configure_backend
    from dataset import Augmentation, BatchSampler, CropResize, MaskDataset, create_train_loader
    photos, device = training_photos(args), torch.device(args.device)
    configure_backend(device)
    dataset = MaskDataset(photos, CropResize(size, CROP), Augmentation("base"))
    loader = create_train_loader(dataset, BatchSampler(photos, BATCH), 0, len(photos) // BATCH,
                                 num_workers, device)
    return rate(len(images.to(device, non_blocking=True)) for images, _ in loader)


def load_training_small(args):
    """At 128 x 96, in the training process itself: the default on the CPU."""
    return load_training(args, SMALL, num_workers=0)


def load_validation(args):
    import torch

    from core.device import configure_backend
    from dataset import CropResize, MaskDataset, create_eval_loader
    device = torch.device(args.device)
    configure_backend(device)
    dataset = MaskDataset(training_photos(args), CropResize(LARGE, CROP))
    return rate(len(images) for images, _ in create_eval_loader(dataset, BATCH, 1, device))


def load_stock(args):
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    class Stock(Dataset):
        paths = training_photos(args).path.tolist()
        transform = transforms.Compose([transforms.Resize(LARGE), transforms.ToTensor(),
                                        transforms.Normalize((0.5,) * 3, (0.2,) * 3)])

        def __len__(self):
            return len(self.paths)

        def __getitem__(self, index):
            return self.transform(Image.open(self.paths[index]))
    return rate(len(images.to(args.device))
                for images in DataLoader(Stock(), BATCH, num_workers=1))


def load_timm(args):
    """timm's loader with similar transforms: crop, mirror, brightness and contrast, erasing."""
    loader = timm_loader(args, LOADED, LARGE, num_workers=1, scale=(0.7, 1.0), re_prob=0.25,
                         color_jitter=(0.2, 0.2, 0.0), color_jitter_prob=0.5)
    return rate(len(images) for images, _ in loader)


def timm_loader(args, count, size, **kwargs):
    import timm.data
    import torch
    dataset = timm.data.ImageDataset(str(Path(args.data_dir) / "train" / "images"),
                                     target_transform=lambda target: target % 18)
    dataset.reader.samples = dataset.reader.samples[:count]
    return timm.data.create_loader(dataset, (3, *size), BATCH, is_training=True,
                                   device=torch.device(args.device), **kwargs)


# --- training ---

def prepare_training(args, model):
    """Make a dataset of the first people, for train.py."""
    from benchmarks.recipes import link_photos
    link_photos(training_photos(args, TRAINED), Path(args.folder) / "data")


def train_timm(args, model, channels_last=False):
    """The inner loop of timm's train.py with its default flags, except for --channels-last."""
    import timm.optim
    loader = timm_loader(args, TRAINED, SMALL, num_workers=min(4, num_cores()),
                         interpolation="random")

    def create_optimizer(network):
        return timm.optim.create_optimizer_v2(network, "sgd", lr=0.05, weight_decay=2e-5,
                                              momentum=0.9)
    return rate(train_loop(args, model, loader, channels_last, create_optimizer), WARM_UP)


def train_timm_channels_last(args, model):
    return train_timm(args, model, channels_last=True)


def train_in_memory(args, model):
    """A plain loop over one batch in memory: the upper limit for every loader."""
    import torch

    from core.device import autocast, configure_backend
    device = torch.device(args.device)
    configure_backend(device)
    images = torch.randn(BATCH, 3, *SMALL, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    batches = [(images, torch.arange(BATCH, device=device) % 18)] * (TRAINED // BATCH)

    def create_optimizer(network):
        return torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    return rate(train_loop(args, model, batches, True, create_optimizer,
                           lambda: autocast(device)), WARM_UP)


def train_loop(args, name, loader, channels_last, create_optimizer,
               precision=contextlib.nullcontext):
    """Forward, backward, step; yield the size of each batch."""
    import timm
    import torch
    model = timm.create_model(name, num_classes=18).to(args.device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    model.train()
    optimizer = create_optimizer(model)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    for images, targets in loader:
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with precision():  # entered in each step: its copies of the weights end with it
            loss = criterion(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield len(images)


# --- prediction ---

def prepare_prediction(args, model):
    """Write a checkpoint of untrained weights, as train.py does, and its ONNX file."""
    from core.checkpoint import TrainerState, model_config, save_checkpoint
    from core.onnx_model import export_onnx
    from dataset import CropResize
    from model import create_model, load_model
    network = create_model(model, SMALL)
    config = model_config(network, model, CropResize(SMALL, CROP), "none", None, {})
    folder = Path(args.folder) / model
    folder.mkdir()
    checkpoint = save_checkpoint(folder, network, config, TrainerState(step=1, best_step=1),
                                 None, {})
    if args.device == "cpu":
        export_onnx(*load_model(checkpoint), checkpoint, checkpoint / "model.onnx")


def predict_torch(args, model):
    return predict_eval_part(args, model, "torch")


def predict_onnxruntime(args, model):
    return predict_eval_part(args, model, "onnxruntime")


def predict_eval_part(args, model, engine):
    """The loop of inference.py over the eval photos, after one batch of warm-up."""
    import torch

    from core.device import choose_workers, configure_backend
    from core.layout import read_eval
    from core.prediction import predict
    from dataset import CropResize, MaskDataset, create_eval_loader
    from inference import create_predictor
    device = torch.device(args.device)
    configure_backend(device)
    checkpoint = Path(args.folder) / model / "checkpoint-1"
    predictor = create_predictor(checkpoint, engine, None, device)
    photos = read_eval(args.data_dir)

    def count(part):
        loader = create_eval_loader(MaskDataset(part, CropResize(SMALL, CROP)), 64,
                                    choose_workers(-1, device), device)
        return predict([(predictor, "none")], loader, device).shape[1]
    return rate(count(part) for part in (photos[:64], photos))


def predict_timm(args, model):
    """The loop of timm's inference.py: its transform, its loader with two workers, eager mode."""
    import timm
    import timm.data
    import torch
    device = torch.device(args.device)
    network = timm.create_model(model, num_classes=18).to(device).eval()
    dataset = timm.data.ImageDataset(str(Path(args.data_dir) / "eval"))
    loader = timm.data.create_loader(dataset, (3, *SMALL), 64, num_workers=2, crop_pct=0.95,
                                     device=device)
    with torch.inference_mode():
        return rate(len(network(images).softmax(-1).cpu()) for images, _ in loader)


def num_cores():
    import os
    return len(os.sched_getaffinity(0))


def describe_machine(device):
    import platform

    import cv2
    import timm
    import torch
    hardware = f"{num_cores()} CPU cores" if device == "cpu" else torch.cuda.get_device_name()
    return (f"{platform.machine()}, {hardware}; torch {torch.__version__}, "
            f"timm {timm.__version__}, opencv {cv2.__version__}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir",
                        help="dataset with a train and an eval part (default: the sample)")
    parser.add_argument("--only", nargs="+", choices=PAIRS, default=list(PAIRS),
                        help="sections to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each work")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", default="speed.csv", help="csv file to write")
    # What `run` passes to the process of a measurement:
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
