"""Figures: a confusion matrix, and sheets of photos with captions."""
import math
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from layout import CLASS_NAMES, PROBABILITIES, read_image


def confusion_matrix(labels, predictions, path):
    """Write a PNG of the 18 x 18 confusion matrix, rows in shares of their true class; returns it as an array (H, W, 3)."""
    # Slow to import, and needed once at the end of a run.
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    figure = Figure(figsize=(10, 10), dpi=90)
    axes = figure.add_axes((0.23, 0.23, 0.76, 0.76))
    ConfusionMatrixDisplay.from_predictions(
        labels, predictions, labels=range(len(CLASS_NAMES)), display_labels=CLASS_NAMES, normalize="true",
        xticks_rotation="vertical", values_format=".2f", cmap="Blues", ax=axes, colorbar=False, text_kw={"fontsize": 7})
    figure.savefig(path)
    return np.asarray(Image.open(path).convert("RGB"))


def photo_sheet(images, captions, path, columns=6, height=192):
    """Write a PNG of photos in a grid, each with its caption of one or more lines above it.

    Args:
        images: PIL images or uint8 arrays (H, W, 3).
        captions: a string each.
        path: of the PNG.
        columns: photos in a row.
        height: of each photo in pixels; the widths follow its shape.

    Returns:
        The sheet as a PIL image.
    """
    images = [image if isinstance(image, Image.Image) else Image.fromarray(image) for image in images]
    font = ImageFont.load_default(size=11)
    widths = [round(height * image.width / image.height) for image in images]
    width = max(widths + [int(font.getlength(line)) + 4 for caption in captions for line in caption.split("\n")])
    text_height = 15 * max(caption.count("\n") + 1 for caption in captions) + 3
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (min(columns, len(images)) * (width + 6), rows * (height + text_height + 6)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = place % columns * (width + 6), place // columns * (height + text_height + 6)
        draw.multiline_text((left + 2, top), caption, fill="black", font=font, spacing=2)
        sheet.paste(image.resize((widths[place], height), reducing_gap=2.0), (left, top + text_height))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return sheet


def inputs_sheet(dataset, sampler, path, count=24):
    """Write a sheet of the first augmented inputs of training; returns it as an array (H, W, 3)."""
    draws = [draw for batch in islice(sampler, count) for draw in batch][:count]
    images, targets = zip(*(dataset[draw] for draw in draws), strict=True)
    names = [CLASS_NAMES[target.argmax()] for target in targets]
    sheet = photo_sheet([image.permute(1, 2, 0).numpy() for image in images], names, path)
    return np.asarray(sheet)


def mistakes_sheet(predictions, paths, path, count=24):
    """Write a sheet of the photos whose true class got the least probability, with true and predicted names.

    Args:
        predictions: table with label, ans and p0..p17, a row a photo.
        paths: of those photos.
        path: of the PNG.

    Returns:
        The sheet as an array (H, W, 3), or None if there is no mistake.
    """
    labels, answers = predictions.label.to_numpy(), predictions["ans"].to_numpy()
    probabilities = predictions[PROBABILITIES].to_numpy()
    wrong = np.flatnonzero(labels != answers)
    worst = wrong[np.argsort(probabilities[wrong, labels[wrong]], kind="stable")][:count]
    if not len(worst):
        return None
    captions = [f"true: {CLASS_NAMES[labels[i]]}\npredicted: {CLASS_NAMES[answers[i]]}" for i in worst]
    return np.asarray(photo_sheet([read_image(paths[i]) for i in worst], captions, path))
