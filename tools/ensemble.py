"""Find the weights of an ensemble's members on held-out photos, or vote over submissions.

    python -m tools.ensemble results/b4 results/vgg11    # each a run, or a folder with fold-*
    python -m tools.ensemble one.csv two.csv three.csv   # submissions: writes vote.csv

Shows how much the members differ. For runs it prints the inference command with the weights.
"""
import shlex
from pathlib import Path

import numpy as np
import pandas as pd

from core.cli import ArgumentParser, run_cli, script
from core.errors import InputError
from core.evaluation import describe_interval
from core.files import check_output, write_atomically
from core.labels import NUM_CLASSES, PROBABILITIES, decode, encode
from f1 import bootstrap_interval, check_same_labels, macro_f1, read_answers, read_pooled


def main(argv=None):
    args = parse_args(argv)
    files = [Path(member).is_file() for member in args.members]
    if all(files):
        vote_over_files(args.members, args.output or "vote.csv")
    elif any(files) or args.output:
        raise InputError("--output and csv files are for a vote; pass csv files only, or results "
                         "folders without --output")
    else:
        weigh_runs(args.members)


def vote_over_files(paths, output):
    """Write the vote of submissions (csv files with ImageID and ans), and how much they differ.

    Raises:
        InputError: if they have different ids, and as `read_answers` and `check_output`.
    """
    if any(Path(output).exists() and Path(output).samefile(path) for path in paths):
        raise InputError(f"--output {output}: is one of the submissions; choose another file")
    check_output(output)
    submissions = [read_answers(path)["ans"] for path in paths]
    ids = submissions[0].index
    for path, submission in zip(paths, submissions, strict=True):
        if set(submission.index) != set(ids):
            raise InputError(f"{path}: {len(submission)} ImageIDs, not those of {paths[0]} "
                             f"({len(ids)}); expected submissions for the same photos")
    answers = np.stack([submission.reindex(ids) for submission in submissions])
    vote, num_ties = majority_vote(answers)
    with write_atomically(output) as temporary:
        pd.DataFrame({"ImageID": ids, "ans": vote}).to_csv(temporary, index=False)
    print_differences([*paths, "the vote"], [*answers, vote])
    print(f"wrote {output}: {len(ids)} photos, {num_ties} ties decided by mask, gender and age")
    print(f"score it: {script('f1.py')} {shlex.quote(str(output))} answers.csv")


def majority_vote(answers):
    """Return (the class (N,) with the most votes, number of ties); answers (K, N) of 0..17.

    In a tie mask, gender and age are voted on separately. In a tie there, the first member that
    voted for one of the tied values decides.
    """
    def vote(values, size):
        counts = (values[..., None] == np.arange(size)).sum(axis=0)  # (N, size)
        photo, most = np.arange(len(counts)), counts.max(axis=1)
        # The first member whose value has the most votes.
        member = (counts[photo, values] == most).argmax(axis=0)
        return values[member, photo], (counts == most[:, None]).sum(axis=1) > 1

    classes, is_tied = vote(answers, NUM_CLASSES)
    parts = [vote(values, 3)[0] for values in decode(answers)]  # up to 3 values each
    return np.where(is_tied, encode(*parts), classes), int(is_tied.sum())


def print_differences(members, answers):
    """Print the fraction of the photos on which two members differ; answers: (N,) of each."""
    differ = pd.DataFrame([[(a != b).mean() for b in answers] for a in answers], members, members)
    print(f"\nfraction of the photos on which two members differ\n"
          f"{differ.to_string(float_format='{:.4f}'.format)}\n")


def weigh_runs(members):
    """Print the weights of results folders, how much they differ, and what they are worth."""
    runs = [find_runs(member) for member in members]
    truth, probabilities = read_members(runs)
    labels, people = truth.label.to_numpy(), truth.person.to_numpy()
    if truth.person.nunique() < 2:
        raise InputError(f"{members[0]}: its held-out photos show one person; weights need two "
                         f"people or more")
    likelihood = probabilities[:, np.arange(len(labels)), labels]
    weights = mixture_weights(likelihood)
    mean_answers = np.tensordot(weights, probabilities, 1).argmax(axis=1)
    answers = probabilities.argmax(axis=2)
    scores = [macro_f1(labels, answer) for answer in answers]

    # Each member by itself, and how much the members differ.
    print(f"{len(labels)} photos of {len(set(people))} people, held out by every member")
    print(pd.DataFrame({
        "member": members, "weight": weights, "macro F1": scores,
        "log loss": -np.log(np.maximum(likelihood, 1e-12)).mean(axis=1),
        "differs from the mean": (answers != mean_answers).mean(axis=1),
    }).to_string(index=False, float_format="{:.4f}".format))
    print_differences(members, answers)

    # The weighted mean, compared with the best member on the same people.
    best = answers[np.argmax(scores)]
    cross_fitted = cross_fitted_mean(probabilities, labels, people)
    for name, predictions in [
        ("equal weights", probabilities.mean(axis=0).argmax(axis=1)),
        ("these weights, fitted without the people they are scored on", cross_fitted),
    ]:
        low, high = bootstrap_interval(labels, predictions, people, best)
        score = macro_f1(labels, predictions)
        interval = describe_interval(low, high, truth.person.nunique(), sign="+")
        print(f"{name}: macro F1 {score:.4f}, {score - max(scores):+.4f} against the best member "
              f"({interval})")
    # The folds of a member share its weight.
    shares = [(str(folder), f"{weight / len(folders):.4f}")
              for weight, folders in zip(weights, runs, strict=True) for folder in folders]
    folders, shares = zip(*(pair for pair in shares if float(pair[1])), strict=True)
    print(f"next: {script('inference.py')} --model_dir {shlex.join(folders)} "
          f"--model_weights {' '.join(shares)}")


def mixture_weights(likelihood, num_steps=1000):
    """Return the weights (K,) of the members' mean that makes the true classes most likely.

    They are >= 0 and sum to 1. This is stacking of densities (Smyth & Wolpert 1999), by
    expectation maximization (Dempster et al. 1977); the likelihood is concave in the weights.

    Args:
        likelihood: (K, N) probability of the true class of each photo by each member.
    """
    likelihood = np.maximum(likelihood, 1e-12)
    weights = np.full(len(likelihood), 1 / len(likelihood))
    for _ in range(num_steps):
        # E step: each member's share in explaining a photo. M step: the mean of the shares.
        shares = weights[:, None] * likelihood
        weights = (shares / shares.sum(axis=0)).mean(axis=1)
    return weights


def cross_fitted_mean(probabilities, labels, people, num_groups=5):
    """Return the classes (N,) of the weighted mean; the weights for each fifth of the people are
    fitted on the other people.
    """
    group = np.unique(people, return_inverse=True)[1] % num_groups
    answers = np.empty(len(labels), dtype=int)
    for k in range(num_groups):
        rest = np.flatnonzero(group != k)
        weights = mixture_weights(probabilities[:, rest, labels[rest]])
        answers[group == k] = np.tensordot(weights, probabilities[:, group == k], 1).argmax(axis=1)
    return answers


def find_runs(folder):
    """Return the results folders of a member: the folder itself, or the fold-* in it.

    Raises:
        InputError: if there is none.
    """
    folder = Path(folder)
    is_run = (folder / "valid_predictions.csv").is_file()
    runs = [folder] if is_run else sorted(folder.glob("fold-*"))
    if not runs:
        raise InputError(f"{folder}: no valid_predictions.csv and no fold-* in it; expected the "
                         f"results folder of a run with validation")
    return runs


def read_members(runs):
    """Return the held-out photos and every member's probabilities for them.

    Args:
        runs: for each of K members the list of its results folders.

    Returns:
        (table with label and person, probabilities (K, N, 18)), photos in the same order.

    Raises:
        InputError: if the members held out different photos, or have other labels.
    """
    tables = [read_pooled(folders, PROBABILITIES) for folders in runs]
    first = tables[0]
    for folders, table in zip(runs, tables, strict=True):
        if set(table.index) != set(first.index):
            raise InputError(f"{folders[0]}: other photos were held out than by {runs[0][0]}; "
                             f"expected members with the same data, --seed and --n_folds or "
                             f"--val_ratio")
        check_same_labels(folders[0], first.label, table.label.reindex(first.index))
    probabilities = [table[PROBABILITIES].reindex(first.index).astype(float) for table in tables]
    return first, np.stack(probabilities)


def parse_args(argv=None):
    parser = ArgumentParser(prog="python -m tools.ensemble", description=__doc__.splitlines()[0])
    parser.add_argument("members", nargs="+", help="results folders, folders that hold the fold-* "
                                                   "of a recipe, or submissions (csv files)")
    parser.add_argument("--output", metavar="CSV", help="the vote's file (default: vote.csv)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_cli(main)
