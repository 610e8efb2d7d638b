"""What a task is worth without a network: logistic regression on 16 x 12 thumbnails, scored on the eval part's answers.

    python -m benchmarks.thumbnails --data_dir data/sample
"""
import argparse

import numpy as np
from sklearn.linear_model import LogisticRegression

from dataset import Geometry
from f1 import attribute_f1, macro_f1
from layout import read_eval, read_image, read_table, read_train


def main(argv=None):
    args = parse_args(argv)
    train, valid = read_train(args.data_dir), read_eval(args.data_dir)
    answers = read_table(args.answers or f"{args.data_dir}/eval/answers.csv", ["ImageID", "ans"]).set_index("ImageID")["ans"]
    labels = answers.loc[valid.ImageID].astype(int).to_numpy()
    pixels, unseen = thumbnails(train.path), thumbnails(valid.path)
    for class_weight in (None, "balanced"):
        model = LogisticRegression(max_iter=1000, class_weight=class_weight).fit(pixels, train.label)
        predictions = model.predict(unseen)
        attributes = "  ".join(f"{name} {value:.3f}" for name, value in attribute_f1(labels, predictions).items())
        print(f"class weights {class_weight or 'none'}: macro F1 {macro_f1(labels, predictions):.4f}  {attributes}")


def thumbnails(paths, size=(16, 12)):
    """The photos as rows of size[0] * size[1] * 3 numbers in [0, 1]."""
    geometry = Geometry(size)
    return np.stack([geometry(read_image(path)).ravel() / 255 for path in paths])


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="data/sample", help="dataset with a train and an eval part")
    parser.add_argument("--answers", help="csv of the eval part's true classes (default: eval/answers.csv)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
