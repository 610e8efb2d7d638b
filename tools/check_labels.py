"""Find people whose labels are contradicted by predictions of models that have not seen them.

    python -m tools.check_labels results/fold-*    # the folds of one recipe

Writes label_errors.csv, most suspicious first, and a sheet of photos for each kind of error:

    gender    the predicted gender is another one
    age       the predicted age band is another one
    swap      incorrect_mask and normal are predicted as if they were swapped
    photo     gender and age of one photo differ from the person's other photos

The score is between 0 and 1; low scores are suspicious. It is the predicted probability of the
label, and for `photo` how similar the predictions are.
"""
import logging
import os
from pathlib import Path

import numpy as np
import pandas as pd

from core.checkpoint import find_checkpoint, read_config
from core.cli import ArgumentParser, in_range, restores_process, run_cli
from core.errors import InputError
from core.files import check_output, write_atomically
from core.images import read_image
from core.labels import AGES, GENDERS, MASKS, PROBABILITIES, decode
from core.layout import read_train
from core.plots import SHEET_HEIGHT, save_photo_sheet
from f1 import image_ids, read_pooled
from loss import soft_targets

log = logging.getLogger("mask")

KINDS = ["gender", "age", "swap", "photo"]
AGE_SIGMA = 5.0  # assumed error of the labelled ages in years, as in training


@restores_process
def main(argv=None):
    args = parse_args(argv)
    output = Path(args.output)
    check_output(output)
    predictions = read_pooled(args.runs, PROBABILITIES)
    photos = find_photos(args.runs, args.data_dir, predictions.index)
    errors = find_errors(predictions, None if photos is None else photos.years)

    # The files are written before anything is printed about them.
    with write_atomically(output) as temporary:
        errors.assign(photos=errors.photos.map(" + ".join)).to_csv(
            temporary, index=False, float_format="%.6f")
    lines = [f"wrote {output}: {len(errors)} labels that predictions contradict"]
    for kind in KINDS:
        rows = errors[errors.kind == kind]
        sheet = output.with_name(f"{output.stem}-{kind}.png")
        has_sheet = photos is not None and args.count and len(rows)
        if has_sheet:
            save_sheet(rows.head(args.count), photos.path, sheet)
        lines.append(f"  {kind:<6s} {len(rows):5d}{f'  {sheet}' if has_sheet else ''}")
    print("\n".join(lines))
    print("The first of each kind are the most suspicious. Look at the photos before you change a "
          "label: predictions err, too.")


def find_photos(runs, data_dir, ids):
    """Return path and labelled years of the photos, indexed by ImageID; None if they are not there.

    Args:
        runs: results folders or csv files.
        data_dir: the dataset; None means the one that the first run was trained on.
        ids: the ImageIDs to find.

    Raises:
        InputError: if `data_dir` is another dataset, and as `read_train`.
    """
    if data_dir is None:
        try:
            data_dir = read_config(find_checkpoint(runs[0])).get("train_dir")
        except InputError:  # a csv file, or a folder without checkpoints
            data_dir = None
        if data_dir is None or not Path(data_dir).is_dir():
            log.warning(f"warning: no sheets of photos, and ages are compared by band only: the "
                        f"dataset of {runs[0]} is not there; pass --data_dir")
            return None
    photos = read_train(data_dir, fix_labels=False)
    photos = photos.set_index(image_ids(photos))[["path", "years"]]
    missing = ids.difference(photos.index)
    if len(missing):
        raise InputError(f"--data_dir {data_dir}: {missing[0]} is not in it ({len(missing)} of "
                         f"{len(ids)} photos are missing); expected the dataset of the runs")
    return photos.loc[ids]


def find_errors(predictions, years=None):
    """Return the suspicious labels of all kinds, ranked within each kind.

    People are ranked by the mean predicted probability of their label, the "self-confidence" of
    confident learning (Northcutt et al. 2021), and listed if another value has a higher one.

    Args:
        predictions: table indexed by ImageID with person, label and p0..p17, one row per photo;
            the probabilities are of models that have not seen the person.
        years: the labelled age of each photo; without it only the age bands are compared.

    Returns:
        DataFrame: kind, rank (from 1), person, photos (list of file names to look at), label,
        prediction, score in [0, 1].
    """
    # (N, mask, gender, age); 0 would make scores of 0 / 0.
    joint = predictions[PROBABILITIES].to_numpy(dtype=float).clip(1e-6)
    joint = (joint / joint.sum(1, keepdims=True)).reshape(-1, len(MASKS), len(GENDERS), len(AGES))
    mask, gender, age = decode(predictions.label.to_numpy())
    person, files = predictions.person.to_numpy(), predictions.index.map(os.path.basename)
    likely_age = np.eye(len(AGES))[age] if years is None else age_bands(years)
    rows = []
    for name, where in pd.Series(range(len(person))).groupby(person).indices.items():
        # Photos without a mask first: they show most of the face.
        where = where[np.argsort(-mask[where], kind="stable")]
        own = files[where], mask[where], joint[where]
        first = where[0]
        found = [*wrong_attributes(*own, gender[first], age[first], likely_age[first]),
                 *swapped_shots(*own), *odd_photos(*own)]
        rows += [(kind, name, *values) for kind, *values in found]
    errors = pd.DataFrame(rows, columns=["kind", "person", "photos", "label", "prediction",
                                         "score"])
    # Sort by the order of KINDS, then the most suspicious first.
    kinds = pd.Categorical(errors.kind, KINDS)
    errors = errors.assign(kind=kinds).sort_values(["kind", "score"], kind="stable")
    errors.insert(1, "rank", errors.groupby("kind", observed=True).cumcount() + 1)
    return errors.astype({"kind": str}).reset_index(drop=True)


# The four kinds of errors of one person. Each function takes the file names, mask states (n,) and
# probabilities (n, 3, 2, 3) of the person's photos, and yields (kind, files to look at, label,
# prediction, score).

def wrong_attributes(files, mask, joint, gender, age, likely_age):
    """Gender and age: the person's label, compared with the mean of the photos."""
    mean = joint.mean(axis=0)
    for kind, names, label, probabilities, likely in [
        ("gender", GENDERS, gender, mean.sum((0, 2)), np.eye(len(GENDERS))[gender]),
        ("age", AGES, age, mean.sum((0, 1)), likely_age),
    ]:
        # `likely` spreads an age near a border over two bands.
        best = probabilities.argmax()
        if best != label:
            yield kind, [files[0]], names[label], names[best], probabilities @ likely


def swapped_shots(files, mask, joint):
    """Swap: both mask states as labelled, compared with both exchanged."""
    # Needs at least one photo of each of the two states.
    if not {1, 2} <= set(mask):
        return
    incorrect, no_mask = (joint[mask == state].sum((2, 3)).mean(axis=0) for state in (1, 2))
    as_labelled, swapped = incorrect[1] * no_mask[2], incorrect[2] * no_mask[1]
    if swapped > as_labelled:
        yield ("swap", [files[mask == state][0] for state in (1, 2)], "incorrect + not wear",
               "not wear + incorrect", as_labelled / (as_labelled + swapped))


def odd_photos(files, mask, joint):
    """Photo: similarity of a photo's gender and age with the mean of the person's other photos
    (Bhattacharyya coefficient).
    """
    if len(files) == 1:
        return
    groups = joint.sum(axis=1).reshape(len(files), -1)
    others = (groups.sum(0) - groups) / (len(files) - 1)
    for i in np.flatnonzero(groups.argmax(1) != others.argmax(1)):
        yield ("photo", [files[i], files[0 if i else 1]], group_name(others[i]),
               group_name(groups[i]), np.sqrt(groups[i] * others[i]).sum())


def age_bands(years):
    """Return the probabilities (N, 3) of the true age bands of people with these labelled ages."""
    photos = pd.DataFrame({"years": years, "mask": 0, "gender": 0})
    targets = soft_targets(photos, AGE_SIGMA).numpy()
    return targets[:, :len(AGES)]  # the classes of one mask state and gender


def group_name(probabilities):
    """Return the most probable gender and age in words; probabilities (6,)."""
    gender, age = divmod(int(probabilities.argmax()), len(AGES))
    return f"{GENDERS[gender]}, {AGES[age]}"


def save_sheet(errors, paths, path):
    """Write a sheet of the photos of suspicious labels, with their file names.

    Args:
        errors: rows of `find_errors`, of one kind.
        paths: path of each photo, indexed by ImageID.
        path: the PNG to write.
    """
    images, captions = [], []
    for row in errors.itertuples():
        for file in row.photos:
            images.append(read_image(paths[f"{row.person}/{file}"], (SHEET_HEIGHT,) * 2))
            captions.append(f"{row.rank}. {row.person}\n{file}\nlabel: {row.label}\n"
                            f"predicted: {row.prediction}\nscore: {row.score:.3f}")
    save_photo_sheet(images, captions, path)


def parse_args(argv=None):
    parser = ArgumentParser(prog="python -m tools.check_labels",
                            description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="PATH",
                        help="results folders of the folds of one recipe")
    parser.add_argument("--data_dir", help="their dataset (default: where training found it)")
    parser.add_argument("--output", default="label_errors.csv",
                        help="csv file to write; the sheets are written beside it")
    parser.add_argument("--count", type=in_range(int, 0), default=60,
                        help="people or photos on each sheet (0 = no sheets)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_cli(main)
