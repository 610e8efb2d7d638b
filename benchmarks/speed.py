"""Loading, training and prediction against what else one would use, pair by pair in one run on the same photos.

    python -m benchmarks.speed                                               # everything, on the sample's photos
    python -m benchmarks.speed --data_dir DIR --only prediction --rounds 5

Each figure is a process of its own, timed inside once it runs steadily, so that start-up and export do not count. Its memory is the
peak of the whole tree of processes (proportional set size, looked at twice a second; Linux). Those that are compared take turns;
a ratio is the median over the rounds. The stock transform is the competition's baseline: Pillow, then torchvision's Resize,
ToTensor and Normalize. timm's sides are its own loader, and the inner loops of its training and inference scripts with their
default flags.
"""
import argparse
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
# (section, model), and the pairs of it: what is measured, against what, the ratio asked for; the names are functions here.
GROUPS = {("loading", ""): [
    ("load_training", "load_stock", 2.5), ("load_training", "load_timm", 2.0), ("load_training", "decode", 0.4),
    ("load_training_normalized", "load_stock", None), ("load_training_normalized", "load_timm", None),
    ("load_training_small", "decode", None),
    ("load_validation", "decode", 0.6)]}
for model, over_timm in [("tf_efficientnet_lite0", 1.35), ("efficientnet_b4", 1.2)]:
    GROUPS["training", model] = [("train", "train_timm", over_timm), ("train", "train_timm_channels_last", 1.0),
                                 ("train", "train_in_memory", 0.95)]
    GROUPS["prediction", model] = [("predict_onnxruntime", "predict_timm", 1.5), ("predict_torch", "predict_timm", 1.05)]


def main(argv=None):
    args = parse_args(argv)
    if args.work:
        print(json.dumps(globals()[args.work](*([args, args.model] if args.model else [args]))))
        return
    from device import choose_device
    from sample_data import draw_sample_dataset
    args.data_dir = args.data_dir or draw_sample_dataset("data/sample")
    args.device = str(choose_device(args.device))
    rows = []
    with tempfile.TemporaryDirectory() as args.folder:
        for (section, model), pairs in GROUPS.items():
            if args.only and section not in args.only:
                continue
            pairs = [pair for pair in pairs if args.device == "cpu" or "onnxruntime" not in pair[0]]
            if section != "loading":
                run(f"prepare_{section}", model, args)
            works = dict.fromkeys(work for own, other, _ in pairs for work in (own, other))
            rounds = [{work: run(work, model, args) for work in works} for _ in range(args.rounds)]
            for own, other, asked in pairs:
                table = pd.DataFrame([{"speed": a[own][0], "other": a[other][0], "ratio": a[own][0] / a[other][0],
                                       "memory": a[own][1], "other_memory": a[other][1]} for a in rounds])
                rows.append({"model": model, "what": own, "against": other, **table.median(), "ratio_low": table.ratio.min(),
                             "ratio_high": table.ratio.max(), "asked": asked})
            pd.DataFrame(rows).to_csv(args.out, index=False, float_format="%.3f")
            print(pd.DataFrame(rows[-len(pairs):]).to_string(index=False, float_format="{:.2f}".format), flush=True)
    print(f"images/s and MB, medians of {args.rounds} rounds; {describe_machine(args.device)}; wrote {args.out}")


def run(work, model, args):
    """One measurement in a process of its own: (images/s, MB)."""
    argv = [sys.executable, "-W", "ignore", "-m", "benchmarks.speed", "--work", work, "--model", model, "--data_dir",
            str(args.data_dir), "--device", args.device, "--folder", args.folder]
    if work == "train":  # the command as it is, its own images/s
        argv = [*argv[:3], str(ROOT / "train.py"), "--data_dir", f"{args.folder}/data", "--model", model, "--weights", "none",
                "--resize", *map(str, SMALL), "--crop", *map(str, CROP), "--augmentation", "base", "--batch_size", str(BATCH),
                "--epochs", "1", "--val_ratio", "0", "--log_interval", str(WARM_UP), "--device", args.device,
                "--output_dir", f"{args.folder}/results", "--overwrite"]
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
    # train.py tells its speed every so many steps; the first of these lines is of its warm-up.
    speeds = [float(speed) for speed in re.findall(r"([\d.]+) images/s", text)][1:]
    return len(speeds) / sum(1 / speed for speed in speeds) if speeds else json.loads(text.splitlines()[-1]), memory


def proportional_memory(pid):
    """MB of a process and its descendants, pages that they share counted once; 0 where the system does not tell."""
    try:
        own = int(re.search(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)[1]) / 1024
        children = [child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except (OSError, TypeError):  # it has ended
        return 0
    return own + sum(map(proportional_memory, children))


def rate(counts, warm_up=1):
    """Images/s of an iterable that yields the size of each batch, once some have passed."""
    import torch
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    counts = iter(counts)
    for _ in range(warm_up):
        next(counts)
    wait()
    started, total = time.perf_counter(), sum(counts)
    wait()
    return total / (time.perf_counter() - started)


# --- loading: batches at the training process, from one loader process ---

def training_photos(args, count=LOADED):
    from layout import read_train
    photos = read_train(args.data_dir)
    if len(photos) < count:
        sys.exit(f"{args.data_dir}: {len(photos)} photos are too few for this measurement; pass a --data_dir with {count}")
    return photos.iloc[:count].reset_index(drop=True)


def decode(args):
    """OpenCV alone, in one thread."""
    import cv2
    cv2.setNumThreads(0)
    return rate(len(cv2.imread(path)) > 0 for path in training_photos(args).path)


def load_training(args, size=LARGE, num_workers=1, is_normalized=False):
    """This project's loader with the default recipe's augmentation; its batches are uint8, and the device normalizes them."""
    import torch

    from augmentation import Augmentation
    from dataset import EpochSampler, Geometry, Loader, MaskDataset, moved_ahead, normalize
    from device import tune
    from model import IMAGENET_MEAN, IMAGENET_STD
    photos, device = training_photos(args), torch.device(args.device)
    tune(device)
    data = MaskDataset(photos, Geometry(size, CROP), Augmentation("base"))
    batches = moved_ahead(Loader(data, num_workers, device, batch_sampler=EpochSampler(photos, BATCH)), device)
    return rate(len(normalize(images, IMAGENET_MEAN, IMAGENET_STD) if is_normalized else images) for images, _ in batches)


def load_training_normalized(args):
    return load_training(args, is_normalized=True)


def load_training_small(args):
    """At 128 x 96, in the training process itself, as is the default on the CPU."""
    return load_training(args, SMALL, num_workers=0)


def load_validation(args):
    import torch

    from dataset import Geometry, Loader, MaskDataset
    from device import tune
    data, device = MaskDataset(training_photos(args), Geometry(LARGE, CROP)), torch.device(args.device)
    tune(device)
    return rate(len(images) for images, _ in Loader(data, 1, device, BATCH))


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
    return rate(len(images.to(args.device)) for images in DataLoader(Stock(), BATCH, num_workers=1))


def load_timm(args):
    """timm's loader with what is comparable: crop and resize, mirror image, brightness and contrast as often, erasing."""
    return rate(len(images) for images, _ in timm_loader(args, LOADED, LARGE, num_workers=1, scale=(0.7, 1.0), re_prob=0.25,
                                                         color_jitter=(0.2, 0.2, 0.0), color_jitter_prob=0.5))


def timm_loader(args, count, size, **kwargs):
    import timm.data
    import torch
    data = timm.data.ImageDataset(str(Path(args.data_dir) / "train" / "images"), target_transform=lambda target: target % 18)
    data.reader.samples = data.reader.samples[:count]
    return timm.data.create_loader(data, (3, *size), BATCH, is_training=True, device=torch.device(args.device), **kwargs)


# --- training ---

def prepare_training(args, model):
    """A dataset of the first people, for train.py."""
    from benchmarks.recipes import link_photos
    link_photos(training_photos(args, TRAINED), Path(args.folder) / "data")


def train_timm(args, model, channels_last=False):
    """The inner loop of timm's train.py with its default flags, but for --channels-last."""
    import timm.optim
    loader = timm_loader(args, TRAINED, SMALL, num_workers=min(4, cores()), interpolation="random")
    return rate(plain_loop(args, model, loader, channels_last, lambda network: timm.optim.create_optimizer_v2(
        network, "sgd", lr=0.05, weight_decay=2e-5, momentum=0.9)), WARM_UP)


def train_timm_channels_last(args, model):
    return train_timm(args, model, channels_last=True)


def train_in_memory(args, model):
    """A bare loop over one batch that is in memory already: what no loader can do better than."""
    import torch

    from device import autocast, tune
    tune(torch.device(args.device))
    batch = torch.randn(BATCH, 3, *SMALL, device=args.device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(BATCH, device=args.device) % 18
    with autocast(torch.device(args.device)):
        return rate(plain_loop(args, model, [(batch, labels)] * (TRAINED // BATCH), True, lambda network: torch.optim.AdamW(
            network.parameters(), lr=1e-3, fused=True)), WARM_UP)


def plain_loop(args, name, loader, channels_last, create_optimizer):
    """Forward, backward, step; yields the size of each batch."""
    import timm
    import torch
    model = timm.create_model(name, num_classes=18).to(args.device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    model.train()
    optimizer, criterion = create_optimizer(model), torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    for images, targets in loader:
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        loss = criterion(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield len(images)


# --- prediction ---

def prepare_prediction(args, model):
    """A checkpoint of untrained weights, as train.py would write it, and its ONNX file."""
    from checkpoint import model_config, save_checkpoint
    from dataset import Geometry
    from export import find_onnx
    from model import create_model
    network, geometry = create_model(model, SMALL), Geometry(SMALL, CROP)
    config = model_config(network, model, geometry, "none", None, {})
    state = {"step": 1, "best_step": 1, "history": [], "args": {}}
    find_onnx(save_checkpoint(Path(args.folder) / model, network, config, state, None, {}))


def predict_torch(args, model):
    import torch

    from checkpoint import load_model
    from device import tune
    from inference import torch_predictor
    tune(torch.device(args.device))
    network, config = load_model(Path(args.folder) / model / "checkpoint-1")
    network.to(args.device, memory_format=torch.channels_last)
    return predict(args, torch_predictor(network, (config["mean"], config["std"])))


def predict_onnxruntime(args, model):
    import torch

    from device import tune
    from export import onnx_predictor
    tune(torch.device(args.device))
    return predict(args, onnx_predictor(Path(args.folder) / model / "checkpoint-1" / "model.onnx"))


def predict(args, predictor):
    """inference.py's loop over the eval photos."""
    import torch

    from dataset import Geometry, Loader, MaskDataset
    from device import choose_workers
    from inference import infer
    from layout import read_eval
    photos, geometry, device = read_eval(args.data_dir), Geometry(SMALL, CROP), torch.device(args.device)

    def predicted(part):
        loader = Loader(MaskDataset(part, geometry), choose_workers(-1, device), device, 64)
        return infer([(predictor, "none")], loader, device).shape[1]
    return rate(predicted(part) for part in (photos[:64], photos))


def predict_timm(args, model):
    """The loop of timm's inference.py: its transform, its loader with two workers, eager."""
    import timm
    import timm.data
    import torch
    network = timm.create_model(model, num_classes=18).to(args.device).eval()
    data = timm.data.ImageDataset(str(Path(args.data_dir) / "eval"))
    loader = timm.data.create_loader(data, (3, *SMALL), 64, num_workers=2, crop_pct=0.95, device=torch.device(args.device))
    with torch.inference_mode():
        return rate(len(network(images).softmax(-1).cpu()) for images, _ in loader)


def cores():
    import os
    return len(os.sched_getaffinity(0))


def describe_machine(device):
    import platform

    import cv2
    import timm
    import torch
    hardware = f"{cores()} CPU cores" if device == "cpu" else torch.cuda.get_device_name()
    return f"{platform.machine()}, {hardware}; torch {torch.__version__}, timm {timm.__version__}, opencv {cv2.__version__}"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", help="dataset with a train and an eval part (default: the sample)")
    parser.add_argument("--only", nargs="+", choices=["loading", "training", "prediction"], help="sections to measure")
    parser.add_argument("--rounds", type=int, default=3, help="times that each pair takes turns")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", default="speed.csv", help="csv to write")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
