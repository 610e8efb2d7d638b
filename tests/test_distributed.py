"""Several real processes by torchrun, on the CPU: the same numbers as one, and safe restarts."""
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import FAST, ROOT, run_command
from safetensors.torch import load_file

from core import distributed
from core.distributed import check_shares
from core.errors import InputError
from core.layout import read_train
from dataset import BatchSampler
from loss import create_loss

# Without batch statistics a batch may be divided; class weights, sampler and averaging are on.
RUN = [*FAST, "--model", "test_vit", "--resize", "32", "32", "--batch_size", "12", "--epochs", "1",
       "--eval_steps", "10", "--dropout", "0", "--class_weights", "sqrt", "--optimizer", "sgd",
       "--lr", "0.05", "--log_interval", "2", "--valid_batch_size", "3"]
# ceil(10 * 133 / 16) = 84 steps of a model with batch statistics.
BATCH_STATISTICS = [*FAST, "--eval_steps", "20", "--epochs", "10", "--valid_batch_size", "3",
                    "--log_interval", "2"]


def torchrun(processes, script, *argv, cwd, restarts=0, nodes=1, port=0, **env):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}",
               f"--nproc_per_node={processes}", f"--max-restarts={restarts}",
               "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", ROOT / f"{script}.py",
               *argv]
    with open(Path(cwd) / f"{script}.log", "a") as log:
        return subprocess.Popen(list(map(str, command)), cwd=cwd, stdout=log, stderr=log,
                                env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


def wait_for(process, is_reached, cwd):
    deadline = time.monotonic() + 120
    while not is_reached():
        is_running = process.poll() is None and time.monotonic() < deadline
        assert is_running, (cwd / "train.log").read_text()
        time.sleep(0.01)


def children(process):
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return list(map(int, path.read_text().split()))


def errors(log):
    """Return the one-line errors of a log, and check that it has no traceback of ours."""
    assert f'File "{ROOT}' not in log, log
    return re.findall(r"^error: .*", log, re.M)


@pytest.fixture(scope="module")
def one(dataset, tmp_path_factory):
    """The results folder of one process."""
    folder = tmp_path_factory.mktemp("one")
    assert run_command("train", ["--data_dir", dataset, *RUN], folder, {}).returncode == 0
    return folder / "results"


# --- the same numbers as one process ---

@pytest.mark.cpu_only("several processes need a GPU each")
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_train_as_one(dataset, one, tmp_path, processes):
    process = torchrun(processes, "train", "--data_dir", dataset, *RUN, cwd=tmp_path)
    assert process.wait(120) == 0, (tmp_path / "train.log").read_text()
    log = (tmp_path / "train.log").read_text()
    assert f"steps: 12 of 12 photos, shared by {processes} processes" in log
    assert len(re.findall(r"^next: .*inference.py --model_dir=", log, re.M)) == 1
    for step in (10, 12):
        folders = [folder / f"checkpoint-{step}" for folder in (one, tmp_path / "results")]
        alone, shared = (load_file(folder / "model.safetensors") for folder in folders)
        assert max((alone[key] - shared[key]).abs().max() for key in alone) < 1e-5
        alone, shared = (json.loads((folder / "trainer_state.json").read_text())["history"][-1]
                         for folder in folders)
        assert alone["macro_f1"] == shared["macro_f1"]
        assert alone["train_loss"] == pytest.approx(shared["train_loss"], abs=1e-5)


@pytest.mark.cpu_only("several processes need a GPU each")
def test_two_processes_predict_as_one(dataset, one, tmp_path, command):
    predict = ["--model_dir", one, "--valid_batch_size", "3", "--save_probs"]
    assert command("inference", *predict, "alone.csv").returncode == 0
    alone = (tmp_path / "submission.csv").read_bytes()
    assert torchrun(2, "inference", *predict, "shared.csv", cwd=tmp_path).wait(120) == 0
    assert (tmp_path / "submission.csv").read_bytes() == alone
    assert (tmp_path / "shared.csv").read_bytes() == (tmp_path / "alone.csv").read_bytes()


@pytest.mark.cpu_only("several processes need a GPU each")
def test_two_processes_leave_out_a_photo_that_one_of_them_has_checked(dataset, one, tmp_path,
                                                                      command):
    photos = tmp_path / "photos"
    shutil.copytree(min((dataset / "train/images").iterdir()), photos)
    (photos / "mask3.jpg").write_text("not a photo")
    flags = ["--model_dir", one, "--data_dir", photos, "--on_bad_image", "skip", "--output"]
    assert command("inference", *flags, "alone.csv").returncode == 0
    assert torchrun(2, "inference", *flags, "shared.csv", cwd=tmp_path).wait(120) == 0
    assert (tmp_path / "shared.csv").read_bytes() == (tmp_path / "alone.csv").read_bytes()
    assert (tmp_path / "inference.log").read_text().count(f"skipped: {photos}") == 1


def test_shares_of_a_batch_are_disjoint_equal_and_complete(dataset, monkeypatch):
    sampler = BatchSampler(read_train(dataset), 18, "sqrt")
    whole = list(sampler.batches(5, 20))
    assert whole == [sampler.batch(k) for k in range(5, 20)]
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(list(sampler.batches(5, 20)))
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [len(part) for part in parts] == [6, 6, 6]
        assert sorted(batch) == sorted(draw for part in parts for draw in part)


# --- restarts and signals ---

@pytest.mark.cpu_only("several processes need a GPU each")
def test_a_killed_process_of_two_machines_is_restarted_and_the_run_continues(dataset, tmp_path,
                                                                             command):
    """The steps before the kill are not done again, and the others are done once.

    The machines are two agents of torchrun, of which only one counts the restart. Each process has
    batch statistics of its own, but the model that is saved is the model that was scored.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    machines = [torchrun(1, "train", "--data_dir", dataset, *BATCH_STATISTICS, "--resume",
                         cwd=tmp_path, restarts=1, nodes=2, port=port,
                         TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1") for _ in range(2)]
    try:
        wait_for(machines[0], (tmp_path / "results/checkpoint-20").is_dir, tmp_path)
        worker, = children(machines[1])
        os.kill(worker, signal.SIGKILL)
        codes = [machine.wait(240) for machine in machines]
        assert codes == [0, 0], (tmp_path / "train.log").read_text()
    finally:
        for machine in machines:
            machine.terminate()
    log = (tmp_path / "train.log").read_text()
    assert log.count("starting from step 0") == 1 and log.count("resuming from results/") == 1
    folder = tmp_path / "results/checkpoint-84"
    state = json.loads((folder / "trainer_state.json").read_text())
    assert [metrics["step"] for metrics in state["history"]] == [20, 40, 60, 80, 84]
    valid = pd.read_csv(folder / "valid_predictions.csv")
    paths = [str(dataset / "train/images" / image_id) for image_id in valid.ImageID]
    result = command("inference", "--model_dir", folder, "--save_probs", "p.csv", "--data_dir",
                     *paths)
    assert result.returncode == 0, result.stderr
    again = pd.read_csv(tmp_path / "p.csv", index_col="ImageID").loc[paths].to_numpy()
    scored = valid.filter(regex=r"^p\d+$").to_numpy()
    assert len(valid) == 35 and abs(again - scored).max() < 2e-6


def test_restarts_without_resume_are_refused_in_one_line(dataset, one, tmp_path):
    """Without --resume a restart could only fail, or delete the run with --overwrite."""
    shutil.copytree(one, tmp_path / "results")
    before = {path: path.read_bytes() for path in (tmp_path / "results").rglob("*")
              if path.is_file()}
    process = torchrun(2, "train", "--data_dir", dataset, *RUN, "--overwrite", cwd=tmp_path,
                       restarts=1)
    assert process.wait(120) != 0
    found = set(errors((tmp_path / "train.log").read_text()))
    assert found == {"error: torchrun --max-restarts starts the same command again: add --resume "
                     "(it starts a new run if there is none), or pass --max-restarts=0"}
    after = {path: path.read_bytes() for path in (tmp_path / "results").rglob("*")
             if path.is_file()}
    assert after == before


@pytest.mark.cpu_only("several processes need a GPU each")
def test_a_second_run_in_a_results_folder_is_refused_by_all_processes(dataset, one, tmp_path):
    shutil.copytree(one, tmp_path / "results")
    before = sorted(os.listdir(tmp_path / "results"))
    process = torchrun(2, "train", "--data_dir", dataset, *RUN, "--epochs", "2", cwd=tmp_path)
    assert process.wait(120) != 0
    found = errors((tmp_path / "train.log").read_text())
    assert found and all("already holds a run" in error for error in found)
    assert sorted(os.listdir(tmp_path / "results")) == before


@pytest.mark.parametrize(("restarts", "resume", "refused"), [
    (None, False, False), ("0", False, False), ("3", True, False), ("3", False, True)])
def test_restarts_need_resume(monkeypatch, restarts, resume, refused):
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)
    if restarts:
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    with pytest.raises(InputError, match="add --resume") if refused else contextlib.nullcontext():
        distributed.check_restarts(resume)


@pytest.mark.cpu_only("several processes need a GPU each")
def test_stopped_processes_write_a_checkpoint_and_the_command_to_resume(dataset, tmp_path):
    """Each worker gets the signal twice: from the terminal or scheduler, and from torchrun."""
    process = torchrun(2, "train", "--data_dir", dataset, *BATCH_STATISTICS, "--eval_steps", "1000",
                       cwd=tmp_path)
    wait_for(process, lambda: "step 4/" in (tmp_path / "train.log").read_text(), tmp_path)
    for pid in [*children(process), process.pid]:
        os.kill(pid, signal.SIGTERM)
    process.wait(120)
    log = (tmp_path / "train.log").read_text()
    found = re.search(r"stopped at step (\d+)/84; resume with: "
                      r"torchrun --nproc_per_node=2 (\S+train.py) .*--resume", log)
    assert (tmp_path / found[2]).samefile(ROOT / "train.py")
    assert [path.name for path in (tmp_path / "results").glob("*checkpoint-*")] == [
        f"checkpoint-{found[1]}"]


# --- what processes cannot share ---

def test_what_processes_cannot_share_is_named(monkeypatch):
    focal, focal_f1 = create_loss("focal"), create_loss("focal_f1")
    check_shares(3, focal_f1)  # one process can take everything
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    check_shares(16, focal)
    with pytest.raises(InputError, match="--criterion: SoftF1Loss"):
        check_shares(16, focal_f1)
    for batch_size in (3, 18):  # fewer photos than processes; shares that are not equal
        with pytest.raises(InputError, match=f"--batch_size {batch_size}: 4 processes"):
            check_shares(batch_size, focal)
