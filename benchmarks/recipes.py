"""What each technique is worth on your data: the rows of the README's results table, run and scored side by side.

    python -m benchmarks.recipes --data_dir DIR                                         # all rows, full budget
    python -m benchmarks.recipes --data_dir DIR --recipes ce ours --n_folds 3 --seeds 1 2 \\
        --set "--model tf_efficientnet_lite0 --weights FILE --resize 128 96"  # a scaled budget
    python -m benchmarks.recipes --people 60 --set "--weights none --resize 48 32 --epochs 1"    # do they run at all

A run is train.py in a process of its own. Its folder is OUT/<recipe>/seed-<s>/fold-<k>; runs that are complete are not run
again, and a stopped one goes on from its last checkpoint. OUT/results.csv is written anew after every run, with a row for each
recipe and seed that is complete under OUT; its gain is that over ours on the same people, with a paired interval.
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

from ensemble import read_members
from f1 import attribute_f1, bootstrap_interval, macro_f1, read_pooled, tabulate
from layout import GENDERS, MASK_OF_SHOT, choose_data, read_train, split_people
from run_folder import as_flag
from sample_data import draw_sample_dataset
from train import DATASET_DEFAULTS
from train import parse_args as parse_train_args

ROOT = Path(__file__).parent.parent
STOCK = "--crop 1 1 --head flat --ema_decay 0 --age_sigma 0 --old_age 60 --logit_adjustment 0 --tta none"  # none of our ideas
PLAIN = f"{STOCK} --augmentation none --criterion cross_entropy --sampler none"
UNTUNED = "--dropout 0 --resize 128 96 --lr 1e-3"  # small photos, the first rate tried
TUNED = "--dropout 0.2"

# name -> flags of train.py; the README's table shows the same ones.
RECIPES = {
    "resnet": f"--model resnet {PLAIN} {UNTUNED}",
    "vgg19": f"--model vgg19 {PLAIN} {UNTUNED}",
    "vgg19-tuned": f"--model vgg19 {PLAIN} {TUNED} --lr 1e-4",
    "vgg11-tuned": f"--model vgg11 {PLAIN} {TUNED} --lr 1e-4",
    "b4": f"--model efficientnet_b4 {PLAIN} {UNTUNED}",
    "ce": f"--model efficientnet_b4 {PLAIN} {TUNED}",
    "sampler": f"--model efficientnet_b4 {STOCK} {TUNED} --augmentation none --criterion cross_entropy --sampler balanced",
    "focal": f"--model efficientnet_b4 {STOCK} {TUNED} --augmentation none --criterion focal --sampler balanced",
    "loss-weight": f"--model efficientnet_b4 {STOCK} {TUNED} --augmentation base --criterion focal --sampler none "
                   f"--class_weights balanced",
    "ours": "",
}
# name -> members, of equal weight
ENSEMBLES = {"ensemble": ["loss-weight", "vgg11-tuned", "resnet"]}
# Ours without one of its parts, to see what that part is worth; and ours as the mean of folds of the training people.
ABLATION = {
    "no-crop": "--crop 1 1",
    "no-soft-ages": "--age_sigma 0",
    "no-adjustment": "--logit_adjustment 0",
    "no-sampler": "--sampler none",
    "no-augmentation": "--augmentation none",
    "no-average": "--ema_decay 0",
    "no-smoothing": "--label_smoothing 0",
    "flat-head": "--head flat",
    "no-dropout": "--dropout 0",
}
NO_MIRROR = "no-mirror"  # the weights of ours
FOLD_ENSEMBLE = "ours-folds"
ROWS = [*RECIPES, *ENSEMBLES, *ABLATION, NO_MIRROR, FOLD_ENSEMBLE]


def main(argv=None):
    args = parse_args(argv)
    out = Path(args.out)
    data_dir, kind = choose_data(args.data_dir, draw_sample_dataset)
    # A dataset's defaults as flags, since some of its people are not recognised as that dataset.
    defaults = shlex.split(" ".join(as_flag(key, value) for key, value in DATASET_DEFAULTS.get(kind, {}).items()))
    overrides = shlex.split(args.set)
    if args.people:
        photos = read_train(data_dir, parse_train_args([*defaults, *overrides]).fix_labels)
        data_dir = link_photos(choose_people(photos, args.people), out / "data")
    wanted = args.recipes or [*RECIPES, *ENSEMBLES]
    wanted += [member for name in wanted for member in ENSEMBLES.get(name, ())]
    wanted += ["ours"] if NO_MIRROR in wanted else []
    for seed in args.seeds:
        for name in [name for name in ROWS if name in wanted and name not in ENSEMBLES]:
            run(name, seed, out, ["--data_dir", str(data_dir), *defaults], overrides, args.n_folds, args.members)
            score(out, args.n_folds).to_csv(out / "results.csv", index=False, float_format="%.4f")
    print(summary(score(out, args.n_folds)))


def command(name):
    """What the README shows for a row."""
    if name in ENSEMBLES:
        return f"python inference.py --model_dir {' '.join(f'results/{member}' for member in ENSEMBLES[name])}"
    return " ".join(["python train.py", *RECIPES[name].split(), f"--output_dir results/{name}"])


def folders(out, name, seed, n_folds):
    """The results folders of a recipe's runs: one a fold, or one for the split by --val_ratio."""
    return [out / name / f"seed-{seed}" / (f"fold-{fold}" if n_folds else "split") for fold in range(max(n_folds, 1))]


def run(name, seed, out, data_flags, overrides, n_folds, num_members=5):
    """Train a recipe with each fold held out, unless it is there already.

    Args:
        data_flags: --data_dir, its value, and flags that the recipe's own flags win over.
        overrides: flags that win over the recipe's.
        num_members: folds of FOLD_ENSEMBLE.
    """
    for fold, folder in enumerate(folders(out, name, seed, n_folds)):
        held_out = ["--n_folds", str(n_folds), "--fold", str(fold)] if n_folds else []
        flags = [*data_flags, *shlex.split((RECIPES | ABLATION).get(name, "")), *overrides,
                 "--eval_steps", "1000000", "--seed", str(seed), *held_out]
        made_with = [*flags, f"{num_members} members"] if name == FOLD_ENSEMBLE else flags
        record = folder / "recipe.json"
        if record.is_file():
            if json.loads(record.read_text())["flags"] != made_with:
                sys.exit(f"{folder} holds a run with other flags; pass another --out, or delete it")
            continue
        print(f"{name}, seed {seed}, {folder.name}: {shlex.join(flags)}", flush=True)
        started, speed = time.perf_counter(), None
        if name == FOLD_ENSEMBLE:
            train_photos, valid_photos = split(flags)
            own_data = ["--data_dir", str(link_photos(train_photos, folder / "data")), *data_flags[2:]]
            run("ours", seed, folder, own_data, overrides, num_members)
            members = folders(folder, "ours", seed, num_members)
            predict(members, valid_photos, folder)
            speed = read_records(members).images_per_second.mean()
        elif name == NO_MIRROR:
            predict([folders(out, "ours", seed, n_folds)[fold]], split(flags)[1], folder, "--tta", "none")
        else:
            stdout = python("train.py", *flags, "--output_dir", folder, "--resume")
            speed = pd.Series(re.findall(r"([\d.]+) images/s", stdout), dtype=float).median()
        record.write_text(json.dumps({"flags": made_with, "seconds": time.perf_counter() - started, "images_per_second": speed}))


def split(flags):
    """The training and the held-out photos of train.py with these flags."""
    args = parse_train_args(flags)
    return split_people(read_train(args.data_dir, args.fix_labels), args.val_ratio, args.seed, args.n_folds, args.fold)


def predict(members, photos, folder, *flags):
    """Write the predictions of held-out photos by the mean of members, as train.py would."""
    folder.mkdir(parents=True, exist_ok=True)
    python("inference.py", "--model_dir", *members, "--data_dir", *photos.path, *flags, "--output", folder / "predictions.csv",
           "--save_probs", folder / "probabilities.csv")
    probabilities = pd.read_csv(folder / "probabilities.csv", index_col="ImageID").loc[photos.path].to_numpy()
    tabulate(photos, probabilities).to_csv(folder / "valid_predictions.csv", index=False)


def python(script, *argv):
    """Run one of the commands; returns what it prints, or ends with its error."""
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, argv)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} failed: {done.stderr.strip()}")
    return done.stdout


def score(out, n_folds):
    """A row for each recipe and seed that is complete under `out`, from the held-out photos of all folds pooled."""
    rows = []
    for seed in sorted({int(folder.name.removeprefix("seed-")) for folder in out.glob("*/seed-*")}):
        ours = read_row(out, "ours", seed, n_folds)
        for name in ROWS:
            pooled, records = read_row(out, name, seed, n_folds)
            if pooled is None:
                continue
            labels, answers, people = pooled.label, pooled["ans"], pooled.person
            low, high = bootstrap_interval(labels, answers, people)
            row = {"recipe": name, "seed": seed, "people": people.nunique(), "macro_f1": macro_f1(labels, answers), "low": low,
                   "high": high, **attribute_f1(labels, answers), **records}
            if ours[0] is not None and name != "ours":
                baseline = ours[0]["ans"].reindex(pooled.index)
                row["gain"] = row["macro_f1"] - macro_f1(labels, baseline)
                row["gain_low"], row["gain_high"] = bootstrap_interval(labels, answers, people, baseline)
            rows.append(row)
    return pd.DataFrame(rows)


def read_row(out, name, seed, n_folds):
    """(held-out predictions, {seconds, images_per_second}) of a recipe's runs, or (None, {}) unless all are complete."""
    members = [folders(out, member, seed, n_folds) for member in ENSEMBLES.get(name, [name])]
    if not all((folder / "recipe.json").is_file() for member in members for folder in member):
        return None, {}
    if name in ENSEMBLES:  # a soft vote: the mean of the members' probabilities for the same held-out photos
        table, probabilities = read_members(members)
        return table.assign(ans=probabilities.mean(axis=0).argmax(axis=1)), {}
    records = read_records(members[0])
    return read_pooled(members[0]), {"seconds": records.seconds.sum(), "images_per_second": records.images_per_second.mean()}


def read_records(folders):
    """A row for each run, with its seconds and images_per_second."""
    return pd.DataFrame([json.loads((folder / "recipe.json").read_text()) for folder in folders])


def summary(table):
    """A line a recipe: mean and spread over seeds, the widest intervals over people, F1 per attribute, time and speed."""
    rows = table.groupby("recipe", sort=False)
    lines = rows[["macro_f1", "mask", "gender", "age", "seconds", "images_per_second"]].mean()
    lines.insert(1, "spread", rows.macro_f1.std())
    lines.insert(2, "low", rows.low.min())
    lines.insert(3, "high", rows.high.max())
    if "gain" in table:
        lines = lines.assign(gain=rows.gain.mean(), gain_low=rows.gain_low.min(), gain_high=rows.gain_high.max())
    return lines.round(4).to_string()


def choose_people(photos, count):
    """The photos of so many people, stratified on gender x age band."""
    total = photos.person.nunique()
    return split_people(photos, count / total, seed=0)[1] if count < total else photos


def link_photos(photos, folder):
    """A dataset of links to these photos, labelled as in the table: what was mended there stays mended."""
    shot_of_mask = {mask: shot for shot, mask in MASK_OF_SHOT.items() if mask}
    for photo in photos.itertuples():
        shot = shot_of_mask.get(photo.mask, photo.shot)
        link = folder / "train" / "images" / photo.person / f"{shot}{Path(photo.path).suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(photo.path)
    people = photos.drop_duplicates("person")
    genders = [GENDERS[gender] for gender in people.gender]
    pd.DataFrame({"gender": genders, "age": people.years, "path": people.person}).to_csv(folder / "train/train.csv", index=False)
    return folder


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", help="dataset (default: as train.py chooses)")
    parser.add_argument("--recipes", nargs="+", choices=ROWS, metavar="ROW",
                        help=f"rows to run (default: the table's), of {', '.join(ROWS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="seeds, each a whole repetition")
    parser.add_argument("--n_folds", type=int, default=0, help="pool the held-out people of this many folds; 0: one split")
    parser.add_argument("--members", type=int, default=5, help=f"folds of {FOLD_ENSEMBLE}")
    parser.add_argument("--people", type=int, help="use only so many people")
    parser.add_argument("--set", default="", metavar="FLAGS", help="flags of train.py that override every recipe's")
    parser.add_argument("--out", default="results-recipes", help="folder of the runs and of results.csv")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
