"""Macro F1 as the competition counts it, and where it was lost.

    python f1.py submission.csv answers.csv

Rows are matched by ImageID. The interval comes from a bootstrap over people if answers.csv has a `person` column.
"""
import numpy as np
from sklearn.metrics import accuracy_score, f1_score

from dataset import AGES, CLASS_NAMES, GENDERS, MASKS, NUM_CLASSES, decode, read_table
from errors import ArgumentParser, InputError, run


def macro_f1(labels, predictions):
    """Macro F1 over all 18 classes, in [0, 1]: a class with no prediction and no truth counts 0."""
    return float(class_f1(labels, predictions).mean())


def class_f1(labels, predictions):
    """F1 of each of the 18 classes, (18,) in [0, 1], from labels and predictions (N,) of 0..17."""
    return f1_score(labels, predictions, labels=range(NUM_CLASSES), average=None, zero_division=0)


def attribute_f1(labels, predictions):
    """Macro F1 of mask, gender and age by themselves: a dict of three numbers in [0, 1]."""
    pairs = zip(decode(np.asarray(labels)), decode(np.asarray(predictions)), strict=True)
    return {name: float(f1_score(truth, guess, labels=range(n), average="macro", zero_division=0))
            for (truth, guess), (name, n) in zip(pairs, [("mask", 3), ("gender", 2), ("age", 3)], strict=True)}


def bootstrap_interval(labels, predictions, people, num_draws=2000, seed=0):
    """95 % percentile interval of macro F1 by bootstrap over people (Efron & Tibshirani 1993, chapter 13).

    A person's photos stand or fall together: drawing photos one by one would make the interval far too narrow.

    Args:
        labels, predictions: (N,) of 0..17.
        people: (N,) a key of the person on each photo.

    Returns:
        (low, high), each in [0, 1].
    """
    _, person = np.unique(np.asarray(people), return_inverse=True)
    num_people = person.max() + 1
    counts = np.zeros((3, num_people, NUM_CLASSES))  # truths, predictions and hits of each person in each class
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    hits = labels == predictions
    np.add.at(counts[0], (person, labels), 1)
    np.add.at(counts[1], (person, predictions), 1)
    np.add.at(counts[2], (person[hits], labels[hits]), 1)
    times_drawn = np.random.default_rng(seed).multinomial(num_people, np.full(num_people, 1 / num_people), size=num_draws)
    truths, guesses, hits = times_drawn @ counts
    scores = (2 * hits / np.maximum(truths + guesses, 1)).mean(axis=1)
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)


def report(labels, predictions, people=None):
    """A readable account of a prediction: macro F1 with its interval, accuracy, F1 per attribute and per class."""
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    over = "people" if people is not None else "photos (no person column: too narrow if people recur)"
    people = np.arange(len(labels)) if people is None else people
    low, high = bootstrap_interval(labels, predictions, people)
    lines = [f"macro F1 {macro_f1(labels, predictions):.4f}   95 % interval {low:.4f} .. {high:.4f} over "
             f"{len(set(people))} {over}",
             f"accuracy {accuracy_score(labels, predictions):.2%} of {len(labels)} photos", ""]
    for (name, score), names, truth, guess in zip(attribute_f1(labels, predictions).items(), (MASKS, GENDERS, AGES),
                                                  decode(labels), decode(predictions), strict=True):
        each = f1_score(truth, guess, labels=range(len(names)), average=None, zero_division=0)
        parts = ", ".join(f"{value} {f1:.3f}" for value, f1 in zip(names, each, strict=True))
        lines.append(f"{name:6s} F1 {score:.4f}   {parts}")
    lines += ["", f"{'class':<29s} {'photos':>6s} {'predicted':>9s} {'F1':>6s}   most often taken for"]
    for label, f1 in enumerate(class_f1(labels, predictions)):
        wrong = predictions[(labels == label) & (predictions != label)]
        taken_for = np.bincount(wrong, minlength=NUM_CLASSES)
        confusion = f"{CLASS_NAMES[taken_for.argmax()]} ({taken_for.max()})" if len(wrong) else ""
        lines.append(f"{label:2d} {CLASS_NAMES[label]:<26s} {(labels == label).sum():6d} {(predictions == label).sum():9d} "
                     f"{f1:6.3f}   {confusion}".rstrip())
    return "\n".join(lines)


def read_answers(path):
    """The `ans` of a submission or answer file by ImageID, as a DataFrame with ans as int, indexed by ImageID.

    Raises:
        InputError: for a missing column, a repeated ImageID, or an ans that is not an integer 0..17.
    """
    table = read_table(path, ["ImageID", "ans"])
    repeated = table.ImageID[table.ImageID.duplicated()]
    if len(repeated):
        raise InputError(f"{path}: ImageID {repeated.iloc[0]!r} is repeated; expected each id once")
    wrong = ~table["ans"].isin([str(label) for label in range(NUM_CLASSES)])
    if wrong.any():
        row = table[wrong].iloc[0]
        raise InputError(f"{path}: ans {row['ans']!r} of {row.ImageID} is not valid; expected an integer 0..{NUM_CLASSES - 1}")
    return table.assign(ans=table["ans"].astype(int)).set_index("ImageID")


def main(argv=None):
    args = parse_args(argv)
    submission, answers = read_answers(args.submission), read_answers(args.answers)
    for name, extra, other in [(args.submission, submission.index.difference(answers.index), args.answers),
                               (args.answers, answers.index.difference(submission.index), args.submission)]:
        if len(extra):
            raise InputError(f"{name}: {len(extra)} ImageIDs are not in {other}, such as {extra[0]}; expected the same ids in both")
    if answers.empty:
        raise InputError(f"{args.answers}: no rows; expected one ImageID and ans a line")
    predictions = submission["ans"].reindex(answers.index).to_numpy()
    people = answers["person"].to_numpy() if "person" in answers else None
    print(report(answers["ans"].to_numpy(), predictions, people))


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("submission", help="CSV with ImageID,ans to score")
    parser.add_argument("answers", help="CSV with the true ImageID,ans and, if known, person")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
