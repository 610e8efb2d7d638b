"""Tables as people write them: ids are text, columns never shift, and errors name the line."""
import shutil
import unicodedata

import pandas as pd
import pytest
from conftest import FAST, make_people, write_eval, write_train

import f1
from core.errors import InputError
from core.layout import read_eval, read_train
from core.tables import read_table

TABLE = "id,gender,age,path\n1,male,20,김서연\n2,female,61,b c\n"
ROWS = [["1", "male", "20", "김서연"], ["2", "female", "61", "b c"]]
# Names that a reader of csv files may take for a number, for missing or for a truth value.
ODD_NAMES = ["NA", "null", "007", "1e5", "True", "nan", "None", "0x1F", "1.0", "inf", "-", "#h"]


def quoted(text):
    return "\n".join(",".join(f'"{cell}"' for cell in line.split(","))
                     for line in text.splitlines())


# --- one table ---

@pytest.mark.parametrize(("content", "lines"), [
    (TABLE, [2, 3]), ("\ufeff" + TABLE, [2, 3]), (quoted(TABLE), [2, 3]),
    (TABLE.replace("\n", "\r\n"), [2, 3]), (TABLE.replace("\n", "\r"), [2, 3]),
    (TABLE.replace(",", ";"), [2, 3]), (TABLE.replace(",", "\t"), [2, 3]),
    (TABLE.replace(",", ", "), [2, 3]), ("sep=;\n" + TABLE.replace(",", ";"), [3, 4]),
    (TABLE.encode("utf-16"), [2, 3]), (TABLE.replace(",", "\t").encode("utf-16"), [2, 3]),
    (b"\xfe\xff" + TABLE.encode("utf-16-be"), [2, 3]),
    # A comma at the end of each row, or of all lines; rows of a spreadsheet without any value.
    (TABLE.replace("연\n", "연,\n").replace("b c\n", "b c,,\n"), [2, 3]),
    (TABLE.replace("\n", ",,\n"), [2, 3]), (TABLE + ",,,\n , ,,\n\n", [2, 3]),
    (TABLE.replace("\n2", "\n,,,\n\n2"), [2, 5]),
], ids=["plain", "byte order mark", "quoted", "windows", "mac", "semicolons", "tabs", "spaces",
        "excel", "utf-16", "utf-16 tabs", "utf-16 big", "comma per row", "commas", "ghost rows",
        "ghost rows inside"])
def test_a_table_of_any_shape_is_read_as_text(tmp_path, content, lines):
    path = tmp_path / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    table = read_table(path, ["path", "age"], key="path")
    assert table.columns.tolist() == ["id", "gender", "age", "path"]
    assert table.values.tolist() == ROWS and table.index.tolist() == lines


def test_a_cell_may_hold_separators_quotes_and_line_breaks(tmp_path):
    rows = [['a, "b"; c', "two\nlines"], ["'d'", "\t"], ["5\" wide", "x"]]
    table = pd.DataFrame(rows, columns=["path", "note"])
    table.to_csv(tmp_path / "t.csv", index=False)
    read = read_table(tmp_path / "t.csv", ["path"])
    assert read.values.tolist() == rows and read.index.tolist() == [2, 4, 5]


@pytest.mark.parametrize(("content", "parts"), [
    # Errors of one row name its line, also behind rows of several lines and without values.
    ("path,age\na,1\n\n,,\nb,2,3\n", ["line 5: 3 values for 2 columns"]),
    ("path,age\na,1\n,,\nb\n", ["line 4: no age"]),
    ('note,path,age\n"two\nlines",a,1\nx,,2\n', ["line 4: no path"]),
    ("path,age\na,1\nb,2\n\na,3\n", ["line 5: path 'a' is repeated"]),
    # Other errors tell what to do, or what was found.
    (TABLE.encode("cp949"), ["not a csv text file in UTF-8", "save it as CSV UTF-8"]),
    ("path,age\nä,1\n".encode("latin-1"), ["not a csv text file in UTF-8", "save it as CSV UTF-8"]),
    ("path,age\na,1\n".encode("utf-16-le"), ["zero bytes", "save it as CSV UTF-8"]),
    (TABLE.encode() + bytes(500), ["zero bytes", "save it as CSV UTF-8"]),
    (TABLE.replace(",", "|"), ["no column 'path'", "found id|gender|age|path"]),
    ("# people\n" + TABLE, ["no column 'path'", "found # people"]),
    ("path,age\n", ["no rows; expected at least one below the column names"]),
    ("path,age,path\na,1,b\n", ["column 'path' is repeated"]),
    ("", ["it is empty"]),
], ids=["long row", "short row", "no value", "repeated", "cp949", "latin-1", "utf-16 without mark",
        "zeros behind", "other separator", "comment", "no rows", "two columns", "empty"])
def test_an_error_names_the_line_or_the_remedy(tmp_path, content, parts):
    path = tmp_path / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        read_table(path, ["path", "age"], key="path")
    line = str(caught.value)
    assert line.startswith(str(path)) and "\n" not in line
    for part in parts:
        assert part in line


# --- names ---

def rename_people(root, names):
    """Give the first people of a dataset other names, in train.csv and on disk."""
    csv = root / "train" / "train.csv"
    people = pd.read_csv(csv, dtype=str)
    for index, name in enumerate(names):
        (root / "train" / "images" / people.path[index]).rename(root / "train" / "images" / name)
        people.loc[index, "path"] = name
    people.to_csv(csv, index=False)


def test_people_and_photos_may_be_called_na_or_007(tmp_path):
    root = write_eval(write_train(tmp_path, make_people(12), shots=["mask1", "normal"]), count=3)
    rename_people(root, ODD_NAMES)
    assert sorted(set(read_train(root).person)) == sorted(ODD_NAMES)
    photo = next((root / "eval" / "images").iterdir())
    for name in ODD_NAMES:
        shutil.copy(photo, root / "eval" / "images" / name)
    pd.DataFrame({"ImageID": ODD_NAMES, "ans": 0}).to_csv(root / "eval" / "info.csv", index=False)
    assert read_eval(root).ImageID.tolist() == ODD_NAMES


def test_a_run_whose_people_are_called_na_or_007_ends_with_its_report(command, copy, tmp_path,
                                                                     capsys):
    rename_people(copy, ODD_NAMES)
    # Seed 15 holds NA, null, 007, 1e5 and True out for validation.
    flags = ["--epochs", "1", "--val_ratio", "0.5", "--seed", "15"]
    result = command("train", "--data_dir", copy, *FAST, *flags)
    assert result.returncode == 0, result.stderr
    assert "over 12 people" in result.stdout
    table = read_table(tmp_path / "results" / "valid_predictions.csv", [])
    assert set(table.person) >= {"NA", "null", "007", "1e5", "True"}
    # The score of one or more runs reads the names again.
    f1.main([str(tmp_path / "results")])
    assert "12 people" in capsys.readouterr().out


def test_scores_match_ids_as_text(tmp_path, capsys):
    rows = [f"{name},{i % 18}" for i, name in enumerate([*ODD_NAMES, "7", "7.0", "100000.0"])]
    (tmp_path / "answers.csv").write_text("\n".join(["ImageID,ans", *rows]))
    (tmp_path / "ours.csv").write_text("\n".join(["ImageID;ans", *rows[::-1]]).replace(",", ";"))
    f1.main([str(tmp_path / "ours.csv"), str(tmp_path / "answers.csv")])
    assert "1.000" in capsys.readouterr().out


@pytest.mark.parametrize(("on_disk", "in_table"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_that_look_equal_are_equal(tmp_path, on_disk, in_table):
    """macOS takes the syllables of Korean names and accents apart."""
    names = ["김서연", "é", "Zoë", "plain"]
    people = [unicodedata.normalize(on_disk, name) for name in names]
    root = write_eval(write_train(tmp_path, make_people(4), shots=["mask1"]), count=4)
    rename_people(root, people)
    photos = list((root / "eval" / "images").iterdir())
    for photo, name in zip(photos, people, strict=True):
        photo.rename(photo.with_name(f"{name}.jpg"))
    for part, column, file in [("train", "path", "train.csv"), ("eval", "ImageID", "info.csv")]:
        table = pd.read_csv(root / part / file, dtype=str)
        suffix = ".jpg" if part == "eval" else ""
        table[column] = [unicodedata.normalize(in_table, name) + suffix for name in names]
        table.to_csv(root / part / file, index=False)
    assert len(read_train(root)) == 4
    read = read_eval(root)
    assert read.ImageID.tolist() == table.ImageID.tolist()
    assert [path.rpartition("/")[2] for path in read.path] == [f"{name}.jpg" for name in people]
    # Both forms in info.csv would be two rows for one photo.
    names = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    (root / "eval" / "info.csv").write_text(f"ImageID\n{names[0]}.jpg\n{names[1]}.jpg\n")
    with pytest.raises(InputError, match=r"two ImageIDs name the file .*; expected one"):
        read_eval(root)


def test_two_names_that_look_equal_are_two_people_if_both_folders_exist(tmp_path):
    root = write_train(tmp_path, make_people(2), shots=["mask1"])
    rename_people(root, [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")])
    photos = read_train(root)
    assert photos.person.nunique() == 2 and photos.path.nunique() == 2


@pytest.mark.parametrize(("row", "says"), [
    ("man,20,c", "line 4: gender 'man' of 'c' is not valid; expected male or female"),
    ("male,20.5,c", "line 4: age '20.5' of 'c' is not valid; expected whole years from 0 to 120"),
    ("male,20,../c", "line 4: path '../c' of '../c' is not valid; expected the name of a folder"),
])
def test_a_person_that_is_not_valid_is_named_with_the_line(tmp_path, row, says):
    (tmp_path / "train" / "images").mkdir(parents=True)
    csv = tmp_path / "train" / "train.csv"
    csv.write_text(f"gender,age,path\nmale,20,b\n,,\n{row}\n")
    with pytest.raises(InputError, match=f"train.csv, {says}".replace("(", r"\(")):
        read_train(tmp_path)
    # Spaces, capitals and a spreadsheet's "20.0" are no errors of a person.
    csv.write_text("gender,age,path\n Male , 20.0 ,b\nFEMALE,61 ,c\n")
    with pytest.raises(InputError, match="does not match the folders: 'b' is"):
        read_train(tmp_path)


def test_an_eval_photo_that_is_missing_is_named_with_its_line(tmp_path):
    root = write_eval(tmp_path, count=3)
    info = root / "eval" / "info.csv"
    info.write_text(info.read_text().replace("\n", "\n,\n", 1) + "gone.jpg,0\n")
    with pytest.raises(InputError, match=r"has no .gone.jpg., which info.csv lists in line 6"):
        read_eval(root)
    info.write_text("ImageID,ans\n,\n../x.jpg,0\n")
    with pytest.raises(InputError, match=r"info.csv, line 3: ImageID '../x.jpg' is not"):
        read_eval(root)
