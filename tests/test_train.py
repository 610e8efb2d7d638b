"""The training loop by its real command: equal runs, resuming, what is kept, and what it says."""
import argparse
import json
import math
import re
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import DEVICE, FAST, context, parse_printed
from safetensors.torch import load_file
from sklearn.metrics import f1_score
from timm.utils import ModelEmaV3

from core.checkpoint import TrainerState, list_checkpoints
from core.errors import InputError
from core.files import write_json
from core.layout import choose_data, dataset_folders
from core.optim import default_rate, learning_rate
from core.run_folder import prune_checkpoints, should_stop_early, update_best
from core.trainer import ModelEma, explain_out_of_memory
from train import parse_args, set_defaults

RUN = [*FAST, "--epochs", "1", "--lr", "3e-3", "--eval_steps", "5"]
FILES = ("model.safetensors", "trainer_state.json", "valid_predictions.csv")


def train(command, dataset, folder, *flags):
    result = command("train", "--data_dir", dataset, *RUN, "--output_dir", folder, *flags)
    assert result.returncode == 0, result.stderr
    return result.stdout


def assert_same_files(one, other, names=FILES):
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def checkpoint_names(folder):
    return [path.name for path in list_checkpoints(folder)]


def read_history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["history"]


# --- equal runs ---

def test_default_recipe_gives_identical_weights_for_any_number_of_workers(command, dataset,
                                                                          tmp_path):
    for workers in (0, 1, 3):  # augmentation, sampler and averaging are on by default
        train(command, dataset, f"w{workers}", "--num_workers", workers)
    for other in ("w1", "w3"):
        assert_same_files(tmp_path / "w0/checkpoint-9", tmp_path / other / "checkpoint-9")


def test_the_seed_changes_the_run(command, dataset, tmp_path, trained):
    train(command, dataset, "other", "--seed", "2")
    one, other = (load_file(folder / "checkpoint-5/model.safetensors")
                  for folder in (trained, tmp_path / "other"))
    assert not torch.equal(one["conv_stem.weight"], other["conv_stem.weight"])


def test_args_txt_repeats_the_run(command, dataset, tmp_path):
    # This dataset changes defaults, which the file must hold, too; and its path has a space.
    data = shutil.copytree(dataset, tmp_path / "my data")
    (data / "sample.json").write_text("{}")
    out = train(command, data, "results", "--no-fix_labels", "--warmup", "0.3", "--no-amp",
                "--dropout", "0.3", "--resume")
    assert "sample defaults: --augmentation flip\n" in out  # the only flag that was not given
    flags = (tmp_path / "results/args.txt").read_text().splitlines()
    assert {f"'--data_dir={data}'", "--resize 32 24", "--no-fix_labels", "--no-amp",
            "--dropout=0.3", "--augmentation=flip", "--batch_size=16"} <= set(flags)
    assert not any(re.match("--(output_dir|resume|overwrite)", flag) for flag in flags)
    again = command("train", "@results/args.txt", "--output_dir", "other")
    assert again.returncode == 0, again.stderr
    assert "sample defaults" not in again.stdout
    assert checkpoint_names(tmp_path / "other") == ["checkpoint-5", "checkpoint-9"]
    assert_same_files(tmp_path / "results/checkpoint-9", tmp_path / "other/checkpoint-9")
    assert_same_files(tmp_path / "results", tmp_path / "other", ["args.txt", "log.jsonl"])


def test_photos_with_soft_targets_join_training(command, dataset, tmp_path, trained):
    """24 people: 19 are trained, 133 photos in 9 steps; with the 20 eval photos 153 in 10."""
    result = command("inference", "--model_dir", trained, "--save_probs", "probs.csv")
    assert result.returncode == 0, result.stderr
    out = train(command, dataset, "results", "--soft_targets", "probs.csv")
    assert "photos of the eval part that join training: 20\n" in out
    assert "training: people 19, photos 133" in out and "steps: 10 of 16 photos" in out
    assert "--soft_targets=probs.csv\n" in (tmp_path / "results/args.txt").read_text()
    assert "and of the files of --soft_targets: `" in (tmp_path / "results/README.md").read_text()
    # A resumed run must have the same, at any path.
    (tmp_path / "probs.csv").rename(tmp_path / "moved.csv")
    again = command("train", "@results/args.txt", "--resume", "--soft_targets", "moved.csv")
    assert again.returncode == 0, again.stderr
    table = pd.read_csv(tmp_path / "moved.csv")
    table[["p0", "p1"]] = table[["p1", "p0"]].to_numpy()
    table.to_csv(tmp_path / "moved.csv", index=False)
    again = command("train", "@results/args.txt", "--resume", "--soft_targets", "moved.csv")
    assert again.returncode == 2 and "a file of --soft_targets" in again.stderr


def test_validation_batch_size_changes_no_metric(command, dataset, tmp_path):
    """The last batch is never dropped, and F1 is never a mean over batches."""
    for size in (64, 5):
        train(command, dataset, f"v{size}", "--no-amp", "--valid_batch_size", size)
    one, other = (read_history(tmp_path / name / "checkpoint-9") for name in ("v64", "v5"))
    for a, b in zip(one, other, strict=True):
        assert a.pop("class_f1") == pytest.approx(b.pop("class_f1"), abs=1e-6)
        assert a == pytest.approx(b, abs=1e-5)


def test_accumulated_steps_equal_one_large_batch(command, dataset, tmp_path):
    # group and layer norms only: batch statistics would differ
    flags = ["--model", "test_vit", "--resize", "32", "32", "--epochs", "1", "--eval_steps", "100",
             "--clip_grad", "1", "--dropout", "0", "--optimizer", "sgd", "--lr", "0.05",
             "--class_weights", "balanced", "--sampler", "none", "--augmentation", "none",
             "--no-amp"]
    train(command, dataset, "one", *flags, "--batch_size", "34")
    train(command, dataset, "two", *flags, "--batch_size", "17", "--accumulation_steps", "2")
    one, two = (load_file(tmp_path / folder / "checkpoint-4/model.safetensors")
                for folder in ("one", "two"))
    assert all(torch.allclose(one[key], two[key], atol=1e-5) for key in one)


def test_evaluations_do_not_change_training(command, dataset, tmp_path):
    flags = ["--ema_decay", "0", "--dropout", "0.3"]
    train(command, dataset, "often", *flags, "--eval_steps", "2")
    train(command, dataset, "once", *flags, "--eval_steps", "100")
    assert_same_files(tmp_path / "often/checkpoint-9", tmp_path / "once/checkpoint-9",
                      ["model.safetensors"])


def record_shapes(argv, path):
    """Train in this process; write the distinct shapes of all batches that the model got."""
    import model
    import train
    counts = {}

    class Recorder(torch.nn.Module):
        def __init__(self, num_classes, **kwargs):
            super().__init__()
            self.linear = torch.nn.Linear(3, num_classes)

        def forward(self, images):
            mode = "training" if self.training else "evaluation"
            shape = str(tuple(images.shape))
            counts.setdefault(mode, {}).setdefault(shape, 0)
            counts[mode][shape] += 1
            return self.linear(images.mean(dim=(2, 3)))

    model.MODELS["recorder"] = Recorder
    train.main(argv)
    write_json(path, counts)


def test_all_batches_of_a_run_have_one_shape_in_training_and_one_in_evaluation(dataset, tmp_path):
    """133 photos in batches of 16 and 35 photos in batches of 16: neither divides."""
    for sampler in ("none", "sqrt"):
        argv = ["--data_dir", str(dataset), *RUN, "--model", "recorder", "--epochs", "3",
                "--sampler", sampler, "--valid_batch_size", "16", "--eval_steps", "10",
                "--output_dir", str(tmp_path / sampler)]
        path = tmp_path / f"{sampler}.json"
        process = context.Process(target=record_shapes, args=(argv, path))
        process.start()
        process.join(120)
        assert process.exitcode == 0
        # ceil(3 * 133 / 16) = 25 steps; 3 evaluations of 3 batches, each also mirrored.
        assert json.loads(path.read_text()) == {"training": {"(16, 3, 32, 24)": 25},
                                                "evaluation": {"(12, 3, 32, 24)": 18}}


# --- resuming ---

def test_resuming_ends_with_the_same_files(command, dataset, tmp_path):
    # 9 steps of two batches in two passes. Step 5 is in the middle of the second pass.
    flags = ["--accumulation_steps", "2", "--criterion", "focal_f1", "--class_weights", "sqrt",
             "--epochs", "2", "--dropout", "0.3"]
    train(command, dataset, "whole", *flags)
    assert checkpoint_names(tmp_path / "whole") == ["checkpoint-5", "checkpoint-9"]
    part = shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(part / "checkpoint-9")
    out = train(command, dataset, "part", *flags, "--resume")
    assert "resuming from part/checkpoint-5\n" in out
    assert_same_files(tmp_path / "whole/checkpoint-9", part / "checkpoint-9")
    assert_same_files(tmp_path / "whole", part, ["log.jsonl"])
    assert "the run is complete" in train(command, dataset, "part", *flags, "--resume")


def test_best_score_survives_a_resume(command, dataset, tmp_path, trained):
    folder = shutil.copytree(trained, tmp_path / "results")
    path = folder / "checkpoint-9/trainer_state.json"
    state = json.loads(path.read_text()) | {"best_step": 5, "best_macro_f1": 0.99}
    write_json(path, state)
    out = train(command, dataset, "results", "--epochs", "2", "--keep_last", "1", "--resume")
    assert checkpoint_names(folder) == ["checkpoint-5", "checkpoint-17"]
    state = json.loads((folder / "checkpoint-17/trainer_state.json").read_text())
    assert state["best_step"] == 5 and state["best_macro_f1"] == 0.99
    assert "--model_dir=./results/checkpoint-5" in out


def test_overwrite_replaces_the_run_and_nothing_else(command, dataset, tmp_path):
    train(command, dataset, "results")
    (tmp_path / "results" / "notes.txt").write_text("mine")
    train(command, dataset, "results", "--overwrite", "--eval_steps", "9")
    assert checkpoint_names(tmp_path / "results") == ["checkpoint-9"]
    assert (tmp_path / "results" / "notes.txt").read_text() == "mine"


def test_loss_scaling_of_float16_is_ignored_on_a_device_without_it(command, dataset, tmp_path,
                                                                   trained):
    """A run that started on a GPU without bfloat16 can be resumed on another device."""
    results, plain = (shutil.copytree(trained, tmp_path / name) for name in ("results", "plain"))
    path = results / "checkpoint-9/training_state.pt"
    state = torch.load(path, map_location="cpu", weights_only=True)
    assert state["scaler"] == {}
    state["scaler"] = torch.amp.GradScaler("cpu").state_dict()
    assert state["scaler"]["scale"] == 65536
    torch.save(state, path)
    for folder in (results, plain):
        train(command, dataset, folder, "--epochs", "2", "--resume")
    last = torch.load(results / "checkpoint-17/training_state.pt", map_location="cpu",
                      weights_only=True)
    assert last["scaler"] == {}
    assert_same_files(results / "checkpoint-17", plain / "checkpoint-17")


def test_early_stopping_stops(command, dataset, tmp_path):
    folder = tmp_path / "results"
    flags = ["--lr", "1e-9", "--ema_decay", "0", "--eval_steps", "1", "--patience", "2"]
    out = train(command, dataset, "results", *flags)
    names = checkpoint_names(folder)
    assert "stopped early" in out and len(names) <= 6
    (folder / "worst_mistakes.png").unlink()  # as if it had been killed before its last report
    out = train(command, dataset, "results", *flags, "--resume")
    assert "the run is complete" in out and "\nnext: " in out
    assert checkpoint_names(folder) == names and (folder / "worst_mistakes.png").is_file()


def test_best_is_by_macro_f1_and_survives_pruning(tmp_path):
    state = TrainerState()
    for step, f1, accuracy in [(1, 0.5, 0.6), (2, 0.7, 0.7), (3, 0.6, 0.9), (4, 0.7, 0.9),
                               (5, 0.1, 0.1)]:
        state.history.append({"step": step, "macro_f1": f1, "accuracy": accuracy})
        state.step = step
        update_best(state)
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        write_json(folder / "trainer_state.json", asdict(state))
        (folder / "training_state.pt").write_bytes(b"")
        prune_checkpoints(tmp_path, state, keep_last=1)
    assert state.best_step == 2 and state.best_macro_f1 == 0.7
    assert checkpoint_names(tmp_path) == ["checkpoint-2", "checkpoint-5"]
    assert should_stop_early(state, 3)
    assert not should_stop_early(state, 4) and not should_stop_early(state, 0)


# --- what a run writes and says ---

def test_files_and_log_lines_of_a_run(command, dataset, tmp_path):
    out = train(command, dataset, "results", "--class_weights", "sqrt", "--log_interval", "3")
    folder = tmp_path / "results"
    names = {re.sub(r"^(events.out.tfevents)\..*", r"\1", path.name) for path in folder.iterdir()}
    assert names == {
        ".lock", "checkpoint-5", "checkpoint-9", "events.out.tfevents", "args.txt", "log.jsonl",
        "augmented_inputs.png", "confusion_matrix.png", "valid_predictions.csv",
        "worst_mistakes.png", "curves.png", "reliability.png", "README.md"}
    assert {path.name for path in (folder / "checkpoint-5").iterdir()} == {
        *FILES, "config.json", "training_state.pt"}
    assert "training: people 19, photos 133\nvalidation: people 5, photos 35\n" in out
    assert "class weights:" in out and "step 3/9" in out
    counts = [int(count) for count in re.search(r"class counts: ([\d ]+)", out)[1].split()]
    assert sum(counts) == 133  # the photos of the training people only
    weights = re.search(r"class weights: ([\d. ]+)", out)[1].split()
    # n^-1/2, with a mean of 1 over those photos
    scale = sum(counts) / sum(count ** 0.5 for count in counts)
    expected = [scale * count ** -0.5 for count in counts]
    assert list(map(float, weights)) == pytest.approx(expected, abs=0.006)
    predictions = pd.read_csv(folder / "checkpoint-9" / "valid_predictions.csv")
    history = read_history(folder / "checkpoint-9")
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history
    expected = f1_score(predictions.label, predictions["ans"], labels=range(18), average="macro",
                        zero_division=0)
    assert history[-1]["macro_f1"] == pytest.approx(expected)
    best = max(history, key=lambda metrics: metrics["macro_f1"])
    assert (f"best macro F1 {best['macro_f1']:.4f} at step {best['step']}, the best of 2 "
            f"evaluations") in out
    assert parse_printed(re.search(r"next: (.*)", out)[1], tmp_path) == (
        "inference", [f"--model_dir=./results/checkpoint-{best['step']}"])


def test_tensorboard_holds_the_curves(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    scalars = set(EventAccumulator(str(trained)).Reload().Tags()["scalars"])
    assert {"train/mean_loss", "valid/macro_f1", "valid/mask_f1", "valid/gender_f1",
            "valid/age_f1", "valid/log_loss"} <= scalars
    # TensorBoard sorts the groups by name: the few curves of all classes come first.
    assert len([tag for tag in sorted(scalars)[-18:] if tag.startswith("valid_class_f1/")]) == 18


def test_folds_and_val_ratio_zero_by_command(command, dataset, tmp_path):
    people = []
    for fold in range(2):
        train(command, dataset, f"fold-{fold}", "--n_folds", "2", "--fold", fold,
              "--eval_steps", "100")
        (folder,) = list_checkpoints(tmp_path / f"fold-{fold}")
        people.append(set(pd.read_csv(folder / "valid_predictions.csv").person))
    assert not people[0] & people[1] and len(people[0] | people[1]) == 24
    out = train(command, dataset, "all", "--val_ratio", "0")
    assert "training: people 24, photos 168\n" in out and "trained on everyone" in out
    assert out.endswith("inference.py --model_dir=./all/checkpoint-11\n")


def test_mixed_precision_trains_and_is_another_computation(command, dataset, tmp_path, trained):
    # The run of `trained` has mixed precision on CUDA, where it is the default.
    train(command, dataset, "other", "--amp" if DEVICE == "cpu" else "--no-amp")
    one, other = (read_history(folder / "checkpoint-5")[0]["train_loss"]
                  for folder in (trained, tmp_path / "other"))
    assert 0 < abs(one - other) < 0.2


@pytest.mark.parametrize("flags", [["--optimizer", "SGD", "--ema_decay", "0"],
                                   ["--optimizer", "nadamw"],
                                   ["--augmentation", "none", "--deterministic"],
                                   ["--criterion", "ce_f1"]])
def test_other_switches_train(command, dataset, flags):
    train(command, dataset, "results", *flags)


# --- flags, defaults and data ---

def test_parse_args_parses_once_and_returns_which_flags_were_given(monkeypatch):
    calls, parse = [], argparse.ArgumentParser.parse_known_args

    def counted(self, *args, **kwargs):
        calls.append(self)
        return parse(self, *args, **kwargs)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", counted)
    defaults, explicit = parse_args([])
    assert explicit == set() and len(calls) == 1
    assert defaults.epochs == 5 and defaults.resize == [384, 288] and defaults.amp is None
    # A flag counts as given by any of its names, and also if its value is the default.
    args, explicit = parse_args(["--epochs", "5", "--no-amp", "--model_dir", "x", "--crop", "1",
                                 "0.9"])
    assert explicit == {"epochs", "amp", "output_dir", "crop"} and len(calls) == 2
    changed = {"amp": False, "output_dir": "x", "crop": [1.0, 0.9]}
    assert vars(args) == vars(defaults) | changed


def test_flags_of_a_file_count_as_given_and_later_flags_win(tmp_path):
    (tmp_path / "flags.txt").write_text("# a comment\n--crop 0.5 0.6  # another\n\n--epochs 9\n")
    args, explicit = parse_args([f"@{tmp_path / 'flags.txt'}", "--epochs", "3"])
    assert args.crop == [0.5, 0.6] and args.epochs == 3 and explicit == {"crop", "epochs"}


def test_dataset_defaults_apply_only_to_flags_that_were_not_given():
    before = {"crop": [0.8, 0.95], "old_age": 60, "lr": 1e-3, "batch_size": 64,
              "accumulation_steps": 1}
    for kind, explicit, changed in [
        ("competition", {"lr"}, {"crop": [0.625, 0.667], "old_age": 58}),
        ("competition", {"crop", "lr"}, {"old_age": 58}),
        ("competition", {"crop", "old_age", "lr"}, {}),
        ("own", {"lr"}, {}),
        ("own", set(), {"lr": 2e-3}),
    ]:
        args = SimpleNamespace(**before)
        set_defaults(args, kind, explicit)
        assert vars(args) == before | changed


def test_launch_variables_of_a_training_platform(command, dataset, tmp_path):
    result = command("train", *RUN, SM_CHANNEL_TRAIN=dataset / "train" / "images",
                     SM_CHANNEL_EVAL=dataset / "eval")
    assert result.returncode == 0, result.stderr
    assert command("inference", "--model_dir=./results").returncode == 0
    assert len(pd.read_csv(tmp_path / "submission.csv")) == 20


def test_the_eval_part_of_other_data_is_never_recorded(dataset, tmp_path, monkeypatch):
    other = tmp_path / "other/eval"
    mine = shutil.copytree(dataset / "train", tmp_path / "mine/train").parent
    shutil.copytree(dataset / "eval", other)
    monkeypatch.setenv("SM_CHANNEL_TRAIN", str(dataset / "train/images"))
    monkeypatch.setenv("SM_CHANNEL_EVAL", str(other))
    assert dataset_folders(choose_data(None)[0])["eval_dir"] == str(other)
    assert dataset_folders(str(mine))["eval_dir"] is None
    assert dataset_folders(str(dataset))["eval_dir"] == str(dataset / "eval")


def test_default_rate_by_hand():
    assert [default_rate(1.4e-3, n) for n in (4, 16, 64, 128)] == [7e-4, 1.4e-3, 2.8e-3, 3.96e-3]


def test_learning_rate_by_hand():
    rates = [learning_rate(step, 100, 1.0, 0.1) for step in (1, 5, 10)]
    assert rates == pytest.approx([0.1, 0.5, 1.0])
    first = 0.5 * (1 + math.cos(math.pi / 100))
    assert learning_rate(11, 109, 1.0, 10 / 109) == pytest.approx(first)
    assert learning_rate(60, 109, 1.0, 10 / 109) == pytest.approx(0.5)
    rates = [learning_rate(step, 50, 1.0, 0.0) for step in range(1, 51)]
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.01 and np.isfinite(rates).all()


def test_the_average_of_the_weights_is_that_of_timm():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    average = ModelEma(model, 0.9)
    reference = ModelEmaV3(model, decay=0.9, use_warmup=True)
    for step in range(1, 30):
        model(torch.randn(2, 3, 8, 8))  # batch norm counts, and moves its statistics
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        average.update(step)
        reference.update(model, step)
    expected = reference.module.state_dict()
    assert expected["1.num_batches_tracked"] == 29
    for name, value in average.module.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(("batch_size", "steps", "says"), [
    (64, 1, "--batch_size 32 --accumulation_steps 2"),
    (6, 3, "--batch_size 3 --accumulation_steps 6"),
    (7, 1, "a smaller --resize"), (2, 8, "a smaller --resize")])
def test_too_little_memory_in_training_names_flags_that_fit(batch_size, steps, says):
    with pytest.raises(InputError, match=says), explain_out_of_memory(batch_size, steps):
        torch.empty(1 << 50)
