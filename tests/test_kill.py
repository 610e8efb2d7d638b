"""Runs that are killed or stopped at chosen moments, and end as if nothing had happened."""
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import FAST, parse_printed, run_command, start_command

from core.checkpoint import find_checkpoint, list_checkpoints
from core.distributed import StopSignals
from core.images import _with_stderr

# The default recipe on a small network: ceil(2 * 133 / 16) = 17 steps of two batches in two
# passes. Neither the evaluations nor the end are at the end of a pass.
RUN = [*FAST, "--batch_size", "8", "--accumulation_steps", "2", "--epochs", "2", "--lr", "3e-3",
       "--eval_steps", "6", "--patience", "3", "--log_interval", "1", "--valid_batch_size", "1"]
FILES = ("model.safetensors", "trainer_state.json", "valid_predictions.csv")


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """The results folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_command("train", ["--data_dir", dataset, *RUN], folder, {}).returncode == 0
    return folder / "results"


def interrupt(dataset, cwd, number, *flags, line=None, entry=None):
    """Start the run, and send it a signal as soon as its output has a line or its folder an entry.

    Returns:
        The exit code of the run.
    """
    process, (stdout, _) = start_command("train", ["--data_dir", dataset, *RUN, *flags], cwd, {})

    def is_reached():
        if line:
            return stdout.is_file() and re.search(line, stdout.read_text())
        return os.path.exists(cwd / "results" / entry)

    try:
        wait_for(process, is_reached)
        os.kill(process.pid, number)
        process.join(120)
    finally:
        process.kill()
    return process.exitcode


def wait_for(process, is_reached):
    deadline = time.monotonic() + 120
    while not is_reached():
        assert process.is_alive(), "the run ended before the moment to interrupt it"
        assert time.monotonic() < deadline, "the moment to interrupt never came"
        time.sleep(0.0002)


def resume(dataset, cwd, whole, *flags):
    """Resume the run to its end, and compare it with the whole run byte for byte.

    Returns:
        Its output, stdout.
    """
    result = run_command("train", ["--data_dir", dataset, *RUN, *flags, "--resume"], cwd, {})
    assert result.returncode == 0, result.stderr
    for name in FILES:
        last, expected = (folder / "checkpoint-17" / name for folder in (cwd / "results", whole))
        assert last.read_bytes() == expected.read_bytes(), name
    assert (cwd / "results/log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    assert entries(cwd) == ["checkpoint-12", "checkpoint-17", "checkpoint-6"]
    return result.stdout


def entries(cwd):
    """Return the names of all checkpoint folders, finished or not, sorted as text."""
    return sorted(path.name for path in (cwd / "results").iterdir() if "checkpoint" in path.name)


def test_killed_before_the_first_checkpoint(dataset, tmp_path, whole):
    assert interrupt(dataset, tmp_path, signal.SIGKILL, line="step 3/17") == -signal.SIGKILL
    assert entries(tmp_path) == []
    assert "starting from step 0" in resume(dataset, tmp_path, whole)


def test_killed_while_a_checkpoint_is_written(dataset, tmp_path, whole):
    code = interrupt(dataset, tmp_path, signal.SIGKILL, entry=".checkpoint-12.tmp")
    assert code == -signal.SIGKILL
    assert entries(tmp_path) == [".checkpoint-12.tmp", "checkpoint-6"]
    assert "resuming from results/checkpoint-6" in resume(dataset, tmp_path, whole)


def test_killed_in_an_evaluation(dataset, tmp_path, whole):
    assert interrupt(dataset, tmp_path, signal.SIGKILL, line="step 12/17") == -signal.SIGKILL
    assert entries(tmp_path) == ["checkpoint-6"]  # evaluation had begun; nothing was written yet
    assert "resuming from results/checkpoint-6" in resume(dataset, tmp_path, whole)


def test_killed_between_two_checkpoints_with_loader_processes(dataset, tmp_path, whole):
    code = interrupt(dataset, tmp_path, signal.SIGKILL, "--num_workers", "2", line="step 15/17")
    assert code == -signal.SIGKILL
    assert entries(tmp_path) == ["checkpoint-12", "checkpoint-6"]
    # What f1.py reads is of the checkpoint that inference takes.
    results, table = tmp_path / "results", "valid_predictions.csv"
    assert (results / table).read_bytes() == (find_checkpoint(results) / table).read_bytes()
    out = resume(dataset, tmp_path, whole, "--num_workers", "1")
    assert "resuming from results/checkpoint-12" in out


def test_a_deleted_photo_or_a_killed_loader_process_ends_in_one_line(copy, tmp_path):
    """The runs end by themselves, and what was written before stays and can be resumed."""
    flags = ["--data_dir", copy, *RUN, "--epochs", "20", "--num_workers", "1"]
    process, (stdout, stderr) = start_command("train", flags, tmp_path, {})
    wait_for(process, (tmp_path / "results/checkpoint-6").is_dir)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    process.join(120)
    assert process.exitcode == 2
    assert stderr.read_text().splitlines()[-1].startswith("error: a loader process was killed")

    process, (stdout, stderr) = start_command("train", [*flags, "--resume"], tmp_path, {})
    wait_for(process, lambda: stdout.is_file()
             and re.search(r"(?s)resuming.*step \d+/", stdout.read_text()))
    for photo in (copy / "train/images").glob("*/mask1.jpg"):
        photo.unlink()
    process.join(120)
    assert process.exitcode == 2
    last_line = stderr.read_text().splitlines()[-1]
    assert re.fullmatch(r"error: .*/mask1.jpg: no such file; .*", last_line)
    assert "resuming from results/checkpoint-" in stdout.read_text()
    assert "checkpoint-6" in entries(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_writes_a_checkpoint_and_gives_the_command_to_resume(dataset, tmp_path,
                                                                           whole, number):
    code = interrupt(dataset, tmp_path, number, "--num_workers", "1", line="step 2/17")
    assert code == 128 + number
    (stopped,) = entries(tmp_path)
    assert stopped != "checkpoint-6"
    assert not (tmp_path / "results" / stopped / "valid_predictions.csv").exists()
    out = (tmp_path / ".train.out").read_text()
    given = re.search(r"stopped at step (\d+)/17; resume with: (.*)", out)
    assert stopped == f"checkpoint-{given[1]}"
    name, (*flags, last) = parse_printed(given[2], tmp_path)
    assert name == "train" and last == "--resume"
    assert f"resuming from results/{stopped}" in resume(dataset, tmp_path, whole, *flags)


def test_a_stop_signal_while_a_photo_is_decoded_is_no_damage(capfd):
    """Without loader processes the main process decodes, and reads what libjpeg prints."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        signals = StopSignals()
        _, damage = _with_stderr(signal.raise_signal, signal.SIGTERM)
    finally:
        for number, handler in signals.previous.items():
            signal.signal(number, handler)
    assert damage == "" and signals.received == signal.SIGTERM
    assert "stopping soon with a checkpoint" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def flip_byte(path):
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(("name", "damage"), [
    ("training_state.pt", flip_byte), ("training_state.pt", cut),
    ("training_state.pt", Path.unlink), ("model.safetensors", cut), ("trainer_state.json", cut),
    ("config.json", cut)])
def test_a_damaged_checkpoint_is_named_deleted_and_passed_over(dataset, tmp_path, whole, name,
                                                               damage):
    shutil.copytree(whole, tmp_path / "results")
    folder = tmp_path / "results/checkpoint-17"
    damage(folder / name)
    (folder / "old.txt").write_text("")  # to see that the whole folder is deleted
    out = resume(dataset, tmp_path, whole)
    warning, = re.findall(r"warning: results.*", out)
    assert warning.startswith(f"warning: results/checkpoint-17/{name}: ")
    assert "damaged" in warning or "incomplete" in warning
    assert warning.endswith("; training writes it again")
    assert "resuming from results/checkpoint-12" in out and not (folder / "old.txt").exists()


def test_resuming_is_refused_if_all_checkpoints_are_damaged(dataset, tmp_path, whole):
    shutil.copytree(whole, tmp_path / "results")
    before = entries(tmp_path)
    for folder in list_checkpoints(tmp_path / "results")[-2:]:
        cut(folder / "training_state.pt")  # older checkpoints do not have this file
    result = run_command("train", ["--data_dir", dataset, *RUN, "--resume"], tmp_path, {})
    assert result.returncode == 2 and "no checkpoint in results is intact" in result.stderr
    assert "results/checkpoint-17/training_state.pt: " in result.stderr
    assert "--overwrite" in result.stderr and result.stderr.count("\n") == 1
    assert entries(tmp_path) == before  # nothing is deleted
