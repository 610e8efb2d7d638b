"""tools.check_labels: planted label errors are found, ranked, and shown."""
import re
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
from conftest import SHOTS
from PIL import Image

from core.labels import GENDERS, MASK_OF_SHOT, PROBABILITIES, age_band, encode
from tools.check_labels import find_errors


def write_folds(folder, people, planted):
    """Write fold-0 and fold-1 with held-out predictions of these people.

    Each photo has probability 0.9 for one class: that of its label, or the one that `planted` gives
    for (person, shot).
    """
    for fold in (0, 1):
        rows = []
        for person in people[fold::2]:
            _, gender, _, age = person.split("_")
            for shot in SHOTS:
                label = encode(MASK_OF_SHOT[shot], GENDERS.index(gender), int(age_band(int(age))))
                p = np.full(18, 0.1 / 17)
                p[planted.get((person, shot), label)] = 0.9
                rows.append([f"{person}/{shot}.jpg", person, label, p.argmax(), *p])
        (folder / f"fold-{fold}").mkdir(parents=True)
        columns = ["ImageID", "person", "label", "ans", *PROBABILITIES]
        pd.DataFrame(rows, columns=columns).to_csv(folder / f"fold-{fold}/valid_predictions.csv",
                                                   index=False)


def plant(people):
    """Return predictions that contradict the labels of four people, one for each kind."""
    # Women of 22 .. 25 and 45 .. 48, men of the same ages.
    gender, age, swap, photo = (people[i] for i in (0, 2, 5, 7))
    wrong = {(gender, shot): encode(MASK_OF_SHOT[shot], 0, 0) for shot in SHOTS}
    wrong |= {(age, shot): encode(MASK_OF_SHOT[shot], 1, 0) for shot in SHOTS}
    wrong |= {(swap, "incorrect_mask"): encode(2, 0, 0), (swap, "normal"): encode(1, 0, 0)}
    wrong |= {(photo, "mask3"): encode(0, 1, 2)}
    return wrong


def people_of(dataset):
    return sorted(path.name for path in (dataset / "train/images").iterdir())


def test_planted_errors_are_found_and_shown(command, dataset, tmp_path):
    people = people_of(dataset)
    write_folds(tmp_path / "results", people, plant(people))
    folds = ["results/fold-0", "results/fold-1"]
    result = command("tools.check_labels", *folds, "--data_dir", dataset)
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(tmp_path / "label_errors.csv").set_index("kind")
    assert list(table.index) == ["gender", "age", "swap", "photo"] and (table["rank"] == 1).all()
    assert list(table.person) == [people[i] for i in (0, 2, 5, 7)]
    assert list(table.photos) == ["normal.jpg", "normal.jpg", "incorrect_mask.jpg + normal.jpg",
                                  "mask3.jpg + normal.jpg"]
    assert list(table.label) == ["female", "30-59", "incorrect + not wear", "male, 30-59"]
    assert list(table.prediction) == ["male", "<30", "not wear + incorrect", "female, >=60"]
    rest = 0.1 / 17  # the probability of each other class
    assert table.score["gender"] == pytest.approx(9 * rest, abs=1e-5)
    below = NormalDist(int(people[2].split("_")[3]), 5).cdf(29.5)  # the true age, if the label errs
    assert table.score["age"] == pytest.approx(
        below * (0.9 + 5 * rest) + (1 - below) * 6 * rest, abs=2e-6)
    as_labelled, swapped = 6 * rest, 0.9 + 5 * rest
    assert table.score["swap"] == pytest.approx(
        as_labelled ** 2 / (as_labelled ** 2 + swapped ** 2), abs=1e-5)
    # 6 groups of gender and age; each class is in one of them with 3 mask states.
    high, low = 0.9 + 2 * rest, 3 * rest
    assert table.score["photo"] == pytest.approx(2 * (high * low) ** 0.5 + 4 * low, abs=1e-5)

    assert "gender     1  label_errors-gender.png" in result.stdout
    sizes = {kind: Image.open(tmp_path / f"label_errors-{kind}.png").size for kind in table.index}
    assert sizes["swap"][0] > 1.8 * sizes["gender"][0]  # two photos


def test_ages_near_the_edge_of_a_band_are_less_suspicious():
    """A label of 31 and a prediction of under 30 do not contradict each other; one of 50 does."""
    people = np.repeat([f"p{years}" for years in (31, 38, 50)], 7)
    mask = np.array([MASK_OF_SHOT[shot] for shot in SHOTS * 3])
    p = np.full((21, 18), 0.1 / 17)
    p[np.arange(21), encode(mask, 0, 0)] = 0.9
    table = pd.DataFrame(p, columns=PROBABILITIES, index=np.char.add(people, SHOTS * 3))
    table = table.assign(person=people, label=encode(mask, 0, 1))
    years = pd.Series(np.repeat([31, 38, 50], 7), index=table.index)
    errors = find_errors(table, years)
    assert list(errors.person) == ["p50", "p38", "p31"] and set(errors.kind) == {"age"}
    # By hand: P(age < 29.5) is that of (29.5 - 31) / 5 = -0.3 standard deviations, 0.382.
    low, high = 6 * 0.1 / 17, 0.9 + 5 * 0.1 / 17
    assert errors.score[2] == pytest.approx(0.382 * high + 0.618 * low, abs=1e-3)
    # Without the years all three are equal: the probability of the labelled band.
    assert find_errors(table).score.tolist() == pytest.approx([low] * 3)


def test_without_the_dataset_there_is_a_table_and_a_line_that_says_so(command, dataset, tmp_path):
    people = people_of(dataset)
    write_folds(tmp_path / "results", people, plant(people))
    folds = ["results/fold-0", "results/fold-1"]
    result = command("tools.check_labels", *folds, "--output", "out.csv")
    assert result.returncode == 0, result.stderr
    assert "no sheets of photos" in result.stdout and "pass --data_dir" in result.stdout
    table = pd.read_csv(tmp_path / "out.csv").set_index("kind")
    assert table.score["age"] == pytest.approx(6 * 0.1 / 17, abs=1e-5)
    assert not list(tmp_path.glob("*.png"))
    for argv, message in [
        (["results"], "results/valid_predictions.csv: cannot be read"),
        (["results/fold-0", "results/fold-0"], "was also held out"),
        (["results/fold-0", "--output", "results"], "results: is a folder"),
        (["results/fold-0", "--data_dir", "nowhere"], "nowhere: no such folder"),
    ]:
        result = command("tools.check_labels", *argv)
        assert result.returncode == 2 and message in result.stderr, result.stderr
    write_folds(tmp_path / "others", ["1_male_Asian_20", "2_male_Asian_20"], {})
    result = command("tools.check_labels", "others/fold-0", "--data_dir", dataset)
    assert result.returncode == 2 and "expected the dataset of the runs" in result.stderr


def test_the_dataset_of_a_run_is_found(command, trained, tmp_path):
    """On real held-out predictions: kinds are ranked one after another."""
    result = command("tools.check_labels", trained, "--count", "3")
    assert result.returncode == 0 and "warning" not in result.stdout, result.stderr
    table = pd.read_csv(tmp_path / "label_errors.csv")
    for kind, rows in table.groupby("kind"):
        assert rows.score.is_monotonic_increasing and rows.score.between(0, 1).all()
        assert list(rows["rank"]) == list(range(1, len(rows) + 1))
        assert re.search(rf"{kind} +{len(rows)}  label_errors-{kind}\.png", result.stdout)
