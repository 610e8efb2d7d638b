"""What bad input gets: one line with the name, what was found, what was expected and the remedy; status 2; nothing lost."""
import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import FAST, make_people, write_train
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

import train
from checkpoint import write_checksums
from errors import InputError, explain
from model import MODELS, create_model
from run_folder import lock_output_dir


def one_line(result, *parts):
    """The command's only line of error, holding all parts; its status is 2."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for part in parts:
        assert str(part) in lines[0], f"{part!r} is not in {lines[0]!r}"
    return lines[0]


def edit_csv(csv, **cells):
    """Change cells of the first row."""
    table = pd.read_csv(csv, dtype=str)
    for column, value in cells.items():
        table.loc[0, column] = value
    table.to_csv(csv, index=False)


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
    pd.read_csv(root / "train" / "train.csv").drop(columns="gender").to_csv(root / "train" / "train.csv", index=False)
    return root, ["train.csv", "no column 'gender'", "expected gender,age,path"]


def spoil_text(root):
    (root / "train" / "train.csv").write_bytes(bytes(range(128, 256)) * 20)
    return root, ["train.csv", "not a CSV text file"]


def spoil_missing_folder(root):
    shutil.rmtree(root / "train" / "images" / make_people(24)[3])
    return root, ["disagrees", make_people(24)[3], "in train.csv but not in"]


def spoil_extra_folder(root):
    (root / "train" / "images" / "000999_male_Asian_20").mkdir()
    return root, ["disagrees", "000999_male_Asian_20", "not in train.csv"]


def spoil_gender(root):
    edit_csv(root / "train" / "train.csv", gender="man")
    return root, ["train.csv", "gender 'man'", make_people(24)[0], "male or female"]


def spoil_age(root):
    edit_csv(root / "train" / "train.csv", age="old")
    return root, ["train.csv", "age 'old'", "whole years from 0 to 120"]


def spoil_repeated_person(root):
    edit_csv(root / "train" / "train.csv", path=make_people(24)[1])
    return root, ["train.csv", "is repeated"]


def spoil_few_people(root):
    shutil.rmtree(root)
    write_train(root, make_people(2))
    return root, ["2 people are too few for --val_ratio 0.2"]


def spoil_no_photos(root):
    for folder in (root / "train" / "images").iterdir():
        shutil.rmtree(folder)
        folder.mkdir()
    return root, ["no photos in its 24 folders"]


@pytest.mark.parametrize("spoil", [value for name, value in list(globals().items()) if name.startswith("spoil_")])
def test_dataset(copy, command, spoil, tmp_path):
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
    Image.new("1", (9000, 9000)).save(path, "PNG")


@pytest.mark.parametrize(("damage", "says"), [(truncated, "cannot be decoded"), (zero_bytes, "cannot be decoded"),
                                              (no_image, "cannot be decoded"), (too_small, "8 x 8 pixels"),
                                              (too_large, "9000 x 9000 pixels")])
def test_photo_in_training_and_in_inference(copy, command, damage, says, trained, tmp_path):
    photo = copy / "train" / "images" / make_people(24)[5] / "mask3.jpg"
    damage(photo)
    # one worker: the error crosses a process on its way to the one line
    one_line(command("train", "--data_dir", copy, *FAST, "--num_workers", "1", "--sampler", "none"), photo, says)
    one_line(command("inference", "--model_dir", trained, "--data_dir", photo), photo, says)
    assert not (tmp_path / "predictions.csv").exists()


def test_no_photo_starts_a_program(command, trained, tmp_path):
    """Pillow has Ghostscript run the PostScript in an EPS file, whatever the file's name."""
    Image.new("RGB", (40, 40)).save(tmp_path / "photo.jpg", "EPS")
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    one_line(command("inference", "--model_dir", trained, "--data_dir", "photo.jpg", PATH=path), "photo.jpg", "cannot be decoded")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("image_id", ["/etc/hostname", "../info.csv", "a/../../x.jpg", "..\\x.jpg"])
def test_image_id_that_leaves_its_folder(copy, command, trained, image_id):
    edit_csv(copy / "eval" / "info.csv", ImageID=image_id)
    one_line(command("inference", "--model_dir", trained, "--data_dir", copy), "info.csv", "is not a file name inside")


def test_image_id_repeated_or_missing(copy, command, trained, tmp_path):
    (tmp_path / "submission.csv").write_text("an earlier one")
    ids = pd.read_csv(copy / "eval" / "info.csv").ImageID
    (copy / "eval" / "images" / ids[4]).unlink()
    one_line(command("inference", "--model_dir", trained, "--data_dir", copy), ids[4], "1 of 20 are missing")
    edit_csv(copy / "eval" / "info.csv", ImageID=ids[1])
    one_line(command("inference", "--model_dir", trained, "--data_dir", copy), ids[1], "is repeated")
    assert (tmp_path / "submission.csv").read_text() == "an earlier one"


def test_inference_on_what_is_not_there(command, trained, tmp_path):
    one_line(command("inference", "--model_dir", trained, "--data_dir", "nowhere"), "--data_dir nowhere", "no such file")
    (tmp_path / "empty").mkdir()
    one_line(command("inference", "--model_dir", trained, "--data_dir", "empty"), "no images in it")
    one_line(command("inference", "--model_dir", trained, "--output", "no/such/folder.csv"), "its folder does not exist")
    one_line(command("inference", "--model_dir", trained, "--output", tmp_path), "is a folder")


def test_named_data_that_is_not_there_never_becomes_the_sample(command, tmp_path):
    one_line(command("train", "--data_dir", "nowhere"), "--data_dir nowhere")
    one_line(command("train", SM_CHANNEL_TRAIN=tmp_path / "gone"), "gone")
    assert not (tmp_path / "data").exists()


# --- checkpoints ---

def test_missing_checkpoint_is_answered_with_those_that_exist(command, trained):
    one_line(command("inference", f"--model_dir={trained}/checkpoint-7"), "checkpoint-7", "checkpoint-5", "checkpoint-9")
    one_line(command("inference", "--model_dir=./nothing"), "nothing", "python train.py")


def half_written(folder):
    (folder / "model.safetensors").unlink()
    return "half-written"


def truncated_weights(folder):
    truncated(folder / "model.safetensors")
    return "damaged"


def flipped_bit(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    return "model.safetensors: damaged"


def pickle_for_tensors(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    write_checksums(folder)
    return "not a safetensors file"


def other_format(folder):
    (folder / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    return "expected a checkpoint written by train.py"


def no_json(folder):
    (folder / "config.json").write_text("{")
    return "not JSON"


def other_classes(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_classes": 1000}))
    return "1000 classes; expected 18"


def other_model(folder):
    config = json.loads((folder / "config.json").read_text())
    config["mask_classification"]["model"] = "resnet34"
    (folder / "config.json").write_text(json.dumps(config))
    return "does not fit resnet34"


def number_without_end(folder):
    (folder / "config.json").write_text('{"num_classes": ' + "9" * 5000 + "}")
    return "not JSON"


def facts_of_no_dataset(folder):
    config = json.loads((folder / "config.json").read_text())
    config["mask_classification"]["class_counts"] = [0] * 18
    (folder / "config.json").write_text(json.dumps(config))
    return "facts of the dataset"


class Bomb:
    def __reduce__(self):
        return exec, ("open('exploded', 'w').close()",)


@pytest.mark.parametrize("spoil", [half_written, truncated_weights, flipped_bit, pickle_for_tensors, other_format, no_json,
                                   other_classes, other_model, number_without_end, facts_of_no_dataset])
def test_checkpoint(command, trained, tmp_path, spoil):
    folder = shutil.copytree(trained / "checkpoint-5", tmp_path / "checkpoint-5")
    says = spoil(folder)
    one_line(command("inference", "--model_dir", folder), "checkpoint-5", says)
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "submission.csv").exists()


@pytest.mark.parametrize(("name", "text", "says"), [
    ("trainer_state.json", '{"step": 9, "epoch": 1, "best_step": 9, "best_macro_f1": 0.5, "history": [], "args": 5}',
     "its args is none"),
    ("trainer_state.json", '{"step": 9, "epoch": 1, "best_step": 9, "history": [], "args": {}}', "its best_macro_f1 is none"),
    ("training_state.pt", {}, "something else than"),
    ("SHA256SUMS", f"{'0' * 64}  /dev/zero\n{'0' * 64}  .\n", "model.safetensors: damaged"),
])
def test_resume_from_a_hostile_checkpoint(command, trained, dataset, tmp_path, name, text, says):
    folder = shutil.copytree(trained, tmp_path / "results") / "checkpoint-9"
    shutil.rmtree(folder.with_name("checkpoint-5"))
    if isinstance(text, dict):
        torch.save(text, folder / name)
    else:
        (folder / name).write_text(text)
    if name != "SHA256SUMS":
        write_checksums(folder)
    flags = ["--data_dir", dataset, *FAST, "--epochs", "2", "--eval_steps", "5", "--lr", "3e-3", "--resume"]
    one_line(command("train", *flags), "checkpoint-9", says)


def test_resume_from_a_pickle_bomb(command, trained, dataset, tmp_path):
    shutil.copytree(trained, tmp_path / "results")
    for step in (5, 9):
        torch.save({"model": Bomb()}, tmp_path / "results" / f"checkpoint-{step}" / "training_state.pt")
        write_checksums(tmp_path / "results" / f"checkpoint-{step}")
    flags = ["--data_dir", dataset, *FAST, "--epochs", "2", "--eval_steps", "5", "--lr", "3e-3", "--resume"]
    one_line(command("train", *flags), "training_state.pt", "something else than tensors")
    assert not (tmp_path / "exploded").exists()


# --- flags ---

@pytest.mark.parametrize(("flags", "parts"), [
    (["--val_ratio", "1.5"], ["--val_ratio 1.5", "below 1"]),
    (["--batch_size", "0"], ["--batch_size 0", "at least 1"]),
    (["--resize", "3", "3"], ["--resize 3", "at least 16"]),
    (["--model", "resnet18.in1k"], ["--model resnet18.in1k", "resnet18.a1_in1k"]),
    (["--model", "vgg11", "--resize", "24", "24"], ["--model vgg11", "24 x 24", "--resize"]),
    (["--n_folds", "3", "--val_ratio", "0"], ["--n_folds", "--val_ratio 0"]),
    (["--data_dir", ""], ["--data_dir", "is empty"]),
    (["--resize", "256"], ["--resize", "expected 2 arguments"]),
    (["--n_folds", "5", "--fold", "5"], ["--n_folds 5 --fold 5"]),
    (["--resume", "--overwrite"], ["contradict"]),
    (["--val_ratio", "0", "--patience", "2"], ["--patience", "--val_ratio 0"]),
    (["--epoch", "3"], ["unrecognized arguments: --epoch"]),
    (["--criterion", "crossentropy"], ["--criterion", "cross_entropy"]),
    (["--model", "resnet19"], ["--model resnet19", "efficientnet_b4", "resnet18"]),
    (["--optimizer", "adamww"], ["--optimizer adamww", "adamw"]),
    (["--optimizer", "bnbadam"], ["--optimizer bnbadam", "adamw"]),
    (["--device", "cuda:9"], ["--device cuda:9"]),
    (["--device", "gpu"], ["--device gpu", "auto"]),
    (["--weights", "nothing.pth"], ["nothing.pth", "no such weights file"]),
    (["--lr", "fast"], ["--lr", "fast"]),
    (["--crop", "1", "1.005"], ["--crop 1 1.005", "at most 1"]),
    (["--output_dir", "taken"], ["--output_dir taken", "is a file"]),
    (["--criterion", "f1", "--class_weights", "sqrt"], ["--criterion f1", "--class_weights none"]),
])
def test_flags(command, dataset, tmp_path, flags, parts):
    (tmp_path / "taken").write_text("")
    one_line(command("train", "--data_dir", dataset, *FAST, *flags), *parts)
    assert not (tmp_path / "results").exists()


def test_flags_of_inference(command, trained):
    one_line(command("inference", "--model_dir", trained, "--model_weights", "1", "2"), "--model_weights")
    one_line(command("inference"), "--model_dir")


def test_imagenet_weights_that_cannot_be_had(command, dataset):
    # a proxy that refuses every connection: no network, whatever the machine; a model that no cache holds
    result = command("train", "--data_dir", dataset, *FAST, "--weights", "imagenet", "--model", "resnet10t",
                     HTTPS_PROXY="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
    one_line(result, "--weights imagenet", "resnet10t", "--weights none", "--weights FILE")


def test_results_folder_with_a_run_is_kept_and_a_ready_command_offered(command, trained, dataset, tmp_path):
    shutil.copytree(trained, tmp_path / "results")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*")}
    line = one_line(command("train", "--data_dir", dataset, *FAST), "--resume", "--overwrite", "--output_dir results-2")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*")}
    offered = line.partition("or run: python train.py ")[2].split()
    result = command("train", *offered, "--epochs", "1")
    assert result.returncode == 0 and (tmp_path / "results-2" / "checkpoint-9").is_dir(), result.stderr


def test_resume_with_a_flag_that_changes_the_past(command, trained, dataset, tmp_path):
    shutil.copytree(trained, tmp_path / "results")
    flags = ["--data_dir", dataset, *FAST, "--epochs", "1", "--eval_steps", "5", "--lr", "1e-3", "--resume"]
    one_line(command("train", *flags), "had --lr 0.003", "--lr 0.001 would change", "--output_dir")
    one_line(command("train", *flags, "--resize", "48", "32", "--lr", "3e-3"), "--resize 32 24", "--resize 48 32 would change")
    one_line(command("train", *flags, "--no-fix_labels", "--lr", "3e-3"), "had --fix_labels", "--no-fix_labels would change")
    one_line(command("train", *flags, "--deterministic", "--lr", "3e-3"), "had --no-deterministic", "--deterministic would change")
    flags[flags.index("--eval_steps") - 1] = "2"
    assert command("train", *flags, "--lr", "3e-3").returncode == 0
    flags[flags.index("--eval_steps") - 1] = "1"
    one_line(command("train", *flags, "--lr", "3e-3"), "had --epochs 2", "--epochs 1 would change")


def test_resume_with_other_people(command, trained, copy, tmp_path):
    """Training people would become validation people."""
    shutil.copytree(trained, tmp_path / "results")
    people = pd.read_csv(copy / "train" / "train.csv", dtype=str)
    shutil.rmtree(copy / "train" / "images" / people.path[3])
    people.drop(3).to_csv(copy / "train" / "train.csv", index=False)
    flags = ["--data_dir", copy, *FAST, "--epochs", "2", "--eval_steps", "5", "--lr", "3e-3", "--resume"]
    one_line(command("train", *flags), "people, photos or labels have changed", "--data_dir")


def test_resume_with_another_architecture_under_the_same_name(command, trained, dataset, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "results") / "checkpoint-9"
    state = torch.load(folder / "training_state.pt", weights_only=True)
    state["model"]["conv_stem.weight"] = torch.zeros(5, 3, 3, 3)
    torch.save(state, folder / "training_state.pt")
    write_checksums(folder)
    flags = ["--data_dir", dataset, *FAST, "--epochs", "2", "--eval_steps", "5", "--lr", "3e-3", "--resume"]
    one_line(command("train", *flags), "does not fit --model test_efficientnet", "--output_dir")


def test_results_folder_in_use(command, dataset, tmp_path):
    lock = lock_output_dir(tmp_path / "results")
    one_line(command("train", "--data_dir", dataset, *FAST), "--output_dir results", "another run is writing in it")
    lock.close()
    assert command("train", "--data_dir", dataset, *FAST, "--epochs", "1").returncode == 0


# --- scores ---

@pytest.mark.parametrize(("submission", "parts"), [
    ("ImageID,ans\na,0\na,1\n", ["s.csv", "'a' is repeated"]),
    ("ImageID,ans\na,18\n", ["s.csv", "ans '18' of a", "0..17"]),
    ("ImageID,ans\na,1.0\n", ["ans '1.0' of a"]),
    ("ImageID,ans\nc,1\n", ["s.csv", "1 ImageIDs are not in", "such as c"]),
    ("id,ans\na,1\n", ["no column 'ImageID'"]),
    ("", ["s.csv", "not a CSV"]),
    (None, ["s.csv", "cannot be read", "CSV"]),
])
def test_scoring(command, tmp_path, submission, parts):
    if submission is None:
        (tmp_path / "s.csv").mkdir()
    else:
        (tmp_path / "s.csv").write_text(submission)
    (tmp_path / "a.csv").write_text("ImageID,ans\na,0\nb,1\n")
    one_line(command("f1", "s.csv", "a.csv"), *parts)


def test_scoring_names_ids_that_the_submission_lacks(command, tmp_path):
    (tmp_path / "s.csv").write_text("ImageID,ans\na,0\n")
    (tmp_path / "a.csv").write_text("ImageID,ans\na,0\nb,1\n")
    one_line(command("f1", "s.csv", "a.csv"), "a.csv: 1 ImageIDs are not in s.csv, such as b")


# --- the machine ---

@pytest.mark.parametrize(("flags", "says"), [(["--log_interval", "3"], "the loss or the gradient of step"),
                                             (["--eval_steps", "1"], "is not finite after step 1")])
def test_numbers_that_are_not_finite(command, dataset, tmp_path, flags, says):
    result = command("train", "--data_dir", dataset, *FAST, "--lr", "1e40", "--clip_grad", "0", "--warmup", "0",
                     "--optimizer", "sgd", "--epochs", "1", *flags)
    one_line(result, says, "learning rate", "--lr")
    assert not list((tmp_path / "results").glob("checkpoint-*"))


def test_weight_that_is_not_finite_names_step_and_photos(command, dataset, trained, tmp_path):
    weights = load_file(trained / "checkpoint-9" / "model.safetensors")
    weights["conv_stem.weight"][0, 0, 0, 0] = torch.nan
    save_file(weights, tmp_path / "nan.safetensors")
    result = command("train", "--data_dir", dataset, *FAST, "--weights", "nan.safetensors", "--epochs", "1", "--log_interval", "4")
    one_line(result, "of step 1 is not finite", "learning rate", "bad_batch.txt")
    paths = (tmp_path / "results" / "bad_batch.txt").read_text().splitlines()
    assert 14 <= len(paths) <= 16 and all(Path(path).is_file() for path in paths)  # a batch of at most 16
    assert not list((tmp_path / "results").glob("checkpoint-*"))


class Cliff(torch.nn.Module):
    """Logits whose gradient, but not whose loss, is not finite in the third batch."""

    def __init__(self, num_classes, **kwargs):
        super().__init__()
        self.layer, self.calls = torch.nn.Linear(3, num_classes), 0

    def forward(self, images):
        self.calls += self.training
        logits = self.layer(images.mean((2, 3)))
        return logits + (logits.detach() - logits).abs().sqrt() if self.calls == 3 else logits  # adds 0; d sqrt(0) is infinite


def test_update_by_a_gradient_that_is_not_finite_is_never_applied(dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "cliff", Cliff)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # the tests' own Ctrl-C stays
    built = []
    monkeypatch.setattr(train, "create_model", lambda *args: built.append(create_model(*args)) or built[-1])
    flags = ["--model", "cliff", "--weights", "none", "--head", "flat", "--resize", "32", "24", "--log_interval", "4"]
    with pytest.raises(InputError, match="the gradient of step 3 is not finite"):
        train.main(["--data_dir", str(dataset), *flags, "--output_dir", str(tmp_path / "results")])
    assert all(value.isfinite().all() for value in built[0].state_dict().values())


class Overflow(torch.nn.Module):
    """Logits that overflow in evaluation only, by weights that are finite."""

    def __init__(self, num_classes, **kwargs):
        super().__init__()
        self.layer = torch.nn.Linear(3, num_classes)

    def forward(self, images):
        logits = self.layer(images.mean((2, 3)))
        return logits if self.training else logits * 1e38 * 1e38


def test_evaluation_that_is_not_finite_names_a_photo_and_saves_nothing(dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "overflow", Overflow)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    flags = ["--model", "overflow", "--weights", "none", "--head", "flat", "--resize", "32", "24", "--epochs", "1"]
    with pytest.raises(InputError, match=r"train/images/.*\.jpg: the model gives no finite probability; nothing was saved of it"):
        train.main(["--data_dir", str(dataset), *flags, "--output_dir", str(tmp_path / "results")])
    assert not list((tmp_path / "results").glob("checkpoint-*"))


def test_results_folder_that_cannot_be_made(command, dataset, tmp_path):
    # a file where a folder is needed is refused even to root
    (tmp_path / "file").write_text("kept")
    one_line(command("train", "--data_dir", dataset, *FAST, "--output_dir", "file/results"), "--output_dir", "is a file")
    assert (tmp_path / "file").read_text() == "kept"
    assert "no permission at results" in explain(PermissionError(13, "Permission denied", "results"))


def test_full_disk_ends_in_one_line_and_keeps_the_earlier_checkpoints(command, dataset, tmp_path):
    """The system's limit on a file's size stands in for a full disk: the same failed write, without a disk to fill."""
    flags = ["--data_dir", dataset, *FAST, "--model", "test_vit4", "--resize", "32", "32", "--eval_steps", "9"]
    assert command("train", *flags, "--epochs", "1").returncode == 0
    before = sorted(os.listdir(tmp_path / "results"))
    for limit in (3_000_000, 8_000_000):  # model.safetensors, 3.7 MB, fails; training_state.pt, 15 MB, fails
        one_line(command("train", *flags, "--epochs", "2", "--resume", FILE_SIZE_LIMIT=limit), "disk full")
        assert sorted(os.listdir(tmp_path / "results")) == before
    result = command("train", *flags, "--epochs", "2", "--resume")
    assert result.returncode == 0 and (tmp_path / "results" / "checkpoint-18").is_dir(), result.stderr


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("CUDA error: out of memory"),  # torch 2.8 and later have a class of it, which is a RuntimeError
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")])
def test_gpu_memory_names_the_flags(error):
    assert "--batch_size" in explain(error)


def test_memory_of_the_cpu_names_the_flags():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2 ** 50, dtype=torch.uint8)
    assert "--batch_size" in explain(caught.value)


def test_an_operation_that_cannot_repeat_itself_names_the_flag():
    # the text of torch's own alert, which the CPU has no operation to raise
    text = ("adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True)'.")
    assert "--deterministic: adaptive_avg_pool2d_backward_cuda" in explain(RuntimeError(text))


def test_shared_memory_names_the_flag():
    text = "DataLoader worker (pid 7) is killed by signal: Bus error. The workers may be out of shared memory."
    assert "--num_workers 0" in explain(RuntimeError(text))


class Failing:
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise self.error


def test_error_of_a_worker_keeps_its_one_line_and_a_bug_its_traceback():
    with pytest.raises(InputError) as caught:
        next(iter(DataLoader(Failing(InputError("x.jpg: cannot be decoded")), num_workers=1)))
    assert explain(caught.value) == "x.jpg: cannot be decoded"
    assert explain(KeyError("a bug")) is None and explain(RuntimeError("shape mismatch")) is None
