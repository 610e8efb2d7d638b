"""Kill training at random moments, resume it, and compare the result with an undisturbed run.

    python -m benchmarks.kill --kills 100

The default recipe with a small network, on a few people of the sample dataset. A run is killed
with SIGKILL at a random moment after its first step, and resumed with --resume and another number
of loader processes, until it reaches its end. Then the next run begins. The exit status is 1 if a
final checkpoint differs in any byte.
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

from core.checkpoint import list_checkpoints
from core.sample_data import draw_sample_dataset

ROOT = Path(__file__).parent.parent
EVAL_STEPS = 7
FLAGS = ["--model", "test_efficientnet", "--resize", "32", "24", "--epochs", "4",
         "--eval_steps", str(EVAL_STEPS), "--log_interval", "1", "--valid_batch_size", "4",
         "--patience", "50"]
FILES = ("model.safetensors", "trainer_state.json", "valid_predictions.csv")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the moments")
    args = parser.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        draw_sample_dataset(folder / "data", num_train=30, num_eval=2)
        started = time.perf_counter()
        process, log = start(folder, "undisturbed", 0)
        startup = wait_for_first_step(log, process, started)
        assert process.wait() == 0, log.read_text()
        duration = time.perf_counter() - started
        expected = final_files(folder / "undisturbed")
        print(f"undisturbed: {duration:.1f} s, of which start-up {startup:.1f} s", flush=True)
        kills, runs, wrong = Counter(), 0, 0
        while kills.total() < args.kills:
            runs += 1
            before = kills.total()
            run_with_kills(folder, f"run-{runs}", duration - startup, rng, kills)
            is_same = final_files(folder / f"run-{runs}") == expected
            wrong += not is_same
            print(f"run {runs}: {kills.total() - before} kills, "
                  f"{'same' if is_same else 'DIFFERENT'} bytes; {kills.total()} kills so far",
                  flush=True)
    moments = ", ".join(f"{count} {name}" for name, count in kills.most_common())
    print(f"{kills.total()} kills in {runs} runs ({moments}); {runs - wrong} of {runs} runs ended "
          f"with the same bytes as the undisturbed run")
    sys.exit(wrong > 0)


def run_with_kills(folder, name, seconds, rng, kills):
    """Start a run, kill it within `seconds` of its first step and resume it, until it is complete.

    Each kill is counted in `kills`, by what the run was doing.
    """
    while True:
        process, log = start(folder, name, int(rng.integers(3)))
        wait_for_first_step(log, process, time.perf_counter())
        try:
            assert process.wait(rng.uniform(0, seconds)) == 0, log.read_text()
            return
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills[moment(folder / name, log.read_text())] += 1


def start(folder, name, num_workers, flags=FLAGS):
    """Start or resume a training process; return it and the file of its output."""
    log = folder / f"{name}.log"
    argv = [sys.executable, str(ROOT / "train.py"), "--data_dir", str(folder / "data"), *flags,
            "--output_dir", str(folder / name), "--num_workers", str(num_workers), "--resume"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        return subprocess.Popen(argv, stdout=file, stderr=file, env=env), log


def wait_for_first_step(log, process, started):
    """Wait until the first step is done or the process ends; return the seconds since `started`."""
    while not re.search(r"^step \d+/", log.read_text(), re.M) and process.poll() is None:
        time.sleep(0.005)
    return time.perf_counter() - started


def moment(output_dir, text):
    """Return in words when a run was killed, from its results folder and its output."""
    if list(output_dir.glob(".checkpoint-*.tmp")):
        return "while a checkpoint was written or deleted"
    steps = [int(step) for step in re.findall(r"^step (\d+)/", text, re.M)]
    saved = [int(step) for step in re.findall(r"-> .*checkpoint-(\d+)$", text, re.M)]
    if steps and steps[-1] % EVAL_STEPS == 0 and steps[-1] not in saved:
        return "in an evaluation"
    if not list_checkpoints(output_dir):
        return "before the first checkpoint"
    return "between two checkpoints"


def final_files(output_dir):
    """Return the names of all checkpoints and the bytes of the last one."""
    folders = list_checkpoints(output_dir)
    names = [folder.name for folder in folders]
    return names, [(folders[-1] / name).read_bytes() for name in FILES]


if __name__ == "__main__":
    main()
