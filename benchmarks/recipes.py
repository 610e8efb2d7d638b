"""What each technique is worth on your data: train and score the recipes side by side.

    python -m benchmarks.recipes --data_dir DIR                                # all recipes
    python -m benchmarks.recipes --data_dir DIR --recipes ce ours --n_folds 3 --seeds 1 2 \\
        --set "--model tf_efficientnet_lite0 --weights FILE --resize 128 96"   # a smaller budget
    python -m benchmarks.recipes --people 60 --set "--weights none --resize 48 32 --epochs 1"

A recipe is a file of flags in recipes/. Each run is a train.py process with the results folder
OUT/<recipe>/seed-<s>/fold-<k>. Complete runs are not repeated, and a stopped one is resumed.
OUT/results.csv is written after every run. It has a row for each recipe and seed that is complete
under OUT; `gain` is the difference to "ours" on the same people, with a paired interval.
"""
import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from core.cli import format_flag
from core.labels import GENDERS, MASK_OF_SHOT
from core.layout import choose_data
from dataset import read_train, split_people
from f1 import attribute_f1, bootstrap_interval, macro_f1, read_pooled, tabulate
from tools.ensemble import read_members
from train import DATASET_DEFAULTS
from train import parse_args as parse_train_args

ROOT = Path(__file__).parent.parent
# The recipes, in the order of the results table.
RECIPES = ("resnet", "vgg19", "vgg19-tuned", "vgg11-tuned", "b4", "ce", "sampler", "focal",
           "loss-weight", "ours")
# Name -> members, with equal weights.
ENSEMBLES = {"ensemble": ["loss-weight", "vgg11-tuned", "resnet"]}
# "ours" without one of its parts: what that part is worth.
ABLATION = {
    "no-crop": "--crop 1 1",
    "no-soft-ages": "--age_sigma 0",
    "no-sampler": "--sampler none",
    "no-augmentation": "--augmentation none",
    "no-average": "--ema_decay 0",
    "no-dropout": "--dropout 0",
}
NO_MIRROR = "no-mirror"  # the models of "ours", without mirror images
FOLD_ENSEMBLE = "ours-folds"  # the mean of models trained on folds of the training people
ROWS = [*RECIPES, *ENSEMBLES, *ABLATION, NO_MIRROR, FOLD_ENSEMBLE]


def main(argv=None):
    args = parse_args(argv)
    out = Path(args.out)
    data_dir, kind = choose_data(args.data_dir)
    # The dataset's defaults as flags: a part of its people is not recognised as that dataset.
    defaults = [text for name, value in DATASET_DEFAULTS.get(kind, {}).items()
                for text in format_flag(name, value)]
    overrides = shlex.split(args.set)
    if args.people:
        fix_labels = parse_train_args([*defaults, *overrides])[0].fix_labels
        photos = choose_people(read_train(data_dir, fix_labels), args.people)
        data_dir = link_photos(photos, out / "data")
    wanted = args.recipes or [*RECIPES, *ENSEMBLES]
    wanted += [member for name in wanted for member in ENSEMBLES.get(name, ())]
    wanted += ["ours"] if NO_MIRROR in wanted else []
    data_flags = ["--data_dir", str(data_dir), *defaults]
    for seed in args.seeds:
        for name in [name for name in ROWS if name in wanted and name not in ENSEMBLES]:
            run(name, seed, out, data_flags, overrides, args.n_folds, args.members)
            table = score(out, args.n_folds)
            table.to_csv(out / "results.csv", index=False, float_format="%.4f")
    print(summary(score(out, args.n_folds)))


def recipe_flags(name):
    """Return the flags of a recipe: those of its file, or of "ours" and the part left out."""
    if name in RECIPES:
        return shlex.split((ROOT / "recipes" / f"{name}.txt").read_text(), comments=True)
    return shlex.split(ABLATION.get(name, ""))


def folders(out, name, seed, n_folds):
    """Return the results folders of a recipe's runs: one per fold, or one for --val_ratio."""
    parts = [f"fold-{fold}" for fold in range(n_folds)] or ["split"]
    return [out / name / f"seed-{seed}" / part for part in parts]


def run(name, seed, out, data_flags, overrides, n_folds, num_members=5):
    """Train a recipe with each fold held out; complete runs are not repeated.

    Args:
        name: one of ROWS that is not in ENSEMBLES.
        seed: --seed of the runs.
        out: folder of all runs.
        data_flags: --data_dir, its value, and flags that the recipe's own flags override.
        overrides: flags that override the recipe's.
        n_folds: number of folds; 0 for one split by --val_ratio.
        num_members: number of models of FOLD_ENSEMBLE.
    """
    for fold, folder in enumerate(folders(out, name, seed, n_folds)):
        held_out = ["--n_folds", str(n_folds), "--fold", str(fold)] if n_folds else []
        flags = [*data_flags, *recipe_flags(name), *overrides, "--eval_steps", "1000000",
                 "--seed", str(seed), *held_out]
        made_with = [*flags, f"{num_members} members"] if name == FOLD_ENSEMBLE else flags
        record = folder / "recipe.json"
        if record.is_file():
            if json.loads(record.read_text())["flags"] != made_with:
                sys.exit(f"{folder} holds a run with other flags; pass another --out, or delete "
                         f"it")
            continue
        print(f"{name}, seed {seed}, {folder.name}: {shlex.join(flags)}", flush=True)
        started, speed = time.perf_counter(), None
        if name == FOLD_ENSEMBLE:
            train_photos, valid_photos = split(flags)
            own_data = str(link_photos(train_photos, folder / "data"))
            run("ours", seed, folder, ["--data_dir", own_data, *data_flags[2:]], overrides,
                num_members)
            members = folders(folder, "ours", seed, num_members)
            predict(members, valid_photos, folder)
            speed = read_records(members).images_per_second.mean()
        elif name == NO_MIRROR:
            ours = folders(out, "ours", seed, n_folds)[fold]
            predict([ours], split(flags)[1], folder, "--tta", "none")
        else:
            stdout = python("train.py", *flags, "--output_dir", folder, "--resume")
            speed = pd.Series(re.findall(r"([\d.]+) images/s", stdout), dtype=float).median()
        seconds = time.perf_counter() - started
        record.write_text(json.dumps({"flags": made_with, "seconds": seconds,
                                      "images_per_second": speed}))


def split(flags):
    """Return the training and validation photos of train.py with these flags."""
    args, _ = parse_train_args(flags)
    return split_people(read_train(args.data_dir, args.fix_labels), args.val_ratio, args.seed,
                        args.n_folds, args.fold)


def predict(members, photos, folder, *flags):
    """Write valid_predictions.csv of the members' mean for labelled photos, as train.py does."""
    folder.mkdir(parents=True, exist_ok=True)
    probs = folder / "probabilities.csv"
    python("inference.py", "--model_dir", *members, "--data_dir", *photos.path, "--no-face",
           *flags,
           "--output", folder / "predictions.csv", "--save_probs", probs)
    probabilities = pd.read_csv(probs, index_col="ImageID").loc[photos.path].to_numpy()
    tabulate(photos, probabilities).to_csv(folder / "valid_predictions.csv", index=False)


def python(script, *argv):
    """Run one of the commands; return what it prints, or exit with its error."""
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, argv)],
                          capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} failed: {done.stderr.strip()}")
    return done.stdout


def score(out, n_folds):
    """Return a row for each complete recipe and seed, from the held-out photos of all folds."""
    rows = []
    seeds = {int(folder.name.removeprefix("seed-")) for folder in out.glob("*/seed-*")}
    for seed in sorted(seeds):
        ours, _ = read_row(out, "ours", seed, n_folds)
        for name in ROWS:
            pooled, records = read_row(out, name, seed, n_folds)
            if pooled is None:
                continue
            labels, answers, people = pooled.label, pooled["ans"], pooled.person
            low, high = bootstrap_interval(labels, answers, people)
            row = {"recipe": name, "seed": seed, "people": people.nunique(),
                   "macro_f1": macro_f1(labels, answers), "low": low, "high": high,
                   **attribute_f1(labels, answers), **records}
            if ours is not None and name != "ours":
                baseline = ours["ans"].reindex(pooled.index)
                row["gain"] = row["macro_f1"] - macro_f1(labels, baseline)
                row["gain_low"], row["gain_high"] = bootstrap_interval(labels, answers, people,
                                                                       baseline)
            rows.append(row)
    return pd.DataFrame(rows)


def read_row(out, name, seed, n_folds):
    """Return (held-out predictions, {seconds, images_per_second}) of a recipe's runs.

    The predictions are None unless all runs are complete.
    """
    members = [folders(out, member, seed, n_folds) for member in ENSEMBLES.get(name, [name])]
    if not all((folder / "recipe.json").is_file() for member in members for folder in member):
        return None, {}
    if name in ENSEMBLES:
        table, probabilities = read_members(members)
        return table.assign(ans=probabilities.mean(axis=0).argmax(axis=1)), {}
    records = read_records(members[0])
    return read_pooled(members[0]), {"seconds": records.seconds.sum(),
                                     "images_per_second": records.images_per_second.mean()}


def read_records(folders):
    """Return a row for each run, with its seconds and images_per_second."""
    return pd.DataFrame([json.loads((folder / "recipe.json").read_text()) for folder in folders])


def summary(table):
    """Return a text with a line per recipe: means over seeds and the widest intervals."""
    rows = table.groupby("recipe", sort=False)
    lines = rows[["macro_f1", "mask", "gender", "age", "seconds", "images_per_second"]].mean()
    lines.insert(1, "spread", rows.macro_f1.std())
    lines.insert(2, "low", rows.low.min())
    lines.insert(3, "high", rows.high.max())
    if "gain" in table:
        lines = lines.assign(gain=rows.gain.mean(), gain_low=rows.gain_low.min(),
                             gain_high=rows.gain_high.max())
    return lines.round(4).to_string()


def choose_people(photos, count):
    """Return the photos of `count` people, stratified on gender x age band."""
    total = photos.person.nunique()
    return split_people(photos, count / total, seed=0)[1] if count < total else photos


def link_photos(photos, folder):
    """Make a dataset of links to these photos, with the labels of the table; return its folder."""
    shot_of_mask = {mask: shot for shot, mask in MASK_OF_SHOT.items() if mask}
    for photo in photos.itertuples():
        shot = shot_of_mask.get(photo.mask, photo.shot)
        name = f"{shot}{Path(photo.path).suffix}"
        link = folder / "train" / "images" / photo.person / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(photo.path)
    people = photos.drop_duplicates("person")
    genders = [GENDERS[gender] for gender in people.gender]
    table = pd.DataFrame({"gender": genders, "age": people.years, "path": people.person})
    table.to_csv(folder / "train" / "train.csv", index=False)
    return folder


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", help="dataset (default: as train.py chooses)")
    parser.add_argument("--recipes", nargs="+", choices=ROWS, metavar="ROW",
                        help=f"rows to run (default: those of the table), of {', '.join(ROWS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="random seeds")
    parser.add_argument("--n_folds", type=int, default=0,
                        help="pool the held-out people of this many folds (0 = one split)")
    parser.add_argument("--members", type=int, default=5, help=f"models of {FOLD_ENSEMBLE}")
    parser.add_argument("--people", type=int, help="use only this many people")
    parser.add_argument("--set", default="", metavar="FLAGS",
                        help="flags of train.py that override every recipe's")
    parser.add_argument("--out", default="results-recipes",
                        help="folder of the runs and of results.csv")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
