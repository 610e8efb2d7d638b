"""Kill training at random instants, again and again, and compare what it ends with to a run that nobody disturbed.

    python -m benchmarks.kill --kills 100

The default recipe, with a network small enough that a run takes seconds, on a few people of the sample dataset. A run is
killed with SIGKILL at an instant drawn evenly from its time after the first step, and gone on with by --resume and another number
of loader processes, until one attempt comes to its end; then the next run begins. Exit status 1 if a byte of any final
checkpoint differs.
"""
import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from checkpoint import list_checkpoints
from sample_data import draw_sample_dataset

ROOT = Path(__file__).parent.parent
FLAGS = ["--model", "test_efficientnet", "--resize", "32", "24", "--epochs", "4", "--eval_steps", "7", "--log_interval", "1",
         "--valid_batch_size", "4", "--patience", "50"]
FILES = ("model.safetensors", "trainer_state.json", "valid_predictions.csv")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="kills after a first step")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    args = parser.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        draw_sample_dataset(folder / "data", num_train=30, num_eval=2)
        started = time.perf_counter()
        process, log = start(folder, "whole", 0)
        startup = wait_for(log, process, started)
        assert process.wait() == 0, log.read_text()
        duration = time.perf_counter() - started
        expected = final_files(folder / "whole")
        print(f"undisturbed: {duration:.1f} s, {startup:.1f} s of them start-up", flush=True)
        kills, runs, wrong = Counter(), 0, 0
        while kills.total() < args.kills:
            runs += 1
            attempt = 0
            while True:
                attempt += 1
                started = time.perf_counter()
                process, log = start(folder, f"run-{runs}", int(rng.integers(3)))
                wait_for(log, process, started)
                delay = rng.uniform(0, duration - startup)
                try:
                    process.wait(delay)
                    break
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    kills[instant(folder / f"run-{runs}", log.read_text())] += 1
            assert process.returncode == 0, log.read_text()
            same = final_files(folder / f"run-{runs}") == expected
            wrong += not same
            print(f"run {runs}: {attempt - 1} kills, {'the same' if same else 'OTHER'} bytes; {kills.total()} so far", flush=True)
    print(f"{kills.total()} kills in {runs} runs ({', '.join(f'{count} {where}' for where, count in kills.most_common())}); "
          f"{runs - wrong} of {runs} runs ended with the bytes of the undisturbed run")
    sys.exit(wrong > 0)


def start(folder, name, num_workers):
    """A training process, gone on with if it was begun before, and the file of its output."""
    log = folder / f"{name}.log"
    argv = [sys.executable, str(ROOT / "train.py"), "--data_dir", str(folder / "data"), *FLAGS, "--output_dir", str(folder / name),
            "--num_workers", str(num_workers), "--resume"]
    with open(log, "w") as file:
        return subprocess.Popen(argv, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"}), log


def wait_for(log, process, started):
    """Seconds from `started` until the first step is done."""
    while not re.search(r"^step \d+/", log.read_text(), re.M) and process.poll() is None:
        time.sleep(0.005)
    return time.perf_counter() - started


def instant(output_dir, text):
    """Where a kill came, as far as what it left tells."""
    if list(output_dir.glob(".checkpoint-*.tmp")):
        return "while a checkpoint was written"
    steps = [int(step) for step in re.findall(r"^step (\d+)/", text, re.M)]
    saved = [int(step) for step in re.findall(r"-> .*checkpoint-(\d+)$", text, re.M)]
    if steps and steps[-1] % 7 == 0 and steps[-1] not in saved:
        return "in an evaluation"
    if not list_checkpoints(output_dir):
        return "before the first checkpoint"
    return "between two checkpoints"


def final_files(output_dir):
    """The bytes of the last checkpoint and the list of all."""
    folders = list_checkpoints(output_dir)
    return [folder.name for folder in folders], [(folders[-1] / name).read_bytes() for name in FILES]


if __name__ == "__main__":
    main()
