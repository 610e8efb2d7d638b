"""The model card of a run: README.md in its results folder, in the form of the Hugging Face Hub."""
import os
import shlex
import textwrap
from pathlib import Path

import numpy as np
import timm
from huggingface_hub import EvalResult, ModelCardData

from core.checkpoint import OUR_KEY, read_json
from core.cli import script
from core.evaluation import MIN_PEOPLE, bootstrap_rates, calibration, format_interval, largest_gap
from core.files import write_atomically
from core.framing import describe_framing
from core.labels import AGES, GENDERS, MASKS, PROBABILITIES, decode
from core.plots import save_curves, save_reliability

GROUP_NAMES = [f"{gender}, {age}" for gender in GENDERS for age in AGES]  # groups of people

INTRO = """\
An image classifier with 18 classes: mask worn, worn incorrectly or not worn; apparent gender (male,
female); apparent age (under 30, 30-59, 60 and over). `train.py` wrote this card, and replaces it
when the run continues.

**This folder holds photos of people.** `worst_mistakes.png` and `augmented_inputs.png` show photos
of the dataset, and each `valid_predictions.csv` names its folders and labels. `args.txt`,
`config.json`, `trainer_state.json` and the commands below can hold paths of the machine; the name
of the `events.out.tfevents` file holds its host name. Remove what must not be public before you
publish this folder."""

LIMITS = """\
## Intended use and limits

To count mask states, apparent genders and age groups in photos like the training photos, and to
study such classifiers. Do not use it to identify people or to make decisions about people. Inform
the people whom you photograph.

Gender and age are the impressions of those who labelled the photos, in coarse groups. Expect more
errors for people who are rare in the training data, and with other cameras, places and masks: the
validation photos are from the same source as the training photos. Test it on photos of your own."""


def write_card(output_dir, folder, state, losses, train_photos, valid_photos, result=None):
    """Write README.md of a results folder, with curves.png and reliability.png.

    Args:
        output_dir: the results folder.
        folder: the best checkpoint, which the card describes.
        state: the `TrainerState`.
        losses: pairs (step, training loss) for the curves, as many as there are.
        train_photos, valid_photos: the tables of `read_train`, the second maybe empty.
        result: (table of valid_predictions.csv, (macro F1 and its 95 % bounds)), with the rows of
            `valid_photos`; None without validation.
    """
    config = read_json(folder / "config.json")
    save_curves(state.history, losses, output_dir / "curves.png")
    sections = [f"# {config[OUR_KEY]['model']}: mask, gender and age from one photo", INTRO]
    if result:
        predictions, scores = result
        sections += [describe_scores(folder, state, predictions, scores),
                     describe_groups(predictions, valid_photos.race),
                     describe_calibration(predictions, output_dir / "reliability.png")]
    else:
        sections.append("## Results\n\nNone: trained on everyone, without validation.\n\n"
                        "![loss over steps](curves.png)")
    sections += [describe_data(state, train_photos, valid_photos),
                 *describe_commands(output_dir, config[OUR_KEY]), LIMITS]
    text = "\n\n".join([f"---\n{metadata(config, result)}\n---", *sections]) + "\n"
    with write_atomically(output_dir / "README.md") as temporary:
        temporary.write_bytes(os.fsencode(text))


def metadata(config, result):
    """Return the card's YAML; config.json as a dict, and `result` as in `write_card`."""
    ours, metrics = config[OUR_KEY], {}
    if result:
        predictions, (score, _, _) = result
        accuracy = (predictions.label == predictions["ans"]).mean()
        metrics = {"macro F1": ("f1", score), "accuracy": ("accuracy", accuracy)}
    evaluations = [EvalResult(
        task_type="image-classification", dataset_type="imagefolder", dataset_split="validation",
        dataset_name=Path(ours["train_dir"]).parent.name or "train", metric_type=kind,
        metric_name=name, metric_value=round(float(value), 4))
        for name, (kind, value) in metrics.items()]
    # The Hub shows how to load it: only timm's own architectures load with timm.
    library = "timm" if timm.is_model(config["architecture"]) else "pytorch"
    return ModelCardData(model_name=ours["model"], pipeline_tag="image-classification",
                         library_name=library, tags=["face-mask"],
                         eval_results=evaluations or None).to_yaml().strip()


def describe_scores(folder, state, predictions, scores):
    """Return the section with macro F1, accuracies and curves."""
    # Rows: mask, gender, age. A photo is right in all three if its class is right.
    truth, guess = (np.stack(decode(predictions[name].to_numpy())) for name in ("label", "ans"))
    right = dict(zip(["mask", "gender", "age"], truth == guess, strict=True))
    right["all three"] = (truth == guess).all(axis=0)
    rates = bootstrap_rates({name: (right[name], np.full(len(predictions), True))
                             for name in right}, predictions.person)
    score, low, high = scores
    has_interval = predictions.person.nunique() >= MIN_PEOPLE
    macro_f1 = f"{score:.3f} ({low:.3f} .. {high:.3f})" if has_interval else f"{score:.3f}"
    rows = [["macro F1 over 18 classes", macro_f1],
            *([f"accuracy: {name}", text] for name, text in rates.text.items())]
    return f"""\
## Results

Best checkpoint: `{folder.name}`; evaluations: {len(state.history)} (choosing the best makes the
scores a little too high). Photos: {len(predictions)}, of {predictions.person.nunique()} people who
are not in the training data. In brackets: 95 % intervals, by bootstrap over people.

{as_table(["", "score"], rows)}

![loss and macro F1 over steps](curves.png)

![confusion matrix](confusion_matrix.png)
[The worst mistakes](worst_mistakes.png) (photos of people)"""


def describe_groups(predictions, race):
    """Return the section with the accuracy of each group of people and the gaps between them."""
    mask, gender, age = (part.to_numpy() for part in decode(predictions.label))
    right = (predictions.label == predictions["ans"]).to_numpy()
    # "|" would end a cell of the table.
    race = race.str.replace("|", "/").replace("", "unknown").to_numpy()
    groups = {name: gender * len(AGES) + age == k for k, name in enumerate(GROUP_NAMES)}
    cells = {f"{name}, {state}": where & (mask == k)
             for name, where in groups.items() for k, state in enumerate(MASKS)}
    races = {name: race == name for name in sorted(set(race))}
    # All groups share the bootstrap draws, so their differences are paired.
    wheres = groups | cells | races
    rates = bootstrap_rates({name: (right, wheres[name]) for name in wheres}, predictions.person)
    rows = [[name, rates.people[name], *(rates.text[f"{name}, {state}"] for state in MASKS),
             rates.text[name]] for name in groups]
    text = f"""\
## Groups

Accuracy (mask, gender and age all right) by group of people and mask state. Groups of fewer than
{MIN_PEOPLE} people have no interval and do not count for the gaps. The best and the worst group are
chosen on these photos, which makes the gaps a little too large.

{as_table(["people", "number", *MASKS, "all photos"], rows)}

{describe_gap("gender x age", rates.loc[list(groups)])}
{describe_gap("gender x age x mask state", rates.loc[list(cells)])}"""
    if len(races) > 1:
        rows = [[name, rates.people[name], rates.text[name]] for name in races]
        text += (f"\n{describe_gap('race, as in train.csv', rates.loc[list(races)])}\n\n"
                 f"{as_table(['people', 'number', 'all photos'], rows)}")
    return text


def describe_gap(name, rates):
    """Return a list item with the gap between the best and the worst of some groups."""
    gap = largest_gap(rates)
    if gap is None:
        return f"* Gap by {name}: fewer than two groups of {MIN_PEOPLE} people."
    best, worst, *bounds = gap
    return (f"* Gap by {name}: **{format_interval(*bounds)}**, between {best} "
            f"({rates.rate[best]:.2f}) and {worst} ({rates.rate[worst]:.2f}).")


def describe_calibration(predictions, path):
    """Write the reliability plot; return its section."""
    confidence = predictions[PROBABILITIES].max(axis=1)
    is_right = predictions.label == predictions["ans"]
    error, bins = calibration(confidence, is_right)
    save_reliability(bins, path)
    return (f"## Calibration\n\nExpected calibration error {error:.3f} (Guo et al. 2017, 15 bins); "
            f"mean confidence {confidence.mean():.3f}, accuracy {is_right.mean():.3f}.\n\n"
            f"![accuracy over confidence, with the number of photos](reliability.png)")


def describe_data(state, train_photos, valid_photos):
    """Return the section with the counts of people and photos, and the fingerprint."""
    rows = []
    for name, photos in [("training", train_photos), ("validation", valid_photos)]:
        # A person has one gender and one age, whatever the number of photos.
        people = photos.drop_duplicates("person")
        counts = np.bincount(people.gender * len(AGES) + people.age, minlength=len(GROUP_NAMES))
        rows.append([name, len(photos), len(people), *counts])
    soft = ", and of the files of --soft_targets" if state.args.get("soft_targets") else ""
    return (f"## Data\n\n{as_table(['', 'photos', 'people', *GROUP_NAMES], rows)}\n\n"
            f"SHA-256 of people, shots, ages and labels{soft}: `{state.data}`")


def describe_commands(output_dir, config):
    """Return the sections with the commands that train and predict, and what a photo must show."""
    flags = os.fsdecode((output_dir / "args.txt").read_bytes()).splitlines()
    # A flag is never broken: its spaces are hidden from textwrap.
    lines = textwrap.wrap(" ".join(flag.replace(" ", "\0") for flag in flags), 90,
                          break_long_words=False, break_on_hyphens=False)
    recipe = " \\\n        ".join([script("train.py"), *lines]).replace("\0", " ")
    mirror = ", as the mean over the photo and its mirror image" * (config["tta"] == "hflip")
    height, width = config["crop"]
    size = " x ".join(map(str, config["size"]))
    faces = ""
    if framing := config.get("framing"):
        faces = (f"In other photos the faces are found first and framed as\n"
                 f"{describe_framing(framing)}. ")
    return f"## Recipe\n\n    {recipe}", f"""\
## Input

One upright face in the middle, framed as in the training photos. The model sees the centre of the
photo, {height:.0%} of its height and {width:.0%} of its width, at {size} pixels (height x
width){mirror}. {faces}This command does it:

    {script("inference.py")} --model_dir={shlex.quote(str(output_dir))}"""


def as_table(columns, rows):
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
