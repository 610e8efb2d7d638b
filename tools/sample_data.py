"""Draw the built-in sample dataset.

    python -m tools.sample_data --root data/sample
"""
from core.cli import ArgumentParser, run_cli
from core.sample_data import draw_sample_dataset


def main(argv=None):
    root = draw_sample_dataset(parse_args(argv).root)
    print(f"the sample dataset is in {root}")


def parse_args(argv=None):
    parser = ArgumentParser(prog="python -m tools.sample_data",
                            description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="data/sample", help="folder to draw the dataset in")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_cli(main)
