"""Several real processes by torchrun, on the CPU: the same numbers as one, and a killed one costs nothing."""
import json
import os
import signal
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
       "--dropout", "0", "--class_weights", "sqrt", "--optimizer", "sgd", "--lr", "0.05", "--log_interval", "2"]


def torchrun(processes, script, *argv, cwd, restarts=0):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--max-restarts={restarts}",
               "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", ROOT / f"{script}.py", *argv]
    with open(Path(cwd) / f"{script}.log", "w") as log:
        return subprocess.Popen(list(map(str, command)), cwd=cwd, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def one(dataset, tmp_path_factory):
    """The results folder of one process."""
    folder = tmp_path_factory.mktemp("one")
    assert run_command("train", ["--data_dir", dataset, *RUN], folder, {}).returncode == 0
    return folder / "results"


def test_three_processes_train_and_predict_as_one(dataset, one, tmp_path, command):
    process = torchrun(3, "train", "--data_dir", dataset, *RUN, cwd=tmp_path)
    assert process.wait(120) == 0, (tmp_path / "train.log").read_text()
    log = (tmp_path / "train.log").read_text()
    assert "steps: 12 of 12 photos, shared by 3 processes" in log and log.count("next: python inference.py") == 1
    for step in (10, 12):
        alone, shared = (load_file(folder / f"checkpoint-{step}/model.safetensors") for folder in (one, tmp_path / "results"))
        assert max((alone[key] - shared[key]).abs().max() for key in alone) < 1e-5
        alone, shared = (json.loads((folder / f"checkpoint-{step}/trainer_state.json").read_text())["history"][-1]
                         for folder in (one, tmp_path / "results"))
        assert alone["macro_f1"] == shared["macro_f1"] and alone["train_loss"] == pytest.approx(shared["train_loss"], abs=1e-5)
    predict = ["--model_dir", one, "--valid_batch_size", "3", "--save_probs"]
    assert command("inference", *predict, "alone.csv").returncode == 0
    alone = (tmp_path / "submission.csv").read_bytes()
    assert torchrun(2, "inference", *predict, "shared.csv", cwd=tmp_path).wait(120) == 0
    assert (tmp_path / "submission.csv").read_bytes() == alone
    assert (tmp_path / "shared.csv").read_bytes() == (tmp_path / "alone.csv").read_bytes()


def test_a_killed_process_is_restarted_and_the_run_goes_on(dataset, one, tmp_path):
    """Every photo of the epochs is seen once: the steps done before the kill are not done again, and the rest are."""
    process = torchrun(2, "train", "--data_dir", dataset, *RUN, "--epochs", "10", "--eval_steps", "20", cwd=tmp_path, restarts=1)
    deadline = time.monotonic() + 120
    while not (tmp_path / "results/checkpoint-20").is_dir():
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "train.log").read_text()
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert process.wait(240) == 0, (tmp_path / "train.log").read_text()
    log = (tmp_path / "train.log").read_text()
    assert "resuming from results/checkpoint-" in log and "starting from step 0" not in log
    state = json.loads((tmp_path / "results/checkpoint-120/trainer_state.json").read_text())
    assert [metrics["step"] for metrics in state["history"]] == list(range(20, 121, 20))
    assert len(pd.read_csv(tmp_path / "results/valid_predictions.csv")) == 35


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
