import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

from f1 import attribute_f1, bootstrap_interval, class_f1, macro_f1, report


def test_macro_f1_by_hand():
    # class 0: 1 hit, 1 miss, 1 false alarm -> 2/4; class 1: 0; class 2: 1 of 1 -> 1; the 15 others count 0
    assert macro_f1([0, 0, 2], [0, 1, 2]) == pytest.approx((2 / 3 + 0 + 1) / 18)
    assert macro_f1(np.arange(18), np.arange(18)) == 1


def test_absent_classes_count_zero():
    """Averaging over the classes that occur, scikit-learn's default, would read 1.0 here."""
    assert macro_f1([4, 4], [4, 4]) == pytest.approx(1 / 18)
    assert len(class_f1([4], [4])) == 18


def test_macro_f1_is_not_a_mean_over_batches():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 18, 640)
    guesses = np.where(rng.random(640) < 0.8, labels, rng.integers(0, 18, 640))
    batches = np.mean([f1_score(labels[i:i + 64], guesses[i:i + 64], average="macro") for i in range(0, 640, 64)])
    assert macro_f1(labels, guesses) == pytest.approx(f1_score(labels, guesses, average="macro"))
    assert abs(macro_f1(labels, guesses) - batches) > 0.003


def test_attribute_f1_by_hand():
    # 0 = wear male <30, 3 = wear female <30, 12 = not wear male <30
    scores = attribute_f1([0, 0, 3, 12], [0, 3, 3, 0])
    assert scores["mask"] == pytest.approx((2 * 3 / (2 * 3 + 1) + 0 + 0) / 3)
    assert scores["gender"] == pytest.approx((2 * 2 / (2 * 2 + 1) + 2 * 1 / (2 * 1 + 1)) / 2)
    assert scores["age"] == pytest.approx(1 / 3)


def test_interval_covers_the_truth_as_often_as_it_says():
    """Every person is all right or all wrong; 95 % intervals over people cover, those over photos would not."""
    rng = np.random.default_rng(0)
    hits = {"people": 0, "photos": 0}
    for _ in range(200):
        labels = np.tile(np.arange(18), (40, 1))
        wrong = rng.random(40) < 0.3
        guesses = np.where(wrong[:, None], (labels + 1) % 18, labels)
        people = np.repeat(np.arange(40), 18)
        for unit, keys in [("people", people), ("photos", np.arange(720))]:
            low, high = bootstrap_interval(labels.ravel(), guesses.ravel(), keys, num_draws=300)
            hits[unit] += low <= 0.7 <= high  # every class has precision and recall 0.7
    assert 0.88 <= hits["people"] / 200 <= 0.99
    assert hits["photos"] / 200 < 0.5


def test_interval_agrees_with_resampled_scikit_learn():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 18, 210)
    guesses = np.where(rng.random(210) < 0.6, labels, rng.integers(0, 18, 210))
    people = np.repeat(np.arange(30), 7)
    scores = []
    for _ in range(400):
        rows = np.concatenate([np.flatnonzero(people == p) for p in rng.integers(0, 30, 30)])
        scores.append(f1_score(labels[rows], guesses[rows], labels=range(18), average="macro", zero_division=0))
    assert bootstrap_interval(labels, guesses, people) == pytest.approx(np.percentile(scores, [2.5, 97.5]), abs=0.02)


def test_report_is_readable_and_rows_are_matched_by_id(command, tmp_path):
    pd.DataFrame({"ImageID": ["b.jpg", "a.jpg", "c.jpg"], "ans": [1, 0, 2]}).to_csv(tmp_path / "s.csv", index=False)
    answers = pd.DataFrame({"ImageID": ["a.jpg", "b.jpg", "c.jpg"], "ans": [0, 1, 5], "person": ["x", "x", "y"]})
    answers.to_csv(tmp_path / "a.csv", index=False)
    result = command("f1", "s.csv", "a.csv")
    assert result.returncode == 0, result.stderr
    assert f"macro F1 {2 / 18:.4f}" in result.stdout and "over 2 people" in result.stdout and "66.67% of 3 photos" in result.stdout
    assert "wear, female, >=60" in result.stdout and "wear, male, >=60 (1)" in result.stdout


def test_report_says_when_it_does_not_know_the_people():
    assert "over 2 photos" in report([0, 1], [0, 1])


def test_folds_are_pooled_and_compared_on_the_same_people(command, tmp_path):
    rng = np.random.default_rng(3)
    tables = {"a": [], "b": []}
    for fold in range(2):
        labels = np.tile(np.arange(18), 4)
        people = np.repeat([f"{fold}-{i}" for i in range(4)], 18)
        for run, wrong in [("a", 0.2), ("b", 0.4)]:
            guesses = np.where(rng.random(72) < wrong, (labels + 1) % 18, labels)
            ids = [f"{fold}-{i}.jpg" for i in range(72)]
            table = pd.DataFrame({"ImageID": ids, "person": people, "label": labels, "ans": guesses})
            (tmp_path / f"{run}-{fold}").mkdir()
            table.sample(frac=1, random_state=1).to_csv(tmp_path / f"{run}-{fold}" / "valid_predictions.csv", index=False)
            tables[run].append(table)
    scores = {run: f1_score(*pd.concat(parts)[["label", "ans"]].to_numpy().T, average="macro") for run, parts in tables.items()}
    result = command("f1", "a-0", "a-1", "--against", "b-0", "b-1")
    assert result.returncode == 0, result.stderr
    assert f"macro F1 {scores['a']:.4f}" in result.stdout and "over 8 people" in result.stdout
    assert f"gain over b-0: {scores['a'] - scores['b']:+.4f}" in result.stdout
    result = command("f1", "a-0", "a-0")
    assert result.returncode == 2 and "was held out in another" in result.stderr
    result = command("f1", "a-0", "--against", "b-1")
    assert result.returncode == 2 and "other photos were held out" in result.stderr


def test_paired_interval_agrees_with_resampled_scikit_learn():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 18, 210)
    one = np.where(rng.random(210) < 0.7, labels, rng.integers(0, 18, 210))
    other = np.where(rng.random(210) < 0.6, labels, rng.integers(0, 18, 210))
    people = np.repeat(np.arange(30), 7)
    gains = []
    for _ in range(300):
        rows = np.concatenate([np.flatnonzero(people == p) for p in rng.integers(0, 30, 30)])
        one_f1, other_f1 = (f1_score(labels[rows], guess[rows], labels=range(18), average="macro", zero_division=0)
                            for guess in (one, other))
        gains.append(one_f1 - other_f1)
    assert bootstrap_interval(labels, one, people, other) == pytest.approx(np.percentile(gains, [2.5, 97.5]), abs=0.02)
