"""Class codes, the person split, crop and resize, augmentation, and the batches of a run."""
import math
import random

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_people
from scipy.stats import norm

from core import distributed
from core.errors import InputError
from core.labels import CLASS_NAMES, GENDERS, age_band, decode, encode
from core.layout import read_train
from core.prediction import predict
from dataset import (
    AUGMENTATIONS,
    Augmentation,
    BatchSampler,
    CropResize,
    MaskDataset,
    RandomAffine,
    add_soft_targets,
    create_eval_loader,
    create_train_loader,
    split_people,
)
from loss import soft_targets

CPU = torch.device("cpu")


def test_class_code_by_the_task_statement():
    table = {(0, 0, 0): 0, (0, 0, 2): 2, (0, 1, 0): 3, (1, 0, 0): 6, (1, 1, 2): 11, (2, 0, 1): 13,
             (2, 1, 2): 17}
    for parts, label in table.items():
        assert encode(*parts) == label and decode(label) == parts
    assert age_band([18, 29, 30, 59, 60, 75]).tolist() == [0, 0, 1, 1, 2, 2]
    assert CLASS_NAMES[10] == "incorrect, female, 30-59" and len(CLASS_NAMES) == 18


# --- person split ---

def people_table(n, seed=0):
    people = make_people(n, seed)
    genders = [GENDERS.index(person.split("_")[1]) for person in people]
    ages = [int(age_band(int(person.split("_")[3]))) for person in people]
    table = pd.DataFrame({"person": people, "gender": genders, "age": ages})
    return table.loc[table.index.repeat(7)].reset_index(drop=True)


@pytest.mark.parametrize("ratio", [0.2, 0.181, 0.5, 0.05])
def test_split_is_by_person_stratified_and_exact(ratio):
    photos = people_table(199)
    train, valid = split_people(photos, ratio, seed=3)
    assert not set(train.person) & set(valid.person) and len(train) + len(valid) == len(photos)
    assert valid.person.nunique() == round(199 * ratio)
    held_out = valid.drop_duplicates("person").groupby(["gender", "age"]).size()
    for group, people in photos.drop_duplicates("person").groupby(["gender", "age"]):
        assert abs(held_out.get(group, 0) - ratio * len(people)) < 1


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


def test_too_few_people():
    with pytest.raises(InputError, match="3 people are too few for --n_folds 5"):
        split_people(people_table(3), n_folds=5, fold=0)
    with pytest.raises(InputError, match="too few for --val_ratio"):
        split_people(people_table(2), val_ratio=0.2)


# --- photos without labels ---

def soft_table(path, rows):
    """Write probabilities: rows of (ImageID, {class: probability})."""
    table = pd.DataFrame([{"ImageID": name, **{f"p{i}": p.get(i, 0) for i in range(18)}}
                          for name, p in rows])
    table.to_csv(path, index=False)
    return path


def test_soft_targets_of_eval_photos_are_the_mean_of_the_files(dataset, tmp_path):
    photos = read_train(dataset)
    targets = soft_targets(photos)
    names = sorted(path.name for path in (dataset / "eval/images").iterdir())[:2]
    one = soft_table(tmp_path / "one.csv", [(names[0], {3: 1}), (names[1], {14: 0.6, 12: 0.4})])
    other = soft_table(tmp_path / "other.csv", [(names[1], {14: 0.2, 12: 0.8}),
                                                (names[0], {3: 0.5, 17: 0.5})])
    more, soft = add_soft_targets(photos, targets, [one, other], dataset)
    assert len(more) == len(soft) == len(photos) + 2
    columns = ["path", "gender", "age"]
    pd.testing.assert_frame_equal(more[columns][:len(photos)], photos[columns])
    assert torch.equal(soft[:len(photos)], targets) and soft.dtype == torch.float32
    added = {path.rsplit("/")[-1]: (gender, age, target) for path, gender, age, target
             in zip(more.path, more.gender, more.age, soft.tolist(), strict=True)}
    gender, age, target = added[names[0]]  # class 3: female, under 30
    assert (gender, age, target[3], target[17]) == (1, 0, 0.75, 0.25)
    gender, age, target = added[names[1]]  # class 12: male, under 30
    assert (gender, age, target[12], target[14]) == (0, 0, pytest.approx(0.6), pytest.approx(0.4))


@pytest.mark.parametrize("change, message", [
    (lambda rows: [rows[0], ("no.jpg", {0: 1})], "'no.jpg' is not in the eval part"),
    (lambda rows: rows[:1], "or not in all files"),
    (lambda rows: [rows[0], (rows[1][0], {0: 2})], "line 3: expected p0..p17 >= 0 with a sum of 1"),
    (lambda rows: [rows[0], (rows[1][0], {0: 2, 1: -1})], "line 3: expected p0..p17 >= 0"),
    (lambda rows: [rows[0], (rows[1][0], {0: "x", 1: 1})], "line 3: expected p0..p17 >= 0"),
    (lambda rows: rows + rows[:1], "is repeated"),
])
def test_other_soft_targets_are_refused(dataset, tmp_path, change, message):
    photos = read_train(dataset)
    names = sorted(path.name for path in (dataset / "eval/images").iterdir())[:2]
    rows = [(name, {0: 1}) for name in names]
    files = [soft_table(tmp_path / "one.csv", rows), soft_table(tmp_path / "b.csv", change(rows))]
    with pytest.raises(InputError, match=message):
        add_soft_targets(photos, soft_targets(photos), files, dataset)


# --- crop, resize and augmentation ---

def smooth_photo(height, width):
    y, x = np.mgrid[:height, :width] / 40
    waves = np.stack([np.sin(x + y), np.cos(x - y), np.sin(2 * x)], axis=2)
    return (127 + 120 * waves).astype(np.uint8)


def test_crop_and_resize_by_hand():
    pixels = np.arange(40 * 20, dtype=np.float64).reshape(40, 20) % 251
    image = np.stack([pixels.astype(np.uint8)] * 3, axis=2)
    # Half the height and width, without a change of resolution: a plain slice.
    assert (CropResize((20, 10), (0.5, 0.5))(image)[:, :, 0] == pixels[10:30, 5:15]).all()
    assert CropResize((8, 6))(image).shape == (8, 6, 3)  # (height, width), never swapped


# Photos for one pass, for antialiasing first, and for much antialiasing first.
@pytest.mark.parametrize(("height", "width"), [(200, 120), (480, 300), (1200, 900)])
def test_an_affine_identity_gives_crop_and_resize_alone(height, width):
    photo, crop_resize = smooth_photo(height, width), CropResize((120, 90), (0.8, 0.9))
    moved = crop_resize(photo, np.eye(3)).astype(int)
    difference = np.abs(moved - crop_resize(photo))[2:-2, 2:-2]
    assert difference.mean() < 1.5 and difference.max() <= 12


@pytest.mark.parametrize("shrinks", [1.6, 3, 4.4])
def test_augmented_photos_are_as_sharp_as_those_of_validation(shrinks):
    crop_resize, rng = CropResize((64, 48)), np.random.default_rng(0)
    height, width = round(64 * shrinks), round(48 * shrinks)
    # Noise with a 1/f spectrum, which photos of all kinds have.
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    noise = np.fft.fft2(rng.normal(size=(height, width)))
    photo = np.fft.ifft2(noise / np.maximum(frequency, 1 / height)).real
    photo = (128 + 40 * photo / photo.std()).clip(0, 255).astype(np.uint8)
    photo = np.repeat(photo[:, :, None], 3, axis=2)
    affine = RandomAffine(p=1, shift=0.05, rotate=10)

    def detail(image):
        return np.abs(np.diff(image[:, :, 0].astype(float), axis=1)).mean()

    moved = [detail(crop_resize(photo, affine.draw(rng, crop_resize.size)[1])) for _ in range(50)]
    assert np.mean(moved) == pytest.approx(detail(crop_resize(photo)), rel=0.07)


def test_affine_by_hand():
    photo = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    crop_resize = CropResize((20, 10), (0.5, 1 / 3))
    moved = np.array([[1, 0, -3], [0, 1, 2], [0, 0, 1]])  # each pixel: from 3 left and 2 below
    assert (crop_resize(photo, moved) == photo[12:32, 7:17]).all()
    # Rows 25 .. 44 of a photo with 40 rows: the last five are reflections of rows 38 .. 34.
    outside = np.array([[1, 0, 0], [0, 1, 15], [0, 0, 1]])
    expected = np.concatenate([photo[25:40, 10:20], photo[38:33:-1, 10:20]])
    assert (crop_resize(photo, outside) == expected).all()


@pytest.mark.parametrize("augmentation", ["base", "robust"])  # the presets that move photos
def test_random_affine_moves_in_all_directions_equally(augmentation):
    """A shift in one direction only would train on faces in other places than in validation."""
    affine, size = AUGMENTATIONS[augmentation]()[0], (100, 50)
    rng = np.random.default_rng(0)
    draws = [affine.draw(rng, size) for _ in range(4000)]
    matrices = np.array([matrix for _, matrix in draws if matrix is not None])
    assert len(matrices) / 4000 == pytest.approx(affine.p, abs=0.03)
    mirrors = np.linalg.det(matrices) < 0
    others = [is_mirrored for is_mirrored, matrix in draws if matrix is None]
    assert mirrors.mean() == pytest.approx(0.5, abs=0.03)
    assert np.mean(others) == pytest.approx(0.5, abs=0.1)
    # Undo the mirror, which is about the centre, 24.5.
    matrices[mirrors] = matrices[mirrors] @ [[-1, 0, 49], [0, 1, 0], [0, 0, 1]]
    centre = np.array([24.5, 49.5, 1])
    moves = (matrices @ centre - centre)[:, :2] / (50, 100)
    # The rotation mixes both axes, which adds less than a half.
    low, high = np.array(affine.zoom) * (affine.scale or 1)
    largest = affine.shift * 1.5 / low
    assert (np.abs(moves) < largest).all()
    assert (np.abs(moves.mean(axis=0)) < 0.1 * affine.shift).all()
    zoom = 1 / np.linalg.norm(matrices[:, :2, :2], axis=1)
    edge = 0.03 if affine.scale else 0.01  # two draws are rarely both at their edge
    assert low <= zoom.min() < low + edge and high - edge < zoom.max() <= high
    # `scale` is the same for width and height, `zoom` is not.
    distortion = np.abs(np.log(zoom[:, 0] / zoom[:, 1]))
    most = np.log(affine.zoom[1] / affine.zoom[0])
    assert most - 0.02 < distortion.max() <= most
    angles = np.degrees(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    assert -affine.rotate <= angles.min() < 1 - affine.rotate
    assert affine.rotate - 1 < angles.max() <= affine.rotate


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_transforms_of_a_preset_draw_independently(augmentation):
    """With one seed for each, all transforms would draw the same number.

    Every erased photo would then be a brightened photo, too.
    """
    transforms = Augmentation(augmentation).others
    if not len(transforms):
        return
    transforms.set_random_state(np.random.default_rng(1), random.Random(1))
    assert len({id(t.py_random) for t in transforms}) == 1
    assert transforms[0].py_random.random() != transforms[-1].py_random.random()


# --- dataset ---

def test_crop_and_resize_are_shared_and_only_training_is_augmented(dataset):
    photos = read_train(dataset)
    plain = MaskDataset(photos, CropResize((32, 24)))
    train = MaskDataset(photos, CropResize((32, 24)), Augmentation("base"))
    assert torch.equal(plain[3][0], train[3][0])  # without a seed, as validation asks
    assert not torch.equal(plain[3][0], train[3, 7][0])
    assert torch.equal(train[3, 7][0], train[3, 7][0])
    assert not torch.equal(train[3, 7][0], train[3, 8][0])
    assert plain[3][0].dtype == torch.uint8 and plain[3][0].shape == (32, 24, 3)


def test_two_datasets_share_nothing(dataset):
    """Lists that belong to the class would put validation photos into training."""
    train, valid = split_people(read_train(dataset), 0.2)
    sets = [MaskDataset(photos, CropResize((16, 16)), targets=soft_targets(photos))
            for photos in (train, valid)]
    for photos, own in zip((train, valid), sets, strict=True):
        assert len(own) == len(photos) and list(own.paths) == photos.path.tolist()
        assert own.targets.argmax(1).tolist() == photos.label.tolist()


def test_soft_targets_against_scipy():
    photos = pd.DataFrame({"years": [18, 29, 30, 58, 60, 85], "mask": [0, 1, 2, 0, 1, 2],
                           "gender": [0, 1, 1, 0, 1, 0]})
    for sigma, old_age in [(3.0, 60), (1.5, 58)]:
        targets = soft_targets(photos, sigma, old_age)
        for row, photo in zip(targets, photos.itertuples(), strict=True):
            ages = norm(photo.years, sigma)
            young, old = ages.cdf(29.5), ages.sf(old_age - 0.5)
            expected = np.zeros((3, 2, 3))
            expected[photo.mask, photo.gender] = young, 1 - young - old, old
            assert row.numpy() == pytest.approx(expected.ravel(), abs=1e-6)
    hard = soft_targets(photos)  # mask * 6 + gender * 3 + age band
    assert hard.argmax(1).tolist() == [0, 9, 16, 1, 11, 14]
    assert hard.sum() == hard.max(1).values.sum() == 6
    assert soft_targets(photos, old_age=58).argmax(1).tolist() == [0, 9, 16, 2, 11, 14]


# --- batches of a training run ---

def photo_groups(*sizes):
    """Return a table of men, with the given number of photos of each age band."""
    return pd.DataFrame({"gender": 0, "age": np.repeat(range(len(sizes)), sizes)})


@pytest.mark.parametrize("sampler", ["none", "sqrt", "balanced"])
def test_batch_k_depends_on_seed_and_k_alone(sampler, monkeypatch):
    """It depends neither on the batches that were asked for before, nor on the processes."""
    photos = photo_groups(30, 7)
    order = BatchSampler(photos, 16, sampler, seed=4)
    batches = [order.batch(k) for k in range(12)]
    assert all(len(batch) == 16 for batch in batches)
    assert len({tuple(batch) for batch in batches}) == 12
    assert BatchSampler(photos, 16, sampler, seed=5).batch(3) != batches[3]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    again = BatchSampler(photos, 16, sampler, seed=4)
    for k in (11, 2, 7, 0, 11):  # in any order, and by a new sampler
        assert again.batch(k) == batches[k]


@pytest.mark.parametrize(("num_photos", "batch_size"), [(168, 32), (168, 24), (7, 16)])
def test_without_a_sampler_every_photo_comes_once_per_pass(num_photos, batch_size):
    """Also when the batches do not divide the photos, or when one batch holds several passes."""
    order = BatchSampler(photo_groups(num_photos), batch_size, "none", seed=1)
    num_passes = 2 * batch_size // math.gcd(num_photos, batch_size)
    batches = [order.batch(k) for k in range(num_passes * num_photos // batch_size)]
    assert {len(batch) for batch in batches} == {batch_size}
    indices = [index for batch in batches for index, _ in batch]
    passes = [indices[i:i + num_photos] for i in range(0, len(indices), num_photos)]
    assert len(passes) == num_passes and passes[0] != passes[1]
    for one_pass in passes:
        assert sorted(one_pass) == list(range(num_photos))


@pytest.mark.parametrize(("sampler", "share"), [
    ("none", 1 / 3), ("balanced", 1 / 2), ("sqrt", 1 / (1 + 2 ** 0.5))])
def test_weighted_sampler_draws_groups_as_asked(sampler, share):
    # 600 photos of young men and 300 of old men. Shares of the young and the old: 2/3 and 1/3 in
    # the data, 1/2 each if balanced, sqrt(2) : 1 with the square root.
    photos = pd.DataFrame({"gender": 0, "age": [0] * 600 + [2] * 300})
    order = BatchSampler(photos, 900, sampler, seed=2)
    is_old = np.array([index >= 600 for k in range(20) for index, _ in order.batch(k)])
    assert len(is_old) == 18000
    tolerance = 1e-9 if sampler == "none" else 3 * (0.25 / 18000) ** 0.5  # 3 standard errors
    assert is_old.mean() == pytest.approx(share, abs=tolerance)


def test_weighted_sampler_draws_within_a_group_uniformly():
    order = BatchSampler(photo_groups(8, 2), 1000, "balanced", seed=3)
    drawn = np.bincount([index for k in range(20) for index, _ in order.batch(k)], minlength=10)
    # Half of the 20,000 draws go to 8 photos, the other half to 2. Five standard errors.
    expected = np.array([1250] * 8 + [5000] * 2)
    assert (np.abs(drawn - expected) < 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize("sampler", ["none", "balanced"])
def test_a_photo_that_comes_twice_gets_two_augmentations(sampler):
    order = BatchSampler(photo_groups(60, 40), 100, sampler)
    seeds = [seed for k in range(3) for _, seed in order.batch(k)]
    assert len(set(seeds)) == len(seeds)


def test_labels_are_never_read_from_images(dataset):
    photos = read_train(dataset).assign(path="nowhere.jpg")
    assert len(BatchSampler(photos, 16, "balanced").batch(0)) == 16
    assert soft_targets(photos).argmax(1).tolist() == photos.label.tolist()


def train_batches(photos, sampler, first, last, workers):
    data = MaskDataset(photos, CropResize((16, 16)), Augmentation("base"), soft_targets(photos))
    order = BatchSampler(photos, 16, sampler, seed=4)
    return create_train_loader(data, order, first, last, workers, CPU)


def assert_same_batches(one, other):
    for batch, again in zip(one, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))


@pytest.mark.parametrize("sampler", ["none", "sqrt"])
def test_train_batches_are_the_same_for_any_number_of_workers(dataset, sampler):
    photos = read_train(dataset)
    batches = list(train_batches(photos, sampler, 0, 13, workers=0))  # more than one pass
    assert len(batches) == 13
    for images, targets in batches:
        assert images.shape == (16, 16, 16, 3) and images.dtype == torch.uint8
        assert targets.shape == (16, 18)
    for workers in (1, 3):
        assert_same_batches(train_batches(photos, sampler, 0, 13, workers), batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_can_start_at_any_batch(dataset, workers):
    photos = read_train(dataset)
    batches = list(train_batches(photos, "none", 0, 13, workers=0))
    assert_same_batches(train_batches(photos, "none", 9, 13, workers), batches[9:])


def test_train_batches_hold_the_drawn_photos_with_their_targets(dataset):
    photos = read_train(dataset)
    data = MaskDataset(photos, CropResize((16, 16)), Augmentation("base"), soft_targets(photos))
    order = BatchSampler(photos, 16, "sqrt", seed=4)
    for k, (images, targets) in enumerate(create_train_loader(data, order, 3, 5, 0, CPU), start=3):
        draws = order.batch(k)
        assert torch.equal(images, torch.stack([data[draw][0] for draw in draws]))
        assert targets.argmax(1).tolist() == photos.label[[index for index, _ in draws]].tolist()


# --- batches of an evaluation ---

@pytest.mark.parametrize(("count", "batch_size", "num_batches", "size"), [
    (168, 64, 3, 56),  # divides: nothing is padded
    (167, 64, 3, 56), (5, 2, 3, 2), (10, 4, 3, 4), (3, 64, 1, 3), (0, 64, 0, None)])
@pytest.mark.parametrize("workers", [0, 2])
def test_eval_batches_have_one_size_in_order_and_the_last_is_padded(
        dataset, count, batch_size, num_batches, size, workers):
    data = MaskDataset(read_train(dataset)[:count], CropResize((16, 16)))
    batches = [images for images, _ in create_eval_loader(data, batch_size, workers, CPU)]
    assert [len(images) for images in batches] == [size] * num_batches
    if count:
        images = torch.cat(batches)
        assert torch.equal(images[:count], torch.stack([data[i][0] for i in range(count)]))
        assert all(torch.equal(image, data[count - 1][0]) for image in images[count:])


def test_predictions_of_padded_batches_are_those_of_single_photos_without_the_padding(dataset):
    data = MaskDataset(read_train(dataset)[:11], CropResize((16, 16)))

    def predictor(images):
        return images.double().mean(dim=(1, 2)).repeat(1, 6) / 255

    padded = predict([(predictor, "none")], create_eval_loader(data, 4, 0, CPU), CPU)
    single = predict([(predictor, "none")], create_eval_loader(data, 1, 0, CPU), CPU)
    assert padded.shape == (1, 11, 18) and (padded == single).all()


def test_processes_evaluate_disjoint_batches_that_are_all_batches_together(dataset, monkeypatch):
    data = MaskDataset(read_train(dataset)[:22], CropResize((16, 16)))
    alone = list(create_eval_loader(data, 4, 0, CPU).batch_sampler)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(list(create_eval_loader(data, 4, 0, CPU).batch_sampler))
    assert [share[0] for share in shares] == alone[:3]
    assert sorted(batch for share in shares for batch in share) == sorted(alone)
