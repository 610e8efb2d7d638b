"""Macro F1, its intervals and the report, against numbers by hand and scikit-learn."""
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score
from torch import nn

from core.checkpoint import TrainerState, save_checkpoint
from core.errors import InputError
from core.labels import PROBABILITIES
from f1 import (
    attribute_f1,
    bootstrap_interval,
    class_f1,
    compare,
    macro_f1,
    match,
    report,
    score,
    summarize,
)


def test_macro_f1_by_hand():
    # Class 0: one hit and one miss, so 2/3. Class 1: one false positive, so 0. Class 2: 1.
    # The 15 other classes count 0.
    assert macro_f1([0, 0, 2], [0, 1, 2]) == pytest.approx((2 / 3 + 0 + 1) / 18)
    assert macro_f1(np.arange(18), np.arange(18)) == 1


def test_absent_classes_count_zero():
    """scikit-learn's default, the mean over the classes that occur, would be 1.0 here."""
    assert macro_f1([4, 4], [4, 4]) == pytest.approx(1 / 18)
    assert len(class_f1([4], [4])) == 18


def test_macro_f1_is_not_a_mean_over_batches():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 18, 640)
    guesses = np.where(rng.random(640) < 0.8, labels, rng.integers(0, 18, 640))
    mean_of_batches = np.mean([f1_score(labels[i:i + 64], guesses[i:i + 64], average="macro")
                               for i in range(0, 640, 64)])
    expected = f1_score(labels, guesses, average="macro")
    assert macro_f1(labels, guesses) == pytest.approx(expected)
    assert abs(expected - mean_of_batches) > 0.003


def test_attribute_f1_by_hand():
    # 0 = wear male <30, 3 = wear female <30, 12 = not wear male <30
    scores = attribute_f1([0, 0, 3, 12], [0, 3, 3, 0])
    assert scores["mask"] == pytest.approx((2 * 3 / (2 * 3 + 1) + 0 + 0) / 3)
    assert scores["gender"] == pytest.approx((2 * 2 / (2 * 2 + 1) + 2 * 1 / (2 * 1 + 1)) / 2)
    assert scores["age"] == pytest.approx(1 / 3)


def test_95_percent_interval_over_people_contains_the_truth_in_95_percent_of_cases():
    """All photos of a person are right, or all are wrong: an interval over photos is too narrow."""
    rng = np.random.default_rng(0)
    covered = {"people": 0, "photos": 0}
    for _ in range(200):
        labels = np.tile(np.arange(18), (40, 1))
        wrong = rng.random(40) < 0.3
        guesses = np.where(wrong[:, None], (labels + 1) % 18, labels)
        people = np.repeat(np.arange(40), 18)
        for unit, keys in [("people", people), ("photos", np.arange(720))]:
            low, high = bootstrap_interval(labels.ravel(), guesses.ravel(), keys, num_draws=300)
            covered[unit] += low <= 0.7 <= high  # every class has precision and recall 0.7
    assert 0.88 <= covered["people"] / 200 <= 0.99
    assert covered["photos"] / 200 < 0.5


def sklearn_macro_f1(labels, guesses):
    return f1_score(labels, guesses, labels=range(18), average="macro", zero_division=0)


def drawn_rows(people, rng, count):
    """Yield the rows of 30 people drawn with replacement, `count` times."""
    for _ in range(count):
        yield np.concatenate([np.flatnonzero(people == p) for p in rng.integers(0, 30, 30)])


def test_interval_agrees_with_resampled_scikit_learn():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 18, 210)
    guesses = np.where(rng.random(210) < 0.6, labels, rng.integers(0, 18, 210))
    people = np.repeat(np.arange(30), 7)
    scores = [sklearn_macro_f1(labels[rows], guesses[rows])
              for rows in drawn_rows(people, rng, 400)]
    expected = np.percentile(scores, [2.5, 97.5])
    assert bootstrap_interval(labels, guesses, people) == pytest.approx(expected, abs=0.02)


def test_report_is_readable_and_rows_are_matched_by_id(command, tmp_path):
    (tmp_path / "s.csv").write_text("ImageID,ans\nb.jpg,1\na.jpg,0\nc.jpg,2\n")
    (tmp_path / "a.csv").write_text("ImageID,ans,person\na.jpg,0,x\nb.jpg,1,x\nc.jpg,5,y\n")
    result = command("f1", "s.csv", "a.csv")
    assert result.returncode == 0, result.stderr
    for text in (f"macro F1 {2 / 18:.4f}", "no interval: 2 people are too few",
                 "66.67% of 3 photos", "wear, female, >=60", "wear, male, >=60 (1)"):
        assert text in result.stdout


def test_report_says_that_its_interval_is_over_photos_if_the_people_are_unknown():
    labels = np.arange(18)
    assert "over 18 photos (no person column" in report(labels, labels)
    table = pd.DataFrame({"label": labels, "ans": labels})
    assert "over 18 photos (no person column" in compare(table, table, "other.csv")


def test_the_interval_of_perfect_predictions_does_not_hang_on_who_is_drawn():
    """Half of the people are the only ones of their class: most draws lack some of them."""
    labels = np.append(np.arange(15), np.zeros(15, int))
    assert summarize(labels, labels, np.arange(30)) == pytest.approx((15 / 18,) * 3)


def test_a_comparison_with_other_labels_is_refused():
    table = pd.DataFrame({"label": [0, 1], "ans": [0, 1], "person": ["p", "q"]}, index=["a", "b"])
    with pytest.raises(InputError, match=r"^--against x: 1 photos have another label there, such "
                                         r"as b"):
        compare(table, table.assign(label=[0, 2])[::-1], "x")


def test_written_probabilities_give_the_same_log_loss(tmp_path):
    """With six decimals 4e-7 would be 0, which counts 27.6."""
    probabilities = np.array([[4e-7] + [(1 - 4e-7) / 17] * 17] * 2)
    table = pd.DataFrame({"ImageID": ["a", "b"], "person": "p", "label": 0, "ans": 1}).join(
        pd.DataFrame(probabilities, columns=PROBABILITIES))
    folder = save_checkpoint(tmp_path, nn.Linear(1, 1), {}, TrainerState(), table, {})
    written = pd.read_csv(folder / "valid_predictions.csv")
    assert score(written)["log_loss"] == pytest.approx(-np.log(4e-7), abs=1e-4)


def test_answers_with_a_row_without_a_person_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("ImageID,ans,person\na,1,p\nb,2,\n")
    with pytest.raises(InputError, match=r"a\.csv: no person for b; expected"):
        match(tmp_path / "a.csv", tmp_path / "a.csv")


def test_folds_are_pooled_and_compared_on_the_same_people(command, tmp_path):
    rng = np.random.default_rng(3)
    tables = {"a": [], "b": []}
    for fold in range(2):
        labels = np.tile(np.arange(18), 6)
        people = np.repeat([f"{fold}-{i}" for i in range(6)], 18)
        for run, wrong in [("a", 0.2), ("b", 0.4)]:
            guesses = np.where(rng.random(108) < wrong, (labels + 1) % 18, labels)
            ids = [f"{fold}-{i}.jpg" for i in range(108)]
            table = pd.DataFrame({"ImageID": ids, "person": people, "label": labels,
                                  "ans": guesses})
            folder = tmp_path / f"{run}-{fold}"
            folder.mkdir()
            shuffled = table.sample(frac=1, random_state=1)
            shuffled.to_csv(folder / "valid_predictions.csv", index=False)
            tables[run].append(table)
    pooled = {run: pd.concat(parts) for run, parts in tables.items()}
    scores = {run: sklearn_macro_f1(table.label, table["ans"]) for run, table in pooled.items()}
    result = command("f1", "a-0", "a-1", "--against", "b-0", "b-1")
    assert result.returncode == 0, result.stderr
    assert f"macro F1 {scores['a']:.4f}" in result.stdout and "over 12 people" in result.stdout
    assert f"gain over b-0 b-1: {scores['a'] - scores['b']:+.4f}" in result.stdout
    result = command("f1", "a-0", "a-0")
    assert result.returncode == 2 and "was also held out in another" in result.stderr
    result = command("f1", "a-0", "--against", "b-1")
    assert result.returncode == 2 and "--against b-1: predicts other photos" in result.stderr


def test_paired_interval_agrees_with_resampled_scikit_learn():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 18, 210)
    one = np.where(rng.random(210) < 0.7, labels, rng.integers(0, 18, 210))
    other = np.where(rng.random(210) < 0.6, labels, rng.integers(0, 18, 210))
    people = np.repeat(np.arange(30), 7)
    gains = [sklearn_macro_f1(labels[rows], one[rows]) - sklearn_macro_f1(labels[rows], other[rows])
             for rows in drawn_rows(people, rng, 300)]
    expected = np.percentile(gains, [2.5, 97.5])
    assert bootstrap_interval(labels, one, people, other) == pytest.approx(expected, abs=0.02)
