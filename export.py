"""One ONNX file of a checkpoint: uint8 photos in, 18 probabilities out, for phones, servers and fast prediction on CPUs.

    pip install -r requirements-onnx.txt
    python export.py --model_dir=./results/checkpoint-500                     # writes its model.onnx
    python inference.py --model_dir=./results --engine onnxruntime            # does so by itself, and predicts with it

Input `images`: uint8 RGB (batch, height, width, 3) after the crop and resize that the metadata tells; any batch size.
Output `probabilities`: float32 (batch, 18). Normalization and softmax are inside. Metadata: classes, size, crop, tta (JSON each),
preprocessing (what is done by them, in words) and weights_sha256.
"""
import importlib.util
import json
import os
import warnings
from pathlib import Path

import torch
from torch import nn

from checkpoint import find_checkpoint, load_model, sha256
from errors import ArgumentParser, InputError, reason, run

METADATA = ("classes", "size", "crop", "tta")
PREPROCESSING = ("upright RGB; the centre crop, in fractions (height, width) of the photo; antialiased bilinear resize to size "
                 "(height, width) in pixels; with tta hflip the mean over the photo and its mirror image")
TOLERANCE = 1e-4  # of a probability


def main(argv=None):
    args = parse_args(argv)
    checkpoint = find_checkpoint(args.model_dir)
    path = Path(args.output or checkpoint / "model.onnx")
    difference = export_onnx(checkpoint, path)
    print(f"wrote {path}: {path.stat().st_size / 1e6:.1f} MB, its probabilities within {difference:.1e} of torch's")
    print(f"next: python inference.py --model_dir={args.model_dir} --engine onnxruntime")


class Exported(nn.Module):
    """A classifier from uint8 photos (B, H, W, 3) to probabilities (B, 18)."""

    def __init__(self, model, mean, std):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255)

    def forward(self, images):
        return self.model((images.permute(0, 3, 1, 2).float() - self.mean) / self.std).softmax(dim=1)


def export_onnx(checkpoint, path):
    """Write a checkpoint as one ONNX file, whole or not at all, once its probabilities are those of torch.

    Returns:
        The largest difference of a probability on three photos of noise.

    Raises:
        InputError: if the packages are missing, the architecture cannot be exported, the probabilities differ by more than 1e-4,
            or the file cannot be written.
    """
    onnx = _import("onnx")
    _import("onnxscript")
    model, config = load_model(checkpoint)
    model = Exported(model, config["mean"], config["std"]).eval()
    images = torch.randint(256, (3, *config["size"], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(model, (images,), dynamo=True, input_names=["images"], output_names=["probabilities"],
                                        dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, verbose=False)
    except Exception as error:  # whatever an architecture makes the exporter raise
        raise InputError(f"{config['model']} cannot be exported to ONNX ({type(error).__name__}: {reason(error)}); use --engine "
                         f"torch") from None
    graph = program.model_proto
    metadata = {key: json.dumps(config[key]) for key in METADATA}
    metadata |= {"preprocessing": PREPROCESSING, "weights_sha256": sha256(checkpoint / "model.safetensors")}
    for key, value in metadata.items():
        graph.metadata_props.add(key=key, value=value)
    temporary = Path(f"{path}.tmp")
    try:
        onnx.save(graph, temporary)
        with torch.inference_mode():
            expected = model(images)
        difference = (onnx_predictor(temporary)(images.permute(0, 3, 1, 2)) - expected).abs().max().item()
        if not difference <= TOLERANCE:
            raise InputError(f"{checkpoint}: ONNX probabilities differ from torch's by {difference:.1e}, more than {TOLERANCE:g}; "
                             f"nothing was written; use --engine torch")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return difference


def find_onnx(checkpoint):
    """The model.onnx of a checkpoint, exported if it is not there or is of other weights."""
    path = checkpoint / "model.onnx"
    if not path.is_file() or session_metadata(path).get("weights_sha256") != sha256(checkpoint / "model.safetensors"):
        print(f"exporting {path}, once", flush=True)
        export_onnx(checkpoint, path)
    return path


def onnx_predictor(path):
    """A function from uint8 photos (B, 3, H, W) to probabilities (B, 18), as `inference.torch_predictor` gives, on the CPU."""
    session = _session(path)

    def predict(images):
        images = images.permute(0, 2, 3, 1).contiguous().numpy()
        return torch.from_numpy(session.run(["probabilities"], {"images": images})[0])
    return predict


def session_metadata(path):
    return _session(path).get_modelmeta().custom_metadata_map


def _session(path):
    onnxruntime = _import("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # takes a third more memory, and is no faster
    try:
        return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise InputError(f"{path}: not an ONNX model, or damaged ({reason(error)}); delete it, and it is exported again") from None


def _import(name):
    if importlib.util.find_spec(name) is None:
        raise InputError(f"ONNX needs the package {name}, which is not installed: pip install -r requirements-onnx.txt")
    return importlib.import_module(name)


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", required=True, help="a checkpoint-N, or a results folder for its best")
    parser.add_argument("--output", help="file to write (default: model.onnx in the checkpoint)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
