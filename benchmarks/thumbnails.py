"""A baseline without a network: logistic regression on thumbnails of 16 x 12 pixels.

    python -m benchmarks.thumbnails --data_dir data/sample

It is trained on the train part and scored on the eval part.
"""
import argparse

import numpy as np
from sklearn.linear_model import LogisticRegression

from core.images import read_image
from core.layout import read_eval, read_train
from core.tables import read_table
from dataset import CropResize
from f1 import attribute_f1, macro_f1


def main(argv=None):
    args = parse_args(argv)
    train, valid = read_train(args.data_dir), read_eval(args.data_dir)
    answers = read_table(args.answers or f"{args.data_dir}/eval/answers.csv", ["ImageID", "ans"])
    labels = answers.set_index("ImageID")["ans"].loc[valid.ImageID].astype(int).to_numpy()
    train_pixels, valid_pixels = thumbnails(train.path), thumbnails(valid.path)
    for class_weight in (None, "balanced"):
        model = LogisticRegression(max_iter=1000, class_weight=class_weight)
        predictions = model.fit(train_pixels, train.label).predict(valid_pixels)
        attributes = "  ".join(f"{name} {value:.3f}" for name, value
                               in attribute_f1(labels, predictions).items())
        print(f"class weights {class_weight or 'none'}: "
              f"macro F1 {macro_f1(labels, predictions):.4f}  {attributes}")


def thumbnails(paths, size=(16, 12)):
    """Return an array with one row per photo: size[0] * size[1] * 3 numbers in [0, 1]."""
    crop_resize = CropResize(size)
    return np.stack([crop_resize(read_image(path)).ravel() / 255 for path in paths])


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="data/sample",
                        help="dataset with a train and an eval part")
    parser.add_argument("--answers", help="csv with the true classes of the eval part "
                                          "(default: eval/answers.csv in the dataset)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
