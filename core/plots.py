"""Figures: confusion matrix, training curves, reliability plot, and sheets of photos."""
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from core.images import read_image
from core.labels import CLASS_NAMES, PROBABILITIES

SHEET_HEIGHT = 192  # of a photo in a sheet, in pixels


def save_confusion_matrix(labels, predictions, path):
    """Write a PNG of the 18 x 18 confusion matrix; each row is divided by its sum."""
    # Slow to import, and needed only at the end of a run.
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    figure = Figure(figsize=(10, 10), dpi=90)
    axes = figure.add_axes((0.23, 0.23, 0.76, 0.76))
    display = ConfusionMatrixDisplay.from_predictions(
        labels, predictions, labels=range(len(CLASS_NAMES)), display_labels=CLASS_NAMES,
        normalize="true", xticks_rotation="vertical", values_format=".2f", cmap="Blues", ax=axes,
        colorbar=False, text_kw={"fontsize": 7})
    for text in display.text_.flat:  # zeros only hide the others
        text.set_visible(text.get_text() != "0.00")
    figure.savefig(path)


def save_curves(history, losses, path):
    """Write a PNG of losses and macro F1 over the steps of a run.

    Args:
        history: the metrics of every evaluation, of which validation metrics may be missing.
        losses: pairs (step, training loss), as many as there are.
        path: the PNG to write.
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(9, 3.5), dpi=90)
    left, right = (figure.add_axes((x, 0.14, 0.43, 0.82)) for x in (0.05, 0.55))
    steps = [metrics["step"] for metrics in history]
    if losses:
        left.plot(*zip(*losses, strict=True), color="lightgray")
    for axes, name, label in [(left, "train_loss", "training loss, mean since the last evaluation"),
                              (left, "log_loss", "validation log loss"),
                              (right, "macro_f1", "validation macro F1")]:
        # Without validation only the training loss is there.
        if name in history[-1]:
            axes.plot(steps, [metrics[name] for metrics in history], marker="o", label=label)
    for axes in (left, right):
        axes.set(xlabel="step", xlim=(0, steps[-1] * 1.05), ylim=(0, None))
        axes.legend(*axes.get_legend_handles_labels(), loc="lower left", fontsize=8)
    figure.savefig(path)


def save_reliability(bins, path):
    """Write a PNG of accuracy over confidence, with the number of photos in each bin.

    Args:
        bins: table with confidence, accuracy and photos, as `core.evaluation.calibration` returns.
        path: the PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 4.5), dpi=90)
    axes = figure.add_axes((0.13, 0.12, 0.84, 0.84))
    # A calibrated model is on the diagonal.
    axes.plot([0, 1], [0, 1], color="gray", linestyle="dotted")
    axes.plot(bins.confidence, bins.accuracy, marker="o")
    for row in bins.itertuples():
        axes.annotate(row.photos, (row.confidence, row.accuracy), (4, -10), fontsize=7,
                      textcoords="offset points")
    axes.set(xlabel="confidence (probability of the predicted class)", xlim=(0, 1),
             ylabel="accuracy of the photos with this confidence", ylim=(0, 1))
    figure.savefig(path)


def save_photo_sheet(images, captions, path, columns=6, height=SHEET_HEIGHT):
    """Write a PNG of photos in a grid, each below its caption.

    Args:
        images: uint8 arrays (H, W, 3).
        captions: one string per photo, of one or more lines.
        path: the PNG to write.
        columns: photos per row.
        height: height of each photo in pixels; the aspect ratio is kept.
    """
    images = [Image.fromarray(image) for image in images]
    # The widest photo or caption sets the width of all cells.
    font = ImageFont.load_default(size=11)
    widths = [round(height * image.width / image.height) for image in images]
    lines = [line for caption in captions for line in caption.split("\n")]
    cell_width = max(widths + [int(font.getlength(line)) + 4 for line in lines])
    text_height = 15 * max(caption.count("\n") + 1 for caption in captions) + 3
    # A white sheet with one cell per photo: caption above, photo below.
    cell_height = height + text_height + 6
    rows = math.ceil(len(images) / columns)
    sheet_size = (min(columns, len(images)) * (cell_width + 6), rows * cell_height)
    sheet = Image.new("RGB", sheet_size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = i % columns * (cell_width + 6), i // columns * cell_height
        draw.multiline_text((left + 2, top), caption, fill="black", font=font, spacing=2)
        sheet.paste(image.resize((widths[i], height), reducing_gap=2.0), (left, top + text_height))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def save_inputs_sheet(dataset, sampler, path, count=24):
    """Write a sheet of the first augmented training inputs."""
    num_batches = math.ceil(count / sampler.batch_size)
    items = [item for k in range(num_batches) for item in sampler.batch(k)][:count]
    images, targets = zip(*(dataset[item] for item in items), strict=True)
    names = [CLASS_NAMES[target.argmax()] for target in targets]
    save_photo_sheet([image.numpy() for image in images], names, path)


def save_mistakes_sheet(predictions, paths, path, count=24):
    """Write a sheet of the wrong predictions whose true class got the lowest probability.

    Nothing is written if all predictions are right.

    Args:
        predictions: table with ImageID, label, ans and p0..p17, one row per photo.
        paths: the paths of those photos.
        path: the PNG to write.
    """
    labels, answers = predictions.label.to_numpy(), predictions["ans"].to_numpy()
    probabilities = predictions[PROBABILITIES].to_numpy()
    # Of the wrong predictions, those with the lowest probability of the true class.
    wrong = np.flatnonzero(labels != answers)
    worst = wrong[np.argsort(probabilities[wrong, labels[wrong]], kind="stable")][:count]
    names = predictions.ImageID.to_numpy()
    captions = [f"{names[i]}\ntrue: {CLASS_NAMES[labels[i]]}\npredicted: {CLASS_NAMES[answers[i]]}"
                for i in worst]
    if captions:
        save_photo_sheet([read_image(paths[i], (SHEET_HEIGHT,) * 2) for i in worst], captions, path)
