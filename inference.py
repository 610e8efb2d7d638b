"""Predict with one checkpoint, or with the mean of several, and write submission.csv.

    python inference.py --model_dir=./results/checkpoint-500           # the eval part of its data
    python inference.py --model_dir=./results --data_dir my_photos/    # any photos
    python inference.py --model_dir results/fold-0 results/fold-1      # the mean of several

In photos that are not an eval part it looks for faces, and frames each as in the training photos.
Model, input size, crop, mirror images, precision, normalization and classes come from the
checkpoint.
"""
import os
import shlex
import sys
import tempfile
from argparse import BooleanOptionalAction
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # missing with PYTHONSAFEPATH

from core import distributed
from core.checkpoint import find_checkpoint, read_config, sample_note
from core.cli import ArgumentParser, in_range, restores_process, run_cli, script
from core.device import choose_device, choose_workers, configure_backend
from core.drawing import check_draw_folder, save_drawings
from core.errors import InputError
from core.faces import BOX, FaceFinder, describe_faces, find_all_faces
from core.files import check_output, write_atomically
from core.framing import FramedPhotos, choose_framings
from core.images import drop_bad_images
from core.labels import ATTRIBUTES, CLASS_NAMES, NUM_CLASSES, PROBABILITIES, decode, marginals
from core.layout import find_part, is_train_part, list_images, read_eval
from core.onnx_model import export_onnx, has_current_onnx, onnx_predictor
from core.prediction import Normalize, predict, torch_predictor
from dataset import CropResize, create_eval_loader
from model import load_model


@restores_process
def main(argv=None):
    args = parse_args(argv)
    device = distributed.init_distributed(choose_device(args.device))
    configure_backend(device)
    is_main = distributed.rank() == 0

    # What to predict with, what to predict, and where to write it.
    checkpoints = [find_checkpoint(model_dir) for model_dir in args.model_dir]
    weights = member_weights(args.model_weights, len(checkpoints))
    configs = [read_config(checkpoint) for checkpoint in checkpoints]
    photos, data_dir, is_eval = choose_photos(args.data_dir, configs, checkpoints)
    output = Path(args.output or ("submission.csv" if is_eval else "predictions.csv"))
    check_output(output, args.save_probs)
    all_photos = photos
    if args.draw:
        check_draw_folder(args.draw, photos, [] if is_eval else args.data_dir)
    # Faces are framed as each member saw them in training.
    detector, framings, why_no_faces = choose_framings(args.face, args.face_model, is_eval, configs)
    if args.on_bad_image == "skip":
        if is_eval:
            raise InputError("--on_bad_image skip: a submission needs all rows of the eval part; "
                             "restore the photo, or pass other photos with --data_dir")
        photos = distributed.run_on_main_process(drop_bad_images, photos)
        if photos.empty:
            raise InputError(f"{data_dir}: none of its photos can be decoded")
    predictors = [create_predictor(checkpoint, args.engine, args.amp, device)
                  for checkpoint in checkpoints]
    if is_main:
        print(f"{len(photos)} photos of {data_dir} on {device}, by "
              f"{' and '.join(map(str, checkpoints))}")
        if why_no_faces:
            print(f"faces: not looked for: {why_no_faces}")
        if not is_eval and (note := sample_note(configs)):
            print(note)

    # One row per face, if faces are looked for.
    workers = choose_workers(args.num_workers, device)
    if detector:
        photos = find_all_faces(photos, create_eval_loader(
            FaceFinder(photos, detector), args.valid_batch_size, workers, device))
        if is_main:
            print(describe_faces(photos))

    member_probs = predict_members(args, predictors, configs, framings, photos, workers, device)
    distributed.cleanup()
    if not is_main:
        return

    # The weighted mean. The files are written before anything is printed about them.
    probabilities = np.tensordot(weights / weights.sum(), member_probs, 1)
    check_finite(probabilities, photos)
    predictions = probabilities.argmax(axis=1)
    readable = readable_columns(probabilities, predictions)
    answers = photos.assign(ans=predictions)
    table = write_table(output, answers if is_eval else answers.join(readable), all_photos)
    if args.save_probs:
        columns = pd.DataFrame(probabilities, columns=PROBABILITIES)
        write_table(args.save_probs, photos.join(columns), all_photos)
    if args.draw:
        save_drawings(args.draw, photos.join(readable))
    if not is_eval:
        print(table.drop(columns=BOX, errors="ignore").head(10).to_string(index=False))
    # Print the counts, what was left out, the files and the next command.
    print(histogram(predictions, configs[0].get("class_counts")))
    skipped = len(all_photos) - photos.path.nunique()
    if skipped:
        print(f"photos without a prediction: {skipped} of {len(all_photos)}")
    if args.draw:
        print(f"wrote {args.draw}: {photos.path.nunique()} photos with their predictions")
    for path in filter(None, (args.save_probs, output)):
        print(f"wrote {path}: {len(table)} rows")
    # The sample dataset has the answers, too.
    truth = Path(data_dir) / "answers.csv"
    if is_eval and truth.is_file():
        # "./": a name may begin with "-"
        paths = shlex.join([os.path.join(os.curdir, path) if path.startswith("-") else path
                            for path in (str(output), os.path.relpath(truth))])
        print(f"score it: {script('f1.py')} {paths}")


def predict_members(args, predictors, configs, framings, photos, workers, device):
    """Return the probabilities of each member for each photo or face: (members, N, 18)."""
    probabilities = np.zeros((len(predictors), len(photos), NUM_CLASSES))
    # Members with the same framing, crop and resize share the decoded photos.
    geometries = [(tuple(config["size"]), tuple(config["crop"]), str(framing))
                  for config, framing in zip(configs, framings, strict=True)]
    for geometry in dict.fromkeys(geometries):
        same = [i for i, other in enumerate(geometries) if other == geometry]
        dataset = FramedPhotos(photos, CropResize(*geometry[:2]), framings[same[0]])
        loader = create_eval_loader(dataset, args.valid_batch_size, workers, device)
        members = [(predictors[i], args.tta or configs[i]["tta"]) for i in same]
        probabilities[same] = predict(members, loader, device)
    return probabilities


def write_table(path, table, all_photos):
    """Write a csv file and return its table; a photo that was skipped has a row without values."""
    # One photo can have several rows, one for each face.
    table = all_photos.merge(table.drop(columns="ImageID"), how="left", on="path")
    if "ans" in table:
        # An integer type that can be empty.
        table["ans"] = table["ans"].astype("Int64")
    table = table.drop(columns="path")
    with write_atomically(path) as temporary:
        table.to_csv(temporary, index=False)
    return table


def create_predictor(checkpoint, engine, amp, device):
    """Return a checkpoint's function from uint8 photos (B, H, W, 3) to probabilities (B, 18).

    Args:
        checkpoint: the checkpoint folder.
        engine: "torch", or "onnxruntime" for its model.onnx, which is exported if necessary.
        amp: mixed precision; None means as in training.
        device: the torch device.
    """
    if engine == "onnxruntime":
        path = checkpoint / "model.onnx"
        with distributed.main_process_first(), tempfile.TemporaryDirectory() as folder:
            if not has_current_onnx(checkpoint):
                if not os.access(checkpoint, os.W_OK):  # such as an input folder of Kaggle
                    path = Path(folder, "model.onnx")
                print(f"exporting {path}", flush=True)
                export_onnx(*load_model(checkpoint), checkpoint, path)
            return onnx_predictor(path)
    model, config = load_model(checkpoint)
    model.to(device, memory_format=torch.channels_last)
    normalize = Normalize(config["mean"], config["std"]).to(device)
    return torch_predictor(model, normalize, config.get("amp") if amp is None else amp)


def member_weights(weights, count):
    """Return the weights of the members as an array; InputError if they are not valid."""
    if weights is None:
        return np.ones(count)
    if len(weights) != count or not sum(weights) > 0:
        raise InputError(f"--model_weights {' '.join(map(str, weights))}: expected one number >= 0 "
                         f"for each of the {count} --model_dir, not all 0")
    return np.array(weights)


def choose_photos(data_dir, configs, checkpoints):
    """Return (photos, folder, is it an eval part?) of --data_dir, or of the checkpoints' data.

    Raises:
        InputError: if they are not there, and as `read_eval` and `list_images`.
    """
    # Without --data_dir: the eval part that all checkpoints recorded.
    if data_dir is None:
        folder = configs[0].get("eval_dir")
        for config, checkpoint in zip(configs, checkpoints, strict=True):
            other = config.get("eval_dir")
            if not other:
                raise InputError(f"{checkpoint} was trained on data without an eval part; pass "
                                 f"--data_dir")
            if other != folder:
                raise InputError(f"{checkpoint} was trained on data with another eval part "
                                 f"({other}) than {checkpoints[0]} ({folder}); pass --data_dir")
        if not Path(folder, "info.csv").is_file():
            raise InputError(f"{folder}: the eval part of the checkpoint's training data is not "
                             f"there; pass --data_dir")
        return read_eval(folder), folder, True
    # A dataset has an eval part; anything else is a list of photos.
    if len(data_dir) == 1 and not is_train_part(data_dir[0]) and (
            folder := find_part(data_dir[0], "eval")):
        return read_eval(folder), folder, True
    others = f" and {len(data_dir) - 1} more" if len(data_dir) > 1 else ""
    return list_images(data_dir), f"{data_dir[0]}{others}", False


def readable_columns(probabilities, predictions):
    """Return mask, gender and age in words, and the probabilities of these and of the class.

    Args:
        probabilities: (N, 18).
        predictions: (N,) of 0..17.
    """
    columns, rows = {}, np.arange(len(predictions))
    for (name, names), value, part in zip(ATTRIBUTES.items(), decode(predictions),
                                          marginals(probabilities), strict=True):
        columns[name] = np.array(names)[value]
        columns[f"{name}_probability"] = part[rows, value].round(4)
    return pd.DataFrame(columns | {"probability": probabilities[rows, predictions].round(4)})


def check_finite(probabilities, photos):
    """Raise InputError if a probability is not finite; it names the first such photo."""
    bad = ~np.isfinite(probabilities).all(axis=1)
    if bad.any():
        raise InputError(f"{photos[bad].iloc[0].path}: the probabilities of the model are not "
                         f"finite; pass --no-amp, or use another checkpoint")


def histogram(predictions, training_counts):
    """Return a table of the predictions per class, beside its share of the training photos."""
    counts = np.bincount(predictions, minlength=NUM_CLASSES)
    lines = [f"{'class':<29s} {'predicted':>9s} {'share':>7s}"]
    for label, name in enumerate(CLASS_NAMES):
        share = counts[label] / len(predictions)
        lines.append(f"{label:2d} {name:<26s} {counts[label]:9d} {share:7.1%}")
    if training_counts:
        columns = [f" {'training':>9s}"]
        columns += [f" {count / sum(training_counts):9.1%}" for count in training_counts]
        lines = [line + column for line, column in zip(lines, columns, strict=True)]
    return "\n".join(lines)


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])

    add = parser.add_argument_group("model").add_argument
    add("--model_dir", nargs="+", required=True,
        help="checkpoint-N or results folder; several are averaged")
    add("--model_weights", nargs="+", type=in_range(float, 0),
        help="weight of each --model_dir in the mean (default: equal)")
    add("--tta", choices=["none", "hflip"],
        help="hflip: average the predictions of a photo and its mirror image "
             "(default: as trained)")
    add("--engine", choices=["torch", "onnxruntime"], default="torch",
        help="onnxruntime: faster on a CPU, needs requirements-onnx.txt")

    add = parser.add_argument_group("data").add_argument
    add("--data_dir", nargs="+",
        help="dataset, photo folders or photos (default: the eval part of the training data)")
    add("--on_bad_image", choices=["error", "skip"], default="error",
        help="skip: leave the row of a damaged photo empty (not for an eval part)")
    add("--output", help="csv file to write (default: submission.csv for an eval part, "
                         "predictions.csv for other photos)")
    add("--save_probs", metavar="CSV", help="also write the 18 probabilities of each photo")

    add = parser.add_argument_group("faces and drawings").add_argument
    add("--face", action=BooleanOptionalAction,
        help="look for faces and frame each as in the training photos (default: in photos that are "
             "not an eval part, with requirements-face.txt)")
    add("--face_model", metavar="FILE",
        help="YuNet file to use (default: that of requirements-face.txt)")
    add("--draw", metavar="FOLDER", help="also write the photos with the predictions drawn on them")

    parser.add_machine_flags()

    args = parser.parse_args(argv)
    if args.engine == "onnxruntime":
        if args.device not in ("auto", "cpu") or args.amp:
            raise InputError("--engine onnxruntime predicts on the CPU in full precision; pass "
                             "--engine torch, or drop --device and --amp")
        args.device = "cpu"
    return args


if __name__ == "__main__":
    run_cli(main)
