"""What training prints and leaves when the disk, the data or another process fails.

    python -m benchmarks.faults

Real faults in real processes: a small network on a few people of the sample dataset. Full and
read-only disks are mounts in their own namespace (Linux, `unshare` of util-linux). For each fault
this prints the exit status, the last line of the run, the checkpoints that are left, and whether
inference can read one of them. The exit status is 1 if a run ended with a traceback or another
status than 0 or 2, or if damage was not noticed.
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

from core.checkpoint import list_checkpoints
from core.sample_data import draw_sample_dataset

ROOT = Path(__file__).parent.parent
PYTHON = [sys.executable, "-W", "ignore"]
FLAGS = ["--model", "test_vit4", "--resize", "32", "32", "--epochs", "4", "--eval_steps", "10",
         "--log_interval", "1", "--data_dir", "data"]
TRAIN = [*PYTHON, str(ROOT / "train.py"), *FLAGS]  # a checkpoint has 19 MB, 15 MB for --resume
PREDICT = [*PYTHON, str(ROOT / "inference.py"), "--data_dir", "data", "--output", "other.csv"]


# --- the faults: functions of a folder with a dataset in ./data; runs write to ./results ---

def disk_full(folder):
    return run_on_mount(folder, "mount -t tmpfs -o size=30m tmpfs results")


def disk_read_only(folder):
    return run_on_mount(folder, "mount -t tmpfs -o ro tmpfs results")


def photo_deleted_during_training(folder):
    process = start(folder, until="step 12/")
    for photo in (folder / "data/train/images").glob("*/mask1.jpg"):
        photo.unlink()
    return wait_for_end(process)


def photo_truncated(folder):
    for photo in (folder / "data/train/images").glob("*/mask1.jpg"):
        photo.write_bytes(photo.read_bytes()[:2000])
    return wait_for_end(start(folder))


def resume_from_damaged_checkpoint(folder):
    process = start(folder, until="checkpoint-20")
    process.kill()
    wait_for_end(process)
    path = folder / "results/checkpoint-20/training_state.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = wait_for_end(start(folder, "--resume"))
    warnings = [line for line in (folder / "log").read_text().splitlines()
                if line.startswith("warning:") and "checkpoint-20" in line]
    if result.returncode == 0 and not warnings:
        result.returncode, result.stdout = 1, "the run continued, THE DAMAGE WAS NOT NOTICED"
    else:
        result.stdout = "; ".join([*warnings, result.stdout])
    return result


def predict_with_damaged_checkpoint(folder):
    wait_for_end(start(folder, "--epochs", "1"))
    path = list_checkpoints(folder / "results")[-1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    command = [*PREDICT, "--model_dir", path.parent]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def two_runs_at_once(folder):
    first = start(folder, until="step 12/")
    first.send_signal(signal.SIGSTOP)  # so that it does not end before the second run starts
    second = wait_for_end(start(folder, "--resume"))
    first.kill()
    wait_for_end(first)
    return second


def weight_is_nan(folder):
    wait_for_end(start(folder, "--epochs", "1"))
    weights = load_file(list_checkpoints(folder / "results")[-1] / "model.safetensors")
    weights[min(weights)].flat[0] = float("nan")
    save_file(weights, folder / "nan.safetensors")
    return wait_for_end(start(folder, "--weights", "nan.safetensors", "--overwrite"))


def loader_process_killed(folder):
    process = start(folder, "--num_workers", "2", until="step 12/")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    return wait_for_end(process)


FAULTS = [disk_full, disk_read_only, photo_deleted_during_training, photo_truncated,
          resume_from_damaged_checkpoint, predict_with_damaged_checkpoint, two_runs_at_once,
          weight_is_nan, loader_process_killed]


def main():
    failures = 0
    with tempfile.TemporaryDirectory() as root:
        draw_sample_dataset(Path(root) / "sample", num_train=30, num_eval=2)
        for fault in FAULTS:
            folder = Path(root) / fault.__name__
            shutil.copytree(Path(root) / "sample", folder / "data")
            result = fault(folder)
            lines = (result.stderr or result.stdout).strip().splitlines()
            failures += result.returncode not in (0, 2) or "Traceback" in result.stderr
            names = sorted(path.name for path in (folder / "results").glob("*checkpoint-*"))
            left = getattr(result, "left", ", ".join(names) or "no checkpoint")
            print(f"{fault.__name__.replace('_', ' ')}\n"
                  f"    exit status {result.returncode}: {lines[-1]}\n"
                  f"    left: {left}", flush=True)
    sys.exit(failures > 0)


def start(folder, *flags, until=None):
    """Start training; return the process when its output has `until` or results/`until` exists."""
    log = open(folder / "log", "w")  # noqa: SIM115
    process = subprocess.Popen([*TRAIN, *flags], cwd=folder, stdout=log, stderr=subprocess.PIPE,
                               text=True)
    while (until and until not in (folder / "log").read_text()
           and not (folder / "results" / until).is_dir()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    return process


def wait_for_end(process):
    stderr = process.communicate()[1]
    return subprocess.CompletedProcess(process.args, process.returncode,
                                       "the run continued to its end", stderr)


def run_on_mount(folder, mount):
    """Train into a disk that only these commands see; then predict with what is left in it."""
    (folder / "results").mkdir()
    script = (f"{mount}; {shlex.join(TRAIN)} >log; status=$?; "
              f"echo $(cd results; echo *checkpoint-*); "
              f"{shlex.join(PREDICT)} --model_dir results >/dev/null 2>&1 "
              f"&& echo 'inference can read it'; exit $status")
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    left = result.stdout.strip().replace("\n", ", ")
    result.left = left.replace("*checkpoint-*", "no checkpoint")
    return result


if __name__ == "__main__":
    main()
