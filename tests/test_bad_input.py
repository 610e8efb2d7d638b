"""What bad input gets: one line with what was found, where, what was expected and the remedy.

The exit status is 2, and nothing that was there before is lost.
"""
import json
import os
import pickle
import shutil
import struct

import pandas as pd
import pytest
import torch
from conftest import DEVICE, FAST, make_people, parse_printed, run_printed, write_train
from photo_files import PNG, chunk
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

import train
from core.errors import InputError, explain_error
from core.run_folder import open_output_dir, write_args
from model import MODELS

# Flags that continue the run of the fixture `trained`.
RESUME = [*FAST, "--epochs", "2", "--eval_steps", "5", "--lr", "3e-3", "--resume"]


def one_line(result, *parts):
    """Return the command's only line of error. It holds all parts; the exit status is 2."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert str(part) in lines[0], f"{part!r} is not in {lines[0]!r}"
    return lines[0]


def has_checkpoint(results):
    return any(results.glob("checkpoint-*"))


def names_without_events(results):
    """Return what a results folder holds, without TensorBoard's files: every start adds one."""
    return sorted(name for name in os.listdir(results) if not name.startswith("events.out."))


def edit_csv(csv, **cells):
    """Change cells of the first row."""
    table = pd.read_csv(csv, dtype=str)
    for column, value in cells.items():
        table.loc[0, column] = value
    table.to_csv(csv, index=False)


def edit_config(folder, **values):
    """Change values in a checkpoint's config.json, under our own key; None deletes the key."""
    config = json.loads((folder / "config.json").read_text())
    ours = config["mask_classification"] | values
    config["mask_classification"] = {key: value for key, value in ours.items()
                                     if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


class Bomb:
    """Unpickling it creates the file "exploded"."""

    def __reduce__(self):
        return exec, ("open('exploded', 'w').close()",)


# --- data ---

def spoil_nothing_there(root):
    return root / "nowhere", ["no such folder", "train/train.csv"]


def spoil_empty(root):
    shutil.rmtree(root)
    root.mkdir()
    return root, ["no train/train.csv"]


def spoil_no_csv(root):
    (root / "train" / "train.csv").unlink()
    return root, ["no train/train.csv"]


def spoil_column(root):
    csv = root / "train" / "train.csv"
    pd.read_csv(csv).drop(columns="gender").to_csv(csv, index=False)
    return root, ["train.csv", "no column 'gender'", "expected columns gender,age,path"]


def spoil_text(root):
    (root / "train" / "train.csv").write_bytes(bytes(range(128, 256)) * 20)
    return root, ["train.csv", "not a csv text file", "expected columns gender,age,path"]


def spoil_missing_folder(root):
    shutil.rmtree(root / "train" / "images" / make_people(24)[3])
    return root, ["train.csv does not match the folders", make_people(24)[3],
                  "in train.csv but not in", "expected one line per folder"]


def spoil_extra_folder(root):
    (root / "train" / "images" / "000999_male_Asian_20").mkdir()
    return root, ["train.csv does not match the folders", "000999_male_Asian_20",
                  "not in train.csv", "expected one line per folder"]


def spoil_gender(root):
    edit_csv(root / "train" / "train.csv", gender="man")
    return root, ["train.csv", "gender 'man'", make_people(24)[0], "male or female"]


def spoil_age(root):
    edit_csv(root / "train" / "train.csv", age="old")
    return root, ["train.csv", "age 'old'", "whole years from 0 to 120"]


def spoil_repeated_person(root):
    edit_csv(root / "train" / "train.csv", path=make_people(24)[1])
    return root, ["train.csv", make_people(24)[1], "is repeated", "expected each path once"]


def spoil_few_people(root):
    shutil.rmtree(root)
    write_train(root, make_people(2))
    return root, ["2 people are too few for --val_ratio 0.2"]


def spoil_no_photos(root):
    for folder in (root / "train" / "images").iterdir():
        shutil.rmtree(folder)
        folder.mkdir()
    return root, ["no photos in its 24 folders", "expected <person>/mask1.jpg"]


SPOILERS = [value for name, value in list(globals().items()) if name.startswith("spoil_")]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_a_damaged_dataset_ends_training_before_it_starts(copy, command, spoil, tmp_path):
    data_dir, parts = spoil(copy)
    one_line(command("train", "--data_dir", data_dir, *FAST), *parts)
    assert not (tmp_path / "results").exists()


def truncated(path):
    path.write_bytes(path.read_bytes()[:400])


def zero_bytes(path):
    path.write_bytes(b"")


def no_image(path):
    path.write_text("<html>not found</html>")


def too_small(path):
    Image.new("RGB", (8, 8)).save(path)


def too_large(path):
    header = struct.pack(">IIBBBBB", 20_001, 10_000, 8, 2, 0, 0, 0)
    path.write_bytes(PNG[:8] + chunk(b"IHDR", header) + PNG[33:])


@pytest.mark.parametrize(("damage", "says", "remedy"), [
    (truncated, "cannot be decoded", "restore or remove the file"),
    (zero_bytes, "cannot be decoded: it is an empty file", "download or copy it again"),
    (no_image, "cannot be decoded: it is an HTML page", "download or copy it again"),
    (too_small, "8 x 8 pixels; expected sides of at least 16", "remove or resize it"),
    (too_large, "20001 x 10000 pixels; expected", "remove or resize it"),
])
def test_a_bad_photo_is_named_in_training_and_in_inference(copy, command, damage, says, remedy,
                                                           trained, tmp_path):
    photo = copy / "train" / "images" / make_people(24)[5] / "mask3.jpg"
    damage(photo)
    # With one worker, the error comes from another process.
    flags = ["--data_dir", copy, *FAST, "--num_workers", "1", "--sampler", "none"]
    one_line(command("train", *flags), photo, says, remedy)
    one_line(command("inference", "--model_dir", trained, "--data_dir", photo), photo, says, remedy)
    assert not (tmp_path / "predictions.csv").exists()


def test_no_photo_starts_a_program(command, trained, tmp_path):
    """Pillow starts Ghostscript for an EPS file, whatever the file's name."""
    Image.new("RGB", (40, 40)).save(tmp_path / "photo.jpg", "EPS")
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = command("inference", "--model_dir", trained, "--data_dir", "photo.jpg", PATH=path)
    one_line(result, "photo.jpg", "cannot be decoded")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("image_id", ["/etc/hostname", "../info.csv", "a/../../x.jpg", "..\\x.jpg"])
def test_an_image_id_outside_its_folder_is_refused(copy, command, trained, image_id):
    edit_csv(copy / "eval" / "info.csv", ImageID=image_id)
    result = command("inference", "--model_dir", trained, "--data_dir", copy)
    one_line(result, "info.csv", repr(image_id), "is not a file name inside")


def test_a_repeated_image_id_or_a_missing_photo_is_named(copy, command, trained, tmp_path):
    (tmp_path / "submission.csv").write_text("an earlier one")
    ids = pd.read_csv(copy / "eval" / "info.csv").ImageID
    (copy / "eval" / "images" / ids[4]).unlink()
    flags = ["--model_dir", trained, "--data_dir", copy]
    one_line(command("inference", *flags), ids[4], "1 of 20 photos are not on disk", "copy the")
    edit_csv(copy / "eval" / "info.csv", ImageID=ids[1])
    result = command("inference", *flags)
    one_line(result, "info.csv", ids[1], "is repeated", "expected each ImageID once")
    assert (tmp_path / "submission.csv").read_text() == "an earlier one"


@pytest.mark.parametrize(("flags", "parts"), [
    (["--data_dir", "nowhere"], ["--data_dir nowhere", "no such file or folder"]),
    (["--data_dir", "empty"], ["--data_dir empty", "no images in it", "expected .jpg"]),
    (["--data_dir", ""], ["argument --data_dir: is empty", "pass a value"]),
    (["--output", "no/such/folder.csv"], ["no/such/folder.csv", "its folder does not exist"]),
    (["--output", "empty"], ["empty: is a folder", "expected the name of a file to write"]),
    (["--model_weights", "1", "2"], ["--model_weights 1.0 2.0", "expected one number"]),
    (["--model_weights", "-1"], ["--model_weights", "-1 is out of range", "at least 0"]),
])
def test_flags_of_inference(command, trained, tmp_path, flags, parts):
    (tmp_path / "empty").mkdir()
    one_line(command("inference", "--model_dir", trained, *flags), *parts)


def test_inference_needs_a_model(command):
    one_line(command("inference"), "--model_dir", "(see", "--help)")


def test_missing_data_is_never_replaced_by_the_sample(command, tmp_path):
    one_line(command("train", "--data_dir", "nowhere"), "--data_dir nowhere")
    one_line(command("train", SM_CHANNEL_TRAIN=tmp_path / "gone"), "gone")
    assert not (tmp_path / "data").exists()


# --- checkpoints ---

def test_for_a_missing_checkpoint_the_existing_ones_are_named(command, trained, tmp_path):
    result = command("inference", f"--model_dir={trained}/checkpoint-7")
    one_line(result, "checkpoint-7", "no such checkpoint", "checkpoint-5", "checkpoint-9")
    result = command("inference", "--model_dir=./nothing")
    line = one_line(result, "nothing", "no such checkpoint")
    assert parse_printed(line.partition("train a model first: ")[2], tmp_path) == ("train", [])


def no_weights(folder):
    (folder / "model.safetensors").unlink()
    return "model.safetensors: missing, so the checkpoint is incomplete; use another"


def truncated_weights(folder):
    truncated(folder / "model.safetensors")
    return "model.safetensors: damaged, or not what train.py writes"


def pickle_for_tensors(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    return "model.safetensors: damaged, or not what train.py writes"


def other_format(folder):
    (folder / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    return "expected a checkpoint written by train.py"


def no_crop(folder):
    edit_config(folder, crop=None)
    return "config.json: no model, size, crop, tta, mean and std"


def no_json(folder):
    (folder / "config.json").write_text("{")
    return "config.json: damaged, or not what train.py writes"


def a_list(folder):
    (folder / "config.json").write_text("[]")
    return "config.json: damaged, or not what train.py writes"


def number_without_end(folder):
    (folder / "config.json").write_text('{"num_classes": ' + "9" * 5000 + "}")
    return "config.json: damaged, or not what train.py writes"


def other_classes(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_classes": 1000}))
    return "config.json: 1000 classes; expected 18"


def other_model(folder):
    edit_config(folder, model="resnet34")
    return "model.safetensors: does not fit resnet34"


@pytest.mark.parametrize("spoil", [
    no_weights, truncated_weights, pickle_for_tensors, other_format, no_crop, no_json, a_list,
    number_without_end, other_classes, other_model])
def test_a_damaged_checkpoint_is_named_and_predicts_nothing(command, trained, tmp_path, spoil):
    folder = shutil.copytree(trained / "checkpoint-5", tmp_path / "checkpoint-5")
    says = spoil(folder)
    result = command("inference", "--model_dir", folder)
    one_line(result, "checkpoint-5", says)
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "submission.csv").exists()


@pytest.mark.parametrize(("name", "content", "parts"), [
    ("trainer_state.json", '{"steps": 9}', ["trainer_state.json: damaged", "steps"]),
    ("trainer_state.json", "[]", ["trainer_state.json: damaged", "not a JSON object"]),
    ("trainer_state.json", None, ["trainer_state.json: missing"]),
    ("training_state.pt", None, ["training_state.pt: missing"]),
    ("training_state.pt", "text", ["training_state.pt: damaged"]),
    ("training_state.pt", {"model": Bomb()}, ["training_state.pt: damaged"]),
    ("model.safetensors", "text", ["model.safetensors: damaged"]),
])
def test_resume_without_an_intact_checkpoint_says_what_is_wrong(command, trained, dataset,
                                                                tmp_path, name, content, parts):
    results = shutil.copytree(trained, tmp_path / "results")
    for step in (5, 9):
        file = results / f"checkpoint-{step}" / name
        if content is None:
            file.unlink()
        elif isinstance(content, str):
            file.write_text(content)
        else:
            torch.save(content, file)
    result = command("train", "--data_dir", dataset, *RESUME)
    one_line(result, "--resume: no checkpoint in results is intact", "checkpoint-9", *parts,
             "pass --overwrite to start again")
    assert not (tmp_path / "exploded").exists()
    assert (results / "checkpoint-5").is_dir() and (results / "checkpoint-9").is_dir()


def test_resume_names_and_deletes_a_damaged_checkpoint_and_uses_the_one_before(
        command, trained, dataset, tmp_path):
    results = shutil.copytree(trained, tmp_path / "results")
    truncated(results / "checkpoint-9" / "training_state.pt")
    result = command("train", "--data_dir", dataset, *RESUME, "--keep_last", "9")
    assert result.returncode == 0, result.stderr
    assert "checkpoint-9/training_state.pt: damaged" in result.stdout
    assert "resuming from results/checkpoint-5" in result.stdout
    assert not (results / "checkpoint-9").exists()  # step 9 is no evaluation of two epochs


@pytest.mark.parametrize("state", [
    {}, {"model": 5}, {"model": {}, "optimizer": {}, "scaler": {}, "ema": None}])
def test_resume_from_a_training_state_of_something_else(command, trained, dataset, tmp_path,
                                                        state):
    folder = shutil.copytree(trained, tmp_path / "results") / "checkpoint-9"
    torch.save(state, folder / "training_state.pt")
    result = command("train", "--data_dir", dataset, *RESUME)
    one_line(result, "--resume: the last checkpoint does not fit --model", "--output_dir")


def test_resume_with_another_architecture_under_the_same_name(command, trained, dataset, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "results") / "checkpoint-9"
    state = torch.load(folder / "training_state.pt", weights_only=True)
    state["model"]["conv_stem.weight"] = torch.zeros(5, 3, 3, 3)
    torch.save(state, folder / "training_state.pt")
    result = command("train", "--data_dir", dataset, *RESUME)
    one_line(result, "--resume: the last checkpoint does not fit --model", "--output_dir")


# --- flags ---

@pytest.mark.parametrize(("flags", "parts"), [
    # Out of range, or not a number: errors of argparse.
    (["--val_ratio", "1.5"], ["--val_ratio: 1.5 is out of range", "at least 0 and below 1"]),
    (["--val_ratio", "nan"], ["--val_ratio: nan is out of range"]),
    (["--batch_size", "0"], ["--batch_size: 0 is out of range", "at least 1"]),
    (["--resize", "3", "3"], ["--resize: 3 is out of range", "at least 16"]),
    (["--crop", "1", "1.005"], ["--crop: 1.005 is out of range", "at most 1"]),
    (["--num_workers", "-2"], ["--num_workers: -2 is out of range", "at least -1"]),
    (["--lr", "0"], ["--lr: 0 is out of range", "at least 1e-12"]),
    (["--lr", "fast"], ["--lr: invalid float value: 'fast'"]),
    (["--epochs", "1.5"], ["--epochs: invalid int value: '1.5'"]),
    (["--resize", "256"], ["--resize", "expected 2 arguments"]),
    (["--epoch", "3"], ["unrecognized arguments: --epoch"]),
    (["--criterion", "crossentropy"], ["--criterion", "'crossentropy'", "cross_entropy"]),
    (["--optimizer", "adamww"], ["--optimizer", "adamww", "expected adamw"]),
    (["--optimizer", "bnbadam"], ["--optimizer", "bnbadam", "expected adamw"]),
    (["@missing.txt"], ["missing.txt", "--help"]),
    # Names that do not exist.
    (["--model", "resnet19"], ["--model resnet19", "efficientnet_b4", "resnet18"]),
    (["--model", "resnet18.in1k"], ["--model resnet18.in1k", "resnet18.a1_in1k"]),
    (["--device", "cuda:9"], ["--device cuda:9", "not available", "--device auto"]),
    (["--device", "gpu"], ["--device gpu", "expected auto"]),
    (["--weights", "nothing.pth"], ["--weights nothing.pth", "no such file", "expected imagenet"]),
    (["--data_dir", ""], ["argument --data_dir: is empty", "pass a value"]),
    (["--output_dir", "taken"], ["--output_dir taken", "is a file", "expected a folder"]),
    # Flags that contradict each other.
    (["--model", "vgg11", "--resize", "24", "24"], ["--model vgg11", "24 x 24", "--resize"]),
    (["--n_folds", "3", "--val_ratio", "0"], ["--n_folds", "--val_ratio 0", "pass one of them"]),
    (["--n_folds", "5", "--fold", "5"], ["--n_folds 5 --fold 5", "a fold from 0 to"]),
    (["--n_folds", "1"], ["--n_folds 1 --fold 0", "expected 2 folds or more"]),
    (["--resume", "--overwrite"], ["contradict", "pass one of them"]),
    (["--val_ratio", "0", "--patience", "2"], ["--patience", "--val_ratio 0", "pass one of them"]),
    (["--criterion", "f1", "--class_weights", "sqrt"], ["--criterion f1", "--class_weights none"]),
])
def test_flags_of_training(command, dataset, tmp_path, flags, parts):
    (tmp_path / "taken").write_text("")
    one_line(command("train", "--data_dir", dataset, *FAST, *flags), *parts)
    assert not (tmp_path / "results").exists()


def test_flags_can_come_from_a_file_with_comments(tmp_path):
    (tmp_path / "flags.txt").write_text(
        "# a small run\n\n--model resnet18  # 11 M parameters\n--resize 64 48\n"
        "--output_dir 'my results'\n--no-fix_labels\n")
    args, explicit = train.parse_args([f"@{tmp_path}/flags.txt", "--resize", "32", "24"])
    assert (args.model, args.resize, args.fix_labels) == ("resnet18", [32, 24], False)
    assert args.output_dir == "my results"
    assert explicit == {"model", "resize", "output_dir", "fix_labels"}
    # A "#" inside a word is no comment, and an editor on Windows writes a byte order mark.
    (tmp_path / "flags.txt").write_text("\ufeff--epochs 2 # it's short\n# all\n--model_dir run#2\n")
    args, _ = train.parse_args([f"@{tmp_path}/flags.txt"])
    assert (args.epochs, args.output_dir) == (2, "run#2")
    for name in ["a #1/b", "it's #1", 'two "quotes" # 2', "run#2"]:
        args.output_dir, args.data_dir = str(tmp_path), name
        write_args(args)
        assert train.parse_args([f"@{tmp_path}/args.txt"])[0].data_dir == name


def test_a_bad_value_in_a_flag_file_is_named(command, dataset, tmp_path):
    (tmp_path / "flags.txt").write_text("--batch_size 16\n--lr fast\n")
    result = command("train", "--data_dir", dataset, *FAST, "@flags.txt")
    one_line(result, "--lr: invalid float value: 'fast'", "--help")


def test_imagenet_weights_that_are_not_available(command, dataset):
    # A proxy that refuses every connection stands in for a machine without network. No cache has
    # this model.
    proxy = "http://127.0.0.1:9"
    result = command("train", "--data_dir", dataset, *FAST, "--weights", "imagenet",
                     "--model", "resnet10t", HTTPS_PROXY=proxy, https_proxy=proxy)
    one_line(result, "--weights imagenet", "resnet10t", "--weights none", "--weights FILE")


# --- the results folder ---

def test_a_results_folder_with_a_run_is_kept_and_a_ready_command_is_offered(command, trained,
                                                                           dataset, tmp_path):
    results = shutil.copytree(trained, tmp_path / "results")
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*")}
    line = one_line(command("train", "--data_dir", dataset, *FAST), "already holds a run",
                    "--resume", "--overwrite", "--output_dir=results-2")
    assert before == {path: path.stat().st_mtime_ns for path in results.rglob("*")}
    result = run_printed(line.partition("or run: ")[2], tmp_path, "--epochs", "1")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "results-2" / "checkpoint-9").is_dir()


def test_resume_with_a_flag_that_would_change_earlier_steps(command, trained, dataset, tmp_path):
    shutil.copytree(trained, tmp_path / "results")
    switch = ["--no-deterministic", "--deterministic"]
    had, other = switch if DEVICE == "cpu" else switch[::-1]
    for flags, before, now in [
        (["--lr", "1e-3"], "--lr 0.003", "--lr 0.001"),
        (["--resize", "48", "32"], "--resize 32 24", "--resize 48 32"),
        (["--no-fix_labels"], "--fix_labels", "--no-fix_labels"),
        ([other], had, other),
        (["--amp"], "no --amp", "--amp"),
    ]:
        result = command("train", "--data_dir", dataset, *RESUME, *flags)
        one_line(result, f"had {before}, and {now} would change", "--output_dir")
    assert command("train", "--data_dir", dataset, *RESUME).returncode == 0
    result = command("train", "--data_dir", dataset, *RESUME, "--epochs", "1")
    one_line(result, "had --epochs 2, and --epochs 1 would change", "--output_dir")


def test_resume_with_other_people(command, trained, copy, tmp_path):
    """People would move from training to validation."""
    shutil.copytree(trained, tmp_path / "results")
    people = pd.read_csv(copy / "train" / "train.csv", dtype=str)
    shutil.rmtree(copy / "train" / "images" / people.path[3])
    people.drop(3).to_csv(copy / "train" / "train.csv", index=False)
    result = command("train", "--data_dir", copy, *RESUME)
    one_line(result, "people, photos or labels of the dataset have changed", "--data_dir",
             "--output_dir")


def test_a_results_folder_in_use_is_refused_until_it_is_free(command, dataset, tmp_path):
    lock = open_output_dir(tmp_path / "results", resume=False, overwrite=False, argv=[])
    flags = ["--data_dir", dataset, *FAST, "--epochs", "1"]
    result = command("train", *flags)
    one_line(result, "--output_dir results", "another run is writing in it", "wait, or")
    lock.close()
    assert command("train", *flags).returncode == 0


# --- scores ---

@pytest.mark.parametrize(("submission", "parts"), [
    ("ImageID,ans\na,0\na,1\n", ["s.csv", "'a' is repeated", "expected each ImageID once"]),
    ("ImageID,ans\na,18\n", ["s.csv", "ans '18' of a", "expected an integer 0..17"]),
    ("ImageID,ans\na,1.0\n", ["s.csv", "ans '1.0' of a", "expected an integer 0..17"]),
    ("ImageID,ans\nc,1\n", ["s.csv", "1 ImageIDs are not in a.csv, such as c", "expected"]),
    ("id,ans\na,1\n", ["s.csv", "no column 'ImageID'", "found id,ans",
                       "expected columns ImageID,ans"]),
    ("", ["s.csv", "not a csv text file", "expected columns ImageID,ans"]),
    (None, ["s.csv", "cannot be read", "expected a csv file"]),
])
def test_a_bad_submission_is_not_scored(command, tmp_path, submission, parts):
    if submission is None:
        (tmp_path / "s.csv").mkdir()
    else:
        (tmp_path / "s.csv").write_text(submission)
    (tmp_path / "a.csv").write_text("ImageID,ans\na,0\nb,1\n")
    one_line(command("f1", "s.csv", "a.csv"), *parts)


def test_scoring_names_ids_that_the_submission_lacks(command, tmp_path):
    (tmp_path / "s.csv").write_text("ImageID,ans\na,0\n")
    (tmp_path / "a.csv").write_text("ImageID,ans\na,0\nb,1\n")
    result = command("f1", "s.csv", "a.csv")
    one_line(result, "a.csv: 1 ImageIDs are not in s.csv, such as b", "expected the same ids")


def test_scoring_without_the_answers_or_against_two_submissions_is_refused(command, tmp_path):
    for name in ("s.csv", "t.csv", "a.csv"):
        (tmp_path / name).write_text("ImageID,ans\na,0\n")
    one_line(command("f1", "s.csv"), "s.csv: it has no labels", "f1.py s.csv answers.csv")
    result = command("f1", "s.csv", "a.csv", "--against", "s.csv", "t.csv")
    one_line(result, "--against: expected one submission")


# --- numbers that are not finite ---

@pytest.mark.parametrize(("flags", "says"), [
    (["--log_interval", "3"], "the loss or the gradient of step"),
    (["--eval_steps", "1"], "after step 1 is not finite"),
])
def test_a_run_that_diverges_saves_nothing(command, dataset, tmp_path, flags, says):
    result = command("train", "--data_dir", dataset, *FAST, "--lr", "1e40", "--clip_grad", "0",
                     "--warmup", "0", "--optimizer", "sgd", "--epochs", "1", *flags)
    one_line(result, says, "is not finite", "learning rate", "lower --lr",
             "another --output_dir; earlier checkpoints can still predict")
    assert not has_checkpoint(tmp_path / "results")


def test_an_initial_weight_that_is_not_finite_is_noticed_in_step_1(command, dataset, trained,
                                                                  tmp_path):
    weights = load_file(trained / "checkpoint-9" / "model.safetensors")
    weights["conv_stem.weight"][0, 0, 0, 0] = torch.nan
    save_file(weights, tmp_path / "nan.safetensors")
    result = command("train", "--data_dir", dataset, *FAST, "--weights", "nan.safetensors",
                     "--epochs", "1", "--log_interval", "4")
    one_line(result, "the loss or the gradient of step 1 is not finite", "learning rate")
    assert not has_checkpoint(tmp_path / "results")


class InfiniteGradient(torch.nn.Module):
    """Its third batch has an infinite gradient, but a finite loss."""

    def __init__(self, num_classes, **kwargs):
        super().__init__()
        self.layer, self.calls = torch.nn.Linear(3, num_classes), 0

    def forward(self, images):
        self.calls += self.training
        logits = self.layer(images.mean((2, 3)))
        if self.calls == 3:  # add 0, but by a function of infinite slope
            logits = logits + (logits.detach() - logits).abs().sqrt()
        return logits


class Overflow(torch.nn.Module):
    """Its weights are finite, and its logits overflow in evaluation only."""

    def __init__(self, num_classes, **kwargs):
        super().__init__()
        self.layer = torch.nn.Linear(3, num_classes)

    def forward(self, images):
        logits = self.layer(images.mean((2, 3)))
        return logits if self.training else logits * 1e38 * 1e38


@pytest.mark.parametrize(("backbone", "flags", "message"), [
    # A log line after the step, an evaluation after it, and the end of the run.
    (InfiniteGradient, ["--log_interval", "4"], "the loss or the gradient of step 3 is not finite"),
    (InfiniteGradient, ["--eval_steps", "4"], "the loss or the gradient of step 3 is not finite"),
    (InfiniteGradient, [], "the loss or the gradient of step 3 is not finite"),
    (Overflow, [], r"train/images/.*\.jpg: a probability of the model is not finite"),
])
def test_nothing_is_saved_from_numbers_that_are_not_finite(dataset, tmp_path, monkeypatch,
                                                           backbone, flags, message):
    monkeypatch.setitem(MODELS, "broken", backbone)
    with pytest.raises(InputError, match=f"{message}.*; nothing was saved from it"):
        train.main(["--data_dir", str(dataset), *FAST, "--model", "broken", "--epochs", "1", *flags,
                    "--output_dir", str(tmp_path / "results")])
    assert not has_checkpoint(tmp_path / "results")


# --- the machine ---

def test_a_results_folder_that_cannot_be_created(command, dataset, tmp_path):
    # Not even root can create a folder inside a file.
    (tmp_path / "file").write_text("kept")
    result = command("train", "--data_dir", dataset, *FAST, "--output_dir", "file/results")
    one_line(result, "--output_dir file/results", "is a file", "expected a folder")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_missing_permission_names_the_path_and_the_remedy():
    line = explain_error(PermissionError(13, "Permission denied", "results"))
    assert line.startswith("no permission at results: change the permissions, or choose another")


@pytest.mark.cpu_only("the limit on the size of files would also hold for the CUDA driver's")
def test_full_disk_ends_in_one_line_and_keeps_the_earlier_checkpoints(command, dataset, tmp_path):
    """The system's limit on the size of a file stands in for a full disk: the write fails too."""
    flags = ["--data_dir", dataset, *FAST, "--model", "test_vit4", "--resize", "32", "32",
             "--eval_steps", "9"]
    assert command("train", *flags, "--epochs", "1").returncode == 0
    before = names_without_events(tmp_path / "results")
    # The first limit is below model.safetensors (3.7 MB), the second below training_state.pt
    # (15 MB).
    for limit in (3_000_000, 8_000_000):
        result = command("train", *flags, "--epochs", "2", "--resume", FILE_SIZE_LIMIT=limit)
        one_line(result, "disk full", "no incomplete checkpoint was kept", "free some space")
        assert names_without_events(tmp_path / "results") == before
    result = command("train", *flags, "--epochs", "2", "--resume")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "results" / "checkpoint-17").is_dir()


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("CUDA error: out of memory"),  # since torch 2.8 a subclass of RuntimeError
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
])
def test_too_little_gpu_memory_names_the_flags_to_lower(error):
    assert "--batch_size" in explain_error(error)


def test_too_little_memory_names_the_flags_to_lower():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2 ** 50, dtype=torch.uint8)
    assert "--batch_size" in explain_error(caught.value)


def test_an_operation_without_a_deterministic_implementation_names_the_flag():
    # The text of torch's own error. No operation on the CPU raises it.
    text = ("adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but "
            "you set 'torch.use_deterministic_algorithms(True)'.")
    line = explain_error(RuntimeError(text))
    assert "--deterministic: adaptive_avg_pool2d_backward_cuda" in line


def test_too_little_shared_memory_names_the_flag():
    text = ("DataLoader worker (pid 7) is killed by signal: Bus error. The workers may be out of "
            "shared memory.")
    assert "--num_workers 0" in explain_error(RuntimeError(text))


class Failing:
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise self.error


def test_an_error_in_a_loader_process_is_one_line_and_a_bug_keeps_its_traceback():
    with pytest.raises(InputError) as caught:
        next(iter(DataLoader(Failing(InputError("x.jpg: cannot be decoded")), num_workers=1)))
    assert explain_error(caught.value) == "x.jpg: cannot be decoded"
    assert explain_error(KeyError("a bug")) is None
    assert explain_error(RuntimeError("shape mismatch")) is None
