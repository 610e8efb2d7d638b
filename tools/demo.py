"""A page on this machine: drop a photo or use the webcam, and see what the model predicts.

    pip install -r requirements-demo.txt && python -m tools.demo --model_dir results
"""
import os
import signal
import sys
import tempfile
from importlib.util import find_spec

import pandas as pd

from core.checkpoint import find_checkpoint, sample_note
from core.cli import STOP_SIGNALS, ArgumentParser, in_range, restores_process, run_cli
from core.device import choose_device
from core.drawing import AGE_WORDS, MASK_WORDS, draw_predictions
from core.errors import InputError, as_one_line
from core.faces import FaceFinder, find_all_faces
from core.framing import FramedPhotos, choose_framings
from core.gradcam import grad_cam, overlay
from core.images import read_image
from core.labels import GENDERS, marginals
from core.prediction import Normalize, predict, torch_predictor
from dataset import CropResize, create_eval_loader
from inference import readable_columns
from model import load_model


@restores_process
def main(argv=None):
    args = parse_args(argv)
    if find_spec("gradio") is None:
        raise InputError("gradio is not installed: pip install -r requirements-demo.txt")
    explainer = Explainer(args.model_dir)
    for number in STOP_SIGNALS[1:]:  # as with Ctrl-C, the photos are deleted
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    # Nothing is sent to other machines, and the photos are deleted at the end.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            page = create_page(explainer)
            page.launch(server_name=args.host, server_port=args.port, share=False, ssr_mode=False,
                        footer_links=[], prevent_thread_lock=True)
        except OSError as error:
            raise InputError(f"--host, --port: {as_one_line(error)}") from None
        page.block_thread()


class Explainer:
    """Predicts one photo for the page. `note` names the model's limits, or is empty."""

    def __init__(self, model_dir):
        model, self.config = load_model(find_checkpoint(model_dir))
        self.detector, (self.framing,), why_no_faces = choose_framings(
            None, None, False, [self.config])
        self.note = sample_note([self.config])
        if why_no_faces:
            self.note += f" Faces are not looked for: {why_no_faces}."
        self.crop_resize = CropResize(self.config["size"], self.config["crop"])
        self.device = choose_device("auto")
        self.model = model.to(self.device)
        self.normalize = Normalize(self.config["mean"], self.config["std"]).to(self.device)

    def __call__(self, path):
        # The same steps as in inference.py, for one photo.
        photos = pd.DataFrame({"ImageID": [str(path)], "path": [str(path)]})
        if self.detector:
            finder = FaceFinder(photos, self.detector)
            photos = find_all_faces(photos, create_eval_loader(finder, 1, 0, self.device))
        dataset = FramedPhotos(photos, self.crop_resize, self.framing)
        predictor = torch_predictor(self.model, self.normalize, self.config.get("amp"))
        loader = create_eval_loader(dataset, 16, 0, self.device)
        probabilities = predict([(predictor, self.config["tta"])], loader, self.device)[0]
        answers = probabilities.argmax(axis=1)
        table = photos.join(readable_columns(probabilities, answers))

        # For the largest face: all probabilities, and a heat map of its class.
        largest = int(photos["height"].fillna(0).argmax()) if self.detector else 0
        parts = zip((MASK_WORDS, GENDERS, AGE_WORDS), marginals(probabilities), strict=True)
        attributes = [dict(zip(names, part[largest].tolist(), strict=True))
                      for names, part in parts]
        image = dataset[largest][0]
        heat = grad_cam(self.model, self.normalize(image[None].to(self.device)), answers[largest])
        return (draw_predictions(read_image(path), table), *attributes,
                None if heat is None else overlay(image.numpy(), heat))


def create_page(explainer):
    # Slow to import, and an optional package.
    import gradio

    def show(path):
        if path is None:  # the photo was removed
            return [None] * 5
        try:
            answers = explainer(path)
        except InputError as error:
            raise gradio.Error(str(error)) from None
        if answers[-1] is None:
            gradio.Info("no heat map: this model has no layer with a height and width")
        return answers

    with gradio.Blocks(title="Mask, gender and age", analytics_enabled=False) as page:
        gradio.Markdown(f"# Mask, gender and age\nBars and heat map: the largest face. "
                        f"{explainer.note}")
        with gradio.Row():
            photo = gradio.Image(type="filepath", image_mode=None, label="photo",
                                 sources=["upload", "webcam", "clipboard"])
            buttons = ["download", "fullscreen"]  # no button that uploads it to a hub
            drawn = gradio.Image(show_label=False, format="jpeg", buttons=buttons)
        with gradio.Row():
            bars = [gradio.Label(label=name) for name in ("mask", "gender", "age")]
            heat = gradio.Image(label="what decided", format="png", height=320, buttons=buttons)
        photo.change(show, photo, [drawn, *bars, heat], api_name="predict")
    return page


def parse_args(argv=None):
    parser = ArgumentParser(prog="python -m tools.demo", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model_dir", required=True, help="checkpoint-N or results folder")
    add("--host", default="127.0.0.1", help="address of the page (0.0.0.0: for other machines)")
    add("--port", type=in_range(int, 1, 65536), help="port (default: a free one from 7860 on)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_cli(main)
