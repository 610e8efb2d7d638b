"""What a stranger does, by the README's commands, in processes of their own."""
import os
import re
import shlex
import shutil
import subprocess
import sys

import pandas as pd
from conftest import ROOT, docstring_backbone, write_eval, write_train

SMALL = ["--model", "test_efficientnet", "--weights", "none", "--resize", "32", "24", "--epochs", "1"]
PRODUCT = [path.name for path in ROOT.glob("*.py")]


def python(*argv, cwd):
    result = subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_train_infer_score_on_the_built_in_sample(tmp_path):
    # a small backbone for one epoch: the default takes minutes; everything else is as it stands
    out = python(ROOT / "train.py", "--model", "test_efficientnet", "--epochs", "1", "--eval_steps", "50", cwd=tmp_path)
    assert "NO DATASET GIVEN" in out and "SAMPLE" in out and "sample defaults: --resize" in out
    command = shlex.split(re.search(r"next: python (.*)", out)[1])
    out = python(ROOT / command[0], *command[1:], cwd=tmp_path)
    answers = pd.read_csv(tmp_path / "data/sample/eval/answers.csv")
    assert len(pd.read_csv(tmp_path / "submission.csv")) == len(answers)
    command = shlex.split(re.search(r"score it: python (.*)", out)[1])
    out = python(ROOT / command[0], *command[1:], cwd=tmp_path)
    assert f"over {answers.person.nunique()} people" in out


def test_a_backbone_added_to_model_py_trains_and_predicts(tmp_path, dataset):
    for name in PRODUCT:
        shutil.copy(ROOT / name, tmp_path)
    with open(tmp_path / "model.py", "a") as file:
        file.write(f"\n\n{docstring_backbone()}\n")
    python("train.py", "--data_dir", dataset, *SMALL, "--model", "tiny_cnn", cwd=tmp_path)
    python("inference.py", "--model_dir=./results", cwd=tmp_path)
    assert len(pd.read_csv(tmp_path / "submission.csv")) == 20


def test_a_dataset_in_data_is_found(tmp_path):
    write_eval(write_train(tmp_path / "data", [f"{i:06d}_male_Asian_{20 + i}" for i in range(10)]))
    out = python(ROOT / "train.py", *SMALL, cwd=tmp_path)
    assert "SAMPLE" not in out and "training: 8 people" in out


def test_importing_never_touches_the_network(tmp_path):
    code = """
import socket
def refuse(*args, **kwargs):
    raise AssertionError(f"network: {args}")
socket.socket.connect = socket.getaddrinfo = refuse
import warnings
warnings.simplefilter("error", UserWarning)
import train, inference, f1, sample_data
"""
    python("-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}", cwd=tmp_path)


def test_every_import_is_a_declared_dependency():
    declared = {re.split(r"[><=]", line)[0].replace("-", "_") for line in (ROOT / "requirements.txt").read_text().split()}
    known_as = {"sklearn": "scikit_learn", "PIL": "pillow", "cv2": "opencv_python_headless"}
    own = {name.removesuffix(".py") for name in PRODUCT}
    for name in PRODUCT:
        for module in re.findall(r"^\s*(?:import|from) (\w+)", (ROOT / name).read_text(), re.M):
            assert module in sys.stdlib_module_names | own or known_as.get(module, module) in declared, (name, module)


def test_no_path_of_a_training_platform_is_built_in():
    for name in PRODUCT:
        assert "/opt/ml" not in (ROOT / name).read_text() and os.sep + "home" + os.sep not in (ROOT / name).read_text()
