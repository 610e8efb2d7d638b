"""Predict: one checkpoint, or the mean of several, to submission.csv.

    python inference.py --model_dir=./results/checkpoint-500                 # the eval part of the data it was trained on
    python inference.py --model_dir=./results --data_dir my_photos/          # any photos, with readable classes
    python inference.py --model_dir results/fold-0 results/fold-1           # the mean of several

Model, input size, crop, mirroring, precision, normalization and classes come from the checkpoint.
"""
import os
import shlex
from argparse import BooleanOptionalAction
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import distributed
from checkpoint import find_checkpoint, load_model, read_config
from dataset import Geometry, Loader, MaskDataset, moved_ahead, normalize
from device import autocast, choose_device, choose_workers, tune
from errors import ArgumentParser, InputError, run
from export import find_onnx, onnx_predictor
from layout import AGES, CLASS_NAMES, GENDERS, MASKS, NUM_CLASSES, PROBABILITIES, decode, find_part, list_images, read_eval
from model import TTA


def main(argv=None):
    args = parse_args(argv)
    device = distributed.join(choose_device(args.device))
    tune(device)
    checkpoints = [find_checkpoint(model_dir) for model_dir in args.model_dir]
    weights = np.ones(len(checkpoints)) if args.model_weights is None else np.array(args.model_weights)
    if len(weights) != len(checkpoints) or not (weights >= 0).all() or not weights.sum() > 0:
        raise InputError(f"--model_weights {args.model_weights}: expected a number >= 0 for each of the {len(checkpoints)} "
                         f"--model_dir, not all 0")
    configs = [read_config(checkpoint) for checkpoint in checkpoints]
    photos, data_dir, is_eval = choose_photos(args.data_dir, configs, checkpoints)
    output = Path(args.output or ("submission.csv" if is_eval else "predictions.csv"))
    check_output(output, args.save_probs)
    if args.engine == "onnxruntime":
        with distributed.main_first():
            predictors = [onnx_predictor(find_onnx(checkpoint)) for checkpoint in checkpoints]
    else:
        predictors = []
        for checkpoint, config in zip(checkpoints, configs, strict=True):
            model = load_model(checkpoint)[0].to(device, memory_format=torch.channels_last)
            amp = config.get("amp") if args.amp is None else args.amp
            predictors.append(torch_predictor(model, (config["mean"], config["std"]), amp))
    rank = distributed.rank()
    if rank == 0:
        print(f"{len(photos)} photos of {data_dir} on {device}, {'mean of ' if len(checkpoints) > 1 else ''}"
              f"{', '.join(map(str, checkpoints))}")

    by_member = np.zeros((len(checkpoints), len(photos), NUM_CLASSES))
    geometries = [(tuple(config["size"]), tuple(config["crop"])) for config in configs]
    for geometry in dict.fromkeys(geometries):  # members of one geometry share its photos
        same = [i for i, other in enumerate(geometries) if other == geometry]
        dataset = MaskDataset(photos[["path"]], Geometry(*geometry))
        loader = Loader(dataset, choose_workers(args.num_workers, device), device, args.valid_batch_size)
        by_member[same] = infer([(predictors[i], args.tta or configs[i]["tta"]) for i in same], loader, device)
    probabilities = np.tensordot(weights / weights.sum(), by_member, 1)

    distributed.leave()
    if rank:
        return
    predictions = probabilities.argmax(axis=1)
    table = pd.DataFrame({"ImageID": photos.ImageID, "ans": predictions})
    if not is_eval:
        table = table.join(readable(probabilities, predictions))
        print(table.head(10).to_string(index=False))
    check_predictions(table, photos, probabilities)
    print(histogram(predictions, configs[0].get("class_counts")))
    for checkpoint, own in zip(checkpoints, by_member, strict=True) if len(checkpoints) > 1 else []:
        print(f"{checkpoint} differs from the vote on {(own.argmax(axis=1) != predictions).mean():.1%} of the photos")
    if args.save_probs:
        columns = pd.DataFrame(probabilities, columns=PROBABILITIES)
        write_csv(pd.concat([photos[["ImageID"]], columns], axis=1), args.save_probs)
        print(f"wrote {args.save_probs}: the 18 probabilities of each photo")
    write_csv(table, output)
    print(f"wrote {output}: {len(table)} rows")
    answers = Path(data_dir) / "answers.csv"
    if is_eval and answers.is_file():
        print(f"score it: python f1.py {shlex.quote(str(output))} {shlex.quote(os.path.relpath(answers))}")


@torch.inference_mode()
def infer(members, loader, device):
    """Class probabilities of every photo of a loader by every member, in order: (K, N, 18), float32. Validation uses it, too.

    Args:
        members: K pairs (predict, tta): a function as `torch_predictor` gives; "hflip" for the mean over each photo and its
            mirror image, or "none".
        loader: of batches that begin with uint8 images (B, 3, H, W).
        device: of the members.
    """
    outputs, is_quiet = [], distributed.rank() > 0 or None  # None: unless it is a terminal
    for images, *_ in tqdm(moved_ahead(loader, device), "predict", len(loader), leave=False, disable=is_quiet):
        outputs.append(torch.stack([predict(images) if tta == "none" else (predict(images) + predict(images.flip(3))) / 2
                                    for predict, tta in members]))
    return torch.cat(distributed.in_order([output.cpu() for output in outputs]), dim=1).numpy()


def torch_predictor(model, statistics, amp=None):
    """A function from uint8 photos (B, 3, H, W) to probabilities (B, 18), both on the model's device.

    Args:
        model: in evaluation mode.
        statistics: (mean, std) of the normalization.
        amp: mixed precision; None means on CUDA only.
    """
    def predict(images):
        with autocast(images.device, amp):
            return model(normalize(images, *statistics)).float().softmax(dim=1)
    return predict


def choose_photos(data_dir, configs, checkpoints):
    """(photos, folder, whether they are an eval part): what --data_dir names, else the data of the checkpoints.

    Raises:
        InputError: if they are not there, or as `read_eval` and `list_images` do.
    """
    if data_dir is None:
        folder = configs[0].get("eval_dir")
        for config, checkpoint in zip(configs, checkpoints, strict=True):
            if not config.get("eval_dir"):
                raise InputError(f"{checkpoint} was trained on data without an eval part; pass --data_dir")
            if config["eval_dir"] != folder:
                raise InputError(f"{checkpoint} was trained on data with another eval part than {checkpoints[0]} "
                                 f"({config['eval_dir']}, {folder}); pass --data_dir")
        if not Path(folder, "info.csv").is_file():
            raise InputError(f"{folder}: the eval part of the checkpoint's training data is not there; pass --data_dir")
        return read_eval(folder), folder, True
    if len(data_dir) == 1 and (folder := find_part(data_dir[0], "eval")):
        return read_eval(folder), folder, True
    return list_images(data_dir), data_dir[0], False


def readable(probabilities, predictions):
    """Columns mask, gender, age of the predicted class, its probability, and that of each attribute by itself.

    Args:
        probabilities: (N, 18).
        predictions: (N,) of 0..17.
    """
    columns = {}
    joint = probabilities.reshape(-1, len(MASKS), len(GENDERS), len(AGES))
    rows = np.arange(len(predictions))
    for name, names, value, axes in [("mask", MASKS, decode(predictions)[0], (2, 3)),
                                     ("gender", GENDERS, decode(predictions)[1], (1, 3)),
                                     ("age", AGES, decode(predictions)[2], (1, 2))]:
        columns[name] = np.array(names)[value]
        columns[f"{name}_probability"] = joint.sum(axis=axes)[rows, value].round(4)
    return pd.DataFrame(columns | {"probability": probabilities[rows, predictions].round(4)})


def check_predictions(table, photos, probabilities):
    """InputError for probabilities that are not finite; the table must be a prediction of 0..17 for each photo in order."""
    if not np.isfinite(probabilities).all():
        row = photos[~np.isfinite(probabilities).all(axis=1)].iloc[0]
        raise InputError(f"{row.path}: the model gives no finite probability; pass --no-amp, or use another checkpoint")
    assert table.ImageID.tolist() == photos.ImageID.tolist() and table["ans"].between(0, NUM_CLASSES - 1).all()


def histogram(predictions, training_counts):
    """Predicted photos a class, beside the share that the class has in training."""
    counts = np.bincount(predictions, minlength=NUM_CLASSES)
    lines = [f"{'class':<29s} {'predicted':>9s} {'share':>7s}" + (f" {'training':>9s}" if training_counts else "")]
    for label, name in enumerate(CLASS_NAMES):
        line = f"{label:2d} {name:<26s} {counts[label]:9d} {counts[label] / len(predictions):7.1%}"
        lines.append(line + (f" {training_counts[label] / sum(training_counts):9.1%}" if training_counts else ""))
    return "\n".join(lines)


def check_output(*paths):
    """Say before the work that an output file cannot be written."""
    for path in filter(None, paths):
        if Path(path).is_dir():
            raise InputError(f"{path}: is a folder; expected the name of a csv file to write")
        if not Path(path).resolve().parent.is_dir():
            raise InputError(f"{path}: its folder does not exist; create it first")
        if not os.access(Path(path).resolve().parent, os.W_OK):
            raise InputError(f"{path}: no permission to write in its folder; choose another")


def write_csv(table, path):
    """Write a table whole or not at all."""
    temporary = Path(f"{path}.tmp")
    try:
        table.to_csv(temporary, index=False)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    # what to predict with
    parser.add_argument("--model_dir", nargs="+", required=True, help="checkpoint-N or results folders; several are an ensemble")
    parser.add_argument("--model_weights", nargs="+", type=float, help="weight of each --model_dir in the mean (default: equal)")
    parser.add_argument("--tta", choices=TTA, help="hflip averages over the photo and its mirror image (default: as in training)")
    # what to predict, and where to
    parser.add_argument("--data_dir", nargs="+", help="dataset, photo folder or files (default: the checkpoint's eval part)")
    parser.add_argument("--output", help="csv to write (default: submission.csv; predictions.csv for photos without an info.csv)")
    parser.add_argument("--save_probs", metavar="CSV", help="also write the 18 probabilities of each photo")
    # machine
    parser.add_argument("--engine", choices=["torch", "onnxruntime"], default="torch",
                        help="onnxruntime: by the checkpoint's model.onnx, on the CPU (requirements-onnx.txt)")
    parser.add_argument("--valid_batch_size", type=int, default=64, help="photos at a time")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    parser.add_argument("--amp", action=BooleanOptionalAction, help="mixed precision (default: as train.py had it, or on CUDA)")
    parser.add_argument("--num_workers", type=int, default=-1, help="loader processes; -1: on a GPU up to 8, on the CPU none")
    args = parser.parse_args(argv)
    if "" in (args.data_dir or []):
        raise InputError("--data_dir: is empty; expected a dataset, photo folder or files")
    if args.engine == "onnxruntime":
        if args.device not in ("auto", "cpu") or args.amp:
            raise InputError("--engine onnxruntime predicts on the CPU in full precision; pass --engine torch, or neither --device "
                             "nor --amp")
        args.device = "cpu"
    if args.valid_batch_size < 1:
        raise InputError(f"--valid_batch_size {args.valid_batch_size}: expected at least 1")
    return args


if __name__ == "__main__":
    run(main)
