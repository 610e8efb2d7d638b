import itertools
import logging
import math
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_people, write_eval, write_train
from PIL import Image
from scipy.stats import norm

import layout
from augmentation import AUGMENTATIONS, Augmentation, Jitter
from dataset import EpochSampler, Geometry, Loader, MaskDataset
from errors import InputError
from layout import age_band, decode, encode, read_eval, read_image, read_train, split_people
from loss import soft_targets


def test_class_code_by_the_task_statement():
    table = {(0, 0, 0): 0, (0, 0, 2): 2, (0, 1, 0): 3, (1, 0, 0): 6, (1, 1, 2): 11, (2, 0, 1): 13, (2, 1, 2): 17}
    for parts, label in table.items():
        assert encode(*parts) == label and decode(label) == parts
    assert age_band([18, 29, 30, 59, 60, 75]).tolist() == [0, 0, 1, 1, 2, 2]
    assert layout.CLASS_NAMES[10] == "incorrect, female, 30-59" and len(layout.CLASS_NAMES) == 18


@pytest.mark.parametrize("inside", ["", "train", "train/images", "eval", "eval/images"])
def test_any_folder_of_the_dataset_will_do(dataset, inside, monkeypatch):
    assert len(read_train(dataset / inside)) == 24 * 7
    assert len(read_eval(dataset / inside)) == 20
    monkeypatch.chdir(dataset / inside)
    assert len(read_train(".")) == 24 * 7 and len(read_eval(".")) == 20


def test_reader_survives_the_quirks(tmp_path):
    people = ["003397_male_Asian_20", "003397_female_Asian_61", "001498-1_male_Asian_23"]
    root = write_train(tmp_path, people)
    images = root / "train" / "images"
    for folder in images.iterdir():  # the twins that macOS leaves, which are no images
        for photo in list(folder.iterdir()):
            (folder / f"._{photo.name}").write_bytes(b"\0\5\26\7 not an image")
    (images / "._003397_male_Asian_20").write_bytes(b"x")
    shutil.copytree(images / people[0], images / ".trash")
    Image.open(images / people[0] / "mask1.jpg").save(images / people[0] / "mask1.png")
    (images / people[0] / "mask1.jpg").unlink()
    (images / people[0] / "mask2.jpg").rename(images / people[0] / "mask2.jpeg")
    (images / people[1] / "Thumbs.db").write_bytes(b"x")
    photos = read_train(root)
    assert len(photos) == 21 and photos.person.nunique() == 3
    assert not photos.path.str.contains("/._", regex=False).any()
    assert sorted(photos[photos.person == people[0]].path.map(os.path.basename))[1:3] == ["mask1.png", "mask2.jpeg"]
    assert photos[photos.person == people[1]].label.tolist() == [11, 5, 5, 5, 5, 5, 17]


def test_missing_shots_are_a_warning(tmp_path, caplog):
    root = write_train(tmp_path, make_people(3))
    (root / "train" / "images" / make_people(3)[0] / "normal.jpg").unlink()
    with caplog.at_level(logging.WARNING):
        assert len(read_train(root)) == 20
    assert make_people(3)[0] in caplog.text


def original(n=2700):
    """The people of a dataset that is recognisably the original, as a table."""
    people = [f"{i:06d}_male_Asian_19" for i in range(2, 2700)]
    people = ["000001_female_Asian_45", *people, "006959_male_Asian_19"]
    replace = {f"{i:06d}_male_Asian_19": f"{i + 4000:06d}_male_Asian_19" for i in range(2356, 2365)}
    replace |= {"002359_male_Asian_19": "006359_female_Asian_18", "000020_male_Asian_19": "000020_female_Asian_50",
                "000021_male_Asian_19": "004432_female_Asian_43", "000022_male_Asian_19": "001498-1_male_Asian_23"}
    return sorted(replace.get(person, person) for person in people)[:n]


def test_known_wrong_labels_are_fixed_only_in_the_original(tmp_path, caplog):
    root = tmp_path
    rows = [dict(zip(["id", "gender", "race", "age"], p.split("_"), strict=True), path=p) for p in original()]
    for row in rows:
        folder = root / "train" / "images" / row["path"]
        folder.mkdir(parents=True)
        for shot in ("mask1", "incorrect_mask", "normal"):
            (folder / f"{shot}.jpg").write_bytes(b"")
    pd.DataFrame(rows).to_csv(root / "train" / "train.csv", index=False)
    with caplog.at_level(logging.INFO, logger="mask"):
        fixed, as_it_is = read_train(root), read_train(root, fix_labels=False)
    changed = fixed[fixed.label != as_it_is.label]
    assert set(changed.person) == {"006359_female_Asian_18", "001498-1_male_Asian_23", "000020_female_Asian_50"}
    assert fixed[fixed.person == "006359_female_Asian_18"].gender.tolist() == [0, 0, 0]
    assert fixed[fixed.person == "001498-1_male_Asian_23"].gender.tolist() == [1, 1, 1]
    swapped = fixed[fixed.person == "000020_female_Asian_50"].set_index("shot")["mask"]
    assert swapped.to_dict() == {"incorrect_mask": 2, "mask1": 0, "normal": 1}
    assert caplog.text.count("label fixed") == 3
    # one person fewer is another dataset: nothing is touched
    pd.DataFrame(rows[:-2] + rows[-1:]).to_csv(root / "train" / "train.csv", index=False)
    shutil.rmtree(root / "train" / "images" / rows[-2]["path"])
    assert (read_train(root).label == read_train(root, fix_labels=False).label).all()


def people_table(n, seed=0):
    people = make_people(n, seed)
    genders = [layout.GENDERS.index(p.split("_")[1]) for p in people]
    ages = [int(age_band(int(p.split("_")[3]))) for p in people]
    table = pd.DataFrame({"person": people, "gender": genders, "age": ages})
    return table.loc[table.index.repeat(7)].reset_index(drop=True)


@pytest.mark.parametrize("ratio", [0.2, 0.181, 0.5, 0.05])
def test_split_is_by_person_stratified_and_exact(ratio):
    photos = people_table(199)
    train, valid = split_people(photos, ratio, seed=3)
    assert not set(train.person) & set(valid.person) and len(train) + len(valid) == len(photos)
    assert valid.person.nunique() == round(199 * ratio)
    for group, people in photos.drop_duplicates("person").groupby(["gender", "age"]):
        held = valid.drop_duplicates("person").groupby(["gender", "age"]).size().get(group, 0)
        assert abs(held - ratio * len(people)) < 1


def test_split_does_not_depend_on_the_listing_order():
    photos = people_table(60)
    one = split_people(photos, 0.2, seed=5)[1]
    other = split_people(photos.sample(frac=1, random_state=1), 0.2, seed=5)[1]
    assert set(one.person) == set(other.person)
    assert set(one.person) != set(split_people(photos, 0.2, seed=6)[1].person)


def test_folds_hold_everyone_out_once():
    photos = people_table(61)
    held = [set(split_people(photos, seed=1, n_folds=5, fold=k)[1].person) for k in range(5)]
    assert sum(map(len, held)) == 61 and set.union(*held) == set(photos.person)
    assert {len(people) for people in held} == {12, 13}


def test_val_ratio_zero_trains_on_everyone():
    train, valid = split_people(people_table(10), val_ratio=0)
    assert train.person.nunique() == 10 and len(valid) == 0


def test_modes_are_converted_alike(tmp_path):
    ramp = np.tile(np.linspace(40, 200, 32).astype(np.uint8), (32, 1))
    gray = Image.fromarray(ramp)
    rgb = np.stack([ramp] * 3, axis=2)
    variants = {"gray.png": gray, "rgb.png": Image.fromarray(rgb), "alpha.png": Image.fromarray(rgb).convert("RGBA"),
                "la.png": gray.convert("LA"), "palette.png": gray.convert("P"),
                "16bit.png": Image.fromarray(ramp.astype(np.uint16) * 257), "cmyk.jpg": Image.fromarray(rgb).convert("CMYK")}
    for name, image in variants.items():
        image.save(tmp_path / name, **({"quality": 100, "subsampling": 0} if name.endswith("jpg") else {}))
        read = read_image(tmp_path / name).astype(int)
        assert read.shape == (32, 32, 3), name
        assert abs(read - rgb).max() <= 4, name


def test_exif_rotation_is_undone(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 250
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter clockwise when shown
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=100)
    read = read_image(tmp_path / "a.jpg")
    assert read.shape == (40, 20, 3) and read[:15].mean() > 240 and read[25:].mean() < 10


def test_geometry_is_the_centre_crop_by_hand():
    pixels = np.arange(40 * 20, dtype=np.float64).reshape(40, 20) % 251
    image = np.stack([pixels.astype(np.uint8)] * 3, axis=2)
    # half the height and width, at the resolution it has: a plain slice
    assert (Geometry((20, 10), (0.5, 0.5))(image)[:, :, 0] == pixels[10:30, 5:15]).all()
    assert Geometry((8, 6))(image).shape == (8, 6, 3)  # (height, width), never the other way round


def smooth_photo(height, width):
    y, x = np.mgrid[:height, :width] / 40
    return np.stack([127 + 120 * np.sin(x + y), 127 + 120 * np.cos(x - y), 127 + 120 * np.sin(2 * x)], axis=2).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(200, 120), (480, 300), (1200, 900)])  # one pass; antialiased first; much
def test_a_jitter_that_moves_nothing_is_the_geometry_alone(height, width):
    photo, geometry = smooth_photo(height, width), Geometry((120, 90), (0.8, 0.9))
    difference = np.abs(geometry(photo, np.eye(3)).astype(int) - geometry(photo))[2:-2, 2:-2]
    assert difference.mean() < 1.5 and difference.max() <= 12


@pytest.mark.parametrize("shrinks", [1.6, 3, 4.4])
def test_jittered_photos_are_as_sharp_as_those_of_validation(shrinks):
    geometry, rng = Geometry((64, 48)), np.random.default_rng(0)
    height, width = round(64 * shrinks), round(48 * shrinks)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    waves = np.fft.fft2(rng.normal(size=(height, width))) / np.maximum(frequency, 1 / height)  # 1/f, as in photos of anything
    photo = np.fft.ifft2(waves).real
    photo = np.repeat((128 + 40 * photo / photo.std()).clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
    jitter = Jitter(p=1, shift=0.05, rotate=10)

    def detail(image):
        return np.abs(np.diff(image[:, :, 0].astype(float), axis=1)).mean()

    moved = [detail(geometry(photo, jitter.draw(rng, geometry.size)[1])) for _ in range(50)]
    assert np.mean(moved) == pytest.approx(detail(geometry(photo)), rel=0.07)


def test_jitter_by_hand():
    photo, geometry = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8), Geometry((20, 10), (0.5, 1 / 3))
    moved = np.array([[1, 0, -3], [0, 1, 2], [0, 0, 1]])  # each pixel comes from 3 to the left and 2 below
    assert (geometry(photo, moved) == photo[12:32, 7:17]).all()
    outside = np.array([[1, 0, 0], [0, 1, 15], [0, 0, 1]])  # rows 25 .. 44 of 40: the last five are reflections of 38 .. 34
    assert (geometry(photo, outside) == np.concatenate([photo[25:40, 10:20], photo[38:33:-1, 10:20]])).all()


@pytest.mark.parametrize("augmentation", ["base", "strong"])
def test_jitter_moves_to_all_sides_alike(augmentation):
    """A shift in one direction only would train on faces that stand elsewhere than those of validation."""
    jitter, size, rng = AUGMENTATIONS[augmentation]()[0], (100, 50), np.random.default_rng(0)
    draws = [jitter.draw(rng, size) for _ in range(4000)]
    matrices = np.array([matrix for _, matrix in draws if matrix is not None])
    assert len(matrices) / 4000 == pytest.approx(jitter.p, abs=0.03)
    mirrors = np.linalg.det(matrices) < 0
    others = [is_mirrored for is_mirrored, matrix in draws if matrix is None]
    assert mirrors.mean() == pytest.approx(0.5, abs=0.03) and np.mean(others) == pytest.approx(0.5, abs=0.1)
    matrices[mirrors] = matrices[mirrors] @ [[-1, 0, 49], [0, 1, 0], [0, 0, 1]]  # mirrored back about the centre, 24.5
    centre = np.array([24.5, 49.5, 1])
    moves = (matrices @ centre - centre)[:, :2] / (50, 100)
    largest = jitter.shift * 1.5 / jitter.zoom[0]  # the turn mixes both axes, by less than a half more
    assert (np.abs(moves) < largest).all() and (np.abs(moves.mean(axis=0)) < 0.1 * jitter.shift).all()
    zoom = 1 / np.linalg.norm(matrices[:, :2, :2], axis=1)
    low, high = jitter.zoom
    assert low <= zoom.min() < low + 0.01 and high - 0.01 < zoom.max() <= high
    turn = np.degrees(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    assert -jitter.rotate <= turn.min() < 1 - jitter.rotate and jitter.rotate - 1 < turn.max() <= jitter.rotate


def test_a_large_jpeg_is_decoded_no_smaller_than_asked_and_as_pillow_does(tmp_path):
    Image.fromarray(smooth_photo(400, 320)).save(tmp_path / "a.jpg", quality=95)
    pillow = Image.open(tmp_path / "a.jpg").convert("RGB")
    for at_least, shape in [((math.inf, math.inf), (400, 320)), ((201, 100), (400, 320)), ((200, 160), (200, 160)),
                            ((100, 60), (100, 80)), ((1, 1), (50, 40))]:
        read = read_image(tmp_path / "a.jpg", at_least)
        assert read.shape == (*shape, 3)
        assert np.abs(read.astype(int) - np.asarray(pillow.resize(shape[::-1], Image.Resampling.BOX))).mean() < 3
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - np.asarray(pillow)).max() <= 2


def test_training_and_validation_share_the_geometry_and_only_training_is_augmented(dataset):
    photos = read_train(dataset)
    plain = MaskDataset(photos, Geometry((32, 24)))
    train = MaskDataset(photos, Geometry((32, 24)), Augmentation("strong"))
    assert torch.equal(plain[3][0], train[3][0])  # asked for without a draw seed, as validation does
    assert not torch.equal(plain[3][0], train[3, 7][0])
    assert torch.equal(train[3, 7][0], train[3, 7][0]) and not torch.equal(train[3, 7][0], train[3, 8][0])
    assert plain[3][0].dtype == torch.uint8 and plain[3][0].shape == (3, 32, 24)


def test_two_datasets_share_nothing(dataset):
    """Class-level lists put validation photos into training."""
    train, valid = split_people(read_train(dataset), 0.2)
    sets = [MaskDataset(photos, Geometry((16, 16)), targets=soft_targets(photos)) for photos in (train, valid)]
    for photos, own in zip((train, valid), sets, strict=True):
        assert len(own) == len(photos) and list(own.paths) == photos.path.tolist()
        assert own.targets.argmax(1).tolist() == photos.label.tolist()


def test_soft_targets_against_scipy():
    photos = pd.DataFrame({"years": [18, 29, 30, 58, 60, 85], "mask": [0, 1, 2, 0, 1, 2], "gender": [0, 1, 1, 0, 1, 0]})
    for sigma, old_age in [(3.0, 60), (1.5, 58)]:
        for row, photo in zip(soft_targets(photos, sigma, old_age), photos.itertuples(), strict=True):
            ages = norm(photo.years, sigma)
            young, old = ages.cdf(29.5), ages.sf(old_age - 0.5)
            expected = np.zeros((3, 2, 3))
            expected[photo.mask, photo.gender] = young, 1 - young - old, old
            assert row.numpy() == pytest.approx(expected.ravel(), abs=1e-6)
    hard = soft_targets(photos)  # mask * 6 + gender * 3 + age band
    assert hard.argmax(1).tolist() == [0, 9, 16, 1, 11, 14] and hard.sum() == hard.max(1).values.sum() == 6
    assert soft_targets(photos, old_age=58).argmax(1).tolist() == [0, 9, 16, 2, 11, 14]


def test_labels_are_never_read_from_images(dataset):
    photos = read_train(dataset).assign(path="nowhere.jpg")
    assert len(list(EpochSampler(photos, 16, "balanced"))) == 11


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_transforms_of_a_preset_draw_independently(augmentation):
    """Given one seed for all, every transform would draw the same number: flipped photos would be the brightened ones."""
    transforms = Augmentation(augmentation).others
    if not len(transforms):
        return
    import random
    transforms.set_random_state(np.random.default_rng(1), random.Random(1))
    assert len({id(t.py_random) for t in transforms}) == 1
    assert transforms[0].py_random.random() != transforms[-1].py_random.random()


def batches(photos, workers, sampler, epoch=0, first=0):
    data = MaskDataset(photos, Geometry((16, 16)), Augmentation("base"))
    order = EpochSampler(photos, 16, sampler, seed=4)
    order.set_epoch(epoch, first)
    return list(Loader(data, workers, torch.device("cpu"), batch_sampler=order))


def test_batches_are_the_same_for_any_number_of_workers(dataset):
    photos = read_train(dataset)
    one, other = (batches(photos, workers, "sqrt", epoch=1) for workers in (0, 3))
    for batch, again in zip(one, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))


def test_a_batch_stays_as_it_is_whatever_is_loaded_next(dataset):
    photos = read_train(dataset)
    loader = Loader(MaskDataset(photos, Geometry((16, 16)), Augmentation("base")), 1, torch.device("cpu"),
                    batch_sampler=EpochSampler(photos, 16, "sqrt", seed=4))
    first = [images for images, _ in itertools.islice(loader, 3)]  # an epoch that is broken off
    again = [images for images, _ in loader]
    assert len(again) == 11 and all(torch.equal(a, b) for a, b in zip(first, again, strict=False))
    assert all(torch.equal(a, b[0]) for a, b in zip(again, batches(photos, 0, "sqrt"), strict=True))
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images in again)


def test_an_epoch_can_be_entered_in_the_middle(dataset):
    photos = read_train(dataset)
    for (a, *_), (b, *_) in zip(batches(photos, 0, "none")[4:], batches(photos, 0, "none", first=4), strict=True):
        assert torch.equal(a, b)


def test_every_photo_once_an_epoch_and_no_runt_batch(dataset):
    photos = read_train(dataset)  # 168 = 5 x 32 + 8
    sampler = EpochSampler(photos, 32, "none", seed=1)
    orders = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        sizes = [len(batch) for batch in sampler]
        assert len(sizes) == 6 and max(sizes) - min(sizes) <= 1 and max(sizes) <= 32
        orders.append([index for batch in sampler for index, _ in batch])
        assert sorted(orders[-1]) == list(range(168))
    assert orders[0] != orders[1]


def test_weighted_sampler_draws_groups_as_asked():
    # 60 young men, 30 of them old: shares 2/3 and 1/3 by nature, 1/2 balanced, sqrt(2) : 1 by the square root
    photos = pd.DataFrame({"gender": 0, "age": [0] * 600 + [2] * 300})
    for sampler, share in [("none", 1 / 3), ("balanced", 1 / 2), ("sqrt", 1 / (1 + 2 ** 0.5))]:
        drawn = []
        order = EpochSampler(photos, 900, sampler, seed=2)
        for epoch in range(20):
            order.set_epoch(epoch)
            drawn += [index >= 600 for batch in order for index, _ in batch]
        # three standard errors of 18,000 draws
        assert np.mean(drawn) == pytest.approx(share, abs=1e-9 if sampler == "none" else 3 * (0.25 / 18000) ** 0.5)


def test_a_photo_drawn_twice_gets_two_augmentations():
    photos = pd.DataFrame({"gender": [0, 1], "age": [0, 0]})
    seeds = [seed for batch in EpochSampler(pd.concat([photos] * 50), 100, "balanced") for _, seed in batch]
    assert len(set(seeds)) == len(seeds)


def test_submission_order_is_info_order(tmp_path):
    root = write_eval(tmp_path)
    ids = pd.read_csv(root / "eval" / "info.csv").ImageID.tolist()
    assert read_eval(root).ImageID.tolist() == ids != sorted(ids)


def test_links_of_the_owner_are_followed(tmp_path, dataset):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "images").symlink_to(dataset / "train" / "images")
    shutil.copy(dataset / "train" / "train.csv", tmp_path / "train")
    assert len(read_train(tmp_path)) == 168


def test_too_few_people():
    with pytest.raises(InputError, match="3 people are too few for --n_folds 5"):
        split_people(people_table(3), n_folds=5, fold=0)
    with pytest.raises(InputError, match="too few for --val_ratio"):
        split_people(people_table(2), val_ratio=0.2)
