"""What a new user does, by the README's commands, in processes of their own."""
import ast
import os
import re
import shlex
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from conftest import ROOT, docstring_backbone, write_eval, write_train

SMALL = ["--model", "test_efficientnet", "--weights", "none", "--resize", "32", "24",
         "--epochs", "1"]
FOLDERS = ["core", "tools"]
PRODUCT = sorted(path for folder in [".", *FOLDERS] for path in (ROOT / folder).glob("*.py"))


def python(*argv, cwd):
    return shell(shlex.join([sys.executable, *map(str, argv)]), cwd=cwd)


def shell(line, cwd):
    result = subprocess.run(line, shell=True, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def copy_product(folder):
    for path in PRODUCT:
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)


def imports(path):
    """Return the full names of the modules that a file imports, at any level of it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            # `from core import distributed` imports core.distributed
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(path):
    """Return the top-level names of the modules that a file imports."""
    return {name.partition(".")[0] for name in imports(path)}


def test_train_infer_score_on_the_built_in_sample(tmp_path):
    # A small backbone for one epoch, since the default takes minutes; all else is the default.
    out = python(ROOT / "train.py", "--model", "test_efficientnet", "--epochs", "1",
                 "--eval_steps", "50", cwd=tmp_path)
    assert "NO DATASET GIVEN" in out and "SAMPLE" in out and "sample defaults: --resize" in out
    out = shell(re.search(r"next: (.*)", out)[1], cwd=tmp_path)
    answers = pd.read_csv(tmp_path / "data/sample/eval/answers.csv")
    assert len(pd.read_csv(tmp_path / "submission.csv")) == len(answers)
    assert "drawn people" not in out
    out = shell(re.search(r"score it: (.*)", out)[1], cwd=tmp_path)
    assert f"over {answers.person.nunique()} people" in out
    photo = min((tmp_path / "data/sample/eval/images").iterdir())
    out = python(ROOT / "inference.py", "--model_dir=./results", "--data_dir", photo, cwd=tmp_path)
    assert "trained on the built-in sample of drawn people" in out


def test_a_backbone_added_to_model_py_trains_and_predicts(tmp_path, dataset):
    copy_product(tmp_path)
    with open(tmp_path / "model.py", "a") as file:
        file.write(f"\n\n{docstring_backbone()}\n")
    python("train.py", "--data_dir", dataset, *SMALL, "--model", "tiny_cnn", cwd=tmp_path)
    python("inference.py", "--model_dir=./results", cwd=tmp_path)
    assert len(pd.read_csv(tmp_path / "submission.csv")) == 20


def test_a_dataset_in_data_is_found(tmp_path):
    write_eval(write_train(tmp_path / "data", [f"{i:06d}_male_Asian_{20 + i}" for i in range(10)]))
    out = python(ROOT / "train.py", *SMALL, cwd=tmp_path)
    assert "SAMPLE" not in out and "training: people 8, photos 56\n" in out


def test_importing_touches_neither_the_network_nor_the_gpu(tmp_path):
    """The tests' commands are forked after the imports, and CUDA does not survive a fork."""
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PRODUCT]
    code = f"""
import socket, sys
sys.path.insert(0, {str(ROOT)!r})
def refuse(*args, **kwargs):
    raise AssertionError(f"network or GPU: {{args}}")
socket.socket.connect = socket.getaddrinfo = refuse
import torch
torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = refuse
import warnings
warnings.simplefilter("error", UserWarning)
import {", ".join(modules)}
"""
    python("-c", code, cwd=tmp_path)


def test_every_import_is_a_declared_dependency():
    def declared(name):
        lines = (ROOT / name).read_text().splitlines()
        return {re.split(r"[><=]", line)[0].replace("-", "_") for line in lines}

    known_as = {"sklearn": "scikit_learn", "PIL": "pillow", "cv2": "opencv_python_headless"}
    optional = {"onnx_model.py": "requirements-onnx.txt", "demo.py": "requirements-demo.txt"}
    own = {*FOLDERS, *(path.stem for path in ROOT.glob("*.py"))}
    for path in PRODUCT:
        allowed = declared("requirements.txt") | declared(
            optional.get(path.name, "requirements.txt"))
        for name in packages(path) - own - sys.stdlib_module_names:
            assert known_as.get(name, name) in allowed, (path, name)


def test_imports_point_one_way():
    """core/ is below the six files that users edit, and those are below tools/."""
    top_level = {path.stem for path in ROOT.glob("*.py")}
    assert {"train", "inference", "f1", "dataset", "model", "loss"} == top_level
    for path in PRODUCT:
        if path.parent.name == "core":
            assert not packages(path) & {*top_level, "tools"}, path
        elif path.parent == ROOT:
            assert "tools" not in packages(path), path
    assert "inference" not in packages(ROOT / "train.py")
    for name in ("inference", "f1", "dataset", "model", "loss"):
        assert "train" not in packages(ROOT / f"{name}.py"), name


def test_there_is_no_import_cycle():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PRODUCT}
    graph = {name: imports(path) & modules.keys() for name, path in modules.items()}
    while graph:  # take away the modules that import none of the others that are left
        leaves = [name for name, needed in graph.items() if not needed & graph.keys()]
        assert leaves, f"import cycle among {sorted(graph)}"
        for name in leaves:
            del graph[name]


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_path_of_a_training_platform_is_built_in(path):
    text = path.read_text()
    assert "/opt/ml" not in text and os.sep + "home" + os.sep not in text
