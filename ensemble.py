"""Weigh the members of an ensemble on the photos that they held out, and see how much they differ.

    python ensemble.py results/b4 results/vgg11 results/resnet       # each one run, or the folder of its fold-*

Prints the inference command with the weights found.
"""
import shlex
from pathlib import Path

import numpy as np
import pandas as pd

from errors import ArgumentParser, InputError, run
from f1 import bootstrap_interval, macro_f1, read_pooled
from layout import PROBABILITIES


def main(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("members", nargs="+", help="results folders, or folders that hold the fold-* of a recipe")
    members = parser.parse_args(argv).members
    runs = [find_runs(member) for member in members]
    truth, probabilities = read_members(runs)
    labels, people = truth.label.to_numpy(), truth.person.to_numpy()
    likelihood = probabilities[:, np.arange(len(labels)), labels]
    weights = mixture_weights(likelihood)
    vote = np.tensordot(weights, probabilities, 1).argmax(axis=1)
    answers = probabilities.argmax(axis=2)

    print(f"{len(labels)} photos of {len(set(people))} people, held out by every member")
    print(pd.DataFrame({
        "member": members, "weight": weights, "macro F1": [macro_f1(labels, answer) for answer in answers],
        "log loss": -np.log(np.maximum(likelihood, 1e-12)).mean(axis=1), "differs from the vote": (answers != vote).mean(axis=1),
    }).to_string(index=False, float_format="{:.4f}".format))
    differ = pd.DataFrame([[(a != b).mean() for b in answers] for a in answers], members, members)
    print(f"\nshare of photos on which two members differ\n{differ.to_string(float_format='{:.4f}'.format)}\n")

    best = answers[np.argmax([macro_f1(labels, answer) for answer in answers])]
    for name, predictions in [("equal weights", probabilities.mean(axis=0).argmax(axis=1)),
                              ("these weights, each fitted without the people it is scored on",
                               cross_fitted_vote(probabilities, labels, people))]:
        low, high = bootstrap_interval(labels, predictions, people, best)
        score, alone = macro_f1(labels, predictions), macro_f1(labels, best)
        print(f"{name}: macro F1 {score:.4f}, {score - alone:+.4f} against the best member ({low:+.4f} .. {high:+.4f})")
    shares = [f"{weight / len(folders):.4f}" for weight, folders in zip(weights, runs, strict=True) for _ in folders]
    folders = [shlex.quote(str(folder)) for folders in runs for folder in folders]
    print(f"next: python inference.py --model_dir {' '.join(folders)} --model_weights {' '.join(shares)}")


def mixture_weights(likelihood, num_steps=1000):
    """Weights (K,), >= 0 and summing to 1, whose mean of the members' probabilities makes the truth most likely.

    The likelihood is concave in the weights; expectation maximization (Dempster et al. 1977) climbs it without a step size. It
    is stacking (Wolpert 1992) in the form of Smyth & Wolpert 1999.

    Args:
        likelihood: (K, N) probability that each member gives to the true class of each held-out photo.
    """
    likelihood = np.maximum(likelihood, 1e-12)
    weights = np.full(len(likelihood), 1 / len(likelihood))
    for _ in range(num_steps):
        shares = weights[:, None] * likelihood
        weights = (shares / shares.sum(axis=0)).mean(axis=1)
    return weights


def cross_fitted_vote(probabilities, labels, people, num_groups=5):
    """Answers (N,) of the weighted vote, the weights for each fifth of the people fitted on the others."""
    group = np.unique(people, return_inverse=True)[1] % num_groups
    answers = np.empty(len(labels), dtype=int)
    for k in range(num_groups):
        rest = np.flatnonzero(group != k)
        weights = mixture_weights(probabilities[:, rest, labels[rest]])
        answers[group == k] = np.tensordot(weights, probabilities[:, group == k], 1).argmax(axis=1)
    return answers


def find_runs(folder):
    """The results folders of a member: the folder itself, or the fold-* in it; InputError if there are none."""
    folder = Path(folder)
    runs = [folder] if (folder / "valid_predictions.csv").is_file() else sorted(folder.glob("fold-*"))
    if not runs:
        raise InputError(f"{folder}: no valid_predictions.csv and no fold-* in it; expected the results folder of a run with "
                         f"validation")
    return runs


def read_members(runs):
    """What each member held out: (table with label and person, probabilities (K, N, 18)), photos in one order.

    Raises:
        InputError: if the members did not hold out the same photos, or a file has no probabilities.
    """
    tables = [read_pooled(folders) for folders in runs]
    first = tables[0]
    for folders, table in zip(runs, tables, strict=True):
        if set(table.index) != set(first.index):
            raise InputError(f"{folders[0]}: other photos were held out than by {runs[0][0]}; expected members with the same data, "
                             f"--seed and --n_folds or --val_ratio")
        missing = [column for column in PROBABILITIES if column not in table]
        if missing:
            raise InputError(f"{folders[0]}: its valid_predictions.csv has no column {missing[0]}; expected one of train.py")
    return first, np.stack([table[PROBABILITIES].reindex(first.index).astype(float).to_numpy() for table in tables])


if __name__ == "__main__":
    run(main)
