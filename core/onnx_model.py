"""A checkpoint as one ONNX file: uint8 photos in, 18 probabilities out.

Input `images`: uint8 RGB (batch, height, width, 3) after crop and resize; any batch size.
Output `probabilities`: float32 (batch, 18). Normalization and softmax are part of the model.
Metadata: classes, size, crop, tta (JSON), preprocessing (in words) and weights_sha256.
"""
import hashlib
import importlib.util
import json
import os
import warnings

import torch
from torch import nn

from core.errors import InputError, as_one_line
from core.files import write_atomically
from core.prediction import Normalize

METADATA = ("classes", "size", "crop", "tta")
PREPROCESSING = ("upright RGB; centre crop in fractions (height, width) of the photo; antialiased "
                 "bilinear resize to size (height, width); tta hflip: mean with the mirror image")
TOLERANCE = 1e-4  # largest accepted difference of a probability from torch's


def export_onnx(model, config, checkpoint, path):
    """Write a checkpoint as an ONNX file, after comparing its probabilities with torch's.

    Args:
        model, config: from `model.load_model(checkpoint)`.
        checkpoint: the checkpoint folder.
        path: the file to write, whole or not at all.

    Returns:
        The largest difference of a probability on three images of noise.

    Raises:
        InputError: if a package is missing, the architecture cannot be exported, or the
            probabilities differ by more than 1e-4.
    """
    onnx = _import("onnx")
    _import("onnxscript")
    # Normalization and softmax become part of the model.
    normalize = Normalize(config["mean"], config["std"])
    model = nn.Sequential(normalize, model, nn.Softmax(dim=1)).eval()
    images = torch.randint(256, (3, *config["size"], 3), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model, (images,), dynamo=True, verbose=False,
                input_names=["images"], output_names=["probabilities"],
                dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # the exporter raises exceptions of any class
        raise InputError(f"{config['model']} cannot be exported to ONNX ({type(error).__name__}: "
                         f"{as_one_line(error)}); use --engine torch") from None
    # Metadata: what a program needs to prepare photos and to name the classes.
    graph = program.model_proto
    metadata = {key: json.dumps(config[key]) for key in METADATA}
    metadata |= {"preprocessing": PREPROCESSING, "weights_sha256": _weights_sha256(checkpoint)}
    for key, value in metadata.items():
        graph.metadata_props.add(key=key, value=value)

    # The file counts only if onnxruntime gives the same probabilities as torch.
    with write_atomically(path) as temporary:
        onnx.save(graph, temporary)
        with torch.inference_mode():
            expected = model(images)
        difference = (onnx_predictor(temporary)(images) - expected).abs().max().item()
        if not difference <= TOLERANCE:
            raise InputError(f"{checkpoint}: ONNX probabilities differ from torch's by "
                             f"{difference:.1e}, more than {TOLERANCE:g}; nothing was written; "
                             f"use --engine torch")
    return difference


def has_current_onnx(checkpoint):
    """Return whether the checkpoint has a model.onnx that was made from its weights."""
    path = checkpoint / "model.onnx"
    if not path.is_file():
        return False
    # A resumed run may have written other weights since.
    metadata = _session(path).get_modelmeta().custom_metadata_map
    return metadata.get("weights_sha256") == _weights_sha256(checkpoint)


def onnx_predictor(path):
    """Return a function from uint8 photos (B, H, W, 3) to probabilities (B, 18), on the CPU."""
    session = _session(path)

    def predictor(images):
        return torch.from_numpy(session.run(["probabilities"], {"images": images.numpy()})[0])
    return predictor


def _session(path):
    onnxruntime = _import("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # it takes a third more memory and is not faster
    try:
        return onnxruntime.InferenceSession(os.fspath(path), options,
                                            providers=["CPUExecutionProvider"])
    except Exception as error:  # damaged files make the reader raise exceptions of any class
        raise InputError(f"{path}: not an ONNX model, or damaged ({as_one_line(error)}); delete "
                         f"it, and it is exported again") from None


def _weights_sha256(checkpoint):
    with open(checkpoint / "model.safetensors", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _import(name):
    if importlib.util.find_spec(name) is None:
        raise InputError(f"ONNX needs the package {name}, which is not installed: "
                         f"pip install -r requirements-onnx.txt")
    return importlib.import_module(name)
