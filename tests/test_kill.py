"""Runs that are killed or stopped at chosen instants, and end as if nothing had happened."""
import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import FAST, run_command, start_command

from checkpoint import list_checkpoints

# The default recipe, on a small network: 18 steps of two batches in two epochs of 9, evaluated in the middle of each.
RUN = [*FAST, "--batch_size", "8", "--accumulation_steps", "2", "--epochs", "2", "--lr", "3e-3", "--eval_steps", "6",
       "--patience", "3", "--log_interval", "1", "--valid_batch_size", "1"]
FILES = ("model.safetensors", "trainer_state.json", "valid_predictions.csv")


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """The results folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_command("train", ["--data_dir", dataset, *RUN], folder, {}).returncode == 0
    return folder / "results"


def interrupt(dataset, cwd, number, *flags, line=None, entry=None):
    """Start the run, and send it a signal once a line of its output, or an entry of its folder, is there; its exit code."""
    process, (stdout, _) = start_command("train", ["--data_dir", dataset, *RUN, *flags], cwd, {})
    try:
        wait_for(process, lambda: (line and stdout.is_file() and re.search(line, stdout.read_text()))
                 or (entry and os.path.exists(cwd / "results" / entry)))
        os.kill(process.pid, number)
        process.join(120)
    finally:
        process.kill()
    return process.exitcode


def wait_for(process, has_come):
    deadline = time.monotonic() + 120
    while not has_come():
        assert process.is_alive() and time.monotonic() < deadline, "the instant to interrupt never came"
        time.sleep(0.0002)


def resume(dataset, cwd, whole, *flags):
    """Go on to the end; the output, once the last checkpoint is byte for byte that of the undisturbed run."""
    result = run_command("train", ["--data_dir", dataset, *RUN, *flags, "--resume"], cwd, {})
    assert result.returncode == 0, result.stderr
    for name in FILES:
        assert (cwd / "results/checkpoint-18" / name).read_bytes() == (whole / "checkpoint-18" / name).read_bytes(), name
    assert (cwd / "results/log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    assert [folder.name for folder in list_checkpoints(cwd / "results")] == ["checkpoint-6", "checkpoint-12", "checkpoint-18"]
    return result.stdout


def entries(cwd):
    return sorted(path.name for path in (cwd / "results").iterdir() if "checkpoint" in path.name)


def test_killed_before_the_first_checkpoint(dataset, tmp_path, whole):
    assert interrupt(dataset, tmp_path, signal.SIGKILL, line="step 3/18") == -signal.SIGKILL
    assert entries(tmp_path) == []
    assert "starting from step 0" in resume(dataset, tmp_path, whole)


def test_killed_while_a_checkpoint_is_written(dataset, tmp_path, whole):
    assert interrupt(dataset, tmp_path, signal.SIGKILL, entry=".checkpoint-12.tmp") == -signal.SIGKILL
    assert entries(tmp_path) == [".checkpoint-12.tmp", "checkpoint-6"]
    assert "resuming from results/checkpoint-6" in resume(dataset, tmp_path, whole)
    assert ".checkpoint-12.tmp" not in entries(tmp_path)


def test_killed_in_an_evaluation(dataset, tmp_path, whole):
    assert interrupt(dataset, tmp_path, signal.SIGKILL, line="step 12/18") == -signal.SIGKILL
    assert entries(tmp_path) == ["checkpoint-6"]  # the evaluation had begun, and nothing was written yet
    resume(dataset, tmp_path, whole)


def test_killed_between_two_checkpoints_with_loader_processes(dataset, tmp_path, whole):
    assert interrupt(dataset, tmp_path, signal.SIGKILL, "--num_workers", "2", line="step 15/18") == -signal.SIGKILL
    assert entries(tmp_path) == ["checkpoint-12", "checkpoint-6"]
    assert "resuming from results/checkpoint-12" in resume(dataset, tmp_path, whole, "--num_workers", "1")


def test_a_photo_deleted_or_a_loader_process_killed_ends_in_one_line(copy, tmp_path):
    """The runs end by themselves, and what was written before stays and can be gone on with."""
    flags = ["--data_dir", copy, *RUN, "--epochs", "20", "--num_workers", "1"]
    process, (stdout, stderr) = start_command("train", flags, tmp_path, {})
    wait_for(process, lambda: (tmp_path / "results/checkpoint-6").is_dir())
    loader, *_ = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(loader), signal.SIGKILL)
    process.join(120)
    assert process.exitcode == 2 and stderr.read_text().splitlines()[-1].startswith("error: a loader process was killed")
    process, (stdout, stderr) = start_command("train", [*flags, "--resume"], tmp_path, {})
    wait_for(process, lambda: stdout.is_file() and re.search(r"(?s)resuming.*step \d+/", stdout.read_text()))
    for photo in (copy / "train/images").glob("*/mask1.jpg"):
        photo.unlink()
    process.join(120)
    assert process.exitcode == 2 and re.fullmatch(r"error: .*/mask1.jpg: no such file; .*", stderr.read_text().splitlines()[-1])
    assert "resuming from results/checkpoint-" in stdout.read_text() and "checkpoint-6" in entries(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_writes_a_checkpoint_and_the_command_to_go_on(dataset, tmp_path, whole, number):
    assert interrupt(dataset, tmp_path, number, "--num_workers", "1", line="step 2/18") == 128 + number
    (stopped,) = entries(tmp_path)
    assert stopped != "checkpoint-6" and not (tmp_path / "results" / stopped / "valid_predictions.csv").exists()
    out = (tmp_path / ".train.out").read_text()
    offered = shlex.split(re.search(r"stopped at step \d+ of 18; go on with: python train.py (.*)", out)[1])
    assert offered[-1] == "--resume" and f"resuming from results/{stopped}" in resume(dataset, tmp_path, whole, *offered[:-1])


def test_a_damaged_checkpoint_is_named_set_aside_and_passed_over(dataset, tmp_path, whole):
    shutil.copytree(whole, tmp_path / "results")
    weights = tmp_path / "results/checkpoint-18/training_state.pt"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    out = resume(dataset, tmp_path, whole)
    assert "checkpoint-18/training_state.pt: damaged" in out and "resuming from results/checkpoint-12" in out
    assert "damaged-checkpoint-18" in entries(tmp_path)


def test_resuming_from_nothing_but_damaged_checkpoints_is_refused(dataset, tmp_path, whole):
    shutil.copytree(whole, tmp_path / "results")
    before = entries(tmp_path)
    for folder in list_checkpoints(tmp_path / "results"):
        (folder / "SHA256SUMS").unlink()
    result = run_command("train", ["--data_dir", dataset, *RUN, "--resume"], tmp_path, {})
    assert result.returncode == 2 and "no checkpoint in results is whole" in result.stderr and "--overwrite" in result.stderr
    assert entries(tmp_path) == before
