"""The script for time on a GPU, on the CPU: it measures, and it ends what does not end."""
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import ROOT

from benchmarks import gpu


def read_results(folder):
    """Return the measures as a dict: (part, case, name) -> {measure: value}."""
    table = pd.read_csv(folder / "gpu.csv", header=None, dtype=str)
    table.columns = ["part", "case", "name", "measure", "value"]
    return {key: dict(zip(rows.measure, rows.value, strict=True))
            for key, rows in table.groupby(["part", "case", "name"])}


def test_a_part_runs_in_processes_of_its_own_and_its_results_are_written(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--only",
               "start", "--minutes", "2", "--out", tmp_path]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    results = read_results(tmp_path)
    assert results["prepare", "all", "process"]["status"] == "0"
    assert results["start", "all", "process"]["status"] == "0"
    seconds = {name: float(value) for name, value in results["start", "all", "sample"].items()}
    total = seconds.pop("in_all_s")
    assert sum(seconds.values()) == pytest.approx(total, rel=0.01)
    assert seconds["imports_s"] > seconds["step_2_s"] > 0
    assert f"start, all: sample: imports_s {seconds['imports_s']}" in output
    assert "sample defaults:" in (tmp_path / "gpu.log").read_text()  # the output of train.py


@pytest.mark.parametrize("case", ["ours", "bare"])
def test_steps_are_measured(command, tmp_path, case):
    result = command("benchmarks.gpu", "--device", "cpu", "--quick", "--part", "step", "--case",
                     case, "--work", tmp_path, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    results = read_results(tmp_path)
    assert not any("failed" in measures for measures in results.values()), results
    name = "batch 4" if case == "ours" else "batch 4, contiguous"
    assert float(results["step", case, name]["images_per_s"]) > 0
    assert float(results["step", case, "little GPU work"]["host_us_per_step"]) > 0


def test_the_failures_of_a_suite_that_does_not_end_are_reported(tmp_path):
    (tmp_path / "test_slow.py").write_text("""
import time
def test_fails():
    assert False
def test_does_not_end():
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass
""")
    settings = SimpleNamespace(tests=["-n", "1", "-p", "tests.conftest", str(tmp_path)])
    args = SimpleNamespace(device="cpu", part="tests", case="all", out=tmp_path, settings=settings,
                           started=time.perf_counter(), seconds=18)
    gpu.tests(args, "all")
    assert time.perf_counter() < args.started + 18
    results = {name: measures for (_, _, name), measures in read_results(tmp_path).items()}
    assert results.pop("all") == {"status": "out of time", "failed": "1"}
    (name, measures), = results.items()
    assert name.endswith("test_slow.py::test_fails") and measures == {"result": "FAILED"}


def test_a_case_that_does_not_end_is_killed_with_the_processes_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    code = ("import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
            "print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)")
    started = time.perf_counter()
    with open(tmp_path / "pid", "w") as file:
        status = gpu.run_limited([sys.executable, "-c", code], 1.0, stdout=file)
    assert status == "out of time" and 1.2 <= time.perf_counter() - started < 10
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{pid}")
