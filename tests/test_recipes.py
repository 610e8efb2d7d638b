"""The README's results table against the place that holds its rows, and the rows as real runs."""
import os
import re
import shlex

import pandas as pd
import pytest
from conftest import FAST, ROOT
from sklearn.metrics import f1_score

from benchmarks.recipes import ABLATION, ENSEMBLES, RECIPES, command, link_photos, main
from inference import parse_args as parse_inference_args
from layout import read_train
from run_folder import as_flag
from train import DATASET_DEFAULTS
from train import parse_args as parse_train_args


def test_the_readme_shows_the_commands_that_are_run():
    table = (ROOT / "README.md").read_text().split("## The table to beat")[1].split("\n## ")[0]
    shown = dict(re.findall(r"^\| ([\w-]+) \|.*`(python [^`]+)` \|$", table, re.M))
    assert shown == {name: command(name) for name in [*RECIPES, *ENSEMBLES]}
    assert list(shown) == [*list(RECIPES)[:-1], "ensemble", "ours"]
    for name in RECIPES:
        parse_train_args(shlex.split(shown[name])[2:])
    for flags in ABLATION.values():
        parse_train_args(shlex.split(flags))
    for name in ENSEMBLES:
        parse_inference_args(shlex.split(shown[name])[2:])


def test_rows_run_once_and_the_mean_of_folds_is_scored_on_people_that_no_fold_has_seen(tmp_path, dataset, capsys):
    recipes = ["--data_dir", str(dataset), "--recipes", "no-mirror", "ensemble", "ours-folds", "--members", "2",
               "--set", shlex.join([*FAST, "--epochs", "1"]), "--out", str(tmp_path / "out")]
    main(recipes)
    assert "ours-folds, seed 1, split:" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out/results.csv")
    assert table.recipe.tolist() == ["resnet", "vgg11-tuned", "loss-weight", "ours", "ensemble", "no-mirror", "ours-folds"]
    assert table.people.tolist() == [5] * 7
    votes = {row: pd.read_csv(tmp_path / f"out/{row}/seed-1/split/valid_predictions.csv")
             for row in set(table.recipe) - {"ensemble"}}
    vote = sum(votes[row].filter(regex=r"^p\d+$").to_numpy() for row in ("loss-weight", "vgg11-tuned", "resnet")).argmax(axis=1)
    for row, answers in [("ensemble", vote), ("no-mirror", votes["no-mirror"]["ans"]), ("ours-folds", votes["ours-folds"]["ans"])]:
        truth, by_ours = votes["ours"].label, f1_score(votes["ours"].label, votes["ours"]["ans"], labels=range(18), average="macro")
        expected = f1_score(truth, answers, labels=range(18), average="macro")
        assert table.macro_f1[table.recipe == row].item() == pytest.approx(expected, abs=1e-4)
        assert table.gain[table.recipe == row].item() == pytest.approx(expected - by_ours, abs=2e-4)
    split = tmp_path / "out/ours-folds/seed-1/split"
    held_out = set(pd.read_csv(split / "valid_predictions.csv").person)
    one, other = (set(pd.read_csv(split / f"ours/seed-1/fold-{k}/valid_predictions.csv").person) for k in range(2))
    assert len(held_out) == 5 and len(one | other) == 19 and not one & other and not held_out & (one | other)
    main(recipes)
    assert "seed 1" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", DATASET_DEFAULTS)
def test_defaults_of_a_dataset_are_the_same_as_flags(kind):
    flags = " ".join(as_flag(key, value) for key, value in DATASET_DEFAULTS[kind].items())
    assert parse_train_args(shlex.split(flags)) == parse_train_args([], DATASET_DEFAULTS[kind]) != parse_train_args([])


def test_links_to_photos_keep_what_was_mended(dataset, tmp_path):
    photos = read_train(dataset)
    first = photos.person == photos.person[0]
    photos.loc[first, "gender"] = 1 - photos.loc[first, "gender"]
    swapped = first & (photos["mask"] > 0)
    photos.loc[swapped, "mask"] = 3 - photos.loc[swapped, "mask"]
    again = read_train(link_photos(photos[photos.person.isin(photos.person.unique()[:4])], tmp_path / "data"))
    columns = ["person", "years", "gender", "mask", "age"]
    again.index = again.path.map(os.path.realpath)
    photos.index = photos.path.map(os.path.realpath)
    assert again.person.nunique() == 4 and again[columns].equals(photos.loc[again.index, columns])
