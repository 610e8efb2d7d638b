"""The README's results table against the place that holds its rows, and the rows as real runs."""
import re
import shlex

import pandas as pd
from conftest import FAST, ROOT
from test_end_to_end import python

from benchmarks.recipes import ENSEMBLES, RECIPES, command
from inference import parse_args as parse_inference_args
from train import parse_args as parse_train_args


def test_the_readme_shows_the_commands_that_are_run():
    table = (ROOT / "README.md").read_text().split("## The table to beat")[1].split("\n## ")[0]
    shown = dict(re.findall(r"^\| ([\w-]+) \|.*`(python [^`]+)` \|$", table, re.M))
    assert shown == {name: command(name) for name in [*RECIPES, *ENSEMBLES]}
    for name in RECIPES:
        parse_train_args(shlex.split(shown[name])[2:])
    for name in ENSEMBLES:
        parse_inference_args(shlex.split(shown[name])[2:])


def test_rows_run_and_are_not_run_twice(tmp_path, dataset):
    recipes = ["-m", "benchmarks.recipes", "--data_dir", dataset, "--recipes", "ce", "--set", shlex.join([*FAST, "--epochs", "1"]),
               "--out", tmp_path / "out"]
    assert "ce, seed 1, split:" in python(*recipes, cwd=ROOT)
    table = pd.read_csv(tmp_path / "out/results.csv")
    assert table.recipe.tolist() == ["ce"] and table.people.item() == 5 and 0 <= table.low.item() <= table.high.item()
    assert "seed 1" not in python(*recipes, cwd=ROOT)
