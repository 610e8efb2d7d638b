"""The label code, where a dataset is, the reader of the competition's layout, the person split.

    train/train.csv                    id,gender,race,age,path
    train/images/<path>/<shot>.<ext>   shot = mask1..mask5, incorrect_mask, normal
    eval/info.csv                      ImageID,ans
    eval/images/<ImageID>

A person is a folder. Photos travel as a pandas table, one row per photo (`read_train`, `read_eval`), and an image is
opened only when it is needed. Nothing here needs torch, so that what only reads and counts starts at once.
"""
import hashlib
import io
import logging
import math
import os
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from PIL import Image, ImageOps

from errors import InputError, reason

log = logging.getLogger("mask")

MASKS = ("wear", "incorrect", "not wear")
GENDERS = ("male", "female")
AGES = ("<30", "30-59", ">=60")
CLASS_NAMES = tuple(f"{mask}, {gender}, {age}" for mask in MASKS for gender in GENDERS for age in AGES)
NUM_CLASSES = len(CLASS_NAMES)
PROBABILITIES = [f"p{label}" for label in range(NUM_CLASSES)]  # columns of a table

MASK_OF_SHOT = {**{f"mask{i}": 0 for i in range(1, 6)}, "incorrect_mask": 1, "normal": 2}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")  # of a photo's content; Pillow knows others that start programs
MIN_SIDE, MAX_PIXELS, MAX_BYTES = 16, 64_000_000, 512_000_000
ORIENTATION = 0x0112  # in EXIF
# Of its size; with IMREAD_COLOR_RGB they give colours.
REDUCED = {1: 0, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 8: cv2.IMREAD_REDUCED_GRAYSCALE_8}

ORIGINAL_PEOPLE = ("000001_female_Asian_45", "006959_male_Asian_19")  # the first and the last of the competition's dataset
# Wrong labels of the original dataset on which 19 to 28 independent solutions agree.
WRONG_GENDER = {**{f"00{i}": "male" for i in range(6359, 6365)}, "001498-1": "female", "004432": "female"}
SWAPPED_SHOTS = ("000020", "004418", "005227")


def encode(mask, gender, age):
    """Class 0..17 from mask 0..2, gender 0..1 and age band 0..2; ints or integer arrays alike."""
    return mask * 6 + gender * 3 + age


def decode(label):
    """(mask, gender, age band) of a class 0..17; ints or integer arrays alike."""
    return label // 6, label // 3 % 2, label % 3


def age_band(years):
    """0 for under 30, 1 for 30 to 59, 2 for 60 and over; years as an int or an array."""
    return (np.asarray(years) >= 30).astype(int) + (np.asarray(years) >= 60).astype(int)


# --- where the data is ---

def choose_data(data_dir, draw_sample):
    """(folder, kind): --data_dir, else SM_CHANNEL_TRAIN, else ./data, else the sample, drawn by `draw_sample(folder)` if need be.

    The kind is "sample", "competition" or "own".
    """
    if data_dir == "":
        raise InputError("--data_dir: is empty; expected a folder, or no --data_dir for ./data or the sample")
    folder = data_dir or os.environ.get("SM_CHANNEL_TRAIN") or ("data" if find_part("data", "train") else None)
    if folder is None:
        log.info("NO DATASET GIVEN (no --data_dir, none in ./data): training on the built-in SAMPLE, drawn faces in ./data/sample")
        return draw_sample("data/sample"), "sample"
    train = find_part(folder, "train")
    if train and (train.parent / "sample.json").is_file():
        return folder, "sample"
    if train and all((train / "images" / person).is_dir() for person in ORIGINAL_PEOPLE):
        return folder, "competition"
    return folder, "own"


def record_data(data_dir):
    """Where the training data and its eval part are, for inference without --data_dir."""
    channel = os.environ.get("SM_CHANNEL_EVAL") if data_dir == os.environ.get("SM_CHANNEL_TRAIN") else None
    eval_dir = (channel and find_part(channel, "eval")) or find_part(data_dir, "eval")
    return {"train_dir": str(find_part(data_dir, "train")), "eval_dir": eval_dir and str(eval_dir)}


def find_part(data_dir, part):
    """The folder of `part` ("train" or "eval") for a dataset's root, its train/eval folder or an images folder.

    Returns:
        Path of the folder that holds train.csv (or info.csv), or None if there is none around `data_dir`.
    """
    table = {"train": "train.csv", "eval": "info.csv"}[part]
    data_dir = Path(os.path.abspath(data_dir))  # "." has a name, too
    candidates = [data_dir / part, data_dir]
    if data_dir.name == "images":
        candidates += [data_dir.parent, data_dir.parent.parent / part]
    elif data_dir.name in ("train", "eval"):
        candidates.append(data_dir.parent / part)
    return next((folder.resolve() for folder in candidates if (folder / table).is_file()), None)


# --- reading the layout ---

def read_train(data_dir, fix_labels=True):
    """Read the labelled photos.

    Args:
        data_dir: the dataset's root, its `train` (or `eval`) folder, or an `images` folder.
        fix_labels: mend the labels of the original dataset that are known to be wrong, a log line each.

    Returns:
        DataFrame sorted by person and shot: path (str), person (folder name), shot, years, mask 0..2, gender 0..1,
        age 0..2, label 0..17.

    Raises:
        InputError: for a missing or empty folder, or a train.csv that is unreadable or disagrees with the folders.
    """
    if not Path(data_dir).is_dir():
        raise InputError(f"--data_dir {data_dir}: no such folder; expected a dataset with train/train.csv and train/images")
    folder = find_part(data_dir, "train")
    if folder is None:
        raise InputError(f"{data_dir}: no train/train.csv in it; expected train/train.csv beside train/images/<person>/")
    people = _read_people(folder / "train.csv")
    photos = _list_photos(folder / "images", people)
    if fix_labels and _is_original(people):
        photos = _fix_labels(photos)
    photos["age"] = age_band(photos.years)
    photos["label"] = encode(photos["mask"], photos.gender, photos.age)
    return photos


def read_eval(data_dir, finds_all=True):
    """Read the photos to predict: DataFrame with ImageID and path, in info.csv's order.

    Args:
        data_dir: the dataset's root, its `eval` (or `train`) folder, or an `images` folder.
        finds_all: every photo must be there.

    Raises:
        InputError: for a missing info.csv or image, or an ImageID that is repeated or leaves the folder.
    """
    folder = find_part(data_dir, "eval")
    if folder is None:
        raise InputError(f"{data_dir}: no eval/info.csv in it; expected eval/info.csv beside eval/images/")
    info = read_table(folder / "info.csv", ["ImageID"])
    if info.empty:
        raise InputError(f"{folder / 'info.csv'}: no rows; expected one ImageID a line")
    repeated = info.ImageID[info.ImageID.duplicated()]
    if len(repeated):
        raise InputError(f"{folder / 'info.csv'}: ImageID {repeated.iloc[0]!r} is repeated; expected each id once")
    for image_id in info.ImageID:
        if not image_id or os.path.isabs(image_id) or ".." in Path(image_id.replace("\\", "/")).parts or "\0" in image_id:
            raise InputError(f"{folder / 'info.csv'}: ImageID {image_id!r} is not a file name inside {folder / 'images'}")
    paths = [str(folder / "images" / image_id) for image_id in info.ImageID]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing and finds_all:
        raise InputError(f"{missing[0]}: listed in info.csv but not on disk ({len(missing)} of {len(paths)} are missing); "
                         f"copy the whole eval/images folder")
    return pd.DataFrame({"ImageID": info.ImageID, "path": paths})


def list_images(paths):
    """Photos of any folder (read recursively, hidden files left out) or list of files: ImageID and path, sorted.

    The ImageID is the path inside the folder, or the whole path where several folders or files are given.

    Raises:
        InputError: for a path that does not exist, or no photo in any.
    """
    paths = list(paths)
    files = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = (Path(root, name) for root, folders, names in os.walk(path) for name in names)
            files |= {str(f if len(paths) > 1 else f.relative_to(path)): str(f) for f in inside
                      if f.suffix.lower() in IMAGE_SUFFIXES and not _is_hidden(f.relative_to(path))}
        elif path.is_file():
            files[str(path)] = str(path)
        else:
            raise InputError(f"--data_dir {path}: no such file or folder")
    if not files:
        raise InputError(f"--data_dir {paths[0]}: no images in it; expected {', '.join(IMAGE_SUFFIXES)}")
    # A file name need not be text; an ImageID must be.
    rows = [(os.fsencode(name).decode("utf-8", "backslashreplace"), path) for name, path in sorted(files.items())]
    return pd.DataFrame(rows, columns=["ImageID", "path"])


def read_table(path, columns):
    """A CSV as a DataFrame of strings, checked for the columns it must have."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a CSV file") from None
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise InputError(f"{path}: not a CSV text file ({reason(error)}); expected columns "
                         f"{','.join(columns)}") from None
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise InputError(f"{path}: no column {missing[0]!r}; found {','.join(map(str, table.columns))[:200]}, "
                         f"expected {','.join(columns)}")
    return table


def _read_people(csv):
    people = read_table(csv, ["gender", "age", "path"]).sort_values("path", ignore_index=True)
    if people.empty:
        raise InputError(f"{csv}: no rows; expected one person a line")
    repeated = people.path[people.path.duplicated()]
    if len(repeated):
        raise InputError(f"{csv}: path {repeated.iloc[0]!r} is repeated; expected one line per person's folder")
    for column, valid, expected in [
        ("gender", people.gender.isin(GENDERS), "male or female"),
        ("age", people.age.str.fullmatch(r"0?\d{1,2}|1[01]\d|120"), "whole years from 0 to 120"),
        ("path", ~people.path.str.contains(r"[/\\\0]|^\.|^$", regex=True), "the name of a folder in images/"),
    ]:
        if not valid.all():
            row = people[~valid].iloc[0]
            raise InputError(f"{csv}: {column} {row[column]!r} of {row.path!r} is not valid; expected {expected}")
    return people.assign(years=people.age.astype(int))


def _list_photos(images, people):
    if not images.is_dir():
        raise InputError(f"{images}: no such folder; expected a folder for each person in train.csv")
    folders = {entry.name for entry in os.scandir(images) if entry.is_dir() and not entry.name.startswith(".")}
    listed = set(people.path)
    for names, found, wanted in [(listed - folders, "train.csv", images), (folders - listed, images, "train.csv")]:
        if names:
            raise InputError(f"{images.parent / 'train.csv'} disagrees with the folders: {min(names)!r} is in {found} but not in "
                             f"{wanted} ({len(names)} such); expected one line a folder")
    rows, incomplete, ignored = [], [], []
    for person in people.itertuples():
        shots = {}
        # Sorted, so that of two files for one shot the same one is taken on every machine.
        for entry in sorted(os.scandir(images / person.path), key=lambda entry: entry.name):
            stem, suffix = os.path.splitext(entry.name)
            if entry.name.startswith(".") or not entry.is_file():
                continue
            if stem not in MASK_OF_SHOT or suffix.lower() not in IMAGE_SUFFIXES or stem in shots:
                ignored.append(entry.path)
                continue
            shots[stem] = entry.path
        if len(shots) < len(MASK_OF_SHOT):
            incomplete.append(person.path)
        gender = GENDERS.index(person.gender)
        rows += [(path, person.path, shot, person.years, MASK_OF_SHOT[shot], gender) for shot, path in sorted(shots.items())]
    if not rows:
        raise InputError(f"{images}: no photos in its {len(people)} folders; expected <person>/mask1.jpg and so on")
    if incomplete:
        log.warning(f"warning: {len(incomplete)} people have fewer than 7 shots, such as {incomplete[0]}; used as they are")
    if ignored:
        log.warning(f"warning: {len(ignored)} files are not one of the seven shots, such as {ignored[0]}; left out")
    return pd.DataFrame(rows, columns=["path", "person", "shot", "years", "mask", "gender"])


def _is_hidden(relative):
    return any(part.startswith(".") for part in relative.parts)


def _is_original(people):
    return len(people) == 2700 and (people.path.iloc[0], people.path.iloc[-1]) == ORIGINAL_PEOPLE


def _fix_labels(photos):
    before = photos[["gender", "mask"]].copy()
    ids = photos.person.str.partition("_")[0]
    for person_id, gender in WRONG_GENDER.items():
        # Only the folder that carries the wrong label: an id is not unique.
        wrong = (ids == person_id) & (photos.gender != GENDERS.index(gender))
        if wrong.any():
            photos.loc[wrong, "gender"] = GENDERS.index(gender)
            log.info(f"label fixed: gender of {photos.person[wrong].iloc[0]} is {gender}")
    for person_id in SWAPPED_SHOTS:
        swapped = (ids == person_id) & (photos["mask"] > 0)
        if swapped.any():
            photos.loc[swapped, "mask"] = 3 - photos.loc[swapped, "mask"]
            log.info(f"label fixed: incorrect_mask and normal of {photos.person[swapped].iloc[0]} are swapped")
    log.info(f"labels fixed: {(photos[['gender', 'mask']] != before).any(axis=1).sum()} photos")
    return photos


def read_image(path, at_least=(math.inf, math.inf)):
    """Decode any photo to upright RGB: gray, palette, alpha, CMYK, 16-bit and EXIF-rotated alike.

    Args:
        path: of the photo.
        at_least: (height, width) that the photo must keep: a JPEG may be decoded at a half, a quarter or an eighth of its size as
            long as neither side becomes smaller.

    Returns:
        uint8 array (height, width, 3).

    Raises:
        InputError: if it cannot be decoded, has a side under 16 pixels, more than 64 million pixels or 512 MB.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InputError(f"{path}: more than {MAX_BYTES:,} bytes; remove the file or save the photo smaller")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if min(width, height) < MIN_SIDE or width * height > MAX_PIXELS:
                raise InputError(f"{path}: {width} x {height} pixels; expected sides of at least {MIN_SIDE} and at most "
                                 f"{MAX_PIXELS:,} pixels; remove or resize it")
            # The usual kind, whole and upright: OpenCV gives the same pixels in half the time. It does not tell a cut-off file.
            if image.format == "JPEG" and image.mode == "RGB" and data.endswith(b"\xff\xd9") and _is_upright(image):
                factor = max(n for n in (1, 2, 4, 8) if n == 1 or (height >= n * at_least[0] and width >= n * at_least[1]))
                flags = REDUCED[factor] | cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
                pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
                if pixels is not None:
                    return pixels
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):
                # Pillow would clip 16 bits to 8; keep the high byte instead.
                pixels = np.asarray(image).astype(np.float64)
                image = Image.fromarray((pixels / 256).clip(0, 255).astype(np.uint8))
            return np.array(image.convert("RGB"))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; it may have been deleted since its folder was listed; restore it") from None
    except Exception as error:  # whatever a damaged or hostile file makes the decoders raise
        raise InputError(f"{path}: cannot be decoded ({reason(error)}); restore or remove the file; python check_data.py finds "
                         f"every such file of a dataset at once") from None


def _is_upright(image):
    return "exif" not in image.info or image.getexif().get(ORIENTATION, 1) == 1


# --- the person split ---

def split_people(photos, val_ratio=0.2, seed=0, n_folds=0, fold=0):
    """Split whole people, stratified on gender x age band.

    People are shuffled within their group, the groups are laid end to end, and validation takes evenly spaced places
    (systematic sampling): the share is exact, and every group's is exact to within one person. The folds are
    the same picture: fold k takes places k, k + n_folds, ...

    Args:
        photos: the table of `read_train`.
        val_ratio: share of the people, 0 <= val_ratio < 1; 0 puts everyone into training.
        seed: of the shuffle.
        n_folds, fold: with n_folds >= 2, validation is fold `fold` of `n_folds`, and val_ratio is not used.

    Returns:
        (train, valid): two tables with disjoint people.

    Raises:
        InputError: if either side would be empty.
    """
    people = photos.drop_duplicates("person").sort_values("person")
    shuffled = people.iloc[np.random.default_rng(seed).permutation(len(people))]
    ordered = shuffled.sort_values(["gender", "age"], kind="stable").person.to_numpy()
    if n_folds:
        places = np.arange(len(ordered))[fold::n_folds]
    else:
        num_valid = round(len(ordered) * val_ratio)
        places = np.floor((np.arange(num_valid) + 0.5) * len(ordered) / max(num_valid, 1)).astype(int)
    wants_valid = n_folds or val_ratio > 0
    if len(places) == len(ordered) or (wants_valid and not len(places)) or len(ordered) < n_folds:
        asked = f"--n_folds {n_folds}" if n_folds else f"--val_ratio {val_ratio}"
        raise InputError(f"{len(ordered)} people are too few for {asked}: both sides of the split need at least one person")
    is_valid = photos.person.isin(ordered[places])
    return photos[~is_valid].reset_index(drop=True), photos[is_valid].reset_index(drop=True)


def fingerprint(photos):
    """A hash of who is in the dataset, with which shots, years and labels; a resumed run must see the same."""
    return hashlib.sha256(photos[["person", "shot", "years", "label"]].to_csv(index=False).encode()).hexdigest()
