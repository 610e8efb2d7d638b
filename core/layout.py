"""Finding and reading a dataset in the competition's layout.

    train/train.csv                    id,gender,race,age,path
    train/images/<path>/<shot>.<ext>   shot = mask1..mask5, incorrect_mask, normal
    eval/info.csv                      ImageID,ans
    eval/images/<ImageID>

Each person is one folder. `read_train` and `read_eval` return a pandas table with one row per
photo. They list files; photos are decoded later. Nothing here needs torch.
"""
import hashlib
import logging
import os
from pathlib import Path

import pandas as pd

from core.errors import InputError, as_one_line
from core.images import IMAGE_SUFFIXES
from core.labels import GENDERS, MASK_OF_SHOT, age_band, encode
from core.sample_data import draw_sample_dataset

log = logging.getLogger("mask")

# The first and the last person of the competition's dataset.
ORIGINAL_PEOPLE = ("000001_female_Asian_45", "006959_male_Asian_19")
# Wrong labels of the competition's dataset on which 19 to 28 independent solutions agree:
# gender by id, and ids whose incorrect_mask and normal photos are swapped.
WRONG_GENDER = {**{f"00{i}": "male" for i in range(6359, 6365)},
                "001498-1": "female", "004432": "female"}
SWAPPED_SHOTS = ("000020", "004418", "005227")


# --- finding a dataset ---

def choose_data(data_dir):
    """Return (folder, kind) of the training data.

    The folder is --data_dir, else SM_CHANNEL_TRAIN, else ./data, else the built-in sample, which
    is drawn if necessary. The kind is "sample", "competition" or "own".
    """
    if data_dir == "":
        raise InputError("--data_dir: is empty; expected a folder, or no --data_dir for ./data or "
                         "the sample")
    folder = data_dir or os.environ.get("SM_CHANNEL_TRAIN")
    if not folder and find_part("data", "train"):
        folder = "data"
    if not folder:
        log.info("NO DATASET GIVEN (no --data_dir, none in ./data): training on the built-in "
                 "SAMPLE, drawn faces in ./data/sample")
        return draw_sample_dataset("data/sample"), "sample"
    train = find_part(folder, "train")
    if train and (train.parent / "sample.json").is_file():
        return folder, "sample"
    if train and all((train / "images" / person).is_dir() for person in ORIGINAL_PEOPLE):
        return folder, "competition"
    return folder, "own"


def find_part(data_dir, part):
    """Return the folder of a dataset's part, or None if there is none.

    Args:
        data_dir: the dataset's root, its train or eval folder, or an images folder.
        part: "train" (the folder with train.csv) or "eval" (the folder with info.csv).
    """
    table = {"train": "train.csv", "eval": "info.csv"}[part]
    data_dir = Path(os.path.abspath(data_dir))  # gives "." a name
    # People pass the root, a part or its images folder; look in and around what they passed.
    candidates = [data_dir / part, data_dir]
    if data_dir.name == "images":
        candidates += [data_dir.parent, data_dir.parent.parent / part]
    elif data_dir.name in ("train", "eval"):
        candidates.append(data_dir.parent / part)
    return next((folder.resolve() for folder in candidates if (folder / table).is_file()), None)


def dataset_folders(data_dir):
    """Return where the train and eval parts are; inference without --data_dir reads this."""
    channel = None
    if data_dir == os.environ.get("SM_CHANNEL_TRAIN"):
        channel = os.environ.get("SM_CHANNEL_EVAL")
    eval_dir = (channel and find_part(channel, "eval")) or find_part(data_dir, "eval")
    return {"train_dir": str(find_part(data_dir, "train")),
            "eval_dir": eval_dir and str(eval_dir)}


# --- reading it ---

def read_train(data_dir, fix_labels=True):
    """Read the labelled photos.

    Args:
        data_dir: the dataset's root, its train or eval folder, or an images folder.
        fix_labels: correct the known wrong labels of the competition's dataset, and log each.

    Returns:
        DataFrame sorted by person and shot: path (str), person (folder name), shot, years,
        mask 0..2, gender 0..1, age 0..2, label 0..17.

    Raises:
        InputError: for a missing or empty folder, or a train.csv that cannot be read or does not
            match the folders.
    """
    if not Path(data_dir).is_dir():
        raise InputError(f"--data_dir {data_dir}: no such folder; expected a dataset with "
                         f"train/train.csv")
    folder = find_part(data_dir, "train")
    if folder is None:
        raise InputError(f"{data_dir}: no train/train.csv in it; expected train/train.csv and "
                         f"train/images")
    people = _read_people(folder / "train.csv")
    photos = _list_photos(folder / "images", people)
    if fix_labels and _is_original(people):
        photos = _fix_labels(photos)
    photos["age"] = age_band(photos.years)
    photos["label"] = encode(photos["mask"], photos.gender, photos.age)
    return photos


def read_eval(data_dir, require_all=True):
    """Read the photos to predict: a DataFrame with ImageID and path, in the order of info.csv.

    Args:
        data_dir: the dataset's root, its eval or train folder, or an images folder.
        require_all: raise an error if a listed photo is missing on disk.

    Raises:
        InputError: for a missing info.csv or photo, or an ImageID that is repeated or points
            outside the folder.
    """
    folder = find_part(data_dir, "eval")
    if folder is None:
        raise InputError(f"{data_dir}: no eval/info.csv in it; expected eval/info.csv and "
                         f"eval/images/")
    csv, images = folder / "info.csv", folder / "images"
    info = read_table(csv, ["ImageID"], key="ImageID")
    # An ImageID must not point outside the folder.
    for image_id in info.ImageID:
        parts = Path(image_id.replace("\\", "/")).parts
        if not image_id or os.path.isabs(image_id) or ".." in parts or "\0" in image_id:
            raise InputError(f"{csv}: ImageID {image_id!r} is not a file name inside {images}")
    # All photos must be on disk.
    paths = [str(images / image_id) for image_id in info.ImageID]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing and require_all:
        raise InputError(f"{missing[0]}: listed in info.csv but not on disk ({len(missing)} of "
                         f"{len(paths)} are missing); copy the whole eval/images folder")
    return pd.DataFrame({"ImageID": info.ImageID, "path": paths})


def list_images(paths):
    """List the photos of any folders or files: a DataFrame with ImageID and path, sorted.

    Folders are searched recursively; hidden files are skipped. The ImageID is the path inside the
    folder, or the whole path if several folders or files are given.

    Raises:
        InputError: for a path that does not exist, or if there is no photo.
    """
    paths = list(paths)
    files = {}
    for path in map(Path, paths):
        if path.is_dir():
            found = (Path(root, name) for root, _, names in os.walk(path) for name in names)
            for file in found:
                inside = file.relative_to(path)
                is_hidden = any(part.startswith(".") for part in inside.parts)
                if file.suffix.lower() in IMAGE_SUFFIXES and not is_hidden:
                    files[str(file if len(paths) > 1 else inside)] = str(file)
        elif path.is_file():
            files[str(path)] = str(path)
        else:
            raise InputError(f"--data_dir {path}: no such file or folder")
    if not files:
        raise InputError(f"--data_dir {paths[0]}: no images in it; expected "
                         f"{', '.join(IMAGE_SUFFIXES)}")
    # A file name may hold bytes that are not UTF-8; an ImageID in a csv file may not.
    rows = [(os.fsencode(name).decode("utf-8", "backslashreplace"), path)
            for name, path in sorted(files.items())]
    return pd.DataFrame(rows, columns=["ImageID", "path"])


def read_table(path, columns, key=None):
    """Read a csv file as a DataFrame of strings.

    Raises:
        InputError: if the file is not a csv file, has no rows or lacks one of the columns, or if
            a value in the column `key` is repeated.
    """
    expected = ",".join(columns)
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a csv file"
                         ) from None
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise InputError(f"{path}: not a csv text file ({as_one_line(error)}); expected columns "
                         f"{expected}") from None
    missing = [column for column in columns if column not in table.columns]
    if missing:
        found = ",".join(map(str, table.columns))[:200]
        raise InputError(f"{path}: no column {missing[0]!r}; found {found}, expected {expected}")
    if table.empty:
        raise InputError(f"{path}: no rows; expected at least one below the column names")
    if key and table[key].duplicated().any():
        value = table[key][table[key].duplicated()].iloc[0]
        raise InputError(f"{path}: {key} {value!r} is repeated; expected each {key} once")
    return table


def _read_people(csv):
    people = read_table(csv, ["gender", "age", "path"], key="path")
    people = people.sort_values("path", ignore_index=True)
    for column, valid, expected in [
        ("gender", people.gender.isin(GENDERS), "male or female"),
        ("age", people.age.str.fullmatch(r"0?\d{1,2}|1[01]\d|120"), "whole years from 0 to 120"),
        ("path", ~people.path.str.contains(r"[/\\\0]|^\.|^$"), "the name of a folder in images/"),
    ]:
        if not valid.all():
            row = people[~valid].iloc[0]
            raise InputError(f"{csv}: {column} {row[column]!r} of {row.path!r} is not valid; "
                             f"expected {expected}")
    return people.assign(years=people.age.astype(int))


def _list_photos(images, people):
    if not images.is_dir():
        raise InputError(f"{images}: no such folder; expected a folder for each person in "
                         f"train.csv")
    folders = {entry.name for entry in os.scandir(images)
               if entry.is_dir() and not entry.name.startswith(".")}
    # train.csv and the folders must list the same people.
    csv, listed = images.parent / "train.csv", set(people.path)
    for names, found, wanted in [(listed - folders, "train.csv", images),
                                 (folders - listed, images, "train.csv")]:
        if names:
            raise InputError(f"{csv} does not match the folders: {min(names)!r} is in {found} but "
                             f"not in {wanted} ({len(names)} in all); expected one line per "
                             f"folder")
    # One file per shot, whatever its suffix.
    rows, incomplete, ignored = [], [], []
    for person in people.itertuples():
        shots = {}
        # Sorted: if one shot has two files, every machine takes the same one.
        for entry in sorted(os.scandir(images / person.path), key=lambda entry: entry.name):
            shot, suffix = os.path.splitext(entry.name)
            if entry.name.startswith(".") or not entry.is_file():
                continue
            if shot not in MASK_OF_SHOT or suffix.lower() not in IMAGE_SUFFIXES or shot in shots:
                ignored.append(entry.path)
                continue
            shots[shot] = entry.path
        if len(shots) < len(MASK_OF_SHOT):
            incomplete.append(person.path)
        gender = GENDERS.index(person.gender)
        rows += [(path, person.path, shot, person.years, MASK_OF_SHOT[shot], gender)
                 for shot, path in sorted(shots.items())]
    if not rows:
        raise InputError(f"{images}: no photos in its {len(people)} folders; expected "
                         f"<person>/mask1.jpg and so on")
    if incomplete:
        log.warning(f"warning: {len(incomplete)} people have fewer than 7 shots, such as "
                    f"{incomplete[0]}; the shots that exist are used")
    if ignored:
        log.warning(f"warning: {len(ignored)} files are not one of the seven shots, such as "
                    f"{ignored[0]}; they are not used")
    return pd.DataFrame(rows, columns=["path", "person", "shot", "years", "mask", "gender"])


def _is_original(people):
    ends = people.path.iloc[0], people.path.iloc[-1]
    return len(people) == 2700 and ends == ORIGINAL_PEOPLE


def _fix_labels(photos):
    ids = photos.person.str.partition("_")[0]
    for person_id, gender in WRONG_GENDER.items():
        # Ids are not unique: change only the folder that has the wrong label.
        wrong = (ids == person_id) & (photos.gender != GENDERS.index(gender))
        if wrong.any():
            photos.loc[wrong, "gender"] = GENDERS.index(gender)
            log.info(f"label fixed: gender of {photos.person[wrong].iloc[0]} is {gender}")
    for person_id in SWAPPED_SHOTS:
        swapped = (ids == person_id) & (photos["mask"] > 0)
        if swapped.any():
            photos.loc[swapped, "mask"] = 3 - photos.loc[swapped, "mask"]
            log.info(f"label fixed: incorrect_mask and normal of "
                     f"{photos.person[swapped].iloc[0]} are swapped")
    return photos


def fingerprint(photos):
    """Return a hash of the people, shots, years and labels; a resumed run must have the same."""
    columns = photos[["person", "shot", "years", "label"]]
    return hashlib.sha256(columns.to_csv(index=False).encode()).hexdigest()
