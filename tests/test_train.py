"""The loop by its real command: equal runs, resuming, what is kept, and what it says."""
import json
import math
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FAST
from safetensors.torch import load_file
from sklearn.metrics import f1_score

from checkpoint import list_checkpoints, write_checksums, write_json
from layout import choose_data, record_data
from optim import learning_rate
from run_folder import is_exhausted, prune_checkpoints, update_best

RUN = [*FAST, "--epochs", "1", "--lr", "3e-3", "--eval_steps", "5"]


def train(command, dataset, folder, *flags):
    result = command("train", "--data_dir", dataset, *RUN, "--output_dir", folder, *flags)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_default_recipe_gives_identical_weights_for_any_number_of_workers(command, dataset, tmp_path):
    for workers in (0, 1, 3):  # augmentation, sampler and averaging are on by default
        train(command, dataset, f"w{workers}", "--num_workers", workers)
    for other in ("w1", "w3"):
        for name in ("model.safetensors", "trainer_state.json", "valid_predictions.csv"):
            assert (tmp_path / "w0/checkpoint-9" / name).read_bytes() == (tmp_path / other / "checkpoint-9" / name).read_bytes()


def test_the_seed_changes_the_run(command, dataset, tmp_path, trained):
    train(command, dataset, "other", "--seed", "2")
    one, other = (load_file(folder / "checkpoint-5/model.safetensors") for folder in (trained, tmp_path / "other"))
    assert not torch.equal(one["conv_stem.weight"], other["conv_stem.weight"])


def test_validation_batch_size_changes_no_metric(command, dataset, tmp_path, trained):
    """The last batch is never dropped, and F1 is never a mean over batches."""
    train(command, dataset, "v", "--valid_batch_size", "5")
    one, other = (json.loads((folder / "checkpoint-9/trainer_state.json").read_text()) for folder in (trained, tmp_path / "v"))
    for a, b in zip(one["history"], other["history"], strict=True):
        assert a.pop("class_f1") == pytest.approx(b.pop("class_f1"), abs=1e-6) and a == pytest.approx(b, abs=1e-5)


def test_resuming_ends_with_the_same_files(command, dataset, tmp_path):
    # 5 steps an epoch, an evaluation every 4: the run goes on in the middle of an epoch
    flags = ["--accumulation_steps", "2", "--criterion", "focal_f1", "--class_weights", "sqrt", "--epochs", "2",
             "--eval_steps", "4", "--dropout", "0.3"]
    train(command, dataset, "whole", *flags)
    names = [path.name for path in list_checkpoints(tmp_path / "whole")]
    shutil.rmtree(shutil.copytree(tmp_path / "whole", tmp_path / "part") / names[-1])
    assert "resuming from" in train(command, dataset, "part", *flags, "--resume")
    for name in ("model.safetensors", "trainer_state.json", "valid_predictions.csv"):
        assert (tmp_path / "whole" / names[-1] / name).read_bytes() == (tmp_path / "part" / names[-1] / name).read_bytes()
    assert (tmp_path / "whole" / "log.jsonl").read_text() == (tmp_path / "part" / "log.jsonl").read_text()
    assert "the run is complete" in train(command, dataset, "part", *flags, "--resume")


def test_best_score_survives_a_resume(command, dataset, tmp_path, trained):
    folder = shutil.copytree(trained, tmp_path / "results")
    state = json.loads((folder / "checkpoint-9" / "trainer_state.json").read_text())
    write_json(folder / "checkpoint-9" / "trainer_state.json", state | {"best_step": 5, "best_macro_f1": 0.99})
    write_checksums(folder / "checkpoint-9")
    out = train(command, dataset, "results", "--epochs", "2", "--keep_last", "1", "--resume")
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-5", "checkpoint-18"]
    state = json.loads((folder / "checkpoint-18" / "trainer_state.json").read_text())
    assert state["best_step"] == 5 and state["best_macro_f1"] == 0.99 and "--model_dir=./results/checkpoint-5" in out


def test_overwrite_replaces_the_run_and_nothing_else(command, dataset, tmp_path):
    train(command, dataset, "results")
    (tmp_path / "results" / "notes.txt").write_text("mine")
    train(command, dataset, "results", "--overwrite", "--eval_steps", "9")
    assert [path.name for path in list_checkpoints(tmp_path / "results")] == ["checkpoint-9"]
    assert (tmp_path / "results" / "notes.txt").read_text() == "mine"


def test_accumulated_steps_equal_one_large_batch(command, dataset, tmp_path):
    # group and layer norms only: batch statistics would differ
    flags = ["--model", "test_vit", "--resize", "32", "32", "--epochs", "1", "--eval_steps", "100", "--clip_grad", "1",
             "--dropout", "0", "--optimizer", "sgd", "--lr", "0.05", "--class_weights", "balanced"]
    train(command, dataset, "one", *flags, "--batch_size", "34")
    train(command, dataset, "two", *flags, "--batch_size", "17", "--accumulation_steps", "2")
    one, two = (load_file(tmp_path / folder / "checkpoint-4/model.safetensors") for folder in ("one", "two"))
    assert all(torch.allclose(one[key], two[key], atol=1e-5) for key in one)


def test_what_a_run_leaves_and_says(command, dataset, tmp_path):
    out = train(command, dataset, "results", "--class_weights", "sqrt", "--log_interval", "3")
    folder = tmp_path / "results"
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "checkpoint-5", "checkpoint-9", "tensorboard", "log.jsonl", "augmented_inputs.png", "confusion_matrix.png",
        "valid_predictions.csv", "worst_mistakes.png"}
    assert {path.name for path in (folder / "checkpoint-5").iterdir()} == {
        "model.safetensors", "config.json", "trainer_state.json", "training_state.pt", "valid_predictions.csv", "SHA256SUMS"}
    assert "training: 19 people, 133 photos" in out and "validation: 5 people, 35 photos" in out
    assert "class weights:" in out and "step 3/9" in out
    counts = [int(count) for count in re.search(r"class counts: ([\d ]+)", out)[1].split()]
    assert sum(counts) == 133  # the training people's photos alone
    weights = [float(weight) for weight in re.search(r"class weights: ([\d. ]+)", out)[1].split()]
    scale = sum(counts) / sum(count ** 0.5 for count in counts)  # n^-1/2 with a mean of 1 over those photos
    assert weights == pytest.approx([scale * count ** -0.5 for count in counts], abs=0.006)
    predictions = pd.read_csv(folder / "checkpoint-9" / "valid_predictions.csv")
    history = json.loads((folder / "checkpoint-9" / "trainer_state.json").read_text())["history"]
    assert [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] == history
    expected = f1_score(predictions.label, predictions["ans"], labels=range(18), average="macro", zero_division=0)
    assert history[-1]["macro_f1"] == pytest.approx(expected)
    best = max(history, key=lambda metrics: metrics["macro_f1"])
    assert f"best macro F1 {best['macro_f1']:.4f} at step {best['step']}, the best of 2 evaluations" in out
    assert f"next: python inference.py --model_dir=./results/checkpoint-{best['step']}" in out


def test_tensorboard_holds_the_curves_and_figures(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(trained / "tensorboard"), size_guidance={"images": 9}).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/mean_loss", "valid/macro_f1", "valid/mask_f1", "valid/gender_f1", "valid/age_f1", "valid/log_loss"} <= scalars
    assert len([tag for tag in scalars if tag.startswith("class_f1/")]) == 18
    assert set(events.Tags()["images"]) == {"inputs/augmented", "valid/confusion_matrix", "valid/worst_mistakes"}


def test_folds_and_val_ratio_zero_by_command(command, dataset, tmp_path):
    people = []
    for fold in range(2):
        train(command, dataset, f"fold-{fold}", "--n_folds", "2", "--fold", fold, "--eval_steps", "100")
        (folder,) = list_checkpoints(tmp_path / f"fold-{fold}")
        people.append(set(pd.read_csv(folder / "valid_predictions.csv").person))
    assert not people[0] & people[1] and len(people[0] | people[1]) == 24
    out = train(command, dataset, "all", "--val_ratio", "0")
    assert "training: 24 people, 168 photos" in out and "trained on everyone" in out
    assert "next: python inference.py --model_dir=./all/checkpoint-11" in out


def test_early_stopping_stops(command, dataset, tmp_path):
    out = train(command, dataset, "results", "--lr", "1e-9", "--ema_decay", "0", "--eval_steps", "1", "--patience", "2")
    assert "stopped early" in out and len(list_checkpoints(tmp_path / "results")) <= 6
    names = [path.name for path in list_checkpoints(tmp_path / "results")]
    (tmp_path / "results" / "worst_mistakes.png").unlink()  # as if it had been stopped before its last word
    out = train(command, dataset, "results", "--lr", "1e-9", "--ema_decay", "0", "--eval_steps", "1", "--patience", "2", "--resume")
    assert "the run is complete" in out and "next: python inference.py" in out
    assert [path.name for path in list_checkpoints(tmp_path / "results")] == names
    assert (tmp_path / "results" / "worst_mistakes.png").is_file()


def test_mixed_precision_trains_and_is_another_computation(command, dataset, tmp_path, trained):
    train(command, dataset, "amp", "--amp")
    plain, mixed = (json.loads((folder / "checkpoint-5/trainer_state.json").read_text())["history"][0]["train_loss"]
                    for folder in (trained, tmp_path / "amp"))
    assert 0 < abs(plain - mixed) < 0.2


def test_evaluations_do_not_change_training(command, dataset, tmp_path):
    flags = ["--ema_decay", "0", "--dropout", "0.3"]
    train(command, dataset, "often", *flags, "--eval_steps", "2")
    train(command, dataset, "once", *flags, "--eval_steps", "100")
    often, once = (load_file(tmp_path / folder / "checkpoint-9/model.safetensors") for folder in ("often", "once"))
    assert all(torch.equal(often[key], once[key]) for key in once)


@pytest.mark.parametrize("flags", [["--optimizer", "SGD", "--ema_decay", "0"], ["--optimizer", "nadamw"],
                                   ["--head", "flat", "--augmentation", "none", "--deterministic"], ["--criterion", "ce_f1"]])
def test_other_switches_train(command, dataset, flags):
    train(command, dataset, "results", *flags)


def test_launch_variables_of_this_task(command, dataset, tmp_path):
    result = command("train", *RUN, SM_CHANNEL_TRAIN=dataset / "train" / "images", SM_CHANNEL_EVAL=dataset / "eval")
    assert result.returncode == 0, result.stderr
    assert command("inference", "--model_dir=./results").returncode == 0
    assert len(pd.read_csv(tmp_path / "submission.csv")) == 20


def test_the_eval_part_of_other_data_is_never_recorded(dataset, tmp_path, monkeypatch):
    other, mine = tmp_path / "other/eval", shutil.copytree(dataset / "train", tmp_path / "mine/train").parent
    shutil.copytree(dataset / "eval", other)
    monkeypatch.setenv("SM_CHANNEL_TRAIN", str(dataset / "train/images"))
    monkeypatch.setenv("SM_CHANNEL_EVAL", str(other))
    assert record_data(choose_data(None, None)[0])["eval_dir"] == str(other)
    assert record_data(str(mine))["eval_dir"] is None and record_data(str(dataset))["eval_dir"] == str(dataset / "eval")


def test_loss_scaling_of_another_kind_of_device_is_not_gone_on_with(command, dataset, tmp_path):
    train(command, dataset, "results")
    path = tmp_path / "results/checkpoint-9/training_state.pt"
    state = torch.load(path, weights_only=True)
    ours = state["scaler"].copy()
    state["scaler"] |= {"scale": 65536.0, "growth_interval": 2000}  # what a GPU without bfloat16 would have written
    torch.save(state, path)
    write_checksums(path.parent)
    train(command, dataset, "results", "--epochs", "2", "--resume")
    assert torch.load(tmp_path / "results/checkpoint-18/training_state.pt", weights_only=True)["scaler"] == ours


def test_best_is_by_macro_f1_and_survives_pruning(tmp_path):
    state = {"step": 0, "epoch": 0, "best_step": None, "best_macro_f1": None, "history": [], "args": {}}
    for step, f1, accuracy in [(1, 0.5, 0.6), (2, 0.7, 0.7), (3, 0.6, 0.9), (4, 0.7, 0.9), (5, 0.1, 0.1)]:
        state["history"].append({"step": step, "macro_f1": f1, "accuracy": accuracy})
        state["step"] = step
        update_best(state)
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        write_json(folder / "trainer_state.json", state)
        (folder / "training_state.pt").write_bytes(b"")
        prune_checkpoints(tmp_path, keep_last=1)
    assert state["best_step"] == 2 and state["best_macro_f1"] == 0.7
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-5"]
    assert is_exhausted(state, 3) and not is_exhausted(state, 4) and not is_exhausted(state, 0)


def test_learning_rate_by_hand():
    assert [learning_rate(step, 100, 1.0, 0.1) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(11, 109, 1.0, 10 / 109) == pytest.approx(0.5 * (1 + math.cos(math.pi / 100)))
    assert learning_rate(60, 109, 1.0, 10 / 109) == pytest.approx(0.5)
    rates = [learning_rate(step, 50, 1.0, 0.0) for step in range(1, 51)]
    assert rates == sorted(rates, reverse=True) and 0 < rates[-1] < 0.01 and np.isfinite(rates).all()
