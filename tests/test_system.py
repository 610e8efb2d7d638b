"""What surrounds a run: file systems, limits, streams, signals, threads, and printed commands."""
import errno
import logging
import os
import pty
import re
import resource
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import termios
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FAST, ROOT, parse_printed, run_command, start_command
from safetensors.torch import load_file
from torch import nn

import core.cli
import f1
import inference
import tools.export
import train
from core import distributed
from core.checkpoint import TrainerState, find_checkpoint, save_checkpoint
from core.cli import script
from core.device import choose_workers
from core.errors import InputError, explain_error
from core.files import check_output, write_atomically
from core.images import read_image
from core.plots import save_mistakes_sheet
from core.run_folder import check_output_dir, open_output_dir
from model import MODELS, create_model

RUN = [*FAST, "--epochs", "1", "--lr", "3e-3"]
FOREIGN = os.fsdecode(b"\xb0\xa1")  # a name in CP949, as old archives have it; not UTF-8


def wait_for(is_reached):
    deadline = time.monotonic() + 60
    while not is_reached():
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.005)


# --- file systems ---

def refuse_to_flush_folders(monkeypatch):
    """As network file systems and FUSE do."""
    flush = os.fsync

    def refuse(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(handle)

    monkeypatch.setattr(os, "fsync", refuse)


def refuse_to_open_folders(monkeypatch):
    """As Windows does, where a file that is open for reading cannot be flushed, either."""
    open_file = os.open

    def refuse(path, flags, *args, **kwargs):
        if os.path.isdir(path) or flags & os.O_ACCMODE == os.O_RDONLY:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return open_file(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize("refuse", [refuse_to_flush_folders, refuse_to_open_folders])
def test_a_file_system_that_refuses_to_flush_keeps_the_checkpoint(tmp_path, monkeypatch, refuse):
    with monkeypatch.context() as patch:
        refuse(patch)
        folder = save_checkpoint(tmp_path, nn.Linear(2, 3), {}, TrainerState(step=7), None, {})
    assert folder == tmp_path / "checkpoint-7"
    assert load_file(folder / "model.safetensors")["weight"].shape == (3, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]


def test_a_checkpoint_has_the_modes_of_the_umask_without_chmod(tmp_path, monkeypatch):
    """Some mounted file systems refuse chmod."""
    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EPERM, "Operation not permitted", path)

    for name in ("chmod", "fchmod"):
        monkeypatch.setattr(os, name, refuse)
    before = os.umask(0o027)
    try:
        folder = save_checkpoint(tmp_path, nn.Linear(2, 3), {}, TrainerState(), None, {})
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o750
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o640}


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no such folder")
def test_results_in_memory_are_like_results_on_a_disk():
    """/dev/shm is an ordinary folder, although its name is that of a device."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        with write_atomically(Path(folder, "checkpoint-1")) as temporary:
            temporary.mkdir()
            (temporary / "config.json").write_text("{}")
        with write_atomically(Path(folder, "s.csv")) as temporary:
            temporary.write_text("ImageID,ans\n")
            assert temporary.parent == Path(folder)
        assert sorted(os.listdir(folder)) == ["checkpoint-1", "s.csv"]


def a_file_as_a_folder(folder):
    (folder / "file").write_text("")
    (folder / "file" / "x").read_bytes()


def a_loop_of_links(folder):
    (folder / "loop").symlink_to("loop")
    (folder / "loop").read_bytes()


def a_long_name(folder):
    os.listdir(os.fsencode(folder) + b"/" + b"n" * 300)


def a_folder_as_a_file(folder):
    folder.write_text("")


def a_full_folder(folder):
    (folder / "a/b").mkdir(parents=True)
    (folder / "a").rmdir()


@pytest.mark.parametrize(("provoke", "says"), [
    (a_file_as_a_folder, "Not a directory at {}/file/x: "),
    (a_loop_of_links, "Too many levels of symbolic links at {}/loop: "),
    (a_long_name, "File name too long at {}/nnn"),
    (a_folder_as_a_file, "Is a directory at {}: "),
    (a_full_folder, "Directory not empty at {}/a: ")])
def test_an_error_of_the_system_names_the_path_and_what_to_do(tmp_path, provoke, says):
    with pytest.raises(OSError) as caught:
        provoke(tmp_path)
    line = explain_error(caught.value)
    assert line.startswith(says.format(tmp_path)) and "\n" not in line
    assert line.endswith("check the path, and that its disk is mounted and works")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ENOMEM])
def test_an_error_of_the_system_without_a_path_is_one_line_too(number):
    """write() and fork() fail without a path: a disk that is unplugged, no more processes."""
    line = explain_error(OSError(number, os.strerror(number)))
    assert line and "\n" not in line


def allow_few_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))


@pytest.mark.cpu_only("the CUDA driver needs more files itself")
def test_too_many_open_files_is_one_line(dataset, tmp_path):
    flags = ["--data_dir", dataset, *RUN, "--num_workers", "2"]
    result = run_command("train", flags, tmp_path, {}, allow_few_files)
    assert result.returncode == 2
    assert re.fullmatch("error: too many open files: .*--num_workers.*ulimit -n.*\n",
                        result.stderr, re.IGNORECASE)


def test_a_photo_that_the_disk_cannot_read_is_named(tmp_path):
    (tmp_path / "photo.jpg").symlink_to("/proc/self/mem")  # reading it is an input/output error
    with pytest.raises(InputError, match=r"^Input/output error at .*photo\.jpg: check"):
        read_image(tmp_path / "photo.jpg")


def test_what_another_thread_prints_is_not_taken_for_damage_of_a_photo():
    code = """
import sys
from core.cli import _open_outputs
from core.images import _with_stderr
_open_outputs()
print(repr(_with_stderr(lambda: print("progress", file=sys.stderr))))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("(None, '')\n", "progress\n")


# --- output targets ---

def test_pipes_and_links_are_written_through(command, trained, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "kept.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("kept.csv")
    received = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "pipe").read_text()),
                              daemon=True)
    reader.start()
    result = command("inference", "--model_dir", trained, "--output", "pipe",
                     "--save_probs", "link.csv")
    assert result.returncode == 0, result.stderr
    reader.join(10)
    assert received[0].startswith("ImageID,ans\n") and received[0].count("\n") == 21
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert (tmp_path / "link.csv").readlink() == Path("kept.csv")
    assert pd.read_csv(tmp_path / "kept.csv").columns[:2].tolist() == ["ImageID", "p0"]


def test_an_output_on_stdout_stays_beside_what_is_printed(trained, dataset, tmp_path):
    """stdout is a file here, as behind `> all.txt`."""
    flags = ["--model_dir", trained, "--data_dir", dataset, "--output", "/dev/stdout"]
    result = run_command("inference", flags, tmp_path, {})
    lines = result.stdout.splitlines()
    start = lines.index("ImageID,ans")
    assert len([line for line in lines[start + 1:start + 21] if ".jpg," in line]) == 20
    assert lines[0].startswith("20 photos of") and "wrote /dev/stdout: 20 rows" in lines


def test_a_device_is_written_through():
    terminal, device = pty.openpty()
    try:
        with write_atomically(os.ttyname(device)) as temporary:
            temporary.write_text("ImageID,ans\n")
        assert os.read(terminal, 100) == b"ImageID,ans\r\n"
    finally:
        os.close(terminal)
        os.close(device)


def test_an_output_that_cannot_be_written_is_refused_before_the_work(trained, tmp_path,
                                                                     monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("link.csv").symlink_to("gone/x.csv")
    Path("good.csv").symlink_to("not_yet.csv")
    check_output(None, "new.csv", "good.csv", "/dev/null")
    for target, says in [("folder", "is a folder"), ("no/x.csv", "its folder does not exist"),
                         ("link.csv", "its folder does not exist")]:
        with pytest.raises(InputError, match=f"^{target}: {says}"):
            check_output("new.csv", target)
        with pytest.raises(InputError, match=f"^{target}: {says}"):
            tools.export.main(["--model_dir", str(trained), "--output", target])
        with pytest.raises(InputError, match=f"^{target}: {says}"):
            inference.main(["--model_dir", str(trained), "--save_probs", target])
    with pytest.raises(OSError, match="File name too long"):  # 252 bytes, and ".", ".tmp"
        check_output("n" * 252)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["photo.jpg", "model.safetensors", "answers.csv", "info.csv"])
def test_an_input_is_not_replaced_by_an_output(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(InputError, match=f"{name}: would be replaced, but is not a .csv file"):
        check_output(tmp_path / name)
    (tmp_path / "link.csv").symlink_to(name)
    with pytest.raises(InputError, match=r"link.csv: would be replaced"):
        check_output(tmp_path / "link.csv")
    (tmp_path / "empty").touch()  # by mktemp
    (tmp_path / "old.csv").write_text("ImageID,ans\n")
    (tmp_path / "latest").symlink_to("old.csv")
    check_output(tmp_path / "empty", tmp_path / "latest")
    (tmp_path / "model.onnx").write_text("old")
    check_output(tmp_path / "model.onnx", suffix=".onnx")
    assert (tmp_path / name).read_text() == "precious"


def test_one_file_for_two_tables_is_refused(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"x\.csv"):
        inference.main(["--model_dir", str(trained), "--output", "x.csv", "--save_probs",
                        "./x.csv"])


@pytest.mark.parametrize(("parse", "flags"), [
    (train.parse_args, ["--output_dir", ""]), (train.parse_args, ["--model_dir="]),
    (train.parse_args, ["--output_dir", " "]),
    (inference.parse_args, ["--model_dir", "a", "--output", ""]),
    (inference.parse_args, ["--model_dir", "a", ""]),
    (inference.parse_args, ["--model_dir", "a", "--save_probs="]),
    (tools.export.parse_args, ["--model_dir", "a", "--output", ""])])
def test_an_empty_path_is_refused(parse, flags):
    with pytest.raises(InputError, match=r"^argument --\w+.*: is empty"):
        parse(flags)


# --- the results folder ---

def test_overwrite_deletes_only_what_a_run_wrote(trained, tmp_path):
    results = shutil.copytree(trained, tmp_path / "results")
    foreign = ["checkpoint-best/model.bin", "fold-0/config.json", "log.jsonl.old", "notes.txt",
               "tensorboard/x"]
    for name in foreign:
        (results / name).parent.mkdir(exist_ok=True)
        (results / name).write_text("precious")
    open_output_dir(results, resume=False, overwrite=True, argv=[]).close()
    left = sorted(str(path.relative_to(results)) for path in results.rglob("*") if path.is_file())
    assert left == [".lock", *foreign]


def test_overwrite_keeps_the_checkpoints_of_another_program(tmp_path):
    """Other programs name their folders checkpoint-500, too."""
    config = tmp_path / "results/checkpoint-500/config.json"
    config.parent.mkdir(parents=True)
    config.write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(InputError, match=r"--output_dir .*results"):
        open_output_dir(tmp_path / "results", resume=False, overwrite=True, argv=[])
    assert config.is_file()


@pytest.mark.parametrize("name", ["log.jsonl", "args.txt", "events.out.tfevents.1"])
def test_a_file_of_another_program_is_not_replaced(tmp_path, name):
    (tmp_path / name).write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=f"holds .*{name}.*pass another folder"):
            check_output_dir(tmp_path, resume=False, overwrite=overwrite, argv=[])


@pytest.mark.parametrize("inside", ["", "a/b"])
def test_a_link_to_nowhere_is_no_results_folder(tmp_path, inside):
    (tmp_path / "scratch").symlink_to("/nowhere/scratch")
    with pytest.raises(InputError, match=r"is a link to /nowhere/scratch, which does not exist"):
        check_output_dir(tmp_path / "scratch" / inside, resume=False, overwrite=False, argv=[])


# --- streams: the result before the report ---

def close_the_reader():
    """Let stdout be a pipe that nobody reads any more, as behind `| head`."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


def close_stderr():
    os.close(2)
    sys.stderr = None  # as Python does


def use_ascii():
    sys.stdout = open(1, "w", encoding="ascii", closefd=False)  # noqa: SIM115


@pytest.mark.parametrize("prepare", [close_the_reader, close_stderr])
def test_a_closed_stream_stops_neither_training_nor_inference(dataset, tmp_path, prepare):
    flags = ["--data_dir", dataset, *RUN, "--log_interval", "1"]
    result = run_command("train", flags, tmp_path, {}, prepare)
    assert result.returncode == 0 and not result.stderr
    assert (tmp_path / "results/worst_mistakes.png").is_file()
    result = run_command("inference", ["--model_dir", "results"], tmp_path, {}, prepare)
    assert result.returncode == 0 and not result.stderr
    assert len(pd.read_csv(tmp_path / "submission.csv")) == 20


@pytest.mark.parametrize(("prepare", "name"), [(use_ascii, "결과.csv"), (None, f"{FOREIGN}.csv")])
def test_a_name_that_cannot_be_printed_stops_nothing(trained, tmp_path, prepare, name):
    result = run_command("inference", ["--model_dir", trained, "--output", name], tmp_path, {},
                         prepare)
    assert result.returncode == 0 and not result.stderr
    assert len(pd.read_csv(tmp_path / name)) == 20
    assert re.search(r"(?m)^wrote \\\w+.*\.csv: 20 rows$", result.stdout)


def test_a_results_folder_in_foreign_bytes_is_refused_before_the_work(tmp_path):
    with pytest.raises(InputError, match=r"its name is not UTF-8.*pass another folder"):
        check_output_dir(tmp_path / FOREIGN, resume=False, overwrite=False, argv=[])


@pytest.mark.parametrize("name", ["train.py", "inference.py", "f1.py"])
def test_a_script_runs_with_pythonsafepath(name, tmp_path):
    """Python then leaves the folder of the script out of its path."""
    environment = {key: os.environ[key] for key in os.environ if key != "PYTHONPATH"}
    subprocess.run([sys.executable, ROOT / name, "--help"], check=True, cwd=tmp_path,
                   env=environment | {"PYTHONSAFEPATH": "1"}, stdout=subprocess.DEVNULL)


def test_commands_can_be_named_in_a_folder_that_was_deleted(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert shlex.split(script("inference.py"))[1] == str(ROOT / "inference.py")


# --- signals ---

def use_the_terminal(name):
    device = os.open(name, os.O_RDWR | os.O_NOCTTY)
    os.dup2(device, 1)
    os.dup2(device, 2)


def test_a_terminal_that_is_closed_ends_the_run_with_a_checkpoint(dataset, tmp_path):
    """The terminal is gone when SIGHUP comes: nothing can be printed any more."""
    terminal, device = pty.openpty()
    termios.tcsetwinsize(device, (50, 120))
    flags = ["--data_dir", dataset, *RUN, "--epochs", "100", "--log_interval", "1",
             "--num_workers", "1"]
    process, _ = start_command("train", flags, tmp_path, {},
                               partial(use_the_terminal, os.ttyname(device)))
    output = b""
    while b"loss" not in output:
        output += os.read(terminal, 1000)
    os.close(device)
    os.close(terminal)
    os.kill(process.pid, signal.SIGHUP)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGHUP
    assert len(list((tmp_path / "results").glob("checkpoint-*"))) == 1


# --- notebooks and threads ---

def state_of_the_process():
    import sklearn  # noqa: F401  (it sets variables when it is imported)
    log = logging.getLogger("mask")
    # scikit-learn sets these when it is imported, and torch 2.8 when it first uses CUDA.
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(("KMP_", "CUDA_MODULE"))}
    return (environment, [*log.handlers], log.level, log.propagate, [*logging.root.handlers],
            [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM,
                                                     signal.SIGHUP)])


def test_main_leaves_the_process_as_it_was(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("mask"), "level", logging.ERROR)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as users who want determinism set it
    before = state_of_the_process()
    argv = ["--data_dir", str(dataset), *RUN]
    train.main([*argv, "--deterministic"])
    assert not torch.are_deterministic_algorithms_enabled()
    assert state_of_the_process() == before
    with pytest.raises(InputError, match="already holds a run"):
        train.main(argv)
    inference.main(["--model_dir", "results"])
    assert state_of_the_process() == before
    assert "step 9" in capsys.readouterr().out  # log lines are seen in spite of the level


def test_main_works_in_a_thread_and_leaves_the_others_alone(dataset, tmp_path):
    errors = []

    def run():
        try:
            train.main(["--data_dir", str(dataset), *RUN, "--output_dir", str(tmp_path / "r")])
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        wait_for(lambda: errors or (tmp_path / "r/.lock").exists())
        os.environ["SET_MEANWHILE"] = "1"
        thread.join()
        assert not errors and (tmp_path / "r/checkpoint-9").is_dir()
        assert os.environ.get("SET_MEANWHILE") == "1"
    finally:
        os.environ.pop("SET_MEANWHILE", None)


# --- processes ---

def test_the_processes_that_draw_the_sample_end_with_their_parent(tmp_path):
    argv = [sys.executable, "-m", "tools.sample_data", "--root", str(tmp_path / "data")]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(argv, cwd=ROOT, stdout=log, stderr=log)
    children, deadline = [], time.monotonic() + 60
    while not children and time.monotonic() < deadline:
        time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    while any(os.path.exists(f"/proc/{pid}") for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children and not any(os.path.exists(f"/proc/{pid}") for pid in children)


@pytest.mark.parametrize(("variables", "says"), [
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 and RANK is not set"),
    ({"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4",
      "MASTER_PORT": "29500"}, "MASTER_ADDR is not set"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE is two"),
    ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2",
      "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"}, "MASTER_PORT"),
    ({"WORLD_SIZE": "2", "RANK": "5", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2",
      "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}, "RANK"),
])
def test_variables_that_are_not_those_of_torchrun_are_named(monkeypatch, variables, says):
    if variables.get("RANK") == "5":  # it would wait for process 0 for half an hour
        monkeypatch.setattr(torch.distributed, "init_process_group",
                            lambda backend: pytest.fail("the variables were not checked"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=says) as caught:
        distributed.init_distributed(torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_loader_processes_are_as_many_as_the_cores_that_may_be_used(monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")  # joblib treats it like the limit of a container
    assert choose_workers(-1, torch.device("cuda")) == 0
    assert choose_workers(3, torch.device("cuda")) == 3
    assert choose_workers(-1, torch.device("cpu")) == 0


def test_a_port_in_use_is_named(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        for name, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2,
                            "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": other.getsockname()[1]}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(InputError, match=r"cannot connect.*MASTER_PORT"):
            distributed.init_distributed(torch.device("cpu"))


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": ""}, {"WORLD_SIZE": "1", "RANK": "3"},
                                       {"RANK": "1", "LOCAL_RANK": "1"}])
def test_left_over_variables_of_one_process_are_ignored(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed.init_distributed(torch.device("cpu")) == torch.device("cpu")
    assert distributed.world_size() == 1 and distributed.launch("train.py") == script("train.py")


@pytest.mark.parametrize(("name", "size"), [("resnet18", (32, 32)),
                                            ("mobilenetv4_conv_small", (64, 48))])
def test_one_photo_for_batch_norm_is_one_line(name, size):
    """The last stage of one network has one pixel; the other has batch norm after the pooling."""
    with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
        create_model(name, size).train()(torch.zeros(1, 3, *size))
    line = explain_error(caught.value)
    assert line.startswith("--batch_size: the batch norm of this model needs two photos")


# --- printed commands ---

def test_commands_are_relative_in_the_project_and_whole_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert script("train.py").endswith(" train.py")
    assert script("tools.export").endswith(" -m tools.export")
    assert not script("tools.export").startswith("PYTHONPATH")
    monkeypatch.chdir(tmp_path)
    assert parse_printed(f"{script('f1.py')} a.csv", tmp_path) == ("f1", ["a.csv"])


def test_the_command_for_all_damaged_photos_runs_where_it_is_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jpg").write_bytes(b"\xff\xd8\xff\xe0 damaged")
    with pytest.raises(InputError) as caught:
        read_image("x.jpg")
    line = re.search(r"; ([^;]*) finds all such files", str(caught.value))[1]
    monkeypatch.delenv("PYTHONPATH")  # of these tests
    result = subprocess.run(f"{line} .", shell=True, capture_output=True, text=True)
    assert result.returncode == 1 and "1 cannot be decoded" in result.stdout, result.stderr


@pytest.mark.parametrize("name", ["it's $mine", "a b", "-x"])
def test_the_offered_folder_is_quoted(trained, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, name)
    with pytest.raises(InputError) as caught:
        check_output_dir(Path(name), resume=False, overwrite=False, argv=[f"--output_dir={name}"])
    program, argv = parse_printed(str(caught.value).partition("or run: ")[2], tmp_path)
    assert program == "train" and train.parse_args(argv)[0].output_dir == f"{name}-2"


def test_the_command_for_several_processes_is_quoted(tmp_path, monkeypatch):
    monkeypatch.setattr(core.cli, "ROOT", tmp_path / "my project")
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert shlex.split(distributed.launch("train.py"))[-1] == f"{tmp_path}/my project/train.py"


def test_the_commands_that_inference_prints_are_quoted(trained, dataset, tmp_path, monkeypatch,
                                                       capsys):
    monkeypatch.chdir(tmp_path)
    for output in ("my scores.csv", "-s.csv"):
        inference.main(["--model_dir", str(trained), f"--output={output}"])
        line = re.search("score it: (.*)", capsys.readouterr().out)[1]
        name, argv = parse_printed(line, tmp_path)
        submission, answers = map(Path, f1.parse_args(argv).tables)
        assert name == "f1"
        assert submission.samefile(output) and answers.samefile(dataset / "eval/answers.csv")


# --- small things ---

def test_a_home_folder_is_expanded_after_an_equals_sign(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args, _ = train.parse_args(["--output_dir=~/results", "--data_dir", "~"])
    assert (args.output_dir, args.data_dir) == (f"{tmp_path}/results", str(tmp_path))
    args = inference.parse_args(["--model_dir=~/a", "--data_dir", "~/b", "c/~"])
    assert (args.model_dir, args.data_dir) == ([f"{tmp_path}/a"], [f"{tmp_path}/b", "c/~"])


def test_the_folds_of_a_recipe_are_named_for_inference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for fold in range(2):
        Path(f"b4 run/fold-{fold}/checkpoint-5").mkdir(parents=True)
    with pytest.raises(InputError, match="holds 2 folds") as caught:
        find_checkpoint("b4 run")
    argv = shlex.split(str(caught.value).partition("to average them pass ")[2])
    assert inference.parse_args(argv).model_dir == ["b4 run/fold-0", "b4 run/fold-1"]


def test_the_images_folder_of_the_train_part_gives_its_own_photos(dataset):
    photos, _, is_eval = inference.choose_photos([str(dataset / "train/images")], [{}], [])
    assert not is_eval and len(photos) == 24 * 7
    for folder in (dataset, dataset / "eval/images"):
        assert inference.choose_photos([str(folder)], [{}], [])[2]


def test_the_sheet_of_mistakes_has_file_names(tmp_path, dataset):
    photo = next((dataset / "eval/images").iterdir())
    table = pd.DataFrame([[0.1] * 18], columns=[f"p{i}" for i in range(18)])
    for name in ("one", "two"):
        row = table.assign(ImageID=f"{name}/mask1.jpg", label=3, ans=5)
        save_mistakes_sheet(row, [str(photo)], tmp_path / f"{name}.png")
    one, two = (read_image(tmp_path / f"{name}.png") for name in ("one", "two"))
    assert one.shape == two.shape and not np.array_equal(one, two)


class OnlyClasses(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.linear = nn.Linear(3, num_classes)

    def forward(self, images):
        return self.linear(images.mean((2, 3)))


def with_dropout(num_classes, drop_rate, width=3):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(drop_rate),
                         nn.Linear(width, num_classes))


@pytest.mark.parametrize("build", [
    OnlyClasses, with_dropout, lambda num_classes: with_dropout(num_classes, 0.1),
    partial(with_dropout, width=3), lambda num_classes, **others: OnlyClasses(num_classes)])
def test_a_backbone_takes_the_arguments_it_needs(monkeypatch, build):
    monkeypatch.setitem(MODELS, "mine", build)
    assert create_model("mine", (24, 24), dropout=0.5)(torch.zeros(2, 3, 24, 24)).shape == (2, 18)


@pytest.mark.parametrize("weights", ["gone.safetensors", "none"])
def test_a_run_goes_on_without_the_weights_that_it_started_from(trained, dataset, tmp_path,
                                                                monkeypatch, weights):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "results")
    state = tmp_path / "results/checkpoint-9/trainer_state.json"
    state.write_text(state.read_text().replace('"weights": "none"',
                                               '"weights": "gone.safetensors"'))
    train.main(["--data_dir", str(dataset), *RUN, "--eval_steps", "5", "--epochs", "2",
                "--weights", weights, "--resume"])
    assert Path("results/checkpoint-17").is_dir()
    # What the run started from stays known.
    assert "--weights=gone.safetensors" in Path("results/args.txt").read_text()
