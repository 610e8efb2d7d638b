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
import unicodedata
from collections import Counter
from pathlib import Path

import pandas as pd

from core.errors import InputError
from core.images import IMAGE_SUFFIXES
from core.labels import GENDERS, MASK_OF_SHOT, age_band, encode
from core.sample_data import draw_sample_dataset
from core.tables import read_table

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
        candidates.append(data_dir.parent)
        if data_dir.parent.name in ("train", "eval"):
            candidates.append(data_dir.parent.parent / part)
    elif data_dir.name in ("train", "eval"):
        candidates.append(data_dir.parent / part)
    return next((folder.resolve() for folder in candidates if (folder / table).is_file()), None)


def is_train_part(folder):
    """Return whether a folder is the train part of a dataset, or its images folder."""
    folder = Path(os.path.abspath(folder))
    images = folder.name == "images" and (folder.parent / "train.csv").is_file()
    return images or ((folder / "train.csv").is_file() and not (folder / "info.csv").is_file())


def dataset_folders(data_dir):
    """Return where the train and eval parts are; inference without --data_dir reads this."""
    # The launch scripts of the competition pass the eval folder in a variable of its own.
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
        mask 0..2, gender 0..1, race (str, "" if train.csv has none), age 0..2, label 0..17.

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
    # People come from the table, photos from the folders; both must agree.
    people = _read_people(folder / "train.csv")
    photos = _list_photos(folder / "images", people)
    ends = people.path.iloc[0], people.path.iloc[-1]
    if fix_labels and len(people) == 2700 and ends == ORIGINAL_PEOPLE:
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
    table, images = folder / "info.csv", folder / "images"
    info = read_table(table, ["ImageID"], key="ImageID")
    # An ImageID must not point outside the folder.
    for line, image_id in info.ImageID.items():
        parts = Path(image_id.replace("\\", "/")).parts
        if os.path.isabs(image_id) or ".." in parts or "\0" in image_id:
            raise InputError(f"{table}, line {line}: ImageID {image_id!r} is not a file name "
                             f"inside {images}")
    # All photos must be on disk.
    paths = {image_id: os.path.join(images, image_id) for image_id in info.ImageID}
    missing = [image_id for image_id, path in paths.items() if not os.path.isfile(path)]
    if missing:
        # Only now list the folder, which is slow: names may differ in their Unicode form.
        on_disk = {_normalized(os.path.relpath(file, images)): file for file in _walk(images)}
        paths |= {image_id: on_disk[_normalized(image_id)] for image_id in missing
                  if _normalized(image_id) in on_disk}
        missing = [image_id for image_id in missing if not os.path.isfile(paths[image_id])]
        shared = [path for path, count in Counter(paths.values()).items() if count > 1]
        if shared:
            raise InputError(f"{table}: two ImageIDs name the file {shared[0]!r}; expected one")
    if missing and require_all:
        line = info.index[info.ImageID == missing[0]][0]
        raise InputError(f"{images}: has no {missing[0]!r}, which info.csv lists in line {line} "
                         f"({len(missing)} of {len(paths)} photos are not on disk); copy the "
                         f"whole eval/images folder")
    return pd.DataFrame({"ImageID": list(paths), "path": list(paths.values())})


def _normalized(name):
    # macOS stores names decomposed (NFD): accents and Korean syllables in parts.
    return unicodedata.normalize("NFC", str(name)).strip()


def list_images(paths):
    """List the photos of any folders or files: a DataFrame with ImageID and path, sorted.

    Folders are searched recursively, links are followed. What is left out is counted in a log
    line. The ImageID is the path inside the folder, or the whole path if several folders or files
    are given.

    Raises:
        InputError: for a path that does not exist, or if there is no photo.
    """
    paths = list(paths)
    files, left_out = {}, []
    for path in map(Path, paths):
        if path.is_dir():
            for file in _walk(path, left_out):
                inside = os.path.relpath(file, path)
                reason = why_left_out(file)
                is_hidden = any(map(is_tool_name, Path(inside).parts))
                if not reason and not is_hidden:
                    files[file if len(paths) > 1 else inside] = file
                elif not reason:
                    left_out.append((file, "hidden, or made by another program"))
                elif not is_hidden:  # hidden files that are no photos are not worth a line
                    left_out.append((file, reason))
        elif path.is_file():
            files[str(path)] = str(path)
        else:
            raise InputError(f"--data_dir {path}: no such file or folder")
    log_left_out(left_out)
    if not files:
        raise InputError(f"--data_dir {paths[0]}: no images in it; expected "
                         f"{', '.join(IMAGE_SUFFIXES)}")
    # A file name may hold bytes that are not UTF-8; an ImageID in a csv file may not.
    rows = [(os.fsencode(name).decode("utf-8", "backslashreplace"), path)
            for name, path in sorted(files.items())]
    return pd.DataFrame(rows, columns=["ImageID", "path"])


def _walk(folder, unreadable=None):
    """Yield all files below a folder. Each real folder is visited once: links may form a loop.

    Folders that cannot be read are added to the list `unreadable`, as pairs (path, reason).
    """
    visited, unreadable = set(), [] if unreadable is None else unreadable
    for root, folders, names in os.walk(
            folder, followlinks=True,
            onerror=lambda error: unreadable.append((error.filename, "a folder without access"))):
        # Real folders first: a photo is named by its own folder, not by a link to it.
        folders.sort(key=lambda name: (os.path.islink(os.path.join(root, name)), name))
        real = os.path.realpath(root)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        yield from (os.path.join(root, name) for name in names)


# Folders and files that other programs leave beside photos: Synology, macOS, Jupyter, Windows, ...
TOOL_NAMES = {"@eaDir", "#recycle", "@Recycle", "lost+found", "__MACOSX", "__pycache__",
              "Thumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information"}
ODD_FORMATS = {".heic": "convert to JPEG", ".heif": "convert to JPEG", ".avif": "needs Pillow 11.3",
               ".jxl": "convert to JPEG", ".dng": "convert to JPEG"}


def is_tool_name(name):
    """Return whether a file or folder is hidden, or another program's own."""
    return name.startswith(".") or name in TOOL_NAMES


def why_left_out(path):
    """Return why a path in a folder is not read as a photo, or ""."""
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isfile(path):
        hint = f" ({ODD_FORMATS[suffix]})" if suffix in ODD_FORMATS else ""
        return "" if suffix in IMAGE_SUFFIXES else f"{suffix or 'no suffix'}{hint}"
    if not os.path.exists(path):
        return "a link to nowhere"
    return "a folder" if os.path.isdir(path) else "not a file"


def log_left_out(left_out):
    """Log one line for the files that are left out; pairs of (file, reason)."""
    if left_out:
        counts = Counter(reason for _, reason in left_out)
        reasons = ", ".join(
            f"{count} x {reason}, such as {min(path for path, why in left_out if why == reason)}"
            for reason, count in sorted(counts.items()))
        log.warning(f"warning: files left out: {reasons}")


# --- people and their photos ---

def _read_people(table):
    people = read_table(table, ["gender", "age", "path"], key="path")
    people = people.assign(gender=people.gender.str.strip().str.lower(),
                           age=people.age.str.strip().str.removesuffix(".0"))
    for column, valid, expected in [
        ("gender", people.gender.isin(GENDERS), "male or female"),
        ("age", people.age.str.fullmatch(r"0?\d{1,2}|1[01]\d|120"), "whole years from 0 to 120"),
        ("path", ~people.path.str.contains(r"[/\\\0]|^\."), "the name of a folder in images/"),
    ]:
        if not valid.all():
            line = people.index[~valid][0]
            row = people.loc[line]
            raise InputError(f"{table}, line {line}: {column} {row[column]!r} of {row.path!r} is "
                             f"not valid; expected {expected}")
    return people.assign(years=people.age.astype(int)).sort_values("path", ignore_index=True)


def _list_photos(images, people):
    """Return the table of all photos of these people; InputError if there are none."""
    left_out, rows, incomplete = [], [], []
    folder_of = _match_folders(images, people, left_out)
    for person in people.itertuples():
        shots = _list_shots(images / folder_of[person.path], left_out)
        if len(shots) < len(MASK_OF_SHOT):
            incomplete.append(person.path)
        gender = GENDERS.index(person.gender)
        race = getattr(person, "race", "").strip()
        rows += [(path, person.path, shot, person.years, MASK_OF_SHOT[shot], gender, race)
                 for shot, path in sorted(shots.items())]
    log_left_out(left_out)
    if not rows:
        raise InputError(f"{images}: no photos in its {len(people)} folders; expected "
                         f"<person>/mask1.jpg and so on")
    if incomplete:
        log.warning(f"warning: people with fewer than 7 shots: {len(incomplete)}, such as "
                    f"{incomplete[0]}; the shots that exist are used")
    columns = ["path", "person", "shot", "years", "mask", "gender", "race"]
    return pd.DataFrame(rows, columns=columns)


def _match_folders(images, people, left_out):
    """Return {path in train.csv: folder}; InputError unless these list the same people.

    Files beside the folders are added to `left_out`, as pairs (path, reason).
    """
    if not images.is_dir():
        raise InputError(f"{images}: no such folder; expected a folder for each person in "
                         f"train.csv")
    entries = {entry.name: os.path.isdir(entry.path) for entry in os.scandir(images)
               if not is_tool_name(entry.name)}
    folders = {name for name, is_dir in entries.items() if is_dir}
    left_out += [(str(images / name), "not in a person's folder")
                 for name in entries.keys() - folders]
    by_normalized = {_normalized(name): name for name in folders}
    folder_of = {path: path if path in folders else by_normalized.get(_normalized(path))
                 for path in people.path}
    table = images.parent / "train.csv"
    for names, listed_in, missing_in in [
        ([path for path, folder in folder_of.items() if folder is None], "train.csv", images),
        (folders - set(folder_of.values()), images, "train.csv"),
    ]:
        if names:
            raise InputError(f"{table} does not match the folders: {min(names)!r} is in "
                             f"{listed_in} but not in {missing_in} ({len(names)} in all); expected "
                             f"one line per folder")
    shared = {folder for folder, count in Counter(folder_of.values()).items() if count > 1}
    if shared:
        raise InputError(f"{table}: two rows name the folder {min(shared)!r}; expected one")
    return folder_of


def _list_shots(folder, left_out):
    """Return {shot: path} of a person's folder: one file per shot, whatever its suffix."""
    shots = {}
    # Sorted: if one shot has two files, every machine takes the same one.
    for name in sorted(os.listdir(folder)):
        if is_tool_name(name):
            continue
        path, shot = os.path.join(folder, name), os.path.splitext(name)[0]
        reason = why_left_out(path)
        if not reason and shot not in MASK_OF_SHOT:
            reason = "not one of the seven shots"
        if reason or shot in shots:
            left_out.append((path, reason or "a second file of a shot"))
        else:
            shots[shot] = path
    return shots


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


def fingerprint(photos, files=None):
    """Return a hash of the people, shots, years and labels, and of files with more targets.

    A resumed run must have the same.
    """
    columns = photos[["person", "shot", "years", "label"]]
    data = columns.to_csv(index=False).encode()
    return hashlib.sha256(data + b"".join(Path(file).read_bytes() for file in files or ())
                          ).hexdigest()
