"""Reading csv files as people write them: by Excel, on any system, with ids like NA or 007."""
import csv
import io
from pathlib import Path

import pandas as pd

from core.errors import InputError, as_one_line

csv.field_size_limit(2**31 - 1)  # a cell of a column that is not needed may be long


def read_table(path, columns, key=None):
    """Read a csv file as text: values such as 007 or NA stay strings.

    Commas, semicolons and tabs separate columns; UTF-8 and UTF-16 are read; rows without any value
    are skipped.

    Args:
        path: the csv file.
        columns: columns that it must have, with a value in every row.
        key: column whose values must not be repeated.

    Returns:
        DataFrame of strings, indexed by the line number in the file.

    Raises:
        InputError: if the file is not a csv file, has no rows, or breaks one of these rules.
    """
    expected = f"columns {','.join(columns)}" if columns else "a csv file"
    try:
        data = Path(path).read_bytes()
        is_utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
        header, rows = _parse_csv(text, columns)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a csv file"
                         ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a csv text file in UTF-8 ({as_one_line(error)}); save it as "
                         f"CSV UTF-8; expected {expected}") from None
    except csv.Error as error:
        raise InputError(f"{path}: not a csv text file ({error}); expected {expected}") from None
    except ValueError as error:  # its message starts with ": " or ", line N: "
        raise InputError(f"{path}{as_one_line(error)}; expected {expected}") from None
    if not rows:
        raise InputError(f"{path}: no rows; expected at least one below the column names")
    table = pd.DataFrame(list(rows.values()), index=list(rows), columns=header, dtype=str)
    for column in columns:
        if (table[column] == "").any():
            line = table.index[table[column] == ""][0]
            raise InputError(f"{path}, line {line}: no {column}; expected {expected}")
        if table[column].str.contains("\n").any():
            line = table.index[table[column].str.contains("\n")][0]
            raise InputError(f"{path}, line {line}: a line break in {column}; a quote may be "
                             f"missing before or after it")
    if key and table[key].duplicated().any():
        line = table.index[table[key].duplicated()][0]
        raise InputError(f"{path}, line {line}: {key} {table[key][line]!r} is repeated; expected "
                         f"each {key} once")
    return table


def _parse_csv(text, columns):
    """Return (column names, values of each row by line number); ValueError for uneven rows."""
    if "\0" in text:
        raise ValueError(": not a csv text file (it holds zero bytes); save it as CSV UTF-8")
    # The separator is the one that gives the wanted columns; if none does, a comma.
    for separator in ";\t,":
        lines = io.StringIO(text, newline=None)
        reader = csv.reader(lines, delimiter=separator, skipinitialspace=True)
        header = _next_names(reader)
        if header and header[0].startswith("sep="):  # Excel's
            header = _next_names(reader)
        if set(columns) <= set(header) and len(header) > 1:
            break
    while header and not header[-1]:
        header.pop()
    if not header:
        raise ValueError(": not a csv text file (it is empty)")
    for name in columns:
        if header.count(name) > 1:
            raise ValueError(f": column {name!r} is repeated")
    missing = [column for column in columns if column not in header]
    if missing:
        raise ValueError(f": no column {missing[0]!r}; found {','.join(header)[:200]}")
    rows, line = {}, reader.line_num
    try:
        for row in reader:
            first, line = line + 1, reader.line_num
            # Empty cells at the end of a row are common, and missing ones count as empty.
            if any(row[len(header):]):
                raise ValueError(f", line {first}: {len(row)} values for {len(header)} columns")
            if any(value.strip() for value in row):
                rows[first] = row[:len(header)] + [""] * (len(header) - len(row))
    except csv.Error as error:
        raise ValueError(f", line {reader.line_num}: not a csv text file ({error})") from None
    return header, rows


def _next_names(reader):
    """Return the next line that is not empty, as column names."""
    return [name.strip() for name in next((row for row in reader if row), [])]
