"""tools.ensemble: the weights of the members, and what it says about them."""
import re

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar

from core.labels import PROBABILITIES
from tools.ensemble import majority_vote, mixture_weights


def write_member(folder, labels, people, sharpness, rng):
    """Write a valid_predictions.csv as train.py does; return its probabilities (N, 18).

    The logits are noise, plus `sharpness` for the true class.
    """
    logits = rng.normal(size=(len(labels), 18))
    logits[np.arange(len(labels)), labels] += sharpness
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    folder.mkdir(parents=True)
    ids = [f"{i}.jpg" for i in range(len(labels))]
    table = pd.DataFrame({"ImageID": ids, "person": people, "label": labels, "ans": p.argmax(1)})
    table = table.join(pd.DataFrame(p, columns=PROBABILITIES))
    table.to_csv(folder / "valid_predictions.csv", index=False)
    return p


def test_members_with_one_person_or_with_other_labels_are_refused(command, tmp_path):
    rng, labels = np.random.default_rng(0), np.arange(18)
    write_member(tmp_path / "one", labels, ["p"] * 18, 3, rng)
    result = command("tools.ensemble", "one", "one")
    assert result.returncode == 2 and "error: one: its held-out photos show one" in result.stderr
    write_member(tmp_path / "two", labels, list("pq") * 9, 3, rng)
    result = command("tools.ensemble", "two", "two")  # a repeated member is not lost
    assert "--model_dir two two --model_weights 0.5000 0.5000" in result.stdout
    write_member(tmp_path / "other", labels[::-1], list("pq") * 9, 3, rng)
    result = command("tools.ensemble", "two", "other")
    assert result.returncode == 2
    assert "error: other: 18 photos have another label there" in result.stderr


def test_weights_agree_with_another_optimizer():
    likelihood = np.random.default_rng(0).beta(2, 2, (2, 500)) * [[1.0], [0.8]]

    def log_loss(w):
        return -np.log(w * likelihood[0] + (1 - w) * likelihood[1]).sum()

    best = minimize_scalar(log_loss, bounds=(0, 1), method="bounded").x
    assert mixture_weights(likelihood) == pytest.approx([best, 1 - best], abs=1e-3)
    # A member that is never better gets no weight.
    never_better = np.stack([likelihood[0], 0.5 * likelihood[0]])
    assert mixture_weights(never_better) == pytest.approx([1, 0], abs=1e-6)


def test_output_has_weights_and_differences_and_the_inference_command(command, tmp_path):
    rng = np.random.default_rng(0)
    labels, people = np.tile(np.arange(18), 20), np.repeat([f"p{i}" for i in range(20)], 18)
    good = write_member(tmp_path / "good", labels, people, 3, rng)
    other = write_member(tmp_path / "other", labels, people, 2.5, rng)
    # A member that is never better gets no weight, and is not in the command.
    table = pd.read_csv(tmp_path / "good/valid_predictions.csv")
    (tmp_path / "worse").mkdir()
    table[PROBABILITIES] /= 2
    table.to_csv(tmp_path / "worse/valid_predictions.csv", index=False)
    result = command("tools.ensemble", "good", "worse", "other")
    assert result.returncode == 0, result.stderr
    assert "360 photos of 20 people" in result.stdout
    differ = (good.argmax(1) != other.argmax(1)).mean()
    assert re.search(rf"good +0\.0000 +0\.0000 +{differ:.4f}", result.stdout)
    found = re.search(r"--model_dir good other --model_weights (.*)", result.stdout)[1]
    weights = [float(weight) for weight in found.split()]
    assert sum(weights) == pytest.approx(1, abs=1e-3) and weights[0] > weights[1] > 0
    vote = np.tensordot(weights, [good, other], 1).argmax(1)
    differs = (vote != good.argmax(1)).mean()
    assert re.search(rf"good +\S+ +\S+ +\S+ +{differs:.4f}", result.stdout)


def test_members_must_have_held_out_the_same_photos(command, tmp_path):
    rng = np.random.default_rng(0)
    labels, people = np.arange(18), np.repeat(["a", "b"], 9)
    write_member(tmp_path / "one/fold-0", labels, people, 3, rng)
    write_member(tmp_path / "two/fold-0", labels[:9], people[:9], 3, rng)
    result = command("tools.ensemble", "one", "two")
    assert result.returncode == 2
    assert "two/fold-0: other photos were held out than by one/fold-0" in result.stderr
    result = command("tools.ensemble", "none")
    assert result.returncode == 2 and "none: no valid_predictions.csv" in result.stderr


def test_a_tie_is_decided_by_mask_gender_and_age_and_then_by_the_first_member():
    # class = mask * 6 + gender * 3 + age; one column per photo, one row per member.
    answers = np.array([
        [7, 0, 0, 17, 5],
        [7, 4, 17, 0, 8],
        [1, 7, 0, 0, 5],
        [2, 16, 17, 17, 17],
    ])
    # 7 and 5: two of four. Mask, gender, age of the second photo: (0,0,0) (0,1,1) (1,0,1) (2,1,1);
    # mask 0, gender of the first member, age 1: a class that nobody predicted. Two against two in
    # every attribute: the first member.
    assert [list(part) if np.ndim(part) else part for part in majority_vote(answers)] == [
        [7, 1, 0, 17, 5], 3]
    # Mask 0 and 2 are tied, gender 1 and age 2 are not.
    assert list(majority_vote(np.array([[4], [17], [5], [14]]))[0]) == [5]


def write_submission(path, ids, answers):
    pd.DataFrame({"ImageID": ids, "ans": answers}).to_csv(path, index=False)


def test_vote_over_submissions_in_any_order(command, tmp_path):
    ids = ["007", "NA", "b.jpg", "a.jpg"]
    write_submission(tmp_path / "one.csv", ids, [3, 3, 3, 3])
    write_submission(tmp_path / "two.csv", ids[::-1], [9, 3, 4, 4])
    write_submission(tmp_path / "three.csv", ids, [4, 5, 4, 9])
    write_submission(tmp_path / "answers.csv", ids, [4, 4, 4, 4])
    files = ["one.csv", "two.csv", "three.csv"]
    result = command("tools.ensemble", *files, "--output", "out.csv")
    assert result.returncode == 0, result.stderr
    # 3 4 4; 3 4 5 is a tie, of the ages, too; 3 3 4; 3 9 9
    assert (tmp_path / "out.csv").read_text() == "ImageID,ans\n007,4\nNA,3\nb.jpg,3\na.jpg,9\n"
    assert "wrote out.csv: 4 photos, 1 ties" in result.stdout
    assert re.search(r"two.csv +0\.7500 +0\.0000 +0\.5000 +0\.2500\n", result.stdout)
    assert "f1.py out.csv answers.csv" in result.stdout
    assert "accuracy 25.00%" in command("f1", "out.csv", "answers.csv").stdout

    (tmp_path / "results").mkdir()
    write_submission(tmp_path / "short.csv", ids[1:], [4, 5, 4])
    for argv, message in [
        (["one.csv", "short.csv"], "short.csv: 3 ImageIDs, not those of one.csv (4)"),
        (["one.csv", "results"], "pass csv files only"),
        (["results", "--output", "out.csv"], "pass csv files only"),
        ([*files, "--output", "two.csv"], "two.csv: is one of the submissions"),
        (["one.csv", "--output", "results"], "results: is a folder"),
    ]:
        result = command("tools.ensemble", *argv)
        assert result.returncode == 2 and message in result.stderr, result.stderr
    assert not (tmp_path / "vote.csv").exists()
    assert len((tmp_path / "two.csv").read_text().splitlines()) == 5
