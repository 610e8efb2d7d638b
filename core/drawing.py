"""Photos with boxes and predictions drawn on them."""
import os
from pathlib import Path

import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from core.errors import InputError
from core.faces import BOX
from core.files import write_atomically
from core.images import read_image
from core.labels import AGES, MASKS

MASK_WORDS = ("mask worn", "mask worn incorrectly", "no mask")
AGE_WORDS = ("under 30", "30 to 59", "60 and over")
# Green, yellow and red that people with red-green blindness can tell apart; the words say it, too.
MASK_COLORS = ("#009e73", "#f0e442", "#d55e00")
TEXT_COLORS = ("white", "black", "white")


def draw_predictions(pixels, rows):
    """Draw the predictions for one photo on it.

    Args:
        pixels: uint8 array (H, W, 3), RGB.
        rows: DataFrame with the columns of `inference.readable_columns` and, if faces were looked
            for, the boxes in pixels. A row without a box is about the whole photo.

    Returns:
        PIL image of the same size.
    """
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    unit = max(image.size) / 400  # line width in pixels, relative to the photo
    font = ImageFont.load_default(size=max(12, 9 * unit))
    labels = []
    for row in rows.to_dict("records"):
        box = [row.get(name, pd.NA) for name in BOX]
        left, top, width, height = (0, 0, *image.size) if pd.isna(box[0]) else box
        mask = MASKS.index(row["mask"])
        draw.rectangle((left, top, left + width - 1, top + height - 1), outline=MASK_COLORS[mask],
                       width=round(max(2, 2 * unit)))
        text = "no face found\n" if row.get("crop") == "plain" else ""
        text += (f"{MASK_WORDS[mask]} {row['mask_probability']:.0%}\n"
                 f"{row['gender']} {row['gender_probability']:.0%}\n"
                 f"{AGE_WORDS[AGES.index(row['age'])]} {row['age_probability']:.0%}")
        labels.append((text, mask, (left, top, top + height)))
    # Draw the labels last, so that no box crosses them: above the box, or below it, or inside it.
    # Without a box: at the bottom of the photo.
    for text, mask, (left, top, bottom) in labels:
        _, _, text_width, text_height = draw.multiline_textbbox((0, 0), text, font, spacing=unit)
        text_width, text_height = text_width + 4 * unit, text_height + 4 * unit
        x = min(max(left, 0), max(image.width - text_width, 0))
        inside = max(top, 0) if bottom < image.height else image.height - text_height
        y = next((y for y in (top - text_height, bottom)
                  if y >= 0 and y + text_height <= image.height), inside)
        draw.rectangle((x, y, x + text_width, y + text_height), MASK_COLORS[mask])
        draw.multiline_text((x + 2 * unit, y + unit), text, TEXT_COLORS[mask], font,
                            spacing=unit)
    return image


def drawn_path(folder, image_id):
    """Return where the drawing of a photo goes: always a .jpg inside the folder."""
    path = Path(image_id)
    parts = ["_" if part == ".." else part for part in path.parts if part != path.anchor]
    name = parts[-1] if path.suffix.lower() in (".jpg", ".jpeg") else f"{parts[-1]}.jpg"
    return Path(folder, *parts[:-1], name)


def check_draw_folder(folder, photos, searched):
    """Raise InputError if drawings cannot be written there, or would be taken for photos.

    Args:
        folder: of the drawings.
        photos: table with ImageID and path.
        searched: folders in which the photos were found; the next run would find drawings there.
    """
    parent = next(path for path in [Path(folder), *Path(folder).absolute().parents]
                  if os.path.lexists(path))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"--draw {folder}: {parent} is not a folder that can be written in; "
                         f"choose another")
    for image_id, path in zip(photos.ImageID, photos.path, strict=True):
        target = drawn_path(folder, image_id)
        if target.exists() and target.samefile(path):
            raise InputError(f"--draw {folder}: would replace the photo {path}; pass another "
                             f"folder")
    for place in searched:
        if Path(folder).resolve().is_relative_to(Path(place).resolve()):
            raise InputError(f"--draw {folder}: is inside {place}, where the next run would take "
                             f"the drawings for photos; pass another folder")


def save_drawings(folder, table):
    """Write every photo with its predictions as a JPEG, in the folders that it has.

    Args:
        folder: where to write; created if necessary.
        table: DataFrame with ImageID, path, and the columns that `draw_predictions` needs.
    """
    for image_id, rows in table.groupby("ImageID", sort=False):
        target = drawn_path(folder, image_id)
        target.parent.mkdir(parents=True, exist_ok=True)
        image = draw_predictions(read_image(rows.path.iloc[0]), rows)
        with write_atomically(target) as temporary:
            image.save(temporary, "JPEG", quality=90)
