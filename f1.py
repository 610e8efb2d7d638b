"""Macro F1 as the competition counts it, and where it was lost.

    python f1.py submission.csv answers.csv
    python f1.py results/fold-*                                    # pooled out-of-fold predictions
    python f1.py results/fold-* --against other/fold-*             # and what they gain on the same people

Rows are matched by ImageID. The interval comes from a bootstrap over people if answers.csv has a `person` column.
"""
import os
from pathlib import Path

import numpy as np
import pandas as pd

from errors import ArgumentParser, InputError, run
from layout import AGES, CLASS_NAMES, GENDERS, MASKS, NUM_CLASSES, PROBABILITIES, decode, read_table


def macro_f1(labels, predictions):
    """Macro F1 over all 18 classes, in [0, 1]: a class with no prediction and no truth counts 0."""
    return float(class_f1(labels, predictions).mean())


def class_f1(labels, predictions):
    """F1 of each of the 18 classes, (18,) in [0, 1], from labels and predictions (N,) of 0..17."""
    return _f1(labels, predictions, NUM_CLASSES)


def attribute_f1(labels, predictions):
    """Macro F1 of mask, gender and age by themselves: a dict of three numbers in [0, 1]."""
    pairs = zip(decode(np.asarray(labels)), decode(np.asarray(predictions)), strict=True)
    return {name: float(_f1(truth, guess, len(names)).mean())
            for (truth, guess), (name, names) in zip(pairs, {"mask": MASKS, "gender": GENDERS, "age": AGES}.items(), strict=True)}


def _f1(truth, guess, num_classes):
    from sklearn.metrics import f1_score  # slow to import, and not needed before there is something to score
    return f1_score(truth, guess, labels=range(num_classes), average=None, zero_division=0)


def bootstrap_interval(labels, predictions, people, baseline=None, num_draws=2000, seed=0):
    """95 % percentile interval of macro F1 by bootstrap over people (Efron & Tibshirani 1993, chapter 13).

    A person's photos stand or fall together: drawing photos one by one would make the interval far too narrow.

    Args:
        labels, predictions: (N,) of 0..17.
        people: (N,) a key of the person on each photo.
        baseline: (N,) other predictions for the same photos; the interval is then of the difference, predictions minus
            baseline, with the same people drawn for both (a paired bootstrap).

    Returns:
        (low, high), each in [0, 1], or in [-1, 1] for a difference.
    """
    _, person = np.unique(np.asarray(people), return_inverse=True)
    num_people = person.max() + 1
    times_drawn = np.random.default_rng(seed).multinomial(num_people, np.full(num_people, 1 / num_people), size=num_draws)
    scores = _drawn_macro_f1(labels, predictions, person, times_drawn)
    if baseline is not None:
        scores = scores - _drawn_macro_f1(labels, baseline, person, times_drawn)
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)


def _drawn_macro_f1(labels, predictions, person, times_drawn):
    """Macro F1 of each draw, from counts: labels, predictions, person (N,), times_drawn (draws, people)."""
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    counts = np.zeros((3, times_drawn.shape[1], NUM_CLASSES))  # truths, predictions and hits of each person in each class
    hits = labels == predictions
    np.add.at(counts[0], (person, labels), 1)
    np.add.at(counts[1], (person, predictions), 1)
    np.add.at(counts[2], (person[hits], labels[hits]), 1)
    truths, guesses, hits = times_drawn @ counts
    return (2 * hits / np.maximum(truths + guesses, 1)).mean(axis=1)


def tabulate(photos, probabilities):
    """Predictions of labelled photos: DataFrame of ImageID, person, label, ans and p0..p17, a row a photo."""
    ids = photos.person + "/" + photos.path.map(os.path.basename)
    table = pd.DataFrame({"ImageID": ids, "person": photos.person, "label": photos.label, "ans": probabilities.argmax(axis=1)})
    return table.join(pd.DataFrame(probabilities, columns=PROBABILITIES))


def score(predictions):
    """Metrics of a table of `tabulate`, over all its photos at once: numbers by name, and the list class_f1."""
    labels, answers = predictions.label.to_numpy(), predictions["ans"].to_numpy()
    likelihood = predictions[PROBABILITIES].to_numpy()[np.arange(len(labels)), labels]
    attributes = {f"{name}_f1": value for name, value in attribute_f1(labels, answers).items()}
    return {"log_loss": float(-np.log(np.maximum(likelihood, 1e-12)).mean()), "macro_f1": macro_f1(labels, answers),
            "accuracy": float((labels == answers).mean()), **attributes, "class_f1": class_f1(labels, answers).tolist()}


def report(labels, predictions, people=None):
    """A readable account of a prediction: macro F1 with its interval, accuracy, F1 per attribute and per class."""
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    over = "people" if people is not None else "photos (no person column: too narrow if people recur)"
    people = np.arange(len(labels)) if people is None else people
    low, high = bootstrap_interval(labels, predictions, people)
    lines = [f"macro F1 {macro_f1(labels, predictions):.4f}   95 % interval {low:.4f} .. {high:.4f} over "
             f"{len(set(people))} {over}",
             f"accuracy {(labels == predictions).mean():.2%} of {len(labels)} photos", ""]
    for (name, f1), names, truth, guess in zip(attribute_f1(labels, predictions).items(), (MASKS, GENDERS, AGES),
                                                  decode(labels), decode(predictions), strict=True):
        parts = ", ".join(f"{value} {part:.3f}" for value, part in zip(names, _f1(truth, guess, len(names)), strict=True))
        lines.append(f"{name:6s} F1 {f1:.4f}   {parts}")
    lines += ["", f"{'class':<29s} {'photos':>6s} {'predicted':>9s} {'F1':>6s}   most often taken for"]
    for label, f1 in enumerate(class_f1(labels, predictions)):
        wrong = predictions[(labels == label) & (predictions != label)]
        taken_for = np.bincount(wrong, minlength=NUM_CLASSES)
        confusion = f"{CLASS_NAMES[taken_for.argmax()]} ({taken_for.max()})" if len(wrong) else ""
        lines.append(f"{label:2d} {CLASS_NAMES[label]:<26s} {(labels == label).sum():6d} {(predictions == label).sum():9d} "
                     f"{f1:6.3f}   {confusion}".rstrip())
    return "\n".join(lines)


def match(submission_path, answers_path):
    """A submission and the answers as one table like `read_pooled`'s; InputError if their ids differ."""
    submission, answers = read_answers(submission_path), read_answers(answers_path)
    for name, extra, other in [(submission_path, submission.index.difference(answers.index), answers_path),
                               (answers_path, answers.index.difference(submission.index), submission_path)]:
        if len(extra):
            raise InputError(f"{name}: {len(extra)} ImageIDs are not in {other}, such as {extra[0]}; expected the same ids in both")
    if answers.empty:
        raise InputError(f"{answers_path}: no rows; expected one ImageID and ans a line")
    return answers.rename(columns={"ans": "label"}).assign(ans=submission["ans"].reindex(answers.index))


def read_answers(path):
    """The `ans` of a submission or answer file by ImageID, as a DataFrame with ans as int, indexed by ImageID.

    Raises:
        InputError: for a missing column, a repeated ImageID, or an ans that is not an integer 0..17.
    """
    table = read_table(path, ["ImageID", "ans"])
    repeated = table.ImageID[table.ImageID.duplicated()]
    if len(repeated):
        raise InputError(f"{path}: ImageID {repeated.iloc[0]!r} is repeated; expected each id once")
    return _with_classes(table, "ans", path).set_index("ImageID")


def read_pooled(paths):
    """Predictions of held-out photos, of one run or of all folds: ImageID as index, label, ans, person and p0..p17.

    Args:
        paths: results folders (their valid_predictions.csv, of the best checkpoint) or such files.

    Raises:
        InputError: for a missing file or column, a class that is none, or a photo that is held out twice.
    """
    tables = []
    for path in paths:
        file = Path(path) / "valid_predictions.csv" if Path(path).is_dir() else Path(path)
        table = read_table(file, ["ImageID", "person", "label", "ans"])
        tables.append(_with_classes(_with_classes(table, "label", file), "ans", file).assign(file=str(file)))
    pooled = pd.concat(tables)
    repeated = pooled[pooled.ImageID.duplicated()]
    if len(repeated):
        row = repeated.iloc[0]
        raise InputError(f"{row.file}: {row.ImageID} was held out in another of the {len(tables)} runs, too; expected the folds "
                         f"of one --n_folds and --seed")
    return pooled.set_index("ImageID")


def _with_classes(table, column, path):
    wrong = ~table[column].isin([str(label) for label in range(NUM_CLASSES)])
    if wrong.any():
        row = table[wrong].iloc[0]
        raise InputError(f"{path}: {column} {row[column]!r} of {row.ImageID} is not valid; expected an integer "
                         f"0..{NUM_CLASSES - 1}")
    return table.assign(**{column: table[column].astype(int)})


def main(argv=None):
    args = parse_args(argv)
    last = args.tables[-1]
    is_submission = len(args.tables) == 2 and not Path(last).is_dir() and "label" not in read_table(last, []).columns
    scored = match(*args.tables) if is_submission else read_pooled(args.tables)
    print(report(scored.label, scored["ans"], scored.get("person")))
    if args.against:
        other = match(args.against[0], last) if is_submission else read_pooled(args.against)
        if set(other.index) != set(scored.index):
            raise InputError(f"--against {args.against[0]}: other photos were held out ({len(other)} and {len(scored)}); expected "
                             f"runs with the same data, --seed and --n_folds or --val_ratio")
        baseline = other["ans"].reindex(scored.index)
        people = scored.get("person", pd.Series(scored.index))
        low, high = bootstrap_interval(scored.label, scored["ans"], people, baseline)
        gain = macro_f1(scored.label, scored["ans"]) - macro_f1(scored.label, baseline)
        print(f"\ngain over {args.against[0]}: {gain:+.4f}   95 % interval {low:+.4f} .. {high:+.4f}, "
              f"paired over {people.nunique()} people")


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+", help="submission.csv answers.csv, or results folders to pool the held-out photos of")
    parser.add_argument("--against", nargs="+", help="another submission, or results folders of another recipe, to compare with")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
