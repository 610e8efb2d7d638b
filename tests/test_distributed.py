"""Several real processes by torchrun, on the CPU: the same numbers as one, and a killed one costs nothing."""
import json
import os
import platform
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

import distributed
from dataset import EpochSampler
from distributed import check_processes
from errors import InputError
from layout import read_train
from loss import create_loss

# No batch statistics, so that a batch may be divided; class weights, sampler and averaging are on.
RUN = [*FAST, "--model", "test_vit", "--resize", "32", "32", "--batch_size", "12", "--epochs", "1", "--eval_steps", "10",
       "--dropout", "0", "--class_weights", "sqrt", "--optimizer", "sgd", "--lr", "0.05", "--log_interval", "2",
       "--valid_batch_size", "3"]
BATCH_STATISTICS = [*FAST, "--eval_steps", "20", "--epochs", "10", "--valid_batch_size", "3", "--log_interval", "2"]


def torchrun(processes, script, *argv, cwd, restarts=0, nodes=1, port=0):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc_per_node={processes}",
               f"--max-restarts={restarts}", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", ROOT / f"{script}.py",
               *argv]
    with open(Path(cwd) / f"{script}.log", "a") as log:
        return subprocess.Popen(list(map(str, command)), cwd=cwd, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for(process, has_come, cwd):
    deadline = time.monotonic() + 120
    while not has_come():
        assert process.poll() is None and time.monotonic() < deadline, (cwd / "train.log").read_text()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def one(dataset, tmp_path_factory):
    """The results folder of one process."""
    folder = tmp_path_factory.mktemp("one")
    assert run_command("train", ["--data_dir", dataset, *RUN], folder, {}).returncode == 0
    return folder / "results"


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_train_as_one(dataset, one, tmp_path, processes):
    process = torchrun(processes, "train", "--data_dir", dataset, *RUN, cwd=tmp_path)
    assert process.wait(120) == 0, (tmp_path / "train.log").read_text()
    log = (tmp_path / "train.log").read_text()
    assert f"steps: 12 of 12 photos, shared by {processes} processes" in log and log.count("next: python inference.py") == 1
    for step in (10, 12):
        alone, shared = (load_file(folder / f"checkpoint-{step}/model.safetensors") for folder in (one, tmp_path / "results"))
        assert max((alone[key] - shared[key]).abs().max() for key in alone) < 1e-5
        alone, shared = (json.loads((folder / f"checkpoint-{step}/trainer_state.json").read_text())["history"][-1]
                         for folder in (one, tmp_path / "results"))
        assert alone["macro_f1"] == shared["macro_f1"] and alone["train_loss"] == pytest.approx(shared["train_loss"], abs=1e-5)


def test_two_processes_predict_as_one(dataset, one, tmp_path, command):
    predict = ["--model_dir", one, "--valid_batch_size", "3", "--save_probs"]
    assert command("inference", *predict, "alone.csv").returncode == 0
    alone = (tmp_path / "submission.csv").read_bytes()
    assert torchrun(2, "inference", *predict, "shared.csv", cwd=tmp_path).wait(120) == 0
    assert (tmp_path / "submission.csv").read_bytes() == alone
    assert (tmp_path / "shared.csv").read_bytes() == (tmp_path / "alone.csv").read_bytes()


def test_a_killed_process_of_two_machines_is_restarted_and_the_run_goes_on(dataset, tmp_path, command):
    """Every photo of the epochs is seen once: the steps done before the kill are not done again, and the rest are.

    The machines are two agents, of which only one counts the restart; and what is scored is the model that is saved, though each
    process has batch statistics of its own.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    machines = [torchrun(1, "train", "--data_dir", dataset, *BATCH_STATISTICS, cwd=tmp_path, restarts=1, nodes=2, port=port)
                for _ in range(2)]
    try:
        wait_for(machines[0], (tmp_path / "results/checkpoint-20").is_dir, tmp_path)
        worker, = Path(f"/proc/{machines[1].pid}/task/{machines[1].pid}/children").read_text().split()
        os.kill(int(worker), signal.SIGKILL)
        assert [machine.wait(240) for machine in machines] == [0, 0], (tmp_path / "train.log").read_text()
    finally:
        for machine in machines:
            machine.terminate()
    log = (tmp_path / "train.log").read_text()
    assert "resuming from results/checkpoint-" in log and "starting from step 0" not in log
    state = json.loads((tmp_path / "results/checkpoint-90/trainer_state.json").read_text())
    assert [metrics["step"] for metrics in state["history"]] == [20, 40, 60, 80, 90]
    valid = pd.read_csv(tmp_path / "results/checkpoint-90/valid_predictions.csv")
    paths = [dataset / "train/images" / image_id for image_id in valid.ImageID]
    assert command("inference", "--model_dir", "results/checkpoint-90", "--save_probs", "p.csv", "--data_dir",
                   *paths).returncode == 0
    again = pd.read_csv(tmp_path / "p.csv", index_col="ImageID").loc[list(map(str, paths))]
    assert len(valid) == 35 and abs(again.to_numpy() - valid.filter(regex=r"^p\d+$").to_numpy()).max() < 2e-6


def test_a_refused_run_is_not_gone_on_with_by_a_restart(dataset, one, tmp_path):
    shutil.copytree(one, tmp_path / "results")
    before = sorted(os.listdir(tmp_path / "results"))
    process = torchrun(2, "train", "--data_dir", dataset, *RUN, "--epochs", "2", cwd=tmp_path, restarts=1)
    assert process.wait(120) != 0
    log = (tmp_path / "train.log").read_text()
    assert "already holds a run" in log and "resuming" not in log and sorted(os.listdir(tmp_path / "results")) == before


def test_a_start_of_torchrun_is_known_by_its_moment_and_not_by_its_number_alone(monkeypatch):
    """In another container torchrun may have the same number and, where a job names it, the same run id."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    mine = distributed.start_id()
    of_another_parent = f"{sys.executable} -c 'import distributed; print(distributed.start_id())'; true"
    other = subprocess.run(["sh", "-c", of_another_parent], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert mine == distributed.start_id() and mine.split()[:2] == other.split()[:2] == ["none", platform.node()]
    assert int(mine.split()[3]) < int(other.split()[3])  # when the parent began, in the system's ticks


def test_stopping_processes_writes_a_checkpoint_and_the_command_that_goes_on(dataset, tmp_path):
    """Each worker is told twice, by the terminal or scheduler and by torchrun."""
    process = torchrun(2, "train", "--data_dir", dataset, *BATCH_STATISTICS, "--eval_steps", "1000", cwd=tmp_path)
    wait_for(process, lambda: "step 4/" in (tmp_path / "train.log").read_text(), tmp_path)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in [*workers, process.pid]:
        os.kill(int(pid), signal.SIGTERM)
    process.wait(120)
    log = (tmp_path / "train.log").read_text()
    step = re.search(r"stopped at step (\d+) of 90; go on with: torchrun --nproc_per_node=2 train.py .*--resume", log)[1]
    assert [path.name for path in (tmp_path / "results").glob("*checkpoint-*")] == [f"checkpoint-{step}"]


def test_shares_of_a_batch_are_disjoint_and_whole(dataset, monkeypatch):
    sampler = EpochSampler(read_train(dataset), 16)
    whole, sizes = list(sampler), sampler.sizes()
    assert [len(batch) for batch in whole] == sizes
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(list(sampler))
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(batch) == sorted(draw for part in parts for draw in part)


def test_what_processes_cannot_share_is_refused_by_name(dataset, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    with pytest.raises(InputError, match="--criterion: SoftF1Loss"):
        check_processes(create_loss("focal_f1"), EpochSampler(read_train(dataset), 16))
    check_processes(create_loss("focal"), EpochSampler(read_train(dataset), 16))
    with pytest.raises(InputError, match="--batch_size"):
        check_processes(create_loss("focal"), EpochSampler(read_train(dataset), 3))
