"""What a training run says and leaves when the disk, the data or another process fails it.

    python -m benchmarks.faults

Real faults in real processes: a small network on a few people of the sample dataset. Disks that are full or read-only are
mounts in a namespace of their own (Linux with util-linux's unshare). For each fault: exit status, the last line printed,
the checkpoints left, and whether inference can still read the newest. Exit status 1 if a run ended in anything but one line.
"""
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.numpy import load_file, save_file

from checkpoint import list_checkpoints
from sample_data import draw_sample_dataset

ROOT = Path(__file__).parent.parent
PYTHON = [sys.executable, "-W", "ignore"]
FLAGS = ["--model", "test_vit4", "--resize", "32", "32", "--epochs", "4", "--eval_steps", "10", "--log_interval", "1", "--data_dir",
         "data"]
TRAIN = [*PYTHON, str(ROOT / "train.py"), *FLAGS]  # a checkpoint is 19 MB, 15 of them for --resume
PREDICT = [*PYTHON, str(ROOT / "inference.py"), "--data_dir", "data", "--output"]


# Each takes a folder with a dataset in ./data, and returns a finished process; the run is in ./results.

def disk_full(folder):
    return mounted(folder, "mount -t tmpfs -o size=30m tmpfs results")


def disk_read_only(folder):
    return mounted(folder, "mount -t tmpfs -o ro tmpfs results")


def photo_deleted_in_an_epoch(folder):
    process = start(folder, until="step 12/")
    for photo in (folder / "data/train/images").glob("*/mask1.jpg"):
        photo.unlink()
    return finished(process)


def photo_cut_off(folder):
    for photo in (folder / "data/train/images").glob("*/mask1.jpg"):
        photo.write_bytes(photo.read_bytes()[:2000])
    return finished(start(folder))


def damaged_checkpoint_resumed(folder):
    process = start(folder, until="checkpoint-20")
    process.kill()
    finished(process)
    weights = folder / "results/checkpoint-20/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    return finished(start(folder, "--resume"))


def damaged_checkpoint_predicted_with(folder):
    finished(start(folder, "--epochs", "1"))
    weights = list_checkpoints(folder / "results")[-1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return subprocess.run([*PREDICT, "other.csv", "--model_dir", weights.parent], cwd=folder, capture_output=True, text=True)


def two_runs_at_once(folder):
    first = start(folder, until="step 12/")
    second = finished(start(folder, "--resume"))
    first.kill()
    finished(first)
    return second


def weight_not_a_number(folder):
    finished(start(folder, "--epochs", "1"))
    weights = load_file(list_checkpoints(folder / "results")[-1] / "model.safetensors")
    weights[min(weights)].flat[0] = float("nan")
    save_file(weights, folder / "nan.safetensors")
    return finished(start(folder, "--weights", "nan.safetensors", "--overwrite"))


def loader_process_killed(folder):
    process = start(folder, "--num_workers", "2", until="step 12/")
    child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1]
    os.kill(int(child), signal.SIGKILL)
    return finished(process)


FAULTS = [disk_full, disk_read_only, photo_deleted_in_an_epoch, photo_cut_off, damaged_checkpoint_resumed,
          damaged_checkpoint_predicted_with, two_runs_at_once, weight_not_a_number, loader_process_killed]


def main():
    surprises = 0
    with tempfile.TemporaryDirectory() as root:
        draw_sample_dataset(Path(root) / "sample", num_train=30, num_eval=2)
        for fault in FAULTS:
            folder = Path(root) / fault.__name__
            shutil.copytree(Path(root) / "sample", folder / "data")
            result = fault(folder)
            lines = (result.stderr or result.stdout).strip().splitlines()
            surprises += result.returncode not in (0, 2) or "Traceback" in result.stderr
            left = sorted(path.name for path in (folder / "results").glob("*checkpoint-*"))
            print(f"{fault.__name__.replace('_', ' ')}\n    exit {result.returncode}: {lines[-1]}")
            print(f"    left: {result.left if hasattr(result, 'left') else ', '.join(left) or 'no checkpoint'}", flush=True)
    sys.exit(surprises > 0)


def start(folder, *flags, until=None):
    """A training process, once its output or its results folder shows `until`."""
    log = open(folder / "log", "w")  # noqa: SIM115
    process = subprocess.Popen([*TRAIN, *flags], cwd=folder, stdout=log, stderr=subprocess.PIPE, text=True)
    while until and until not in (folder / "log").read_text() and not (folder / "results" / until).is_dir():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    return process


def finished(process):
    stderr = process.communicate()[1]
    return subprocess.CompletedProcess(process.args, process.returncode, "the run went on to its end", stderr)


def mounted(folder, mount):
    """Train into a disk that is there for these commands only; then predict, if anything was left."""
    (folder / "results").mkdir()
    script = (f"{mount}; {shlex.join(TRAIN)} >log; status=$?; echo $(cd results; echo *checkpoint-*); {shlex.join(PREDICT)} "
              f"other.csv --model_dir results >/dev/null 2>&1 && echo 'read by inference'; exit $status")
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    result.left = result.stdout.strip().replace("\n", ", ").replace("*checkpoint-*", "no checkpoint")
    return result


if __name__ == "__main__":
    main()
