"""The model card of a run: its numbers, its pictures, and when it is written."""
import re
import shlex
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import FAST
from huggingface_hub import ModelCard
from scipy.stats import bootstrap
from sklearn.metrics import accuracy_score, f1_score

import core.report
import train
from core.card import describe_groups
from core.evaluation import bootstrap_rates, calibration, largest_gap
from core.labels import encode
from core.layout import read_train
from f1 import score


def test_the_hub_reads_the_card_and_its_numbers_are_those_of_the_predictions(trained):
    card = ModelCard.load(trained / "README.md")
    predictions = pd.read_csv(trained / "valid_predictions.csv")
    labels, answers = predictions.label, predictions["ans"]
    expected = {"macro F1": f1_score(labels, answers, labels=range(18), average="macro",
                                     zero_division=0),
                "accuracy": accuracy_score(labels, answers)}
    assert {result.metric_name: result.metric_value for result in card.data.eval_results} == (
        pytest.approx(expected, abs=1e-4))
    assert card.data.library_name == "timm"
    assert f"| macro F1 over 18 classes | {expected['macro F1']:.3f} |" in card.text  # 5 people
    # A row for each group of people, and a column for each mask state and for all photos.
    person = predictions.groupby((labels // 3 % 2 == 1) & (labels % 3 == 0)).get_group(True)
    right = person.label == person["ans"]
    by_state = [right[person.label // 6 == state].mean() for state in range(3)]
    cells = " | ".join(f"{value:.2f}" for value in [*by_state, right.mean()])
    assert f"| female, <30 | {person.person.nunique()} | {cells} |" in card.text
    # 24 people, 4 in each group; validation takes 5 of them.
    counts = [re.search(rf"\| {name} \| (.*) \|\n", card.text)[1].split(" | ")
              for name in ("training", "validation")]
    assert counts[0][:2] == ["133", "19"] and counts[1][:2] == ["35", "5"]
    assert [int(a) + int(b) for a, b in zip(*counts, strict=True)][2:] == [4] * 6


def test_the_card_warns_of_photos_and_links_only_files_that_exist(trained):
    text = (trained / "README.md").read_text()
    links = re.findall(r"\]\((.*?)\)", text)
    assert set(links) == {"curves.png", "confusion_matrix.png", "worst_mistakes.png",
                          "reliability.png"}
    assert all((trained / link).is_file() for link in links)
    assert "holds photos of people" in text and "![The worst" not in text
    assert "<img" not in text and "http" not in text


def test_the_recipe_of_the_card_is_a_command_with_the_flags_of_the_run(trained):
    text = (trained / "README.md").read_text()
    command = text.split("## Recipe\n\n")[1].split("\n\n## ")[0].replace("\\\n", " ")
    words = shlex.split(command)
    assert words[1].endswith("train.py")
    assert words[2:] == shlex.split((trained / "args.txt").read_text())


def test_the_card_is_written_again_after_each_best_evaluation(dataset, tmp_path, monkeypatch):
    """In one process, so that the minute between two cards can be shortened."""
    written = []

    def record(output_dir, folder, state, *others):
        written.append(state.step)
        assert folder.name == f"checkpoint-{state.best_step}"
        assert pd.read_csv(output_dir / "valid_predictions.csv").equals(
            pd.read_csv(folder / "valid_predictions.csv"))
        raise ValueError("bug in\nthe card")

    lines, scores = [], iter([0.2, 0.1, 0.3])
    monkeypatch.setattr(train, "score", lambda table: score(table) | {"macro_f1": next(scores)})
    monkeypatch.setattr(core.report, "write_card", record)
    monkeypatch.setattr(core.report, "CARD_INTERVAL", 0)
    monkeypatch.setattr(core.report.log, "warning", lines.append)
    folder = tmp_path / "results"
    train.main(["--data_dir", str(dataset), *FAST, "--output_dir", str(folder), "--epochs", "1",
                "--eval_steps", "3"])
    # Not after step 6, and the run did not stop for the error.
    assert written == [3, 9]
    assert "no validation photo of wear, male, >=60; incorrect, male, >=60" in lines.pop(0)
    assert lines == [f"warning: {folder}: figures and README.md are incomplete (ValueError: bug in "
                     f"the card)"] * 2


def test_a_run_on_everyone_has_a_card_without_scores(command, dataset, tmp_path):
    result = command("train", "--data_dir", dataset, *FAST, "--epochs", "1", "--val_ratio", "0")
    assert result.returncode == 0 and "warning" not in result.stdout, result.stdout
    text = (tmp_path / "results/README.md").read_text()
    assert "without validation" in text and "## Groups" not in text
    assert ModelCard(text).data.eval_results is None
    assert "| validation | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 |" in text
    assert re.findall(r"\]\((.*?)\)", text) == ["curves.png"]


def test_a_readme_of_another_program_is_never_replaced_and_that_of_a_run_is(command, dataset,
                                                                           trained, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("mine")
    flags = ["--data_dir", dataset, *FAST, "--epochs", "1"]
    result = command("train", *flags, "--output_dir", "mine", "--overwrite")
    assert result.returncode == 2 and "holds README.md, which no run has written" in result.stderr
    assert (tmp_path / "mine/README.md").read_text() == "mine"
    folder = shutil.copytree(trained, tmp_path / "results")
    (folder / "README.md").write_text("of the old run")
    (folder / "reliability.png").write_text("of the old run")
    result = command("train", *flags, "--overwrite", "--val_ratio", "0")
    assert result.returncode == 0, result.stderr
    assert "checkpoint-9" not in (folder / "README.md").read_text()
    assert not (folder / "reliability.png").exists()


# --- groups and calibration ---

def test_intervals_of_a_group_agree_with_another_bootstrap():
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(60), 7)
    right = rng.random(420) < np.repeat(rng.beta(2, 1, 60), 7)
    rates = bootstrap_rates({"all": (right, np.ones(420, bool)), "few": (right, people < 9),
                             "none": (right, people < 0)}, people)
    expected = bootstrap((right.reshape(60, 7).mean(axis=1),), np.mean, n_resamples=5000,
                         method="percentile", random_state=1).confidence_interval
    low, high = map(float, re.search(r"\((.*) \.\. (.*)\)", rates.text["all"]).groups())
    assert (low, high) == pytest.approx(tuple(expected), abs=0.012)
    # 9 people are too few for an interval.
    assert list(rates.people) == [60, 9, 0] and rates.text["none"] == ""
    assert rates.text["few"] == f"{right[people < 9].mean():.2f}"


def test_the_gap_is_between_the_best_and_the_worst_group_with_enough_people():
    people = np.arange(50)
    group = np.repeat([0, 1, 2, 3], [20, 15, 10, 5])
    right = np.concatenate([np.ones(20), np.arange(15) < 9, np.arange(10) < 3, np.zeros(5)]) == 1
    rates = bootstrap_rates({name: (right, group == k) for k, name in enumerate("abcd")}, people)
    best, worst, difference, low, high = largest_gap(rates)
    assert (best, worst) == ("a", "c") and difference == pytest.approx(0.7)
    # a is always right; 3 of 10 people have a standard error of sqrt(0.3 * 0.7 / 10) = 0.145.
    assert (low, high) == pytest.approx((0.7 - 1.96 * 0.145, 0.7 + 1.96 * 0.145), abs=0.05)
    assert largest_gap(rates[2:]) is None


def test_races_are_compared_if_there_are_several(dataset):
    assert set(read_train(dataset).race) == {"Asian"}
    rng = np.random.default_rng(0)
    people = np.repeat([f"p{i}" for i in range(40)], 7)
    label = encode(np.tile([1, 0, 0, 0, 0, 0, 2], 40), np.repeat(np.arange(40) % 2, 7), 0)
    race = pd.Series(np.repeat(["A|B", ""], 140))
    wrong = (race == "") & (rng.random(280) < 0.5)
    predictions = pd.DataFrame({"person": people, "label": label,
                                "ans": np.where(wrong, label + 1, label)})
    text = describe_groups(predictions, race)
    share = 1 - wrong.sum() / 140
    assert "| A/B | 20 | 1.00 (1.00 .. 1.00) |" in text
    assert f"| unknown | 20 | {share:.2f} (" in text
    assert re.search(rf"race.*\*\*{1 - share:.2f} \(.*between A/B \(1\.00\) and unknown", text)
    assert "race" not in describe_groups(predictions, pd.Series(["A"] * 280))


def test_calibration_error_by_hand():
    confidence = [0.5, 0.52, 0.9, 0.92, 0.91, 0.98, 1.0]
    is_right = [True, False, True, True, False, True, True]
    # Bins of 1/15: (7/15, 8/15] has 2 photos, (13/15, 14/15] has 3, (14/15, 1] has 2.
    error, bins = calibration(confidence, np.array(is_right))
    assert list(bins.photos) == [2, 3, 2]
    assert list(bins.accuracy) == pytest.approx([1 / 2, 2 / 3, 1])
    assert error == pytest.approx((2 * (0.51 - 1 / 2) + 3 * (0.91 - 2 / 3) + 2 * 0.01) / 7)
