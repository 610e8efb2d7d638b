"""Made-up people in the competition's layout, and the real commands as real processes."""
import importlib
import multiprocessing
import os
import resource
import shlex
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
SHOTS = ["incorrect_mask", "mask1", "mask2", "mask3", "mask4", "mask5", "normal"]
DEVICE = "cpu"  # --device of pytest
# Flags of a run of seconds: the smallest EfficientNet of timm on small photos, from scratch.
FAST = ["--model", "test_efficientnet", "--weights", "none", "--resize", "32", "24",
        "--crop", "0.9", "0.8", "--batch_size", "16", "--device", "cpu", "--num_workers", "0"]

# The commands' processes are forked from a server that has imported them once: they are real
# processes, but do not need seconds of imports each.
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
os.environ["OMP_NUM_THREADS"] = "1"
# Of a suite that nohup or "&" started, the commands would ignore these signals, too.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["train", "inference", "f1", "tools.ensemble",
                                "torch.utils.tensorboard", "matplotlib.figure",
                                "matplotlib.backends.backend_agg", "sklearn.metrics"])


def pytest_addoption(parser):
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu",
                     help="device of all training and inference commands")


def pytest_configure(config):
    """Set the device, before any test module is imported."""
    global DEVICE
    DEVICE = config.getoption("--device")
    config.addinivalue_line("markers", "cpu_only(reason): skipped with --device cuda")
    if DEVICE == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # commands without --device use the CPU, too
    else:
        FAST[FAST.index("--device") + 1] = DEVICE
        FAST.append("--deterministic")
        # cuBLAS reads it once in a process, and some tests run commands in their own process.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        # Exact float32 for --no-amp. Runs without it use bfloat16.
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"


def pytest_collection_modifyitems(items):
    for item in items:
        marker = item.get_closest_marker("cpu_only")
        if marker and DEVICE != "cpu":
            item.add_marker(pytest.mark.skip(reason=f"about the CPU alone: {marker.args[0]}"))


def tolerance(on_cpu, on_cuda):
    """Return the tolerance of a test for the device of the commands."""
    return on_cpu if DEVICE == "cpu" else on_cuda


def docstring_backbone():
    """Return the example of a backbone in model.py's docstring, as code."""
    docstring = (ROOT / "model.py").read_text().split('"""')[1]
    example = docstring.split("by that name:\n\n")[1].split("\n\nEvery timm model")[0]
    return "\n".join(line[4:] for line in example.splitlines())


def make_people(n, seed=0):
    """Return folder names of n people of both genders and all ages."""
    rng = np.random.default_rng(seed)
    ages = [22, 45, 60]
    return [f"{i:06d}_{['male', 'female'][i % 2]}_Asian_{ages[(i // 2) % 3] + rng.integers(0, 4)}"
            for i in range(1, n + 1)]


def write_photo(path, label, rng, size=(24, 32)):
    """Write a photo whose colours tell the class, with noise.

    The mask shows at the bottom, the gender at the top, and the age in the brightness.
    """
    mask, gender, age = label // 6, label // 3 % 2, label % 3
    pixels = np.zeros((size[1], size[0], 3)) + 60 + 40 * age
    pixels[size[1] // 2:, :, mask] += 80
    pixels[:size[1] // 2, :, gender] += 80
    pixels = (pixels + rng.normal(0, 12, pixels.shape)).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, quality=95)


def write_train(root, people, shots=SHOTS):
    """Write a train part with these people; return the root."""
    from core.labels import GENDERS, MASK_OF_SHOT, age_band, encode
    rng = np.random.default_rng(0)
    rows = []
    for person in people:
        person_id, gender, race, age = person.split("_")
        rows.append((person_id, gender, race, age, person))
        folder = root / "train" / "images" / person
        folder.mkdir(parents=True)
        for shot in shots:
            label = encode(MASK_OF_SHOT[shot], GENDERS.index(gender), int(age_band(int(age))))
            write_photo(folder / f"{shot}.jpg", label, rng)
    table = pd.DataFrame(rows, columns=["id", "gender", "race", "age", "path"])
    table.to_csv(root / "train" / "train.csv", index=False)
    return root


def write_eval(root, count=20):
    """Write an eval part of `count` photos with answers.csv; return the root."""
    rng = np.random.default_rng(1)
    (root / "eval" / "images").mkdir(parents=True)
    ids = [f"{i * 7919 % 9973:040x}.jpg" for i in range(count)]
    labels = np.arange(count) % 18
    for image_id, label in zip(ids, labels, strict=True):
        write_photo(root / "eval" / "images" / image_id, label, rng)
    pd.DataFrame({"ImageID": ids, "ans": 0}).to_csv(root / "eval" / "info.csv", index=False)
    pd.DataFrame({"ImageID": ids, "ans": labels}).to_csv(root / "eval" / "answers.csv", index=False)
    return root


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """24 people and 20 photos to predict; tests only read it."""
    return write_eval(write_train(tmp_path_factory.mktemp("dataset"), make_people(24)))


@pytest.fixture
def copy(dataset, tmp_path):
    """A copy of the dataset, which a test may damage."""
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


@pytest.fixture
def command(tmp_path):
    """Run a command in its own process: command("train", ...) -> returncode, stdout, stderr."""
    return lambda name, *argv, cwd=tmp_path, **env: run_command(name, argv, cwd, env)


@pytest.fixture(scope="session")
def trained(dataset, tmp_path_factory):
    """A results folder with checkpoint-5 and checkpoint-9 of a small model."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--data_dir", dataset, *FAST, "--epochs", "1", "--eval_steps", "5", "--lr", "3e-3"]
    result = run_command("train", flags, folder, {})
    assert result.returncode == 0, result.stderr
    return folder / "results"


def parse_printed(line, cwd):
    """Check that a printed command runs in the folder `cwd`; return (name of the script, argv)."""
    python, script, *argv = shlex.split(line)
    assert Path(shutil.which(python)).parent == Path(sys.executable).parent
    path = Path(cwd, script)
    assert path.samefile(ROOT / path.name)
    return path.stem, argv


def run_printed(line, cwd, *more):
    """Run a command as it was printed, with more flags, in the folder in which it was printed."""
    name, argv = parse_printed(line, cwd)
    return run_command(name, [*argv, *more], cwd, {})


def start_command(name, argv, cwd, env, prepare=None):
    """Start a command; return (process, files of its stdout and stderr).

    `prepare` is a function of a test module, called in the process before the command starts.
    """
    logs = [Path(cwd) / f".{name}.{stream}" for stream in ("out", "err")]
    args = (name, list(map(str, argv)), str(cwd), env, list(map(str, logs)), prepare)
    process = context.Process(target=_child, args=args)
    process.start()
    return process, logs


def run_command(name, argv, cwd, env, prepare=None):
    process, logs = start_command(name, argv, cwd, env, prepare)
    process.join(300)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"{name} {argv} is still running after 300 s")
    stdout, stderr = (log.read_text() for log in logs)
    return SimpleNamespace(returncode=process.exitcode, stdout=stdout, stderr=stderr)


def _child(name, argv, cwd, env, logs, prepare):
    os.environ.update({key: str(value) for key, value in env.items()})
    os.chdir(cwd)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that a shell started
    if "FILE_SIZE_LIMIT" in env:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (env["FILE_SIZE_LIMIT"],) * 2)
    for log, stream in zip(logs, (1, 2), strict=True):
        with open(log, "wb") as file:
            os.dup2(file.fileno(), stream)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    if prepare:
        prepare()
    from core.cli import run_cli
    run_cli(lambda: importlib.import_module(name).main(argv))
