"""Loading, training and prediction against what else one would use, pair by pair in one run on the same photos.

    python -m benchmarks.speed                                               # everything, on the sample's photos
    python -m benchmarks.speed --data_dir DIR --only loading --rounds 5

Each figure is a process of its own, which is timed inside from its first batch on, so that start-up and export do not count; its
peak memory is that of its largest process. The two of a pair take turns; the ratio is the median over the rounds. The stock
transform is the competition's baseline: Pillow, then torchvision's Resize, ToTensor and Normalize. timm's sides are its own loader
and the steps of its training and inference scripts with their default flags.
"""
import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parent.parent
LARGE, SMALL = (384, 288), (128, 96)
BATCH = 32
# (section, what is measured, against, the ratio asked for); a name is a function here, with an argument after the colon.
PAIRS = [
    ("loading", "load_training", "load_stock", 2.5),
    ("loading", "load_training", "load_timm", 2.0),
    ("loading", "load_training", "decode", 0.4),
    ("loading", "load_validation", "decode", 0.6),
    *[("training", f"train:{model}", f"{other}:{model}", ratio)
      for model, over_timm in [("efficientnet_b4", 1.2), ("tf_efficientnet_lite0", 1.35)]
      for other, ratio in [("train_timm", over_timm), ("train_timm_channels_last", 1.0), ("train_in_memory", 0.95)]],
    *[("prediction", f"{engine}:{model}", f"predict_timm:{model}", ratio)
      for model in ("efficientnet_b4", "tf_efficientnet_lite0")
      for engine, ratio in [("predict_onnxruntime", 1.5), ("predict_torch", 1.05)]],
]


def main(argv=None):
    args = parse_args(argv)
    if args.work:
        print(json.dumps(measure(args)))
        return
    from sample_data import draw_sample_dataset
    args.data_dir = args.data_dir or draw_sample_dataset("data/sample")
    rows = []
    for section, own, other, asked in PAIRS:
        if args.only and section not in args.only:
            continue
        rounds = [(run(own, args), run(other, args)) for _ in range(args.rounds)]
        table = pd.DataFrame([{"speed": a["speed"], "other": b["speed"], "ratio": a["speed"] / b["speed"], "memory": a["memory"],
                               "other_memory": b["memory"]} for a, b in rounds])
        rows.append({"what": own, "against": other, **table.median(), "ratio_low": table.ratio.min(),
                     "ratio_high": table.ratio.max(), "asked": asked})
        print(pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1, float_format="{:.2f}".format), flush=True)
    pd.DataFrame(rows).to_csv(args.out, index=False, float_format="%.3f")
    print(f"images/s and MB, medians of {args.rounds} rounds; {describe_machine()}; wrote {args.out}")


def run(work, args):
    """One measurement in a process of its own: {"speed": images/s, "memory": MB}."""
    argv = [sys.executable, "-W", "ignore", "-m", "benchmarks.speed", "--work", work, "--data_dir", str(args.data_dir),
            "--photos", str(args.photos), "--device", args.device]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{work} failed: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(args):
    name, _, model = args.work.partition(":")
    speed = globals()[name](*([args, model] if model else [args]))
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {"speed": speed, "memory": max(peaks) / 1024}


def rate(batches, batch_size):
    """Images/s of an iterable of batches, from its second batch on."""
    batches = iter(batches)
    next(batches)
    started = time.perf_counter()
    count = sum(1 for _ in batches)
    return count * batch_size / (time.perf_counter() - started)


# --- loading, one process ---

def training_photos(args):
    from layout import read_train
    photos = read_train(args.data_dir)
    return photos.iloc[:len(photos) // BATCH * BATCH][:args.photos].reset_index(drop=True)


def decode(args):
    """OpenCV alone, in one thread."""
    import cv2
    cv2.setNumThreads(0)
    return rate((cv2.imread(path) for path in training_photos(args).path), 1)


def load_training(args):
    """This project's loader with the default recipe's augmentation."""
    from dataset import EpochSampler, Geometry, MaskDataset, create_loader
    photos = training_photos(args)
    data = MaskDataset(photos, Geometry(LARGE, (0.8, 0.95)), "base")
    return rate(create_loader(data, 1, batch_sampler=EpochSampler(photos, BATCH)), BATCH)


def load_validation(args):
    from dataset import Geometry, MaskDataset, create_loader
    return rate(create_loader(MaskDataset(training_photos(args), Geometry(LARGE, (0.8, 0.95))), 1, BATCH), BATCH)


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
    return rate(DataLoader(Stock(), BATCH, num_workers=1), BATCH)


def load_timm(args):
    return rate(timm_loader(args, LARGE, num_workers=1), BATCH)


def timm_loader(args, size, num_workers):
    """timm's training loader: random crop and resize, flip, brightness and contrast, erasing; normalization on the device."""
    import timm.data
    import torch
    folder = Path(args.data_dir) / "train" / "images"
    data = timm.data.ImageDataset(str(folder), target_transform=lambda target: target % 18)
    data.reader.samples = data.reader.samples[:args.photos // BATCH * BATCH]
    return timm.data.create_loader(data, (3, *size), BATCH, is_training=True, scale=(0.7, 1.0), hflip=0.5, color_jitter=0.2,
                                   re_prob=0.25, num_workers=num_workers, device=torch.device(args.device))


# --- training ---

def train(args, model):
    """train.py as it is, its own images/s after the first lines."""
    from benchmarks.recipes import link_people
    people = set(training_photos(args).person)
    with tempfile.TemporaryDirectory() as folder:
        data = link_people(args.data_dir, people, Path(folder) / "data")
        done = subprocess.run([sys.executable, ROOT / "train.py", "--data_dir", data, "--model", model, "--weights", "none",
                               "--resize", *map(str, SMALL), "--batch_size", str(BATCH), "--epochs", "1", "--val_ratio", "0",
                               "--log_interval", "4", "--augmentation", "base", "--device", args.device, "--output_dir",
                               Path(folder) / "results"], capture_output=True, text=True, check=True)
    speeds = [float(speed) for speed in re.findall(r"([\d.]+) images/s", done.stdout)][1:]
    return pd.Series(speeds).median()


def train_timm(args, model, channels_last=False):
    """The inner loop of timm's train.py, with its loader."""
    loader = timm_loader(args, SMALL, num_workers=min(4, len(os.sched_getaffinity(0))))
    return rate(plain_loop(args, model, loader, channels_last), BATCH)


def train_timm_channels_last(args, model):
    return train_timm(args, model, channels_last=True)


def train_in_memory(args, model):
    """The same loop over one batch that is in memory already: what no loader can do better than."""
    import torch
    batch = torch.randn(BATCH, 3, *SMALL, device=args.device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(BATCH, device=args.device) % 18
    return rate(plain_loop(args, model, [(batch, labels)] * (args.photos // BATCH), channels_last=True), BATCH)


def plain_loop(args, name, loader, channels_last):
    """Forward, backward, step; yields after each, as its median step would be logged by timm: the loss is read now and then."""
    import timm
    import torch
    model = timm.create_model(name, num_classes=18, drop_rate=0.2).to(args.device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    for step, (images, targets) in enumerate(loader):
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        loss = criterion(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            loss.item()
        yield


# --- prediction ---

def checkpoint(args, model, folder):
    """A checkpoint of untrained weights, as train.py would write it."""
    from checkpoint import model_config, save_checkpoint
    from dataset import Geometry
    from model import create_model
    network, geometry = create_model(model, SMALL), Geometry(SMALL, (0.8, 0.95))
    state = {"step": 1, "best_step": 1, "history": [], "args": {}}
    return save_checkpoint(folder, network, model_config(network, model, geometry, "none", {}), state, None, {})


def predict_torch(args, model):
    import torch

    from checkpoint import load_model
    from inference import torch_predictor
    with tempfile.TemporaryDirectory() as folder:
        network, config = load_model(checkpoint(args, model, folder))
    device = torch.device(args.device)
    network.to(device, memory_format=torch.channels_last)
    return predict(args, torch_predictor(network, (config["mean"], config["std"]), device))


def predict_onnxruntime(args, model):
    from export import find_onnx, onnx_predictor
    with tempfile.TemporaryDirectory() as folder:
        return predict(args, onnx_predictor(find_onnx(checkpoint(args, model, folder))))


def predict(args, predictor):
    """inference.py's loop over the eval photos."""
    import torch

    from dataset import Geometry, MaskDataset, create_loader
    from inference import choose_workers, infer
    from layout import read_eval
    photos = read_eval(args.data_dir)
    geometry = Geometry(SMALL, (0.8, 0.95))
    loader = create_loader(MaskDataset(photos, geometry), choose_workers(-1, torch.device(args.device)), 64)
    infer([(predictor, "none")], create_loader(MaskDataset(photos[:64], geometry), 0, 64))
    started = time.perf_counter()
    infer([(predictor, "none")], loader)
    return len(photos) / (time.perf_counter() - started)


def predict_timm(args, model):
    """A plain loop as in timm's inference.py: its transform, its loader with two workers, eager."""
    import timm
    import timm.data
    import torch
    network = timm.create_model(model, num_classes=18).to(args.device).eval()
    data = timm.data.ImageDataset(str(Path(args.data_dir) / "eval"))
    loader = timm.data.create_loader(data, (3, *SMALL), 64, num_workers=2, crop_pct=0.95, device=torch.device(args.device))
    with torch.inference_mode():
        network(torch.zeros(64, 3, *SMALL, device=args.device))
        started = time.perf_counter()
        outputs = [network(images).softmax(-1).cpu() for images, _ in loader]
    return sum(map(len, outputs)) / (time.perf_counter() - started)


def describe_machine():
    import platform

    import cv2
    import timm
    import torch
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{len(os.sched_getaffinity(0))} CPU cores"
    return f"{platform.machine()}, {device}; torch {torch.__version__}, timm {timm.__version__}, opencv {cv2.__version__}"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", help="dataset with a train and an eval part (default: the sample)")
    parser.add_argument("--only", nargs="+", choices=["loading", "training", "prediction"], help="sections to measure")
    parser.add_argument("--rounds", type=int, default=3, help="times that each pair takes turns")
    parser.add_argument("--photos", type=int, default=768, help="training photos of a measurement, at most")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--out", default="speed.csv", help="csv to write")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
