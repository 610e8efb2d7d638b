"""From photos to class probabilities; validation and inference.py share this code."""
import torch
from torch import nn
from tqdm import tqdm

from core import distributed
from core.device import autocast, to_device


class Normalize(nn.Module):
    """uint8 photos (B, H, W, 3), RGB, to normalized floats (B, 3, H, W) in channels_last.

    Args:
        mean, std: three numbers each, of RGB values in [0, 1].
    """

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255)

    def forward(self, images):
        return images.permute(0, 3, 1, 2).float().sub_(self.mean).div_(self.std)


def torch_predictor(model, normalize, amp=None):
    """Return a function from uint8 photos (B, H, W, 3) to probabilities (B, 18).

    Args:
        model: in evaluation mode, on the device of the photos.
        normalize: its `Normalize`, on the same device.
        amp: mixed precision; None means on CUDA only.
    """
    def predictor(images):
        with autocast(images.device, amp):
            logits = model(normalize(images))
        # float32: bfloat16 has about three digits.
        return logits.float().softmax(dim=1)
    return predictor


@torch.inference_mode()
def predict(members, loader, device):
    """Return the class probabilities of every photo by every member: (K, N, 18), float32.

    Args:
        members: K pairs (predictor, tta): a function as `torch_predictor` returns, and "hflip" for
            the mean over the photo and its mirror image, or "none".
        loader: from `dataset.create_eval_loader`: batches of one size, padded at the end.
        device: where the members compute.
    """
    outputs = []
    progress = tqdm(loader, "predict", leave=False, disable=True if distributed.rank() else None)
    for images, *_ in progress:
        images = to_device(images, device)
        # The results stay on the device: copying each batch would make the host wait.
        outputs.append(torch.stack([_predict_views(predictor, images, tta)
                                    for predictor, tta in members]))
    # Bring the batches of all processes together, and drop the padding at the end.
    outputs = distributed.gather_in_order([output.cpu() for output in outputs])
    return torch.cat(outputs, dim=1)[:, :len(loader.dataset)].numpy()


def _predict_views(predictor, images, tta):
    probabilities = predictor(images)
    if tta == "hflip":
        probabilities = (probabilities + predictor(images.flip(2))) / 2
    return probabilities
