"""Write a checkpoint as one ONNX file, for phones, servers and fast prediction on CPUs.

    pip install -r requirements-onnx.txt
    python -m tools.export --model_dir=./results/checkpoint-500    # writes its model.onnx
    python inference.py --model_dir=./results --engine onnxruntime # exports if needed, predicts

`core/onnx_model.py` describes the input, the output and the metadata.
"""
import shlex
from pathlib import Path

from core.checkpoint import find_checkpoint
from core.cli import ArgumentParser, run_cli, script
from core.files import check_output
from core.onnx_model import export_onnx
from model import load_model


def main(argv=None):
    args = parse_args(argv)
    checkpoint = find_checkpoint(args.model_dir)
    path = Path(args.output or checkpoint / "model.onnx")
    check_output(path, suffix=".onnx")
    difference = export_onnx(*load_model(checkpoint), checkpoint, path)
    print(f"wrote {path}: probabilities within {difference:.1e} of torch's")
    print(f"next: {script('inference.py')} --model_dir={shlex.quote(args.model_dir)} "
          f"--engine onnxruntime")


def parse_args(argv=None):
    parser = ArgumentParser(prog="python -m tools.export", description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", required=True,
                        help="a checkpoint-N, or a results folder (its best checkpoint)")
    parser.add_argument("--output", help="file to write (default: model.onnx in the checkpoint)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_cli(main)
