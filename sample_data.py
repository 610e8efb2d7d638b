"""Draws the sample dataset: invented people, nobody's photo, in the competition's own folder layout.

    python sample_data.py --root data/sample --sheet sheet.png

<root>/train/train.csv, <root>/train/images/<id>_<gender>_<race>_<age>/{mask1..mask5,incorrect_mask,normal}.jpg,
<root>/eval/info.csv, <root>/eval/images/<ImageID> and the eval photos' true classes in <root>/eval/answers.csv.
A person keeps face, age and hair in all seven photos; mask, mouth, clothes, place, pose and light change.
"""
import json
import os
import shutil
import uuid
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from errors import ArgumentParser, InputError, run
from layout import CLASS_NAMES, GENDERS, MASK_OF_SHOT, encode, read_train
from plots import photo_sheet
from sample_people import draw_photo, invent_person

VERSION = 1  # raise it whenever a drawing changes, here or in sample_people.py, so that an older folder isn't taken for this one
RACE = "Asian"  # only fills the layout's field: skin is drawn in all tones
GROUP_SHARES = (0.21, 0.19, 0.10, 0.21, 0.19, 0.10)  # male <30, 30-59, >=60, then female
FIRST_EVAL_PERSON = 500_001  # far from the train people: their number doesn't change the eval people


def draw_sample_dataset(root, num_train=375, num_eval=100, seed=0):
    """Draws the dataset under root, whole or not at all; an equal one that is there already is used as it is."""
    root = Path(root)
    record = {"version": VERSION, "num_train": num_train, "num_eval": num_eval, "seed": seed}
    if is_drawn(root, record):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = root.parent / f".{root.name}.{uuid.uuid4().hex}"
    try:
        draw_people(partial, "train", 1, num_train, seed)
        draw_people(partial, "eval", FIRST_EVAL_PERSON, num_eval, seed)
        (partial / "sample.json").write_text(json.dumps(record) + "\n")
        try:
            partial.rename(root)
        except OSError:  # another process was first; is_drawn raises where its dataset isn't the one asked for
            if not is_drawn(root, record):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def is_drawn(root, record):
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    found = root / "sample.json"
    if not found.is_file():
        raise InputError(f"{root}: is there and holds no sample dataset; move it away, or pass --data_dir")
    if json.loads(found.read_text()) != record:
        raise InputError(f"{root}: holds another version of the sample dataset; delete the folder, and it is drawn anew")
    return True


def draw_people(root, part, first, count, seed):
    (root / part / "images").mkdir(parents=True)
    # Evenly spaced ranks, shuffled: the groups keep their shares however few people there are.
    ranks = (np.random.default_rng([seed, first]).permutation(count) + 0.5) / max(count, 1)
    groups = np.searchsorted(np.cumsum(GROUP_SHARES), ranks).clip(0, 5)
    jobs = [(root, part, first + i, int(group), seed) for i, group in enumerate(groups)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = [row for person_rows in pool.map(draw_person, jobs, chunksize=4) for row in person_rows]
    if part == "train":
        people = pd.DataFrame(rows, columns=["id", "gender", "race", "age", "path"])
        people.to_csv(root / part / "train.csv", index=False)
    else:
        # by the random file name, which says nothing about person or class
        answers = pd.DataFrame(sorted(rows), columns=["ImageID", "ans", "person"])
        answers[["ImageID"]].assign(ans=0).to_csv(root / part / "info.csv", index=False)
        answers.to_csv(root / part / "answers.csv", index=False)


def draw_person(job):
    """Draws one person's seven photos and returns the rows of the part's csv file."""
    root, part, number, group, seed = job
    rng = np.random.default_rng([seed, number])
    gender, age = divmod(group, 3)
    person = invent_person(rng, gender, age)
    name = f"{number:06d}_{GENDERS[gender]}_{RACE}_{person.age}"
    folder = root / part / "images"
    if part == "train":
        folder = folder / name
        folder.mkdir()
    rows = []
    for shot, mask in MASK_OF_SHOT.items():
        photo = draw_photo(person, mask, rng)
        file = f"{shot}.jpg" if part == "train" else f"{rng.bytes(20).hex()}.jpg"
        photo.save(folder / file, quality=85)
        rows.append((file, encode(mask, gender, age), f"{number:06d}"))
    return rows if part == "eval" else [(f"{number:06d}", GENDERS[gender], RACE, person.age, name)]


def contact_sheet(root, path, people=2):
    """Write a picture of the first training people of each group: a column a group, two rows a mask state."""
    photos = read_train(root)
    shown = [photos[(photos.shot == shot) & (photos.gender == gender) & (photos.age == age)].iloc[person]
             for shot in ("mask1", "incorrect_mask", "normal") for person in range(people)
             for gender in range(2) for age in range(3)]
    photo_sheet([Image.open(photo.path) for photo in shown], [CLASS_NAMES[photo.label] for photo in shown], path)


def main(argv=None):
    args = parse_args(argv)
    root = draw_sample_dataset(args.root)
    print(f"the sample dataset is in {root}")
    if args.sheet:
        contact_sheet(root, args.sheet)


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="data/sample", help="folder to draw it in")
    parser.add_argument("--sheet", metavar="FILE", help="also write a picture of all classes")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
