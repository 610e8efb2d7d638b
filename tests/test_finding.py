"""Finding photos: every layout and link, and nothing is left out without a word."""
import logging
import os
import shutil
import socket

import pandas as pd
import pytest
from conftest import make_people, write_eval, write_train
from photo_files import JPEG, PNG

import inference
from core.errors import InputError
from core.layout import find_part, list_images, read_eval, read_train

SUFFIXES = ["jpg", "JPEG", "jpe", "jfif", "Png", "bmp", "webp", "tif", "TIFF", "gif"]


def put(path, data=JPEG):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def found(folder, *others):
    return list_images([folder, *others]).ImageID.tolist()


# --- any photos ---

def test_every_suffix_is_found_in_every_folder_and_the_rest_is_counted_by_kind(tmp_path, caplog):
    names = sorted([*(f"a/{i}.{suffix}" for i, suffix in enumerate(SUFFIXES)), "b/c/d.jpg",
                    "b.jpg/e.JPG", "사진/f.jpg"])
    for name in [*names, "a/1.HEIC", "2.heic", "3.heif", "4.txt", "b/5.txt", "6", "7.jpg.bak"]:
        put(tmp_path / name)
    os.mkfifo(tmp_path / "fifo.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.jpg"))
        assert found(tmp_path) == names
    assert len(caplog.messages) == 1
    for part in ["2 x .heic (convert to JPEG)", "1 x .heif (convert to JPEG)", "2 x .txt",
                 "1 x no suffix", "1 x .bak", "2 x not a file", f"such as {tmp_path}/2.heic"]:
        assert part in caplog.messages[0]
    assert "folder" not in caplog.messages[0]


def test_what_other_programs_leave_behind_is_skipped_and_only_its_photos_are_counted(
        tmp_path, caplog):
    put(tmp_path / "photo.jpg")
    for name in ["@eaDir/photo.jpg/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/._photo.jpg", "._photo.jpg",
                 ".ipynb_checkpoints/photo-checkpoint.jpg", "sub/.trash/x.png", "Thumbs.db",
                 ".DS_Store", "__pycache__/x.pyc"]:
        put(tmp_path / name)
    assert found(tmp_path) == ["photo.jpg"]
    assert caplog.messages == [f"warning: files left out: 5 x hidden, or made by another program, "
                               f"such as {tmp_path}/._photo.jpg"]
    # A folder is read if it is asked for by its name.
    assert found(tmp_path / "sub" / ".trash") == ["x.png"]


def test_links_to_folders_and_photos_are_followed_and_loops_end(tmp_path, caplog):
    put(tmp_path / "elsewhere" / "b.jpg")
    put(tmp_path / "elsewhere" / "deep" / "c.jpg")
    photos = tmp_path / "photos"
    put(photos / "a.jpg")
    (photos / "album").symlink_to("../elsewhere")
    (photos / "one.jpg").symlink_to("../elsewhere/b.jpg")
    # Loops: to itself, to the folder above, and through the folder beside it.
    (photos / "self").symlink_to(".")
    (photos / "album" / "up").symlink_to("..")
    (photos / "album" / "deep" / "back").symlink_to(photos)
    names = found(photos)
    assert [name.rpartition("/")[2] for name in names] == ["a.jpg", "b.jpg", "c.jpg", "one.jpg"]
    assert names[1:3] == ["album/b.jpg", "album/deep/c.jpg"] and not caplog.messages
    put(tmp_path / "camera" / "d.jpg")
    (tmp_path / "links" / "only").mkdir(parents=True)
    (tmp_path / "links" / "only" / "album").symlink_to(tmp_path / "camera")
    assert found(tmp_path / "links") == ["only/album/d.jpg"]
    assert found(tmp_path / "links" / "only" / "album") == ["d.jpg"]


def test_dead_links_are_counted_and_named(tmp_path, caplog):
    put(tmp_path / "a.jpg")
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "loop").symlink_to("loop")
    assert found(tmp_path) == ["a.jpg"]
    assert caplog.messages == [f"warning: files left out: 2 x a link to nowhere, such as "
                               f"{tmp_path}/gone.jpg"]
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(InputError, match=r"no images in it; expected .*\.jpg, .*\.jfif, .*\.gif"):
        found(tmp_path)
    assert "2 x a link to nowhere" in caplog.messages[1]


# --- a dataset ---

@pytest.mark.parametrize("inside", ["", "train", "train/images", "eval", "eval/images"])
def test_any_folder_of_the_dataset_is_accepted(dataset, inside, monkeypatch):
    assert len(read_train(dataset / inside)) == 24 * 7
    assert len(read_eval(dataset / inside)) == 20
    monkeypatch.chdir(dataset / inside)
    assert len(read_train(".")) == 24 * 7 and len(read_eval(".")) == 20


def test_shots_of_any_suffix_are_found_and_the_rest_is_counted_by_kind(tmp_path, caplog):
    people = ["003397_male_Asian_20", "003397_female_Asian_61", "001498-1_male_Asian_23"]
    images = write_train(tmp_path, people) / "train" / "images"
    first, second, third = (images / person for person in people)
    # Suffixes that the competition does not have.
    (first / "mask1.jpg").rename(first / "mask1.jfif")
    put(first / "mask2.png", PNG)
    (first / "mask2.jpg").unlink()
    (first / "mask3.jpg").rename(first / "mask3.jpeg")
    # Files and folders of other programs beside people, and beside photos.
    for folder in (first, second, third, images):
        put(folder / "._mask1.jpg")
        put(folder / "@eaDir" / "mask1.jpg" / "SYNOPHOTO_THUMB_M.jpg")
        put(folder / ".ipynb_checkpoints" / "mask1.jpg")
        put(folder / "Thumbs.db")
    shutil.copytree(first, images / "__MACOSX")
    photos = read_train(tmp_path)
    assert len(photos) == 21 and photos.person.nunique() == 3 and not caplog.messages
    assert not photos.path.str.contains("/._|@eaDir|ipynb|__MACOSX").any()
    assert photos[photos.person == people[1]].label.tolist() == [11, 5, 5, 5, 5, 5, 17]
    names = photos[photos.person == people[0]].path.map(os.path.basename)
    assert sorted(names)[1:4] == ["mask1.jfif", "mask2.png", "mask3.jpeg"]
    # What is left out.
    put(second / "mask2.png", PNG)
    put(second / "mask6.jpg")
    put(second / "mask1.heic")
    put(second / "more" / "normal.jpg")
    (third / "normal.jpg").unlink()
    (third / "normal.jpg").symlink_to("nowhere.jpg")
    assert len(read_train(tmp_path)) == 20
    assert len(caplog.messages) == 2
    for part in ["1 x a second file of a shot", "1 x not one of the seven shots", "1 x a folder",
                 "1 x .heic (convert to JPEG)", "1 x a link to nowhere"]:
        assert part in caplog.messages[0]
    assert caplog.messages[1] == (f"warning: people with fewer than 7 shots: 1, such as "
                                  f"{people[2]}; the shots that exist are used")


def test_links_to_folders_of_a_dataset_are_followed(tmp_path, dataset):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "images").symlink_to(dataset / "train" / "images")
    shutil.copy(dataset / "train" / "train.csv", tmp_path / "train")
    assert len(read_train(tmp_path)) == 168
    # Each person, and each photo.
    (tmp_path / "train" / "images").unlink()
    (tmp_path / "train" / "images").mkdir()
    for number, person in enumerate(make_people(24)):
        folder, original = (root / "train" / "images" / person for root in (tmp_path, dataset))
        if number % 2:
            folder.symlink_to(original)
        else:
            folder.mkdir()
            for photo in original.iterdir():
                (folder / photo.name).symlink_to(photo)
    assert len(read_train(tmp_path)) == 168


def test_submission_order_is_info_order(tmp_path):
    root = write_eval(tmp_path)
    ids = pd.read_csv(root / "eval" / "info.csv").ImageID.tolist()
    assert read_eval(root).ImageID.tolist() == ids != sorted(ids)


def original(n=2700):
    """Return the people of a dataset that is recognized as the competition's."""
    people = [f"{i:06d}_male_Asian_19" for i in range(2, 2700)]
    people = ["000001_female_Asian_45", *people, "006959_male_Asian_19"]
    replace = {f"{i:06d}_male_Asian_19": f"{i + 4000:06d}_male_Asian_19"
               for i in range(2356, 2365)}
    replace |= {"002359_male_Asian_19": "006359_female_Asian_18",
                "000020_male_Asian_19": "000020_female_Asian_50",
                "000021_male_Asian_19": "004432_female_Asian_43",
                "000022_male_Asian_19": "001498-1_male_Asian_23"}
    return sorted(replace.get(person, person) for person in people)[:n]


def test_known_wrong_labels_are_fixed_only_in_the_original(tmp_path, caplog):
    root = tmp_path
    rows = [dict(zip(["id", "gender", "race", "age"], person.split("_"), strict=True), path=person)
            for person in original()]
    for row in rows:
        folder = root / "train" / "images" / row["path"]
        folder.mkdir(parents=True)
        for shot in ("mask1", "incorrect_mask", "normal"):
            (folder / f"{shot}.jpg").write_bytes(b"")
    pd.DataFrame(rows).to_csv(root / "train" / "train.csv", index=False)
    with caplog.at_level(logging.INFO, logger="mask"):
        fixed, not_fixed = read_train(root), read_train(root, fix_labels=False)
    changed = fixed[fixed.label != not_fixed.label]
    assert set(changed.person) == {"006359_female_Asian_18", "001498-1_male_Asian_23",
                                   "000020_female_Asian_50"}
    assert fixed[fixed.person == "006359_female_Asian_18"].gender.tolist() == [0, 0, 0]
    assert fixed[fixed.person == "001498-1_male_Asian_23"].gender.tolist() == [1, 1, 1]
    swapped = fixed[fixed.person == "000020_female_Asian_50"].set_index("shot")["mask"]
    assert swapped.to_dict() == {"incorrect_mask": 2, "mask1": 0, "normal": 1}
    assert caplog.text.count("label fixed") == 3
    # One person fewer is another dataset: nothing is changed.
    pd.DataFrame(rows[:-2] + rows[-1:]).to_csv(root / "train" / "train.csv", index=False)
    shutil.rmtree(root / "train" / "images" / rows[-2]["path"])
    assert (read_train(root).label == read_train(root, fix_labels=False).label).all()


# --- prediction ---

@pytest.fixture
def run_inference(trained, tmp_path, monkeypatch, capsys):
    """Predict in this process: run_inference(*flags) -> what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        inference.main(["--model_dir", str(trained), "--device", "cpu", *map(str, flags)])
        return capsys.readouterr().out
    return run


def test_prediction_skips_bad_photos_and_keeps_their_rows_empty(run_inference, tmp_path):
    photos = tmp_path / "photos"
    for name in "bdf":
        put(photos / f"{name}.jpg")
    put(photos / "a.jpg", b"<html>")
    put(photos / "c.jpg", JPEG[:-40] + b"\xff\xd9")  # damage that the decoder repairs
    put(photos / "e.heic")
    with pytest.raises(InputError, match=r"a.jpg: cannot be decoded: it is an HTML page"):
        run_inference("--data_dir", photos)
    assert not (tmp_path / "predictions.csv").exists()
    out = run_inference("--data_dir", photos, "--on_bad_image", "skip", "--save_probs", "p.csv")
    assert "1 x .heic (convert to JPEG)" in out and "2 of 5 photos skipped" in out
    for name, reason in [("a", "cannot be decoded: it is an HTML page"), ("c", "damaged (")]:
        assert out.count(f"skipped: {photos}/{name}.jpg: {reason}") == 1
    assert "photos without a prediction: 2 of 5" in out and "wrote predictions.csv: 5 rows" in out
    for file in ("predictions.csv", "p.csv"):
        table = pd.read_csv(tmp_path / file, dtype=str, keep_default_na=False)
        assert table.ImageID.tolist() == ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "f.jpg"]
        values = table.drop(columns="ImageID")
        assert (values.iloc[[0, 2]] == "").all(axis=None)
        assert (values.iloc[[1, 3, 4]] != "").all(axis=None)
        assert file != "predictions.csv" or table["ans"][1].isdigit()  # "7", not "7.0"
    # The other rows are those of a prediction without the bad photos.
    (photos / "a.jpg").unlink()
    (photos / "c.jpg").unlink()
    run_inference("--data_dir", photos, "--output", "good.csv")
    good = pd.read_csv(tmp_path / "good.csv", dtype=str)
    skipped = pd.read_csv(tmp_path / "predictions.csv", dtype=str).dropna()
    assert skipped.to_numpy().tolist() == good.to_numpy().tolist()


def test_bad_photos_cannot_be_skipped_where_every_row_is_needed(run_inference, copy, tmp_path):
    put(next((copy / "eval" / "images").iterdir()), b"")
    with pytest.raises(InputError, match="--on_bad_image skip: a submission needs all rows of the "
                                         "eval part"):
        run_inference("--data_dir", copy, "--on_bad_image", "skip")
    with pytest.raises(InputError, match="an empty file; download or copy it again"):
        run_inference("--data_dir", copy)
    put(tmp_path / "photos" / "a.jpg", b"")
    with pytest.raises(InputError, match="photos: none of its photos can be decoded"):
        run_inference("--data_dir", tmp_path / "photos", "--on_bad_image", "skip")
    assert not list(tmp_path.glob("*.csv"))


@pytest.mark.parametrize("inside", ["train/images", "train"])
def test_the_photos_of_the_train_part_are_predicted_if_it_is_named(run_inference, tmp_path, inside,
                                                                   dataset):
    assert "wrote predictions.csv: 168 rows" in run_inference("--data_dir", dataset / inside)
    ids = pd.read_csv(tmp_path / "predictions.csv").ImageID
    prefix = "images/" if inside == "train" else ""
    assert ids[0] == f"{prefix}{make_people(24)[0]}/incorrect_mask.jpg"
    assert not (tmp_path / "submission.csv").exists()


def test_a_folder_named_images_beside_a_dataset_is_not_that_dataset(copy):
    (copy / "holiday" / "images").mkdir(parents=True)
    for part in ("train", "eval"):
        assert find_part(copy / "train" / "images", part) == copy / part
        assert find_part(copy / "holiday" / "images", part) is None
