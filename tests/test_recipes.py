"""The recipe files, the table that shows them, and the recipes as real runs."""
import os
import re
import shlex

import pandas as pd
import pytest
from conftest import FAST, ROOT
from sklearn.metrics import f1_score

from benchmarks.recipes import ABLATION, ENSEMBLES, RECIPES, link_photos, main, recipe_flags
from core.cli import format_flag
from dataset import read_train
from train import DATASET_DEFAULTS
from train import parse_args as parse_train_args


def test_every_recipe_is_a_row_of_the_table_and_a_file_that_train_accepts(monkeypatch):
    monkeypatch.chdir(ROOT)
    table = (ROOT / "docs/recipes.md").read_text()
    rows = dict(re.findall(r"^\| ([\w-]+) \|.*`(python [^`]+)` \|$", table, re.M))
    assert [row for row in rows if row != "row"] == [*RECIPES[:-1], *ENSEMBLES, RECIPES[-1]]
    for name in RECIPES:
        assert rows[name] == f"python train.py @recipes/{name}.txt --data_dir DIR"
        shown = parse_train_args(shlex.split(rows[name])[2:])
        assert shown == parse_train_args([*recipe_flags(name), "--data_dir", "DIR"])
        assert shown[0].output_dir == f"results/{name}"
    assert {path.stem for path in (ROOT / "recipes").iterdir()} == set(RECIPES)
    for name, members in ENSEMBLES.items():
        folders = " ".join(f"results/{member}" for member in members)
        assert rows[name] == f"python inference.py --model_dir {folders}"
    for name in ABLATION:
        parse_train_args(recipe_flags(name))


def test_rows_run_once_and_the_mean_of_folds_is_scored_on_people_that_no_fold_has_seen(
        tmp_path, dataset, capsys):
    recipes = ["--data_dir", str(dataset), "--recipes", "no-mirror", "ensemble", "ours-folds",
               "--members", "2", "--set", shlex.join([*FAST, "--epochs", "1"]),
               "--out", str(tmp_path / "out")]
    main(recipes)
    assert "ours-folds, seed 1, split:" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out/results.csv")
    assert table.recipe.tolist() == ["resnet", "vgg11-tuned", "loss-weight", "ours", "ensemble",
                                     "no-mirror", "ours-folds"]
    assert table.people.tolist() == [5] * 7
    votes = {row: pd.read_csv(tmp_path / f"out/{row}/seed-1/split/valid_predictions.csv")
             for row in set(table.recipe) - {"ensemble"}}
    members = ("loss-weight", "vgg11-tuned", "resnet")
    vote = sum(votes[row].filter(regex=r"^p\d+$").to_numpy() for row in members).argmax(axis=1)

    def macro_f1(answers):
        truth = votes["ours"].label
        return f1_score(truth, answers, labels=range(18), average="macro",
                        zero_division=0)

    for row, answers in [("ensemble", vote), ("no-mirror", votes["no-mirror"]["ans"]),
                         ("ours-folds", votes["ours-folds"]["ans"])]:
        found = table[table.recipe == row]
        assert found.macro_f1.item() == pytest.approx(macro_f1(answers), abs=1e-4)
        gain = macro_f1(answers) - macro_f1(votes["ours"]["ans"])
        assert found.gain.item() == pytest.approx(gain, abs=2e-4)
    split = tmp_path / "out/ours-folds/seed-1/split"
    held_out = set(pd.read_csv(split / "valid_predictions.csv").person)
    one, other = (set(pd.read_csv(split / f"ours/seed-1/fold-{k}/valid_predictions.csv").person)
                  for k in range(2))
    assert len(held_out) == 5 and len(one | other) == 19
    assert not one & other and not held_out & (one | other)
    main(recipes)
    assert "seed 1" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", DATASET_DEFAULTS)
def test_defaults_of_a_dataset_are_the_same_as_flags(kind):
    defaults = DATASET_DEFAULTS[kind]
    flags = [text for name, value in defaults.items() for text in format_flag(name, value)]
    args, explicit = parse_train_args(flags)
    assert explicit == set(defaults)
    assert {name: getattr(args, name) for name in defaults} == defaults


def test_links_to_photos_keep_corrected_labels(dataset, tmp_path):
    photos = read_train(dataset)
    first = photos.person == photos.person[0]
    photos.loc[first, "gender"] = 1 - photos.loc[first, "gender"]
    swapped = first & (photos["mask"] > 0)
    photos.loc[swapped, "mask"] = 3 - photos.loc[swapped, "mask"]
    few = photos[photos.person.isin(photos.person.unique()[:4])]
    again = read_train(link_photos(few, tmp_path / "data"))
    columns = ["person", "years", "gender", "mask", "age"]
    again.index = again.path.map(os.path.realpath)
    photos.index = photos.path.map(os.path.realpath)
    assert again.person.nunique() == 4
    assert again[columns].equals(photos.loc[again.index, columns])
