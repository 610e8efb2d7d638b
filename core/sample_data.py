"""The built-in sample dataset: drawn people, nobody's photo, in the competition's layout.

Each person keeps face, age and hair in all seven photos; mask, mouth, clothes, position, pose and
light change. The true classes of the eval photos are in <root>/eval/answers.csv.
"""
import json
import secrets
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from joblib import cpu_count

from core.errors import InputError
from core.files import delete
from core.images import end_with_parent
from core.labels import GENDERS, MASK_OF_SHOT, encode
from core.sample_people import draw_photo, invent_person

# Raise it when a drawing changes, here or in sample_people.py: older folders are then refused.
VERSION = 2
GROUP_SHARES = (0.21, 0.19, 0.10, 0.21, 0.19, 0.10)  # male <30, 30-59, >=60, then female
FIRST_EVAL_PERSON = 500_001  # eval people do not depend on the number of train people


def draw_sample_dataset(root, num_train=375, num_eval=100, seed=0):
    """Draw the dataset under `root`, whole or not at all, unless it is there; return `root`.

    Raises:
        InputError: if `root` holds anything else.
    """
    root = Path(root)
    record = {"version": VERSION, "num_train": num_train, "num_eval": num_eval, "seed": seed}
    if _is_drawn(root, record):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = root.with_name(f".{root.name}-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        _draw_people(temporary, "train", 1, num_train, seed)
        _draw_people(temporary, "eval", FIRST_EVAL_PERSON, num_eval, seed)
        (temporary / "sample.json").write_text(json.dumps(record) + "\n")
        try:
            temporary.rename(root)
        except OSError:  # another process was faster; use its drawing
            if not _is_drawn(root, record):
                raise
    finally:
        delete(temporary)
    return root


def _is_drawn(root, record):
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    found = root / "sample.json"
    if not found.is_file():
        raise InputError(f"{root}: exists and is not the sample dataset; move it away, or pass "
                         f"--data_dir")
    try:
        is_same = json.loads(found.read_text()) == record
    except ValueError:  # damaged
        is_same = False
    if not is_same:
        raise InputError(f"{root}: holds another version of the sample dataset; delete the folder "
                         f"to draw it again")
    return True


def _draw_people(root, part, first, count, seed):
    (root / part / "images").mkdir(parents=True)
    # Evenly spaced ranks, shuffled: the groups keep their shares for any number of people.
    ranks = (np.random.default_rng([seed, first]).permutation(count) + 0.5) / max(count, 1)
    groups = np.searchsorted(np.cumsum(GROUP_SHARES), ranks).clip(0, 5)
    jobs = [(root, part, first + i, int(group), seed) for i, group in enumerate(groups)]
    with ProcessPoolExecutor(cpu_count(), initializer=end_with_parent) as pool:
        rows = [row for rows in pool.map(_draw_person, jobs, chunksize=4) for row in rows]
    if part == "train":
        people = pd.DataFrame(rows, columns=["id", "gender", "race", "age", "path"])
        people.to_csv(root / part / "train.csv", index=False)
    else:
        # Sorted by the random file name, which says nothing about person or class.
        answers = pd.DataFrame(sorted(rows), columns=["ImageID", "ans", "person"])
        answers[["ImageID"]].assign(ans=0).to_csv(root / part / "info.csv", index=False)
        answers.to_csv(root / part / "answers.csv", index=False)


def _draw_person(job):
    """Draw one person's seven photos; return the rows for the part's csv file."""
    root, part, number, group, seed = job
    rng = np.random.default_rng([seed, number])
    gender, age = divmod(group, 3)
    person = invent_person(rng, gender, age)
    # "Asian" fills the layout's field; all skin tones are drawn.
    name = f"{number:06d}_{GENDERS[gender]}_Asian_{person.age}"
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
    if part == "eval":
        return rows
    return [(*name.split("_"), name)]
