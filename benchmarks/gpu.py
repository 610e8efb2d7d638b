r"""All measurements on a GPU in one command that stops by itself: correctness, and where time goes.

    python -m benchmarks.gpu --minutes 6 --only start tests stop             # is it right?
    python -m benchmarks.gpu --minutes 7 --only step train sample predict    # is it fast?
    python -m benchmarks.gpu --device cpu --quick             # does the script itself work?

The parts, in this order:

    start     seconds from the command to the second training step, and where they go
    tests     python -m pytest --device cuda
    stop      runs that SIGTERM ends: seconds until the end, exit status, same bytes when resumed
    step      a training step in memory: ours, bare, as a CUDA graph; host time; profile
    train     train.py against timm's loader and loop; loader processes, GPU utilization, memory
    sample    train.py on the sample dataset, from the command to the result
    predict   the loop of inference.py against timm's; memory formats, GPU utilization
    compile   the bare step, compiled

A part has cases. Each case is a process group that gets SIGTERM when its time is over, and SIGKILL
5 s later. A part may use its share of the time that is left; what it does not use is left to the
later ones. Each result is printed and added to gpu.csv at once, the output of the tests to
tests.log, and that of the other processes and the profile to gpu.log, so that nothing is lost if
the command is ended early.

For a machine without a network, download the packages that it lacks on another one that has them,
here for Python 3.12, and copy the folder:

    pip freeze | grep -iE "^(albu|stringzilla|simsimd|pydantic|annotated.types|typing|timm)" > lacks
    pip download --no-deps --only-binary=:all: --python-version 3.12 -r lacks -d wheels \
        --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64

There, without PYTHONPATH, which some tests remove:

    python -m venv --system-site-packages env && . env/bin/activate
    pip install --no-index --no-deps wheels/*
"""
import argparse
import contextlib
import csv
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).parent.parent
TRAIN = [sys.executable, "-W", "ignore", str(ROOT / "train.py")]
GRACE = 5  # seconds between SIGTERM and SIGKILL

# Part -> its share of the time that is left, relative to the shares of the later parts.
SHARES = {"start": 8, "tests": 16, "stop": 14, "step": 30, "train": 20, "sample": 24, "predict": 14,
          "compile": 20}
FULL = SimpleNamespace(
    model="efficientnet_b4", size=(384, 288), photo=(512, 384), people=(375, 100),
    batches=(16, 64, 128), steps=20, seconds=7, interval=10, predicted=2048, repeat=8, workers=8,
    runs=20, jobs=10, stop_size=(128, 96), epochs=1, tests=["-n", "14", "--dist", "load"], cases={
        "start": ["first process", "second process"],
        "step": ["ours", "bare", "graph"],
        "train": ["ours 16 8", "timm 16 8", "ours 64 8", "timm 64 8", "ours 64 15", "ours 64 4"],
        "sample": ["train.py", "cudnn.benchmark switched"], "predict": ["8 workers", "15 workers"]})
QUICK = SimpleNamespace(
    model="test_efficientnet", size=(32, 24), photo=(48, 36), people=(12, 3), batches=(4,),
    steps=2, seconds=1, interval=1, predicted=30, repeat=1, workers=1, runs=2, jobs=2,
    stop_size=(32, 24), epochs=20, tests=["-n", "1", "tests/test_loss.py"], cases={
        "step": ["ours", "bare"], "train": ["ours 4 1", "timm 4 1"], "sample": ["train.py"],
        "predict": ["1 worker"]})


def main(argv=None):
    args = parse_args(argv)
    if args.part:
        if args.part not in COMMANDS:
            from benchmarks import gpu_loops
            COMMANDS[args.part] = getattr(gpu_loops, args.part)
        COMMANDS[args.part](args, args.case)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the case that is running, too
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + args.minutes * 60 - GRACE - 1
    with tempfile.TemporaryDirectory() as args.work:
        parts = ["prepare", *(part for part in SHARES if part in args.only)]
        for i, part in enumerate(parts):
            shares = [SHARES.get(later, 12) for later in parts[i:]]
            now = time.perf_counter()
            part_end = now + (deadline - now) * shares[0] / sum(shares)
            *others, last = args.settings.cases.get(part, ["all"])
            for case in [*others, last]:
                seconds = part_end - time.perf_counter()
                # A case that hangs leaves a third to the next ones.
                run_case(args, part, case, seconds if case == last else seconds * 2 / 3)
    print(f"wrote {args.out / 'gpu.csv'} and {args.out / 'gpu.log'}")


def own_command(args, part, case, seconds=0.0):
    """Return the command of a process that runs one case."""
    # The clock is the system's, the same in all processes.
    return [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--part", part, "--case", case,
            "--seconds", str(seconds), "--started", str(time.perf_counter()), "--work", args.work,
            "--out", str(args.out.resolve()), "--device", args.device,
            *(["--quick"] if args.settings is QUICK else [])]


def run_case(args, part, case, seconds):
    args.part, args.case, started = part, case, time.perf_counter()
    if seconds < 1:
        record(args, "process", status="no time left")
        return
    with open(args.out / "gpu.log", "a") as log:
        print(f"\n===== {part}, {case}, at most {seconds:.0f} s", file=log, flush=True)
        status = run_limited(own_command(args, part, case, seconds), seconds, stderr=log)
    record(args, "process", seconds=time.perf_counter() - started, status=status)


def run_limited(argv, seconds, **streams):
    """Run a command as a process group of its own for at most `seconds`; return how it ended."""
    process = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.DEVNULL, process_group=0, **streams)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(seconds)
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return "out of time"
    finally:
        with contextlib.suppress(ProcessLookupError):  # nothing is left of it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def record(args, name, **measures):
    """Print a result, and add it to gpu.csv, one line for each measure."""
    values = {key: float(f"{value:.4g}") if isinstance(value, float) else value
              for key, value in measures.items()}
    text = ", ".join(f"{key} {value}" for key, value in values.items())
    # Not to sys.stdout, which some parts redirect.
    print(f"{args.part}, {args.case}: {name}: {text}", file=sys.__stdout__, flush=True)
    with open(args.out / "gpu.csv", "a", newline="") as file:
        csv.writer(file).writerows([args.part, args.case, name, *pair] for pair in values.items())


class GpuUsage(threading.Thread):
    """Ask nvidia-smi once a second while a `with` block runs; `measures` has the result."""
    query = ("nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--id=0",
             "--format=csv,noheader,nounits")

    def __enter__(self):
        self.measures, self.samples, self.ended = {}, [], threading.Event()
        self.start()
        return self

    def run(self):
        while shutil.which(self.query[0]) and not self.ended.wait(1):
            values = subprocess.check_output(self.query, text=True).split(",")
            self.samples.append([float(value) for value in values])

    def __exit__(self, *_):
        self.ended.set()
        self.join()
        if self.samples:
            busy, memory = np.array(self.samples).T
            self.measures = {"gpu_busy_percent": busy.mean(), "gpu_gib": memory.max() / 1024}


def train_flags(args, data, *flags):
    """Return flags of train.py for a dataset in <work>."""
    return ["--model", args.settings.model, "--weights", "none", "--device", args.device,
            "--data_dir", f"{args.work}/{data}", "--output_dir", f"{args.work}/results",
            "--overwrite", *map(str, flags)]


# --- parts that run commands; the others are in gpu_loops.py ---

def prepare(args, case):
    """Draw the sample in <work>/sample, and enlarge its training photos to <work>/data."""
    from core.sample_data import draw_sample_dataset
    work = Path(args.work)
    sample = draw_sample_dataset(work / "sample", *args.settings.people)
    record(args, "sample drawn", seconds=time.perf_counter() - args.started)
    jobs = [(path, work / "data" / path.relative_to(sample), args.settings.photo)
            for path in (sample / "train" / "images").rglob("*.jpg")]
    with ProcessPoolExecutor() as pool:
        sizes = list(pool.map(enlarge, jobs, chunksize=16))
    shutil.copy(sample / "train" / "train.csv", work / "data" / "train")
    record(args, "photos", count=len(sizes), mean_kb=np.mean(sizes) / 1000)
    gpus = subprocess.getoutput("nvidia-smi --list-gpus") if args.device == "cuda" else "none"
    record(args, "machine", gpus=gpus, cores=os.cpu_count(), python=platform.python_version(),
           torch=version("torch"), timm=version("timm"))


def enlarge(job):
    """Write an enlarged photo, with noise so that it decodes like a real one; return its bytes."""
    from PIL import Image
    source, path, (height, width) = job
    pixels = np.asarray(Image.open(source).resize((width, height)), np.float32)
    pixels = pixels + np.random.default_rng(0).normal(0, 4, pixels.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return path.stat().st_size


def train(args, case):
    """Watch the images/s that a training command prints, and stop it."""
    s, (loop, batch, workers) = args.settings, case.split()
    argv = own_command(args, "timm_training", case)
    if loop == "ours":
        argv = [*TRAIN, *train_flags(
            args, "data", "--resize", *s.size, "--batch_size", batch, "--num_workers", workers,
            "--val_ratio", 0, "--epochs", 10**5, "--eval_steps", 10**9,
            "--log_interval", s.interval)]
    log, started = Path(args.work, "train.log"), time.perf_counter()
    with open(log, "w") as file:
        process = subprocess.Popen(argv, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)

    def speeds():
        return [float(text) for text in re.findall(r"([\d.]+) images/s", log.read_text())]

    while len(speeds()) < 2 and process.poll() is None:  # warm-up
        time.sleep(0.05)
    warm_up, begun = len(speeds()), time.perf_counter()
    with GpuUsage() as usage:
        while process.poll() is None and (
                time.perf_counter() < begun + s.seconds or len(speeds()) == warm_up):
            time.sleep(0.05)
    measured, end = speeds()[warm_up:], terminate(process)
    print(log.read_text(), file=sys.stderr)
    mean = len(measured) / sum(1 / speed for speed in measured) if measured else "none"
    record(args, "training", images_per_s=mean, to_second_line_s=begun - started,
           **usage.measures, **end)


def terminate(process):
    """Send SIGTERM; return the seconds until the process ends, and its exit status."""
    started = time.perf_counter()
    process.terminate()
    try:
        status = process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        status = f"killed: {process.wait()}"
    return {"to_end_s": time.perf_counter() - started, "status": status}


def stop(args, case):
    """Stop runs at random moments, resume them, and compare them with undisturbed ones."""
    from benchmarks import kill
    s, work, batches = args.settings, Path(args.work), args.settings.batches[:2]
    moments = np.random.default_rng(0).random(s.runs)

    def begin(name, batch):
        epochs = s.epochs * batch // batches[0]  # the same number of steps for each batch size
        flags = ["--model", s.model, "--weights", "none", "--resize", *s.stop_size, "--batch_size",
                 batch, "--epochs", epochs, "--eval_steps", 10**6, "--log_interval", s.interval,
                 "--device", args.device, "--deterministic"]
        return kill.start(work, name, s.workers, list(map(str, flags)))

    def undisturbed(batch):
        started = time.perf_counter()
        process, log = begin(f"whole-{batch}", batch)
        startup = kill.wait_for_first_step(log, process, started)
        assert process.wait() == 0, log.read_text()
        seconds = time.perf_counter() - started
        record(args, f"batch {batch}, undisturbed", startup_s=startup, seconds=seconds)
        return startup, seconds, kill.final_files(work / f"whole-{batch}")

    def disturbed(number):
        batch, name = batches[number % len(batches)], f"run-{number}"
        startup, seconds, expected = whole[batch]
        if time.perf_counter() + 2 * startup + seconds > args.started + args.seconds:
            record(args, f"batch {batch}, run {number}", status="no time left")
            return
        process, log = begin(name, batch)
        kill.wait_for_first_step(log, process, time.perf_counter())
        time.sleep(moments[number] * 0.7 * (seconds - startup))  # before the last evaluation
        end = terminate(process)
        process, log = begin(name, batch)
        same = process.wait() == 0 and kill.final_files(work / name) == expected
        if not same:
            print(log.read_text(), file=sys.stderr)
        record(args, f"batch {batch}, run {number}", **end, same_bytes=same)
        shutil.rmtree(work / name)

    with ThreadPoolExecutor(s.jobs) as pool:
        whole = dict(zip(batches, pool.map(undisturbed, batches), strict=True))
        list(pool.map(disturbed, range(s.runs)))


def tests(args, case):
    """Run the suite; near the end of the time, stop it and report what has failed until then."""
    argv = [sys.executable, "-m", "pytest", "-o", "addopts=", "-v", "--device", args.device,
            *args.settings.tests]
    path, status = args.out / "tests.log", "out of time"
    reserve = min(25, args.seconds / 3)  # pytest-xdist may wait 20 s for its workers
    with open(path, "w") as file:
        process = subprocess.Popen(argv, cwd=ROOT, stdout=file, stderr=file)
    try:
        status = process.wait(args.started + args.seconds - reserve - time.perf_counter())
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it reports the failures in detail
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.8 * reserve)
    finally:
        process.kill()
    results = re.findall(r"^\[gw\d+\] \[ *\d+%\] ([A-Z]+) (.*?) *$", path.read_text(), re.M)
    for result, name in results:
        if result in ("FAILED", "ERROR"):
            record(args, name, result=result)
    record(args, "all", status=status, **Counter(result.lower() for result, _ in results))


COMMANDS = {"prepare": prepare, "train": train, "stop": stop, "tests": tests}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="never runs longer than this")
    parser.add_argument("--only", nargs="+", choices=SHARES, default=list(SHARES),
                        help="parts to run (default: all)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_const", dest="settings", const=QUICK, default=FULL,
                        help="a small network, and a few steps and photos: to try the script")
    parser.add_argument("--out", type=Path, default=Path("results-gpu"), help="folder to write")
    # What the command passes to the process of a case:
    for name in ("part", "case", "work", "seconds", "started"):
        kind = float if name in ("seconds", "started") else str
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
