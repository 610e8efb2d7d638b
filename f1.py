"""Macro F1 as the competition computes it, and the F1 of each attribute and class.

    python f1.py submission.csv answers.csv
    python f1.py results/fold-*                           # pooled out-of-fold predictions
    python f1.py results/fold-* --against other/fold-*    # gain over another recipe, paired

Rows are matched by ImageID. The interval is a bootstrap over people if answers.csv has a column
`person`, else over photos.
"""
import os
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # missing with PYTHONSAFEPATH

from core.cli import ArgumentParser, run_cli, script
from core.errors import InputError
from core.evaluation import MIN_PEOPLE, describe_interval, draw_people
from core.labels import ATTRIBUTES, CLASS_NAMES, NUM_CLASSES, PROBABILITIES, decode
from core.tables import read_table


def macro_f1(labels, predictions):
    """Return macro F1 over all 18 classes, in [0, 1].

    A class with no prediction and no truth counts 0.
    """
    return float(class_f1(labels, predictions).mean())


def class_f1(labels, predictions):
    """Return the F1 of each class, (18,) in [0, 1], from labels and predictions (N,) of 0..17."""
    return _f1(labels, predictions, NUM_CLASSES)


def attribute_f1(labels, predictions):
    """Return the macro F1 of mask, gender and age: a dict of three numbers in [0, 1]."""
    pairs = zip(decode(np.asarray(labels)), decode(np.asarray(predictions)), strict=True)
    return {name: float(_f1(truth, guess, len(names)).mean())
            for (truth, guess), (name, names) in zip(pairs, ATTRIBUTES.items(), strict=True)}


def _f1(truth, guess, num_classes):
    from sklearn.metrics import f1_score  # slow to import
    return f1_score(truth, guess, labels=range(num_classes), average=None, zero_division=0)


def summarize(labels, predictions, people):
    """Return macro F1 and the bounds of its 95 % interval over people."""
    return macro_f1(labels, predictions), *bootstrap_interval(labels, predictions, people)


def bootstrap_interval(labels, predictions, people, baseline=None, num_draws=2000, seed=0):
    """Return the 95 % percentile interval of macro F1 by bootstrap over people.

    People are drawn, not photos: the seven photos of a person are similar, and drawing photos
    would make the interval far too narrow (Efron & Tibshirani 1993, chapter 13).

    Args:
        labels, predictions: (N,) of 0..17.
        people: (N,) the person on each photo.
        baseline: (N,) other predictions for the same photos. The interval is then that of the
            difference, predictions minus baseline, with the same people drawn for both (a paired
            bootstrap).

    Returns:
        (low, high), each in [0, 1], or in [-1, 1] for a difference.
    """
    person, times_drawn = draw_people(people, num_draws, seed)
    # How often each person is drawn in each of the bootstrap samples gives all scores at once.
    scores = _drawn_macro_f1(labels, predictions, person, times_drawn)
    if baseline is not None:
        scores = scores - _drawn_macro_f1(labels, baseline, person, times_drawn)
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)


def _drawn_macro_f1(labels, predictions, person, times_drawn):
    """Return the macro F1 of each draw, from counts.

    Args:
        labels, predictions, person: (N,).
        times_drawn: (draws, people).
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    # Truths, predictions and hits of each person in each class.
    counts = np.zeros((3, times_drawn.shape[1], NUM_CLASSES))
    hits = labels == predictions
    np.add.at(counts[0], (person, labels), 1)
    np.add.at(counts[1], (person, predictions), 1)
    np.add.at(counts[2], (person[hits], labels[hits]), 1)
    truths, guesses, hits = times_drawn @ counts
    # A class of which a draw has no photo would count 0, however good the predictions are: leave
    # it out of the mean of that draw. A class of which there is no photo at all does count 0.
    scores = np.where(truths > 0, 2 * hits / np.maximum(truths + guesses, 1), 0)
    num_classes = len(np.unique(labels))
    return scores.sum(axis=1) / (truths > 0).sum(axis=1) * num_classes / NUM_CLASSES


def image_ids(photos):
    """Return the ImageID of labelled photos: person/file name."""
    return photos.person + "/" + photos.path.map(os.path.basename)


def tabulate(photos, probabilities):
    """Return the predictions of labelled photos: ImageID, person, label, ans and p0..p17."""
    table = pd.DataFrame({
        "ImageID": image_ids(photos), "person": photos.person, "label": photos.label,
        "ans": probabilities.argmax(axis=1)})
    return table.join(pd.DataFrame(probabilities, columns=PROBABILITIES))


def score(predictions):
    """Return the metrics of a table of `tabulate` over all its photos: numbers by name."""
    labels, answers = predictions.label.to_numpy(), predictions["ans"].to_numpy()
    likelihood = predictions[PROBABILITIES].to_numpy()[np.arange(len(labels)), labels]
    attributes = {f"{name}_f1": f1 for name, f1 in attribute_f1(labels, answers).items()}
    return {
        "log_loss": float(-np.log(np.maximum(likelihood, 1e-12)).mean()),
        "macro_f1": macro_f1(labels, answers),
        "accuracy": float((labels == answers).mean()),
        **attributes,
        "class_f1": class_f1(labels, answers).tolist(),
    }


def report(labels, predictions, people=None):
    """Return a text: macro F1 with its interval, accuracy, F1 per attribute and per class."""
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    people, number, unit = _units(people, labels)
    f1, low, high = summarize(labels, predictions, people)
    lines = [f"macro F1 {f1:.4f}   {describe_interval(low, high, number, unit)}",
             f"accuracy {(labels == predictions).mean():.2%} of {len(labels)} photos", ""]
    # One line per attribute.
    parts = zip(ATTRIBUTES.items(), decode(labels), decode(predictions), strict=True)
    for (name, names), truth, guess in parts:
        values = _f1(truth, guess, len(names))
        detail = ", ".join(f"{n} {value:.3f}" for n, value in zip(names, values, strict=True))
        lines.append(f"{name:6s} F1 {values.mean():.4f}   {detail}")
    lines += ["", f"{'class':<29s} {'photos':>6s} {'predicted':>9s} {'F1':>6s}   most often "
                  f"predicted as"]
    # One line per class, with the class that it is most often confused with.
    for label, f1 in enumerate(class_f1(labels, predictions)):
        wrong = predictions[(labels == label) & (predictions != label)]
        counts = np.bincount(wrong, minlength=NUM_CLASSES)
        confusion = f"{CLASS_NAMES[counts.argmax()]} ({counts.max()})" if len(wrong) else ""
        lines.append(f"{label:2d} {CLASS_NAMES[label]:<26s} {(labels == label).sum():6d} "
                     f"{(predictions == label).sum():9d} {f1:6.3f}   {confusion}".rstrip())
    return "\n".join(lines)


def _units(people, labels):
    """Return (what a bootstrap draws, their number, their name): people, or photos without them."""
    if people is None:
        unit = "photos"
        if len(labels) >= MIN_PEOPLE:
            unit += " (no person column: too narrow if people have several photos)"
        return np.arange(len(labels)), len(labels), unit
    return people, len(set(people)), "people"


def match(submission_path, answers_path):
    """Return a submission and its answers as one table, like `read_pooled`.

    Raises:
        InputError: if the files have different ids, if the answers have people in some rows only,
            and as `read_answers`.
    """
    submission, answers = read_answers(submission_path), read_answers(answers_path)
    if "person" in answers and (answers.person == "").any():
        first = (answers.person == "").idxmax()
        raise InputError(f"{answers_path}: no person for {first}; expected one in every row, or no "
                         f"column person")
    for path, extra, other in [
        (submission_path, submission.index.difference(answers.index), answers_path),
        (answers_path, answers.index.difference(submission.index), submission_path),
    ]:
        if len(extra):
            raise InputError(f"{path}: {len(extra)} ImageIDs are not in {other}, such as "
                             f"{extra[0]}; expected the same ids in both")
    return answers.rename(columns={"ans": "label"}).assign(
        ans=submission["ans"].reindex(answers.index))


def read_answers(path):
    """Return the column `ans` (int) of a submission or answer file, indexed by ImageID.

    Raises:
        InputError: for a missing column, a repeated ImageID, or an ans that is not 0..17.
    """
    table = read_table(path, ["ImageID", "ans"], key="ImageID")
    return _classes_as_int(table, "ans", path).set_index("ImageID")


def read_pooled(paths, columns=()):
    """Return the held-out predictions of one run or of all folds.

    Args:
        paths: results folders (their valid_predictions.csv, of the best checkpoint) or files.
        columns: columns that the files must have besides ImageID, person, label and ans.

    Returns:
        DataFrame indexed by ImageID, with label and ans (int), person, and p0..p17 (str).

    Raises:
        InputError: for a missing file or column, an invalid class, or a photo that was held out
            twice.
    """
    tables = []
    for path in paths:
        file = Path(path) / "valid_predictions.csv" if Path(path).is_dir() else Path(path)
        table = read_table(file, ["ImageID", "person", "label", "ans", *columns])
        table = _classes_as_int(_classes_as_int(table, "label", file), "ans", file)
        tables.append(table.assign(file=str(file)))
    # In folds of one split every photo is held out once.
    pooled = pd.concat(tables)
    repeated = pooled[pooled.ImageID.duplicated()]
    if len(repeated):
        row = repeated.iloc[0]
        raise InputError(f"{row.file}: {row.ImageID} was also held out in another of the "
                         f"{len(tables)} runs; expected the folds of one --n_folds and --seed")
    return pooled.set_index("ImageID")


def _classes_as_int(table, column, path):
    # Compared as text: "1.0" is refused, too.
    wrong = ~table[column].isin([str(label) for label in range(NUM_CLASSES)])
    if wrong.any():
        row, line = table[wrong].iloc[0], table.index[wrong][0]
        raise InputError(f"{path}, line {line}: {column} {row[column]!r} of {row.ImageID} is not "
                         f"valid; expected an integer 0..{NUM_CLASSES - 1}")
    return table.assign(**{column: table[column].astype(int)})


def main(argv=None):
    args = parse_args(argv)
    last = args.tables[-1]
    # Two csv files without labels are a submission and its answers; all else are held-out photos.
    has_labels = Path(last).is_dir() or "label" in read_table(last, []).columns
    is_submission = len(args.tables) == 2 and not has_labels
    if len(args.tables) == 1 and not has_labels:
        raise InputError(f"{last}: it has no labels; pass the answers, too: {script('f1.py')} "
                         f"{shlex.quote(last)} answers.csv")
    table = match(*args.tables) if is_submission else read_pooled(args.tables)
    print(report(table.label, table["ans"], table.get("person")))
    # The same photos and people: the interval is that of the difference.
    if args.against:
        if is_submission and len(args.against) > 1:
            raise InputError("--against: expected one submission; the answers are the same")
        other = match(args.against[0], last) if is_submission else read_pooled(args.against)
        print(compare(table, other, shlex.join(args.against)))


def compare(table, other, name):
    """Return a line: the gain in macro F1 over other predictions, with its paired interval.

    Raises:
        InputError: if the other predictions are for other photos, or have other labels.
    """
    if set(other.index) != set(table.index):
        raise InputError(f"--against {name}: predicts other photos ({len(other)} and "
                         f"{len(table)}); expected runs with the same data, --seed and --n_folds "
                         f"or --val_ratio")
    other = other.reindex(table.index)
    check_same_labels(f"--against {name}", table.label, other.label)
    people, number, unit = _units(table.get("person"), table)
    low, high = bootstrap_interval(table.label, table["ans"], people, other["ans"])
    gain = macro_f1(table.label, table["ans"]) - macro_f1(table.label, other["ans"])
    interval = describe_interval(low, high, number, unit, sign="+")
    return f"\ngain over {name}: {gain:+.4f}   {interval} (paired)"


def check_same_labels(name, labels, others):
    """Raise InputError if two Series of labels, with the same index, differ."""
    differ = labels.index[labels != others]
    if len(differ):
        raise InputError(f"{name}: {len(differ)} photos have another label there, such as "
                         f"{differ[0]}; expected runs with the same train.csv and --fix_labels")


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+", metavar="PATH",
                        help="submission.csv and answers.csv, or results folders of one recipe")
    parser.add_argument("--against", nargs="+", metavar="PATH",
                        help="another submission, or the results folders of another recipe")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_cli(main)
